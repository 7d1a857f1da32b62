"""Images per second of each network, by batch size and by how it is run; and of decoders and letterboxes."""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import inference_decoder as decoder
import numpy as np
from inference_bench import Bench, encoded_photos, noise, per_second, prepared, vit_features


@dataclass
class Work:
    """A model as a function of (N, side, side, 3) uint8 images on the device."""

    name: str
    compute: Callable[[Any], tuple[Any, ...]]
    module: Any
    side: int
    dtype: Any


def _works(bench: Bench) -> Iterator[Work]:
    import torch

    from stages.models.detectors.scrfd_torch import ScrfdTorch
    from stages.models.face_embedders.arcface_torch import ArcFaceTorch
    from stages.models.segmenters.facexlib import label_batches
    from stages.models.torch_backend import IMAGENET

    yield Work("ViT-H/14", vit_features(bench.vit_half, bench.device, bench.half()), bench.vit_half, 224, bench.half())
    sizes = (64,) if bench.smoke else (640, 224)
    for path, name in ((bench.detector, bench.detector.stem), (bench.scrfd_10g, "SCRFD-10G")):
        for dtype, label in ((bench.half(), ""), (torch.float32, " tf32")):
            network = ScrfdTorch(path, bench.device, size=2, dtype=dtype)
            for side in sizes:
                yield Work(f"{name}@{side}{label}", network._decoded, network._module, side, dtype)
    arcface = ArcFaceTorch(bench.recogniser, bench.device, size=2, graphs=False)
    yield Work("ArcFace R50", arcface.batches._compute, arcface.module, 112, bench.half())
    parser = copy.deepcopy(bench.bisenet)
    batches = label_batches(parser, IMAGENET, bench.device, size=2)
    yield Work("BiSeNet@512", batches._compute, parser, 64 if bench.smoke else 512, bench.half())


