"""Files of strangers are decoded in a process of their own: one that crashes a decoder costs a row, not a shard.

Each process that needs pixels keeps one such process (`stages.pixels.decoding_child`), or one for each of its threads
where these feed a GPU. They share two files in memory: in one the picture's file goes there, in the other its pixels
come back, and are copied out. A process that dies is replaced, and the file tried again, since an operator or a full
memory may have killed it; only a file that kills it each time is dropped.
"""

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import weakref
from functools import cache
from threading import Lock, get_ident
from typing import Any

import numpy as np

from schemas.arrays import Image
from schemas.drops import Dropped, DropReason
from schemas.errors import ShardError, first_line

CPU_S = 30
"""Processor time per file; 100 megapixels take about 2 s. The child has itself killed when it is over."""
MEMORY = 4 << 30
"""What the child may allocate, bytes."""

COMMAND = (sys.executable, "-m", "stages.pixels.decoding_child")
"""What starts a child; the numbers of its files follow."""

_ATTEMPTS = 3
_STARTS = 20
"""Of a child, until one lives to take the file: what ends one before that is never the file's doing."""
_ANSWER_S = 10.0 * CPU_S
"""Only a child that sleeps for ever takes so long: a busy one runs out of processor time."""
_CANVAS = 96 << 20
"""Bytes for pixels that stay mapped in the child; where a photo needs more, they come and go with it."""
MESSAGE = 4096
"""Bytes of a request or an answer, at most."""
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(128 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
"""A process's libc keeps the memory of one photo for the next: getting it anew costs a fifth of a PNG's time."""


class Decoder:
    """A child and what is shared with it. May be called from several threads; each waits for its turn."""

    def __init__(self) -> None:
        self._turn = Lock()
        self._child: _Child | None = None  # many processes never decode
        self._file, self._canvas = os.memfd_create("file"), os.memfd_create("pixels")
        self._pixels: mmap.mmap | None = None  # stays mapped: mapping it anew costs a fault per page that is read

    def start(self) -> None:
        """Start the child ahead of its first file: it takes a while to import what it needs."""
        with self._turn:
            self._child = self._child or _Child(self._file, self._canvas)

    def pixels(self, data: bytes, count: int, factor: int = 1) -> Image:
        """The picture of a file whose header promises `count` = height x width x 3 bytes.

        With a `factor` of 2, 4 or 8 it is reduced, its sides divided and rounded up; a JPEG so costs half or less.

        Raises:
            Dropped: truncated_image, corrupt_image or decoder_crash.
        """
        with self._turn:
            size = max(count, _CANVAS)
            if self._pixels is None or len(self._pixels) != size:
                os.ftruncate(self._canvas, size)
                self._pixels = mmap.mmap(self._canvas, size, access=mmap.ACCESS_READ)
            height, width = self._answer(data, op="pixels", count=count, factor=factor)["shape"]
            return np.frombuffer(self._pixels, np.uint8, count).reshape(height, width, 3).copy()

    def thumbnail(self, data: bytes, side: int) -> bytes | None:
        """A JPEG of at most `side` x `side` pixels; None when there is none, also when the file kills its decoder."""
        with self._turn:
            try:
                length = self._answer(data, op="thumbnail", side=side)["length"]
            except Dropped:
                return None
            return os.pread(self._file, length, 0) if length else None

    def header(self, data: bytes) -> tuple[int, int, str, int]:
        """Width, height, mode and orientation, as `stages.pixels.headers.read_stored` reads them.

        Raises:
            Dropped: truncated_image, corrupt_image or decoder_crash.
        """
        with self._turn:
            width, height, mode, orientation = self._answer(data, op="header")["stored"]
            return width, height, mode, orientation

    def _answer(self, data: bytes, **request: Any) -> dict[str, Any]:
        """The answer of a child, of another one where the first died of it."""
        for _ in range(_ATTEMPTS):
            child = self._living()
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, memoryview(data)[written:], written)
            os.ftruncate(self._file, len(data))
            message = child.message(json.dumps(request).encode())
            if message:
                self._child = child  # one that was not waited for is never used again: its answer is to another file
                answer: dict[str, Any] = json.loads(message)
                if "reason" in answer:
                    raise Dropped(next(reason for reason in DropReason if reason == answer["reason"]))
                return answer
            if child.is_out_of_time:
                break
        raise Dropped(DropReason.DECODER_CRASH)

    def _living(self) -> "_Child":
        """A child that waits for requests, this one's or a new one; it is the caller's from now on."""
        for _ in range(_STARTS):
            child, self._child = self._child or _Child(self._file, self._canvas), None
            if child.is_ready():
                return child
        raise ShardError(  # none of the errors that tell of a damaged file
            f"The process in which images are decoded ended {_STARTS} times before it took one: "
            f"`{sys.executable} -c 'import stages.pixels.decoding_child'` may say why."
        )


class _Child:
    """A running child; it ends when it is collected, and with this process."""

    def __init__(self, file: int, canvas: int) -> None:
        self.is_out_of_time = False
        self._is_ready = False
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_ANSWER_S)
        files = (theirs.fileno(), file, canvas)
        try:
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
                [*COMMAND, *map(str, files)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=files,
                env={**os.environ, **KEEP_MEMORY, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except OSError as error:  # too many processes, no memory: not the file's doing either
            self._socket.close()
            theirs.close()
            raise ShardError(
                f"The process in which images are decoded cannot be started: {first_line(error)}."
            ) from error
        theirs.close()
        self._end = weakref.finalize(self, _end, self._socket, self._process)

    def is_ready(self) -> bool:
        """Whether it lives, and has begun to wait for requests; the child is gone where not."""
        if not self._is_ready:
            self._is_ready = bool(self.message())  # the first, which says that it has all that it needs
        elif self._process.poll() is not None:  # somebody killed it since its last answer
            self._end()
            return False
        return self._is_ready

    def message(self, request: bytes = b"") -> bytes:
        """What comes from it, to a request or unasked; nothing when there is nothing, and the child is gone then."""
        answer = b""
        try:
            if request:
                self._socket.send(request)
            answer = self._socket.recv(MESSAGE)
        except ConnectionError:
            pass
        except TimeoutError:
            self.is_out_of_time = True
        if not answer:
            self._end()
            self.is_out_of_time |= self._process.returncode == -signal.SIGXCPU
        return answer


def _end(link: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    """End a child: it ends itself when the other end of its socket is closed, unless it hangs."""
    link.close()
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


_is_shared = True


def share(*, among_threads: bool) -> None:
    """Whether the threads of this process take turns with one decoder, as they do at first, or have one each."""
    global _is_shared
    _is_shared = among_threads


def decoder() -> Decoder:
    """This process's decoder, or this thread's (see `share`): after a fork, parent and child must not share one."""
    return _decoder_of(os.getpid(), 0 if _is_shared else get_ident())


@cache
def _decoder_of(process: int, thread: int) -> Decoder:
    return Decoder()
