"""Kills runs at random moments, reruns them, and compares the dataset with that of an undisturbed run, byte for byte.

    python benchmarks/bench_kills.py --kills 200
    python benchmarks/bench_kills.py --kills 6 --executor ray --victim node --seed 17

Victims, each with SIGKILL: the driver; on Ray a model actor, a shard's task, any worker, the raylet, the GCS, or every
process of the session but the driver (the node); the process in which photos are decoded. A dataset is run one to
five times under fire, then once in peace. What must hold: the last run ends with 0; shards, ledgers, manifests,
dataset.json and all other files but the report are those of an undisturbed run, with no file more; no row is lost or
doubled; no run hangs, tells of a traceback, or ends otherwise than with 0, 3 or its own death (1 by Ray's hand); and of
no killed run is a process left after a while. Every dataset's seed is printed: `--seed S --kills 1` does it again.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from pipeline.shared.tars import unpack

_MARK = "FACESHARDS_KILLS"
_HANGS_S = 240.0
_ORPHANS_S = 45.0
"""How long a process may outlive its driver."""
_SETS = ("source.rows_per_shard=3", "executor.batch_rows=2", "executor.workers=2")

Victims = list[psutil.Process]


def _titled(*words: str) -> Callable[[psutil.Process, Victims], Victims]:
    def find(driver: psutil.Process, others: Victims) -> Victims:
        return [process for process in others if any(word in title(process) for word in words)]

    return find


_FIND: dict[str, Callable[[psutil.Process, Victims], Victims]] = {
    "driver": lambda driver, others: [driver],
    "actor": _titled("ray::_Models"),
    "maker": _titled("ray::_Maker"),
    "worker": _titled("ray::"),
    "raylet": _titled("raylet/raylet"),
    "gcs": _titled("gcs/gcs_server"),
    "node": lambda driver, others: others,
    "decoder": _titled("decoding_child"),
}
_VICTIMS = {"local": ("driver", "decoder"), "ray": tuple(_FIND)}


def title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def marked(mark: str) -> Victims:
    """Every process of a run, also those whose parents died."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


@dataclass
class Score:
    kills: Counter[str] = field(default_factory=Counter)
    ends: Counter[int] = field(default_factory=Counter)
    datasets: int = 0
    recovered: int = 0
    """Runs that lost a process and ended with 0 all the same."""


class Failure(Exception):
    pass


