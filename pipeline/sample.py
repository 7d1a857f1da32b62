"""The bundled part `sample`: its rows, and the loopback server that its pictures come from.

Two photos inside installed packages are in the public domain: the astronaut Eileen Collins (NASA, scikit-image's
`data.astronaut`, 512x512) and Grace Hopper (US Navy, matplotlib's sample data, 512x600). All else is drawn. No photo
is large: keepers are enlarged or set into a drawn scene; `note` says so for each row, and `expected` the verdict
that the `embedded` profile must give.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as Pillow

from pipeline import sample_pictures as pictures
from schemas.columns import KEPT
from schemas.drops import DropReason

METADATA = "sample.parquet"
_BASE = "http://sample.localhost/"
_STATUS = {"failing-server.jpg": 500, "forbidden.jpg": 403}
_HEADERS = {"opted-out.jpg": {"X-Robots-Tag": "noai"}}


@dataclass(frozen=True)
class Row:
    """One row of the part. Width and height None stand for those of the picture; 0 for a null."""

    name: str
    expected: str
    note: str
    make: Callable[[], bytes] | None = None
    text: str | None = None
    width: int | None = None
    height: int | None = None
    nsfw: str | None = "UNLIKELY"
    punsafe: float | None = 0.01
    pwatermark: float | None = 0.05
    url: str | None = None


def write_sample(folder: Path) -> Path:
    """Write the files that `SampleServer` serves, and their metadata in LAION's columns; the path of the latter."""
    records = []
    for row in ROWS:
        data = row.make() if row.make else None
        if data is not None:
            (folder / row.name).write_bytes(data)
        records.append(_record(row, data))
    path = folder / METADATA
    pq.write_table(pa.Table.from_pylist(records, schema=_SCHEMA), path)
    return path


