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
        if error.errno in _FULL:
            remedy = "make room"
        elif error.errno in _READ_ONLY:
            remedy = "make it writable"
        elif isinstance(root, RemotePath):
            if error.errno == EBUSY:  # it concerns one shard alone; all else its file system has tried again by itself
                raise
            remedy = "see to it"
        elif not (root / "shards").is_dir():
            remedy = "bring it back"
        elif error.errno in _DISK_LOST:
            remedy = "see to it"
        else:
            raise
        trouble = error.strerror or first_line(error)
        raise LostError(
            f"OUT {root} cannot be written any more ({trouble}), so the run stops; finished shards are kept: {remedy}, "
            "and the same command goes on."
        ) from error
