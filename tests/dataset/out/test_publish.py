import json
import tarfile
from contextlib import suppress

import fake_dataset as fake
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.config import load_config
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.out.ledger import read_ledger
from pipeline.dataset.out.output import Output, ShardWriter, differences
from pipeline.dataset.plan import make_plan
from pipeline.dataset.rows import WITNESS_SCHEMA, Rows, tombstones
from pipeline.shared import files as storage
from pipeline.shared.atomic import TEMPORARY, write_atomically
from schemas.columns import COLUMNS, LEDGER_SCHEMA, SEED_SCHEMA, schema
from schemas.errors import OutputError, PlanError, ShardError
from schemas.shard import SUFFIXES, Manifest
from stages.pixels.images import encode_jpeg


@pytest.fixture(scope="module")
def plan():
    return make_plan(load_config(None, [], shards="sample"))


def kept(rows: list[int]) -> Rows:
    names = tuple(name for name in COLUMNS if name not in ("verdict", "stage"))
    records = [
        {
            "key": f"p-{n:09d}",
            "part": "p",
            "row": n,
            "url": f"http://x/{n}",
            **dict.fromkeys(SUFFIXES.values(), b"%d" % n),
        }
        | {"half": None}
        for n in rows
    ]
    return Rows.living(pa.Table.from_pylist(records, schema=schema(names)))


def dropped(rows: list[int]) -> pa.Table:
    records = [{"key": f"p-{n:09d}", "part": "p", "row": n, "url": f"http://x/{n}"} for n in rows]
    table = pa.Table.from_pylist(records, schema=SEED_SCHEMA)
    return tombstones(table, pa.array(["not_found"] * len(rows), pa.string()), "download")


def publish(output: Output, plan, rows_in: int = 5) -> Manifest:
    with output.prepared(plan), ShardWriter(output, "p-00000", plan) as writer:
        writer.add_tombstones(dropped([4, 1]))
        writer.add(kept([0, 2]))
        writer.add(kept([3]))
        return writer.publish(rows_in)


def test_a_shard_is_a_tar_a_ledger_and_a_manifest_that_agree(tmp_path, plan):
    manifest = publish(Output(tmp_path), plan)
    shards = tmp_path / "shards"
    assert sorted(path.name for path in shards.iterdir()) == ["p-00000.json", "p-00000.parquet", "p-00000.tar"]
    assert Manifest.from_json((shards / "p-00000.json").read_text()) == manifest
    assert (manifest.rows_in, manifest.kept, manifest.dropped["not_found"], manifest.dropped["no_face"]) == (5, 3, 2, 0)
    ledger = pq.read_table(shards / "p-00000.parquet")
    assert ledger.schema.equals(LEDGER_SCHEMA)
    assert ledger.column("row").to_pylist() == [0, 1, 2, 3, 4]
    assert ledger.column("verdict").to_pylist() == ["kept", "not_found", "kept", "kept", "not_found"]
    with tarfile.open(shards / "p-00000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert "p-000000000.half.jpg" not in {member.name for member in members}


def test_lost_rows_fail_the_shard_and_leave_nothing(tmp_path, plan):
    with pytest.raises(ShardError, match="6 rows in"):
        publish(Output(tmp_path), plan, rows_in=6)
    assert list((tmp_path / "shards").iterdir()) == []


def test_an_error_in_the_middle_leaves_nothing(tmp_path, plan):
    output = Output(tmp_path)
    with output.prepared(plan):
        with pytest.raises(KeyError), ShardWriter(output, "p-00000", plan) as writer:
            writer.add(Rows.living(kept([0]).alive.drop_columns(["face"])))
        assert list(output.shards.iterdir()) == []


def test_an_interrupt_right_after_the_manifest_got_its_name_takes_no_shard_back(tmp_path, plan, monkeypatch):
    def interrupted(file, data):
        write_atomically(file, data)
        if file.name == "p-00000.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(Output(tmp_path), plan)
    assert Output(tmp_path).is_done("p-00000", plan)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_done_means_a_manifest_of_this_plan_and_files_of_its_lengths(tmp_path, plan):
    output = Output(tmp_path)
    assert not output.is_done("p-00000", plan)
    publish(output, plan)
    assert output.is_done("p-00000", plan)
    other = make_plan(load_config(None, ["filter.min_face_px=9"], shards="sample"))
    assert not output.is_done("p-00000", other)
    with (output.shards / "p-00000.tar").open("ab") as stream:
        stream.write(b"x")
    assert not output.is_done("p-00000", plan)


def test_another_plan_is_refused_with_what_differs(tmp_path, plan):
    publish(Output(tmp_path), plan)
    other = make_plan(load_config(None, ["filter.min_face_px=9"], shards="sample"))
    with (
        pytest.raises(OutputError, match=r"filter\.min_face_px was 128\.0, is now 9\.0"),
        Output(tmp_path).prepared(other),
    ):
        pytest.fail("prepared under another plan")
    with Output(tmp_path).prepared(other, replan=True):
        assert list((tmp_path / "shards").iterdir()) == []


def test_leftovers_of_a_killed_run_are_cleared(tmp_path, plan):
    publish(Output(tmp_path), plan)
    (tmp_path / "shards" / ".tmp-p-00001.tar.77").write_bytes(b"half")
    with Output(tmp_path).prepared(plan):
        assert not list(tmp_path.rglob(".tmp-*"))


def test_two_runs_never_share_an_out(tmp_path, plan):
    with (
        Output(tmp_path).prepared(plan),
        pytest.raises(OutputError, match="Another run"),
        Output(tmp_path).prepared(plan),
    ):
        pytest.fail("two runs in one OUT")


def test_an_out_that_cannot_be_written_is_the_users_mistake(tmp_path, plan):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), Output(tmp_path / "file" / "out").prepared(plan):
        pytest.fail("wrote below a file")


