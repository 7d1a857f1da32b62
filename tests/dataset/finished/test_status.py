"""`python -m pipeline status DIR`: how a run goes, from manifests, ledgers and times alone."""

import json
import os
import signal
import time
from pathlib import Path

import fake_dataset as fake
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from sample_runs import SHARDS, begun, make, without
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.execute import watchers
from pipeline.dataset.execute.make_shard import Finished
from pipeline.dataset.execute.tally import Tally
from pipeline.dataset.finished.status import status, text_of
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.out.ledger import LIVE
from pipeline.shared.files import times, to_path
from schemas.errors import ExitCode, OutputError
from schemas.shard import dataset_text

ROWS = 29
"""Of the bundled sample."""


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """Two shards of six rows each, finished after 10 and 30 seconds, of a run over 36 rows that goes on."""
    out = fake.write(tmp_path / "out", {f"p-0000{n}": fake.mixed("p", 6 * n) for n in range(2)}, finish=False)
    dataset = out / "dataset.json"
    dataset.write_bytes(dataset_text({**json.loads(dataset.read_bytes()), "planned": {"p": 30, "q": 6}}))
    draft = out / "shards" / ".tmp-p-00002.tar.4711"
    draft.write_bytes(b"")
    ends = {dataset: 1000, out / "shards/p-00000.json": 1010, out / "shards/p-00001.json": 1030, draft: 1034}
    for path, end in ends.items():
        os.utime(path, (end, end))
    return out


def test_pace_share_failures_and_time_left_of_a_run_that_goes_on(half):
    now = status(half)
    assert (now["is_over"], now["shards"], now["rows"], now["kept"]) == (False, 2, 12, 4)
    assert now["dropped"] == {"unsafe": 2, "not_found": 2, "small_face": 2, "empty_mask": 2}
    assert (now["planned_rows"], now["planned_done"]) == (36, 12)
    assert now["rows_per_second"] == now["recent_rows_per_second"] == pytest.approx(0.4)
    assert now["seconds_left"] == pytest.approx(60)
    assert now["in_the_making"] == {"p-00002": 1034}
    lines = text_of(now, half, 1040).splitlines()
    assert lines[0] == f"{half}: 2 shards, 12 rows, kept 4 (33.3 %)"
    assert "The run began 0:00:40 ago: 0.4 rows/s since the run began, 0.4 rows/s in the last hour of it" in lines
    assert "12 of 36 rows are done, about 0:01:00 left" in lines
    assert "In the making: p-00002" in lines
    assert "No news" not in text_of(now, half, 1040)
    assert "No news for 0:16:00" in text_of(now, half, 1034 + 16 * 60)


def test_the_recent_pace_counts_where_a_run_has_slowed_down(half):
    os.utime(half / "shards/p-00001.json", (9000, 9000))
    now = status(half)
    assert now["recent_rows_per_second"] == pytest.approx(6 / 3600)
    assert now["seconds_left"] == pytest.approx(24 * 600)


def test_a_run_that_keeps_nothing_says_why_in_one_sentence(half):
    nothing = {**status(half), "kept": 0, "dropped": {"small_image": 10, "not_found": 2}}
    assert "NOTHING IS KEPT of 12 rows: 10 dropped as small_image (a side of the image is" in text_of(
        nothing, half, 1040
    )
    assert "Failed for the network's or a server's trouble: 0 (0.0 %)" in text_of(nothing, half, 1040)
    failing = {**nothing, "dropped": {"timeout": 9, "dns_error": 3}}
    assert "trouble: 12 (100.0 %)" in text_of(failing, half, 1040)


def test_what_verify_thinks_of_a_run_that_goes_on(half):
    (half / "shards" / ".tmp-p-00002.tar.4711").unlink()
    assert not [problem for problem in verify(half) if problem.file == "dataset.json"]


