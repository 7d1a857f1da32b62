"""A clock for work in this very process, set anew with each piece that gets done; what hangs is given up.

When it runs out, an error is raised in the main thread. It ends whatever waits in Python: for a lock, a socket, the
result of a thread. A library that does not come back to Python is not reached by it: after a while the process ends.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from schemas.errors import ExitCode, ShardError

LESS_GPU_MEMORY = (
    "Free that GPU of other programs, set models.decoding=cpu, or lower executor.workers or executor.batch_rows."
)
_GRACE_S = 30.0
"""How long the main thread may take to raise the error."""

_hanging = threading.Event()


def is_hanging() -> bool:
    """Whether threads may have been left that never end: the interpreter would wait for them when it exits."""
    return _hanging.is_set()


class Watchdog:
    """Watches one shard after the other, each in `watching`."""

    def __init__(self, seconds: float, last_words: Callable[[], None]) -> None:
        """Give up what takes longer than `seconds`; before the process must end itself, `last_words` is called."""
        self._seconds, self._last_words = seconds, last_words
        self._shard = ""
        self._due = 0.0

    @contextmanager
    def watching(self, shard: str) -> Iterator[None]:
        """Raise ShardError inside the block when it takes too long between two calls of `beat`."""
        if threading.current_thread() is not threading.main_thread():  # only there can anything be interrupted
            yield
            return
        done = threading.Event()
        self._shard = shard

        def ring(number: int, frame: FrameType | None) -> None:
            _hanging.set()
            raise ShardError(overdue(self._seconds))

        before = signal.signal(signal.SIGALRM, ring)
        self.beat()
        threading.Thread(target=self._guard, args=(done,), name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            done.set()

    def beat(self) -> None:
        """Something got done: set the clock anew."""
        self._due = time.monotonic() + self._seconds
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def _guard(self, done: threading.Event) -> None:
        while not done.wait(self._due + _GRACE_S - time.monotonic()):
            if time.monotonic() > self._due + _GRACE_S:
                self._last_words()
                sys.stderr.write(f"{self._shard}: {overdue(self._seconds)}; it cannot be left, so the run stops.\n")
                sys.stderr.flush()
                os._exit(ExitCode.SHARDS_FAILED)


def overdue(seconds: float) -> str:
    return f"no batch got done for {seconds:g} s (executor.shard_timeout_s): given up, and its workers replaced"