def _flops(work: Work, device: str) -> float:
    """Of one image, multiplications and additions counted apart."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    given = torch.zeros((1, work.side, work.side, 3), dtype=torch.uint8, device=device)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work.compute(given)
    return float(counter.get_total_flops())


def throughput(bench: Bench) -> None:
    import torch

    if bench.on_gpu:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
        bench.peak = per_second(bench, lambda: a @ b, 2 * 8192**3)
        bench.record({"peak_tflops": round(bench.peak / 1e12), "device": torch.cuda.get_device_name()})
    for work in _works(bench):
        flops = _flops(work, bench.device)
        if bench.left() < 2:
            bench.record({"model": work.name, "skipped": "out of time"})
            continue
        for size in (2,) if bench.smoke else (8, 32, 128):
            row: dict[str, Any] = {"model": work.name, "batch": size, "gflop": round(flops / 1e9, 2)}
            for variant in ("eager", "channels_last", "graph", *(["tuned"] if size == 32 else [])):
                try:
                    call = _variant(bench, work, size, variant)
                    rate = per_second(bench, call, size)
                    row |= {f"{variant}_per_s": round(rate, 1), f"{variant}_share": round(rate * flops / bench.peak, 3)}
                    bench.rates[work.name, size] = max(rate, bench.rates.get((work.name, size), 0))
                except torch.cuda.OutOfMemoryError:
                    row[f"{variant}_per_s"] = "out of memory"
            bench.record(row)
        if bench.on_gpu:
            work.module.to(memory_format=torch.channels_last)
            torch.cuda.empty_cache()


def _variant(bench: Bench, work: Work, size: int, variant: str) -> Callable[[], Any]:
    """The computation alone, of images that are on the device: the product's, or the bare module on NCHW.

    `graph` is what the product does; `tuned` is the same after cudnn has tried its kernels.
    """
    import torch

    from stages.models.torch_backend import Batches

    if variant == "eager":
        work.module.to(memory_format=torch.contiguous_format)
        pixels = torch.randn((size, 3, work.side, work.side), device=bench.device, dtype=work.dtype)
        return lambda: work.module(pixels)
    if bench.on_gpu:
        work.module.to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = variant == "tuned"
    batches = Batches(work.compute, size, bench.device, graphs=variant != "channels_last")
    call = prepared(bench, work.name, batches, work.side)[2]
    torch.backends.cudnn.benchmark = False
    return call


def from_host(bench: Bench) -> None:
    """The same with all that the product does: images into pinned memory, onto the device, results back."""
    from stages.models.torch_backend import Batches

    for work in _works(bench):
        size = 2 if bench.smoke else 64
        batches = Batches(work.compute, size, bench.device)
        images = noise(8, work.side) * (size // 8 or 1)
        batches(images[:1])
        begin, count = time.perf_counter(), 0
        while count < 4 * size and (count == 0 or time.perf_counter() - begin < 0.5):
            results = batches(images)
            count += len(images)
        seconds = time.perf_counter() - begin
        bench.record(
            {
                "model": work.name,
                "batch": size,
                "per_s": round(count / seconds, 1),
                "bytes_back": size * sum(array.nbytes for array in results[0]),
            }
        )
        if bench.smoke and bench.left() < 3:
            return


def compiled(bench: Bench) -> None:
    """torch.compile of what has most elementwise work around its products, captured as a graph; its time counts."""
    import torch

    from stages.models.torch_backend import Batches

    if not bench.on_gpu:
        bench.record({"skipped": "without CUDA"})
        return
    size = 64
    wanted = ("ViT-H/14", f"{bench.detector.stem}@640", "BiSeNet@512", "ArcFace R50")
    works = {work.name: work for work in _works(bench)}
    for name in wanted:
        work = works[name]
        begin = time.monotonic()
        try:
            batches = Batches(work.compute, size, "cuda", compiled=True)
            with torch.inference_mode():
                _, _, call = batches._prepared((work.side, work.side, 3))
            seconds = time.monotonic() - begin
            rate = per_second(bench, call, size)
            plain = per_second(bench, _variant(bench, work, size, "graph"), size)
            bench.record(
                {
                    "model": name,
                    "batch": size,
                    "compile_s": round(seconds, 1),
                    "per_s": round(rate, 1),
                    "graph_per_s": round(plain, 1),
                }
            )
        except TimeoutError:
            raise
        except Exception as error:
            bench.record(
                {
                    "model": name,
                    "error": f"{type(error).__name__}: {str(error)[:300]}",
                    "after_s": round(time.monotonic() - begin, 1),
                }
            )


def decoding_on_cpu(bench: Bench) -> None:
    faces, bare = encoded_photos(bench)
    seconds, n = (0.3, 2) if bench.smoke else (1.5, os.cpu_count() or 1)
    start = time.time() + (2.0 if bench.smoke else 3.0)
    command = [sys.executable, decoder.__file__, "decode", str(seconds), str(start), str(faces[0].parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(n)]
    rates = [json.loads(process.communicate()[0]) for process in processes]
    size = np.mean([path.stat().st_size for path in (*faces, *bare)]) / 1000
    totals = {f"{name}_per_s": round(sum(rate[name] for rate in rates), 1) for name in rates[0]}
    bench.record({"cv2_processes": n, "kilobytes_per_photo": round(float(size)), **totals})


def decoding_on_gpu(bench: Bench) -> None:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    faces, bare = encoded_photos(bench)
    if not bench.on_gpu:
        bench.record({"skipped": "without CUDA"})
        return
    files = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in (*faces, *bare)]
    for size in (1, 16, 64):
        batch = (files * size)[:size]
        decode_jpeg(batch, mode=ImageReadMode.RGB, device="cuda")
        torch.cuda.synchronize()
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < 1.2:
            decode_jpeg(batch, mode=ImageReadMode.RGB, device="cuda")
            torch.cuda.synchronize()
            count += size
        bench.record(
            {"decoder": "torchvision on cuda", "batch": size, "per_s": round(count / (time.perf_counter() - begin), 1)}
        )
    ours = decode_jpeg(files[:4], mode=ImageReadMode.RGB, device="cuda")
    for path, image in list(zip((*faces, *bare), ours, strict=False))[:2]:
        theirs = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        difference = np.abs(image.permute(1, 2, 0).cpu().numpy().astype(int) - theirs)
        bench.record({"nvjpeg_to_cv2_mean": round(float(difference.mean()), 4), "max": int(difference.max())})


def letterboxes(bench: Bench) -> None:
    """The canvas of the first look: cv2 on the CPU, and torch on the device from a photo that is there."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    from stages.models.detectors.scrfd import _letterbox

    files, _ = encoded_photos(bench)
    photo = cv2.cvtColor(cv2.imread(str(files[0])), cv2.COLOR_BGR2RGB)
    begin, calls = time.perf_counter(), 5 if bench.smoke else 100
    for _ in range(calls):
        canvas = _letterbox(photo, 640).canvas
    on_cpu = calls / (time.perf_counter() - begin)
    given = torch.from_numpy(photo).to(bench.device).permute(2, 0, 1)[None]
    height = int(640 * photo.shape[0] / photo.shape[1])
    rows: dict[str, Any] = {"cv2_one_process_per_s": round(on_cpu, 1)}
    for antialias in (False, True):

        def resized(antialias: bool = antialias) -> Any:
            return (
                F.interpolate(given.float(), (height, 640), mode="bilinear", antialias=antialias).round().clamp(0, 255)
            )

        found = resized()[0].permute(1, 2, 0).cpu().numpy()
        difference = np.abs(found[:, :, ::-1] - canvas[:height].astype(np.float32))
        label = "antialias" if antialias else "bilinear"
        rows[f"torch_{label}_per_s"] = round(per_second(bench, resized, 1), 1)
        rows[f"torch_{label}_to_cv2_mean"] = round(float(difference.mean()), 4)
        rows[f"torch_{label}_to_cv2_max"] = float(difference.max())
    bench.record(rows)
