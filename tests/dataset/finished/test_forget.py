"""Take-downs: what goes, what stays, that nothing tells of it, and that a kill at any moment leaves no half of it."""

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import fake_dataset as fake
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.finished.forget import forget, take_down_listed
from pipeline.dataset.finished.report import write_report
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.out.forgotten import FORGOTTEN, Forgotten, finish, load
from pipeline.dataset.out.ledger import LIVE, funnel, read_manifests
from pipeline.dataset.out.output import Output
from pipeline.shared.files import to_path, write
from schemas.errors import CorruptShardError, LostError, OutputError, SourceError
from stages.pixels.images import encode_jpeg

FIRST, SECOND = "a-00000", "a-00001"
KEPT_URL, DEAD_URL = "http://photos.example/a/0.jpg", "http://photos.example/a/3.jpg"
KEYS = [f"a-{row:09d}" for row in range(12)]


def rows(start, changes=()):
    """Six rows, of which `changes` replace some by index."""
    found = fake.mixed("a", start)
    for index, change in changes:
        found[index] = change
    return found


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    photo = encode_jpeg(fake.drawn(1200, 1200, 5), 90)
    elsewhere = fake.record("a", 6, url="https://img.Sub.Example.ORG:8443/x.jpg", sha256="cd" * 32)
    again = fake.dead("a", 7, "filter", "no_face", photo, sha256="ab" * 32, n_faces=0)
    shards = {FIRST: rows(0), SECOND: rows(6, [(0, elsewhere), (1, again)])}
    out = fake.write(tmp_path_factory.mktemp("published"), shards)
    assert verify(out) == []
    return out


@pytest.fixture(scope="module")
def with_page(published, tmp_path_factory):
    """The same with a report, which each take-down writes anew."""
    out = Path(shutil.copytree(published, tmp_path_factory.mktemp("reported") / "out"))
    write_report(out)
    return out


@pytest.fixture
def out(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "out"))


@pytest.fixture
def reported(with_page, tmp_path):
    return Path(shutil.copytree(with_page, tmp_path / "out"))


def ledger(out, shard=FIRST):
    return {row["key"]: row for row in pq.read_table(out / "shards" / f"{shard}.parquet").to_pylist()}


def samples(out, shard=FIRST):
    with tarfile.open(out / "shards" / f"{shard}.tar") as tar:
        return sorted({name.partition(".")[0] for name in tar.getnames()})


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def everything(out):
    """All that OUT tells, uncompressed."""
    told = []
    for path in out.rglob("*"):
        if path.suffix == ".parquet":
            told.append(repr(pq.read_table(path).to_pylist()).encode())
        elif path.is_file():
            told.append(path.read_bytes())
    return b"\n".join(told)


def test_a_sample_goes_from_tar_ledger_manifest_and_report(out):
    before = read_manifests(out)
    gone = forget(out, urls=(KEPT_URL,))
    assert (gone.rows, gone.kept, gone.damaged) == ({FIRST: [KEYS[0]]}, {FIRST: 1}, [])
    assert samples(out) == [KEYS[4]]
    row = ledger(out)[KEYS[0]]
    assert (row["part"], row["row"], row["verdict"], row["stage"]) == ("a", 0, "forgotten", "metadata")
    assert {name for name, value in row.items() if value is not None} == {"key", "part", "row", "verdict", "stage"}
    first, second = read_manifests(out)
    assert (first.kept, first.dropped["forgotten"], first.rows_in) == (1, 1, 6)
    assert second == before[1]
    assert verify(out) == []
    assert funnel(out).kept == 3
    told = json.loads((out / "dataset.json").read_text())
    assert (told["kept"], told["dropped"]["forgotten"]) == (3, 1)


