"""Whoever watches a run: lines of JSON, Prometheus, a hook, `status`; and what a run says that keeps nothing."""

import io
import json
import os
import re
import signal
import socket
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from sample_runs import SHARDS, contents, make

from pipeline.dataset.config import WatchSettings
from pipeline.dataset.execute import watchers as watching
from pipeline.dataset.execute.make_shard import Advanced, Finished, Started
from pipeline.dataset.execute.progress import RunScreen
from pipeline.dataset.finished.status import status, text_of
from pipeline.dataset.finished.verify import foreign_files, verify
from pipeline.dataset.out.ledger import LIVE
from pipeline.shared import events
from pipeline.shared.files import to_path
from schemas.errors import ExitCode, UserError

CALLS: list[dict] = []
DOCS = Path(__file__).parents[3] / "docs/watching.md"


def hook(event):
    """It fails each time: that is reported once, and the run goes on."""
    CALLS.append(event)
    raise ZeroDivisionError("of the hook")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    CALLS.clear()
    monkeypatch.setitem(sys.modules, "my_hooks", sys.modules[__name__])


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def metrics(path: Path) -> dict[tuple[str, ...], float]:
    """(name, values of its labels) -> value."""
    families = text_string_to_metric_families(path.read_text())
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


@pytest.mark.parametrize(("shard", "warnings"), [("part-00000", 2), ("part-r1_00000", 0)])
def test_rows_that_failed_before_raise_no_alarm_when_they_fail_again(tmp_path, shard, warnings):
    """That most do is ordinary; the hook of docs/watching.md would have ended the run."""
    said = io.StringIO()
    shown = RunScreen(Console(file=said), 1000)
    with watching.Watchers(shown, tmp_path, WatchSettings()) as watchers, shown:
        watchers.take(Started(shard, 1000, 1000))
        watchers.take(Advanced(shard, Counter({("download", "timeout"): 1000})))
    assert said.getvalue().count("WARNING") == warnings


def test_hosts_are_compared_now_and_then_and_not_for_every_event(tmp_path, monkeypatch):
    """There are 4,000: it took the driver 8 ms an event, of which 64 workers send hundreds a second."""
    shown, calls = RunScreen(Console(file=io.StringIO()), 1000), []
    snapshot = shown.tally.snapshot
    monkeypatch.setattr(shown.tally, "snapshot", lambda: calls.append(1) or snapshot())
    with watching.Watchers(shown, tmp_path, WatchSettings()) as watchers, shown:
        watchers.take(Started("part-00000", 1000, 1000))
        for _ in range(100):
            watchers.take(Advanced("part-00000", Counter({("download", "timeout"): 1})))
    assert len(calls) < 10


def test_events_metrics_and_hook_of_a_run_whose_bytes_they_do_not_change(whole, tmp_path):
    out, prom = tmp_path / "out", tmp_path / "run.prom"
    out.mkdir()
    (out / "events.jsonl").write_text('{"kind": "to')  # a full disk tears a line
    watched = {"events": out / "events.jsonl", "metrics": prom, "hook": "my_hooks:hook"}
    code, text = make(out, *(f"watch.{name}={value}" for name, value in watched.items()))
    assert (code, contents(out)) == (ExitCode.OK, contents(whole))
    assert (verify(out), foreign_files(out)) == ([], [])
    assert not list(out.rglob(".tmp-*"))

    first, *rest = (out / "events.jsonl").read_text().splitlines()
    assert first == '{"kind": "to'
    seen = list(map(json.loads, rest))
    assert seen == CALLS
    assert (seen[0]["kind"], seen[0]["input_rows"], seen[-1]["kind"]) == ("start", 29, "end")
    shards = [event for event in seen if event["kind"] == "shard"]
    assert [event["shard"] for event in shards] == SHARDS
    assert all(event["rows"] == event["kept"] + sum(event["dropped"].values()) for event in shards)
    last = [event for event in seen if event["kind"] == "progress"][-1]
    assert (last["rows"], last["kept"], last["captions"]) == (29, 9, 29)
    assert last["stages"]["download"]["dropped"]["not_found"] == 1
    assert min(last["stages"][name]["seconds"] for name in ("download", "detect", "crop", "pack")) > 0
    assert last["slowest_hosts"].keys() == {"sample.localhost"}
    assert [seen[-1][name] for name in ("kept", "exit_code", "nothing_kept")] == [9, 0, ""]
    assert [event["about"] for event in seen if event["kind"] == "warning"] == ["hook"]
    assert text.count("ZeroDivisionError: of the hook") == text.count("WARNING") == 1

    found = metrics(prom)
    assert found["faceshards_kept",] == found["faceshards_stage_rows_out", "pack"] == 9
    assert found["faceshards_dropped", "not_found", "download"] == found["faceshards_shards", "made"] / 8 == 1


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("hook=no_such_module:f", "no_such_module"),
        ("hook=my_hooks:no_such_function", "no_such_function"),
        ("hook=my_hooks:CALLS", "no function"),
        ("hook=my hooks", "my hooks"),
        ("events={here}", "cannot be written"),
        ("events=nowhere://bucket/e.jsonl", "nowhere"),
        ("metrics={here}/no/such/folder.prom", "cannot be written"),
    ],
)
def test_what_cannot_watch_is_one_sentence_before_anything_is_written(tmp_path, setting, words):
    name, _, value = setting.format(here=tmp_path).partition("=")
    with pytest.raises(UserError, match=words):
        watching.Watchers(RunScreen(Console(), 1), tmp_path / "out", WatchSettings(**{name: value}))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_be_watched_does_not_begin(tmp_path):
    with pytest.raises(UserError, match="no_such_module"):
        make(tmp_path / "out", "watch.hook=no_such_module:f")
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_network_is_gone_says_so_early_and_at_its_end_why_it_kept_nothing(tmp_path, monkeypatch):
    """Into a store, whose `status` knows as much while the run goes on."""
    MemoryFileSystem.store.clear()
    out, part, seen = to_path("memory://bucket/watched"), tmp_path / "part.parquet", []
    monkeypatch.setattr(watching, "_REMOTE_EVERY_S", 0.0)
    take = watching.Watchers.take

    def watched(self, event):
        take(self, event)
        if not seen or isinstance(event, Finished):
            seen.append(status(out))

    monkeypatch.setattr(watching.Watchers, "take", watched)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    urls = [f"http://127.0.0.{n % 200 + 1}:{port}/{n}.jpg" for n in range(1_250)]
    pq.write_table(pa.table({"url": urls, "text": [""] * len(urls)}), part)
    pairs = {"download.allow_loopback": "true", "download.respect_robots": "false", "download.host_failures": 0}
    pairs |= {"download.retries": 0, "source.rows_per_shard": 250, "watch.events": f"{out}/events.jsonl"}
    code, text = make(out, *(f"{name}={value}" for name, value in pairs.items()), shards=str(part), profile="embedded")
    assert code is ExitCode.OK
    found = lines(out / "events.jsonl")
    warnings = {event["about"]: event["text"] for event in found if event["kind"] == "warning"}
    assert sorted(warnings) == ["captions", "network", "nothing_kept"]
    assert all(text.count(f"WARNING: {words}") == 1 for words in warnings.values())
    sentence = "NOTHING IS KEPT of 1,250 rows: 1,250 dropped as connection_error (the connection was refused, reset or"
    assert text.splitlines()[-1].startswith(sentence)
    assert found[-1]["nothing_kept"].startswith(sentence)
    assert sentence in text_of(status(out), out, 0)

    assert [one["live"]["shards"]["made"] for one in seen][:: len(seen) - 1] == [0, 5]
    told = text_of(seen[-1], out, seen[-1]["live"]["time"])
    assert "By its own count, 0:00:00 ago: 1,250 rows, kept 0" in told
    assert "WARNING: None of the first 1,000 rows has a caption" in told
    assert not (out / LIVE).exists()
    assert foreign_files(out) == []
    MemoryFileSystem.store.clear()


