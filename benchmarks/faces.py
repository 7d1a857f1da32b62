"""From encoded bytes to embeddings, in this process: our stages, and insightface's own loop; one thread each."""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
import psutil
import pyarrow as pa
from insightface.app import FaceAnalysis
from insightface.utils import face_align
from material import Material

from pipeline.dataset.config import load_config
from pipeline.dataset.execute.make_shard import load
from pipeline.dataset.execute.runner import Loaded, apply_all
from pipeline.dataset.plan import make_plan
from pipeline.dataset.rows import Rows
from schemas.columns import SEED_SCHEMA

STEPS = ("size", "screen", "detect", "filter", "align", "embed_face")
BATCH_ROWS = 8


def naive(pack: Path) -> Callable[[Sequence[bytes]], None]:
    """The ten lines: decode, detect, recognise, and cut out each face."""
    cv2.setNumThreads(1)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    app = FaceAnalysis(str(pack), allowed_modules=["detection", "recognition"], sess_options=options)
    app.prepare(ctx_id=-1, det_size=(640, 640))

    def loop(files: Sequence[bytes]) -> None:
        for data in files:
            photo = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            for face in app.get(photo):
                face_align.norm_crop(photo, face.kps, 224)

    return loop


def ours(material: Material, screen: str) -> Callable[[Sequence[bytes]], None]:
    """The stages from the header to the ID vector, on batches as a run makes them."""
    sets = [f"models.pack={material.pack}", f"models.screen={screen}", "models.accept_noncommercial=true"]
    plan = make_plan(load_config(None, [*sets, "models.segmenter=grabcut", "models.image_embedder=patches"]))
    steps: list[Loaded] = load(plan, tuple(step for step in plan.steps if step.stage().name in STEPS))

    def stages(files: Sequence[bytes]) -> None:
        for start in range(0, len(files), BATCH_ROWS):
            apply_all(steps, Rows.living(_table(files[start : start + BATCH_ROWS], start)))

    return stages


def _table(files: Sequence[bytes], start: int) -> pa.Table:
    seeds = [{"key": f"p-{n:09d}", "part": "p", "row": n} for n in range(start, start + len(files))]
    rows = pa.Table.from_pylist(seeds, schema=SEED_SCHEMA)
    digests = [hashlib.sha256(data).hexdigest() for data in files]
    columns = {"image": pa.array(files, pa.binary()), "sha256": digests, "n_bytes": [len(data) for data in files]}
    for name, values in columns.items():
        rows = rows.append_column(name, pa.array(values))
    return rows


def clock() -> Callable[[], float]:
    """What tells the CPU seconds of this process and of the one that decodes for it."""
    children = [child for child in psutil.Process().children() if "decoding_child" in " ".join(child.cmdline())]
    clocks = [~child.pid << 3 | 2 for child in children]  # as clock_getcpuclockid(3) makes them
    return lambda: time.process_time() + sum(map(time.clock_gettime, clocks))


def cpu_s(work: Callable[[], object]) -> float:
    spent = clock()
    start = spent()
    work()
    return spent() - start