def test_nothing_tells_of_it_any_more(reported):
    out = reported
    portrait = fake.pictures(0)["portrait"]
    secrets = [b"a/0.jpg", b"caption of row 0", b"a/3.jpg", portrait[len(portrait) // 2 :][:60]]
    pictures = {row["key"] for row in pq.read_table(out / "drops" / f"{FIRST}.parquet").to_pylist()}
    assert KEYS[3] in pictures
    assert all(secret in everything(out) for secret in secrets)
    forget(out, urls=(KEPT_URL, DEAD_URL))
    assert not [secret for secret in secrets if secret in everything(out)]
    assert KEYS[3] not in {row["key"] for row in pq.read_table(out / "drops" / f"{FIRST}.parquet").to_pylist()}
    assert verify(out) == []


def test_the_events_name_no_host_any_more(out):
    lines = [{"kind": "start", "out": "/data/\udcff"}, {"kind": "progress", "slowest_hosts": {"photos.example": 2.5}}]
    (out / "events.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines) + '{"slowest_hosts": {"photos')
    forget(out, urls=(KEPT_URL,))
    left = (out / "events.jsonl").read_text()
    assert list(map(json.loads, left.splitlines())) == [lines[0], {"kind": "progress", "slowest_hosts": {}}]


def test_only_the_shards_concerned_are_rewritten(reported):
    out = reported
    before = files(out)
    forget(out, urls=(DEAD_URL,))
    changed = {name for name, data in files(out).items() if before.get(name) != data}
    assert changed == {
        f"shards/{FIRST}.parquet", f"shards/{FIRST}.json", f"drops/{FIRST}.parquet", "dataset.json", "report.html",
        FORGOTTEN,
    }  # fmt: skip
    assert set(files(out)) == {*before, FORGOTTEN}


def test_what_is_left_is_what_a_run_without_it_would_have_written(out, tmp_path):
    forget(out, urls=(KEPT_URL, DEAD_URL))
    blanks = [(index, fake.dead("a", index, "metadata", "forgotten", url=None)) for index in (0, 3)]
    fresh = fake.write(tmp_path / "fresh", {FIRST: rows(0, blanks)})
    for suffix in ("tar", "parquet", "json"):
        name = f"{FIRST}.{suffix}"
        assert (out / "shards" / name).read_bytes() == (fresh / "shards" / name).read_bytes(), suffix


@pytest.mark.parametrize("domain", ["example.org", "Sub.EXAMPLE.org", "https://example.org:1/x", "*.example.org."])
def test_a_site_with_all_below_it(out, domain):
    assert forget(out, domains=(domain,)).rows == {SECOND: [KEYS[6]]}
    assert verify(out) == []


@pytest.mark.parametrize("domain", ["xample.org", "other.sub.example.org", "photos.example.org"])
def test_other_sites_stay(out, domain):
    before = files(out)
    assert forget(out, domains=(domain,)).rows == {}
    after = files(out)
    after.pop(FORGOTTEN)
    assert after == before


def test_a_file_goes_wherever_it_came_from_and_its_addresses_are_remembered(out):
    gone = forget(out, contents=("CD" * 32, "ab" * 32))
    assert gone.rows == {SECOND: [KEYS[6], KEYS[7]]}
    assert load(out).concerns_url("https://img.sub.example.org:8443/x.jpg")
    assert load(out).concerns_url("http://photos.example/a/7.jpg")
    assert not load(out).concerns_url("http://photos.example/a/8.jpg")


def test_the_list_holds_no_address_and_no_hash_of_a_file(out):
    forget(out, (), (KEPT_URL,), ("example.org",), ("cd" * 32,))
    text = (out / FORGOTTEN).read_text()
    assert "example" not in text
    assert "cd" * 32 not in text
    others = Forgotten("another salt").adding(urls=[KEPT_URL])
    assert not others.urls & load(out).urls


def test_a_second_take_down_adds_to_the_first(out):
    forget(out, urls=(KEPT_URL,))
    assert forget(out, urls=(DEAD_URL,)).rows == {FIRST: [KEYS[3]]}
    known = load(out)
    assert known.concerns_url(KEPT_URL)
    assert known.concerns_url(DEAD_URL)
    before = files(out)
    assert forget(out).rows == {}
    assert files(out) == before


def test_a_whole_shard_may_go(out):
    assert str(forget(out, domains=("photos.example",))) == "11 rows, 3 of them samples, in 2 shards"
    assert samples(out) == []
    assert verify(out) == []
    assert sum(row["verdict"] == "forgotten" for row in ledger(out).values()) == 6


def test_whatever_is_written_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        out = fake.write(tmp_path, {FIRST: rows(0)})
        write_report(out)
        forget(out, urls=(KEPT_URL,))
    finally:
        os.umask(before)
    modes = {str(path.relative_to(out)): path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert len(modes) == 7
    assert set(modes.values()) == {0o640}, modes


def test_an_unfinished_dataset_is_forgotten_in_too(tmp_path):
    out = fake.write(tmp_path, {FIRST: rows(0)}, finish=False)
    forget(out, urls=(KEPT_URL,))
    assert verify(out) == []
    assert "shards" not in json.loads((out / "dataset.json").read_text())


@pytest.fixture
def remote(with_page):
    """The same dataset in an object store."""
    there = to_path(f"memory://{with_page.name}-{time.time_ns()}/out")
    for name, data in files(with_page).items():
        write(there / name, data)
    return there


def test_a_remote_dataset_is_forgotten_in_too(reported, remote):
    out = reported
    write(remote / LIVE, b'{"slowest_hosts": {"photos.example": 2.5}}')  # of a run that was killed
    wanted = {"urls": (KEPT_URL, DEAD_URL), "contents": ("cd" * 32,)}
    assert forget(remote, **wanted).rows == forget(out, **wanted).rows == {FIRST: [KEYS[0], KEYS[3]], SECOND: [KEYS[6]]}
    assert verify(remote) == []
    for name, data in files(out).items():
        if name != FORGOTTEN:
            assert (remote / name).read_bytes() == data, name
    assert not list((remote / "shards").glob(".new-*"))
    assert not (remote / LIVE).exists()


@pytest.mark.parametrize("steps", range(3))
def test_a_remote_shard_that_was_committed_is_finished(out, remote, steps):
    """Objects cannot be renamed: a kill while the new ones are copied leaves what to go on with."""
    forget(out, urls=(KEPT_URL,))
    for number, suffix in enumerate(("tar", "parquet", "json")):
        data = (out / "shards" / f"{FIRST}.{suffix}").read_bytes()
        write(remote / "shards" / (f"{FIRST}.{suffix}" if number < steps else f".new-{FIRST}.{suffix}"), data)
    assert any("`forget` was killed" in problem.message for problem in verify(remote))
    finish(remote)
    for suffix in ("tar", "parquet", "json"):
        name = f"{FIRST}.{suffix}"
        assert (remote / "shards" / name).read_bytes() == (out / "shards" / name).read_bytes()
    assert not list((remote / "shards").glob(".new-*"))


# ---- lists of download.removed


def take_down(out, *lines):
    """What a run does under such a list, before it makes any shard."""
    path = out.with_name("removed.txt")
    path.write_text("\n".join(lines))
    config = fake.plan().config
    download = config.download.model_copy(update={"removed": (str(path),) if lines else ()})
    plan = replace(fake.plan(), config=config.model_copy(update={"download": download}))
    output = Output(out)
    with output.prepared(plan):
        return take_down_listed(output)


def test_a_list_is_taken_down_once_for_each_state_of_it(out):
    assert take_down(out).rows == {}
    assert not (out / FORGOTTEN).exists()
    gone = take_down(out, KEPT_URL.replace("http", "https"), "CD" * 32)
    assert gone.rows == {FIRST: [KEYS[0]], SECOND: [KEYS[6]]}
    assert verify(out) == []
    for row in (ledger(out)[KEYS[0]], ledger(out, SECOND)[KEYS[6]]):
        assert (row["verdict"], row["stage"], row["url"]) == ("removed", "metadata", None)
    assert not [secret for secret in (b"a/0.jpg", b"caption of row 0") if secret in everything(out)]
    ours = out / "shards" / f"{FIRST}.parquet"
    whole = ours.read_bytes()
    ours.write_bytes(b"damaged")
    assert take_down(out, "cd" * 32, "# no change", f"{KEPT_URL}#x").rows == {}, "no shard is looked at"
    with pytest.raises(CorruptShardError, match=ours.name):
        take_down(out, DEAD_URL)
    ours.write_bytes(whole)
    assert take_down(out, DEAD_URL).rows == {FIRST: [KEYS[3]]}
    assert take_down(out).rows == {}
    assert load(out).lists == "", "shards of this run are made under no list"


def test_what_was_forgotten_stays_so_under_a_list(out):
    forget(out, urls=(KEPT_URL,))
    assert take_down(out, KEPT_URL, DEAD_URL).rows == {FIRST: [KEYS[3]]}
    assert ledger(out)[KEYS[0]]["verdict"] == "forgotten"
    assert load(out).concerns_url(KEPT_URL)
    assert verify(out) == []


# ---- the words of the command


def call(*words):
    done = CliRunner().invoke(app, ["forget", *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


@pytest.mark.parametrize("folder", ["", "memory:/"])
def test_a_list_may_mix_all_kinds_and_lie_anywhere(folder, out, tmp_path):
    path = to_path(f"{folder}{tmp_path}") / "list.txt"
    write(path, f"# asked for on Monday\n{KEPT_URL}\n\n  example.org \n{'AB' * 32}\n".encode())
    code, said = call("--list", path, "--url", DEAD_URL, out)
    assert (code, said.strip()) == (0, "Forgotten: 4 rows, 2 of them samples, in 2 shards.")
    assert verify(out) == []


def test_a_dry_run_lists_and_writes_nothing(out):
    before = files(out)
    code, said = call("--dry-run", "--url", KEPT_URL, "--sha256", "cd" * 32, out)
    assert (code, said.splitlines()) == (
        0,
        [
            f"{FIRST}: {KEYS[0]}",
            f"{SECOND}: {KEYS[6]}",
            "Would forget: 2 rows, 2 of them samples, in 2 shards.",
        ],
    )
    assert files(out) == before


def test_nothing_that_matches_is_said_and_remembered(out):
    code, said = call("--url", "http://nowhere.example/", out)
    assert code == 0
    assert said.startswith("Nothing in the dataset matches")
    assert load(out).concerns_url("http://nowhere.example")
    code, said = call(out)  # to go on where it stopped, which it did not
    assert (code, "matches" in said, "give --url, --domain, --sha256, --file or --list" in said) == (0, False, True)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "give --url, --domain, --sha256, --file or --list"),
        ({"domains": ("org",)}, "is no site"),
        ({"domains": ("",)}, "is no site"),
        ({"contents": ("abc",)}, "is no sha256"),
        ({"urls": ("photo.jpg",)}, "'photo.jpg' is no URL"),
    ],
)
def test_words_that_make_no_sense_change_nothing(out, wanted, message):
    before = files(out)
    with pytest.raises(OutputError, match=message):
        forget(out, **wanted)
    assert files(out) == before


def test_a_folder_that_is_no_dataset_or_a_list_that_is_not_there(out, tmp_path):
    with pytest.raises(OutputError, match="holds no dataset"):
        forget(tmp_path / "none", urls=(KEPT_URL,))
    with pytest.raises(SourceError, match="cannot be read"):
        forget(out, lists=(tmp_path / "none.txt",))


def test_a_disk_that_fills_up_before_dataset_json_is_not_damage(out, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.dataset.finished.forget.write", full)
        with pytest.raises(LostError, match="No space left on device"):
            forget(out, urls=(KEPT_URL,))
    forget(out)
    assert verify(out) == []


def test_a_report_that_cannot_be_written_is_partial_work(reported, monkeypatch):
    out = reported
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.dataset.finished.report.storage.write", lambda *_: (out / "no" / "file").touch())
        with pytest.raises(LostError, match=r"report\.html cannot be written: No such file"):
            forget(out, urls=(KEPT_URL,))
    forget(out)
    assert KEPT_URL not in (out / "report.html").read_text()


def test_a_run_in_the_same_folder_is_not_disturbed(out):
    handle = os.open(out / "shards", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(OutputError, match="Another run is writing"):
            forget(out, urls=(KEPT_URL,))
    finally:
        os.close(handle)
    assert not (out / FORGOTTEN).exists()


def test_a_damaged_dataset_json_keeps_nothing_back_and_the_report_goes(reported):
    out = reported
    (out / "dataset.json").write_text('{"sources": [1]}')
    gone = forget(out, domains=("photos.example",))
    assert list(gone.rows) == [FIRST, SECOND]
    assert ["dataset.json" in each for each in gone.damaged] == [True]
    assert not (out / "report.html").exists()


def test_the_damaged_manifest_of_another_shard_keeps_nothing_back_and_the_report_goes(reported):
    out = reported
    (out / "shards" / f"{SECOND}.json").write_text("{}")
    gone = forget(out, urls=(KEPT_URL,))
    assert list(gone.rows) == [FIRST]
    assert [f"{SECOND}.json: not a manifest" in each for each in gone.damaged] == [True]
    assert not (out / "report.html").exists()


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_damage_is_never_signed_as_whole_and_the_other_shards_are_done(out, suffix):
    path = out / "shards" / f"{FIRST}.{suffix}"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    gone = forget(out, domains=("photos.example",))
    assert list(gone.rows) == [SECOND]
    assert len(gone.damaged) == 1
    assert path.name in gone.damaged[0]
    assert path.read_bytes() == damaged
    assert load(out).concerns_url(KEPT_URL)
    assert {problem.shard for problem in verify(out)} == {FIRST}


def test_a_damaged_list_stops_everything(out):
    forget(out, urls=(KEPT_URL,))
    text = (out / FORGOTTEN).read_text()
    for broken in (
        "{",
        "[]",
        text.replace("urls", "sites"),
        text.replace('"version": 1', '"version": 1 '),
        "[" * 100_000,
    ):
        (out / FORGOTTEN).write_text(broken)
        with pytest.raises(CorruptShardError, match=FORGOTTEN):
            load(out)
        with pytest.raises(CorruptShardError, match=FORGOTTEN):
            forget(out, urls=(DEAD_URL,))


# ---- killed at any moment


KILLED = """
import gc, os, shutil, signal, sys
from pathlib import Path
from pipeline.dataset.finished.forget import forget

sys.path.insert(0, sys.argv[4])
from sample_runs import remembered_pictures

published, work, urls, stride = Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3].split()), int(sys.argv[5])

def deadly(function, left):
    def call(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call

# What a first call imports, compiles and reduces for the report, the forked processes have.
(remembering := remembered_pictures()).__enter__()
forget(Path(shutil.copytree(published, work.with_name("once"))), urls=urls)
gc.freeze()
steps, killed = 0, True
while killed:
    out = Path(shutil.copytree(published, work / f"{steps:03d}"))
    forked = os.fork()
    if forked == 0:
        left = [steps]
        for name in ("unlink", "replace"):  # all that changes what a reader finds under a name; fsync changes nothing
            setattr(os, name, deadly(getattr(os, name), left))
        forget(out, urls=urls)
        os._exit(0)
    killed = os.waitpid(forked, 0)[1] != 0
    steps += stride
"""


@pytest.mark.slow
@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.long)])
def test_a_kill_at_any_step_leaves_the_old_shard_or_the_new_one(tmp_path, stride):
    published = fake.write(tmp_path / "published", {shard: SHORT[shard] for shard in SHORT})
    urls = ("http://photos.example/a/0.jpg", "http://photos.example/a/1.jpg", "http://photos.example/a/2.jpg")
    tests = str(Path(__file__).parents[2])
    words = [sys.executable, "-c", KILLED, str(published), str(tmp_path / "states"), " ".join(urls), tests, str(stride)]
    (tmp_path / "states").mkdir()
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    states = sorted((tmp_path / "states").iterdir())
    assert len(states) > 15 // stride
    states = list({tuple(nameless(files(state)).items()): state for state in states}.values())
    generations = shards_of(published), shards_of(states[-1])
    seen = [what_a_kill_left(state, generations, urls) for state in states]
    # nothing done; one shard done; in the middle of a shard, before and behind its commit; all done
    assert {("old", "old"), ("new", "old"), ("new", "new")} < set(seen)
    assert any(None in found for found in seen)
    assert len({tuple(salt_free(files(state)).items()) for state in states}) == 1


SHORT = {
    FIRST: [fake.record("a", 0), fake.dead("a", 1, "download", "not_found")],
    SECOND: [fake.record("a", 2), fake.record("a", 3)],
}


def what_a_kill_left(state, generations, urls):
    """Which generation each shard is; None while its files are of both, which everybody is told."""
    problems = verify(state)
    old, new = generations
    found = shards_of(state)
    told = tuple("old" if found[s] == old[s] else "new" if found[s] == new[s] else None for s in (FIRST, SECOND))
    assert None not in told or any("`forget` was killed" in problem.message for problem in problems), state.name
    assert (state / FORGOTTEN).exists() or not problems
    resumed = Path(shutil.copytree(state, state.with_name(f"{state.name}-resumed")))
    finish(resumed)  # as every run begins
    assert all(shards_of(resumed)[shard] in (old[shard], new[shard]) for shard in (FIRST, SECOND)), state.name
    assert not [name for name in files(resumed) if "/.new-" in name]
    shutil.rmtree(resumed)
    forget(state, urls=urls)
    assert verify(state) == []
    return told


def shards_of(out):
    return {
        shard: tuple((out / "shards" / f"{shard}.{suffix}").read_bytes() for suffix in ("tar", "parquet", "json"))
        for shard in (FIRST, SECOND)
    }


def nameless(found):
    """Files without what differs each time: the salt, and the numbers of processes."""
    return {re.sub(r"(\.tmp-.*)\.\d+$", r"\1", name): name == FORGOTTEN or data for name, data in found.items()}


def salt_free(found):
    return {name: data for name, data in found.items() if name != FORGOTTEN}