def test_the_hook_of_the_docs_ends_a_run_where_it_is_in_vain(monkeypatch):
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(import os\n.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[0], names)
    monkeypatch.setattr(os, "kill", lambda *words: CALLS.append(words))
    for about in ("captions", "network", "nothing_kept"):
        names["stop"]({"kind": "warning", "about": about, "text": ""})
    assert [(os.getpid(), signal.SIGINT)] * 2 == CALLS


def test_a_run_without_rows_says_so(tmp_path):
    part = tmp_path / "part.parquet"
    pq.write_table(pa.table({"url": pa.array([], pa.string())}), part)
    code, text = make(tmp_path / "out", shards=str(part), profile="embedded")
    assert (code, text.splitlines()[-1]) == (ExitCode.OK, "NOTHING IS KEPT of 0 rows.")


def test_a_run_that_ends_in_a_mistake_is_not_said_to_go_on_where_its_out_is_taken_back(tmp_path):
    text = io.StringIO()
    screen = RunScreen(Console(file=text), 1)
    with suppress(UserError), watching.Watchers(screen, tmp_path / "out", WatchSettings()) as watchers:
        watchers.begin()
        raise UserError("models that do not load")
    assert text.getvalue() == ""


@pytest.mark.parametrize("waits", [False, True])
def test_trouble_with_the_last_event_is_an_event_of_the_file(tmp_path, monkeypatch, waits):
    monkeypatch.setattr(events, "_PATIENCE_S", 0.2)
    free = threading.Event()
    monkeypatch.setitem(globals(), "hook", lambda event: event["kind"] != "end" or (waits and free.wait()) or 1 / 0)
    settings = WatchSettings(hook="my_hooks:hook", events=str(tmp_path / "e.jsonl"))
    screen = RunScreen(Console(file=io.StringIO()), 1)
    with suppress(KeyboardInterrupt), watching.Watchers(screen, tmp_path, settings) as watchers:
        watchers.begin()
        raise KeyboardInterrupt
    free.set()
    *_, end, warning = lines(tmp_path / "e.jsonl")
    assert (end["kind"], end["stopped_by"]) == ("end", "KeyboardInterrupt: ")
    assert ("is still busy" if waits else "ZeroDivisionError") in warning["text"]


def test_an_event_may_name_a_folder_that_is_no_unicode(tmp_path):
    file = events.EventFile(str(tmp_path / "e.jsonl"), lambda about, text: pytest.fail(text))
    file.write({"kind": "start", "out": "Zoë/\udcff"})
    file.close()
    assert lines(tmp_path / "e.jsonl") == [{"kind": "start", "out": "Zoë/\udcff"}]


def test_events_may_go_to_a_pipe(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    ours = os.open(pipe, os.O_RDWR)  # as /dev/stdout is in `… | cat`: what is read of it never ends
    file = events.EventFile(str(pipe), lambda about, text: pytest.fail(text))
    file.write({"kind": "start"})
    file.close()
    assert os.read(ours, 100) == b'{"kind": "start"}\n'
    os.close(ours)
