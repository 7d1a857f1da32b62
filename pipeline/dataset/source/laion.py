"""LAION's lists, of which Re-LAION alone should be used: known by their names, since columns are the same."""

import re
from collections.abc import Collection, Iterable

from schemas.names import fitting_name, part_name
from schemas.shard import SUFFIXES

_LAION = re.compile(r"laion|^part-\d{5}-[0-9a-f-]{36}-c000", re.IGNORECASE)
_RE_LAION = re.compile(r"re-?laion", re.IGNORECASE)

OLD_LAION = (
    "Nothing here says that the source metadata is Re-LAION (August 2024), from which 2,236 links to suspected child "
    "sexual abuse material were removed. Do not publish this dataset, or anything made of it, unless you know that it "
    "is: make it again from Re-LAION."
)


def is_old_laion(origins: Iterable[str], parts: Collection[str]) -> bool:
    """Whether the lists are LAION's, and nothing says that they are of Re-LAION.

    `origins` are where they come from, as `Part.origin` has it, `parts` their names. dataset.json does not say which
    part is of which origin: where a name is LAION's, any origin may be that of an old list, but for those that are
    known to be none. AI-made images are none, nor the sample, nor folders of images: their part has the folder's name.
    An origin that is called LAION's counts whatever it is.
    """
    doubtful = [one for one in origins if not _RE_LAION.search(one)]
    names = {one: part_name(one) for one in doubtful if not one.startswith("made:")}
    others = (one for one, name in names.items() if not {name, fitting_name(name, SUFFIXES)}.intersection(parts))
    return any(map(_LAION.search, doubtful)) or (any(map(_LAION.search, parts)) and any(others))
