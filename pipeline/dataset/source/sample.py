"""The bundled part `sample`: its rows, and the loopback server that its pictures come from.

Two photos inside installed packages are in the public domain: the astronaut Eileen Collins (NASA, scikit-image's
`data.astronaut`, 512x512) and Grace Hopper (US Navy, matplotlib's sample data, 512x600). All else is drawn. No photo
is large: keepers are enlarged or set into a drawn scene; `note` says so for each row, and `expected` the verdict
that the `embedded` profile must give.
"""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as Pillow

from pipeline.dataset.source import sample_pictures as pictures
from schemas.columns import KEPT
from schemas.drops import DropReason

METADATA = "sample.parquet"
_BASE = "http://sample.localhost/"
_CLAIMED = (1200, 1200)
_STATUS = {"failing.jpg": 500, "forbidden.jpg": 403}
_HEADERS = {"opted-out.jpg": {"X-Robots-Tag": "noai"}}


@dataclass(frozen=True)
class SampleRow:
    """One row of the part. A size of None stands for the stored picture's; 0 for a null."""

    name: str
    expected: str
    note: str
    text: str | None = None
    size: tuple[int, int] | None = None
    nsfw: str | None = "UNLIKELY"
    punsafe: float | None = 0.01
    pwatermark: float | None = 0.05
    url: str | None = None


