"""A process beside the one with the GPU: decodes photos, cuts crops, and asks for everything that a network gives.

`decode SECONDS START FOLDER`: how many of the folder's photos one process decodes, in full and at an eighth.
`serve JSON`: photos from bytes to embeddings, the networks behind a socket and pixels in shared memory.
"""

import json
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
cv2.setNumThreads(1)

SCREEN, BORDER = 224, 192
SUSPICIOUS = 0.15
"""Score at an eighth of the size from which a photo is decoded in full."""


def rows_of(look: int, parse: int, hidden: tuple[int, int], clip: int) -> Any:
    """What a photo has in shared memory."""
    u8 = np.uint8
    return np.dtype(
        [("screen", u8, (SCREEN, SCREEN, 3)),
         (f"look{look}", u8, (look, look, 3)), (f"look{BORDER}", u8, (BORDER, BORDER, 3)),
         ("parse", u8, (parse, parse, 3)), ("identity", u8, (112, 112, 3)), ("tower", u8, (224, 224, 3)),
         ("labels", u8, (parse, parse)), ("vector", np.float32, (512,)),
         ("clip", np.float16, (clip,)), ("hidden", np.float16, hidden)]
    )  # fmt: skip


def decode(data: bytes, flags: int) -> Any:
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def measure_decoding(seconds: float, start: float, folder: Path) -> dict[str, float]:
    photos = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    rates = {}
    for name, flags in (("full", cv2.IMREAD_COLOR), ("eighth", cv2.IMREAD_REDUCED_COLOR_8)):
        time.sleep(max(0.0, start - time.time()))
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            decode(photos[count % len(photos)], flags)
            count += 1
        rates[name] = count / (time.perf_counter() - begin)
        start += seconds + 0.5
    return rates


class Remote:
    """Networks of another process; each call waits for its answer."""

    def __init__(self, link: Any, rows: Any) -> None:
        self.link, self._rows = link, rows

    def ask(self, *kinds: str, count: int) -> list[Any]:
        for kind in kinds:
            self.link.send((kind, count))
        answers = dict(self.link.recv() for _ in kinds)
        if None in answers.values():
            raise StopIteration
        return [answers[kind] for kind in kinds]

    def __call__(self, canvases: Sequence[Any], lowest: float) -> list[Any]:
        """As the network of `Scrfd`."""
        from stages.models.boxes import Candidates

        if not canvases:
            return []
        kind, found = f"look{canvases[0].shape[0]}", []
        for start in range(0, len(canvases), len(self._rows)):
            part = canvases[start : start + len(self._rows)]
            for row, canvas in zip(self._rows, part, strict=False):
                row[kind][:] = canvas
            found += [Candidates(*values) for values in self.ask(kind, count=len(part))[0]]
        return found


def similarity_of_old_skimage() -> None:
    """Product code needs scikit-image 0.26; where an older one is, its own name for the same is used."""
    from skimage.transform import SimilarityTransform

    if not hasattr(SimilarityTransform, "from_estimate"):

        def from_estimate(source: Any, target: Any) -> Any:
            transform = SimilarityTransform()
            transform.estimate(source, target)
            return transform

        SimilarityTransform.from_estimate = from_estimate


def serve(options: dict[str, Any]) -> None:
    similarity_of_old_skimage()
    from stages.models.detectors.scrfd import Scrfd
    from stages.pixels import geometry

    dtype = rows_of(options["look"], options["parse"], tuple(options["hidden"]), options["clip"])
    rows = np.memmap(options["memory"], dtype, "r+", shape=(options["chunk"],))
    link = Client(options["address"], family="AF_UNIX")
    remote = Remote(link, [rows[i] for i in range(options["chunk"])])
    detector = Scrfd.__new__(Scrfd)
    detector._second_look = (0.0, 0.0)
    detector._model, detector._size, detector._screen_size, detector._threshold = remote, options["look"], BORDER, 0.5
    link.send(("ready", options["index"]))
    try:
        while job := link.recv():
            link.send(("stats", Job(detector, rows, job, geometry).run()))
    except (EOFError, ConnectionError):
        pass