class Run:
    """One run into an OUT, in processes that carry a mark."""

    def __init__(self, out: Path, executor: str, log: Path) -> None:
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.log = log
        command = [sys.executable, "-m", "pipeline", "dataset", "--shards", "sample", "--out", str(out)]
        command += ["--executor", executor, *(word for pair in _SETS for word in ("--set", pair))]
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, _MARK: self.mark}
            )

    def strike(self, victim: str, rng: random.Random) -> bool:
        """Kill a victim of this kind, if there is one."""
        others = [process for process in marked(self.mark) if process.pid != self.process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            victims = _FIND[victim](psutil.Process(self.process.pid), sorted(others, key=lambda process: process.pid))
            chosen = victims if victim == "node" else victims[:1] and [rng.choice(victims)]
            for process in chosen:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            return bool(chosen)
        return False

    def end(self) -> int:
        """Wait for the run, and for the end of all that it started; its exit code."""
        try:
            code = self.process.wait(_HANGS_S)
        except subprocess.TimeoutExpired:
            for process in marked(self.mark):
                process.kill()
            raise Failure(f"it hung; its last words:\n{self.log.read_text()[-2000:]}") from None
        deadline = time.monotonic() + _ORPHANS_S
        while (left := marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        if left:
            titles = [title(process) for process in left]
            for process in left:
                process.kill()
            raise Failure(f"{len(left)} processes outlived it by {_ORPHANS_S:g} s: {titles}")
        text = self.log.read_text()
        # Ray ends the process of a driver that is just being registered with a node that dies: nobody can prevent it.
        by_ray = code == 1 and ("core_worker_process.cc" in text or "rpc_client.h" in text)
        if (code not in (0, 3, -9) and not by_ray) or "Traceback" in text:
            raise Failure(f"it ended with {code}:\n{text[-4000:]}")
        return code


def contents(out: Path) -> dict[str, bytes]:
    """All files of a dataset but the report, which tells of times, and the cards, which tell of days."""
    dated = ("report.html", "README.md", "croissant.json")
    paths = sorted(path for path in out.rglob("*") if path.is_file() and path.name not in dated)
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def check_rows(out: Path, rows: int) -> None:
    """Every row once in the ledgers, every kept one once in the tars."""
    ledger = [row for path in sorted((out / "shards").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    keys = [row["key"] for row in ledger]
    kept = sorted(row["key"] for row in ledger if row["verdict"] == "kept")
    packed = sorted(sample.key for path in (out / "shards").glob("*.tar") for sample in unpack(path))
    once = len(set(keys))
    if len(keys) != rows or once != rows or packed != kept:
        raise Failure(f"{rows} rows in; {len(keys)} in the ledgers, {once} distinct; {kept} and {packed} kept")


def dataset(folder: Path, seed: int, args: argparse.Namespace, peace: "Peace", score: Score) -> None:
    """One dataset under fire, and what became of it."""
    rng = random.Random(seed)
    executor = rng.choice(args.executor)
    out, log = folder / "out", folder / "log"
    code = -1
    for _ in range(rng.randint(1, args.runs)):
        code = _under_fire(Run(out, executor, log), executor, rng, args, peace.seconds[executor], score)
        if code == 0 or score.kills.total() >= args.kills:
            break
    if code and Run(out, executor, log).end() != 0:
        raise Failure(f"the rerun in peace did not end with 0:\n{log.read_text()[-4000:]}")
    files, wanted = contents(out), peace.files
    if files != wanted:
        differing = sorted(name for name in {*files, *wanted} if files.get(name) != wanted.get(name))
        raise Failure(f"these files differ from an undisturbed run's: {differing}")
    check_rows(out, peace.rows)
    score.datasets += 1


def _under_fire(
    run: Run, executor: str, rng: random.Random, args: argparse.Namespace, seconds: float, score: Score
) -> int:
    hit = 0
    for pause in _pauses(rng, seconds):
        try:
            run.process.wait(pause)
            break
        except subprocess.TimeoutExpired:
            victim = rng.choice([victim for victim in _VICTIMS[executor] if victim in args.victim])
            if run.strike(victim, rng):
                hit += 1
                score.kills[f"{executor}:{victim}"] += 1
    code = run.end()
    score.ends[code] += 1
    score.recovered += bool(hit) and code == 0
    return code


def _pauses(rng: random.Random, seconds: float) -> Iterator[float]:
    """A first strike anywhere in the run, and more of them soon after it."""
    yield rng.uniform(0.15, 1.0) * seconds
    for _ in range(rng.randint(1, 12)):
        yield rng.uniform(0.02, 0.2) * seconds


@dataclass
class Peace:
    """What undisturbed runs give and take."""

    files: dict[str, bytes]
    rows: int
    seconds: dict[str, float]


def undisturbed(folder: Path, executors: list[str]) -> Peace:
    peace = Peace({}, 0, {})
    for executor in executors:
        begun = time.monotonic()
        out = folder / executor
        run = Run(out, executor, folder / "log")
        if run.end() != 0:
            raise Failure(f"the undisturbed run did not end with 0:\n{run.log.read_text()[-4000:]}")
        peace.seconds[executor] = time.monotonic() - begun
        if peace.files and contents(out) != peace.files:
            raise Failure("the executors' undisturbed runs differ")
        peace.files = contents(out)
    peace.rows = sum(pq.read_metadata(path).num_rows for path in (out / "shards").glob("*.parquet"))
    return peace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument(
        "--seconds", type=float, help="what a run takes here; measured, for each executor, if not given"
    )
    parser.add_argument("--runs", type=int, default=5, help="under fire, at most, per dataset")
    parser.add_argument("--executor", nargs="+", choices=list(_VICTIMS), default=list(_VICTIMS))
    parser.add_argument("--victim", nargs="+", choices=list(_FIND), default=list(_FIND))
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    score, begun, failures = Score(), time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="faceshards-kills-") as folder:
        peace = undisturbed(Path(folder), args.executor if args.seconds is None else ["local"])
        if args.seconds is not None:
            peace.seconds = dict.fromkeys(_VICTIMS, args.seconds)
        print(f"undisturbed: {peace.rows} rows, {len(peace.files)} files, {peace.seconds}", flush=True)
        while score.kills.total() < args.kills:
            seed_folder = Path(folder) / str(seed)
            seed_folder.mkdir()
            try:
                dataset(seed_folder, seed, args, peace, score)
                print(f"seed {seed}: equal; {score.kills.total()} kills so far", flush=True)
            except Failure as failure:
                failures += 1
                print(f"seed {seed}: FAILED: {failure}", flush=True)
            seed += 1
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(score.kills.items()))
    print(
        f"{score.kills.total()} kills ({kinds}) over {score.datasets + failures} datasets in "
        f"{time.monotonic() - begun:.0f} s: {score.datasets} equal, {failures} failures; runs under fire ended with "
        f"{dict(score.ends)}, {score.recovered} of them lost a process and finished all the same"
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
