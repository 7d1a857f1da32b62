"""Inference on a GPU: whether batches and torch give what single images and ONNX Runtime do, and how fast it all is.

Models have the published sizes and random weights; of a pack of insightface its detector is taken. A step that fails
says so, and the next one begins.
"""

import argparse
import functools
import gc
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inference_bench import Bench, Record
from inference_product import encoders, naive_loop, networks, product, sameness

_STEPS = ((sameness, 60), (product, 80), (networks, 40), (naive_loop, 30), (encoders, 60))
"""In order of importance, and the seconds of each."""


def parts(args: argparse.Namespace) -> Iterator[tuple[str, Callable[..., None]]]:
    """Name and function of each part, for the benchmark of all."""
    yield "inference", functools.partial(run, args)


def run(args: argparse.Namespace, device: str, record: Record, left: float) -> None:
    """All steps, each within its own limit and all within `left` seconds."""
    from stages.models.torch_backend import prepare

    prepare("cpu")
    end = time.monotonic() + left

    def stop(*_: object) -> None:
        raise TimeoutError("the step took too long")

    signal.signal(signal.SIGALRM, stop)
    with tempfile.TemporaryDirectory(prefix="inference") as folder:
        bench = Bench(device, record, args.smoke, args.pack, args.photos, Path(folder))
        for step, seconds in _STEPS:
            begun = time.monotonic()

            def note(values: dict[str, Any], name: str = step.__name__) -> None:
                record({"step": f"inference.{name}", **values})

            bench.record = note
            if end - begun < 2:
                note({"skipped": "out of time"})
                continue
            signal.setitimer(signal.ITIMER_REAL, min(seconds, end - begun))
            try:
                step(bench)
            except Exception as error:  # every step is tried
                trace = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(trace.filename).name}:{trace.lineno}"
                note({"error": f"{type(error).__name__}: {str(error)[:300]}", "at": where})
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            note({"seconds": round(time.monotonic() - begun, 2)})
    if device == "cuda":  # what trains next is another process, and needs the memory
        import torch

        del bench
        gc.collect()
        torch.cuda.empty_cache()
