"""Samples per second of the real trainer, beside the tutorial's loop in the same process: one process per base."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

LOOP = Path(__file__).parents[1] / "train_loop.py"
MEMORY, ROOM = Path("/dev/shm"), 24e9  # nothing is written to a disk, where bases and what loaders read ahead fit


class Case(NamedTuple):
    """A run of train_loop.py, compiled."""

    kind: str
    resolution: int
    variant: str
    tflop: float
    """TFLOP per sample: forward, and backward through activations and into trained weights."""
    batch: int
    """For a GPU with 80 GB."""
    seconds: int
    """About what it takes, compiling included."""

    @property
    def name(self) -> str:
        return f"train {self.kind} {self.resolution} {self.variant}"


CASES = (
    Case("sd15", 512, "plus-face", 1.67, 32, 120),
    Case("sd15", 512, "faceid-plusv2", 1.82, 32, 150),
    Case("sdxl", 512, "plus-face", 3.22, 16, 240),
    Case("sdxl", 1024, "plus-face", 14.1, 4, 260),
)
PEAKS = {"H100": 989, "H200": 989, "A100": 312}
"""Dense bfloat16 TFLOP/s by a part of the device's name, as its maker says."""


def parts(args: argparse.Namespace) -> Iterator[tuple[str, Callable[..., None]]]:
    """Name and function of each part."""
    for case in CASES[::2] if args.smoke else CASES:  # tiny models have one resolution, and differ by their base
        yield case.name, lambda device, record, left, case=case: run(case, device, record, left, args)


def run(
    case: Case, device: str, record: Callable[[dict[str, Any]], None], left: float, args: argparse.Namespace
) -> None:
    """One base, resolution and variant; what does not fit into the seconds left is not begun."""
    if left < case.seconds and not args.smoke:
        record({"skipped": f"{left:.0f} s left, about {case.seconds} needed"})
        return
    has_room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM
    with tempfile.TemporaryDirectory(dir=MEMORY if has_room else None) as folder:
        results = Path(folder) / "results.json"
        command = [sys.executable, str(LOOP), f"--json={results}", f"--folder={folder}", "--turns=1"]
        command += [f"--kind={case.kind}", f"--variant={case.variant}"]
        if args.smoke:
            command += ["--smoke", f"--device={device}"]
        else:
            command += ["--device=cuda", "--precision=bf16", f"--batch={case.batch}", f"--resolution={case.resolution}"]
            command += ["--steps=10", "--workers=4", "--compile"]
        subprocess.run(command, check=True, timeout=max(left, 60))
        numbers = json.loads(results.read_text())
    peak = next((peak for part, peak in PEAKS.items() if part in numbers["device"]), None)
    record(
        {
            "samples_per_s": round(numbers["samples_per_s"], 2),
            "batch": case.batch,
            "share_of_peak": peak and round(numbers["samples_per_s"] * case.tflop / peak, 3),
            "memory_gb": round(numbers["trainer"]["peak"], 1),
            "times_tutorial": round(numbers["ratio"], 2),
            "tutorial_memory_gb": round(numbers["tutorial"]["peak"], 1),
            "data_wait": round(numbers["data_wait"], 4),
        }
    )
