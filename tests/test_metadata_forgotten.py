"""The metadata stage gives this reason through pipeline.forgotten, which knows the list of OUT."""

import pyarrow as pa

from pipeline.forgotten import Forgotten
from pipeline.runner import judge_seeds, split_seeds
from schemas.columns import SEED_SCHEMA
from schemas.drops import DropReason
from stages.metadata import Metadata
from stages.settings import Settings


def test_drops_forgotten() -> None:
    rows = [
        {"key": "a-0", "part": "a", "row": 0, "url": "http://x.example/gone.jpg", "text": "words"},
        {"key": "a-1", "part": "a", "row": 1, "url": "http://x.example/stays.jpg"},
        {"key": "a-2", "part": "a", "row": 2, "url": "https://x.example/gone.jpg", "nsfw": "NSFW"},
    ]
    judged = judge_seeds(Metadata(Settings()), pa.Table.from_pylist(rows, schema=SEED_SCHEMA))
    parted = split_seeds(Forgotten("salt").and_urls(["http://X.example/gone.jpg"]).judged(judged))
    assert parted.alive["key"].to_pylist() == ["a-1"]
    told = parted.dead.to_pylist()
    assert [(row["key"], row["verdict"], row["stage"]) for row in told] == [
        ("a-0", DropReason.FORGOTTEN, "metadata"),
        ("a-2", DropReason.FORGOTTEN, "metadata"),
    ]
    assert {name for row in told for name, value in row.items() if value is not None} == {
        "key", "part", "row", "verdict", "stage",
    }  # fmt: skip