class SampleServer:
    """Serves a folder that `write_sample` filled, on a free loopback port, inside a `with` block.

    A name in the folder is answered 200, unless it is registered as failing; any other is answered 404.
    """

    def __init__(self, folder: Path) -> None:
        """Take a port; nothing is served before the block begins."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(folder))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def port(self) -> int:
        """The port that was taken."""
        return self._server.server_port

    def __enter__(self) -> "SampleServer":
        """Begin to serve."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and give the port back."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(folder: Path) -> type[BaseHTTPRequestHandler]:
    files = {path.name: path for path in folder.iterdir() if path.name != METADATA}

    class Handler(BaseHTTPRequestHandler):
        """Answers GET for the files of the folder."""

        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            """Send a file, or the status that is registered for its name."""
            name = unquote(urlsplit(self.path).path).removeprefix("/")
            status = _STATUS.get(name, 200 if name in files else 404)
            body = files[name].read_bytes() if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for field, value in _HEADERS.get(name, {}).items():
                self.send_header(field, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the ledger tells what became of each row."""

    return Handler


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


def _record(row: Row, data: bytes | None) -> dict[str, object]:
    width, height = (row.width, row.height) if row.width is not None else _turned_size(data)
    return {
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


def _turned_size(data: bytes | None) -> tuple[int, int]:
    if data is None:
        return 1200, 1200
    with Pillow.open(BytesIO(data)) as image:
        turned = image.getexif().get(pictures.ORIENTATION_TAG, 1) >= 5
        return (image.height, image.width) if turned else image.size


_NASA = "public-domain NASA photo of Eileen Collins (512x512 px)"
_NAVY = "public-domain US Navy photo of Grace Hopper (512x600 px)"

ROWS: tuple[Row, ...] = (
    Row(
        "astronaut.jpg", KEPT, f"{_NASA}, enlarged 3 times", lambda: pictures.jpeg(pictures.enlarged(pictures.astronaut(), 3)),
        text="Portrait of an astronaut in an orange suit, flag and shuttle behind her",
    ),
    Row(
        "admiral.jpg", KEPT, f"{_NAVY}, enlarged 2.5 times", lambda: pictures.jpeg(pictures.enlarged(pictures.hopper(), 2.5)),
        text="Portrait of a rear admiral in uniform",
    ),
    Row("half-body.jpg", KEPT, f"{_NASA}, mirrored, enlarged 2.3 times, in a drawn landscape", pictures.half_body),
    Row("full-scene.jpg", KEPT, f"{_NAVY}, enlarged 1.1 times, small in a drawn landscape", pictures.full_scene),
    Row("tall.jpg", KEPT, f"{_NASA}, enlarged 2.2 times, colder light, under a drawn sky", pictures.tall),
    Row("close-up.jpg", KEPT, f"{_NASA}, mirrored, the face alone, enlarged 5.2 times", pictures.close_up),
    Row(
        "lying.jpg", KEPT, f"{_NASA}, enlarged 2.4 times, stored on its side with EXIF orientation 6", pictures.on_its_side,
        nsfw=None, punsafe=None, pwatermark=None,
    ),
    Row("vignette.png", KEPT, f"{_NAVY}, enlarged 2 times, PNG with transparent corners", pictures.vignette),
    Row(
        "warm.webp", KEPT, f"{_NAVY}, mirrored, warmer light, enlarged 2.2 times, WebP of unknown size", pictures.warm_webp,
        width=0, height=0,
    ),
    Row(
        "astronaut.jpg", DropReason.DUPLICATE_URL, "the URL of the first row again",
        text="Portrait of an astronaut, again", width=1536, height=1536,
    ),
    Row(
        "small.jpg", DropReason.SMALL_IMAGE, f"{_NASA} as it is, and the metadata says so",
        lambda: pictures.jpeg(pictures.astronaut()),
    ),
    Row(
        "small-but-lying.jpg", DropReason.SMALL_IMAGE, f"{_NAVY} as it is; the metadata claims 2048x2400 px",
        lambda: pictures.jpeg(pictures.hopper()), width=2048, height=2400,
    ),
    Row("landscape.jpg", DropReason.NO_FACE, "a drawn landscape", lambda: pictures.jpeg(pictures.scene(1600, 1100))),
    Row("couple.jpg", DropReason.SEVERAL_FACES, f"{_NAVY} and {_NASA}, enlarged, in a drawn landscape", pictures.couple),
    Row(
        "tiny-face.jpg", DropReason.SMALL_FACE, f"{_NASA} at its own size in a drawn landscape",
        lambda: pictures.jpeg(pictures.set_into(pictures.scene(1400, 1100), pictures.astronaut(), 700, 1100 - 512)),
    ),
    Row(
        "truncated.jpg", DropReason.TRUNCATED_IMAGE, f"{_NASA}, enlarged 2.5 times, the file cut after three fifths",
        pictures.truncated, width=1280, height=1280,
    ),
    Row(
        "corrupt.png", DropReason.CORRUPT_IMAGE, "a drawn landscape as PNG, 4 KiB of its pixels overwritten", pictures.corrupt,
        width=1200, height=1100,
    ),
    Row("page.jpg", DropReason.NOT_AN_IMAGE, "a web page that poses as an image", pictures.html, width=1200, height=1200),
    Row("drawing.svg", DropReason.UNSUPPORTED_FORMAT, "a vector drawing", pictures.svg, width=1200, height=1200),
    Row("empty.jpg", DropReason.EMPTY_BODY, "a file without a byte", lambda: b"", width=1200, height=1200),
    Row("gone.jpg", DropReason.NOT_FOUND, "a URL that the server does not know"),
    Row("forbidden.jpg", DropReason.ACCESS_DENIED, "a URL that the server answers with 403"),
    Row("failing-server.jpg", DropReason.SERVER_ERROR, "a URL that the server answers with 500"),
    Row(
        "opted-out.jpg", DropReason.OPTED_OUT, "a drawn landscape whose site asks not to be used for AI training",
        lambda: pictures.jpeg(pictures.scene(1100, 1100)),
    ),
    Row("unsafe.jpg", DropReason.UNSAFE, "tagged NSFW by the metadata; never fetched", nsfw="NSFW"),
    Row("perhaps-unsafe.jpg", DropReason.UNSAFE, "punsafe of 0.97; never fetched", nsfw="UNSURE", punsafe=0.97),
    Row("stock-photo.jpg", DropReason.WATERMARK, "pwatermark of 0.93; never fetched", pwatermark=0.93),
    Row("old-server", DropReason.BAD_URL, "a URL that is not http", url="ftp://sample.localhost/old-server.jpg"),
    Row("nowhere", DropReason.BAD_URL, "an empty URL", url=""),
)  # fmt: skip
