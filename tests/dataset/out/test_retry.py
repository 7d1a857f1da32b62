"""`--retry transient`: another chance for what failed for the network's trouble, and a funnel that counts rows once."""

import io
import json
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from sample_runs import no_report, remembered_models

from pipeline.dataset.config import load_config
from pipeline.dataset.execute import watchers
from pipeline.dataset.execute.make_shard import Event, Started
from pipeline.dataset.finished.forget import forget
from pipeline.dataset.finished.status import status, text_of
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.job import make_dataset, prepared
from pipeline.dataset.out.ledger import funnel, read_ledger, read_manifests
from pipeline.dataset.out.output import Output
from pipeline.dataset.source import sample
from pipeline.shared import terminal
from pipeline.shared.tars import unpack
from schemas.errors import ExitCode
from schemas.names import shard_name, shard_origin

ROWS = 12
FLAKY = {1: 500, 4: 429, 5: 503, 8: 502, 10: 500}
"""Row -> what the server answers at first."""
GONE = 2
FACES = (0, 5)


class Server:
    """Serves `/N.jpg`: with the status in `failing`, or a picture; remembers what it was asked for."""

    def __init__(self) -> None:
        self.failing = {**FLAKY, GONE: 404}
        self.hits: Counter[int] = Counter()
        with remembered_models():
            face, plain = sample.FILES["astronaut.jpg"](), sample.FILES["small.jpg"]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                number = int(self.path.strip("/").partition(".")[0])
                outer.hits[number] += 1
                status = outer.failing.get(number, 200)
                body = (face if number in FACES else plain) if status == 200 else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda request, client_address: None  # small pictures are not read to their end
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def write_part(self, path: Path, prefix: str = "") -> None:
        urls = [f"http://127.0.0.1:{self.http.server_port}/{n}.jpg{prefix}" for n in range(ROWS)]
        pq.write_table(pa.table({"URL": urls, "TEXT": [f"caption {n}" for n in range(ROWS)]}), path)


@pytest.fixture(scope="module")
def started() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def server(started) -> Server:
    started.failing = {**FLAKY, GONE: 404}
    started.hits.clear()
    return started


@pytest.fixture(scope="module")
def made(started, tmp_path_factory) -> tuple[Path, Path]:
    """OUT of a run while rows fail, and after another one that gave them their second chance."""
    folder = tmp_path_factory.mktemp("retry")
    started.failing = {**FLAKY, GONE: 404}
    started.write_part(folder / "part.parquet")
    assert run(folder / "part.parquet", folder / "first", retry=False)[0] == ExitCode.OK
    shutil.copytree(folder / "first", folder / "second")
    started.failing = {GONE: 404}
    assert run(folder / "part.parquet", folder / "second")[0] == ExitCode.OK
    return folder / "first", folder / "second"


@pytest.fixture
def first(made, server, tmp_path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "out"))


@pytest.fixture
def second(made, server, tmp_path) -> Path:
    server.failing = {GONE: 404}
    return Path(shutil.copytree(made[1], tmp_path / "out"))


@pytest.fixture
def part(server, tmp_path) -> Path:
    path = tmp_path / "part.parquet"
    server.write_part(path)
    return path


SETS = (
    "download.allow_loopback=true",
    "download.respect_robots=false",
    "download.retries=0",
    "download.host_failures=0",
    "source.rows_per_shard=4",
)


def run(
    part: Path | str,
    out: Path,
    *,
    retry: bool = True,
    report: bool = False,
    watch: Callable[[Event], None] | None = None,
) -> tuple[ExitCode, str]:
    config = load_config(None, SETS, shards=str(part), profile="embedded", executor="local")
    said = io.StringIO()
    with remembered_models(), nullcontext() if report else no_report(), prepared(str(part), config) as job:
        return make_dataset(job, out, Console(file=said, width=200), retry=retry, watch=watch), said.getvalue()


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


def shards(out: Path) -> list[str]:
    return [manifest.shard for manifest in read_manifests(out)]


def verdicts(out: Path) -> dict[int, str]:
    """Row -> the last that was said of it."""
    last = {}
    for name in sorted(shards(out), key=lambda name: shard_origin(name)[1]):
        for row in read_ledger(out, name, ("row", "verdict")).to_pylist():
            last[row["row"]] = row["verdict"]
    return last


def packed(out: Path) -> list[str]:
    return sorted(sample.key for path in (out / "shards").glob("*.tar") for sample in unpack(path))


