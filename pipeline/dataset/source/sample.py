"""The bundled part `sample`: its rows, and the loopback server that its pictures come from.

Two photos inside installed packages are in the public domain: the astronaut Eileen Collins (NASA, scikit-image's
`data.astronaut`, 512x512) and Grace Hopper (US Navy, matplotlib's sample data, 512x600). All else is drawn. No photo
is large: keepers are enlarged or set into a drawn scene; `note` in sample.csv says so for each row, and `expected` the
verdict that the `embedded` profile must give. The same installed packages give the same bytes.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image as Pillow

from schemas.arrays import Doubles, Image

_ORIENTATION_TAG = 0x0112
_LYING = 6
"""EXIF orientation of a picture that is stored turned to the left and must be turned to the right."""
_QUALITY = 92
_FEATHER = 0.08
"""Width of the soft edge of a photo set into a scene, share of its shorter side."""

_HTML = b"<!DOCTYPE html>\n<html><head><title>Sorry</title></head><body>This image has moved.</body></html>\n"
_SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="1200" height="1200"><circle r="500"/></svg>\n'

_HILLS = ((0.55, 0.06, (130, 170, 130)), (0.7, 0.04, (90, 140, 80)), (0.85, 0.02, (70, 110, 60)))
"""Level and swing, shares of the height, and colour."""


@cache
def _photo(package: str, file: str) -> Image:
    """A photo that an installed package brings along, located without importing it, which takes half a second."""
    with Pillow.open(str(distribution(package).locate_file(file))) as image:
        photo: Image = np.array(image.convert("RGB"))
    return photo


_astronaut = partial(_photo, "scikit-image", "skimage/data/astronaut.png")
_hopper = partial(_photo, "matplotlib", "matplotlib/mpl-data/sample_data/grace_hopper.jpg")
"""Eileen Collins, (512, 512, 3), and Grace Hopper, (600, 512, 3)."""


def _enlarged(photo: Image, factor: float) -> Image:
    """The photo with each side `factor` times as long, bicubic."""
    size = round(photo.shape[1] * factor), round(photo.shape[0] * factor)
    larger: Image = cv2.resize(photo, size, interpolation=cv2.INTER_CUBIC)
    return larger


def _lit(photo: Image, red: float, green: float, blue: float) -> Image:
    lit: Image = (photo * np.array([red, green, blue])).clip(0, 255).astype(np.uint8)
    return lit


def _scene(width: int, height: int) -> Image:
    """A drawn landscape: sky, sun, hills, a house and trees."""
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = np.linspace((90, 150, 220), (230, 235, 240), height)[:, None]
    cv2.circle(canvas, (width * 4 // 5, height // 5), height // 12, (255, 236, 150), -1, cv2.LINE_AA)
    across = np.arange(width)
    for level, swing, colour in _HILLS:
        hill = height * (level + swing * np.sin(across / width * 7 + level * 20))
        outline = np.stack([across, hill], axis=1).astype(np.int32)
        cv2.fillPoly(canvas, [np.vstack([outline, [[width - 1, height], [0, height]]])], colour, cv2.LINE_AA)
    left, top, side = width // 10, height * 3 // 5, height // 7
    cv2.rectangle(canvas, (left, top), (left + side, top + side), (190, 120, 90), -1)
    roof = np.array([[left - side // 6, top], [left + side // 2, top - side // 2], [left + side * 7 // 6, top]])
    cv2.fillPoly(canvas, [roof.astype(np.int32)], (120, 60, 50), cv2.LINE_AA)
    for across_share in (0.3, 0.36, 0.9):
        root = round(width * across_share), height * 3 // 4
        cv2.line(canvas, root, (root[0], root[1] - side), (90, 70, 50), max(2, side // 10))
        cv2.circle(canvas, (root[0], root[1] - side), side // 3, (60, 100, 60), -1, cv2.LINE_AA)
    return canvas


def _set_into(around: Image, photo: Image, left: int, top: int) -> Image:
    """The scene with a photo in it, its edges soft where they do not meet the scene's; left and top in pixels."""
    height, width = photo.shape[:2]
    feather = _FEATHER * min(width, height)
    x, y = np.arange(width), np.arange(height)
    right, bottom = around.shape[1] - left - width, around.shape[0] - top - height
    fade_x = np.minimum(_ramp(x, left, feather), _ramp(width - 1 - x, right, feather))
    fade_y = np.minimum(_ramp(y, top, feather), _ramp(height - 1 - y, bottom, feather))
    alpha = np.minimum(fade_x[None, :], fade_y[:, None])[:, :, None]
    composed, inside = around.copy(), (slice(top, top + height), slice(left, left + width))
    composed[inside] = np.rint(alpha * photo + (1 - alpha) * around[inside]).astype(np.uint8)
    return composed


def _ramp(depth: npt.NDArray[np.intp], gap: int, feather: float) -> Doubles:
    """Opacity at a depth behind an edge that lies `gap` pixels inside the scene."""
    return np.ones(depth.shape) if gap == 0 else np.clip(depth / feather, 0, 1)


def _jpeg(picture: Image, **options: object) -> bytes:
    return _saved(Pillow.fromarray(picture), "JPEG", quality=_QUALITY, **options)


