"""Disks that fill, turn read-only or vanish, stages that hang, processes that are killed: the run ends, and goes on.

The kills are those of benchmarks/bench_kills.py, a few of them here; the long run is started by hand.
"""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console
from sample_runs import SHARDS, begun, command, contents, make, manifests, remembered_models, without

from pipeline.dataset.config import load_config
from pipeline.dataset.execute import watchdog
from pipeline.dataset.execute.make_shard import Finished
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.job import make_dataset, prepared
from pipeline.dataset.plan import make_plan
from schemas.errors import ExitCode, LostError, ShardError
from stages.download import Download

ROOT = Path(__file__).resolve().parents[3]


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


def answer(folder: Path, name: str) -> list:
    return json.loads((folder / name).read_text())


def test_a_full_disk_ends_the_run_with_a_sentence_and_a_rerun_with_more_room_goes_on(whole, tmp_path, monkeypatch):
    """As runs learn of it where space is given late: when what was written has to be there."""
    out = without(whole, tmp_path / "out", *SHARDS[:3])

    def fsync(descriptor):
        if SHARDS[1] in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(LostError) as lost:
            make(out)
    assert "cannot be written any more (No space left on device)" in str(lost.value)
    assert "make room, and the same command goes on." in str(lost.value)
    assert "\n" not in str(lost.value)
    require_next_run_goes_on(out, whole)


def require_next_run_goes_on(out, whole):
    assert not list(out.rglob(".tmp-*"))
    done = manifests(out)
    assert done == [SHARDS[0], *SHARDS[3:]]
    code, text = make(out)
    assert (code, f"{len(done)} done before" in text) == (ExitCode.OK, True), text
    assert contents(out) == contents(whole)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare here")
def test_a_disk_that_is_really_full_ends_the_process_of_the_run(whole, tmp_path):
    begun = without(whole, tmp_path / "begun", *SHARDS[:3])  # all that keep anything
    files = [path for path in begun.rglob("*") if path.is_file()]
    files += (whole / "shards").glob(f"{SHARDS[0]}.*")
    room = sum(path.stat().st_size + 8192 for path in files)
    room += (whole / "shards" / f"{SHARDS[1]}.tar").stat().st_size // 2
    mounts(
        f"""
        sh("mount", "-t", "tmpfs", "-o", "size={room}", "tmpfs", str(folder / "disk"))
        shutil.copytree(folder / "begun", folder / "disk" / "out")
        full = make()
        (folder / "full").write_text(json.dumps([*full, listing()]))
        shutil.copytree(folder / "disk" / "out", folder / "larger")
        """,
        tmp_path,
    )
    code, out, err, _ = answer(tmp_path, "full")
    assert code == 3, out + err
    assert "cannot be written any more (No space left on device)" in err
    assert "make room, and the same command goes on." in err
    assert "Traceback" not in out + err
    assert len(err.strip().splitlines()) == 1
    require_next_run_goes_on(tmp_path / "larger", whole)


@pytest.mark.long
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
            time.sleep(0.01)
        out, err = process.communicate()
        (folder / "read-only").write_text(json.dumps([process.returncode, out, err]))
        (folder / "again").write_text(json.dumps(make()))
        sh("mount", "-o", "remount,rw", str(folder / "disk"))
        (folder / "after").write_text(json.dumps(make()))
        shutil.copytree(folder / "disk" / "out", folder / "copy")
        """,
        tmp_path,
    )
    code, out, err = answer(tmp_path, "read-only")
    assert "Traceback" not in out + err
    if code:  # the kernel found a moment without an open file
        assert code == 3, out + err
        assert "Read-only file system" in err
        code, out, err = answer(tmp_path, "again")
        assert (code, err.count("\n")) == (2, 1)
        assert "cannot be written: Read-only file system" in err
    assert answer(tmp_path, "after")[0] == 0
    assert contents(tmp_path / "copy") == contents(whole)


def test_an_out_that_vanishes_ends_the_run_with_a_sentence_and_is_not_made_again(whole, tmp_path):
    out = without(whole, tmp_path / "out", *SHARDS[1:])

    def vanish(event):
        if isinstance(event, Finished):
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(out, ignore_errors=True)

    config = load_config(None, ["source.rows_per_shard=3"], shards="sample", executor="local")
    with remembered_models(), prepared("sample", config) as job, pytest.raises(LostError) as caught:
        make_dataset(job, out, Console(quiet=True), watch=vanish)
    assert "cannot be written any more" in str(caught.value) or "there is no folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.long
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_an_out_that_vanishes_ends_the_process_of_the_run_too(whole, tmp_path, executor):
    out = without(whole, tmp_path / "out", *SHARDS[1:])
    process = begun(out, "--executor", executor, "--set", "executor.workers=1")
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 3, said + err
    assert "cannot be written any more" in err or "there is no folder" in err
    assert "Traceback" not in said + err
    assert not out.exists()


# --- stages that hang

HANG = """
import sys, time
sys.path.insert(0, {tests!r})
from pipeline import __main__ as main
from sample_runs import remembered_models
from stages.{module} import {name} as stage
def look(table):
    if any(key in ("sample-000000000", "sample-000000001") for key in table["key"].to_pylist()):
        {how}
    return table
