"""The process in which files of strangers are decoded; started and fed by `stages.pixels.decoding`.

Arguments: the numbers of its socket, of the file that holds what is asked about, and of the arena. It ends when the
other end of the socket is closed, at the latest.
"""

import json
import math
import mmap
import os
import resource
import signal
import socket
import sys
from typing import Any

import numpy as np

from schemas.drops import DropReason
from stages.base import Dropped
from stages.pixels import headers, images
from stages.pixels.decoding import CPU_S, MEMORY

_MESSAGE = 4096


def main(link: socket.socket, letter: int, arena: mmap.mmap) -> None:
    """Answer until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    while True:
        message, files, *_ = socket.recv_fds(link, _MESSAGE, 1)
        if not message:
            return
        _limit_time()
        try:
            answer = _answer(json.loads(message), letter, arena, files)
        except Dropped as dropped:
            answer = {"reason": str(dropped.reason)}
        except MemoryError:
            answer = {"reason": str(DropReason.DECODER_CRASH)}
        for file in files:
            os.close(file)
        link.send(json.dumps(answer).encode())


def _limit_time() -> None:
    """Have this process killed when the next file takes too long."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime) + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _answer(request: dict[str, Any], letter: int, arena: mmap.mmap, files: list[int]) -> dict[str, Any]:
    data = os.pread(letter, os.fstat(letter).st_size, 0)
    if request["op"] == "header":
        return {"stored": _stored(data)}
    if request["op"] == "thumbnail":
        small = images.thumbnail_here(data, request["side"]) or b""
        os.pwrite(letter, small, 0)
        return {"length": len(small)}
    memory = mmap.mmap(files[0], request["size"]) if files else arena
    canvas = np.frombuffer(memory, np.uint8, request["size"], request["start"])
    return {"shape": images.decode_into(data, canvas, f"/dev/fd/{letter}")}


def _stored(data: bytes) -> headers.Stored:
    format = str(headers.format_of(data))
    try:
        return headers.read_stored(format, data)
    except headers.DECODER_ERRORS as error:
        raise headers.undecodable(format, data, error) from error


if __name__ == "__main__":
    _socket, _letter, _arena = map(int, sys.argv[1:])
    main(socket.socket(fileno=_socket), _letter, mmap.mmap(_arena, 0))
