"""What must not be used, in a run: rows are blanked before anything is fetched, and by their file once it was."""

import pyarrow as pa
import pytest

from pipeline.dataset.execute.runner import judge_seeds
from pipeline.dataset.out.forgotten import Forgotten
from pipeline.dataset.out.takedowns import DROPS, KEEPS, Listed, Takedowns
from pipeline.dataset.rows import WITNESS_SCHEMA, Rows, split_seeds
from schemas.columns import LEDGER_SCHEMA, SEED_SCHEMA
from stages.metadata import Metadata
from stages.runtime import Runtime
from stages.settings import Settings

KEYS = [f"a-{row:09d}" for row in range(7)]


@pytest.fixture
def listed(tmp_path):
    def write(*lines):
        path = tmp_path / "removed.txt"
        path.write_text("\n".join(lines))
        return Takedowns(listed=Listed([str(path)]))

    return write


def judged(*urls):
    """Seed rows as the metadata stage leaves them; the second has the first one's URL."""
    rows = [{"key": key, "part": "a", "row": row, "text": "words"} for row, key in enumerate(KEYS)]
    table = pa.Table.from_pylist([row | {"url": url} for row, url in zip(rows, urls, strict=False)], SEED_SCHEMA)
    return judge_seeds(Metadata(Settings(), Runtime()), table)


def blanked(takedowns, urls):
    """Keys of the rows that live on, and keys and verdicts of those that fell, with all that is known of them."""
    rows = split_seeds(takedowns.judged(judged(*urls)))
    dead = rows.dead.to_pylist()
    assert {name for row in dead for name, value in row.items() if value is not None} == set(KEEPS)
    assert {row["stage"] for row in dead} == {"metadata"}
    assert rows.alive["text"].to_pylist() == ["words"] * rows.alive.num_rows
    return rows.alive["key"].to_pylist(), {row["key"]: row["verdict"] for row in dead}


def test_drops_forgotten():
    takedowns = Takedowns(Forgotten().adding(urls=["http://x.example/a"], domains=["gone.example"]))
    urls = ["http://x.example/a", "https://X.example/a", "http://b.gone.example/", "http://y.example/"]
    assert blanked(takedowns, urls) == ([KEYS[3]], dict.fromkeys(KEYS[:3], "forgotten"))


def test_drops_removed(listed):
    urls = ["http://x.example/a", "https://X.example/a", "http://y.example/"]
    assert blanked(listed(urls[0]), urls) == ([KEYS[2]], dict.fromkeys(KEYS[:2], "removed"))


def test_to_forget_is_more_than_to_remove(listed):
    url = "http://x.example/a"
    both = Takedowns(Forgotten().adding(urls=[url]), listed(url).listed)
    assert blanked(both, [url]) == ([], {KEYS[0]: "forgotten"})


def test_without_take_downs_nothing_is_touched():
    table = judged("http://x.example/a")
    assert Takedowns().judged(table) is table
    batch = object()
    assert [one is batch for one in Takedowns().without_contents(iter([batch]))] == [True]


@pytest.mark.parametrize("reason", DROPS)
def test_a_file_that_comes_from_yet_another_url_is_withheld(listed, reason):
    file, other = "ab" * 32, "cd" * 32
    takedowns = listed(file) if reason == "removed" else Takedowns(Forgotten().adding(contents=[file]))
    fetched = [("u", file), ("v", other), ("w", file)]
    alive = pa.Table.from_pylist(
        [
            {"key": KEYS[row], "part": "a", "row": row, "url": url, "sha256": digest, "image": b"bytes"}
            for row, (url, digest) in enumerate(fetched)
        ]
    )
    small = {"key": KEYS[5], "part": "a", "row": 5, "url": "x", "verdict": "small_image", "stage": "size"}
    dead = pa.Table.from_pylist([small | {"sha256": file}, small | {"key": KEYS[6], "row": 6}], schema=LEDGER_SCHEMA)
    photos = [{"key": key, "verdict": "small_image", "image": b"photo"} for key in KEYS[5:7]]
    rows = Rows(alive, dead, pa.Table.from_pylist(photos, schema=WITNESS_SCHEMA))
    (left,) = takedowns.without_contents(iter([rows]))
    assert left.alive["key"].to_pylist() == [KEYS[1]]
    assert left.witnesses["key"].to_pylist() == [KEYS[6]]
    fallen = {row["key"]: row for row in left.dead.to_pylist()}
    assert {key: row["verdict"] for key, row in fallen.items()} == {
        KEYS[0]: reason, KEYS[2]: reason, KEYS[5]: reason, KEYS[6]: "small_image",
    }  # fmt: skip
    assert all(fallen[key]["url"] is None and fallen[key]["sha256"] is None for key in (KEYS[0], KEYS[2], KEYS[5]))
    assert fallen[KEYS[6]]["url"] == "x"
