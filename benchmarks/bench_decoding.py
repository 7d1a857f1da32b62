"""What decoding in a process of its own costs: processor time of both processes, against decoding in this one.

python benchmarks/bench_decoding.py [--rounds 5] [--photos FOLDER]
"""

import argparse
import io
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from skimage import data

from stages.pixels import decoding, images

CACHE = 128 << 20
SIDES = (1100, 2000, 4000)


def jpeg(side: int) -> bytes:
    """A photo with the noise of a camera, about 0.2 bytes per pixel."""
    photo = np.asarray(Image.fromarray(data.astronaut()).resize((side, side)))
    noisy = photo + np.random.default_rng(0).integers(-12, 13, photo.shape)
    return images.encode_jpeg(np.clip(noisy, 0, 255).astype(np.uint8), 88)


def png(side: int) -> bytes:
    """The photo without noise."""
    buffer = io.BytesIO()
    Image.fromarray(data.astronaut()).resize((side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def before(content: bytes) -> np.ndarray:
    """How photos were decoded until there was a process for it."""
    if content[:2] == b"\xff\xd8":
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        with images._no_stderr():
            return cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def here_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def child_s() -> float:
    child = decoding._decoder()._child
    fields = Path(f"/proc/{child._process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def photos(folder: Path) -> list[bytes]:
    """Real JPEGs of at least 1024 pixels along both sides."""
    files = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
    return [content for content in files if min(images.read_header(content)[1:]) >= 1024]


def measured(decode: Callable[[bytes], np.ndarray], contents: list[bytes], count: int) -> tuple[float, float]:
    """CPU and wall milliseconds per photo, of this process and its child; the last photos stay alive."""
    kept = [decode(content) for content in contents[:3]]
    cpu, wall = here_s() + child_s(), time.perf_counter()
    for index in range(count):
        kept.append(decode(contents[index % len(contents)]))
        while sum(photo.nbytes for photo in kept) > CACHE:
            kept.pop(0)
    return (here_s() + child_s() - cpu) * 1e3 / count, (time.perf_counter() - wall) * 1e3 / count


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--photos", type=Path, help="measure the JPEGs of this folder instead")
    told = arguments.parse_args()
    rounds = told.rounds
    drawn = {f"jpeg {side}": [jpeg(side)] for side in SIDES} | {"png 2000": [png(2000)]}
    for name, contents in ({"photos": photos(told.photos)} if told.photos else drawn).items():
        images._decode_apart(contents[0])
        count = 64 if told.photos or "1100" in name else 12
        pairs = [
            (measured(before, contents, count), measured(images._decode_apart, contents, count)) for _ in range(rounds)
        ]
        cpu = [apart[0] / here[0] for here, apart in pairs]
        wall = [apart[1] / here[1] for here, apart in pairs]
        here = statistics.median(pair[0][0] for pair in pairs)
        print(
            f"{name}: {here:.1f} ms here; apart x{statistics.median(cpu):.3f} CPU ({min(cpu):.3f} to {max(cpu):.3f}), "
            f"x{statistics.median(wall):.2f} wall"
        )


if __name__ == "__main__":
    main()
