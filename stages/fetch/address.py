"""Where an engine may connect: URLs, redirects and addresses, checked before a packet leaves.

Addresses of the machine itself and of its network (private, loopback, link-local, multicast, reserved,
cloud metadata) are refused after the name was resolved, on every hop.
"""

import re
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import quote, urljoin, urlsplit

from yarl import URL

from schemas.drops import DropReason
from stages.base import Dropped
from stages.settings import DownloadSettings

SAMPLE_HOST = "sample.localhost"
"""Host of the bundled sample part: no real host can have this name (RFC 6761)."""

_KEPT = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"<>\\^`{|}')
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+", re.IGNORECASE)
_NUMERIC = re.compile(r"(?:0x[0-9a-f]*|[0-9]+)(?:\.(?:0x[0-9a-f]*|[0-9]+)){0,3}\.?", re.IGNORECASE)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_REFUSED_4 = tuple(map(IPv4Network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")))
"""Special purpose (and Oracle's metadata), the 6to4 relay, Azure's metadata: global by the tables of Python 3.11."""
_REFUSED_6 = tuple(map(IPv6Network, ("2002::/16", "3fff::/20")))
"""6to4, which leads to any IPv4 address, and documentation: global by the same tables."""
_NAT64 = IPv6Network("64:ff9b::/96")


def parse(text: str | None) -> URL:
    """A fetchable URL; what is already percent-encoded stays as it is, as signatures in URLs need.

    Raises:
        Dropped: BAD_URL when it is missing, malformed, or neither http nor https.
    """
    written = (text or "").strip()
    try:
        url, exact = URL(written), urlsplit(written)
        path, query = quote(exact.path or "/", safe=_KEPT), quote(exact.query, safe=_KEPT)
    except ValueError as error:
        raise Dropped(DropReason.BAD_URL) from error
    if url.scheme not in ("http", "https") or not _HOST.fullmatch(url.raw_host or "") or _CONTROL.search(written):
        raise Dropped(DropReason.BAD_URL)
    return URL.build(scheme=url.scheme, authority=url.raw_authority, path=path, query_string=query, encoded=True)


def redirected(url: URL, location: str | None, hops: int, settings: DownloadSettings) -> URL:
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

    def route(self, url: URL) -> URL:
        """Where to connect for a URL: itself, or the loopback server of the bundled sample.

        Raises:
            Dropped: FORBIDDEN_ADDRESS when the host is written as a number that stands for a refused address.
        """
        if url.raw_host == SAMPLE_HOST and self._sample_port is not None:
            return url.with_scheme("http").with_host("127.0.0.1").with_port(self._sample_port)
        literal = _literal(url.raw_host or "")
        if literal is not None and not self.allows(literal, url.port):
            raise Dropped(DropReason.FORBIDDEN_ADDRESS)
        return url

    def allows(self, address: IPv4Address | IPv6Address, port: int | None) -> bool:
        """Whether this address may be connected to."""
        plain = _embedded(address)
        if plain.is_loopback:
            return self._loopback or (self._sample_port is not None and port == self._sample_port)
        if isinstance(plain, IPv4Address):
            return plain.is_global and not plain.is_multicast and not any(plain in net for net in _REFUSED_4)
        return plain.is_global and plain in _GLOBAL_UNICAST and not any(plain in net for net in _REFUSED_6)

    def check(self, address: str, port: int | None) -> None:
        """Raise `Dropped` (FORBIDDEN_ADDRESS) unless this numeric address may be connected to."""
        if not self.allows(ip_address(address), port):
            raise Dropped(DropReason.FORBIDDEN_ADDRESS)


def _embedded(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv4-mapped or NAT64 address leads to; others as they are."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address


def _literal(host: str) -> IPv4Address | IPv6Address | None:
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
