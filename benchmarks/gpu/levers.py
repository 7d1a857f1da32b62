"""What might make the trainer's step faster, each tried alone beside the product's own: which lever wins?

A UNet of SD1.5's outer level, which takes half of its time and compiles in a fraction of it, with the real adapter on a
synthetic batch: forward, backward, clipping, AdamW. All in a process of its own; a lever that fails says so, and the
next one is tried.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional

SECONDS = 60
"""What is needed to begin; each lever takes about half of it."""
_KINDS = {"attention": "sdpa|flash|fmha|attention", "generated": "^triton", "convolutions": "conv|fprop|dgrad|wgrad"}
_KINDS |= {"products": "gemm|cutlass|nvjet|cublas|matmul|mm_"}


def parts(args: argparse.Namespace) -> Iterator[tuple[str, Callable[..., None]]]:
    """Name and function of the part."""
    yield "levers", lambda device, record, left: run(device, record, left, smoke=args.smoke)


def run(device: str, record: Callable[[dict[str, Any]], None], left: float, *, smoke: bool) -> None:
    """All levers that there is time for; what is known is recorded, however it ends."""
    if left < SECONDS and not smoke:
        record({"skipped": f"{left:.0f} s left, at least {SECONDS} needed"})
        return
    root = Path(__file__).parents[2]
    command = [sys.executable, str(Path(__file__)), device, str(left - 10), *["--smoke"] * smoke]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            for line in process.stdout or ():
                record(json.loads(line))
        finally:
            process.kill()
    if process.returncode > 0:
        record({"error": f"the process ended with {process.returncode}"})


class Step:
    """The trainer's step on random inputs."""

    def __init__(self, device: str, batch: int, *, smoke: bool) -> None:
        import diffusers

        from pipeline.train.adapters.model import AdapterModel
        from pipeline.train.adapters.variants import Widths, variant
        from pipeline.train.settings import AdapterSettings

        widths, text, side = ((32,), 64, 8) if smoke else ((320,), 768, 64)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        with torch.device(device):
            unet = diffusers.UNet2DConditionModel(
                block_out_channels=widths,
                down_block_types=("CrossAttnDownBlock2D",),
                up_block_types=("CrossAttnUpBlock2D",),
                attention_head_dim=8,
                cross_attention_dim=text,
            ).to(dtype)
        settings = AdapterSettings()
        model = AdapterModel(unet, variant("plus-face"), Widths("sd15", text, features=text), settings)
        self.model, self.batch = model.to(device).train(), batch
        self._trained = list(self.model.trained().values())
        self._adam = torch.optim.AdamW(self._trained, lr=1e-5, fused=True)
        self._noise = torch.randn(batch, 4, side, side, device=device)
        self._times = torch.randint(1000, (batch,), device=device)
        self._text = torch.randn(batch, 77, text, device=device)
        self._condition = {"hidden": torch.randn(batch, 257, text, device=device)}

    def __call__(self) -> None:
        with torch.autocast(self._noise.device.type, torch.bfloat16, enabled=self._noise.is_cuda):
            predicted = self.model(self._noise, self._times, self._text, self._condition)
        functional.mse_loss(predicted.float(), self._noise).backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)


def plain(step: Step) -> None:
    """Not compiled."""


def as_diffusers(step: Step) -> None:
    """Not compiled either, and all kept for backward that diffusers' UNet keeps."""
    for module in step.model.unet.modules():
        vars(module).pop("forward", None)


def compiled(step: Step) -> None:
    """As the product does it."""
    step.model.compile_predict(step.batch)


def in_blocks(step: Step) -> None:
    """Each kind of block by itself: less to compile, so that each aspect could be."""
    from pipeline.train.adapters.frozen import suit_compiler

    suit_compiler(step.model.unet)
    torch._dynamo.config.recompile_limit = 64
    for block in step.model.unet.modules():
        if type(block).__name__ in ("BasicTransformerBlock", "ResnetBlock2D"):
            block.compile(dynamic=False)


def graphs(step: Step) -> None:
    """CUDA graphs of forward and backward."""
    compile_it = torch.compile
    with patch.object(torch, "compile", lambda run, **options: compile_it(run, mode="reduce-overhead", **options)):
        step.model.compile_predict(step.batch)


@contextmanager
def by_products(most: int) -> Iterator[None]:
    """Attention to at most so many keys as two products, instead of a fused kernel that pads them."""
    from pipeline.train.adapters import attention

    fused = attention.scaled_dot_product_attention

    def attend(query: Any, key: Any, value: Any) -> Any:
        if key.shape[2] > most:
            return fused(query, key, value)
        return (query @ (key.mT * query.shape[-1] ** -0.5)).softmax(-1) @ value

    with patch.object(attention, "scaled_dot_product_attention", attend):
        yield


@contextmanager
def inductor(**options: Any) -> Iterator[None]:
    """Options of torch's compiler."""
    from torch._inductor import config

    with config.patch(options):
        yield


LEVERS: tuple[tuple[str, Callable[[Step], None], Any, int], ...] = (
    # name, how the model is compiled, what is otherwise, batch
    ("plain", plain, None, 32),
    ("as diffusers has it", as_diffusers, None, 32),
    ("compiled", compiled, None, 32),
    ("image tokens by products", compiled, lambda: by_products(32), 32),
    ("blocks compiled", in_blocks, None, 32),
    ("text too by products", compiled, lambda: by_products(128), 32),
    ("tuned kernels", compiled, lambda: inductor(coordinate_descent_tuning=True), 32),
    ("q, k, v in one", compiled, lambda: inductor(pre_grad_fusion_options={"batch_linear_lhs": {}}), 32),
    ("compiled, batch 8", compiled, None, 8),
    ("graphs, batch 8", graphs, None, 8),
    ("tuned products", compiled, lambda: inductor(max_autotune_gemm=True), 32),
)


def measured(step: Step, *, smoke: bool) -> dict[str, Any]:
    """Milliseconds and gigabytes of a step, and how long the first one took."""
    on_gpu = step._noise.is_cuda
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    begun = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - begun
    times = []
    for _ in range(1 if smoke else 15):
        begun = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - begun)
    result = {"ms": round(1000 * statistics.median(times[-10:]), 2), "first_s": round(first, 1)}
    if on_gpu:
        result["gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    return result


def kernels(step: Step) -> dict[str, float]:
    """Kind -> milliseconds of a step's kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kinds: Counter[str] = Counter()
    for event in profile.key_averages():
        names = (kind for kind, words in _KINDS.items() if re.search(words, event.key, re.IGNORECASE))
        kinds[next(names, "other")] += event.self_device_time_total / 1000
    return {f"{kind}_ms": round(time, 1) for kind, time in kinds.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2]))
    end = time.monotonic() + args.seconds
    if args.device == "cpu":
        torch.set_num_threads(1)
    for name, compile_it, other, batch in LEVERS[:4:3] if args.smoke else LEVERS:
        result: dict[str, Any] = {"lever": name}
        if time.monotonic() > end - SECONDS / 2 and not args.smoke:
            result["skipped"] = "out of time"
        else:
            torch._dynamo.reset()
            if args.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                with other() if other else inductor():
                    step = Step(args.device, 2 if args.smoke else batch, smoke=args.smoke)
                    (plain if args.smoke else compile_it)(step)
                    result |= measured(step, smoke=args.smoke)
                    result |= kernels(step) if args.device == "cuda" else {}
            except Exception as error:  # each is tried
                result["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
