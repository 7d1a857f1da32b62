"""The product's own stages from encoded bytes to embeddings, as its worker with a GPU runs them."""

import copy
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import inference_decoder as decoder
import numpy as np
from inference_bench import Bench, mixed_photos

_STAGES = ("screen", "detect", "filter", "align", "segment", "crop", "embed_face", "embed_image")
_ROWS, _THREADS_PER_CPU = 32, 2
"""As `Plan.batch_rows` and `Plan.pool` have them on a GPU."""


def product(bench: Bench) -> None:
    """Threads that share the models, a decoding process each: 88 % and 0 % without a face."""
    if not (bench.smoke or (bench.pack and bench.pictures)):
        bench.record({"skipped": "needs --pack and --photos: screen and detector are to see faces"})
        return
    decoder.similarity_of_old_skimage()
    from pipeline.dataset.execute.runner import apply_all
    from stages.pixels import images

    rows = 4 if bench.smoke else _ROWS
    threads = 2 if bench.smoke else _THREADS_PER_CPU * (os.cpu_count() or 1)
    settle, seconds = (0.0, 6.0) if bench.smoke else (6.0, 10.0)  # children start, graphs are captured
    steps, networks = _steps(bench, rows)
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
                    [time.perf_counter(), time.process_time(), *counts, *np.concatenate([*networks.values()])]
                )

            with ThreadPoolExecutor(threads) as pool:
                works = [pool.submit(work) for _ in range(threads)]
                try:
                    time.sleep(settle)
                    before = snapshot()
                    time.sleep(seconds)
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
                    "cores_of_this_process": round(cpu / elapsed, 2),
                    "images_per_batch": {
                        name: round(given / max(computed, 1), 1)
                        for name, given, computed in zip(networks, fill[::2], fill[1::2], strict=True)
                    },
                }
            )
    finally:
        images.set_decoding(1)


def _steps(bench: Bench, rows: int) -> tuple[list[Any], dict[str, Any]]:
    """The stages, with random networks where the pack has none; and of each network images and batches, counted."""
    from pipeline.dataset.execute.runner import Loaded
    from schemas.columns import COLUMNS
    from stages import STAGES
    from stages.models.face_embedders.arcface_torch import ArcFaceTorch
    from stages.models.image_embedders.clip import ClipVitH
    from stages.models.segmenters.facexlib import FacexlibParser, label_batches
    from stages.models.torch_backend import IMAGENET
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
    stages: dict[str, Any] = {name: STAGES[name].stage()(settings, Runtime(device=bench.device)) for name in _STAGES}
    parser, tower = FacexlibParser.__new__(FacexlibParser), ClipVitH.__new__(ClipVitH)
    parser._name = "bisenet"
    parser._batches = label_batches(copy.deepcopy(bench.bisenet), IMAGENET, bench.device)
    tower._device, tower._model = bench.device, bench.vit_half
    tower._batches = tower.batches(bench.device)
    arcface = ArcFaceTorch(bench.recogniser, bench.device)
    stages["segment"]._segmenter = parser
    stages["segment"].batch = stages["detect"].batch = min(rows, 16)
    stages["embed_face"]._embedder, stages["embed_image"]._embedder = arcface, tower
    networks = {
        "look": stages["detect"]._detector._model.batches,
        "parse": parser._batches,
        "identity": arcface.batches,
        "tower": tower._batches,
    }
    counts = {name: _counted(batches) for name, batches in networks.items()}
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
