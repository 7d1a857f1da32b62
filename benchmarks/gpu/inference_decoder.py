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
        [("screen", u8, (SCREEN, SCREEN, 3)), (f"look{look}", u8, (look, look, 3)), (f"look{BORDER}", u8, (BORDER, BORDER, 3)),
         ("parse", u8, (parse, parse, 3)), ("identity", u8, (112, 112, 3)), ("tower", u8, (224, 224, 3)),
         ("labels", u8, (parse, parse)), ("vector", np.float32, (512,)), ("clip", np.float16, (clip,)), ("hidden", np.float16, hidden)]
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
        self._link, self._rows = link, rows

    def ask(self, *kinds: str, count: int) -> list[Any]:
        for kind in kinds:
            self._link.send((kind, count))
        answers = dict(self._link.recv() for _ in kinds)
        if None in answers.values():
            raise EOFError
        return [answers[kind] for kind in kinds]

    def __call__(self, canvases: Sequence[Any], lowest: float) -> list[Any]:
        """As the network of `Scrfd`."""
        from stages.models.detectors.scrfd import Candidates

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

    keep = tuple(range(1, 19))
    dtype = rows_of(options["look"], options["parse"], tuple(options["hidden"]), options["clip"])
    rows = np.memmap(options["memory"], dtype, "r+", shape=(options["chunk"],))
    link = Client(options["address"], family="AF_UNIX")
    remote = Remote(link, [rows[i] for i in range(options["chunk"])])
    detector = Scrfd.__new__(Scrfd)
    detector._model, detector._size, detector._screen_size, detector._threshold = remote, options["look"], BORDER, 0.5
    photos = [(path.read_bytes(), path.name.startswith("face")) for path in map(Path, options["photos"])]
    seconds = dict.fromkeys(("decode_eighth", "decode_full", "detect", "crops", "masks"), 0.0)
    counts = dict.fromkeys(("photos", "screened_out", "no_single_face", "kept"), 0)
    mark = time.process_time()

    def spent(stage: str) -> None:
        """CPU seconds since the mark are this stage's."""
        nonlocal mark
        now = time.process_time()
        seconds[stage] += now - mark
        mark = now

    link.send(("ready", options["index"]))
    link.recv()
    position, mark = options["first"], time.process_time()
    try:
        while True:
            chunk = [photos[(position + i) % len(photos)] for i in range(options["chunk"])]
            position += options["chunk"]
            for row, (data, _) in zip(rows, chunk, strict=True):
                small = decode(data, cv2.IMREAD_REDUCED_COLOR_8)[:SCREEN, :SCREEN]
                row["screen"][:] = 0
                row["screen"][: small.shape[0], : small.shape[1]] = small
            spent("decode_eighth")
            (scores,) = remote.ask("screen", count=len(chunk))
            seen = [is_face if options["forced"] else score >= SUSPICIOUS for (_, is_face), score in zip(chunk, scores, strict=True)]
            images = [cv2.cvtColor(decode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) for (data, _), see in zip(chunk, seen, strict=True) if see]
            spent("decode_full")
            found = detector.detect_all(images)
            single = [(image, faces.kps[0]) for image, faces in zip(images, found, strict=True) if np.count_nonzero(faces.score >= 0.5) == 1]
            if options["forced"]:
                single = [(image, geometry.FFHQ_TEMPLATE * 0.6 + 300) for image in images]
            spent("detect")
            crops = []
            for row, (image, kps) in zip(rows, single, strict=False):
                side = row["parse"].shape[0]
                row["parse"][:] = geometry.ffhq_crop(image, kps)[:side, :side]
                row["identity"][:] = geometry.norm_crop(image, kps, 112)
                crops.append(geometry.norm_crop(image, kps, 224))
            spent("crops")
            if crops:
                remote.ask("parse", "identity", count=len(crops))
                for row, (_, kps), crop in zip(rows, single, crops, strict=False):
                    labels = np.zeros((512, 512), np.uint8)
                    labels[: row["labels"].shape[0], : row["labels"].shape[1]] = row["labels"]
                    row["tower"][:] = geometry.foreground(crop, geometry.warp_labels(labels, kps, 224), keep, (0, 0, 0))
                spent("masks")
                remote.ask("tower", count=len(crops))
            counts["photos"] += len(chunk)
            counts["screened_out"] += seen.count(False)
            counts["no_single_face"] += len(images) - len(single)
            counts["kept"] += len(single)
            link.send(("done", len(chunk)))
    except (EOFError, ConnectionError):
        pass
    print(json.dumps({"seconds": seconds, "counts": counts}))


if __name__ == "__main__":
    if sys.argv[1] == "decode":
        print(json.dumps(measure_decoding(float(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))))
    else:
        serve(json.loads(sys.argv[2]))