real = stage.{method}
if "{method}" == "stream":
    stage.stream = lambda self, tables, most_rows: real(self, map(look, tables), most_rows)
else:
    stage.__call__ = lambda self, table: real(self, look(table))
stage.reads = tuple(dict.fromkeys(("key", *stage.reads)))
sys.argv[1:] = {words!r}
with remembered_models():
    main.main()
"""


def hanging(out: Path, module: str, name: str, how: str = "time.sleep(10_000)", timeout_s: float = 10) -> list[str]:
    """A run in which the first rows make a stage hang."""
    words = command(out, "--set", f"executor.shard_timeout_s={timeout_s}", "--set", "executor.batch_rows=2")[2:]
    method = "stream" if module == "download" else "__call__"
    tests = str(ROOT / "tests")
    script = HANG.format(tests=tests, module=module, name=name, how=how, method=method, words=words)
    return [sys.executable, "-c", script]


def test_a_stage_that_hangs_costs_its_shard_and_no_other(whole, tmp_path, monkeypatch):
    out, real, free = without(whole, tmp_path / "out", SHARDS[0], SHARDS[6]), Download.stream, threading.Event()

    def look(table):
        if "sample-000000000" in table["key"].to_pylist():
            free.wait(10_000)
        return table

    monkeypatch.setattr(watchdog, "_hanging", threading.Event())  # it outlives the test, and ends `main` at once
    monkeypatch.setattr(Download, "reads", ("key", *Download.reads))
    with monkeypatch.context() as patched:
        patched.setattr(Download, "stream", lambda self, tables, most_rows: real(self, map(look, tables), most_rows))
        code, text = make(out, "executor.shard_timeout_s=6", "executor.batch_rows=2")
    free.set()
    assert code is ExitCode.SHARDS_FAILED, text
    assert f"{SHARDS[0]}: FAILED" in text
    assert "no batch got done for 6 s (executor.shard_timeout_s)" in text
    assert watchdog.is_hanging()
    assert manifests(out) == SHARDS[1:]
    assert not list(out.rglob(".tmp-*"))
    assert verify(out) == []
    assert make(out)[0] is ExitCode.OK
    assert contents(out) == contents(whole)


@pytest.mark.long
@pytest.mark.parametrize(("module", "name"), [("download", "Download"), ("pack", "Pack")])
def test_nor_does_the_process_of_such_a_run_stay(whole, tmp_path, module, name):
    out = without(whole, tmp_path / "out", SHARDS[0], SHARDS[6])
    done = subprocess.run(hanging(out, module, name), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 3, done.stdout + done.stderr
    assert f"{SHARDS[0]}: FAILED" in done.stdout
    assert "no batch got done for 10 s (executor.shard_timeout_s)" in done.stdout
    assert manifests(out) == SHARDS[1:]
    assert not list(out.rglob(".tmp-*"))
    assert verify(out) == []
    assert make(out)[0] is ExitCode.OK
    assert contents(out) == contents(whole)


def test_what_does_not_hear_the_watchdog_is_left_by_ending_the_process(tmp_path):
    script = """
import ctypes, sys, time
from pipeline.dataset.config import load_config
from pipeline.dataset.execute import watchdog
watchdog._GRACE_S = 1
dog = watchdog.Watchdog(1, lambda: sys.stderr.write("cleared\\n"))
with dog.watching("part-00000"):
    ctypes.CDLL(None).system(b"exec sleep 200 >/dev/null 2>&1")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stderr.splitlines()[0]) == (3, "cleared")
    assert "part-00000: no batch got done for 1 s" in done.stderr


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


@pytest.mark.long
@pytest.mark.parametrize(
    ("executor", "words"), [("local", ["--kills", "4"]), ("ray", ["--kills", "2", "--seconds", "60"])]
)
def test_a_few_random_kills_change_no_byte(executor, words):
    kills("--executor", executor, "--runs", "2", *words)


