"""The trainer on one GPU, full-size bases: samples/s, memory, share of peak FLOP/s, and against the tutorial's loop.

    python benchmarks/train_gpu.py [--only sdxl-1024] [--scale 0.5] [--folder DIR]
    python benchmarks/train_gpu.py --smoke        # the same on tiny bases, on any machine

Runs train_loop.py in bfloat16 once per base, resolution and variant, each as it is by default and with
torch.compile and channels_last. Wanted: at least 28 % of the peak as it is, 40 % with both, and 1.6 times the
tutorial's samples/s on sd15 plus-face. Takes about an hour and 20 GB of disk; each run's numbers go to DIR/NAME.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """A run of train_loop.py."""

    kind: str
    resolution: int
    variant: str
    tflop: float
    """TFLOP per sample: forward, and backward through activations and into trained weights."""
    batch: int
    """For a GPU with 80 GB."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.resolution}-{self.variant}"


CASES = (
    Case("sd15", 512, "plus-face", 1.67, 32),
    Case("sd15", 512, "faceid-plusv2", 1.82, 32),
    Case("sdxl", 512, "plus-face", 3.22, 16),
    Case("sdxl", 512, "faceid-plusv2", 3.46, 16),
    Case("sdxl", 1024, "plus-face", 14.1, 4),
    Case("sdxl", 1024, "faceid-plusv2", 15.1, 4),
)
FASTER = ("--compile", "--channels-last")
HEAD = """| run | samples/s | peak memory | share of peak | trainer / tutorial | data wait |
|---|---|---|---|---|---|"""
PEAKS = {"H100": 989, "H200": 989, "A100": 312}
"""Dense bfloat16 TFLOP/s by a part of the device's name, as its maker says."""


def run(case: Case, faster: bool, args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """The numbers of one run; None when it failed, which was told."""
    told = folder / f"{case.name}{'-faster' * faster}.json"
    command = [sys.executable, str(Path(__file__).with_name("train_loop.py")), f"--json={told}", f"--folder={folder}"]
    command += [f"--kind={case.kind}", f"--variant={case.variant}"]
    if args.smoke:  # compiling takes minutes on a CPU
        command += ["--smoke", "--device=cpu", "--turns=1", *(FASTER[1:] if faster else ())]
    else:
        batch = max(1, round(case.batch * args.scale))
        command += FASTER if faster else ()
        command += ["--device=cuda", "--precision=bf16", f"--batch={batch}", f"--resolution={case.resolution}"]
    if subprocess.run(command).returncode:
        print(f"{told.stem}: failed, see above")
        return None
    found: dict[str, Any] = json.loads(told.read_text())
    return found


def row(case: Case, faster: bool, found: dict[str, Any] | None) -> str:
    """A line of a Markdown table."""
    name = f"{case.kind} {case.resolution} {case.variant}{', compile + channels_last' * faster}"
    if found is None:
        return f"| {name} | failed | | | | |"
    peak = next((peak for part, peak in PEAKS.items() if part in found["device"]), None)
    share = f"{100 * found['samples_per_s'] * case.tflop / peak:.0f} %" if peak else "unknown"
    return (
        f"| {name} | {found['samples_per_s']:.1f} | {found['trainer']['peak']:.1f} GB | {share} | "
        f"x {found['ratio']:.2f} | {100 * found['data_wait']:.1f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name (kind-resolution-variant) contains this")
    parser.add_argument("--scale", type=float, default=1.0, help="of batch sizes, which are for 80 GB")
    parser.add_argument("--folder", type=Path, help="keep bases, shards and numbers here")
    parser.add_argument("--smoke", action="store_true", help="tiny bases on the CPU, to see that it runs")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("There is no GPU here that torch can use: nothing was measured. --smoke shows that the runs work.")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for case in (case for case in CASES if args.only in case.name):
            for faster in (False, True):
                found = run(case, faster, args, folder)
                rows.append(row(case, faster, found))
    print("\nTiny bases on a CPU: these numbers mean nothing." if args.smoke else "", HEAD, sep="\n")
    print("\n".join(rows))
    sys.exit(any("failed" in line for line in rows))


if __name__ == "__main__":
    main()
