"""What the head of an answer means for a row, and which failures are tried again."""

import errno
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from schemas.drops import Dropped, DropReason
from stages.settings import DownloadSettings

TRANSIENT = frozenset(
    {DropReason.CONNECTION_ERROR, DropReason.RATE_LIMITED, DropReason.SERVER_ERROR, DropReason.INCOMPLETE_BODY}
)
"""Reasons that a further attempt may avert; no other is ever retried within a run's first pass."""

HOST_TROUBLE = TRANSIENT | {DropReason.TIMEOUT}
"""What counts against a host. All else shows that it is up."""

SECOND_CHANCE = HOST_TROUBLE | {DropReason.DNS_ERROR, DropReason.HOST_DOWN}
"""Reasons that a pass hours later may avert: the network's and the host's trouble, never a refusal."""

LOCAL_TROUBLE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL})
"""This machine's own trouble (no more files, ports, memory): stops the shard, never drops a row."""

LONGEST_REST_S = 600.0
"""Of a host; also the longest that a Retry-After is heeded without another request."""
_BACK_OFF_S = 0.25
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_REASONS = {
    **dict.fromkeys((401, 402, 403, 451), DropReason.ACCESS_DENIED),
    **dict.fromkeys((404, 410), DropReason.NOT_FOUND),
    429: DropReason.RATE_LIMITED,
    **dict.fromkeys(range(500, 600), DropReason.SERVER_ERROR),
}
DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Of X-Robots-Tag: the wish of a site not to be used for AI training (img2dataset's list, and `none`: noindex)."""

_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_WORD = re.compile(r"[a-z0-9_-]+")


class Refused(Dropped):
    def __init__(self, reason: DropReason, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        """How long the server wants to be left alone, seconds."""


def rest_s(failure: Dropped) -> float:
    """How long a server wants to be left alone, seconds, as far as that is heeded; 0 where it does not say."""
    return min(failure.retry_after_s or 0.0, LONGEST_REST_S) if isinstance(failure, Refused) else 0.0


def check_status(status: int, retry_after: str | None) -> bool:
    """Whether a status is a redirect; a drop for all that is neither one nor 2xx."""
    if 200 <= status < 300:
        return False
    if status in _REDIRECTS:
        return True
    raise Refused(_REASONS.get(status, DropReason.HTTP_ERROR), _seconds(retry_after))


def opted_out(tags: Iterable[str], agent: str) -> bool:
    """Whether any X-Robots-Tag value holds an opt-out that is meant for everyone, or for this User-Agent.

    `name: directive, ...` is meant for the bot of that name alone, up to the next name.
    """
    our_words = _WORD.findall(agent.lower())
    for tag in tags:
        is_meant = True
        for piece in tag.lower().split(","):
            name, colon, rest = (part.strip() for part in piece.partition(":"))
            if colon and (name in _WITH_VALUE or " " in name):  # the latter is half of a date: `Fri, 25 Jun 2010 15:00`
                continue
            if colon:
                is_meant = name == "*" or name in our_words
            if is_meant and (rest if colon else name) in DIRECTIVES:
                return True
    return False


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After (RFC 9110, 10.2.3: seconds or a date) in seconds from now; None when absent or malformed."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def wait_s(failure: Dropped, attempt: int, settings: DownloadSettings, left_s: float) -> float:
    """How long to wait before the attempt after `attempt` (from 0), seconds.

    Raises:
        Dropped: the failure itself, when it is not transient, retries are used up, or the wait would pass the deadline.
    """
    if failure.reason not in TRANSIENT or attempt >= settings.retries:
        raise failure
    retry_after_s = failure.retry_after_s if isinstance(failure, Refused) else None
    wait: float = _BACK_OFF_S * 2**attempt if retry_after_s is None else retry_after_s
    if wait >= left_s:
        raise failure
    return wait


def user_agent(settings: DownloadSettings) -> str:
    """The User-Agent header, with the contact that site owners can write to."""
    return f"{settings.user_agent} ({settings.contact})" if settings.contact else settings.user_agent


def bare(dropped: Dropped) -> Dropped:
    """The same drop without its traceback, whose frames would keep the body in memory as long as the outcome lives."""
    dropped.__cause__ = dropped.__context__ = dropped.__traceback__ = None
    return dropped
