"""Disks that fill, turn read-only or vanish, stages that hang, processes that are killed: the run ends, and goes on.

The kills are those of benchmarks/bench_kills.py, a few of them here; the long run is started by hand.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline.dataset.execute import watchdog
from pipeline.dataset.finished.verify import verify
from schemas.errors import ShardError

ROOT = Path(__file__).resolve().parents[3]
SMALL_SHARDS = ["--set", "source.rows_per_shard=6"]


def command(out: object, *words: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "dataset", "--shards", "sample", "--out", str(out), *SMALL_SHARDS, *words]


def make(out: object, *words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *words), capture_output=True, text=True, check=False, **options)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What an undisturbed run makes."""
    out = tmp_path_factory.mktemp("whole")
    assert make(out).returncode == 0
    return out


# --- disks


def mounts(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python lines in a mount namespace of their own, with `folder` and `make` at hand."""
    prelude = f"""
        import json, pathlib, shutil, subprocess, sys
        folder = pathlib.Path({str(folder)!r})
        def sh(*words):
            subprocess.run(words, check=True)
        def make(*words):
            done = subprocess.run({command(folder / "disk" / "out")!r} + list(words), capture_output=True, text=True)
            return [done.returncode, done.stdout, done.stderr]
        def listing():
            return sorted(str(path.relative_to(folder / "disk")) for path in (folder / "disk").rglob("*"))
        (folder / "disk").mkdir()
    """
    lines = textwrap.dedent(prelude) + textwrap.dedent(script)
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", sys.executable, "-c", lines],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    return done


def told(folder: Path, name: str) -> list:
    return json.loads((folder / name).read_text())


@pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare here")
def test_a_full_disk_ends_the_run_with_a_sentence_and_a_rerun_with_more_room_goes_on(whole, tmp_path):
    mounts(
        """
        sh("mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(folder / "disk"))
        full = make()
        (folder / "full").write_text(json.dumps([*full, listing()]))
        sh("mount", "-o", "remount,size=100m", str(folder / "disk"))
        (folder / "after").write_text(json.dumps(make()))
        shutil.copytree(folder / "disk" / "out", folder / "copy")
        """,
        tmp_path,
    )
    code, out, err, files = told(tmp_path, "full")
    assert code == 3, out + err
    assert "cannot be written any more (No space left on device)" in err
    assert "make room, and the same command goes on." in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in out + err
    assert not [name for name in files if ".tmp-" in name]
    assert [name for name in files if name.endswith("shards/sample-00000.json")]
    assert {Path(name).stem for name in files if name.startswith("out/shards/")} == {"sample-00000"}
    code, out, err = told(tmp_path, "after")
    assert (code, out.count("done before")) == (0, 1), err
    assert contents(tmp_path / "copy") == contents(whole)


@pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare here")
def test_an_out_that_turns_read_only_ends_the_run_with_a_sentence_and_goes_on_later(whole, tmp_path):
    mounts(
        f"""
        import threading, time
        sh("mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder / "disk"))
        process = subprocess.Popen({command(tmp_path / "disk" / "out")!r}, stdout=-1, stderr=-1, text=True)
        while not list((folder / "disk").rglob("sample-00000.json")) and process.poll() is None:
            time.sleep(0.01)
        while process.poll() is None:  # busy while a file is open for writing
            if subprocess.run(["mount", "-o", "remount,ro", str(folder / "disk")], capture_output=True).returncode == 0:
                break
        out, err = process.communicate()
        (folder / "read-only").write_text(json.dumps([process.returncode, out, err]))
        (folder / "again").write_text(json.dumps(make()))
        sh("mount", "-o", "remount,rw", str(folder / "disk"))
        (folder / "after").write_text(json.dumps(make()))
        shutil.copytree(folder / "disk" / "out", folder / "copy")
        """,
        tmp_path,
    )
    code, out, err = told(tmp_path, "read-only")
    assert "Traceback" not in out + err
    if code:  # the kernel found a moment without an open file
        assert code == 3, out + err
        assert "Read-only file system" in err
        code, out, err = told(tmp_path, "again")
        assert (code, err.count("\n")) == (2, 1)
        assert "cannot be written: Read-only file system" in err
    assert told(tmp_path, "after")[0] == 0
    assert contents(tmp_path / "copy") == contents(whole)


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.long)])
def test_an_out_that_vanishes_ends_the_run_with_a_sentence_and_is_not_made_again(whole, tmp_path, executor):
    out = tmp_path / "out"
    words = command(out, "--executor", executor, "--set", "executor.workers=1")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(out.rglob("*.json")) and process.poll() is None:
        time.sleep(0.01)
    while not (out / "shards" / "sample-00000.json").exists() and process.poll() is None:
        time.sleep(0.01)
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 3, said + err
    assert "cannot be written any more" in err or "there is no folder" in err
    assert "Traceback" not in said + err
    assert not out.exists()
    assert make(out).returncode == 0
    assert contents(out) == contents(whole)


# --- stages that hang

HANG = """
import sys, time
from pipeline import __main__ as main
from stages.{module} import {name} as stage
real = stage.{method}
def hang(self, table):
    if any(key in ("sample-000000000", "sample-000000001") for key in table["key"].to_pylist()):
        {how}
    return real(self, table)
stage.{method} = hang
stage.reads = tuple(dict.fromkeys(("key", *stage.reads)))
sys.argv[1:] = {words!r}
main.main()
"""


def hanging(out: Path, module: str, name: str, how: str = "time.sleep(10_000)", timeout_s: float = 10) -> list[str]:
    """A run in which the first rows make a stage hang."""
    words = command(out, "--set", f"executor.shard_timeout_s={timeout_s}", "--set", "executor.batch_rows=2")[3:]
    return [sys.executable, "-c", HANG.format(module=module, name=name, how=how, method="__call__", words=words)]


@pytest.mark.parametrize(
    ("module", "name"), [("download", "Download"), pytest.param("pack", "Pack", marks=pytest.mark.long)]
)
def test_a_stage_that_hangs_costs_its_shard_and_no_other(whole, tmp_path, module, name):
    begun = time.monotonic()
    done = subprocess.run(hanging(tmp_path, module, name), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "sample-00000: FAILED" in done.stdout
    assert "no batch got done for 10 s (executor.shard_timeout_s)" in done.stdout
    assert sorted(path.stem for path in (tmp_path / "shards").glob("*.json")) == [f"sample-0000{n}" for n in (1, 2, 3)]
    assert not list(tmp_path.rglob(".tmp-*"))
    assert verify(tmp_path) == []
    assert make(tmp_path).returncode == 0
    assert contents(tmp_path) == contents(whole)
    assert time.monotonic() - begun < 110


def test_what_does_not_hear_the_watchdog_is_left_by_ending_the_process(tmp_path):
    script = """
import ctypes, sys, time
from pipeline.dataset.execute import watchdog
watchdog._GRACE_S = 1
dog = watchdog.Watchdog(1, lambda: sys.stderr.write("cleared\\n"))
with dog.watching("part-00000"):
    ctypes.CDLL(None).system(b"exec sleep 20 >/dev/null 2>&1")
"""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stderr.splitlines()[0]) == (3, "cleared")
    assert "part-00000: no batch got done for 1 s" in done.stderr
    assert time.monotonic() - begun < 15


def test_a_shard_that_gets_on_is_never_given_up(monkeypatch):
    monkeypatch.setattr(watchdog, "_hanging", threading.Event())  # it outlives the test, and ends `main` at once
    words = []
    dog = watchdog.Watchdog(0.3, lambda: words.append("last"))
    with dog.watching("a"):
        for _ in range(6):
            time.sleep(0.1)
            dog.beat()
    time.sleep(0.4)
    with pytest.raises(ShardError, match=r"no batch got done for 0\.3 s"), dog.watching("b"):
        time.sleep(5)
    assert words == []
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


# --- kills


def kills(*words: str) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "bench_kills.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    sys.stdout.write(done.stdout)  # with the seeds
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_few_random_kills_change_no_byte():
    kills("--kills", "2", "--executor", "local", "--runs", "2")


@pytest.mark.slow
def test_a_few_random_kills_on_ray_change_no_byte():
    kills("--kills", "1", "--executor", "ray", "--seconds", "15", "--runs", "1")


@pytest.mark.slow
def test_a_driver_that_waits_within_ray_hears_of_a_dead_node_all_the_same():
    script = """
import time
import psutil
from pipeline.dataset.execute import cluster
from pipeline.dataset.config import load_config
from pipeline.dataset.plan import make_plan
cluster._HEARD_S = 1
with cluster.started(make_plan(load_config(None, [], shards="sample", executor="ray"))):
    children = psutil.Process().children(recursive=True)
    next(child for child in children if "gcs_server" in " ".join(child.cmdline())).kill()
    time.sleep(50)  # as Ray does, which then ends the process with 1
"""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("The Ray node of this run died")) == (3, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begun < 40


@pytest.mark.slow
def test_a_node_that_dies_while_it_starts_ends_the_run_with_a_sentence():
    script = """
import threading, time
import psutil
from pipeline.dataset.execute import cluster
from pipeline.dataset.config import load_config
from pipeline.dataset.plan import make_plan
def kill():
    while not (found := [child for child in psutil.Process().children() if child.name() == "raylet"]):
        time.sleep(0.01)
    found[0].kill()
cluster._HEARD_S = 1
threading.Thread(target=kill, daemon=True).start()
with cluster.started(make_plan(load_config(None, [], shards="sample", executor="ray"))):
    raise AssertionError("it started all the same")
"""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stderr.count("The Ray node of this run died")) == (3, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begun < 30  # Ray itself waits for as long


def workers(driver: int, title: str) -> list[psutil.Process]:
    """The Ray processes of a run whose title begins so, and that were not stopped."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(driver).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(child.cmdline()).startswith(title) and child.status() != psutil.STATUS_STOPPED:
                    found.append(child)
    return found


def on_ray(out: Path, log: Path) -> subprocess.Popen:
    words = ["executor.shard_timeout_s=15", "executor.workers=1", "executor.batch_rows=2"]
    sets = [word for pair in words for word in ("--set", pair)]
    with log.open("w") as stream:
        return subprocess.Popen(command(out, "--executor", "ray", *sets), stdout=stream, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_a_frozen_task_on_ray_is_ended_and_its_shard_tried_again(whole, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = on_ray(out, log)
    while not (found := workers(process.pid, "ray::_make")) and process.poll() is None:
        time.sleep(0.02)
    found[0].suspend()
    assert process.wait(200) == 0, log.read_text()
    assert contents(out) == contents(whole)
    assert not psutil.pid_exists(found[0].pid) or psutil.Process(found[0].pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.long
def test_models_on_ray_that_freeze_each_time_fail_their_shards_and_no_other(whole, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = on_ray(out, log)
    while "FAILED" not in log.read_text() and process.poll() is None:
        for worker in workers(process.pid, "ray::_Models"):
            worker.suspend()
        time.sleep(0.05)
    assert process.wait(200) == 3, log.read_text()
    text = log.read_text()
    assert "no batch got done for 15 s (executor.shard_timeout_s): given up, and its workers replaced" in text
    assert "Traceback" not in text
    assert len(list((out / "shards").glob("*.json"))) >= 2
    assert not list(out.rglob(".tmp-*"))
    assert make(out).returncode == 0
    assert contents(out) == contents(whole)
