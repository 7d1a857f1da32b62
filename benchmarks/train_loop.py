"""Samples per second of the trainer, all precomputed, against the published tutorial's loop. Target: >= 1.6 times.

    python benchmarks/train_loop.py [--variant plus-face] [--kind sd15] [--resolution 512] [--batch 1] [--smoke]

The trainer is the real `pipeline.train.loop.train` on shards that hold latents, text embeddings, features of the face.
Every few of its steps it is stopped for as many steps of the tutorial's loop (train_tutorial.py) in the same process,
on the same model and optimiser. The first turn of both is not counted. Bases have the published sizes and random
weights (train_made.py): about 4 GB in a temporary folder for sd15, 12 GB for sdxl. On two CPU cores a step takes
minutes and 12 GB of memory in float32. `--smoke` does the same on the tiny base, to see that it runs.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from train_made import Made, make
from train_tutorial import Tutorial

from pipeline.train import loop as trainer
from pipeline.train.adapters.variants import VARIANTS
from pipeline.train.job import Call, prepared
from pipeline.train.session import Session
from pipeline.train.watch import METRICS, Watch


class Done(Exception):
    """All turns were taken."""


@dataclass(frozen=True)
class Plan:
    """Who steps when. On a GPU nothing waits for it inside a turn, and loaders may not live on what they read ahead."""

    turns: int
    steps: int
    """Per turn."""
    skip: int
    """Steps at the beginning of each turn that do not count."""

    @property
    def counted(self) -> int:
        return self.steps - self.skip


@dataclass
class Loop:
    """What was measured of one loop: a number per counted turn."""

    wall: list[float] = field(default_factory=list)
    """Seconds per step."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds per step, of this process and all its threads."""
    peak: float = 0.0
    """GB: largest resident memory so far, or allocated on the GPU during the loop's first turn."""


class Turns:
    """Lets the tutorial's loop step whenever the trainer has made its turn."""

    def __init__(self, plan: Plan, made: Made) -> None:
        self._plan, self._made = plan, made
        self.trainer, self.tutorial = Loop(), Loop()
        self.session: Session | None = None
        self.base: Any = None
        self.other: Tutorial | None = None
        self._turn = 0
        self._begun = clock()

    def after(self, step: int) -> None:
        """The trainer has made a step, and its clock stands still."""
        within = (step - 1) % self._plan.steps + 1
        if within == self._plan.skip:
            self._begun = clock()
        if within < self._plan.steps:
            return
        self._measure(self.trainer)
        self._tutorial_turn()
        self._turn += 1
        if self._turn > self._plan.turns:
            raise Done
        reset_peak()
        self._begun = clock()

    def _tutorial_turn(self) -> None:
        if self.other is None:
            assert self.session is not None
            self.other = Tutorial(self.session, self.base, self._made)
        reset_peak()
        self._begun = clock()
        self.other.parts.clear()
        for number in range(self._plan.steps):
            if number == self._plan.skip:
                self._begun = clock()
            self.other.step()
        self._measure(self.tutorial)

    def _measure(self, loop: Loop) -> None:
        wall, cpu = (now - then for now, then in zip(clock(), self._begun, strict=True))
        if not self._turn:
            loop.peak = peak()
            return
        loop.wall.append(wall / self._plan.counted)
        loop.cpu.append(cpu / self._plan.counted)


def clock() -> tuple[float, float]:
    """Wall and CPU time, once the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def hooked_to(turns: Turns) -> Iterator[None]:
    """The trainer as it is, but for a hook after each step."""

    class ObservedSession(Session):
        def __init__(self, job: Any, accelerator: Any, base: Any) -> None:
            super().__init__(job, accelerator, base)
            turns.session, turns.base = self, base

    class ObservedWatch(Watch):
        def batch(self, loss: torch.Tensor, samples: int) -> None:
            assert samples == turns.session.loader._config.data.batch_size
            super().batch(loss, samples)

        def step(self, step: int, **values: Any) -> None:
            super().step(step, **values)
            turns.after(step)

    with ExitStack() as stack:
        stack.enter_context(patch.object(trainer, "Session", ObservedSession))
        stack.enter_context(patch.object(trainer, "Watch", ObservedWatch))
        yield


def data_wait(run: Path, plan: Plan) -> float:
    """Share of the trainer's time, mean over the counted steps."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    every = lines[0]["step"]
    counted = [
        line["data_wait"]
        for line in lines
        if line["step"] > plan.steps and (line["step"] - every) % plan.steps >= plan.skip
    ]
    return statistics.fmean(counted)


def config(args: argparse.Namespace, plan: Plan) -> tuple[str, ...]:
    """`--set` pairs."""
    return (
        f"steps={(plan.turns + 1) * plan.steps + 1}",  # never reached: nothing is saved
        "data.verify=size",
        f"data.resolution={args.resolution}",
        f"data.batch_size={args.batch}",
        f"data.workers={args.workers}",
        f"optim.precision={args.precision}",
        f"optim.compile={str(args.compile).lower()}",
        f"watch.log_every={plan.skip or 1}",
    )


