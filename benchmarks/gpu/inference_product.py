"""The product's stages from encoded bytes to embeddings, as its worker with a GPU runs them; its networks alone."""

import copy
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
from inference_bench import Bench, mixed_photos, noise

_STAGES = ("screen", "detect", "filter", "align", "segment", "crop", "embed_face", "embed_image")
_ROWS, _THREADS_PER_CPU = 32, 2
"""As `Plan.batch_rows` and `Plan.pool` have them on a GPU."""


def sameness(bench: Bench) -> None:
    """Batches against single images, and a pack's files against ONNX Runtime, by the proofs of the product's start."""
    from stages.models.detectors.scrfd import Scrfd, _letterbox, _proof_photos
    from stages.models.face_embedders.arcface import _proof_faces

    networks = bench.networks
    if bench.pack:  # random weights give boxes of any size
        canvases = [_letterbox(photo, 640).canvas for photo in _proof_photos()]
        networks.detector.require_same(canvases, Scrfd.lowest)
    networks.recogniser.require_same(_proof_faces())
    networks.parser._require_batches_equal_singles()
    networks.tower._require_batches_equal_singles()
    bench.record({"proofs": "passed", "detector": bench.detector.stem if bench.pack else "not proved: random weights"})


def networks(bench: Bench) -> None:
    """Images per second of each network, from the host's memory and back, in the product's batches."""
    import torch

    from stages.models.torch_backend import Batches

    made = bench.networks
    planar = copy.copy(made.detector)  # channels first, which may be faster for it
    planar._module = copy.deepcopy(planar._module).to(memory_format=torch.contiguous_format)
    planar._normalise = lambda images: made.detector._normalise(images).contiguous()
    planar.batches = Batches(
        planar._decoded, made.detector.batches.size, bench.device, read=made.detector.batches._read
    )
    large, screen, parsed = (128, 64, 64) if bench.smoke else (640, 224, 512)
    for name, batches, side, *options in (
        ("tower", made.tower._batches, 224),
        (f"detector, {large} px", made.detector.batches, large, 0.2),
        (f"detector, {screen} px", made.detector.batches, screen, 0.2),
        (f"detector, {large} px, channels first", planar.batches, large, 0.2),
        (f"detector, {screen} px, channels first", planar.batches, screen, 0.2),
        ("recogniser", made.recogniser.batches, 112),
        ("parser", made.parser._batches, parsed),
    ):
        images = noise(8, side) * max(1, batches.size // 8)
        per_s = _per_second(bench, batches, images, *options)
        bench.record({"network": name, "batch": batches.size, "per_s": per_s})


def _per_second(bench: Bench, compute: Callable[..., Any], given: list[Any], *options: Any) -> float:
    """How many of what is given are computed in a second, over one second, or once in small."""
    compute(given[:1], *options)
    begin, count = time.perf_counter(), 0
    while count == 0 or (time.perf_counter() - begin < 1 and not bench.smoke):
        compute(given, *options)
        count += len(given)
    return round(count / (time.perf_counter() - begin), 1)


def encoders(bench: Bench) -> None:
    """What `dataset --with latents,text` adds to each kept photo: pictures and captions per second of each base."""
    import train_made

    from pipeline.shared.bases import find_base
    from schemas.targets import BaseKind
    from stages.models.encoders import TextEncoder, Vae
    from stages.runtime import EncoderSource

    cases: tuple[tuple[BaseKind, int], ...] = (("sd15", 512), ("sdxl", 1024))
    for kind, resolution in cases:
        folder, side = bench.folder / kind, 64 if bench.smoke else resolution
        if bench.smoke:
            folder = find_base("tiny", sdxl=kind == "sdxl").folder
        else:
            train_made.write_encoders(folder, kind)
        source = EncoderSource(kind, str(folder), kind, "", "")
        captions = [f"a photo of face {number}" for number in range(2 if bench.smoke else 64)]
        for name, encode, given in (
            (f"{kind} VAE, {side} px", Vae(source, bench.device).encode, noise(8, side)),
            (f"{kind} text", TextEncoder(source, bench.device).encode, captions),
        ):
            bench.record({"encoder": name, "per_s": _per_second(bench, encode, given)})
        shutil.rmtree(bench.folder / kind, ignore_errors=True)


def naive_loop(bench: Bench) -> None:
    """insightface's ten lines, in torch on the same device: one process, one photo at a time, eager."""
    import torch

    from stages.models.detectors.scrfd import _letterbox
    from stages.models.detectors.scrfd_torch import ScrfdTorch
    from stages.models.face_embedders.arcface_torch import ArcFaceTorch
    from stages.pixels import geometry

    similarity_of_old_skimage()
    alone: dict[str, Any] = {"size": 1, "dtype": torch.float32, "graphs": False}
    detector = ScrfdTorch(bench.detector, bench.device, **alone)
    recogniser = ArcFaceTorch(bench.recogniser, bench.device, **alone)
    tower = bench.networks.tower.batches(bench.device, 1, graphs=False)
    side = 128 if bench.smoke else 640

    def one(path: str) -> None:
        image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
        view = _letterbox(image, side)
        (look,) = detector([view.canvas], 0.5)
        if "face" not in Path(path).name:
            return
        kps = look.points[int(look.scores.argmax())] / view.scale if len(look.scores) else geometry.FFHQ_TEMPLATE
        recogniser.embed(geometry.norm_crop(image, kps, 112)[None])
        tower([geometry.norm_crop(image, kps, 224)])

    for faceless in (0.88, 0.0):
        files = mixed_photos(bench, faceless)
        for path in (files[0], files[-1]):
            one(path)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < (0.5 if bench.smoke else 4.0):
            one(files[count % len(files)])
            count += 1
        bench.record({"faceless": faceless, "photos_per_s": round(count / (time.perf_counter() - begin), 2)})


def similarity_of_old_skimage() -> None:
    """Product code needs scikit-image 0.26; where an older one is, its own name for the same is used."""
    from skimage.transform import SimilarityTransform

    if not hasattr(SimilarityTransform, "from_estimate"):

        def from_estimate(source: Any, target: Any) -> Any:
            transform = SimilarityTransform()
            transform.estimate(source, target)
            return transform

        SimilarityTransform.from_estimate = from_estimate


def product(bench: Bench) -> None:
    """Threads that share the models, a decoding process each: 88 % and 0 % without a face."""
    if not (bench.smoke or (bench.pack and bench.pictures)):
        bench.record({"skipped": "needs --pack and --photos: screen and detector are to see faces"})
        return
    similarity_of_old_skimage()
    from pipeline.dataset.execute.runner import apply_all
    from stages.pixels import images

    rows = 4 if bench.smoke else _ROWS
    threads = 2 if bench.smoke else _THREADS_PER_CPU * (os.cpu_count() or 1)
    settle, seconds = (0.0, 3.0) if bench.smoke else (6.0, 10.0)  # children start, graphs are captured
    steps, counted = _steps(bench, rows)
    images.set_decoding(threads)
    try:
        for faceless in (0.88, 0.0):
            batches, counts, over = _Batches(mixed_photos(bench, faceless), rows), np.zeros(2, np.int64), Event()

            def work(batches: Any = batches, counts: Any = counts, over: Event = over) -> None:
                while not over.is_set():
                    done = apply_all(steps, next(batches))
                    counts[:] += rows, done.alive.num_rows

            def snapshot(counts: Any = counts) -> Any:
                return np.array(
                    [time.perf_counter(), time.process_time(), *counts, *np.concatenate([*counted.values()])]
                )

            with ThreadPoolExecutor(threads) as pool:
                works = [pool.submit(work) for _ in range(threads)]
                try:
                    time.sleep(settle)
                    before = snapshot()
                    busy = _gpu_busy(seconds)
                    elapsed, cpu, photos, kept, *fill = snapshot() - before
                finally:  # also when the step is over time
                    over.set()
                for each in works:
                    each.result()
            bench.record(
                {
                    "faceless": faceless,
                    "threads": threads,
                    "rows": rows,
                    "photos_per_s": round(photos / elapsed, 1),
                    "kept_per_s": round(kept / elapsed, 1),
                    "gpu_busy": busy,
                    "cores_of_this_process": round(cpu / elapsed, 2),
                    "images_per_batch": {
                        name: round(given / max(computed, 1), 1)
                        for name, given, computed in zip(counted, fill[::2], fill[1::2], strict=True)
                    },
                }
            )
    finally:
        images.set_decoding(1)


def _gpu_busy(seconds: float) -> float | None:
    """Wait, and look once a second at the share of time in which kernels ran, as NVML has it; None where it is not."""
    end, shares = time.perf_counter() + seconds, []
    while (left := end - time.perf_counter()) > 0:
        time.sleep(min(left, 1.0))
        try:
            command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
            shares.append(float(done.stdout) / 100)
        except (OSError, ValueError, subprocess.SubprocessError):
            continue
    return round(sum(shares) / len(shares), 2) if shares else None


def _steps(bench: Bench, rows: int) -> tuple[list[Any], dict[str, Any]]:
    """The stages, with random networks where the pack has none; and of each network images and batches, counted."""
    from pipeline.dataset.execute.runner import Loaded
    from schemas.columns import COLUMNS
    from stages import STAGES
    from stages.models.face_embedders.lbp import Lbp
    from stages.runtime import Runtime
    from stages.settings import Settings

    models = {
        "pack": str(bench.detector.parent),
        "screen": "detector",
        "runtime": {"detector": "torch"},
        "face_embedder": "lbp",
        "segmenter": "grabcut",
        "image_embedder": "patches",
    }
    settings = Settings.model_validate({"models": models, "segment": {"min_share": 0}})
    runtime = Runtime(device=bench.device)
    with patch.object(Lbp, "__init__", return_value=None):  # it gives way below, and OpenCV 5 has not what it needs
        stages: dict[str, Any] = {name: STAGES[name].stage()(settings, runtime) for name in _STAGES}
    made = bench.networks
    stages["segment"]._segmenter = made.parser
    stages["segment"].batch = stages["detect"].batch = min(rows, 16)
    stages["embed_face"]._embedder, stages["embed_image"]._embedder = made.recogniser, made.tower
    batches = {
        "look": stages["detect"]._detector._model.batches,
        "parse": made.parser._batches,
        "identity": made.recogniser.batches,
        "tower": made.tower._batches,
    }
    counts = {name: _counted(each) for name, each in batches.items()}
    return [Loaded(stage, frozenset(COLUMNS)) for stage in stages.values()], counts


def _counted(batches: Any) -> Any:
    """Images and batches of what is computed from now on."""
    counts, compute = np.zeros(2, np.int64), batches._together._compute

    def counted(kind: Any, images: Any) -> Any:
        counts[:] += len(images), -(-len(images) // batches.size)
        return compute(kind, images)

    batches._together._compute = counted
    return counts


class _Batches:
    """Rows without end, for several threads; each is another photo to the cache."""

    def __init__(self, files: list[str], rows: int) -> None:
        self._contents = [Path(file).read_bytes() for file in files]
        self._rows, self._numbers = rows, itertools.count()

    def __next__(self) -> Any:
        import pyarrow as pa

        from pipeline.dataset.rows import Rows
        from schemas.columns import schema

        numbers = [next(self._numbers) for _ in range(self._rows)]
        photos = [self._contents[number % len(self._contents)] for number in numbers]
        columns: dict[str, Any] = {"key": [f"p-{number:09}" for number in numbers], "image": photos}
        columns |= {"sha256": list(map(str, numbers)), "jpeg_quality": [95] * self._rows, "ai_mark": [""] * self._rows}
        return Rows.living(pa.table(columns, schema=schema(tuple(columns))))
