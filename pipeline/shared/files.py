"""The files of OUT: on a local disk, or behind an fsspec URL (`s3://bucket/faces`).

A local file is a `Path`. `Remote` has as much of a Path's interface as its readers use, so that they read both alike.
Writing differs: a local file gets a temporary name, fsync and a rename; an object is put whole, or not at all. Either
way no name ever holds a part of a file, and a manifest that is written last proves all that it names.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EBUSY, EDQUOT, EIO, ENODEV, ENOSPC, EROFS, ESTALE
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shared.atomic import TEMPORARY, sync, sync_folder, write_atomically
from pipeline.shared.source_files import locate, unreadable
from schemas.errors import LostError, OutputError, SourceError, first_line

_BLOCK_BYTES = 2**24
"""Read ahead over a network: a request per 16 MiB."""
_FULL, _READ_ONLY = (ENOSPC, EDQUOT), (EROFS,)
_LOST = (*_FULL, *_READ_ONLY, EIO, ENODEV, ESTALE)
"""Errors of a disk that concern whatever comes next too."""


class Stat(NamedTuple):
    """What is known of an object."""

    st_size: int


@dataclass(frozen=True, order=True)
class Remote:
    """A file or folder behind an fsspec URL. Trouble with reaching it is an OSError, whatever the file system raises.

    The file system is looked up when it is needed, so that a Remote can be sent to other processes.
    """

    url: str
    """Without a slash at its end."""

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last piece of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """As that of a Path."""
        return Path(self.name).suffix

    @property
    def stem(self) -> str:
        """As that of a Path."""
        return Path(self.name).stem

    @property
    def is_private(self) -> bool:
        """Whether other processes see other files under this URL."""
        return self.url.startswith("memory:")

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return bool(self._call("isfile"))

    def is_dir(self) -> bool:
        """Whether there is anything below this URL: object stores know no empty folders."""
        return bool(self._call("isdir"))

    def exists(self) -> bool:
        """Whether there is such an object, or anything below it."""
        return bool(self._call("exists"))

    def stat(self) -> Stat:
        """The size of an object."""
        return Stat(int(self._call("info")["size"]))

    def iterdir(self) -> Iterator["Remote"]:
        """What lies right in this folder; nothing where there is none."""
        return (self / name for name in self.sizes())

    def glob(self, pattern: str) -> Iterator["Remote"]:
        """The files in this folder whose names match `pattern`, which holds no slash."""
        return (self / name for name in self.sizes() if fnmatchcase(name, pattern))

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of the files right in this folder, sorted; empty where there is none."""
        try:
            entries = self._call("ls", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        files = {entry["name"].rpartition("/")[2]: entry for entry in entries if entry["type"] == "file"}
        return {name: int(entry["size"]) for name, entry in sorted(files.items()) if name}

    def open(self, mode: str = "rb") -> Any:
        """Open for reading and seeking."""
        return self._call("open", mode, block_size=_BLOCK_BYTES)

    def read_bytes(self) -> bytes:
        """The whole content."""
        return bytes(self._call("cat_file"))

    def write_bytes(self, data: bytes) -> None:
        """Put the whole content: whoever reads finds the old one or the new."""
        self._call("pipe_file", data)

    def upload(self, path: Path) -> None:
        """Put the content of a local file."""
        with _reached(self.url):
            fs, inside = locate(self.url)
            fs.put_file(str(path), inside)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            self._call("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        with _reached(self.url):
            fs, inside = locate(self.url)
            fs.invalidate_cache()  # other processes write here too
            return getattr(fs, method)(inside, *args, **options)


Place = Path | Remote
AnyPlace = TypeVar("AnyPlace", Path, Remote, Place)


@contextmanager
def _reached(url: str) -> Iterator[None]:
    """Turn what a file system raises of its own into OSErrors."""
    try:
        yield
    except OSError:
        raise
    except NotImplementedError as error:
        raise OSError(f"{url} can only be read") from error
    except SourceError as error:
        raise OSError(str(error)) from error
    except unreadable() as error:
        raise OSError(f"{url}: {first_line(error)}") from error


def place(text: str) -> Place:
    """The folder that a path or URL stands for; it need not exist.

    Raises:
        OutputError: when the URL's protocol is not known, or its package is not installed.
    """
    protocol, colon, _ = text.partition(":/")
    if not colon or not protocol.isalnum() or len(protocol) == 1:
        return Path(text)
    if protocol == "file":
        return Path(text.removeprefix("file://"))
    if not text.startswith(f"{protocol}://"):
        raise OutputError(f"{text!r} is neither a folder nor a URL: give a folder, or a URL such as s3://bucket/faces.")
    try:
        locate(text)
    except SourceError as error:
        raise OutputError(str(error)) from error
    return Remote(text.rstrip("/"))


def sizes(folder: Place) -> Callable[[str], int | None]:
    """What tells the bytes of a file in a folder by its name: asked each time on a disk, listed once over a network."""
    if isinstance(folder, Remote):
        return folder.sizes().get
    return lambda name: (folder / name).stat().st_size if (folder / name).is_file() else None


def parquet(file: Place) -> pq.ParquetFile:
    """Open a parquet file; a remote one is fetched as a whole.

    Raises:
        OSError: when it cannot be read.
    """
    return pq.ParquetFile(pa.BufferReader(file.read_bytes()) if isinstance(file, Remote) else file)


@contextmanager
def local(file: Place) -> Iterator[Path]:
    """The file itself, or a copy of a remote one, for libraries that want a path."""
    if isinstance(file, Path):
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        copy.write(file.read_bytes())
        copy.flush()
        yield _path(copy)


def _path(stream: Any) -> Path:
    """A path to an open file without a name."""
    return Path(f"/proc/self/fd/{stream.fileno()}")


def write(file: Place, data: bytes) -> None:
    """Write a file so that its name holds the old content or the new, never a part."""
    if isinstance(file, Remote):
        file.write_bytes(data)
    else:
        write_atomically(file, data)


class Draft:
    """A file in the making: written at `path`, and put in its place when it is whole."""

    def __init__(self, target: Place) -> None:
        """Prepare the file; one for a remote place has no name, so that nothing is left of it, whoever is killed."""
        self.target = target
        if isinstance(target, Remote):
            self.stream = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  # `close` closes it
            self.path = _path(self.stream)
        else:
            self.path = target.with_name(f"{TEMPORARY}{target.name}.{os.getpid()}")
            self.stream = self.path.open("wb")

    def sync(self) -> None:
        """Have on the disk what was written to `stream`, or at `path`."""
        sync(self.stream)

    def put(self) -> None:
        """Give it its name."""
        if isinstance(self.target, Remote):
            self.target.upload(self.path)
        else:
            self.path.replace(self.target)

    def close(self) -> None:
        """Remove what was not put."""
        try:
            self.stream.close()
        finally:
            if isinstance(self.target, Path):
                self.path.unlink(missing_ok=True)


def settle(folder: Place) -> None:
    """Have the names in a folder on the disk."""
    if isinstance(folder, Path):
        sync_folder(folder)


@contextmanager
def kept(root: Place) -> Iterator[None]:
    """Turn trouble of OUT that no other shard would escape into a `LostError` of one sentence."""
    try:
        yield
    except OSError as error:
        how = _how_to_go_on(root, error)
        if how is None:
            raise
        trouble = error.strerror or first_line(error)
        raise LostError(
            f"OUT {root} cannot be written any more ({trouble}), so the run stops; finished shards are kept: {how}, "
            "and the same command goes on."
        ) from error


def _how_to_go_on(root: Place, error: OSError) -> str | None:
    if error.errno in _FULL:
        return "make room"
    if error.errno in _READ_ONLY:
        return "make it writable"
    if isinstance(root, Remote):  # its file system has tried again by itself
        return None if error.errno == EBUSY else "see to it"
    if not (root / "shards").is_dir():
        return "bring it back"
    return "see to it" if error.errno in _LOST else None