def measure(args: argparse.Namespace, plan: Plan, made: Made, run: Path) -> dict[str, Any]:
    """Both loops; numbers under their names."""
    preset = "sd15" if args.kind == "sd15" else "sdxl-1024" if args.resolution > 768 else "sdxl-512"
    job = prepared(Call((str(made.shards),), args.variant, str(made.base), run, preset, None, config(args, plan)))
    turns = Turns(plan, made)
    with hooked_to(turns), suppress(Done):
        trainer.train(job)
    ours, theirs = statistics.median(turns.trainer.wall), statistics.median(turns.tutorial.wall)
    assert turns.other is not None
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "precision": str(turns.base.dtype).removeprefix("torch."),
        "trainer": asdict(turns.trainer),
        "tutorial": asdict(turns.tutorial),
        "samples_per_s": args.batch / ours,
        "tutorial_samples_per_s": args.batch / theirs,
        "ratio": theirs / ours,
        "cpu_ratio": statistics.median(turns.tutorial.cpu) / statistics.median(turns.trainer.cpu),
        "data_wait": data_wait(run, plan),
        "parts": {name: seconds / plan.steps for name, seconds in turns.other.parts.items()},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="plus-face")
    parser.add_argument("--kind", choices=["sd15", "sdxl"], default="sd15")
    parser.add_argument("--resolution", type=int, help="[default: 512, 64 with --smoke]")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, help="counted steps per turn [default: 1 on a CPU, 40 on a GPU]")
    parser.add_argument("--turns", type=int, default=3, help="counted turns of each loop")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["auto", "no", "bf16", "fp16"], default="auto")
    parser.add_argument("--workers", type=int, help="of both loaders [default: 0 on a CPU, up to 8 on a GPU]")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep what is made here, and use it again")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--smoke", action="store_true", help="the tiny base and a tiny image encoder")
    return parser.parse_args()


def plan_of(args: argparse.Namespace) -> Plan:
    """Defaults by device."""
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch has not looked yet
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU here that torch can use: nothing was measured.")
    on_gpu = torch.cuda.is_available()
    args.resolution = args.resolution or (64 if args.smoke else 512)
    args.workers = args.workers if args.workers is not None else min(8, (os.cpu_count() or 2) - 1) * on_gpu
    # Whole batches for each worker: at the end of its epoch it would deliver a smaller one.
    share = max(1, args.workers) * args.batch
    args.samples = share * max(4, -(-64 // share))
    # The loaders read two batches per worker ahead while the other loop steps.
    skip = 10 * -(-(2 * args.workers + 1) // 10) if on_gpu else 0
    counted = args.steps or (40 if on_gpu else 1)
    # Whole intervals between two measurements of the data wait, which are as long as what is skipped.
    return Plan(args.turns, skip + (skip * -(-counted // skip) if skip else counted), skip)


def report(args: argparse.Namespace, numbers: dict[str, Any]) -> None:
    print(
        f"{args.variant}, {args.kind}{' (tiny)' * args.smoke}, {args.resolution} px, batch {args.batch}, "
        f"{numbers['precision']} on {numbers['device']}, {torch.get_num_threads()} threads"
    )
    for name, speed in (("trainer", numbers["samples_per_s"]), ("tutorial", numbers["tutorial_samples_per_s"])):
        loop = numbers[name]
        wall, cpu = (f"{statistics.median(loop[of]):.4g} s" for of in ("wall", "cpu"))
        low, high = min(loop["wall"]), max(loop["wall"])
        print(
            f"{name:9s} {speed:9.4g} samples/s; a step takes {wall} ({low:.4g} to {high:.4g}), {cpu} of CPU; "
            f"peak {loop['peak']:.1f} GB"
        )
    print(f"trainer / tutorial: {numbers['ratio']:.2f} (CPU time {numbers['cpu_ratio']:.2f}); wanted: 1.6")
    print(f"data wait of the trainer: {100 * numbers['data_wait']:.2f} %; wanted: 2 % at most")
    if numbers["device"] == "CPU":
        parts = "; ".join(f"{name} {seconds:.4g} s" for name, seconds in numbers["parts"].items())
        print(f"the tutorial's last turn, CPU per step: {parts}")


def main() -> None:
    args = arguments()
    plan = plan_of(args)
    with tempfile.TemporaryDirectory() as folder:
        kept = args.folder or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        made = make(kept, args.kind, args.resolution, args.samples, is_tiny=args.smoke)
        numbers = measure(args, plan, made, Path(folder) / "run")
    report(args, numbers)
    if args.json:
        args.json.write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
