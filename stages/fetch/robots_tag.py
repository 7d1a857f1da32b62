"""The wish of a site not to be used for AI training, as X-Robots-Tag says it."""

import re
from collections.abc import Iterable

DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
"""Directives that opt out (img2dataset's list)."""

_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_WORD = re.compile(r"[a-z0-9_-]+")


def opted_out(tags: Iterable[str], user_agent: str) -> bool:
    """Whether any X-Robots-Tag value holds an opt-out that is meant for everyone, or for `user_agent`.

    `name: directive, ...` is meant for the bot of that name alone, up to the next name.
    """
    return any(_one(tag.lower(), user_agent.lower()) for tag in tags)


def _one(tag: str, user_agent: str) -> bool:
    meant = True
    for piece in tag.split(","):
        name, colon, rest = (part.strip() for part in piece.partition(":"))
        if colon and name in _WITH_VALUE:
            continue
        if colon:
            meant = name == "*" or name in _WORD.findall(user_agent)
        if meant and (rest if colon else name) in DIRECTIVES:
            return True
    return False
