"""Files of a local disk whose names hold the old content or the new, never a part."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp-"
"""How names begin that a killed process may leave behind."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that its name holds the old content or the new, never a part."""
    replace_atomically(path, lambda temporary: temporary.write_bytes(data))


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_atomically`, for content that `write` puts into the path it is given."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            fsync_file(stream)
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_file(stream: IO[bytes]) -> None:
    """Have everything written to `stream` on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def fsync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
