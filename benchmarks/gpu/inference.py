"""Inference on a GPU: do batches, float16 and torch give what single images, float32 and ONNX Runtime do; how fast.

    python benchmarks/gpu/inference.py [--smoke] [--device cuda|cpu] [--pack DIR] [--photos DIR] [--limit SECONDS]

Models have the published sizes and random weights; with a pack of insightface its detector and recogniser are looked
at too. Every result is a line of JSON, printed when it is known. A step that fails says so, and the next one begins.
"""

import argparse
import functools
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from inference_bench import Bench, Record
from inference_pipeline import naive_loop, pipeline, pipeline_compiled
from inference_product import product
from inference_sameness import (
    sameness_detector,
    sameness_parser,
    sameness_recogniser,
    sameness_tower,
)
from inference_speed import (
    compiled,
    decoding_on_cpu,
    decoding_on_gpu,
    from_host,
    letterboxes,
    throughput,
)

_LIMIT_S = 240


def parts(args: argparse.Namespace) -> Iterator[tuple[str, Callable[..., None]]]:
    """Name and function of each part, for the benchmark of all."""

    def inference(device: str, record: Record, left: float) -> None:
        run(device, record, args.smoke, args.pack, args.photos, min(left, _LIMIT_S))

    yield "inference", inference


def run(
    device: str,
    record: Record,
    smoke: bool,
    pack: Path | None = None,
    photos: Path | None = None,
    limit_s: float = _LIMIT_S,
) -> None:
    """All steps, in order of importance, each within its own limit and all within `limit_s` seconds."""
    from stages.models.torch_backend import prepare

    prepare("cpu")
    begin = time.monotonic()
    steps: list[tuple[Callable[[Bench], None], float]] = [
        (sameness_detector, 30), (sameness_recogniser, 15), (sameness_tower, 25), (sameness_parser, 10),
        (product, 45), (pipeline, 50), (throughput, 70), (naive_loop, 16),
        (decoding_on_cpu, 9), (decoding_on_gpu, 9), (letterboxes, 6), (from_host, 10),
        (compiled, 60), (pipeline_compiled, 90),
    ]  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="inference"))
    bench = Bench(device, record, smoke, pack, photos, folder)
    try:
        for step, seconds in steps:
            left = limit_s - (time.monotonic() - begin)
            started = time.monotonic()
            bench.record = functools.partial(_with_step, record, step.__name__)
            if left < 2:
                bench.record({"skipped": "out of time"})
                continue
            try:
                with _limit(min(seconds * 1.5, left)):  # steps look at their deadline themselves
                    bench.deadline = started + min(seconds, left)
                    step(bench)
            except Exception as error:  # every step is tried
                trace = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(trace.filename).name}:{trace.lineno}"
                bench.record({"error": f"{type(error).__name__}: {str(error)[:300]}", "at": where})
            bench.record({"seconds": round(time.monotonic() - started, 2)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _with_step(record: Record, step: str, values: dict[str, Any]) -> None:
    record({"step": f"inference.{step}", **values})


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds, where signals are to be had."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s")

    try:
        before = signal.signal(signal.SIGALRM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models and few photos")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--pack", type=Path, help="folder of an insightface pack")
    parser.add_argument("--photos", type=Path, help="folder of photos")
    parser.add_argument("--limit", type=float, default=_LIMIT_S, help="seconds")
    given = parser.parse_args()
    import torch

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run(
        device, lambda values: print(json.dumps(values), flush=True), given.smoke, given.pack, given.photos, given.limit
    )


if __name__ == "__main__":
    main()
