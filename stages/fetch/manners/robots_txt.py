"""robots.txt (RFC 9309): what a site allows us to fetch. Hostile files are read within bounds; no sockets here."""

import re
import time
from collections import OrderedDict
from collections.abc import Iterator
from threading import Lock
from typing import NamedTuple
from urllib.parse import quote

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch.address import Origin, Url
from stages.settings import DownloadSettings

PATH = "/robots.txt"
MOST_BYTES = 500 << 10
"""So much of a robots.txt is read."""
LARGE = 16 << 10
"""A file of more bytes takes milliseconds to parse, too long for a loop that others wait for."""
MOST_REDIRECTS = 5
LIMIT_S = 10.0
"""Deadline of a robots.txt, if download.timeout_s is not shorter."""

_KEPT_S = 24 * 3600.0
"""RFC 9309, 2.4."""
_FAILED_S = 60.0
"""How long a host whose robots.txt could not be had is left alone."""
_MOST_HOSTS = 20_000
_MOST_KEPT = 32 << 20
"""Characters of rules that are remembered, of all hosts together."""
_MOST_RULES = 20_000
_MOST_WILDCARDS = 10_000
_LONGEST_PATTERN = 2_000

_LINE_END = re.compile(r"\r\n|\r|\n")
_LINE = re.compile(r"[ \t]*([A-Za-z -]{1,20}?)[ \t]*:[ \t]*([^#]*)")
_AGENT = re.compile(r"\*|[A-Za-z_-]+")
_KEYS = {
    **dict.fromkeys(("user-agent", "useragent", "user agent"), "agent"),
    "allow": "allow",
    **dict.fromkeys(("disallow", "dissallow", "dissalow", "disalow", "diasllow", "disallaw"), "disallow"),
}
"""Keys that matter, as sites write them (Google's parser takes the same misspellings)."""
_ENCODED = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_ASCII = "".join(map(chr, range(0x21, 0x7F)))


class Rule(NamedTuple):
    """One Allow or Disallow line."""

    allows: bool
    pieces: tuple[str, ...]
    """The pattern between its `*`."""
    anchored: bool
    """It ends with `$`: nothing may follow."""
    weight: int
    """Its length: the longest rule that matches decides."""

    def matches(self, target: str) -> bool:
        """Whether a path with its query, normalised, is meant."""
        first, *later = self.pieces
        if not target.startswith(first):
            return False
        if not later:
            return not self.anchored or len(target) == len(first)
        *middle, last = later
        place = len(first)
        for piece in middle:
            place = target.find(piece, place)
            if place < 0:
                return False
            place += len(piece)
        if self.anchored:
            return len(target) - len(last) >= place and target.endswith(last)
        return target.find(last, place) >= 0


