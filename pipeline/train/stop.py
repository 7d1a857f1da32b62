"""Ctrl-C and SIGTERM as a wish to stop after the current step, with a checkpoint."""

import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Hears SIGINT and SIGTERM while it is open; a second SIGINT stops at once. A context manager.

    A second SIGTERM does not: launchers pass on what a cluster has sent to all processes already.
    """

    def __init__(self) -> None:
        """Nothing was heard yet."""
        self._heard = False
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopSignal":
        """Start to listen."""
        self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave signals to whoever had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._heard and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._heard:
            self._heard = True
            print("Stopping after this step; Ctrl-C now stops at once, without a checkpoint.", file=sys.stderr)  # noqa: T201

    def heard(self, accelerator: Accelerator) -> bool:
        """Whether any process heard one: all must leave the loop at the same step."""
        if accelerator.num_processes == 1:
            return self._heard
        votes = accelerator.reduce(torch.tensor(float(self._heard), device=accelerator.device))
        return bool(votes.item())
