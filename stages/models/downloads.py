"""Fetches weight files: resumable, verified, atomic. Knows nothing of which weights there are."""

import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from schemas.digest import sha256_of_file
from schemas.errors import WeightsError

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes that are there, and the bytes in all (0 when unknown)."""

_CHUNK = 1 << 20
_TIMEOUT_S = 60.0
_FRUITLESS = 3


def matches(path: Path, sha256: str) -> bool:
    """Whether a file is there and, where its sha256 is known, has it."""
    return path.is_file() and (not sha256 or sha256_of_file(path) == sha256)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold a folder (made if absent) against other processes of this machine that fetch into it.

    Raises:
        WeightsError: when the folder cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / ".lock").touch()
    except OSError as error:
        raise WeightsError(
            f"Cannot write {root} ({error.strerror}): set FACESHARDS_MODELS to a writable folder."
        ) from error
    with (root / ".lock").open("wb") as lock:
        flock(lock, LOCK_EX)
        yield


def download(url: str, target: Path, sha256: str, progress: Progress) -> None:
    """Fetch a URL into `target`; an interrupted download leaves `target`.part, and goes on from there next time.

    Raises:
        WeightsError: when the server or the disk fails, or the content has another sha256 (nothing is kept then).
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _complete(url, part, lambda done, total: progress(target.name, done, total))
        found = sha256_of_file(part)
        if sha256 and found != sha256:
            part.unlink()
            raise WeightsError(f"{url} gave a file with sha256 {found}, not {sha256}: it was deleted; try again later.")
        os.replace(part, target)
    except (OSError, HTTPException) as error:
        raise WeightsError(
            f"Cannot fetch {url} to {target} ({error}): try again, or fetch it by other means."
        ) from error


def _complete(url: str, part: Path, progress: Callable[[int, int], None]) -> None:
    """Ask for the rest until it is there; give up after some attempts that brought nothing."""
    fruitless = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        trouble: Exception = OSError("the connection ended early")
        try:
            if _append(url, part, before, progress):
                return
        except urllib.error.HTTPError:
            raise
        except (OSError, HTTPException) as error:
            trouble = error
        fruitless = 0 if part.exists() and part.stat().st_size > before else fruitless + 1
        if fruitless == _FRUITLESS:
            raise trouble


def _append(url: str, part: Path, have: int, progress: Callable[[int, int], None]) -> bool:
    """Fetch what follows the first `have` bytes; whether the file is complete."""
    headers = {"User-Agent": "faceshards"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)  # noqa: S310 (URLs of the table)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing follows: the sha256 tells whether what is there is right
            return True
        raise
    with response:
        start = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else 0
        with part.open("ab" if start else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                progress(file.tell(), total)
    return part.stat().st_size >= total


def unpack(archive: Path, folder: Path, files: Mapping[str, str]) -> None:
    """Take the named files out of a zip, wherever in it they lie, into `folder`; everything else stays inside.

    `files` maps names to sha256 (empty where unknown). Files appear in `folder` whole and verified, or not at all.

    Raises:
        WeightsError: when the zip is damaged or lacks one of the files, or a file has another sha256.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive) as content:
            members = {PurePosixPath(info.filename).name: info for info in content.infolist() if not info.is_dir()}
            for name, sha256 in files.items():
                if name not in members:
                    raise WeightsError(f"{archive} holds no {name}: delete it and fetch it again.")
                _extract(content, members[name], folder / name, sha256)
    except (OSError, zipfile.BadZipFile) as error:
        raise WeightsError(f"Cannot unpack {archive} into {folder} ({error}): delete it and fetch it again.") from error


def _extract(content: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, sha256: str) -> None:
    part = target.with_name(target.name + ".part")
    with content.open(info) as source, part.open("wb") as file:
        while chunk := source.read(_CHUNK):
            file.write(chunk)
    found = sha256_of_file(part)
    if sha256 and found != sha256:
        part.unlink()
        raise WeightsError(f"{target.name} in the archive has sha256 {found}, not {sha256}: nothing was installed.")
    os.replace(part, target)