def test_a_run_is_seen_while_it_goes_on_and_at_its_end(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(watchers, "_EVERY_S", -1.0)
    out, seen = without(whole, tmp_path / "out", *SHARDS[6:]), []

    def look(event):
        if isinstance(event, Finished):
            seen.append((status(out), text_of(status(out), out, time.time())))

    assert make(out, watch=look)[0] is ExitCode.OK
    for now, text in seen:
        assert (now["planned_rows"], now["is_over"], now["live"]["shards"]["making"]) == (ROWS, False, 1)
        assert "By its own count" in text
        assert 0 < now["rows"] == now["planned_done"] <= ROWS
    assert [now["shards"] for now, _ in seen] == [7, 8]
    require_over(out)


def require_over(out):
    over = status(out)
    assert (over["is_over"], over["rows"], over["in_the_making"], over["seconds_left"]) == (True, ROWS, {}, 0)
    assert over["live"] is None
    assert "The run is over" in text_of(over, out, time.time())
    assert not verify(out)
    result = CliRunner().invoke(app, ["status", str(out), "--json"])
    assert set(json.loads(result.stdout)) == {
        *("is_over", "shards", "rows", "kept", "dropped", "planned_rows", "planned_done", "begun", "last_shard"),
        *("rows_per_second", "recent_rows_per_second", "in_the_making", "live", "seconds_left"),
    }
    assert "kept" in CliRunner().invoke(app, ["status", str(out)]).output


@pytest.mark.long
def test_a_real_run_is_seen_from_another_process_until_its_end(whole, tmp_path):
    out = without(whole, tmp_path / "out", *SHARDS[1:])
    process = begun(out)
    process.send_signal(signal.SIGSTOP)
    now = status(out)
    assert now["planned_rows"] == ROWS
    assert now["live"]["shards"]["making"] == 1
    assert "By its own count" in text_of(now, out, time.time())
    assert 0 < now["rows"] == now["planned_done"] <= ROWS
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=120)
    make(out)
    require_over(out)


def test_a_remote_run_is_seen_too():
    MemoryFileSystem.store.clear()
    store = to_path("memory://bucket/status")
    fake.write(store, {"p-00000": fake.mixed("p")}, finish=False)
    now = status(store)
    assert (now["rows"], now["kept"], now["in_the_making"], now["is_over"]) == (6, 2, None, False)
    assert abs(time.time() - now["begun"]) < 600
    assert now["last_shard"] >= now["begun"]
    MemoryFileSystem.store.clear()


def test_a_site_that_says_nothing_of_times_is_one_sentence(half, monkeypatch):
    """As https:// does."""
    monkeypatch.setattr("pipeline.dataset.finished.status.times", lambda folder: {})
    with pytest.raises(OutputError, match="does not say when its files were written"):
        status(half)


@pytest.mark.parametrize("key", ["mtime", "LastModified", "last_modified", "updated"])
def test_times_of_other_stores(key, monkeypatch):
    from datetime import UTC, datetime

    from pipeline.shared.files import RemotePath

    moment = datetime(2026, 1, 2, tzinfo=UTC)
    value = {"mtime": moment.timestamp(), "updated": "2026-01-02T00:00:00Z"}.get(key, moment)
    monkeypatch.setattr(RemotePath, "listing", lambda self: {"a": {key: value}, "b": {}})
    assert times(RemotePath("memory://x")) == {"a": moment.timestamp()}


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    with pytest.raises(OutputError):
        status(tmp_path)


def snapshot(**changes):
    return json.dumps({"time": 1030, **Tally(36).snapshot(), "warnings": {}, **changes})


def test_a_snapshot_that_a_run_wrote_is_shown(half):
    (half / LIVE).write_text(snapshot())
    assert "By its own count" in text_of(status(half), half, 1040)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "5", "{}", '{"time": 1e999, "rows": 1, "kept": 1}', "[" * 100_000),
        *(snapshot(seconds_left="x"), snapshot(input_rows=[1])),
    ],
)
def test_a_snapshot_that_no_run_wrote_is_none(text, half):
    (half / LIVE).write_text(text)
    now = status(half)
    assert now["live"] is None
    assert "By its own count" not in text_of(now, half, 1040)