def check(out: Path) -> None:
    """Everything that tells of rows tells of each once, and alike."""
    said = verdicts(out)
    counted, told = funnel(out), json.loads((out / "dataset.json").read_bytes())
    assert len(said) == ROWS == counted.rows_in == told["rows_in"]
    kept = [row for row, verdict in said.items() if verdict == "kept"]
    assert len(kept) == counted.kept == told["kept"]
    assert told["rows_in"] == told["kept"] + sum(told["dropped"].values())
    dropped = Counter(verdict for verdict in said.values() if verdict != "kept")
    assert {reason: count for reason, count in told["dropped"].items() if count} == dropped
    assert sum((Counter(row.dropped) for row in counted.rows), Counter()) == dropped
    assert packed(out) == sorted(f"part-{row:09d}" for row in kept)
    assert all(manifest.conserves_rows() for manifest in read_manifests(out))
    assert verify(out) == []


def test_only_transient_failures_are_fetched_again_into_further_shards(server, part, first):
    out = first
    before = contents(out)
    server.failing = {GONE: 404, 10: 500}
    server.hits.clear()
    assert run(part, out, report=True)[0] == ExitCode.OK
    assert server.hits == Counter(FLAKY.keys())
    assert [name for name in shards(out) if shard_origin(name)[1]] == ["part-r1_00000", "part-r1_00001"]
    assert {name: data for name, data in contents(out).items() if name in before} == before
    check(out)
    assert verdicts(out)[5] == "kept"
    assert verdicts(out)[10] == "server_error"
    captions = {s.key: json.loads(s.files["json"])["text"] for s in unpack(out / "shards" / "part-r1_00000.tar")}
    assert captions == {"part-000000005": "caption 5"}
    page = (out / "report.html").read_text()
    assert '<div class="reason"><a href="#drop-server_error">' in page
    assert '<div class="reason"><a href="#drop-rate_limited">' not in page


def test_each_call_is_a_round_for_what_failed_in_the_one_before(server, part, tmp_path):
    out = tmp_path / "out"
    assert run(part, out)[0] == ExitCode.OK  # all fail again, in the same call
    check(out)
    server.failing = {GONE: 404}
    server.hits.clear()
    run(part, out)
    assert server.hits == Counter(FLAKY.keys())
    assert {shard_origin(name)[1] for name in shards(out)} == {0, 1, 2}
    check(out)
    done = contents(out)
    server.hits.clear()
    code, said = run(part, out)
    assert (code, contents(out), server.hits) == (ExitCode.OK, done, Counter())
    assert "no row failed for a reason that may have passed" in said


def test_a_round_that_was_interrupted_goes_on_to_the_same_bytes(part, second):
    out = second
    done = contents(out)
    for lost in ("part-r1_00000", "part-r1_00001"):
        Output(out).remove(lost)
        assert run(part, out)[0] == ExitCode.OK
        assert contents(out) == done
    check(out)


def test_rows_that_were_forgotten_in_the_middle_of_a_round_double_no_other(server, part, second):
    out = second
    Output(out).remove("part-r1_00000")
    forget(out, urls=(f"http://127.0.0.1:{server.http.server_port}/1.jpg",))
    server.hits.clear()
    run(part, out)
    check(out)
    assert verdicts(out)[1] == "forgotten"
    assert server.hits == Counter([4, 5, 8])


def test_a_row_that_had_a_second_chance_is_forgotten_once(server, second):
    out = second
    gone = forget(out, urls=(f"http://127.0.0.1:{server.http.server_port}/5.jpg",))
    assert str(gone) == "1 row, 1 of them samples, in 2 shards"
    check(out)


def test_a_shard_that_is_made_anew_takes_the_place_of_its_rows_second_chances(part, second):
    out = second
    (out / "shards" / "part-00001.json").unlink()
    assert run(part, out, retry=False)[0] == ExitCode.OK
    check(out)
    assert verdicts(out)[5] == "kept"


def test_a_part_that_holds_other_urls_now_is_told(server, part, first):
    out = first
    server.write_part(part, prefix="?changed")
    code, said = run(part, out)
    assert code == ExitCode.SHARDS_FAILED
    assert "other URLs than OUT was made of" in said
    assert {shard_origin(name)[1] for name in shards(out)} == {0}


def test_what_a_refused_run_was_given_is_no_source(server, part, tmp_path):
    """Neither a part that is refused, at once or when rows get another chance, nor one of which no shard was made."""
    out, sources = tmp_path / "out", lambda: json.loads((out / "dataset.json").read_bytes())["sources"]
    run(part, out, retry=False)
    own = sources()
    mistaken, other = tmp_path / "mistaken" / "part.parquet", tmp_path / "other" / "zzz.parquet"
    for path in (mistaken, other):
        path.parent.mkdir()
        server.write_part(path, prefix="?changed")
    assert run(mistaken, out)[0] == ExitCode.SHARDS_FAILED  # in the second chances
    assert sources() == own
    pq.write_table(pq.read_table(mistaken).slice(0, 3), mistaken)
    assert run(mistaken, out, retry=False)[0] == ExitCode.SHARDS_FAILED
    assert sources() == own

    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(other, out, watch=interrupt)
    assert sources() == own
    assert run(f"{other},{part}", out, retry=False)[0] == ExitCode.OK
    assert sources() == sorted([*own, "other"])


