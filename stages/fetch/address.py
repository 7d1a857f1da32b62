"""Where an engine may connect: URLs, redirects and addresses, checked before a packet leaves.

Addresses of the machine itself and of its network (private, loopback, link-local, multicast, reserved,
cloud metadata) are refused after the name was resolved, on every hop.
"""

import re
import socket
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urljoin

from schemas import urls
from schemas.drops import DropReason
from schemas.urls import Url
from stages.base import Dropped
from stages.settings import DownloadSettings

SAMPLE_HOST = "sample.localhost"
"""Host of the bundled sample part: no real host can have this name (RFC 6761)."""

_NUMERIC = re.compile(r"(?:0x[0-9a-f]*|[0-9]+)(?:\.(?:0x[0-9a-f]*|[0-9]+)){0,3}\.?", re.IGNORECASE)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_REFUSED_4 = tuple(map(IPv4Network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")))
"""Special purpose (and Oracle's metadata), the 6to4 relay, Azure's metadata: global by the tables of Python 3.11."""
_REFUSED_6 = tuple(map(IPv6Network, ("2002::/16", "3fff::/20")))
"""6to4, which leads to any IPv4 address, and documentation: global by the same tables."""
_NAT64 = IPv6Network("64:ff9b::/96")


def parse(text: str | None) -> Url:
    """A fetchable URL.

    Raises:
        Dropped: BAD_URL.
    """
    try:
        return urls.parse(text)
    except urls.BadUrl as error:
        raise Dropped(DropReason.BAD_URL) from error


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
        return urls.parse(urljoin(str(url), location.strip()))
    except ValueError as error:
        raise Dropped(DropReason.BAD_URL) from error


class Guard:
    """Says which addresses may be connected to, and where the bundled sample is."""

    def __init__(self, settings: DownloadSettings, sample_port: int | None) -> None:
        """Beyond the public internet, settings may allow loopback, and the sample's server has a port there."""
        self._loopback = settings.allow_loopback
        self._sample_port = sample_port

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
        plain = _embedded(address)
        if plain.is_loopback:
            return self._loopback or (self._sample_port is not None and port == self._sample_port)
        return _is_public(plain)

    def permits(self, address: str, port: int) -> bool:
        """Whether this address, written as a resolver writes it, may be connected to."""
        return self.allows(_parsed(address), port)


_parsed = lru_cache(4096)(ip_address)


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
