"""LAION's lists, of which Re-LAION alone should be used: known by their names, since columns are the same."""

import re
from collections.abc import Iterable

_LAION = re.compile(r"laion|^part-\d{5}-[0-9a-f-]{36}-c000", re.IGNORECASE)
_RE_LAION = re.compile(r"re-?laion", re.IGNORECASE)

OLD_LAION = (
    "Nothing here says that the source metadata is Re-LAION (August 2024), from which 2,236 links to suspected child "
    "sexual abuse material were removed. Do not publish this dataset, or anything made of it, unless you know that it "
    "is: make it again from Re-LAION."
)


def is_old_laion(origins: Iterable[str], parts: Iterable[str]) -> bool:
    """Whether the lists are LAION's, and nothing says that they are of Re-LAION.

    `origins` are where they come from, as `Part.origin` has it, `parts` their names.
    """
    files_are = any(map(_LAION.search, parts))
    return any((files_are or _LAION.search(one)) and not _RE_LAION.search(one) for one in origins)
