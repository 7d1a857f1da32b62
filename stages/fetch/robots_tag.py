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
    our_words = _WORD.findall(user_agent.lower())
    for tag in tags:
        is_meant = True
        for piece in tag.lower().split(","):
            name, colon, rest = (part.strip() for part in piece.partition(":"))
            if colon and name in _WITH_VALUE:
                continue
            if colon:
                is_meant = name == "*" or name in our_words
            if is_meant and (rest if colon else name) in DIRECTIVES:
                return True
    return False