def write_sample(folder: Path) -> Path:
    """Write the files that `sample_server` serves, and their metadata in LAION's columns; the path of the latter."""
    files = {name: make() for name, make in pictures.FILES.items()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    records = []
    for row in ROWS:
        width, height = row.size or _CLAIMED
        if row.size is None and row.name in files:
            with Pillow.open(BytesIO(files[row.name])) as image:
                width, height = image.size
        record = {
            "URL": _BASE + row.name if row.url is None else row.url,
            "TEXT": row.text or row.note,
            "WIDTH": width or None,
            "HEIGHT": height or None,
            "NSFW": row.nsfw,
            "similarity": 0.3,
            "punsafe": row.punsafe,
            "pwatermark": row.pwatermark,
            "expected": row.expected,
            "note": row.note,
        }
        records.append(record)
    path = folder / METADATA
    pq.write_table(pa.Table.from_pylist(records, schema=_SCHEMA), path)
    return path


@contextmanager
def sample_server(folder: Path) -> Iterator[int]:
    """Serve a folder that `write_sample` filled, on a free loopback port, which is yielded.

    A name in the folder is answered 200, unless it is registered as failing; any other is answered 404.
    """
    files = {path.name: path for path in folder.iterdir() if path.name != METADATA}
    with _Server(("127.0.0.1", 0), partial(_Handler, files)) as server:
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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, files: Mapping[str, Path], *args: Any) -> None:
        self._files = files
        super().__init__(*args)  # answers

    def do_GET(self) -> None:
        """Send a file, or the status that is registered for its name."""
        name = unquote(urlsplit(self.path).path).removeprefix("/")
        status = _STATUS.get(name, 200 if name in self._files else 404)
        body = self._files[name].read_bytes() if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for field, value in _HEADERS.get(name, {}).items():
            self.send_header(field, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the ledger says what became of each row."""


_SCHEMA = pa.schema(
    [
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("WIDTH", pa.int32()),
        ("HEIGHT", pa.int32()),
        ("NSFW", pa.string()),
        ("similarity", pa.float32()),
        ("punsafe", pa.float32()),
        ("pwatermark", pa.float32()),
        ("expected", pa.string()),
        ("note", pa.string()),
    ]
)


_NASA = "public-domain NASA photo of Eileen Collins (512x512 px)"
_NAVY = "public-domain US Navy photo of Grace Hopper (512x600 px)"

ROWS: tuple[SampleRow, ...] = (
    SampleRow(
        "astronaut.jpg", KEPT, f"{_NASA}, enlarged 3 times",
        text="portrait of a smiling astronaut in an orange suit, a flag and a model of the shuttle behind her",
    ),
    SampleRow(
        "admiral.jpg", KEPT, f"{_NAVY}, enlarged 2.5 times",
        text="official portrait of an admiral with glasses, in dress uniform and cap",
    ),
    SampleRow(
        "half-body.jpg", KEPT, f"{_NASA}, mirrored, enlarged 2.3 times, in a drawn landscape",
        text="an astronaut with her helmet in front of green hills",
    ),
    SampleRow(
        "full-scene.jpg", KEPT, f"{_NAVY}, enlarged 1.1 times, small in a drawn landscape",
        text="a house, trees and hills, and a woman in navy uniform",
    ),
    SampleRow(
        "tall.jpg", KEPT, f"{_NASA}, enlarged 2.2 times, in colder light, under a drawn sky",
        text="an astronaut under a wide blue sky",
    ),
    SampleRow(
        "close-up.jpg", KEPT, f"{_NASA}, mirrored, the head alone, enlarged 5.2 times",
        text="close-up of a woman with short hair, smiling",
    ),
    SampleRow(
        "on-its-side.jpg", KEPT, f"{_NASA}, its middle, enlarged 2.4 times, stored on its side with EXIF orientation 6",
        text="an astronaut in an orange suit", size=(1056, 1229), nsfw=None, punsafe=None, pwatermark=None,
    ),
    SampleRow(
        "vignette.png", KEPT, f"{_NAVY}, enlarged 2 times, PNG with transparent corners",
        text="an oval portrait of a woman in uniform",
    ),
    SampleRow(
        "warm.webp", KEPT, f"{_NAVY}, mirrored, warmer light, enlarged 2.2 times, WebP without a size in the metadata",
        text="a navy officer in evening light", size=(0, 0),
    ),
    SampleRow("astronaut.jpg", DropReason.DUPLICATE_URL, "the URL of the first row again", size=(1536, 1536)),
    SampleRow("small.jpg", DropReason.SMALL_IMAGE, f"{_NASA} as it is, and the metadata says so"),
    SampleRow("boasting.jpg", DropReason.SMALL_IMAGE, f"{_NAVY} as it is; the metadata claims more", size=(2048, 2400)),
    SampleRow("landscape.jpg", DropReason.NO_FACE, "a drawn landscape"),
    SampleRow("couple.jpg", DropReason.SEVERAL_FACES, f"{_NAVY} and {_NASA}, enlarged, in a drawn landscape"),
    SampleRow("tiny-face.jpg", DropReason.SMALL_FACE, f"{_NASA} at its own size in a drawn landscape"),
    SampleRow(
        "truncated.jpg", DropReason.TRUNCATED_IMAGE, f"{_NASA}, enlarged 2.5 times, the file cut after three fifths",
        size=(1280, 1280),
    ),
    SampleRow("corrupt.png", DropReason.CORRUPT_IMAGE, "a drawn landscape as PNG, 4 KiB of its pixels overwritten"),
    SampleRow("page.jpg", DropReason.NOT_AN_IMAGE, "a web page that poses as an image", size=_CLAIMED),
    SampleRow("drawing.svg", DropReason.UNSUPPORTED_FORMAT, "a vector drawing", size=_CLAIMED),
    SampleRow("empty.jpg", DropReason.EMPTY_BODY, "a file without a byte", size=_CLAIMED),
    SampleRow("gone.jpg", DropReason.NOT_FOUND, "a URL that the server does not know"),
    SampleRow("forbidden.jpg", DropReason.ACCESS_DENIED, "a URL that the server answers with 403"),
    SampleRow("failing.jpg", DropReason.SERVER_ERROR, "a URL that the server answers with 500"),
    SampleRow(
        "opted-out.jpg", DropReason.OPTED_OUT, "a drawn landscape whose site asks not to be used for AI training"
    ),
    SampleRow("unsafe.jpg", DropReason.UNSAFE, "tagged NSFW by the metadata; never fetched", nsfw="NSFW"),
    SampleRow("perhaps-unsafe.jpg", DropReason.UNSAFE, "punsafe of 0.97; never fetched", nsfw="UNSURE", punsafe=0.97),
    SampleRow("stock-photo.jpg", DropReason.WATERMARK, "pwatermark of 0.93; never fetched", pwatermark=0.93),
    SampleRow("old.jpg", DropReason.BAD_URL, "a URL that is not http", url="ftp://sample.localhost/old.jpg"),
    SampleRow("nowhere.jpg", DropReason.BAD_URL, "an empty URL", url=""),
)  # fmt: skip
