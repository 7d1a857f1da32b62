"""Files of strangers are decoded in a process of their own: one that crashes a decoder costs a row, not a shard.

Each process that needs pixels keeps one such process (`stages.pixels.decoding_child`). The file goes there in shared
memory, the pixels come back in shared memory that is used again and again: nothing is copied, and no page is touched
anew. A process that dies is replaced, and the file tried again, since an operator or a full memory may have killed it;
only a file that kills it each time is dropped.
"""

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from schemas.drops import DropReason
from stages.base import Dropped

CPU_S = 30
"""Processor time per file; 100 megapixels take about 2 s. The child has itself killed when it is over."""
MEMORY = 4 << 30
"""What the child may allocate, bytes."""

COMMAND = (sys.executable, "-m", "stages.pixels.decoding_child")
"""What starts a child; the numbers of its files follow."""

_ATTEMPTS = 3
_ANSWER_S = 10.0 * CPU_S
"""Only a child that sleeps for ever takes so long: a busy one runs out of processor time."""
_ARENA = 192 << 20
"""Bytes for pixels: those of a photo cache, and of the photo that is decoded meanwhile."""
_MESSAGE = 4096
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(128 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
"""The child's libc keeps the memory of one photo for the next: getting it anew costs a fifth of a PNG's time."""

Pixels = npt.NDArray[np.uint8]


def pixels(data: bytes, count: int) -> Pixels:
    """`stages.pixels.images.decode(data)`, done there: `count` = height x width x 3 bytes, in shared memory.

    Raises:
        Dropped: truncated_image, corrupt_image or decoder_crash.
    """
    return _decoder().pixels(data, count)


def thumbnail(data: bytes, side: int) -> bytes | None:
    """`stages.pixels.images.thumbnail_here(data, side)`, done there; None also when that crashes."""
    try:
        return _decoder().thumbnail(data, side)
    except Dropped:
        return None


def header(data: bytes) -> tuple[int, int, str, int]:
    """`stages.pixels.headers.read_stored`, done there: width, height, mode and orientation.

    Raises:
        Dropped: truncated_image, corrupt_image or decoder_crash.
    """
    return _decoder().header(data)


class _Crash(Exception):
    """The child did not answer."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again
        """Whether it may have been somebody else's fault."""


class Arena:
    """Hands out pieces of one shared memory, first fit, and takes them back in any order."""

    def __init__(self, size: int) -> None:
        """Nothing is allocated before it is written to."""
        self.file = shared_file(size)
        self.map = mmap.mmap(self.file, size)
        self._free = [(0, size)]
        self._returned: deque[tuple[int, int]] = deque()

    def give_back(self, start: int, size: int) -> None:
        """Free a piece again. Called whenever an array is collected, so possibly in the middle of `take`."""
        self._returned.append((start, size))

    def take(self, size: int) -> int | None:
        """Where a free piece of this size begins; None when there is none."""
        while self._returned:
            self._join(*self._returned.popleft())
        for index, (start, room) in enumerate(self._free):
            if room >= size:
                self._free[index : index + 1] = [(start + size, room - size)] if room > size else []
                return start
        return None

    def _join(self, start: int, size: int) -> None:
        """Make a piece free, together with its free neighbours."""
        joined: list[tuple[int, int]] = []
        for place, room in sorted([*self._free, (start, size)]):
            if joined and sum(joined[-1]) == place:
                joined[-1] = (joined[-1][0], joined[-1][1] + room)
            else:
                joined.append((place, room))
        self._free = joined


def shared_file(size: int) -> int:
    """A file without a name, in memory, that other processes may map."""
    file = os.memfd_create("faceshards")
    os.ftruncate(file, size)
    return file


class _Piece(NamedTuple):
    """Where pixels go: a piece of the arena, or a file for those that find no room there."""

    start: int
    size: int
    file: int | None


class Decoder:
    """A child and what is shared with it. May be called from several threads; each waits for its turn."""

    def __init__(self) -> None:
        """Start nothing yet: many processes never decode."""
        self._turn = Lock()
        self._child: _Child | None = None
        self._letter = shared_file(0)
        self._arena = Arena(_ARENA)

    def pixels(self, data: bytes, count: int) -> Pixels:
        """See the function of this name."""
        with self._turn:
            piece = self._room(count)
            try:
                height, width = self._ask(data, piece, op="pixels", start=piece.start, size=piece.size)["shape"]
            except BaseException:
                self._free(piece)
                raise
            return self._view(piece).reshape(height, width, 3)

    def thumbnail(self, data: bytes, side: int) -> bytes | None:
        """See the function of this name."""
        with self._turn:
            length = self._ask(data, op="thumbnail", side=side)["length"]
            return os.pread(self._letter, length, 0) if length else None

    def header(self, data: bytes) -> tuple[int, int, str, int]:
        """See the function of this name."""
        with self._turn:
            width, height, mode, orientation = self._ask(data, op="header")["stored"]
            return width, height, mode, orientation

    def _ask(self, data: bytes, piece: _Piece | None = None, **request: Any) -> dict[str, Any]:
        """The answer of a child, of another one where the first died of it."""
        for attempt in range(_ATTEMPTS):
            if self._child is None:
                self._child = _Child(self._letter, self._arena.file)
            try:
                _write(self._letter, data)
                answer = self._child.ask(request, piece.file if piece else None)
                break
            except BaseException as error:
                self._child = None
                if not isinstance(error, _Crash):
                    raise
                if attempt + 1 == _ATTEMPTS or not error.again:
                    raise Dropped(DropReason.DECODER_CRASH) from None
        if "reason" in answer:
            raise Dropped(next(reason for reason in DropReason if reason == answer["reason"]))
        return answer

    def _room(self, size: int) -> _Piece:
        start = self._arena.take(size)
        return _Piece(0, size, shared_file(size)) if start is None else _Piece(start, size, None)

    def _free(self, piece: _Piece) -> None:
        if piece.file is None:
            self._arena.give_back(piece.start, piece.size)
        else:
            os.close(piece.file)

    def _view(self, piece: _Piece) -> Pixels:
        """The pixels as an array; its piece is free again once the array and all that was cut from it are gone."""
        if piece.file is None:
            whole = np.frombuffer(self._arena.map, np.uint8, piece.size, piece.start)
            weakref.finalize(whole, self._arena.give_back, piece.start, piece.size).atexit = False
            return whole
        whole = np.frombuffer(mmap.mmap(piece.file, piece.size), np.uint8, piece.size)
        os.close(piece.file)
        return whole


class _Child:
    """A running child."""

    def __init__(self, letter: int, arena: int) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_ANSWER_S)
        files = (theirs.fileno(), letter, arena)
        self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
            [*COMMAND, *map(str, files)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=files,
            env={**os.environ, **_KEEP_MEMORY, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        self._finalizer = weakref.finalize(self, _stop, self._socket, self._process)

    def ask(self, request: dict[str, Any], file: int | None) -> dict[str, Any]:
        """Send a request, and wait for the answer.

        Raises:
            _Crash: when there is none; the child is gone then.
        """
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [] if file is None else [file])
            answer = self._socket.recv(_MESSAGE)
        except ConnectionError:
            answer = b""
        except BaseException as error:
            self._finalizer()  # its answer to this must not be taken for that to another request
            if isinstance(error, TimeoutError):
                raise _Crash(again=False) from None
            raise
        if not answer:
            self._finalizer()
            raise _Crash(again=self._process.returncode != -signal.SIGXCPU)
        told: dict[str, Any] = json.loads(answer)
        return told


def _stop(link: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    """End a child: it ends itself when the other end of its socket is closed, unless it hangs."""
    link.close()
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _write(file: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(file, memoryview(data)[written:], written)
    os.ftruncate(file, len(data))


_decoders: dict[int, Decoder] = {}
_first = Lock()


def _decoder() -> Decoder:
    """This process's decoder: after a fork, parent and child must not share one."""
    with _first:
        if os.getpid() not in _decoders:
            _decoders.clear()
            _decoders[os.getpid()] = Decoder()
        return _decoders[os.getpid()]
