"""Where an engine may connect: URLs, redirects and addresses, checked before a packet leaves.

Addresses of the machine itself and of its network (private, loopback, link-local, multicast, reserved,
cloud metadata) are refused after the name was resolved, on every hop.
"""

import re
import socket
from collections.abc import Container
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import urljoin

from schemas import urls
from schemas.drops import Dropped, DropReason
from schemas.urls import Url
from stages.settings import DownloadSettings

SAMPLE_HOST = "sample.localhost"
"""Host of the bundled sample part: no real host can have this name (RFC 6761)."""

_NUMERIC = re.compile(r"(?:0x[0-9a-f]*|[0-9]+)(?:\.(?:0x[0-9a-f]*|[0-9]+)){0,3}\.?", re.IGNORECASE)
_REFUSED: tuple[Container[Any], ...] = (
    *map(IPv4Network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")),
    *map(IPv6Network, ("2002::/16", "3fff::/20")),
)
"""Special purpose (and Oracle's metadata), the 6to4 relay, Azure's metadata; 6to4, which leads to any IPv4 address, and
documentation: global by the tables of Python 3.11."""
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")


def parse(text: str | None) -> Url:
    """A fetchable URL, or a drop as BAD_URL."""
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

    def allows(self, address: str | IPv4Address | IPv6Address, port: int) -> bool:
        is_public = _is_public(address)
        return self._loopback or port == self._sample_port if is_public is None else is_public


@lru_cache(4096)
def _is_public(address: str | IPv4Address | IPv6Address) -> bool | None:
    """Of an address, or of the IPv4 address that an IPv4-mapped or NAT64 one leads to; None for loopback."""
    leads_to = ip_address(address)
    if isinstance(leads_to, IPv6Address):
        is_nat64 = leads_to in _NAT64
        leads_to = IPv4Address(int(leads_to) & 0xFFFFFFFF) if is_nat64 else leads_to.ipv4_mapped or leads_to
    if leads_to.is_loopback:
        return None
    if leads_to.version == 6 and leads_to not in _GLOBAL_UNICAST:
        return False
    return leads_to.is_global and not leads_to.is_multicast and not any(leads_to in network for network in _REFUSED)


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
