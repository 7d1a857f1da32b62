"""Files in OUT/shards that are not ours, and manifests of ours that cannot be read."""

import shutil

import fake_dataset as fake
import pytest
from sample_runs import make

from pipeline.dataset.out.ledger import funnel, read_manifests, shard_names
from pipeline.dataset.out.output import Output
from pipeline.shared.files import to_path
from pipeline.train.loader.dataset import open_dataset
from pipeline.train.settings import DataSettings
from schemas.errors import CorruptShardError, ExitCode, LostError, SourceError

FOREIGN = {
    "index.json": b'{"wids_version": 1, "shardlist": []}',
    "a-00000.tar.idx": b"energon",
    "notes-2026.json": b"[]",
    ".info.json": b"{}",
    "a-000.json": b"too few digits",
}


def test_files_of_others_stop_neither_a_rerun_nor_training_and_stay(whole, tmp_path):
    finished = shutil.copytree(whole, tmp_path / "out")
    shards = finished / "shards"
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    for name, data in FOREIGN.items():
        (shards / name).write_bytes(data)
    (finished / ".tmp-mine").mkdir()
    (shards / ".nv-meta").mkdir()
    (shards / ".nv-meta" / "split.yaml").write_bytes(b"split_parts: {}")
    assert make(finished)[0] is ExitCode.OK
    opened, other = (open_dataset([str(out)], DataSettings()) for out in (finished, whole))
    assert [shard.name for shard in opened.shards] == [shard.name for shard in other.shards]
    too_large = "filter.min_image_px=5000"  # so nothing is fetched
    assert make(finished, too_large, replan=True)[0] is ExitCode.OK
    assert {path.name for path in shards.iterdir()} >= {*FOREIGN, ".nv-meta"}
    assert {path.name for path in shards.iterdir()} <= {*before, *FOREIGN, ".nv-meta"}
    assert {name: (shards / name).read_bytes() for name in FOREIGN} == FOREIGN
    assert (finished / ".tmp-mine").is_dir()


@pytest.mark.parametrize("url", ["", "memory://foreign"])
def test_what_stands_under_the_name_of_a_manifest_is_never_overlooked(tmp_path, url):
    out = to_path(url) if url else tmp_path
    fake.write(out, {"a-00000": fake.mixed("a"), "a-00001": fake.mixed("a", 6)})
    path = out / "shards" / "a-00001.json"
    path.unlink()
    if url:
        (path / "file").write_bytes(b"below")
    else:
        path.mkdir()
    assert shard_names(out) == ["a-00000", "a-00001"]
    with pytest.raises(CorruptShardError, match=r"a-00001\.json"):
        read_manifests(out)
    with pytest.raises(CorruptShardError, match=r"a-00001\.json"):
        funnel(out)
    with pytest.raises(SourceError, match=r"a-00001\.json"):
        open_dataset([str(out)], DataSettings())
    if url:
        (path / "file").unlink()


def test_a_manifest_that_cannot_be_read_ends_the_run_with_a_sentence(tmp_path):
    (tmp_path / "shards" / "sample-00000.json").mkdir(parents=True)
    with pytest.raises(LostError, match=r"sample-00000\.json cannot be read \(Is a directory\).*same command") as ended:
        make(tmp_path)
    assert "\n" not in str(ended.value)
    with pytest.raises(LostError, match=r"sample-00000\.json cannot be read"):
        Output(tmp_path).is_done("sample-00000", fake.plan())
    assert not list(tmp_path.glob("shards/*.tar"))
