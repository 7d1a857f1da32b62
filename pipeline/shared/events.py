"""The events of a run for the outside: lines of JSON, and calls of a function of the user's. Neither stops a run."""

import io
import json
import pkgutil
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any

from pipeline.shared.files import RemotePath, read_range, to_path, writing
from schemas.errors import ConfigError, first_line

_PUT_EVERY_S = 300.0
"""An object of a store, to which nothing can be appended, is put anew at most this often, and at the end."""
_PATIENCE_S = 10.0
"""How long the end of a run waits for the hook."""

Warn = Callable[[str, str], None]
"""Takes the name of some trouble, and a sentence about it."""


class EventFile:
    """Lines of JSON in a file, or an object behind a URL; what it held before stays."""

    def __init__(self, path: str, warn: Warn) -> None:
        """Raises an OutputError when it cannot be written."""
        self._path, self._warn, self._put_at = to_path(path), warn, time.monotonic()
        self._stream: io.BytesIO | io.FileIO = io.BytesIO()
        with writing(path):
            if isinstance(self._path, RemotePath):
                with suppress(FileNotFoundError):
                    self._stream.write(self._path.read_bytes())
                before = self._stream.getvalue()
                self._path.write_bytes(before)
            else:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Its end alone: it may be long, and of /dev/stdout or a pipe there is nothing to read.
                size = self._path.stat().st_size if self._path.is_file() else 0
                before = read_range(self._path, size - 1, size) if size else b""
                self._stream = self._path.open("ab", buffering=0)  # a line is written whole: a kill tears none
            if before and not before.endswith(b"\n"):  # a full disk does
                self._stream.write(b"\n")

    def close(self) -> None:
        self.write(None)
        self._stream.close()

    def write(self, event: dict[str, Any] | None) -> None:
        is_due = event is None or time.monotonic() > self._put_at + _PUT_EVERY_S
        try:
            # Halves of surrogates, of a path that is no Unicode, become \udc…, which JSON has for them too.
            line = json.dumps(event, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
            self._stream.write(line if event else b"")
            if is_due and isinstance(self._stream, io.BytesIO):
                self._put_at = time.monotonic()
                self._path.write_bytes(self._stream.getvalue())
        except OSError as error:
            self._warn("events", f"{self._path} cannot be written, and the run goes on: {first_line(error)}.")


class Hook:
    """A function of the user's that is called with each event, one after the other, in a thread: nobody waits for it.

    What it raises is reported, and it is called with the next event.
    """

    def __init__(self, path: str, warn: Warn) -> None:
        """Import `module:function`; a ConfigError when there is none."""
        self._path, self._warn = path, warn
        try:
            self._function = pkgutil.resolve_name(path)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"the hook {path!r} cannot be imported: {first_line(error)}.") from error
        if not callable(self._function):
            raise ConfigError(f"the hook {path!r} is no function: give `module:function`.")
        self._threads = ThreadPool(1)  # a daemon, which does not hold up the end of the process
        self._last: AsyncResult[Any] | None = None
        self._errors: list[BaseException] = []

    def call(self, event: dict[str, Any]) -> None:
        """Have it called, once it has returned from the calls before."""
        self._report()
        self._last = self._threads.apply_async(self._function, (event,), error_callback=self._errors.append)

    def close(self) -> None:
        if self._last is not None:
            self._last.wait(_PATIENCE_S)
            if not self._last.ready():
                self._warn("hook", f"the hook {self._path} is still busy, and the run ends without it.")
        self._threads.terminate()
        self._report()

    def _report(self) -> None:
        if self._errors:
            trace = "".join(traceback.format_exception(self._errors[0])).strip()
            self._errors.clear()
            self._warn("hook", f"the hook {self._path} failed, and the run goes on:\n{trace}")
