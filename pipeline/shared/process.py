"""What a command owes to the process that it is: open streams, and one sentence where the machine fails it."""

import gc
import io
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, EFBIG, EIO, EMFILE, ENFILE, ENOMEM, ENOSPC, EPERM, EPIPE, EROFS
from types import FrameType
from typing import Any

from schemas.errors import RemoteError, first_line, is_gpu_full

_MACHINE = (EACCES, EDQUOT, EFBIG, EIO, EMFILE, ENFILE, ENOMEM, ENOSPC, EPERM, EROFS)
"""Errors of disks and tables that are full, broken or closed to us: no bug, whoever meets them."""

NO_TELEMETRY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "WANDB_MODE": "disabled",
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
"""Switches of dependencies, which are all imported later than this is set; worker processes inherit them."""


def standard_streams() -> None:
    """Have stdin, stdout and stderr open, and able to write any text, also once their terminal is closed.

    The number of one that is closed would go to the next file that is opened, and what libraries print would land
    there. A locale may have no letter for what is written, and names of files need not be Unicode.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the least number that is free: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # as long as the process
        elif stream.isatty() or _is_pipe(stream):
            raw = io.BufferedWriter(_Read(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True))
        elif getattr(stream, "errors", "") == "strict" or "utf" not in (stream.encoding or "utf").lower():
            stream.reconfigure(errors="backslashreplace")


def home() -> dict[str, str]:
    """HOME as containers set it, where neither the environment nor the system's users name one; else nothing."""
    return {"HOME": "/"} if os.path.expanduser("~") == "~" else {}


def _is_pipe(stream: Any) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # a stream of a program that calls us
        return False


class _Read(io.FileIO):
    """A terminal or pipe: what is printed once nobody reads it goes nowhere, so that whatever prints comes to its end.

    A run of days would end with `| head`, or with the `tee` that somebody killed.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (EIO, EPIPE):
                raise
            return len(data)


@contextmanager
def large_imports() -> Iterator[None]:
    """Import within what is large: the garbage collector pauses, and never looks at these modules afterwards.

    The modules of torch and diffusers are a million objects that stay. To search them for garbage again and again takes
    a third of the time in which they are imported, and some more at the end of a training and of the process.
    """
    modules, was_enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:  # else a program that runs a command often would keep its garbage
            gc.freeze()
        if was_enabled:
            gc.enable()


def stop_signals() -> tuple[signal.Signals, ...]:
    """Ctrl-C's, SIGTERM, and SIGHUP of a terminal that is closed, unless `nohup` has it ignored."""
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *(() if is_nohup else (signal.SIGHUP,)))


def on_interrupt(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> None:
    """What Ctrl-C does, SIGTERM and SIGHUP: also in a background job, which a shell starts with SIGINT ignored."""
    for number in stop_signals():
        signal.signal(number, handler)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; of a terminal that is closed once: its shell sends SIGHUP, and its end another."""
    if number == signal.SIGHUP:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise KeyboardInterrupt


def trouble_of_machine(error: OSError | RuntimeError | MemoryError, less_gpu_memory: str) -> str:
    """One sentence on a full disk, memory or GPU and a store out of reach; other errors are raised.

    A stream that is full is let go.
    `less_gpu_memory` says how a command needs less.
    """
    if is_gpu_full(error):
        return f"{first_line(error)}. {less_gpu_memory}"
    if isinstance(error, RemoteError):
        return f"{first_line(error)}; see to it, and give the same command again."
    if isinstance(error, MemoryError):
        why = first_line(error)
        return f"This machine fails: there is no memory left ({why}); see to it, and give the same command again."
    if not isinstance(error, OSError) or error.errno not in _MACHINE:
        raise error
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    what = error.filename or "what is printed, or a temporary file"
    return f"This machine fails: {error.strerror} ({what}); see to it, and give the same command again."
