"""Files on a local disk or behind an fsspec URL (`s3://bucket/faces`): all that this project has of fsspec.

OUT and datasets are an `AnyPath`: a `Path`, or a `RemotePath` with as much of its interface as readers use. Trouble
with either is an OSError, with the latter a `RemoteError`. Writing differs: a local file gets a temporary name, fsync
and a rename; an object is put whole, or not at all. In both cases no name ever holds a part of a file, and a manifest
that is written last proves all that it names.

Metadata is read through `locate`, `open_binary` and `kind_of`, whose trouble is a `SourceError` of one sentence.
"""

import difflib
import errno
import io
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.asyn import reset_lock
from fsspec.implementations.local import LocalFileSystem

from pipeline.shared.atomic import TEMPORARY, fsync_file, fsync_folder, write_atomically
from pipeline.shared.silence import limit_silence
from schemas.errors import OutputError, RemoteError, SourceError, first_line
from schemas.unreadable import unreadable

_WRITTEN = ("mtime", "LastModified", "last_modified", "updated", "created")
"""What file systems call the time at which a file was written: local ones and SFTP, S3, Azure, GCS, memory."""
_BLOCK_BYTES = 2**24
"""Datasets are read ahead over a network: a request per 16 MiB."""


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what an unreadable file raises into a `SourceError` that names the file."""
    try:
        yield
    except unreadable() as error:
        raise SourceError(f"{path} cannot be read: {first_line(error)}.") from error


@contextmanager
def writing(target: object) -> Iterator[None]:
    """Turn what a file or folder that cannot be written raises into an `OutputError` that names it."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or first_line(error)}.") from error


def locate(path: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it."""
    limit_silence(path, fsspec.config.conf)
    try:
        fs, inside = fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise SourceError(f"{path} needs a package that is not installed here ({first_line(error)}).") from error
    except unreadable() as error:
        protocol, known = path.split("://")[0], fsspec.available_protocols()
        near = [] if protocol in known else difflib.get_close_matches(protocol, known, n=3)
        hint = f"; did you mean {' or '.join(f'{name}://' for name in near)}" if near else ""
        raise SourceError(f"{path} cannot be reached: {first_line(error)}{hint}.") from error
    return fs, inside


def full_path(fs: Any, inside: str, word: str = "") -> str:
    """The path with its protocol; local paths are absolute and have none."""
    if "::" in word:
        # A chain such as simplecache::https://… is known to the word alone.
        return word
    return inside if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(inside))


def open_binary(path: str, compression: str | None = None, **options: Any) -> Any:
    """Open a file for reading bytes, seekable; with "infer", decompressed by its name. `options` are fsspec's."""
    fs, inside = locate(path)
    if compression:
        return fsspec.core.OpenFile(fs, inside, "rb", compression).open()
    return fs.open(inside, "rb", **options)


def kind_of(path: str) -> Literal["file", "directory"] | None:
    """What stands at a path; None for nothing."""
    fs, inside = locate(path)
    with reading(path):
        return _kind(fs, inside)


def _kind(fs: Any, inside: str) -> Literal["file", "directory"] | None:
    """What stands there, by a call that says when it cannot tell: fsspec's isfile takes any trouble for "no"."""
    try:
        return "directory" if fs.info(inside)["type"] == "directory" else "file"
    except FileNotFoundError as error:
        # fsspec raises it over HTTP for a server that does not answer, too; only the cause tells.
        cause = error.__cause__
        if isinstance(cause, TimeoutError) or (isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT)):
            raise cause from error
        return None


def is_local(path: str) -> bool:
    return isinstance(locate(path)[0], LocalFileSystem)