class Job:
    """Photos again and again, until the networks say that it is enough."""

    def __init__(self, detector: Any, rows: Any, job: dict[str, Any], geometry: Any) -> None:
        self.detector, self.rows, self.geometry = detector, rows[: job["chunk"]], geometry
        self.remote: Remote = detector._model
        self.forced: bool = job["forced"]
        self.position: int = job["first"]
        self.photos = [(Path(path).read_bytes(), Path(path).name.startswith("face")) for path in job["photos"]]
        self.seconds = dict.fromkeys(("decode_eighth", "decode_full", "detect", "crops", "masks"), 0.0)
        self.counts = dict.fromkeys(("photos", "screened_out", "no_single_face", "kept"), 0)
        self.mark = time.process_time()

    def run(self) -> dict[str, Any]:
        try:
            while True:
                self.chunk()
        except StopIteration:
            return {"seconds": self.seconds, "counts": self.counts}

    def spent(self, stage: str) -> None:
        """CPU seconds since the mark are this stage's."""
        now = time.process_time()
        self.seconds[stage] += now - self.mark
        self.mark = now

    def chunk(self) -> None:
        chunk = [self.photos[(self.position + i) % len(self.photos)] for i in range(len(self.rows))]
        self.position += len(chunk)
        for row, (data, _) in zip(self.rows, chunk, strict=True):
            small = decode(data, cv2.IMREAD_REDUCED_COLOR_8)[:SCREEN, :SCREEN]
            row["screen"][:] = 0
            row["screen"][: small.shape[0], : small.shape[1]] = small
        self.spent("decode_eighth")
        (scores,) = self.remote.ask("screen", count=len(chunk))
        seen = [
            has_face if self.forced else score >= SUSPICIOUS for (_, has_face), score in zip(chunk, scores, strict=True)
        ]
        suspects = [data for (data, _), see in zip(chunk, seen, strict=True) if see]
        images = [cv2.cvtColor(decode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) for data in suspects]
        self.spent("decode_full")
        found = self.detector.detect_all(images)
        single = [
            (image, faces.kps[0])
            for image, faces in zip(images, found, strict=True)
            if np.count_nonzero(faces.score >= 0.5) == 1
        ]
        if self.forced:
            single = [(image, self.geometry.FFHQ_TEMPLATE * 0.6 + 300) for image in images]
        self.spent("detect")
        if single:
            self.embed(single)
        self.counts["photos"] += len(chunk)
        self.counts["screened_out"] += seen.count(False)
        self.counts["no_single_face"] += len(images) - len(single)
        self.counts["kept"] += len(single)
        self.remote.link.send(("done", len(chunk)))

    def embed(self, single: Sequence[tuple[Any, Any]]) -> None:
        """Photos with their five points: crops, labels and identity, and the tower's features of what is face."""
        geometry, crops = self.geometry, []
        for row, (image, kps) in zip(self.rows, single, strict=False):
            side = row["parse"].shape[0]
            row["parse"][:] = geometry.ffhq_crop(image, kps)[:side, :side]
            row["identity"][:] = geometry.norm_crop(image, kps, 112)
            crops.append(geometry.norm_crop(image, kps, 224))
        self.spent("crops")
        self.remote.ask("parse", "identity", count=len(single))
        for row, (_, kps), crop in zip(self.rows, single, crops, strict=False):
            labels = np.zeros((512, 512), np.uint8)
            labels[: row["labels"].shape[0], : row["labels"].shape[1]] = row["labels"]
            mask = geometry.warp_labels(labels, kps, 224)
            row["tower"][:] = geometry.foreground(crop, mask, tuple(range(1, 19)), (0, 0, 0))
        self.spent("masks")
        self.remote.ask("tower", count=len(single))


if __name__ == "__main__":
    if sys.argv[1] == "decode":
        print(json.dumps(measure_decoding(float(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))))
    else:
        serve(json.loads(sys.argv[2]))
