"""Files on any file system that fsspec knows; every failure to reach one is a `SourceError` of one sentence."""

import csv
import difflib
import errno
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import SourceError, first_line

UNREADABLE = (OSError, EOFError, ValueError, zlib.error, tarfile.TarError, csv.Error, pa.ArrowException)
"""What unreadable, truncated or corrupt files raise, in all formats that are read here; ValueError: text and URLs."""


_FOREIGN = (
    ("aiohttp", "ClientError"),
    ("azure.core.exceptions", "AzureError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
)
"""Errors of remote file systems (no credentials, no route) that are no OSError; known once their module is loaded."""


def unreadable() -> tuple[type[BaseException], ...]:
    """All errors that mean: this file or folder cannot be read."""
    foreign = [getattr(sys.modules[module], name) for module, name in _FOREIGN if module in sys.modules]
    return (*UNREADABLE, *foreign)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what an unreadable file raises into a `SourceError` that names the file."""
    try:
        yield
    except unreadable() as error:
        raise SourceError(f"{path} cannot be read: {first_line(error)}.") from error


def locate(path: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it.

    Raises:
        SourceError: when the protocol is unknown, its package is not installed, or the URL is malformed.
    """
    try:
        fs, inside = fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise SourceError(f"{path} needs a package that is not installed here ({first_line(error)}).") from error
    except unreadable() as error:
        raise SourceError(f"{path} cannot be reached: {first_line(error)}{_near_protocol(path)}.") from error
    return fs, inside


def _near_protocol(path: str) -> str:
    protocol, known = path.split("://")[0], fsspec.available_protocols()
    near = [] if protocol in known else difflib.get_close_matches(protocol, known, n=3)
    return f"; did you mean {' or '.join(f'{name}://' for name in near)}" if near else ""


def full_path(fs: Any, inside: str, word: str = "") -> str:
    """The path with its protocol; local paths are absolute and have none."""
    if "::" in word:
        # A chain such as simplecache::https://… is known to the word alone.
        return word
    return inside if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(inside))


def open_binary(path: str) -> Any:
    """Open a file for reading bytes, seekable."""
    fs, inside = locate(path)
    return fs.open(inside, "rb")


def open_text_lines(path: str) -> Any:
    """Open a text file for reading bytes, decompressed when its name ends in `.gz`."""
    fs, inside = locate(path)
    if path.lower().endswith(".gz"):
        return fsspec.core.OpenFile(fs, inside, "rb", compression="gzip").open()
    return fs.open(inside, "rb")


def kind_of(path: str) -> Literal["file", "directory"] | None:
    """What stands at a path; None for nothing.

    Raises:
        SourceError: when the file system cannot tell (no access, no connection).
    """
    fs, inside = locate(path)
    with reading(path):
        try:
            return "directory" if fs.info(inside)["type"] == "directory" else "file"
        except FileNotFoundError as error:
            # Over HTTP, a server that does not answer is "not found" too; only the cause tells.
            if isinstance(error.__cause__, OSError) and error.__cause__.errno not in (None, errno.ENOENT):
                raise error.__cause__ from error
            return None


def listing(folder: str, limit: int = 6) -> str:
    """What stands directly in a folder, for an error message: its first names, or why there are none."""
    if kind_of(folder) is None:
        return "it does not exist"
    fs, inside = locate(folder)
    names = sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(inside, detail=False))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"found there: {', '.join(names[:limit])}{more}" if names else "it is empty"
