"""Images of an existing download (img2dataset's webdataset tars), read where they lie."""

from collections import defaultdict
from collections.abc import Sequence

import fsspec

from schemas.drops import DropReason
from schemas.errors import SourceError
from stages.base import Dropped
from stages.fetch.body import Body
from stages.fetch.engine import Outcome
from stages.settings import Settings


def read(refs: Sequence[str], settings: Settings) -> list[Outcome]:
    """The outcome of each `<path or fsspec URL>#<offset>:<size>`, in their order; "" is a row without an image.

    Raises:
        SourceError: when a tar cannot be opened or read.
    """
    outcomes: list[Outcome] = [Dropped(DropReason.NOT_IN_TAR)] * len(refs)
    members_of: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for index, ref in enumerate(refs):
        if ref:
            path, _, span = ref.rpartition("#")
            offset, _, size = span.partition(":")
            members_of[path].append((int(offset), int(size), index))
    for path, members in members_of.items():
        try:
            with fsspec.open(path, "rb") as tar:
                # In the order of the tar: one pass, also over a remote file.
                for start, length, index in sorted(members):
                    outcomes[index] = _member(tar, start, length, settings)
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read ({error}): restore the existing download, or fetch anew."
            ) from error
    return outcomes


def _member(tar: fsspec.core.OpenFile, offset: int, size: int, settings: Settings) -> Outcome:
    body = Body(settings)
    try:
        body.announce(size)
        tar.seek(offset)
        data = tar.read(size)
        # A tar that was cut off (its writer was killed) does not hold the image that its index names.
        if len(data) < size:
            return Dropped(DropReason.NOT_IN_TAR)
        body.feed(data)
        return body.finish()
    except Dropped as dropped:
        return dropped
