"""Our stages against insightface's own loop: cost and sameness, on the labelled photos.

    FACESHARDS_DATA=folder python benchmarks/bench_faces.py [--runs 3]

Both do detection and recognition with the same weights on the same encoded photos, in one process (ours decodes in a
second one, which counts too), one thread each; CPU time. The loop is `cv2.imdecode`, `app.get`, `norm_crop(..., 224)`;
ours is size -> detect -> filter -> align -> embed_face. Prints the cost ratio on all labelled photos and on a mix where
80 % are too small, the overhead of our own code over models and codecs, and how equal the results are on the kept
photos.
"""

import argparse
import csv
import hashlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
import psutil
import pyarrow as pa
from insightface.app import FaceAnalysis
from insightface.utils import face_align

from pipeline.dataset.config import load_config
from pipeline.dataset.execute.make_shard import load
from pipeline.dataset.execute.runner import Loaded, apply_all
from pipeline.dataset.plan import Plan, make_plan
from pipeline.dataset.rows import Rows
from schemas.columns import SEED_SCHEMA
from schemas.shard import decode_npy
from stages.pixels import images

STEPS = ("size", "detect", "filter", "align", "embed_face")


def photos(data: Path) -> tuple[list[bytes], list[bool]]:
    """Encoded unambiguous photos, and for each whether both sides have 1024 px."""
    with (data / "photos" / "labels.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if not row["ambiguous"]]
    files = [(data / "photos" / row["file"]).read_bytes() for row in rows]
    return files, [min(int(row["width"]), int(row["height"])) >= 1024 for row in rows]


def naive_app(data: Path) -> FaceAnalysis:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    app = FaceAnalysis(
        str(data / "models" / "real"), allowed_modules=["detection", "recognition"], sess_options=options
    )
    app.prepare(ctx_id=-1, det_size=(640, 640))
    return app


def naive(app: FaceAnalysis, files: list[bytes]) -> list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Per photo and face: points, normed embedding, 224 crop (BGR)."""
    results = []
    for data in files:
        photo = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        faces = app.get(photo)
        results.append([(f.kps, f.normed_embedding, face_align.norm_crop(photo, f.kps, 224)) for f in faces])
    return results


def loaded(data: Path) -> tuple[Plan, list[Loaded]]:
    sets = [f"models.pack={data / 'models' / 'real'}", "models.accept_noncommercial=true"]
    plan = make_plan(load_config(None, [*sets, "models.segmenter=grabcut", "models.image_embedder=patches"]))
    return plan, load(plan, tuple(step for step in plan.steps if step.stage().name in STEPS))


def ours(plan: Plan, steps: list[Loaded], files: list[bytes]) -> Rows:
    """Batches as a run makes them; returns the last state of all rows."""
    images._CACHE = images.PhotoCache(images._CACHE_BYTES)  # as a fresh process would find it
    done = []
    size = plan.batch_rows
    for start in range(0, len(files), size):
        done.append(apply_all(steps, Rows.living(table(files[start : start + size], start))))
    alive = pa.concat_tables([rows.alive for rows in done])
    return Rows(
        alive,
        pa.concat_tables([rows.dead for rows in done]),
        done[0].witnesses,
    )


def table(files: list[bytes], start: int) -> pa.Table:
    seeds = [{"key": f"p-{n:09d}", "part": "p", "row": n} for n in range(start, start + len(files))]
    rows = pa.Table.from_pylist(seeds, schema=SEED_SCHEMA)
    for name, values in (
        ("image", pa.array(files, pa.binary())),
        ("sha256", pa.array([hashlib.sha256(data).hexdigest() for data in files])),
        ("n_bytes", pa.array([len(data) for data in files])),
    ):
        rows = rows.append_column(name, values)
    return rows


def clock() -> Callable[[], float]:
    """What tells the CPU seconds of this process and its children."""
    clocks = [~child.pid << 3 | 2 for child in psutil.Process().children()]  # as clock_getcpuclockid(3) makes them
    return lambda: time.process_time() + sum(map(time.clock_gettime, clocks))


def cpu(work: Callable[[], object]) -> float:
    spent = clock()
    start = spent()
    work()
    return spent() - start


def ratio(label: str, data: Path, files: list[bytes], runs: int) -> None:
    """Pairs of runs, in turn, after one warm-up of each."""
    app, (plan, steps) = naive_app(data), loaded(data)
    naive(app, files), ours(plan, steps, files)
    pairs = [(cpu(lambda: ours(plan, steps, files)), cpu(lambda: naive(app, files))) for _ in range(runs)]
    ratios = [one / other for one, other in pairs]
    print(
        f"{label}: {len(files)} photos, ours/loop = {statistics.median(ratios):.3f} (min {min(ratios):.3f}, "
        f"max {max(ratios):.3f}); ours {statistics.median(p[0] for p in pairs):.2f} s CPU"
    )


def overhead(data: Path, files: list[bytes]) -> None:
    """Time outside models, decoding, warping and encoding, over the time inside."""
    plan, steps = loaded(data)
    inside, spent = 0.0, clock()
    depth = 0

    def timed(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal inside, depth
            depth += 1
            start = spent()
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                if depth == 0:
                    inside += spent() - start

        return call

    import stages.align
    import stages.detect
    import stages.embed_face

    for module in (stages.align, stages.detect, stages.embed_face):
        for name in ("photo", "norm_crop", "encode_jpeg", "encode_png", "decode_png", "decode_jpeg", "decode"):
            if hasattr(module, name):
                setattr(module, name, timed(getattr(module, name)))
    for name in ("photo", "encode_jpeg", "encode_png", "decode_png", "decode_jpeg"):
        if hasattr(images, name):
            setattr(images, name, timed(getattr(images, name)))
    for step in steps:
        for name, value in vars(step.stage).items():
            for method in ("detect", "embed"):
                if hasattr(value, method):
                    setattr(value, method, timed(getattr(value, method)))
                    print(f"  timed {step.stage.name}.{name}.{method}")
    ours(plan, steps, files)
    inside, spent = 0.0, clock()
    total = cpu(lambda: ours(plan, steps, files))
    share = 100 * (total - inside) / inside
    print(f"overhead: {share:.1f} % over models and codecs ({inside:.2f} of {total:.2f} s CPU)")


def sameness(data: Path, files: list[bytes]) -> None:
    """Kept photos: our points, crop and embedding against the loop's."""
    plan, steps = loaded(data)
    theirs = naive(naive_app(data), files)
    cosines, differences, distances = [], [], []
    for record in ours(plan, steps, files).alive.to_pylist():
        faces = theirs[record["row"]]
        if not faces:
            print(f"  {record['key']}: the loop finds no face here, ours does")
            continue
        kps, embedding, crop = faces[0]
        cosines.append(float(decode_npy(record["arcface"]) @ embedding))
        face = cv2.imdecode(np.frombuffer(record["face"], np.uint8), cv2.IMREAD_COLOR)
        differences.append(float(np.abs(face.astype(int) - crop.astype(int)).mean()))
        distances.append(float(np.linalg.norm(np.array(record["kps"]) - kps, axis=1).max()))
    print(
        f"same face: {len(cosines)} kept; cosine >= {min(cosines):.6f}; crop difference <= {max(differences):.3f} "
        f"grey levels; points within {max(distances):.4f} px"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    data = Path(os.environ["FACESHARDS_DATA"]).resolve()
    cv2.setNumThreads(1)
    files, large = photos(data)
    big = [file for file, is_large in zip(files, large, strict=True) if is_large]
    small = [file for file, is_large in zip(files, large, strict=True) if not is_large]
    mix = big[:10] + (small * 4)[: 4 * len(big[:10])]
    sameness(data, files)
    ratio("labelled photos", data, files, runs)
    ratio("80 % too small", data, mix, runs)
    overhead(data, files)


if __name__ == "__main__":
    main()
