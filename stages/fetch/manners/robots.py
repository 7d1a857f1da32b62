"""robots.txt (RFC 9309): fetched once per scheme, host and port, before the first of its URLs, and read by Protego."""

import asyncio
import re
from functools import partial

from protego import Protego

from schemas.drops import Dropped, DropReason
from schemas.urls import Origin, Url
from stages.fetch.address import redirected
from stages.fetch.answer import HOST_TROUBLE, check_status
from stages.fetch.http.client import Client
from stages.fetch.http.deadline import Deadline
from stages.fetch.manners.hosts import Hosts
from stages.fetch.once import Once
from stages.settings import DownloadSettings

PATH = "/robots.txt"
MOST_BYTES = 500 << 10
"""So much of a robots.txt is read (RFC 9309, 2.5)."""
_MOST_RECEIVED = 2 * MOST_BYTES
"""What may come until that is there, however little download.max_bytes allows for an image."""
_MOST_WORK = 50_000
"""Rules, counted once for each robot of their group, and wildcards: more than that would take seconds to read."""
_LONGEST_LINE = 2_000
_LARGE = 16 << 10
"""A file of more bytes takes milliseconds to read, too long for a loop that others wait for."""
_MOST_REDIRECTS = 5
LIMIT_S = 10.0
"""Deadline of a robots.txt, if download.timeout_s is not shorter."""
_AT_A_TIME = 128
"""Requests for robots.txt; they hold no slot of download.concurrency."""

_KEPT_S = 24 * 3600.0
"""RFC 9309, 2.4."""
_MOST_HOSTS = 20_000
_MOST_KEPT = 8 << 20
"""Bytes of robots.txt files whose rules are remembered, of all hosts together; rules take some ten times as much."""

_AGENT = re.compile(r"[ \t]*user[- ]?agent\b", re.IGNORECASE)
_VERSION = re.compile(r"^([ \t]*user[- ]?agent[ \t]*:[ \t]*[^\s/#]+)/[^\s#]*", re.IGNORECASE | re.MULTILINE)
_UNROOTED = re.compile(r"^([ \t]*(?:dis)?allow[ \t]*:[ \t]*)(?=[^/*$#\s])", re.IGNORECASE | re.MULTILINE)
_NOTHING = b"User-agent: *\nDisallow: /"
"""Of what cannot be read all may be meant."""
_NOT_UNDONE = frozenset({"br", "zstd", "compress"})
"""Codings that come although they were not requested: browsers would read what is in them."""
_UNREACHABLE = frozenset({DropReason.FORBIDDEN_ADDRESS, DropReason.DNS_ERROR})


class Rules:
    """What one robots.txt says to us."""

    def __init__(self, text: bytes = b"", name: str = "*") -> None:
        self.size = len(text)
        # Sites mean these too, though Protego does not read them: `User-agent: name/1.0`, `Disallow: folder`.
        encoding = "utf-16" if text.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        plain = _UNROOTED.sub(r"\1/", _VERSION.sub(r"\1", text.decode(encoding, "replace")))
        # More rules than we are ready to go through are a no to everything.
        plain = _NOTHING.decode() if _is_too_much(plain) else plain
        self._rules = Protego.parse(plain) if plain else None
        self._name = name

    def allow(self, url: Url) -> bool:
        return self._rules is None or self._rules.can_fetch(str(url), self._name)


def _is_too_much(text: str) -> bool:
    agents, work, is_within_agents = 0, 0, False
    for line in text.splitlines():
        if _AGENT.match(line):
            agents, is_within_agents = (agents + 1 if is_within_agents else 1), True
            work += agents
        elif line.strip() and not line.lstrip().startswith("#"):
            is_within_agents = False
            work += agents + line.count("*") ** 2
            if agents and len(line.partition("#")[0]) > _LONGEST_LINE:
                return True
        if work > _MOST_WORK:
            return True
    return False


ALL = Rules()
"""Nothing is disallowed."""


def name_of(user_agent: str) -> str:
    """Our name in robots.txt: the first word of the User-Agent, up to a slash."""
    name = re.search(r"[^\s/]+", user_agent)
    return name[0].lower() if name else "*"


class Robots:
    """Fetches each host's robots.txt while its URLs wait; used on the loop alone."""

    def __init__(self, client: Client, hosts: Hosts, settings: DownloadSettings) -> None:
        self._client = client
        self._hosts = hosts
        self._settings = settings.model_copy(update={"max_redirects": _MOST_REDIRECTS})
        self._name = name_of(settings.user_agent)
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self._known = Once(self._learn, _KEPT_S, _MOST_KEPT, lambda rules: max(rules.size, _MOST_KEPT // _MOST_HOSTS))

    async def check(self, url: Url) -> None:
        """Wait until it is known whether this URL may be fetched.

        Raises:
            Dropped: ROBOTS_TXT when it may not, or why the host's robots.txt could not be had.
        """
        if self._settings.respect_robots and not (await self._known.get(url.origin)).allow(url):
            raise Dropped(DropReason.ROBOTS_TXT)

    async def _learn(self, origin: Origin) -> Rules:
        trail = [Url(*origin, PATH)]
        deadline = Deadline(min(LIMIT_S, self._settings.timeout_s))
        try:
            async with self._turns:
                text = await deadline.persist(partial(self._attempt, trail, deadline), self._settings)
        except Dropped as failure:
            # A host that says no to robots.txt (4xx), or sends us in circles or astray, has none: all is allowed. Where
            # a server fails, the RFC (2.3.1) wants everything disallowed: its rows are dropped for that failure, which
            # a later pass may find mended. A host that cannot be reached has failed for its images too.
            if failure.reason in HOST_TROUBLE or (failure.reason in _UNREACHABLE and len(trail) == 1):
                raise
            return ALL
        if len(text) < _LARGE:
            return Rules(text, self._name)
        return await asyncio.get_running_loop().run_in_executor(None, Rules, text, self._name)

    async def _attempt(self, trail: list[Url], deadline: Deadline) -> bytes:
        """The first bytes of a robots.txt, behind its redirects."""
        del trail[1:]
        text = bytearray()
        while True:
            url = trail[-1]
            async with self._hosts.connections(url.host), deadline.running(), self._client.get(url) as answer:
                if not check_status(answer.status, answer.headers.get("Retry-After")):
                    if answer.headers.get("Content-Encoding", "").strip().lower() in _NOT_UNDONE:
                        return _NOTHING
                    async for piece in answer.pieces(_MOST_RECEIVED):
                        text += piece
                        if len(text) >= MOST_BYTES:
                            break
                    return bytes(text[:MOST_BYTES])
                trail.append(redirected(url, answer.location, len(trail) - 1, self._settings))
