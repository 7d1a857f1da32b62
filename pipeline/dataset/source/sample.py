"""The bundled part `sample`: its rows, and the loopback server that its pictures come from.

Two photos inside installed packages are in the public domain: the astronaut Eileen Collins (NASA, scikit-image's
`data.astronaut`, 512x512) and Grace Hopper (US Navy, matplotlib's sample data, 512x600). All else is drawn. No photo
is large: keepers are enlarged or set into a drawn scene; `note` in sample.csv says so for each row, and `expected` the
verdict that the `embedded` profile must give.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.dataset.source import sample_pictures as pictures

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
    for name, make in pictures.FILES.items():
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