def workers(driver: int, title: str) -> list[psutil.Process]:
    """The Ray processes of a run whose title begins so, and that were not stopped."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(driver).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(child.cmdline()).startswith(title) and child.status() != psutil.STATUS_STOPPED:
                    found.append(child)
    return found


def first_worker(process: subprocess.Popen, title: str) -> psutil.Process:
    while not (found := workers(process.pid, title)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return found[0]


ON_RAY = ["--executor", "ray", "--set", "executor.workers=1", "--set", "executor.batch_rows=1"]


@pytest.mark.long
@pytest.mark.parametrize("freezes", [False, True])
def test_workers_on_ray_that_are_killed_or_freeze_cost_time_only(whole, tmp_path, freezes):
    out = without(whole, tmp_path / "out", *SHARDS[4:])
    process = begun(out, *ON_RAY, "--set", "executor.shard_timeout_s=40")
    for title in ("ray::_Models", "ray::_Maker"):
        killed = first_worker(process, title)
        killed.kill()
        killed.wait(60)  # or it would be found again
    frozen = first_worker(process, "ray::_Maker") if freezes else killed
    if freezes:
        frozen.suspend()
        while frozen.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
    said, err = process.communicate(timeout=400)
    assert process.returncode == 0, said + err
    assert contents(out) == contents(whole)
    assert not frozen.is_running() or frozen.status() == psutil.STATUS_ZOMBIE


@pytest.mark.long
def test_a_ray_node_that_dies_ends_the_run_with_a_sentence_and_a_rerun_goes_on(whole, tmp_path):
    out = tmp_path / "out"
    process = begun(out, *ON_RAY)
    gcs = next(child for child in psutil.Process(process.pid).children(recursive=True) if child.name() == "gcs_server")
    gcs.kill()
    said, err = process.communicate(timeout=200)
    assert process.returncode == 3, said + err
    assert err.count("The Ray node of this run died") == 1
    assert make(out)[0] is ExitCode.OK
    assert contents(out) == contents(whole)


GUARDED = """
import socket, threading, time
from pipeline.dataset.execute import cluster_node
cluster_node.TICK_S = 0.1
for grace_s in (30, 0.1):
    cluster_node._GRACE_S = grace_s
    server = socket.create_server(("127.0.0.1", 0))
    guard = cluster_node.NodeGuard([server.getsockname()], lambda: [], 0.5)
    time.sleep(1)
    assert not guard.is_lost
    server.close()
    begun = time.monotonic()
    while not guard.is_lost and time.monotonic() - begun < 60:
        time.sleep(0.01)
    print("lost", flush=True)
    if grace_s == 30:
        guard.stop()
        print("goes on", guard._thread.is_alive(), flush=True)
time.sleep(60)  # within Ray, which then ends the process with 1 and no word to the user
"""


def test_a_driver_that_waits_within_ray_is_ended_when_its_node_died():
    """But not where its guard was stopped in time, which is the end of an ordinary run."""
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, done.stdout) == (3, "lost\ngoes on False\nlost\n"), done.stderr
    assert done.stderr.count("The Ray node of this run died") == 1


def test_what_ends_all_before_anything_runs_ends_a_run_on_ray_too(monkeypatch):
    from pipeline.dataset.execute import cluster

    def unreadable():
        raise LostError("a manifest in OUT cannot be read")
        yield

    monkeypatch.setattr(cluster, "_Crew", lambda *args: SimpleNamespace(running={}))
    plan = make_plan(load_config(None, [], shards="sample"))
    guard = SimpleNamespace(stop=lambda: None)
    with pytest.raises(LostError, match="cannot be read"):
        list(cluster.run(plan, unreadable(), None, guard))


@pytest.mark.long
def test_models_that_do_not_load_on_ray_end_the_run_as_a_mistake_and_nothing_is_written(tmp_path):
    damaged = tmp_path / "yunet.onnx"
    damaged.write_bytes(b"no model")
    words = ("--set", "models.detector=yunet", "--set", f"models.paths.yunet={damaged}")
    done = subprocess.run(command(tmp_path / "out", *ON_RAY, *words), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("yunet.onnx cannot be loaded"), "Traceback" in done.stderr) == (
        2,
        1,
        False,
    )
    assert not (tmp_path / "out").exists()


def test_an_address_where_nobody_listens_is_found_out_at_once_in_ipv6_too():
    from pipeline.dataset.execute import cluster_node

    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        cluster_node.require_reachable(f"[::1]:{port}")
    with pytest.raises(ConnectionRefusedError):
        cluster_node.require_reachable(f"[::1]:{port}")
    cluster_node.require_reachable("auto")


@pytest.mark.long
def test_a_node_that_dies_while_it_starts_ends_the_run_with_a_sentence(tmp_path):
    process = subprocess.Popen(command(tmp_path / "out", *ON_RAY), stderr=subprocess.PIPE, text=True)
    while not (found := [c for c in psutil.Process(process.pid).children() if c.name() == "raylet"]):
        time.sleep(0.01)
    found[0].kill()
    _, err = process.communicate(timeout=200)
    assert (process.returncode, err.count("Ray could not be started")) == (3, 1), err


@pytest.mark.long
def test_models_on_ray_that_freeze_each_time_fail_their_shards_and_no_other(whole, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    with log.open("w") as stream:
        words = command(out, *ON_RAY, "--set", "executor.shard_timeout_s=20")
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT)
    while "FAILED" not in log.read_text() and process.poll() is None:
        for worker in workers(process.pid, "ray::_Models"):
            worker.suspend()
        time.sleep(0.05)
    assert process.wait(400) == 3, log.read_text()
    text = log.read_text()
    assert "no batch got done for 20 s (executor.shard_timeout_s): given up, and its workers replaced" in text
    assert "Traceback" not in text
    assert len(manifests(out)) >= 2
    assert not list(out.rglob(".tmp-*"))
    assert make(out)[0] is ExitCode.OK
    assert contents(out) == contents(whole)
