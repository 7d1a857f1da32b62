"""Where an engine may connect: URLs, redirects and addresses, checked before a packet leaves.

Addresses of the machine itself and of its network (private, loopback, link-local, multicast, reserved,
cloud metadata) are refused after the name was resolved, on every hop.
"""

import re
import socket
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from yarl import URL

from schemas.drops import DropReason
from stages.base import Dropped
from stages.settings import DownloadSettings

SAMPLE_HOST = "sample.localhost"
"""Host of the bundled sample part: no real host can have this name (RFC 6761)."""

_LONGEST = 8192
"""Characters of a URL; servers refuse longer ones, and redirects could make them grow."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SERVICES = """
    0 1 7 9 11 13 15 17 19 20 21 22 23 25 37 42 43 53 69 77 79 87 95 101 102 103 104 109 110 111 113 115 117 119 123 135
    137 139 143 161 179 389 427 465 512 513 514 515 526 530 531 532 540 548 554 556 563 587 601 636 989 990 993 995 1719
    1720 1723 2049 3659 4045 4190 5060 5061 6000 6566 6665 6666 6667 6668 6669 6679 6697 10080
"""
_OTHER_SERVICES = frozenset(map(int, _SERVICES.split()))
"""Ports of other services than the web, which browsers refuse: https://fetch.spec.whatwg.org/#port-blocking (2025).

All others are allowed, as images do lie on odd ports; a URL must not make us speak to a mail server."""

_KEPT = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"<>\\^`{|}')
_PLAIN = re.compile(
    rf"(https?)://([A-Za-z0-9._-]+)(?::([0-9]{{1,5}}))?(/[{re.escape(_KEPT.translate({35: None, 63: None}))}]*"
    rf"(?:\?[{re.escape(_KEPT.translate({35: None}))}]+)?)(?:#[^\x00-\x1f\x7f]*)?"
)
"""A URL that is sent as it is written; nearly all are."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+", re.IGNORECASE)
_NUMERIC = re.compile(r"(?:0x[0-9a-f]*|[0-9]+)(?:\.(?:0x[0-9a-f]*|[0-9]+)){0,3}\.?", re.IGNORECASE)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_REFUSED_4 = tuple(map(IPv4Network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")))
"""Special purpose (and Oracle's metadata), the 6to4 relay, Azure's metadata: global by the tables of Python 3.11."""
_REFUSED_6 = tuple(map(IPv6Network, ("2002::/16", "3fff::/20")))
"""6to4, which leads to any IPv4 address, and documentation: global by the same tables."""
_NAT64 = IPv6Network("64:ff9b::/96")


Origin = tuple[str, str, int]
"""Scheme, host and port."""


class Url(NamedTuple):
    """A URL that may be fetched."""

    scheme: str
    """http or https."""
    host: str
    """A name in ASCII or an address, lower case; IPv6 without brackets."""
    port: int
    target: str
    """Path and query, as they are sent."""

    @property
    def authority(self) -> str:
        """Host, and port where it is not the scheme's own: the value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> Origin:
        """Scheme, host and port: what has one robots.txt, and one set of connections."""
        return self[:3]

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


def parse(text: str | None) -> Url:
    """A fetchable URL; what is already percent-encoded stays as it is, as signatures in URLs need.

    Raises:
        Dropped: BAD_URL when it is missing, malformed, neither http nor https, with a user's name, or to a port
            that belongs to another service.
    """
    written = (text or "").strip()
    if len(written) > _LONGEST:
        raise Dropped(DropReason.BAD_URL)
    plain = _PLAIN.fullmatch(written)
    if plain is None:
        return _checked(_unusual(written))
    scheme, host, port, target = plain.groups()
    return _checked(Url(scheme, host.lower(), int(port) if port else _DEFAULT_PORTS[scheme], target))


def _unusual(written: str) -> Url:
    """A URL that needs quoting, IDNA, or a refusal."""
    try:
        url, exact = URL(written), urlsplit(written)
        path, query = quote(exact.path or "/", safe=_KEPT), quote(exact.query, safe=_KEPT)
        port = url.port
    except ValueError as error:
        raise Dropped(DropReason.BAD_URL) from error
    host = (url.raw_host or "").lower()
    if url.scheme not in _DEFAULT_PORTS or not _HOST.fullmatch(host) or _CONTROL.search(written):
        raise Dropped(DropReason.BAD_URL)
    # A name and password in a URL are somebody's: they are not for us to use.
    if port is None or url.raw_user is not None or url.raw_password is not None:
        raise Dropped(DropReason.BAD_URL)
    return Url(url.scheme, host, port, f"{path}?{query}" if query else path)


def _checked(url: Url) -> Url:
    if url.port in _OTHER_SERVICES or url.port > 0xFFFF:
        raise Dropped(DropReason.BAD_URL)
    return url


def redirected(url: Url, location: str | None, hops: int, settings: DownloadSettings) -> Url:
    """Where a redirect with this Location leads; `hops` are the redirects followed so far.

    Raises:
        Dropped: REDIRECT_LOOP after too many, HTTP_ERROR without a target, BAD_URL for one that cannot be fetched.
    """
    if hops >= settings.max_redirects:
        raise Dropped(DropReason.REDIRECT_LOOP)
    if not location:
        raise Dropped(DropReason.HTTP_ERROR)
    try:
        return parse(urljoin(str(url), location.strip()))
    except ValueError as error:
        raise Dropped(DropReason.BAD_URL) from error


class Guard:
    """Says which addresses may be connected to, and where the bundled sample is."""

    def __init__(self, settings: DownloadSettings) -> None:
        """Keep what is allowed beyond the public internet."""
        self._loopback = settings.allow_loopback
        self._sample_port = settings.sample_port

    def route(self, url: Url) -> Url:
        """Where to connect for a URL: itself, or the loopback server of the bundled sample.

        Raises:
            Dropped: FORBIDDEN_ADDRESS when the host is written as a number that stands for a refused address.
        """
        if url.host == SAMPLE_HOST and self._sample_port is not None:
            return Url("http", "127.0.0.1", self._sample_port, url.target)
        address = literal(url.host)
        if address is not None and not self.allows(address, url.port):
            raise Dropped(DropReason.FORBIDDEN_ADDRESS)
        return url

    def allows(self, address: IPv4Address | IPv6Address, port: int) -> bool:
        """Whether this address may be connected to."""
        plain = _embedded(address)
        if plain.is_loopback:
            return self._loopback or (self._sample_port is not None and port == self._sample_port)
        return _is_public(plain)

    def permits(self, address: str, port: int) -> bool:
        """Whether this address, written as a resolver writes it, may be connected to."""
        return self.allows(_address(address), port)


@lru_cache(4096)
def _address(text: str) -> IPv4Address | IPv6Address:
    return ip_address(text)


@lru_cache(4096)
def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast and not any(address in net for net in _REFUSED_4)
    return address.is_global and address in _GLOBAL_UNICAST and not any(address in net for net in _REFUSED_6)


@lru_cache(4096)
def _embedded(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv4-mapped or NAT64 address leads to; others as they are."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address


@lru_cache(4096)
def literal(host: str) -> IPv4Address | IPv6Address | None:
    """The address that a host spells out, also as the C library reads it (2130706433, 0x7f.1, 0177.0.0.1)."""
    try:
        return ip_address(host)
    except ValueError:
        if not _NUMERIC.fullmatch(host):
            return None
    try:
        return IPv4Address(socket.inet_aton(host.rstrip(".")))
    except OSError:
        return None
