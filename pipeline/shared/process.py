"""What a command owes to the process that it is: open streams, and one sentence where the machine fails it."""

import os
import signal
import sys
from collections.abc import Callable
from errno import EDQUOT, EFBIG, EIO, EMFILE, ENFILE, ENOMEM, ENOSPC, EROFS
from types import FrameType
from typing import Any

_MACHINE = (EDQUOT, EFBIG, EIO, EMFILE, ENFILE, ENOMEM, ENOSPC, EROFS)
"""Errors of disks and tables that are full or broken: no bug, whoever meets them."""


def standard_streams() -> None:
    """Have stdin, stdout and stderr open, and able to write any text.

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
        elif getattr(stream, "errors", "") == "strict":
            stream.reconfigure(errors="backslashreplace")


def on_interrupt(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> None:
    """What Ctrl-C does, and SIGTERM: also in a background job, which a shell starts with SIGINT ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def trouble_of_machine(error: OSError) -> str:
    """One sentence on a full disk and the like; any other error is raised again. A stream that is full is let go."""
    if error.errno not in _MACHINE:
        raise error
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    what = error.filename or "what is printed, or a temporary file"
    return f"This machine fails: {error.strerror} ({what}); see to it, and give the same command again."