def _saved(image: Pillow.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def on_its_side() -> bytes:
    """The astronaut stored on her left side, with the EXIF tag that says how to turn her upright."""
    exif = Pillow.Exif()
    exif[_ORIENTATION_TAG] = _LYING
    return _jpeg(np.rot90(_enlarged(_astronaut()[:, 40:480], 2.4)), exif=exif)


def vignette() -> bytes:
    """Grace Hopper as a PNG whose corners fade into nothing."""
    photo = _enlarged(_hopper(), 2)
    height, width = photo.shape[:2]
    y, x = np.indices((height, width))
    radius = np.hypot((x - width / 2) / width, (y - height / 2) / height) * 2
    alpha = (np.clip(1.3 - radius, 0, 0.25) * 4 * 255).astype(np.uint8)
    return _saved(Pillow.fromarray(np.dstack([photo, alpha])), "PNG", compress_level=3)


def couple() -> bytes:
    one = _set_into(_scene(1700, 1200), _enlarged(_hopper(), 1.5), 100, 300)
    return _jpeg(_set_into(one, _enlarged(_astronaut(), 1.6), 850, 1200 - 819))


def corrupt() -> bytes:
    """A PNG whose compressed pixels were overwritten in the middle."""
    data = bytearray(_saved(Pillow.fromarray(_scene(1200, 1100)), "PNG", compress_level=1))
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)
    return bytes(data)


FILES: dict[str, Callable[[], bytes]] = {
    "astronaut.jpg": lambda: _jpeg(_enlarged(_astronaut(), 3)),
    "admiral.jpg": lambda: _jpeg(_enlarged(_hopper(), 2.5)),
    "half-body.jpg": lambda: _jpeg(
        _set_into(_scene(1800, 1300), _enlarged(_astronaut()[:, ::-1], 2.3), 320, 1300 - 1178)
    ),
    "full-scene.jpg": lambda: _jpeg(_set_into(_scene(1800, 1200), _enlarged(_hopper(), 1.1), 1000, 1200 - 660)),
    "tall.jpg": lambda: _jpeg(
        _set_into(_scene(1126, 1700), _lit(_enlarged(_astronaut(), 2.2), 0.75, 0.8, 0.95), 0, 1700 - 1126)
    ),
    "close-up.jpg": lambda: _jpeg(_enlarged(_astronaut()[:, ::-1][20:250, 180:400], 5.2)),
    "on-its-side.jpg": on_its_side,
    "vignette.png": vignette,
    "warm.webp": lambda: _saved(
        Pillow.fromarray(_enlarged(_lit(_hopper()[:, ::-1], 1.1, 1.0, 0.85), 2.2)), "WEBP", quality=90, method=0
    ),
    "small.jpg": lambda: _jpeg(_astronaut()),
    "boasting.jpg": lambda: _jpeg(_hopper()),
    "landscape.jpg": lambda: _jpeg(_scene(1600, 1100)),
    "couple.jpg": couple,
    "tiny-face.jpg": lambda: _jpeg(_set_into(_scene(1400, 1100), _astronaut(), 700, 1100 - 512)),
    "truncated.jpg": lambda: (whole := _jpeg(_enlarged(_astronaut(), 2.5)))[: len(whole) * 3 // 5],
    "corrupt.png": corrupt,
    "page.jpg": lambda: _HTML,
    "drawing.svg": lambda: _SVG,
    "empty.jpg": bytes,
    "opted-out.jpg": lambda: _jpeg(_scene(1100, 1100)),
}
"""Name -> the bytes of the file."""


METADATA = "sample.parquet"
_STATUS = {"failing.jpg": 500, "forbidden.jpg": 403, METADATA: 404}
_HEADERS = {"opted-out.jpg": {"X-Robots-Tag": "noai"}}


def sample_rows() -> pa.Table:
    """The rows of the part in LAION's columns, with `expected` and `note`."""
    columns = {"WIDTH": pa.int32(), "HEIGHT": pa.int32()}
    columns |= dict.fromkeys(("similarity", "punsafe", "pwatermark"), pa.float32())
    options = pa.csv.ConvertOptions(column_types=columns, strings_can_be_null=True, quoted_strings_can_be_null=False)
    return pa.csv.read_csv(Path(__file__).with_suffix(".csv"), convert_options=options)


def write_sample(folder: Path) -> Path:
    """Write the files that `sample_server` serves, and their metadata; the path of the latter."""
    for name, make in FILES.items():
        (folder / name).write_bytes(make())
    pq.write_table(sample_rows(), folder / METADATA)
    return folder / METADATA


@contextmanager
def sample_server(folder: Path) -> Iterator[int]:
    """Serve a folder that `write_sample` filled, on a free loopback port, which is yielded.

    A name in the folder is answered 200, unless it is registered as failing; any other is answered 404.
    """
    with _Server(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    """A server whose clients may hang up: the download stage does so as soon as it has seen enough."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def send_head(self) -> Any:
        """Answer with the status that is registered for a name, or a file."""
        status = _STATUS.get(self.path.removeprefix("/"))
        return self.send_error(status) if status else super().send_head()

    def end_headers(self) -> None:
        for field, value in _HEADERS.get(self.path.removeprefix("/"), {}).items():
            self.send_header(field, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the ledger says what became of each row."""