class Rules:
    """What one robots.txt says to us."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        """Put the rule that decides first: the longest, and of equal ones that which allows (RFC 9309, 2.2.2)."""
        self._rules = tuple(sorted(rules, key=lambda rule: (-rule.weight, not rule.allows)))
        self.weight = sum(rule.weight for rule in rules)

    def allow(self, target: str) -> bool:
        """Whether this path with its query may be fetched."""
        if not self._rules:
            return True
        plain = _normal(target)
        return next((rule.allows for rule in self._rules if rule.matches(plain)), True) or plain == PATH


ALL = Rules(())
"""Nothing is disallowed."""
NOTHING = Rules((Rule(False, ("/",), False, 1),))
"""All is disallowed."""


def parse(text: bytes, name: str) -> Rules:
    """The rules for the robot of this name, or for all robots where it is not named.

    More rules than we are ready to go through for every URL are taken as a no to everything.
    """
    lines = text[:MOST_BYTES].decode("utf-8-sig", "replace")
    groups: dict[str, list[Rule]] = {}
    agents: set[str] = set()
    within_rules = False
    for key, value in _pairs(lines):
        if key == "agent":
            agents = {value} if within_rules else agents | {value}
            groups.setdefault(value, [])
            within_rules = False
            continue
        within_rules = True
        if value:
            rule = _rule(key == "allow", value)
            for agent in agents & {name.lower(), "*"}:
                groups[agent].append(rule)
    rules = groups.get(name.lower(), groups.get("*", []))
    return NOTHING if _is_too_much(rules) else Rules(tuple(rules))


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for line in _LINE_END.split(text):
        found = _LINE.match(line)
        key = _KEYS.get(found[1].lower()) if found else None
        if found is None or key is None:
            continue
        value = found[2].strip()
        if key == "agent":
            agent = _AGENT.match(value)
            value = agent[0].lower() if agent else ""
        yield key, value


def _rule(allows: bool, pattern: str) -> Rule:
    anchored = pattern.endswith("$")
    plain = _normal(pattern[:-1] if anchored else pattern)
    plain = plain if plain.startswith(("/", "*")) else f"/{plain}"
    return Rule(allows, tuple(re.sub(r"\*+", "*", plain).split("*")), anchored, len(plain) + anchored)


def _is_too_much(rules: list[Rule]) -> bool:
    return (
        len(rules) > _MOST_RULES
        or sum(len(rule.pieces) - 1 for rule in rules) > _MOST_WILDCARDS
        or any(rule.weight > _LONGEST_PATTERN for rule in rules)
    )


def _normal(path: str) -> str:
    """A path in which equal ones are equal: %41 is A, %c3 is %C3, and ü is %C3%BC."""
    path = quote(path, safe=_ASCII)
    return _ENCODED.sub(_decoded, path) if "%" in path else path


def _decoded(found: re.Match[str]) -> str:
    character = chr(int(found[1], 16))
    return character if character in _UNRESERVED else found[0].upper()


def name_of(user_agent: str) -> str:
    """Our name in robots.txt: the first word of the User-Agent, up to a slash."""
    found = re.match(r"[A-Za-z_-]+", user_agent)
    return found[0].lower() if found else "*"


class Asking:
    """What both engines need to ask for robots.txt files, and what they were told."""

    def __init__(self, told: DownloadSettings) -> None:
        """Know nothing."""
        self._told = told.model_copy(update={"max_redirects": MOST_REDIRECTS})
        self._limit_s = min(LIMIT_S, told.timeout_s)
        self._name = name_of(told.user_agent)
        self._said = Said()


class Said:
    """What the hosts said in their robots.txt, or why it could not be had; bounded, and safe for threads."""

    def __init__(self) -> None:
        """Know nothing."""
        self._known: OrderedDict[Origin, tuple[float, Rules | DropReason]] = OrderedDict()
        self._weight = 0
        self._lock = Lock()

    def get(self, origin: Origin) -> Rules | DropReason | None:
        """What is known of a host; None when it is to be asked."""
        until, said = self._known.get(origin, (0.0, None))
        return said if until > time.monotonic() else None

    def put(self, origin: Origin, said: Rules | DropReason) -> None:
        """Remember what a host said, and forget the oldest if that is too much."""
        kept_s = _KEPT_S if isinstance(said, Rules) else _FAILED_S
        with self._lock:
            self._drop(origin)
            self._known[origin] = time.monotonic() + kept_s, said
            self._weight += _weight(said)
            while len(self._known) > _MOST_HOSTS or (self._weight > _MOST_KEPT and len(self._known) > 1):
                self._drop(next(iter(self._known)))

    def _drop(self, origin: Origin) -> None:
        _, gone = self._known.pop(origin, (0.0, ALL))
        self._weight -= _weight(gone)


def _weight(said: Rules | DropReason) -> int:
    return said.weight if isinstance(said, Rules) else 0


def judge(failure: DropReason, hops: int) -> Rules | DropReason:
    """What it means that a robots.txt could not be had, after so many redirects (RFC 9309, 2.3.1).

    A host that says no to robots.txt (4xx), or sends us in circles or astray, has none: all is allowed. Where a
    server fails, the RFC wants everything disallowed: its rows are dropped for that failure, which a later pass may
    find mended. A host that cannot be reached has failed for its images too.
    """
    unreachable = failure in (DropReason.FORBIDDEN_ADDRESS, DropReason.DNS_ERROR)
    return failure if failure in _FAILED or (unreachable and hops == 0) else ALL


_FAILED = frozenset(
    {
        DropReason.SERVER_ERROR,
        DropReason.RATE_LIMITED,
        DropReason.TIMEOUT,
        DropReason.CONNECTION_ERROR,
        DropReason.INCOMPLETE_BODY,
    }
)


def check(said: Rules | DropReason, url: Url) -> None:
    """Raise `Dropped` when a URL may not be fetched: ROBOTS_TXT, or why that is not known."""
    if isinstance(said, DropReason):
        raise Dropped(said)
    if not said.allow(url.target):
        raise Dropped(DropReason.ROBOTS_TXT)
