"""The hostile web: named ways in which servers, names and addresses misbehave, and what must come of each.

Everything lies on loopback. Names end in `.test` and are looked up in a stub: a host is called `<behaviour>-<n>.test`,
and all its URLs behave that way.
"""

import errno
import gzip
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import servers
from servers import breaks_off, drips, head, pours, redirects, says

TIMEOUT_S = 8.0
MAX_BYTES = 2_000_000
ROWS_PER_HOST = 4
"""Few enough that no host fails ten times in a row: verdicts depend on the behaviour alone."""


class Behaviour(NamedTuple):
    """What the web does, and what becomes of a row that meets it."""

    verdict: str | None
    """The reason of its drop, None where it is kept."""
    answer: Any
    """How the server answers its URLs; None where no request may ever arrive."""
    url: str = "http://{host}:{port}/{name}/{n}.jpg"
    robots: Any = None
    """How the server answers robots.txt, if not with 404."""
    says_no: bool = False
    """Refused: once that is known, nobody asks for the URL again."""


def silent(link: socket.socket, server: Any) -> None:
    """Never answer; wait until the client hangs up."""
    while link.recv(1000):
        pass


def floods(line: bytes, times: int, first: bytes = b"HTTP/1.1 200 OK\r\n") -> Callable[[socket.socket, Any], None]:
    """Send `first`, then a line again and again."""

    def answer(link: socket.socket, server: Any) -> None:
        link.sendall(first)
        block = line * max(1, servers.PIECE // len(line))
        for _ in range(max(1, times * len(line) // len(block))):
            server.poured += link.send(block)
        link.close()

    return answer


_LARGE = servers.LARGE
_OK = says(body=_LARGE)
_CHUNKED = head(Transfer_Encoding="chunked")
_NO = b"User-agent: *\nDisallow: /\n"
_BOMB = servers.BOMB
_NESTED = gzip.compress(_BOMB)

BEHAVIOURS: dict[str, Behaviour] = {
    # good, though unusual
    "fine": Behaviour(None, _OK),
    "chunked": Behaviour(
        None, lambda link, _: link.sendall(_CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(_LARGE), _LARGE))
    ),
    "zipped": Behaviour(None, says(body=gzip.compress(_LARGE), Content_Encoding="gzip")),
    "zipped-in-members": Behaviour(
        None, says(body=gzip.compress(_LARGE[:999]) + gzip.compress(_LARGE[999:]), Content_Encoding="gzip")
    ),
    "unknown-coding": Behaviour(None, says(body=_LARGE, Content_Encoding="image/jpeg")),
    "unannounced-length": Behaviour(None, breaks_off(head(Connection="close") + _LARGE)),
    "closes-silently": Behaviour(None, breaks_off(head(length=len(_LARGE)) + _LARGE)),
    "interim": Behaviour(
        None, lambda link, _: link.sendall(head("103 Early Hints") + head(length=len(_LARGE)) + _LARGE)
    ),
    "more-than-announced": Behaviour(
        None, breaks_off(head(length=len(_LARGE)) + _LARGE + b"HTTP/1.1 200 OK\r\n\r\n" * 9)
    ),
    "redirect": Behaviour(None, redirects("{here}/fine/1.jpg", "301 Moved Permanently")),
    "fails-once": Behaviour(None, servers.first_then(says("503 Service Unavailable"), _OK)),
    "mixed-addresses": Behaviour(None, _OK),
    "rebinding": Behaviour(None, _OK),
    "robots-flood": Behaviour(None, _OK, robots=pours(b"# ", None)),
    "robots-for-others": Behaviour(None, _OK, robots=says(body=b"User-agent: otherbot\nDisallow: /\n")),
    # slow
    "drips-body": Behaviour("timeout", drips(head(length=len(_LARGE)) + _LARGE[:1000])),
    "drips-head": Behaviour("timeout", drips(b"HTTP/1.1 200 OK\r\nX-Slow: ")),
    "drips-chunks": Behaviour("timeout", drips(_CHUNKED + b"ffff\r\n")),
    "silent": Behaviour("timeout", silent),
    "holds-back-the-rest": Behaviour("timeout", lambda link, _: (link.sendall(head(length=9) + b"x"), silent(link, _))),
    "never-connects": Behaviour("timeout", None, "http://{host}:{full}/{name}/{n}.jpg"),
    "tls-stall": Behaviour("timeout", None, "https://{host}:{port}/{name}/{n}.jpg"),
    "robots-drips": Behaviour("timeout", None, robots=drips(b"HTTP/1.1 200 OK\r\nX: ")),
    # broken connections
    "refuses": Behaviour("connection_error", None, "http://{host}:{dead}/{name}/{n}.jpg"),
    "resets": Behaviour("connection_error", breaks_off(b"", reset=True)),
    "hangs-up": Behaviour("connection_error", breaks_off(b"")),
    "hangs-up-in-head": Behaviour("connection_error", breaks_off(b"HTTP/1.1 200 OK\r\nX-")),
    "tls-garbage": Behaviour("connection_error", None, "https://{host}:{greeting}/{name}/{n}.jpg"),
    "truncated": Behaviour("incomplete_body", breaks_off(head(length=len(_LARGE)) + _LARGE[:2000])),
    "truncated-chunk": Behaviour("incomplete_body", breaks_off(_CHUNKED + b"ffff\r\nabc")),
    "truncated-zip": Behaviour("incomplete_body", says(body=gzip.compress(_LARGE)[:-9], Content_Encoding="gzip")),
    "resets-midway": Behaviour("incomplete_body", breaks_off(head(length=len(_LARGE)) + _LARGE[:2000], reset=True)),
    # too much
    "endless": Behaviour("too_many_bytes", pours(_LARGE, None)),
    "announces-too-much": Behaviour("too_many_bytes", pours(_LARGE, servers.HUGE)),
    "zip-bomb": Behaviour("too_many_bytes", says(body=_BOMB, Content_Encoding="gzip")),
    "zip-bomb-in-chunks": Behaviour(
        "too_many_bytes",
        lambda link, _: link.sendall(
            head(Content_Encoding="gzip", Transfer_Encoding="chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(_BOMB), _BOMB)
        ),
    ),
    "zipped-twice": Behaviour("http_error", says(body=_NESTED, Content_Encoding="gzip, gzip")),
    "header-flood": Behaviour("http_error", floods(b"X-Flood: 1\r\n", 5_000_000)),
    "long-header": Behaviour("http_error", floods(b"x", 64_000_000, b"HTTP/1.1 200 OK\r\nX-Long: ")),
    "many-headers": Behaviour("http_error", breaks_off(head(**{f"X{n}": "" for n in range(400)}, Connection="close"))),
    "interim-flood": Behaviour("http_error", floods(b"HTTP/1.1 100 Continue\r\n\r\n", 2_000_000, b"")),
    "chunk-flood": Behaviour("http_error", floods(b"1\r\n\1\r\n", 5_000_000, _CHUNKED)),
    "chunk-line-flood": Behaviour("http_error", floods(b"x", 64_000_000, _CHUNKED + b"5;")),
    "trailer-flood": Behaviour("http_error", floods(b"X: 1\r\n", 9_000_000, _CHUNKED + b"1\r\n\1\r\n0\r\n")),
    # no sense
    "garbage": Behaviour("http_error", breaks_off(b"\x00\xff this is not HTTP\r\n\r\n")),
    "greets-first": Behaviour("http_error", None, "http://{host}:{greeting}/{name}/{n}.jpg"),
    "two-lengths": Behaviour("http_error", breaks_off(head(Content_Length="5", content_length="6") + b"\1" * 6)),
    "bad-length": Behaviour("http_error", breaks_off(head(Content_Length="-1") + _LARGE)),
    "both-lengths": Behaviour("http_error", says(body=_LARGE, Transfer_Encoding="chunked")),
    "bad-chunk": Behaviour("http_error", breaks_off(_CHUNKED + b"zz\r\nabc\r\n")),
    "bad-chunk-later": Behaviour(
        "http_error",
        lambda link, _: (link.sendall(_CHUNKED + b"1\r\n\1\r\n"), time.sleep(0.1), link.sendall(b"zz\r\n")),
    ),
    "bad-zip": Behaviour("http_error", says(body=b"this is no gzip", Content_Encoding="gzip")),
    "switches-protocols": Behaviour("http_error", breaks_off(head("101 Switching Protocols") + _LARGE)),
    "teapot": Behaviour("http_error", says("418 I'm a teapot")),
    "loop": Behaviour("redirect_loop", lambda link, server: redirects(server.path_of(link))(link, server)),
    "empty": Behaviour("empty_body", says()),
    "page": Behaviour("not_an_image", says(body=servers.HTML, Content_Type="image/jpeg")),
    "small": Behaviour("small_image", pours(servers.SMALL, None)),
    "gone": Behaviour("not_found", says("410 Gone")),
    "overloaded": Behaviour("server_error", says("500 Internal Server Error", servers.HTML)),
    "too-many-requests": Behaviour("rate_limited", says("429 Too Many Requests", Retry_After="86400")),
    "robots-fails": Behaviour("server_error", None, robots=says("500 Internal Server Error")),
    # where we must not go
    "no-url": Behaviour("bad_url", None, "{name}/{n}"),
    "other-scheme": Behaviour("bad_url", None, "file:///{name}/{n}.jpg"),
    "other-service": Behaviour("bad_url", None, "http://{host}:25/{name}/{n}.jpg"),
    "with-password": Behaviour("bad_url", None, "http://user:secret@{host}:{port}/{name}/{n}.jpg"),
    "to-file": Behaviour("bad_url", redirects("file:///etc/hostname")),
    "to-data": Behaviour("bad_url", redirects("data:image/png;base64,AAAA")),
    "to-mail": Behaviour("bad_url", redirects("http://{here}:25/".replace("{here}", "127.0.0.1"))),
    "no-such-name": Behaviour("dns_error", None, "http://no-such-name-{n}.test/x.jpg"),
    "private-name": Behaviour("forbidden_address", None, says_no=True),
    "metadata": Behaviour("forbidden_address", None, "http://169.254.169.254/{name}/{n}.jpg", says_no=True),
    "hexadecimal-private": Behaviour("forbidden_address", None, "http://0xa.{n}:{port}/{name}/{n}.jpg", says_no=True),
    "to-private": Behaviour("forbidden_address", redirects("http://10.0.0.1/x.jpg"), says_no=True),
    "to-private-name": Behaviour("forbidden_address", redirects("http://private-name-1.test/x.jpg"), says_no=True),
    "to-number": Behaviour("forbidden_address", redirects("http://2852039166/latest/meta-data"), says_no=True),
    "to-mapped": Behaviour("forbidden_address", redirects("http://[::ffff:169.254.169.254]/"), says_no=True),
    # where we are not wanted
    "noai": Behaviour("opted_out", says(body=_LARGE, X_Robots_Tag="noai"), says_no=True),
    "noindex-for-us": Behaviour("opted_out", says(body=_LARGE, X_Robots_Tag="faceshards: noindex"), says_no=True),
    "to-noai": Behaviour(
        "opted_out", lambda link, server: redirects("/noai" + server.path_of(link))(link, server), says_no=True
    ),
    "forbidden": Behaviour("access_denied", says("403 Forbidden", servers.HTML), says_no=True),
    "robots-no": Behaviour("robots_txt", None, robots=says(body=_NO), says_no=True),
}


Ports = dict[str, int]
"""What the places in a URL stand for: port (all behaviours), full, dead, greeting."""


def rows(per_behaviour: int, ports: Ports) -> Iterator[tuple[str, str]]:
    """(behaviour, URL) of each row: all behaviours mixed, ROWS_PER_HOST rows to a host.

    In the second half the URLs that are refused in the first come once more.
    """
    for n in range(per_behaviour):
        for name, behaviour in BEHAVIOURS.items():
            yield name, row(name, n % (per_behaviour // 2) if behaviour.says_no else n, ports)


def row(name: str, n: int, ports: Ports) -> str:
    """The URL of one row."""
    return BEHAVIOURS[name].url.format(name=name, n=n, host=f"{name}-{n // ROWS_PER_HOST}.test", **ports)


def refused(requests: Counter[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """How often each URL was asked for that is refused: by its own answer, or by its host's robots.txt."""
    return {
        (host, path): times
        for (host, path), times in requests.items()
        if path != "/robots.txt" and BEHAVIOURS[path.split("/")[1]].says_no
    }


class World(servers.HostileServer):
    """A server of all behaviours, and the ports and names that go with it."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: Counter[tuple[str, str]] = Counter()
        """(host, path) -> how often it was asked for."""
        full, self._stuffing = full_listener()
        self._greeting = greeting_listener()
        greeting = self._greeting.getsockname()[1]
        self.ports: Ports = {"port": self.port, "full": full, "dead": servers.free_port(), "greeting": greeting}

    def find(self, target: str, request: str) -> Any:
        host = request.split("\r\nHost: ", 1)[-1].split("\r\n", 1)[0].partition(":")[0]
        self.requests[host, target] += 1
        name = target.split("/")[1]
        if name == "robots.txt":
            behaviour = BEHAVIOURS.get(host.rpartition("-")[0])
            return behaviour.robots if behaviour and behaviour.robots else servers.ANSWERS["/404.jpg"]
        return BEHAVIOURS[name].answer

    def close(self) -> None:
        super().close()
        for listener in (*self._stuffing, self._greeting):
            listener.close()


@contextmanager
def elsewhere() -> Iterator[tuple[Ports, Counter[tuple[str, str]]]]:
    """A World in a process of its own: its ports, and what was asked for, which is filled in at the end."""
    command = [sys.executable, __file__]
    requests: Counter[tuple[str, str]] = Counter()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield json.loads(server.stdout.readline()), requests
            answer, _ = server.communicate("")
            requests.update({(host, path): times for host, path, times in json.loads(answer)})
        finally:
            server.kill()


def full_listener() -> tuple[int, list[socket.socket]]:
    """A port whose queue is full: whoever connects now is never answered."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    stuffing = [listener]
    for _ in range(4):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(listener.getsockname())
        stuffing.append(client)
    time.sleep(0.05)
    return listener.getsockname()[1], stuffing


def greeting_listener() -> socket.socket:
    """A listener that talks first, as mail servers do."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)

    def greet() -> None:
        while True:
            try:
                link, _ = listener.accept()
                with link:
                    link.sendall(b"220 mail.test ESMTP ready\r\n")
                    link.shutdown(socket.SHUT_WR)
                    link.settimeout(0.2)
                    while link.recv(1000):
                        pass
            except OSError:
                if listener.fileno() < 0:
                    return

    threading.Thread(target=greet, daemon=True).start()
    return listener


class Names:
    """Stands in for the resolver and for connect: names come from the behaviour, nothing goes beyond loopback."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        """Addresses of all connections."""
        self.looked_up: Counter[str] = Counter()
        self._lookup, self._connect = socket.getaddrinfo, socket.socket.connect

    def addresses(self, host: str) -> list[str]:
        if not host.endswith(".test"):
            return [host]
        name = host.rpartition("-")[0]
        return {
            "private-name": ["10.0.0.1", "192.168.0.1"],
            "mixed-addresses": ["10.0.0.1", "127.0.0.1", "169.254.169.254"],
            "rebinding": ["127.0.0.1"] if self.looked_up[host] == 1 else ["10.0.0.1"],
            "no-such-name": [],
        }.get(name, ["127.0.0.1"])

    def getaddrinfo(self, host: str, port: Any, *_: Any, **__: Any) -> list[Any]:
        self.looked_up[host] += 1
        found = self.addresses(host)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        flags = socket.AI_NUMERICHOST
        return [place for each in found for place in self._lookup(each, port, type=socket.SOCK_STREAM, flags=flags)]

    def connect(self, link: socket.socket, place: Any) -> None:
        self.tried[place[0]] += 1
        if not place[0].startswith("127."):
            raise OSError(errno.EACCES, "beyond loopback")
        self._connect(link, place)

    def install(self) -> None:
        socket.getaddrinfo = self.getaddrinfo
        names = self
        socket.socket.connect = lambda link, place: names.connect(link, place)

    def remove(self) -> None:
        socket.getaddrinfo, socket.socket.connect = self._lookup, self._connect


if __name__ == "__main__":
    world = World()
    print(json.dumps(world.ports), flush=True)
    sys.stdin.read()
    print(json.dumps([[host, path, times] for (host, path), times in world.requests.items()]), flush=True)