class Stat(NamedTuple):
    st_size: int


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder behind an fsspec URL. Trouble with it is a `RemoteError`, whatever the file system raises.

    The file system is looked up when it is needed, so that a RemotePath can be sent to other processes.
    """

    url: str
    """Without a slash at its end."""

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.url.rpartition("/")[0])

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether there is anything below this URL: object stores know no empty folders."""
        return bool(self._call("isdir")) or self._kind() == "directory"

    def exists(self) -> bool:
        return self._kind() is not None

    def stat(self) -> Stat:
        return Stat(int(self._call("info")["size"]))

    def listing(self) -> dict[str, dict[str, Any]]:
        """Name -> what fsspec tells of what lies right in this folder, sorted; empty where there is none."""
        try:
            entries = self._call("ls", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        by_name = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries}
        return {name: by_name[name] for name in sorted(by_name) if name}

    def iterdir(self) -> Iterator["RemotePath"]:
        return (self / name for name in self.listing())

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """What lies right in this folder under a name that matches `pattern`, which holds no slash."""
        return (self / name for name in self.listing() if fnmatchcase(name, pattern))

    def open(self, mode: str = "rb", buffering: int = _BLOCK_BYTES) -> Any:
        """Open for reading and seeking; each request asks for `buffering` bytes at least."""
        return _RemoteFile(self.url, self._call("open", mode, block_size=buffering))

    def read_bytes(self) -> bytes:
        return bytes(self._call("cat_file"))

    def read_range(self, start: int, stop: int) -> bytes:
        return bytes(self._call("cat_file", start=start, end=stop))

    def write_bytes(self, data: bytes) -> None:
        """Put the whole content: whoever reads finds the old one or the new."""
        self._call("pipe_file", data)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._call("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _kind(self) -> Literal["file", "directory"] | None:
        with self.fresh() as (fs, inside):
            return _kind(fs, inside)

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        with self.fresh() as (fs, inside):
            return getattr(fs, method)(inside, *args, **options)

    @contextmanager
    def fresh(self) -> Iterator[tuple[Any, str]]:
        """The file system, which is to know nothing of earlier calls: other processes write here too."""
        with _os_errors(self.url):
            fs, inside = locate(self.url)
            fs.invalidate_cache()
            yield fs, inside


@contextmanager
def _os_errors(url: str) -> Iterator[None]:
    """Turn what a file system raises into a `RemoteError`; that there is no such file is no trouble."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except NotImplementedError as error:
        raise RemoteError(f"{url} can only be read") from error
    except SourceError as error:
        raise RemoteError(first_line(error)) from error
    except unreadable() as error:
        trouble = RemoteError(f"{url}: {getattr(error, 'strerror', None) or first_line(error)}")
        trouble.errno = getattr(error, "errno", None)
        raise trouble from error


class _RemoteFile(io.BufferedIOBase):
    """A remote file that is read: what breaks off on the way is a `RemoteError` too."""

    def __init__(self, url: str, stream: Any) -> None:
        self._url, self._stream = url, stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        with _os_errors(self._url):
            return bytes(self._stream.read(size))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def close(self) -> None:
        self._stream.close()
        super().close()


AnyPath = Path | RemotePath


def to_path(text: str) -> AnyPath:
    """The file or folder that a path or URL stands for; it need not exist.

    Raises:
        OutputError: when it is empty, as of a shell variable that is not set, or the URL's protocol is not known, or
            its package is not installed.
    """
    if not text:  # Path("") would be the current folder
        raise OutputError("The name of a folder or URL is empty: give one, or `.` for the current folder.")
    protocol, colon, _ = text.rpartition("::")[2].partition(":/")  # of simplecache::s3://bucket, s3
    if not colon or not protocol.isalnum() or len(protocol) == 1:
        return Path(os.path.expanduser(text))  # `OUT=~/faces` reaches make as it is written
    if protocol == "file":
        return Path(text.removeprefix("file:").removeprefix("//"))
    if f"{protocol}://" not in text:
        raise OutputError(f"{text!r} is neither a folder nor a URL: give a folder, or a URL such as s3://bucket/faces.")
    try:
        locate(text)
    except SourceError as error:
        raise OutputError(str(error)) from error
    return RemotePath(text.rstrip("/"))


def sizes(folder: AnyPath) -> dict[str, int]:
    """Name -> bytes of the files right in a folder, sorted; empty where there is no folder."""
    if isinstance(folder, RemotePath):
        listed = {name: entry["size"] for name, entry in folder.listing().items() if entry["type"] == "file"}
        silent = [name for name, size in listed.items() if size is None]  # the page by which a site lists files
        with ThreadPoolExecutor(16) as pool:
            lengths = pool.map(lambda name: (folder / name).stat().st_size, silent)
            return {name: int(size) for name, size in {**listed, **dict(zip(silent, lengths, strict=True))}.items()}
    try:
        with os.scandir(folder) as entries:
            return dict(sorted((entry.name, entry.stat().st_size) for entry in entries if entry.is_file()))
    except (FileNotFoundError, NotADirectoryError):
        return {}


def times(folder: AnyPath) -> dict[str, float]:
    """Name -> when a file right in a folder was written last, seconds since 1970; none of those that go meanwhile."""
    if isinstance(folder, RemotePath):
        listed = folder.listing().items()
        known = ((name, next(filter(None, map(entry.get, _WRITTEN)), None)) for name, entry in listed)
        return {name: _seconds(value) for name, value in known if value is not None}
    written = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                written[entry.name] = entry.stat().st_mtime
    return written


def _seconds(time: float | str | datetime) -> float:
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    return time.timestamp() if isinstance(time, datetime) else float(time)


def names(folder: AnyPath) -> list[str]:
    """What lies right in a folder, hidden files and folders too, sorted; empty where there is no folder."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def parquet(file: AnyPath) -> pq.ParquetFile:
    """Open a parquet file; a remote one is fetched as a whole."""
    # pyarrow takes a path as text that has to be Unicode, and bytes as they are.
    source = pa.BufferReader(file.read_bytes()) if isinstance(file, RemotePath) else pa.OSFile(bytes(file))
    return pq.ParquetFile(source)


def forget_network_loops() -> None:
    """To be called in a forked child, in which the loops of fsspec's network file systems do not run."""
    reset_lock()


def read_range(file: AnyPath, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file, fewer where it ends before."""
    if isinstance(file, RemotePath):
        return file.read_range(start, stop)
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)


def write(file: AnyPath, data: bytes) -> None:
    """Write a file so that its name holds the old content or the new, never a part."""
    if isinstance(file, RemotePath):
        file.write_bytes(data)
    else:
        write_atomically(file, data)


def rename(new: AnyPath, old: AnyPath) -> None:
    """Give a file the name of another in the same folder; an object is copied, since a store renames nothing."""
    if isinstance(new, Path) and isinstance(old, Path):
        new.replace(old)
    else:
        with closing(Draft(old)) as draft:
            draft.stream.write(new.read_bytes())
            draft.fsync()
            draft.publish()
        new.unlink()


def fsync_names(folder: AnyPath) -> None:
    """Have the names in a folder on the disk; a store has them when a put returns."""
    if isinstance(folder, Path):
        fsync_folder(folder)


class Draft:
    """A file in the making: written at `path`, and given its name by `publish` when it is whole."""

    def __init__(self, target: AnyPath) -> None:
        """Prepare the file; one for a remote target has no name, so that nothing is left of it, whoever is killed."""
        self.target = target
        if isinstance(target, RemotePath):
            self.stream = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  # `close` closes it
            self.path = Path(f"/proc/self/fd/{self.stream.fileno()}")
        else:
            self.path = target.with_name(f"{TEMPORARY}{target.name}.{os.getpid()}")
            self.stream = self.path.open("wb")

    def fsync(self) -> None:
        fsync_file(self.stream)

    def publish(self) -> None:
        if isinstance(self.target, RemotePath):
            with self.target.fresh() as (fs, inside):
                fs.put_file(str(self.path), inside)
        else:
            self.path.replace(self.target)

    def close(self) -> None:
        """Remove what was not published."""
        try:
            self.stream.close()
        finally:
            if isinstance(self.target, Path):
                self.path.unlink(missing_ok=True)
