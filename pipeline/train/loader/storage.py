"""Files of a dataset, on a local disk or behind an fsspec URL."""

import hashlib
from typing import Any, BinaryIO, NamedTuple, cast

from fsspec.asyn import reset_lock
from fsspec.core import url_to_fs

from schemas.errors import SourceError

_HASH_BYTES = 2**22
_REMOTE_BLOCK_BYTES = 2**24
"""Read ahead over a network: a request per 16 MiB."""


class Folder(NamedTuple):
    """A folder on some file system."""

    fs: Any
    path: str
    """Without protocol, as the file system names it."""

    def join(self, name: str) -> "Folder":
        """A folder or file in it."""
        return Folder(self.fs, f"{self.path.rstrip('/')}/{name}")

    @property
    def url(self) -> str:
        """A plain path on the local disk, a URL elsewhere."""
        return self.path if "file" in _protocols(self.fs) else str(self.fs.unstrip_protocol(self.path))

    def files(self) -> dict[str, int]:
        """File name -> bytes, of the files right in it, sorted; empty when it is no folder."""
        if not self.fs.isdir(self.path):
            return {}
        entries = self.fs.ls(self.path, detail=True)
        found = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries}
        return {name: int(entry["size"]) for name, entry in sorted(found.items()) if entry["type"] == "file"}

    def read(self, name: str) -> bytes:
        """All bytes of a file in it."""
        return bytes(self.fs.cat_file(self.join(name).path))


def folder(url: str) -> Folder:
    """The folder that a path or URL names; it need not exist.

    Raises:
        SourceError: when its protocol is not known or not installed.
    """
    try:
        return Folder(*url_to_fs(url))
    except (ValueError, ImportError) as error:
        raise SourceError(f"{url} cannot be opened: {error}") from error


def open_file(url: str) -> BinaryIO:
    """Open a path or URL, as `Folder.url` writes them, for reading and seeking."""
    if "://" not in url:
        return open(url, "rb")  # callers close it
    fs, path = url_to_fs(url)
    return cast(BinaryIO, fs.open(path, "rb", block_size=_REMOTE_BLOCK_BYTES))


def sha256(url: str) -> str:
    """sha256 of a file, hex."""
    found = hashlib.sha256()
    with open_file(url) as stream:
        while chunk := stream.read(_HASH_BYTES):
            found.update(chunk)
    return found.hexdigest()


def forked() -> None:
    """Forget network loops of the parent process, which do not run in a forked child."""
    reset_lock()


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
