"""Inference on a GPU: are batches, float16 and torch the same as one by one, float32 and ONNX Runtime; how fast is each.

    python benchmarks/gpu/inference.py [--smoke] [--device cuda|cpu] [--pack DIR] [--photos DIR] [--limit SECONDS]

Models have the published sizes and random weights; with a pack of insightface its detector and recogniser are looked
at too. Every result is a line of JSON, printed when it is known. A step that fails says so, and the next one begins.
"""

import argparse
import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Listener, wait
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, ClassVar

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import cv2
import inference_decoder as decoder
import inference_models as models
import numpy as np

Record = Callable[[dict[str, Any]], None]
_DECODER = Path(decoder.__file__)
_PEAK = 790e12
"""Measured products of 8192^3 float16 matrices on an H100 or H200, FLOP/s; replaced by this device's own."""
_COMPARED = 60
"""Boxes per image that are compared: the best."""
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass
class Bench:
    """What all steps share."""

    device: str
    record: Record
    smoke: bool
    pack: Path | None
    photos: Path | None
    folder: Path
    deadline: float = 0.0
    peak: float = _PEAK
    rates: dict[tuple[str, int], float] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def half(self) -> Any:
        import torch

        return torch.float16 if self.on_gpu else torch.float32

    def sync(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    @functools.cached_property
    def scrfd_10g(self) -> Path:
        return models.scrfd(self.folder / "scrfd_10g.onnx", tiny=self.smoke)

    @functools.cached_property
    def detector(self) -> Path:
        """The pack's detector, or a random one."""
        found = sorted(self.pack.glob("det_*.onnx")) if self.pack else []
        return found[0] if found else self.scrfd_10g

    @functools.cached_property
    def recogniser(self) -> Path:
        return models.arcface(self.folder / "r50.onnx", tiny=self.smoke)

    @functools.cached_property
    def bisenet(self) -> Any:
        return models.bisenet()

    @functools.cached_property
    def vit(self) -> Any:
        """float32, on the device."""
        return models.vit_h(self.device, tiny=self.smoke)

    @functools.cached_property
    def vit_half(self) -> Any:
        return copy.deepcopy(self.vit).to(self.half())

    @functools.cached_property
    def pictures(self) -> list[tuple[str, Any]]:
        """Name and pixels, RGB, of the given photos."""
        files = sorted(path for path in self.photos.iterdir() if path.suffix in (".jpg", ".png")) if self.photos else []
        pixels = [(path.name, cv2.imread(str(path))) for path in files[: 4 if self.smoke else 40]]
        return [(name, cv2.cvtColor(image, cv2.COLOR_BGR2RGB)) for name, image in pixels if image is not None]


def run(
    device: str,
    record: Record,
    smoke: bool,
    pack: Path | None = None,
    photos: Path | None = None,
    limit_s: float = 150,
) -> None:
    """All steps, in order of importance, each within its own limit and all within `limit_s` seconds."""
    from stages.models.torch_backend import prepare

    prepare("cpu")
    begin = time.monotonic()
    steps: list[tuple[Callable[[Bench], None], float]] = [
        (sameness_detector, 30), (sameness_recogniser, 15), (sameness_tower, 25), (sameness_parser, 10),
        (pipeline, 50), (throughput, 60), (naive_loop, 16),
        (decoding_on_cpu, 9), (decoding_on_gpu, 9), (letterboxes, 6), (from_host, 10), (compiled, 45),
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


# --- (a) sameness


def _noise(count: int, side: int, seed: int = 0) -> list[Any]:
    """Smooth coloured pictures, (side, side, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = [rng.integers(0, 256, (max(side // 16, 2), max(side // 16, 2), 3), np.uint8) for _ in range(count)]
    return [cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC) for image in small]


def _cosines(a: Any, b: Any) -> Any:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def sameness_detector(bench: Bench) -> None:
    """Candidates on the device, in batches, against the CPU in float32 one by one, and against ONNX Runtime."""
    import torch

    from stages.models.detectors.scrfd import Scrfd, _letterbox
    from stages.models.detectors.scrfd_torch import ScrfdTorch

    torch.set_num_threads(os.cpu_count() or 1)
    pictures = bench.pictures or [(str(i), image) for i, image in enumerate(_noise(8, 512))]
    photos = [image for _, image in pictures]
    size, side = (2, 320) if bench.smoke else (32, 640)
    scrfd = _scrfd(ScrfdTorch(bench.detector, "cpu"), side)
    reference = scrfd.detect_all(photos)
    canvases = [_letterbox(image, side).canvas for image in photos]
    lowest = 0.02 if bench.detector == bench.scrfd_10g else Scrfd.lowest
    plain = ScrfdTorch(bench.detector, "cpu")(canvases, lowest)
    name = bench.detector.stem
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(bench.detector), providers=["CPUExecutionProvider"])
        theirs = ScrfdTorch(bench.detector, "cpu")
        given = session.get_inputs()[0].name
        theirs._module = lambda pixels: [torch.from_numpy(out)[None] for out in session.run(None, {given: pixels.numpy()})]
        bench.record({"model": name, "a": "cpu float32 one by one", "b": "onnxruntime", **_apart(plain, theirs(canvases, lowest))})
    except ImportError as error:
        bench.record({"model": name, "b": "onnxruntime", "error": str(error)})
    kinds = [("float16", torch.float16, False), ("float32", torch.float32, False), ("tf32", torch.float32, True)]
    for label, dtype, tf32 in kinds if bench.on_gpu else kinds[1:2]:
        torch.backends.cudnn.allow_tf32 = tf32
        network = ScrfdTorch(bench.detector, bench.device, size=size, dtype=dtype)
        together = network(canvases, lowest)
        alone = [network([canvas], lowest)[0] for canvas in canvases[:6]]
        one = ScrfdTorch(bench.detector, bench.device, size=1, dtype=dtype, graphs=False)
        single = one(canvases, lowest)
        values = {"model": name, "a": f"{bench.device} {label} batch {size}", "photos": len(photos)}
        bench.record({**values, "b": "cpu float32 one by one, in pixels of the canvas", **_apart(together, plain)})
        bench.record({**values, "b": "same batch, one image", **_apart(together[:6], alone)})
        bench.record({**values, "b": "batch of 1, eager", **_apart(together, single)})
        three = _scrfd(network, side).detect_all(photos)
        bench.record({**values, "b": "cpu float32, three looks, in pixels of the photo", **_apart(three, reference, 0.5)})
    torch.backends.cudnn.allow_tf32 = True
    torch.set_num_threads(1)


def _scrfd(network: Any, side: int) -> Any:
    """Product code's three looks with a given network."""
    from stages.models.detectors.scrfd import Scrfd

    scrfd = Scrfd.__new__(Scrfd)
    scrfd._model, scrfd._size, scrfd._threshold = network, side, 0.5
    scrfd._screen_size = side * 3 // 10 // 32 * 32
    return scrfd


def _apart(found: Sequence[Any], expected: Sequence[Any], least: float = 0.0) -> dict[str, Any]:
    """How far boxes, points and scores are from the nearest expected ones, at most and in the median."""
    boxes, points, scores, counts, certain = [], [], [], 0, 0
    for ours, theirs in zip(found, expected, strict=True):
        our_scores, our_boxes, our_points = _parts(ours)
        their_scores, their_boxes, their_points = _parts(theirs)
        counts += len(our_scores) != len(their_scores)
        certain += int((our_scores >= 0.5).sum()) != int((their_scores >= 0.5).sum())
        best = [i for i in np.argsort(-our_scores, kind="stable")[:_COMPARED] if our_scores[i] >= least]
        for i in best if len(their_scores) else ():
            distances = np.abs(their_boxes - our_boxes[i]).max(axis=1) + np.abs(their_points - our_points[i]).max(axis=(1, 2))
            j = int(distances.argmin())
            boxes.append(float(np.abs(their_boxes[j] - our_boxes[i]).max()))
            points.append(float(np.abs(their_points[j] - our_points[i]).max()))
            scores.append(float(abs(their_scores[j] - our_scores[i])))
    row: dict[str, Any] = {"boxes": len(boxes), "images_with_other_counts": counts, "images_with_other_certain": certain}
    for name, values in (("box", boxes), ("kps", points), ("score", scores)):
        row |= {f"{name}_max": round(max(values, default=0), 5), f"{name}_median": round(float(np.median(values or [0])), 6)}
    return row


def _parts(faces: Any) -> tuple[Any, Any, Any]:
    """Scores, boxes, points of Faces or Candidates."""
    return (faces.score, faces.bbox, faces.kps) if hasattr(faces, "kps") else (faces.scores, faces.boxes, faces.points)


def sameness_recogniser(bench: Bench) -> None:
    import torch

    from stages.models.face_embedders.arcface_torch import ArcFaceTorch

    files = [(bench.recogniser, "random IResNet50")]
    files += [(path, path.stem) for path in (sorted(bench.pack.glob("w600k*.onnx")) if bench.pack else [])]
    faces = np.stack(_noise(6 if bench.smoke else 24, 112))
    torch.set_num_threads(os.cpu_count() or 1)
    for path, name in files:
        expected = ArcFaceTorch(path, "cpu").embed(faces)
        found = ArcFaceTorch(path, bench.device, size=4 if bench.smoke else 64)
        together = found.embed(faces)
        alone = np.concatenate([found.embed(face[None]) for face in faces[:4]])
        row = {"model": name, "a": f"{bench.device} batch", "cosine_min_to_cpu_float32": _least(together, expected)}
        row |= {"same_batch_one_image_max": float(np.abs(together[:4] - alone).max())}
        eager = ArcFaceTorch(path, bench.device, size=1, graphs=False).embed(faces)
        row |= {"cosine_min_to_batch_of_1": _least(together, eager)}
        try:
            import onnxruntime

            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            pixels = (faces.transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 127.5
            theirs = [session.run(None, {session.get_inputs()[0].name: one[None]})[0][0] for one in pixels]
            row |= {"cosine_min_to_onnxruntime": _least(together, theirs), "cpu_torch_to_onnxruntime": _least(expected, theirs)}
        except ImportError as error:
            row |= {"onnxruntime": str(error)}
        bench.record(row)
    torch.set_num_threads(1)


def _least(a: Any, b: Any) -> float:
    return round(float(_cosines(a, b).min()), 7)


def _vit_features(model: Any, device: str, dtype: Any) -> Callable[[Any], tuple[Any, ...]]:
    """As ClipVitH: projected, and penultimate hidden states."""
    from stages.models.torch_backend import normaliser

    normalise = normaliser(*_CLIP, device, dtype)

    def features(images: Any) -> tuple[Any, ...]:
        out = model(pixel_values=normalise(images), output_hidden_states=True)
        return out.image_embeds, out.hidden_states[-2]

    return features


def sameness_tower(bench: Bench) -> None:
    import torch

    from stages.models.torch_backend import Batches

    images = _noise(4, 224)
    torch.set_num_threads(os.cpu_count() or 1)
    begin = time.monotonic()
    on_cpu = copy.deepcopy(bench.vit).cpu().float()
    bench.record({"model": "ViT-H/14", "copied_to_cpu_s": round(time.monotonic() - begin, 2)})
    with torch.inference_mode():
        expected = [each.numpy() for each in _vit_features(on_cpu, "cpu", torch.float32)(torch.from_numpy(np.stack(images[:2])))]
    del on_cpu
    torch.set_num_threads(1)
    size = 4 if bench.smoke else 32
    for dtype in (torch.float16, torch.bfloat16) if bench.on_gpu else (torch.float32,):
        model = bench.vit_half if dtype == bench.half() else copy.deepcopy(bench.vit).to(dtype)
        batches = Batches(_vit_features(model, bench.device, dtype), size, bench.device)
        together = [[part.float().cpu().numpy() for part in parts] for parts in batches(images)][0]
        alone = [[part.float().cpu().numpy() for part in parts] for parts in batches(images[1:2])][0]
        row = {"model": "ViT-H/14", "a": f"{bench.device} {dtype} batch {size}"}
        for i, name in enumerate(("clip", "clip_hidden")):
            row[f"{name}_cosine_min_to_cpu_float32"] = _least(together[i][:2], expected[i])
            row[f"{name}_same_batch_one_image_max"] = float(np.abs(together[i][1] - alone[i][0]).max())
        bench.record(row)


def sameness_parser(bench: Bench) -> None:
    import torch

    from stages.models.segmenters.facexlib import label_batches
    from stages.models.torch_backend import IMAGENET

    side = 128 if bench.smoke else 512
    images = _noise(3, side)
    expected = np.stack([labels.numpy()[0] for (labels,) in label_batches(bench.bisenet, IMAGENET, "cpu")(images)])
    batches = label_batches(copy.deepcopy(bench.bisenet), IMAGENET, bench.device, size=3 if bench.smoke else 16)
    together = next(iter(batches(images)))[0].cpu().numpy()
    alone = next(iter(batches(images[2:])))[0].cpu().numpy()
    row = {"model": "BiSeNet, random", "labels": len(np.unique(expected)), "same_labels_as_cpu_float32": float((together == expected).mean())}
    bench.record({**row, "same_labels_as_one_image": float((together[2] == alone[0]).mean())})
    torch.set_num_threads(1)


def _prepared(bench: Bench, name: str, batches: Any, side: int) -> tuple[Any, Any, Callable[[], Any]]:
    """The pinned images, the images on the device, and what computes with them; eager where no graph can be captured."""
    import torch

    with torch.inference_mode():
        try:
            return batches._prepared((side, side, 3))
        except RuntimeError as error:
            bench.record({"model": name, "no_graph": f"{type(error).__name__}: {str(error)[:300]}"})
            bench.sync()
            batches._graphs = False
            batches._of_shape.clear()
            return batches._prepared((side, side, 3))


# --- (b) throughput


@dataclass
class Work:
    """A model as a function of (N, side, side, 3) uint8 images on the device."""

    name: str
    compute: Callable[[Any], tuple[Any, ...]]
    module: Any
    side: int


def _works(bench: Bench) -> Iterator[Work]:
    from stages.models.detectors.scrfd_torch import ScrfdTorch
    from stages.models.face_embedders.arcface_torch import ArcFaceTorch
    from stages.models.segmenters.facexlib import label_batches
    from stages.models.torch_backend import IMAGENET

    yield Work("ViT-H/14", _vit_features(bench.vit_half, bench.device, bench.half()), bench.vit_half, 224)
    sizes = (64,) if bench.smoke else (640, 224)
    for path, name in ((bench.detector, bench.detector.stem), (bench.scrfd_10g, "SCRFD-10G")):
        network = ScrfdTorch(path, bench.device, size=2)
        for side in sizes:
            yield Work(f"{name}@{side}", network._decoded, network._module, side)
    arcface = ArcFaceTorch(bench.recogniser, bench.device, size=2, graphs=False)
    yield Work("ArcFace R50", arcface.batches._compute, arcface.module, 112)
    parser = copy.deepcopy(bench.bisenet)
    batches = label_batches(parser, IMAGENET, bench.device, size=2)
    yield Work("BiSeNet@512", batches._compute, parser, 64 if bench.smoke else 512)


def _flops(work: Work, device: str) -> float:
    """Of one image, multiplications and additions counted apart."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    given = torch.zeros((1, work.side, work.side, 3), dtype=torch.uint8, device=device)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work.compute(given)
    return float(counter.get_total_flops())


def _per_second(bench: Bench, call: Callable[[], Any], images: int, seconds: float = 0.25) -> float:
    """Images/s of a call that computes `images`; by CUDA events after three calls that do not count."""
    import torch

    with torch.inference_mode():
        if not bench.on_gpu:
            begin = time.perf_counter()
            call()
            return images / (time.perf_counter() - begin)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        begin, calls = time.perf_counter(), 0
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        while time.perf_counter() - begin < seconds and calls < 400:
            call()
            calls += 1
            if calls % 4 == 0:
                torch.cuda.current_stream().synchronize()
        end.record()
        torch.cuda.synchronize()
        return images * calls / (start.elapsed_time(end) / 1e3)


def throughput(bench: Bench) -> None:
    import torch

    from stages.models.torch_backend import Batches

    if bench.on_gpu:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
        bench.peak = _per_second(bench, lambda: a @ b, 2 * 8192**3)
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
                    rate = _per_second(bench, call, size)
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
        pixels = torch.randn((size, 3, work.side, work.side), device=bench.device, dtype=bench.half())
        return lambda: work.module(pixels)
    if bench.on_gpu:
        work.module.to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = variant == "tuned"
    batches = Batches(work.compute, size, bench.device, graphs=variant != "channels_last")
    call = _prepared(bench, work.name, batches, work.side)[2]
    torch.backends.cudnn.benchmark = False
    return call


def from_host(bench: Bench) -> None:
    """The same with all that the product does: images into pinned memory, onto the device, results back."""
    from stages.models.torch_backend import Batches, to_host

    for work in _works(bench):
        size = 2 if bench.smoke else 64
        batches = Batches(work.compute, size, bench.device)
        images = _noise(8, work.side) * (size // 8 or 1)
        next(iter(batches(images[:1])))
        begin, count = time.perf_counter(), 0
        while count < 4 * size and (count == 0 or time.perf_counter() - begin < 0.5):
            for outputs in batches(images):
                results = [to_host(output) for output in outputs] if work.side != 640 else [to_host(outputs[0][..., 0])]
            count += len(images)
        seconds = time.perf_counter() - begin
        bench.record({"model": work.name, "batch": size, "per_s": round(count / seconds, 1), "bytes_back": sum(r.nbytes for r in results)})
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
            batches = Batches(torch.compile(work.compute, dynamic=False), size, "cuda")
            with torch.inference_mode():
                _, _, call = batches._prepared((work.side, work.side, 3))
            seconds = time.monotonic() - begin
            rate = _per_second(bench, call, size)
            plain = _per_second(bench, _variant(bench, work, size, "graph"), size)
            bench.record({"model": name, "batch": size, "compile_s": round(seconds, 1), "per_s": round(rate, 1), "graph_per_s": round(plain, 1)})
        except TimeoutError:
            raise
        except Exception as error:
            bench.record({"model": name, "error": f"{type(error).__name__}: {str(error)[:300]}", "after_s": round(time.monotonic() - begin, 1)})


# --- (c) decoding


def _encoded(bench: Bench) -> tuple[list[Path], list[Path]]:
    """JPEGs of 1600 x 1200, with one face and without: from the given photos, or drawn."""
    folder = bench.folder / "photos"
    if not folder.exists():
        folder.mkdir()
        size = (400, 300) if bench.smoke else (1600, 1200)
        faces, bare = _sorted_pictures(bench)
        rng = np.random.default_rng(0)
        grain = rng.normal(0, 5, (size[1], size[0], 3)).astype(np.float32)
        for kind, images in (("face", faces), ("bare", bare)):
            for i, image in enumerate(images):
                height, width = image.shape[:2]
                share = min(size[0] / width, size[1] / height)
                whole = cv2.resize(image, size).astype(np.float32) * 0  # black where the photo does not reach
                scaled = cv2.resize(image, (int(width * share), int(height * share)), interpolation=cv2.INTER_CUBIC)
                whole[: scaled.shape[0], : scaled.shape[1]] = scaled
                pixels = np.clip(whole + grain, 0, 255).astype(np.uint8)[:, :, ::-1]
                cv2.imwrite(str(folder / f"{kind}{i:03}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return sorted(folder.glob("face*.jpg")), sorted(folder.glob("bare*.jpg"))


def _sorted_pictures(bench: Bench) -> tuple[list[Any], list[Any]]:
    """Pictures with one face and pictures without, by the pack's detector where there is one."""
    from stages.models.detectors.scrfd_torch import ScrfdTorch

    drawn = _noise(2 if bench.smoke else 12, 512, seed=1)
    faces, bare = [], []
    if bench.pictures and bench.pack:
        scrfd = _scrfd(ScrfdTorch(bench.detector, bench.device), 640)
        images = [image for _, image in bench.pictures]
        for image, found in zip(images, scrfd.detect_all(images), strict=True):
            count = int((found.score >= 0.5).sum())
            if count == 1:
                faces.append(image)
            elif len(found.score) == 0:
                bare.append(image)
    return faces or drawn[: len(drawn) // 2], [*bare, *drawn[len(drawn) // 2 :]]


def decoding_on_cpu(bench: Bench) -> None:
    faces, bare = _encoded(bench)
    seconds, n = (0.3, 2) if bench.smoke else (1.5, os.cpu_count() or 1)
    start = time.time() + (2.0 if bench.smoke else 3.0)
    command = [sys.executable, str(_DECODER), "decode", str(seconds), str(start), str(faces[0].parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(n)]
    rates = [json.loads(process.communicate()[0]) for process in processes]
    size = np.mean([path.stat().st_size for path in (*faces, *bare)]) / 1000
    totals = {f"{name}_per_s": round(sum(rate[name] for rate in rates), 1) for name in rates[0]}
    bench.record({"cv2_processes": n, "kilobytes_per_photo": round(float(size)), **totals})


def decoding_on_gpu(bench: Bench) -> None:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    faces, bare = _encoded(bench)
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
        bench.record({"decoder": "torchvision on cuda", "batch": size, "per_s": round(count / (time.perf_counter() - begin), 1)})
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

    files, _ = _encoded(bench)
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
            return F.interpolate(given.float(), (height, 640), mode="bilinear", antialias=antialias).round().clamp(0, 255)

        found = resized()[0].permute(1, 2, 0).cpu().numpy()
        difference = np.abs(found[:, :, ::-1] - canvas[:height].astype(np.float32))
        label = "antialias" if antialias else "bilinear"
        rows |= {f"torch_{label}_per_s": round(_per_second(bench, resized, 1), 1), f"torch_{label}_to_cv2_mean": round(float(difference.mean()), 4),
                 f"torch_{label}_to_cv2_max": float(difference.max())}  # fmt: skip
    bench.record(rows)


# --- (d) from bytes to embeddings


class Network:
    """One of the pipeline's networks on a thread and a stream of its own: requests that wait together are a batch."""

    outputs: ClassVar = {"parse": ["labels"], "identity": ["vector"], "tower": ["clip", "hidden"]}

    def __init__(self, bench: Bench, kind: str, side: int, batches: Any, look: Callable[..., Any] | None = None) -> None:
        self.kind, self.batches, self._look, self._bench = kind, batches, look, bench
        self.requests: SimpleQueue[Any] = SimpleQueue()
        self.images = self.launches = 0
        self.host_seconds = 0.0
        self.error: BaseException | None = None
        host, given, compute = _prepared(bench, kind, batches, side)

        def call() -> None:
            given.copy_(host, non_blocking=True)
            compute()

        self.launch_seconds = 1 / _per_second(bench, call, 1, 0.15)
        self._thread = Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        """Answer requests (link, lock, rows) until None comes."""
        import torch

        try:
            with torch.cuda.stream(torch.cuda.Stream()) if self._bench.on_gpu else nullcontext():
                while request := self.requests.get():
                    requests = [request]
                    while sum(len(rows) for _, _, rows in requests) < self.batches.size and not self.requests.empty():
                        if more := self.requests.get():
                            requests.append(more)
                    begin = time.perf_counter()
                    answers = iter(self._answers([row for _, _, rows in requests for row in rows]))
                    for link, lock, rows in requests:
                        with lock:
                            link.send((self.kind, [next(answers) for _ in rows]))
                    self.host_seconds += time.perf_counter() - begin
        except BaseException as error:
            self.error = error

    def _answers(self, rows: Sequence[Any]) -> list[Any]:
        from stages.models.torch_backend import to_host

        self.images += len(rows)
        self.launches += -(-len(rows) // self.batches.size)
        images = [row[self.kind] for row in rows]
        if self._look:
            return [tuple(found) for found in self._look(images, 0.2)]
        answers: list[Any] = []
        for outputs in self.batches(images):
            values = [to_host(output) for output in outputs]
            for i in range(len(values[0])):
                for name, value in zip(self.outputs.get(self.kind, []), values, strict=False):
                    rows[len(answers)][name][:] = value[i]
                answers.append(float(values[0][i]) if self.kind == "screen" else True)
        return answers


def _networks(bench: Bench, look: int, parse: int) -> dict[str, Network]:
    from stages.models.detectors.scrfd_torch import ScrfdTorch
    from stages.models.face_embedders.arcface_torch import ArcFaceTorch
    from stages.models.segmenters.facexlib import label_batches
    from stages.models.torch_backend import IMAGENET, Batches

    size = 2 if bench.smoke else 32
    detector = ScrfdTorch(bench.detector, bench.device, size=size)
    tower = _vit_features(bench.vit_half, bench.device, bench.half())

    def screen(images: Any) -> tuple[Any]:
        return (detector._decoded(images)[0][..., 0].amax(1),)

    return {
        kind: Network(bench, kind, side, batches, detector if kind.startswith("look") else None)
        for kind, side, batches in (
            ("screen", decoder.SCREEN, Batches(screen, 2 * size, bench.device)),
            (f"look{look}", look, detector.batches),
            (f"look{decoder.BORDER}", decoder.BORDER, detector.batches),
            ("parse", parse, label_batches(copy.deepcopy(bench.bisenet), IMAGENET, bench.device, size=size // 2)),
            ("identity", 112, ArcFaceTorch(bench.recogniser, bench.device, size=size).batches),
            ("tower", 224, Batches(tower, size, bench.device)),
        )
    }


def pipeline(bench: Bench) -> None:
    """One process with the GPU, which makes batches of the requests of many that decode: 88 % and 0 % without a face."""
    look, parse = (128, 64) if bench.smoke else (640, 512)
    n, chunk = (2, 2) if bench.smoke else (2 * (os.cpu_count() or 1), 12)
    hidden, clip = (257, bench.vit.config.hidden_size), bench.vit.config.projection_dim
    dtype = decoder.rows_of(look, parse, hidden, clip)
    needed = 2 * n * chunk * dtype.itemsize
    shared = Path("/dev/shm")
    fits = shared.is_dir() and shutil.disk_usage(shared).free > needed
    memory = Path(tempfile.mkdtemp(dir=shared if fits else bench.folder))
    options = {"look": look, "parse": parse, "hidden": hidden, "clip": clip, "chunk": chunk, "address": str(memory / "socket")}
    processes: list[Any] = []
    rows: dict[Any, Any] = {}
    try:
        with Listener(options["address"], family="AF_UNIX", backlog=n) as listener:
            for i in range(n):
                (memory / f"rows{i}").write_bytes(b"")
                os.truncate(memory / f"rows{i}", chunk * dtype.itemsize)
                job = json.dumps({**options, "memory": str(memory / f"rows{i}"), "index": i})
                command = [sys.executable, str(_DECODER), "serve", job]
                processes.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
            networks = _networks(bench, look, parse)
            bench.record({"batch_ms": {kind: round(1e3 * each.launch_seconds, 3) for kind, each in networks.items()},
                          "batch": {kind: each.batches.size for kind, each in networks.items()}, "shared_memory": fits})  # fmt: skip
            mixes = {faceless: _mixed(bench, faceless) for faceless in (0.88, 0.0)}
            listener._listener._socket.settimeout(20)  # type: ignore[attr-defined]
            for _ in processes:
                link = listener.accept()
                rows[link] = np.memmap(memory / f"rows{link.recv()[1]}", dtype, "r+", shape=(chunk,))
        for faceless, files in mixes.items():
            forced = not (bench.pack and bench.pictures)
            row = {"faceless": faceless, "forced": forced, "processes": n, "photos_per_process": chunk}
            jobs = [{"forced": forced, "first": i * len(files) // n, "photos": files} for i in range(n)]
            settle, seconds = (0.5, 2.0) if bench.smoke else (1.5, 5.0)
            bench.record({**row, **_served(networks, rows, jobs, settle, seconds)})
        for network in networks.values():
            network.requests.put(None)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(memory, ignore_errors=True)


def _served(networks: dict[str, Network], rows: dict[Any, Any], jobs: Sequence[Any], settle: float, seconds: float) -> dict[str, Any]:
    """Pass the requests of the processes on for so many seconds after the first ones; what was done meanwhile."""
    links = {link: Lock() for link in rows}
    for link, job in zip(rows, jobs, strict=True):
        link.send(job)
    done, begin, before = 0, time.perf_counter(), {}
    counted, busy, asked = begin, [], begin
    while (now := time.perf_counter()) < begin + settle + seconds:
        if not before and now >= begin + settle:
            counted, done = now, 0
            before = {kind: (each.images, each.launches, each.host_seconds) for kind, each in networks.items()}
        for link in wait(list(links), timeout=0.05):
            kind, count = link.recv()
            if kind == "done":
                done += count
            else:
                networks[kind].requests.put((link, links[link], [rows[link][i] for i in range(count)]))
        if before and now > asked + 0.2:
            busy, asked = busy + _utilisation(), now
        for network in networks.values():
            if network.error:
                raise network.error
    elapsed = time.perf_counter() - counted
    changes = {kind: (each.images - before[kind][0], each.launches - before[kind][1], each.host_seconds - before[kind][2])
               for kind, each in networks.items()}  # fmt: skip
    stats = _ended(links)
    shares = {kind: round(launches * networks[kind].launch_seconds / elapsed, 3) for kind, (_, launches, _) in changes.items()}
    return {
        "photos_per_s": round(done / elapsed, 1),
        "gpu_busy_share": round(sum(shares.values()), 3),
        "gpu_share_by_kind": shares,
        "nvml_utilisation": round(float(np.mean(busy)), 1) if busy else None,
        "thread_share_by_kind": {kind: round(host / elapsed, 3) for kind, (_, _, host) in changes.items()},
        "images_by_kind": {kind: images for kind, (images, _, _) in changes.items()},
        "images_per_batch": {kind: round(images / max(launches, 1), 1) for kind, (images, launches, _) in changes.items()},
        **{part: {name: round(sum(each[part][name] for each in stats), 2) for name in stats[0][part]} for part in ("counts", "seconds")},
    }  # fmt: skip


def _utilisation() -> list[float]:
    """Share of the last moments in which the GPU computed, percent, by its driver; none where that is not to be had."""
    import torch

    try:
        return [float(torch.cuda.utilization())] if torch.cuda.is_available() else []
    except Exception:  # no driver library, or no right to ask
        return []


def _ended(links: dict[Any, Any]) -> list[Any]:
    """End the jobs: every request is answered with nothing; what the processes then say of them."""
    stats, open_links, end = [], set(links), time.monotonic() + 10
    while open_links and time.monotonic() < end:
        for link in wait(list(open_links), timeout=0.2):
            kind, content = link.recv()
            if kind == "stats":
                stats.append(content)
                open_links.remove(link)
            elif kind != "done":
                with links[link]:
                    link.send((kind, None))
    return stats


def _mixed(bench: Bench, faceless: float, count: int = 100) -> list[str]:
    """Files in a mix that is even over any stretch."""
    faces, bare = _encoded(bench)
    picked, with_face = [], 0
    for i in range(count):
        if with_face < (i + 1) * (1 - faceless) - 1e-6:
            picked.append(str(faces[with_face % len(faces)]))
            with_face += 1
        else:
            picked.append(str(bare[(i - with_face) % len(bare)]))
    return picked


def naive_loop(bench: Bench) -> None:
    """insightface's ten lines, in torch on the same device: one process, one photo at a time, eager."""
    import torch

    from stages.models.detectors.scrfd import _letterbox
    from stages.models.detectors.scrfd_torch import ScrfdTorch
    from stages.models.face_embedders.arcface_torch import ArcFaceTorch
    from stages.models.torch_backend import Batches
    from stages.pixels import geometry

    decoder.similarity_of_old_skimage()
    detector = ScrfdTorch(bench.detector, bench.device, size=1, dtype=torch.float32, graphs=False)
    recogniser = ArcFaceTorch(bench.recogniser, bench.device, size=1, dtype=torch.float32, graphs=False)
    tower = Batches(_vit_features(bench.vit_half, bench.device, bench.half()), 1, bench.device, graphs=False)
    side = 128 if bench.smoke else 640

    def one(path: str) -> None:
        image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
        view = _letterbox(image, side)
        (found,) = detector([view.canvas], 0.5)
        if "face" not in Path(path).name:
            return
        kps = found.points[int(found.scores.argmax())] / view.scale if len(found.scores) else geometry.FFHQ_TEMPLATE
        recogniser.embed(geometry.norm_crop(image, kps, 112)[None])
        for outputs in tower([geometry.norm_crop(image, kps, 224)]):
            [output.float().cpu().numpy() for output in outputs]

    for faceless in (0.88, 0.0):
        files = _mixed(bench, faceless)
        for path in (files[0], files[-1]):
            one(path)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < (0.5 if bench.smoke else 4.0):
            one(files[count % len(files)])
            count += 1
        bench.record({"faceless": faceless, "photos_per_s": round(count / (time.perf_counter() - begin), 2)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models and few photos")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--pack", type=Path, help="folder of an insightface pack")
    parser.add_argument("--photos", type=Path, help="folder of photos")
    parser.add_argument("--limit", type=float, default=150, help="seconds")
    given = parser.parse_args()
    import torch

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run(device, lambda values: print(json.dumps(values), flush=True), given.smoke, given.pack, given.photos, given.limit)


if __name__ == "__main__":
    main()
