"""What `python -m pipeline dataset` costs per row: CPU time of all its processes, start-up excluded, and memory."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from material import Material
from server import serving

POLL_S = 0.1


@dataclass(frozen=True)
class Cost:
    """Of a run, or per row of one."""

    cpu: Counter[str]
    """Seconds by kind of process: driver, shard, models, ray; a decoder is part of what waits for it."""
    wall: float
    """Seconds."""
    peak_mib: float
    """Of the largest process."""

    @property
    def cpu_s(self) -> float:
        return self.cpu.total()


def words(material: Material, sets: Mapping[str, object]) -> list[str]:
    """Arguments: the pack, and backends without weights for the rest; `sets` goes before."""
    given: dict[str, object] = {"download.allow_loopback": "true"}
    if material.data or material.smoke:
        given |= {"models.pack": material.pack, "models.accept_noncommercial": "true"}
        given |= {"models.segmenter": "grabcut", "models.image_embedder": "patches"}
    else:
        given |= {"profile": "embedded"}
    return [word for name, value in {**given, **sets}.items() for word in ("--set", f"{name}={value}")]


def measured(command: Sequence[str], out: Path | None = None, marks: Sequence[int] = ()) -> Cost:
    """Run it, and look at all its processes every tenth of a second: what the last moment of one costs is lost.

    With two `marks`, what was spent per shard between the moments when so many shards of `out` were done.
    """
    cpu: dict[tuple[int, float], tuple[str, float]] = {}
    moments: list[tuple[int, Counter[str], float]] = []
    peak, begun = 0.0, time.monotonic()
    with tempfile.TemporaryFile() as output:
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        ended = None
        while ended is None:
            # Left a zombie until its last numbers are read.
            ended = os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            root = psutil.Process(run.pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    times, key = process.cpu_times(), (process.pid, process.create_time())
                    kind = "driver" if process == root else _kind(process)
                    if kind == "ray" and key in cpu:
                        kind = cpu[key][0]  # one that made a shard has nothing to do
                    cpu[key] = kind, times.user + times.system
                    peak = max(peak, _peak_mib(process.pid))
            if len(moments) < len(marks) and (done := len(list(out.glob("shards/*.json")))) >= marks[len(moments)]:
                moments.append((done, _by_kind(cpu), time.monotonic()))
            time.sleep(POLL_S)
        if run.wait():
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}:\n{output.read().decode()[-2000:]}")
    if not marks:
        return Cost(_by_kind(cpu), time.monotonic() - begun, peak)
    (few, before, then), (many, after, now) = moments
    per_shard = Counter({kind: (after[kind] - before[kind]) / (many - few) for kind in after})
    return Cost(per_shard, (now - then) / (many - few), peak)


def _by_kind(cpu: Mapping[Any, tuple[str, float]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for kind, seconds in cpu.values():
        total[kind] += seconds
    return total


def _kind(process: psutil.Process) -> str:
    title = " ".join(process.cmdline())
    if "decoding_child" in title:  # part of what waits for it
        title = " ".join(process.parent().cmdline())
    for kind, part in {"models": "ray::_Models", "shard": "ray::_Maker", "driver": "-m pipeline"}.items():
        if part in title:
            return kind
    return "ray"


def _peak_mib(pid: int) -> float:
    with contextlib.suppress(OSError, IndexError):  # of a zombie nothing is left
        return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return 0.0


def urls(port: int, names: Sequence[str], count: int) -> list[str]:
    return [f"http://127.0.0.1:{port}/{name}?{n}" for n, name in zip(range(count), cycle(names))]


def plain(urls: Sequence[str]) -> pa.Table:
    """Metadata that says nothing of sizes."""
    return pa.table({"URL": urls, "TEXT": ["a person"] * len(urls)})


def dataset(metadata: pa.Table, words: Sequence[str], marks: Sequence[int] = ()) -> Cost:
    """Of a run over these rows; see `measured`."""
    with tempfile.TemporaryDirectory() as folder:
        part, out = Path(folder, "part.parquet"), Path(folder, "out")
        pq.write_table(metadata, part)
        command = [sys.executable, "-m", "pipeline", "dataset", "--shards", str(part), "--out", str(out), *words]
        return measured(command, out, marks)


def per_row(urls: Sequence[str], short: int, words: Sequence[str]) -> Cost:
    """Per URL after the first `short`: what a run over all of them costs more than one over these.

    With 0 the start of a run is not excluded.
    """
    one = dataset(plain(urls[:short]), words) if short else Cost(Counter(), 0.0, 0.0)
    other = dataset(plain(urls), words)
    rows = len(urls) - short
    cpu = Counter({kind: (other.cpu[kind] - one.cpu[kind]) / rows for kind in other.cpu})
    return Cost(cpu, (other.wall - one.wall) / rows, other.peak_mib)


@contextlib.contextmanager
def served(folder: Path, names: Sequence[str], count: int) -> Iterator[list[str]]:
    """URLs of so many rows, while they are served."""
    with serving(folder) as (port, _):
        yield urls(port, names, count)
