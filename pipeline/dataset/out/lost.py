"""Trouble of OUT that concerns the whole run, not one shard."""

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EBUSY, EDQUOT, EIO, ENODEV, ENOSPC, EROFS, ESTALE

from pipeline.shared.files import AnyPath, RemotePath
from schemas.errors import LostError, first_line

_FULL, _READ_ONLY = (ENOSPC, EDQUOT), (EROFS,)
_DISK_LOST = (*_FULL, *_READ_ONLY, EIO, ENODEV, ESTALE)
"""Errors of a disk that concern whatever comes next too."""


@contextmanager
def lost_errors(root: AnyPath) -> Iterator[None]:
    """Turn trouble of OUT that no other shard would escape into a `LostError` of one sentence."""
    try:
        yield
    except OSError as error:
        remedy = _remedy(root, error)
        if remedy is None:
            raise
        trouble = error.strerror or first_line(error)
        raise LostError(
            f"OUT {root} cannot be written any more ({trouble}), so the run stops; finished shards are kept: {remedy}, "
            "and the same command goes on."
        ) from error


def _remedy(root: AnyPath, error: OSError) -> str | None:
    """What the user can do; None for trouble that concerns one shard alone."""
    if error.errno in _FULL:
        return "make room"
    if error.errno in _READ_ONLY:
        return "make it writable"
    if isinstance(root, RemotePath):  # its file system has tried again by itself
        return None if error.errno == EBUSY else "see to it"
    if not (root / "shards").is_dir():
        return "bring it back"
    return "see to it" if error.errno in _DISK_LOST else None
