"""pack.layout = plain: the names that other tools look for, and all of ours read them still."""

import tarfile

import pytest
import webdataset
from rich.console import Console
from sample_runs import SHARDS, make

from pipeline.dataset.config import load_config
from pipeline.dataset.finished.export_json import export_json
from pipeline.dataset.finished.group.grouping import Wish, group
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.plan import make_plan
from pipeline.shared.tars import unpack
from pipeline.train.loader.dataset import first_samples, open_dataset
from pipeline.train.settings import DataSettings
from schemas.errors import ExitCode

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves tars open


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "out"
    assert make(out, "pack.layout=plain")[0] is ExitCode.OK
    return out


def test_open_clip_finds_image_and_caption(plain):
    """Its pipeline, less its transforms."""
    tars = [str(plain / "shards" / f"{name}.tar") for name in SHARDS]
    pipeline = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).select(
        lambda sample: "txt" in sample and "jpg" in sample
    )
    rows = list(pipeline.decode("pilrgb").rename(image="jpg;png;jpeg;webp", text="txt").to_tuple("image", "text"))
    assert len(rows) == 9
    assert all(min(image.size) >= 512 and text for image, text in rows)


def test_our_own_readers_know_it_by_the_native_names(plain, whole, tmp_path):
    assert not verify(plain)
    for name in SHARDS:
        for ours, native in zip(*(unpack(out / "shards" / f"{name}.tar") for out in (plain, whole)), strict=True):
            assert {**native.files, "txt": ours.files["txt"]} == ours.files
    dataset = open_dataset([str(plain)], DataSettings())
    assert {"full.jpg", "txt"} <= dataset.suffixes
    assert len(list(first_samples(dataset, 9, ["json", "full.jpg"]))) == 9
    assert export_json(plain, tmp_path / "exported") == (9, 0)
    import datasets

    rows = datasets.load_dataset(str(plain), split="train", streaming=True)
    assert all(row["jpg"] and row["txt"] == row["json"]["text"] for row in rows)


def test_a_grouped_dataset_stays_in_it(plain, tmp_path):
    group([plain], tmp_path / "out", Wish(), Console(quiet=True))
    assert verify(tmp_path / "out") == []
    with tarfile.open(tmp_path / "out" / "shards" / "persons-00000.tar") as tar:
        suffixes = {name.partition(".")[2] for name in tar.getnames()}
    assert {"jpg", "txt", "json"} < suffixes
    assert "full.jpg" not in suffixes


def test_the_layout_is_of_the_plan_where_it_is_not_native():
    plans = [make_plan(load_config(None, sets, shards="sample")) for sets in ([], ["pack.layout=plain"])]
    assert "pack" not in plans[0].identity["settings"]
    assert plans[1].identity["settings"]["pack"] == {"layout": "plain"}
