"""Feeds damaged bytes to everything that reads bytes of others: no crash, no hang, no traceback, no word on stderr.

python benchmarks/fuzz.py [--inputs 120000] [--seed 0] [--target NAME]      all targets, in processes of 1,000 inputs
python benchmarks/fuzz.py --target png --only 4711                          one input again, with its traceback

Input n of a target depends on its name and n alone: a finding names both. What a target may raise stands in
fuzz_targets.py; anything else is a finding, and so is an input that takes over 2 s of processor time, or a process
that dies.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fuzz_inputs import mutated
from fuzz_targets import TARGETS

from schemas.drops import Dropped, DropReason
from stages.pixels import decoding

SECONDS = 2.0
HOPELESS = 60
"""Seconds of wall clock after which an input is given up."""
BLOCK = 1000


@cache
def corpus(name: str) -> list[bytes]:
    return TARGETS[name].corpus()


def input_of(name: str, number: int) -> bytes:
    """Input `number` of a target."""
    rng = random.Random(f"{name} {number}")
    damaged = mutated(rng.choice(corpus(name)), rng)
    return TARGETS[name].repair(damaged) if rng.random() < 0.5 else damaged


# ---- running


def spent_s() -> float:
    """Processor time of this process and of the one that decodes."""
    child = decoding.decoder()._child
    seconds = time.process_time()
    if child is not None:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{child._process.pid}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def tried(name: str, number: int, folder: Path) -> tuple[str, str]:
    """What became of an input, in a word; and the finding, if it is one."""
    target, data = TARGETS[name], input_of(name, number)
    started = spent_s()
    try:
        outcome = target.read(data, folder)
    except target.allowed as error:
        outcome = str(error.reason) if isinstance(error, Dropped) else type(error).__name__
    except Exception:  # the point of it all
        return "finding", f"{name} {number}: {traceback.format_exc()}"
    if spent_s() - started > SECONDS:
        return "finding", f"{name} {number}: took {spent_s() - started:.1f} s"
    return outcome, ""


def block(name: str, start: int, count: int) -> Iterator[dict[str, object]]:
    """Inputs of one target in this process."""
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(start, start + count):
            signal.alarm(HOPELESS)
            outcome, finding = tried(name, number, Path(folder))
            outcomes[outcome] += 1
            if outcome == DropReason.DECODER_CRASH:
                yield {"crash": f"{name} {number}"}
            if finding:
                yield {"finding": finding}
    signal.alarm(0)
    yield {"outcomes": outcomes}


def shares(inputs: int, only: str | None) -> dict[str, int]:
    """Target -> its number of inputs."""
    chosen = {name: target for name, target in TARGETS.items() if only in (None, name)}
    total = sum(target.share for target in chosen.values())
    return {name: -(-inputs * target.share // total) for name, target in chosen.items()}


def run(inputs: int, seed: int, only: str | None) -> int:
    """All targets, each block in a process of its own; the number of findings."""
    findings, crashes, done = 0, 0, 0
    for name, count in shares(inputs, only).items():
        outcomes: collections.Counter[str] = collections.Counter()
        began = time.monotonic()
        for start in range(seed, seed + count, BLOCK):
            words = [sys.executable, __file__, "--block", name, str(start), str(min(BLOCK, seed + count - start))]
            process = subprocess.run(words, capture_output=True, text=True, check=False, errors="replace")
            lines = [json.loads(line) for line in process.stdout.splitlines()]
            failures = [line["finding"] for line in lines if "finding" in line]
            if process.returncode or process.stderr:
                failures.append(f"{name} {start}..: exit {process.returncode}, stderr: {process.stderr[-2000:]}")
            for line in lines:
                outcomes.update(line.get("outcomes", {}))
                if "crash" in line:
                    crashes += 1
                    print(f"contained crash of a decoder: {line['crash']}", flush=True)
            for finding in failures:
                findings += 1
                print(f"FINDING {finding}", flush=True)
        done += outcomes.total()
        common = ", ".join(f"{outcome} {n}" for outcome, n in outcomes.most_common(8))
        print(f"{name}: {outcomes.total():,} inputs in {time.monotonic() - began:.0f} s: {common}", flush=True)
    print(f"{done:,} inputs from {seed} on, {findings} findings, {crashes} contained crashes of a decoder", flush=True)
    return findings


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--inputs", type=int, default=120_000)
    arguments.add_argument("--seed", type=int, default=0, help="number of the first input of each target")
    arguments.add_argument("--target", choices=TARGETS)
    arguments.add_argument("--only", type=int, help="try this one input of --target")
    arguments.add_argument("--block", nargs=3, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.block:
        name, start, count = args.block
        for line in block(name, int(start), int(count)):
            print(json.dumps(line), flush=True)
    elif args.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(*tried(args.target, args.only, Path(folder)))
    else:
        sys.exit(min(run(args.inputs, args.seed, args.target), 1))


if __name__ == "__main__":
    main()