@pytest.mark.long
def test_what_a_run_was_given_that_was_killed_before_it_made_a_shard_is_no_source(server, part, tmp_path):
    out, other, left = tmp_path / "out", tmp_path / "other" / "zzz.parquet", []
    other.parent.mkdir()
    server.write_part(other)
    run(part, out, retry=False)
    own, described = json.loads((out / "dataset.json").read_bytes())["sources"], out / "dataset.json"

    def interrupt(event: Event) -> None:
        left.append(described.read_bytes())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(other, out, watch=interrupt)
    assert json.loads(left[0])["sources"] == sorted([*own, "other"])
    for killed, sources in ((left[0], own), (left[0], sorted([*own, "other"]))):
        described.write_bytes(killed)  # as kill -9 leaves it
        assert verify(out) == []
        assert run(part, out, retry=False)[0] == ExitCode.OK
        assert json.loads(described.read_bytes())["sources"] == sources
        run(other, out, retry=False)  # whose shards are there then


def test_a_run_that_is_stopped_before_its_first_shard_began_when_it_did_and_not_when_it_stopped(server, part, tmp_path):
    out, seen = tmp_path / "out", []

    def interrupt(event: Event) -> None:
        seen.append((out / "dataset.json").stat())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(part, out, watch=interrupt)
    left = (out / "dataset.json").stat()
    assert (left.st_ino, left.st_mtime_ns) == (seen[0].st_ino, seen[0].st_mtime_ns)


@pytest.mark.parametrize("is_rerun", [False, pytest.param(True, marks=pytest.mark.long)])
def test_second_chances_come_on_top_of_the_rows_that_are_planned(server, part, tmp_path, monkeypatch, is_rerun):
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(watchers, "_EVERY_S", -1.0)
    out, seen = tmp_path / "out", []

    def watch(event: Event) -> None:
        if shard_origin(event.shard)[1] and isinstance(event, Started):
            seen.append((status(out), text_of(status(out), out, time.time())))

    if is_rerun:
        run(part, out, retry=False)
    _, said = run(part, out, watch=watch)
    counts = [tuple(map(int, pair)) for pair in re.findall(r"^(\d+) of (\d+) rows", said, re.MULTILINE)]
    assert counts[-1] == (ROWS + len(FLAKY),) * 2
    assert all(done <= total for done, total in counts)
    first, last = seen[0], seen[-1]
    assert first[0]["seconds_left"] is None, "of this nothing is known yet"
    assert (last[0]["planned_done"], last[0]["planned_rows"]) == (ROWS, ROWS)
    assert last[0]["seconds_left"] == (last[0]["live"]["seconds_left"] or None)
    assert f"All {ROWS} rows are done; {len(FLAKY)} get a second chance" in last[1]


@pytest.mark.long
def test_a_part_that_was_changed_costs_no_other_part_its_second_chances(server, part, tmp_path):
    out, other = tmp_path / "out", tmp_path / "zzz.parquet"
    server.write_part(other)
    run(f"{part},{other}", out, retry=False)
    server.write_part(part, prefix="?changed")
    code, said = run(f"{part},{other}", out)
    assert code == ExitCode.SHARDS_FAILED
    assert "part.parquet holds other URLs than OUT was made of" in said
    assert {shard_origin(name) for name in shards(out)} == {("part", 0), ("zzz", 0), ("zzz", 1)}


def test_no_row_gets_another_chance_before_all_shards_are_done(server, part, tmp_path):
    out = tmp_path / "out"
    (out / "shards" / "part-00001.tar" / "x").mkdir(parents=True)
    code, said = run(part, out)
    assert code == ExitCode.SHARDS_FAILED
    assert "second chances wait" in said
    assert {shard_origin(name)[1] for name in shards(out)} == {0}


@pytest.mark.parametrize("part_name", ["a", "a-r1", "a-r1_00000", "laion-part-0"])
def test_the_name_of_a_shard_tells_part_and_round_of_any_part(part_name):
    for round in (0, 1, 12):
        assert shard_origin(shard_name(part_name, 7, round)) == (part_name, round)
        assert shard_origin(shard_name(part_name, 123456, round)) == (part_name, round)
