"""A real HTTP server on loopback that misbehaves in named ways: one path per way."""

import gzip
import io
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

PIECE = 64 << 10
HUGE = 64 << 20
Answer = Callable[[socket.socket, "HostileServer"], None]


def jpeg(side: int, noise: bool = False) -> bytes:
    """A square JPEG: a gradient (few bytes), or noise (many)."""
    pixels = np.linspace(0, 255, side * side * 3).astype(np.uint8).reshape(side, side, 3)
    if noise:
        pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


LARGE, SMALL = jpeg(1100), jpeg(300)
HTML = b"<!DOCTYPE html><html><body>Sorry, this image has moved.</body></html>"


def head(status: str = "200 OK", length: int | None = None, **fields: str) -> bytes:
    """The head of a response; a field's underscores become hyphens."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def says(status: str = "200 OK", body: bytes = b"", **fields: str) -> Answer:
    """Answer like this, properly."""
    return lambda link, server: link.sendall(head(status, len(body), **fields) + body)


def redirects(target: str, status: str = "302 Found") -> Answer:
    """Point to another place; `{here}` is this server."""
    return lambda link, server: link.sendall(head(status, 0, Location=target.format(here=server.url(""))))


def pours(prefix: bytes, announced: int | None) -> Answer:
    """Send `prefix`, then zeros, up to HUGE bytes in all or until the client hangs up; count what went out."""

    def answer(link: socket.socket, server: "HostileServer") -> None:
        link.sendall(head(length=announced, Connection="close") + prefix)
        for _ in range(HUGE // PIECE):
            server.poured += link.send(bytes(PIECE))
        link.close()

    return answer


def drips(prefix: bytes) -> Answer:
    """A byte every 50 ms, for longer than any test waits."""

    def answer(link: socket.socket, server: "HostileServer") -> None:
        link.sendall(prefix)
        for _ in range(600):
            link.sendall(b"x")
            time.sleep(0.05)

    return answer


def breaks_off(data: bytes, reset: bool = False) -> Answer:
    """Send `data` and end the connection, with a reset if so asked."""

    def answer(link: socket.socket, server: "HostileServer") -> None:
        link.sendall(data)
        if reset:
            time.sleep(0.05)  # let the data through before the reset overtakes it
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.close()

    return answer


def first_then(first: Answer, then: Answer) -> Answer:
    """Answer the first request to the path one way, and all later ones another."""

    def answer(link: socket.socket, server: "HostileServer") -> None:
        (first if server.hits[server.path_of(link)] == 1 else then)(link, server)

    return answer


_OK = says(body=LARGE, Content_Type="image/jpeg")


def _bomb(size: int, piece: int = 1 << 20) -> bytes:
    """`size` zeros by gzip: one piece is compressed, as each of the others would look."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(bytes(piece)) + packer.flush(zlib.Z_FULL_FLUSH)
    end = packer.flush() + struct.pack("<II", zlib.crc32(bytes(size)), size)
    return b"\x1f\x8b\x08" + bytes(7) + block * (size // piece) + end


BOMB = _bomb(HUGE)
ANSWERS: dict[str, Answer] = {
    "/ok.jpg": _OK,
    "/query.jpg?a=1&b=%2F": _OK,
    "/without-length.jpg": breaks_off(head(Connection="close") + LARGE),
    "/chunked.jpg": lambda link, server: link.sendall(
        head(Transfer_Encoding="chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(LARGE), LARGE)
    ),
    "/gzip.jpg": says(body=gzip.compress(LARGE), Content_Encoding="gzip"),
    "/small.jpg": says(body=SMALL),
    "/small-then-huge.jpg": pours(SMALL, len(SMALL) + HUGE),
    "/page.jpg": says(body=HTML, Content_Type="image/jpeg"),
    "/page-then-huge.jpg": pours(HTML, len(HTML) + HUGE),
    "/endless.jpg": pours(LARGE, None),
    "/announces-too-much.jpg": pours(LARGE, len(LARGE) + HUGE),
    "/bomb.jpg": says(body=BOMB, Content_Encoding="gzip"),
    "/bad-gzip.jpg": says(body=b"this is no gzip", Content_Encoding="gzip"),
    "/empty.jpg": says(),
    "/empty-without-length.jpg": breaks_off(head(Connection="close")),
    "/no-content.jpg": lambda link, server: link.sendall(head("204 No Content")),
    "/truncated.jpg": breaks_off(head(length=len(LARGE)) + LARGE[:2000]),
    "/truncated-chunk.jpg": breaks_off(head(Transfer_Encoding="chunked") + b"ffff\r\nabc"),
    "/bad-chunk.jpg": breaks_off(head(Transfer_Encoding="chunked") + b"zz\r\nabc\r\n"),
    "/truncated-once.jpg": first_then(breaks_off(head(length=len(LARGE)) + LARGE[:2000]), _OK),
    "/reset.jpg": breaks_off(b"", reset=True),
    "/hangs-up.jpg": breaks_off(b""),
    "/reset-midway.jpg": breaks_off(head(length=len(LARGE)) + LARGE[:2000], reset=True),
    "/garbage.jpg": breaks_off(b"\x00\xff SSH-2.0 this is not HTTP\r\n\r\n"),
    "/bad-length.jpg": breaks_off(head(Content_Length="many") + LARGE),
    "/drips-body.jpg": drips(head(length=len(LARGE)) + LARGE[:1000]),
    "/drips-head.jpg": drips(b"HTTP/1.1 200 OK\r\nX-Slow: "),
    "/drips-status.jpg": drips(b"HTTP"),
    "/hop1.jpg": redirects("/hop2.jpg", "301 Moved Permanently"),
    "/hop2.jpg": redirects("{here}/hop3.jpg", "307 Temporary Redirect"),
    "/hop3.jpg": redirects("ok.jpg", "308 Permanent Redirect"),
    "/loop.jpg": redirects("/loop.jpg"),
    "/to-file.jpg": redirects("file:///etc/hostname"),
    "/to-ftp.jpg": redirects("ftp://{here}/x.jpg"),
    "/to-metadata.jpg": redirects("http://169.254.169.254/latest/meta-data"),
    "/to-private.jpg": redirects("http://10.0.0.1/x.jpg"),
    "/to-private-name.jpg": redirects("http://intranet.test/x.jpg"),
    "/to-nowhere.jpg": says("302 Found"),
    "/to-nonsense.jpg": redirects("http://[bad/"),
    "/404.jpg": says("404 Not Found", HTML),
    "/410.jpg": says("410 Gone"),
    "/401.jpg": says("401 Unauthorized"),
    "/403.jpg": says("403 Forbidden", HTML),
    "/451.jpg": says("451 Unavailable For Legal Reasons"),
    "/418.jpg": says("418 I'm a teapot"),
    "/300.jpg": says("300 Multiple Choices"),
    "/500.jpg": says("500 Internal Server Error", HTML),
    "/503.jpg": says("503 Service Unavailable", Retry_After="3600"),
    "/429.jpg": says("429 Too Many Requests", Retry_After="3600"),
    "/500-once.jpg": first_then(says("500 Internal Server Error"), _OK),
    "/429-once.jpg": first_then(says("429 Too Many Requests", Retry_After="1"), _OK),
    "/noai.jpg": says(body=LARGE, X_Robots_Tag="noai, noimageai"),
    "/noindex-for-us.jpg": says(body=LARGE, X_Robots_Tag="faceshards: noindex"),
    "/noai-for-others.jpg": says(body=LARGE, X_Robots_Tag="otherbot: noai"),
    "/nofollow.jpg": says(body=LARGE, X_Robots_Tag="nofollow, max-image-preview: large"),
}


class HostileServer:
    """Serves ANSWERS (and what a test adds to `answers`), each connection in a thread; remembers what it saw."""

    backlog = 1024

    def __init__(self) -> None:
        self.answers = dict(ANSWERS)
        self.hits: Counter[str] = Counter()
        self.times: list[tuple[str, float]] = []
        self.heads: list[str] = []
        self.poured = 0
        self.answering = 0
        self._paths: dict[socket.socket, str] = {}
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=self.backlog)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def path_of(self, link: socket.socket) -> str:
        return self._paths[link]

    def close(self) -> None:
        self._listener.close()

    def settle(self) -> None:
        """Wait until no answer is under way."""
        until = time.monotonic() + 5
        while self.answering and time.monotonic() < until:
            time.sleep(0.01)

    def find(self, target: str, request: str) -> Answer:
        return self.answers.get(target, ANSWERS["/404.jpg"])

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        try:
            with link:
                for request in _requests(link):
                    self._answer(link, request)
        except OSError:
            return  # the client hung up, as it should on many of these

    def _answer(self, link: socket.socket, request: str) -> None:
        target = request.split(" ", 2)[1]
        with self._lock:
            self.hits[target] += 1
            self.times.append((target, time.monotonic()))
            self.heads.append(request)
            self._paths[link] = target
            self.answering += 1
        try:
            self.find(target, request)(link, self)
        finally:
            with self._lock:
                self.answering -= 1


def _requests(link: socket.socket) -> Iterator[str]:
    """The heads of the requests on a kept-alive connection."""
    pending = b""
    while True:
        while b"\r\n\r\n" not in pending:
            data = link.recv(PIECE) if link.fileno() >= 0 else b""
            if not data:
                return
            pending += data
        request, pending = pending.split(b"\r\n\r\n", 1)
        yield request.decode("latin-1")


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
