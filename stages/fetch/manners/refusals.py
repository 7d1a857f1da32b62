"""What was refused is not requested again: remembered in memory, and in a file that all processes of a run share."""

import os
from collections.abc import Iterable
from hashlib import blake2b
from threading import Lock

from schemas.drops import Dropped, DropReason
from schemas.urls import Url

REMEMBERED = (DropReason.OPTED_OUT, DropReason.ACCESS_DENIED, DropReason.FORBIDDEN_ADDRESS)
"""Answers that are meant. (What robots.txt disallows is never requested at all.)"""

_MOST = 500_000
"""URLs that one process remembers, some 70 MB at most."""
_HASH = 8
_RECORD = _HASH + 1


class Refusals:
    """URLs that were refused, each with its reason; safe for threads.

    The file is appended to, a record of nine bytes at a time: a hash of the URL, and which reason.
    """

    def __init__(self, path: str) -> None:
        """Open the file; an empty path is none."""
        self._known: dict[bytes, DropReason] = {}
        self._lock = Lock()
        self._read = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600) if path else None

    def check(self, url: Url) -> None:
        """Raise `Dropped` with the reason of its refusal, when this URL was refused before."""
        reason = self._known.get(_key(url)) if self._known else None
        if reason is not None:
            raise Dropped(reason)

    def add(self, urls: Iterable[Url], reason: DropReason) -> None:
        """Remember a refusal of a URL, and of those that led to it; other reasons are no refusals."""
        if reason not in REMEMBERED:
            return
        with self._lock:
            new = [key for url in urls if (key := _key(url)) not in self._known]
            self._learn(new, reason)
            if self._file is not None and new:
                number = bytes([REMEMBERED.index(reason)])
                os.write(self._file, b"".join(key + number for key in new))

    def refresh(self) -> None:
        """Read what other processes have written since."""
        if self._file is None or os.fstat(self._file).st_size < self._read + _RECORD:
            return
        with self._lock:
            size = (os.fstat(self._file).st_size - self._read) // _RECORD * _RECORD
            data = os.pread(self._file, size, self._read)
            data = data[: len(data) // _RECORD * _RECORD]
            self._read += len(data)
            for start in range(0, len(data), _RECORD):
                key, number = data[start : start + _HASH], data[start + _HASH]
                if number < len(REMEMBERED):
                    self._learn([key], REMEMBERED[number])

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _learn(self, keys: list[bytes], reason: DropReason) -> None:
        self._known.update(dict.fromkeys(keys, reason))
        while len(self._known) > _MOST:
            del self._known[next(iter(self._known))]


def _key(url: Url) -> bytes:
    return blake2b(str(url).encode(), digest_size=_HASH).digest()
