"""The one form of a URL: how it is sent, and how two of them are compared, however they are written."""

import re
from ipaddress import ip_address
from typing import NamedTuple
from unicodedata import normalize
from urllib.parse import quote, unquote_to_bytes, urlsplit

_LONGEST = 8192
"""Characters of a URL; servers refuse longer ones, and redirects could make them grow."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SERVICES = """
    0 1 7 9 11 13 15 17 19 20 21 22 23 25 37 42 43 53 69 77 79 87 95 101 102 103 104 109 110 111 113 115 117 119 123 135
    137 139 143 161 179 389 427 465 512 513 514 515 526 530 531 532 540 548 554 556 563 587 601 636 989 990 993 995 1719
    1720 1723 2049 3659 4045 4190 5060 5061 6000 6566 6665 6666 6667 6668 6669 6679 6697 10080
"""
OTHER_SERVICES = frozenset(map(int, _SERVICES.split()))
"""Ports of other services than the web, which browsers refuse: https://fetch.spec.whatwg.org/#port-blocking (2025).

All others are allowed, as images do lie on odd ports; a URL must not make us speak to a mail server."""

_SENT = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"<>\\^`{|}')
"""Characters that are sent as they are written, `%` among them: signatures in URLs need their exact encoding."""
_PLAIN = re.compile(
    rf"(https?)://([A-Za-z0-9._-]+)(?::([0-9]{{1,5}}))?(/[{re.escape(_SENT.translate({35: None, 63: None}))}]*"
    rf"(?:\?[{re.escape(_SENT.translate({35: None}))}]+)?)(?:#[^\x00-\x1f\x7f]*)?"
)
"""A URL that is sent as it is written; nearly all are."""
_COMPARED = re.compile(r"https?://([A-Za-z0-9.-]+)((?:/[^\s%?#\\]*)?)(\?[!\"$-~]*)?", re.ASCII)
"""URLs that are compared without a parser; nearly all."""
_DOT = re.compile(r"/(?:\.|%2e)", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_AUTHORITY = re.compile(r"(?:(.*)@)?(?:\[([^][@]*)\]|([^][:@]*))(?::([0-9]*))?", re.DOTALL)
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]")
"""Letters and marks that nobody sees: with one of them a host would look like another."""
_DELIMITER = re.compile("%(2b|3d|26|3b)", re.IGNORECASE)
_UNDECODED = re.compile("[\udc80-\udcff]")

Origin = tuple[str, str, int]
"""Scheme, host and port: what has one robots.txt, and one set of connections."""


class BadUrl(ValueError):
    """A URL that cannot be fetched."""


class Url(NamedTuple):
    scheme: str
    """http or https."""
    host: str
    """A name in ASCII or an address, lower case; IPv6 without brackets."""
    port: int
    target: str
    """Path and query, as they are sent."""

    @property
    def origin(self) -> Origin:
        return self[:3]

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.target}"


def parse(text: str | None) -> Url:
    """A fetchable URL; what is already percent-encoded stays as it is, and dot segments are resolved.

    Raises:
        BadUrl: when it is missing, malformed, neither http nor https, with a user's name, or to a port that belongs
            to another service.
    """
    written = (text or "").strip()
    if len(written) > _LONGEST:
        raise BadUrl(f"longer than {_LONGEST} characters")
    plain = _PLAIN.fullmatch(written)
    if plain and not _DOT.search(plain[4]):
        url = Url(plain[1], plain[2].lower(), int(plain[3] or _DEFAULT_PORTS[plain[1]]), plain[4])
    else:
        scheme, user, host, port, path, query = _split(written)
        # A name and password in a URL are somebody's: they are not for us to use.
        if user or _CONTROL.search(written):
            raise BadUrl("a user's name or a control character")
        try:
            path, query = quote(path, safe=_SENT), quote(query, safe=_SENT)
        except UnicodeEncodeError as error:
            raise BadUrl("text that is none") from error
        target = f"{path}?{query}" if query else path
        url = Url(scheme, host, _DEFAULT_PORTS[scheme] if port is None else port, target)
    if url.port in OTHER_SERVICES or url.port > 0xFFFF:
        raise BadUrl("a port of another service than the web")
    return url


def identity(text: str) -> str:
    """What all spellings of a URL have in common: scheme, user, default port and fragment do not count.

    Host in lower case, path and query decoded. It is for comparing and hashing, not for fetching. Text that is no http
    URL is itself, without white space around it.
    """
    compared = _COMPARED.fullmatch(text)
    if compared and compared[2].isascii() and "/." not in compared[2]:
        query = compared[3] or ""
        if "%" in query or "+" in query:
            query = _decoded_query(query)
        return f"{compared[1].lower().rstrip('.')}{compared[2] or '/'}{'' if query == '?' else query}"
    try:
        _, _, host, number, path, query = _split(text.strip())
        path = _decoded(path)
        query = _decoded_query(f"?{query}") if query else ""
    except ValueError:
        return text.strip()
    port = "" if number in (None, *_DEFAULT_PORTS.values()) else f":{number}"
    return f"{host.rstrip('.')}{port}{path}{query}"


def host_of(text: str) -> str:
    """The host of an http URL as `identity` has it, empty where there is none."""
    compared = _COMPARED.fullmatch(text)
    if compared:
        return compared[1].lower().rstrip(".")
    try:
        return _split(text.strip())[2].rstrip(".")
    except BadUrl:
        return ""


def _split(written: str) -> tuple[str, str | None, str, int | None, str, str]:
    """Scheme, user, host, port (None where it is not written), path and query.

    The path has no dot segments, and is `/` where there is none; else both are as they are written.
    """
    try:
        scheme, netloc, path, query, _ = urlsplit(written)
        authority = _AUTHORITY.fullmatch(netloc)
        if scheme not in _DEFAULT_PORTS or authority is None or "\\" in netloc:
            raise BadUrl("not the address of a web server")
        user, address, name, port = authority.groups()
        host = ip_address(address).compressed if address else _ascii(name or "")
    except ValueError as error:  # of urlsplit and ip_address, too
        raise BadUrl(str(error)) from error
    if not _HOST.fullmatch(host) or int(port or 0) > 0xFFFF:
        raise BadUrl("neither a name nor an address")
    return scheme, user, host, int(port) if port else None, _resolved(path or "/"), query


def _ascii(host: str) -> str:
    """A host as browsers look it up: UTS 46, non-transitional (sharp s and final sigma are letters of their own)."""
    if host.isascii():
        return host.lower()
    if len(host) > 253:  # the time of what follows grows with the square
        raise BadUrl("a host that is too long")
    folded = (c if c in "ßς" else "ß" if c == "ẞ" else c.casefold() for c in normalize("NFKC", host))
    mapped = normalize("NFKC", "".join(folded))
    labels = mapped.replace("。", ".").split(".")
    if not mapped.isprintable() or _UNSEEN.search(host) or "" in labels[:-1]:
        raise BadUrl("a host with characters that are not seen")
    labels = [label if label.isascii() else f"xn--{label.encode('punycode').decode()}" for label in labels]
    if max(map(len, labels)) > 63:
        raise BadUrl("a host that is too long")
    return ".".join(labels)


def _resolved(path: str) -> str:
    """A path without `.` and `..`, also encoded ones: servers refuse them, or resolve them."""
    if not _DOT.search(path):
        return path
    names: list[str] = []
    for segment in path[1:].split("/"):
        name = segment.lower().replace("%2e", ".")
        if name == "..":
            del names[-1:]
        elif name != ".":
            names.append(segment)
    if name in (".", ".."):
        names.append("")
    return "/" + "/".join(names)


def _decoded(text: str) -> str:
    """Percent-encoding resolved once, where it stands for UTF-8."""
    decoded = unquote_to_bytes(text).decode("utf-8", "surrogateescape")
    return _UNDECODED.sub(lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", decoded)


def _decoded_query(query: str) -> str:
    """`+` is a space, and an encoded delimiter no delimiter."""
    return _decoded(_DELIMITER.sub(lambda code: f"%25{code[1].upper()}", query.replace("+", " ")))