def test_a_broken_dataset_json_is_one_sentence(tmp_path, plan):
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(OutputError, match="cannot be read"), Output(tmp_path).prepared(plan):
        pytest.fail("went on over a broken dataset.json")


def test_witnesses_become_thumbnails_up_to_the_limit(tmp_path, plan):
    photo = encode_jpeg(np.full((900, 1200, 3), 90, np.uint8), 90)
    rows = kept([0])
    records = [{"key": f"k{n}", "verdict": "no_face", "image": photo} for n in range(4)]
    records.append({"key": "bad", "verdict": "corrupt_image", "image": b"junk"})
    witnesses = pa.Table.from_pylist(records, schema=WITNESS_SCHEMA)
    output = Output(tmp_path)
    with output.prepared(plan), ShardWriter(output, "p-00000", plan) as writer:
        writer.add(Rows(rows.alive, rows.dead, witnesses))
        writer.publish(1)
    drops = pq.read_table(output.drops / "p-00000.parquet").to_pylist()
    assert [row["key"] for row in drops] == ["k0", "k1"]


def test_what_a_plan_leaves_at_its_default_is_not_set():
    assert list(differences({"pack": {"hidden": "int8"}}, {})) == ["pack.hidden was 'int8', is now not set"]


def test_two_plans_differ_in_the_model_that_is_another():
    def plan(*models: tuple[str, str, str]):
        return {"models": [dict(zip(("task", "name", "sha256"), model, strict=True)) for model in models]}

    segmenter = ("segmenter", "bisenet", 64 * "c")
    before, now = plan(("detector", "scrfd", 64 * "a"), segmenter), plan(("detector", "scrfd", 64 * "b"), segmenter)
    assert list(differences(before, now)) == [f"models.detector scrfd was '{12 * 'a'}', is now '{12 * 'b'}'"]
    assert list(differences(before, plan(segmenter))) == [f"models.detector scrfd was '{12 * 'a'}', is now not set"]


def test_names_of_folders_need_not_be_unicode(tmp_path):
    out = fake.write(tmp_path / "caf\udce9", {"a-00000": fake.mixed("a")})
    assert verify(out) == []
    assert read_ledger(out, "a-00000", ("row",)).num_rows == 6


@pytest.mark.parametrize("folder", ["", "shards"])
def test_a_mistake_leaves_no_new_out_whatever_was_being_written(tmp_path, plan, folder):
    out = tmp_path / "out"
    with suppress(PlanError), Output(out).prepared(plan):
        (out / folder / f"{TEMPORARY}draft").write_bytes(b"of a process that was killed, or of the progress")
        raise PlanError("models that do not load")
    assert not out.exists()
    output = Output(out)
    with output.prepared(plan):
        output.describe(plan, {"shards": ["p-00000"]})
        (out / "shards" / "p-00000.json").touch()
    before = (out / "dataset.json").read_bytes()
    for mistake in (PlanError, ImportError):
        with suppress(mistake), output.prepared(plan):
            output.describe(plan, {"planned": {"mistaken": 1}})
            raise mistake("models that do not load any more")
        assert (out / "dataset.json").read_bytes() == before
    with suppress(PlanError), output.prepared(plan):
        (out / "shards" / "p-00001.json").touch()
        raise PlanError("an endpoint that refuses its key meanwhile")
    assert "shards" not in json.loads((out / "dataset.json").read_bytes()), "which no longer are those"
