"""Runs of the bundled sample in eight small shards, in processes of their own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

SHARDS = [f"sample-0000{n}" for n in range(8)]
_SETS = ("--set", "source.rows_per_shard=3")


def command(out: object, *words: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "dataset", "--shards", "sample", "--out", str(out), *_SETS, *words]


def make(out: object, *words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *words), capture_output=True, text=True, check=False, **options)


def manifests(out: Path) -> list[str]:
    return sorted(path.stem for path in (out / "shards").glob("*.json"))


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


def without(whole: Path, out: Path, *shards: str) -> Path:
    """A copy of a whole run that lacks some shards, as one that was interrupted."""
    for path in whole.rglob("*"):
        copy = out / path.relative_to(whole)
        if path.is_file() and path.stem not in shards:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return out


def begun(out: Path, *words: str, shards: int = 1, **options) -> subprocess.Popen:
    """A run that goes on, with so many shards more than before done; it may be over by then."""
    before = len(manifests(out))
    process = subprocess.Popen(
        command(out, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    while len(manifests(out)) < before + shards and process.poll() is None:
        time.sleep(0.01)
    return process


def stopped(out: Path, sign: signal.Signals, *words: str) -> tuple[int, str]:
    """The exit code and stderr of a run that got a signal when its next shard was done."""
    process = begun(out, *words)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors
