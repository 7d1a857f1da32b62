"""The ten-minute proof: what faceshards does on one GPU, on a bare machine without network, weights or disk.

    python benchmarks/gpu [--out FILE] [--pack DIR] [--photos DIR] [--only PART] [--limit SECONDS]
    python benchmarks/gpu --smoke       # all of it with tiny models, on any machine, in about a minute
    python benchmarks/gpu --log         # and put the table on top of docs/LOG.md; benchmarks/report.py does for a FILE

In the order of their importance: that batches and runtimes compute the same, photos per second of the data side,
samples per second of the trainer on SD1.5, then on SDXL, and what might make it faster (`--only levers`, as many
minutes more as there are). Models have the published sizes and random weights, which are made in memory; the small
pack and the photos, where given, are real. Every result is appended to FILE at once, a part that fails or takes too
long is recorded there, and the next one begins.
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Its processes would each compile what they import once more.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import bare
import inference
import levers
import report
import training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu.jsonl"), help="[default: %(default)s]")
    parser.add_argument("--pack", type=Path, help="folder of a small insightface pack")
    parser.add_argument("--photos", type=Path, help="folder of photos that the pack is tried on")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--limit", type=float, default=480, help="seconds for all of it [default: %(default)s]")
    parser.add_argument("--smoke", action="store_true", help="tiny models; on the CPU where there is no GPU")
    parser.add_argument("--log", action="store_true", help="put the table on top of docs/LOG.md")
    args = parser.parse_args()
    import torch

    if not args.smoke and not torch.cuda.is_available():
        sys.exit("There is no GPU here that torch can use: nothing was measured. --smoke shows that it runs.")
    if args.smoke:
        bare.pretend()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begun = time.monotonic()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    record = report.recorder(args.out, args.smoke, name, torch=torch.__version__)
    failed = False
    for part, run in (*inference.parts(args), *training.parts(args), *levers.parts(args)):
        left = args.limit - (time.monotonic() - begun)
        if args.only not in part:
            continue

        def note(result: dict[str, Any], part: str = part) -> None:
            nonlocal failed
            failed |= "error" in result
            record({"part": part, **result})

        try:
            run(device, note, left)
        except Exception as error:
            failed = True
            traceback.print_exc()
            record({"part": part, "failed": traceback.format_exception_only(error)[-1].strip()[:300]})
    print(report.table(args.out))
    if args.log:
        report.log(args.out, "benchmarks/gpu")
    sys.exit(failed)


if __name__ == "__main__":
    main()
