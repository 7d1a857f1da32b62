"""Ctrl-C, SIGTERM and a terminal that is closed as a wish to stop after the current step, with a checkpoint."""

import signal
import sys
from types import FrameType

import torch
from accelerate import Accelerator

from pipeline.shared.process import stop_signals


class StopSignal:
    """Waits for SIGINT, SIGTERM and SIGHUP while it is open; a second SIGINT stops at once. A context manager.

    A second SIGTERM does not: launchers pass on what a cluster has sent to all processes already.
    """

    def __enter__(self) -> "StopSignal":
        self._received = False
        self._before = {number: signal.signal(number, self._receive) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._received:
            self._received = True
            print("Stopping after this step; Ctrl-C now stops at once, without a checkpoint.", file=sys.stderr)  # noqa: T201

    def is_wanted(self, accelerator: Accelerator) -> bool:
        """Whether any process received one: all must leave the loop at the same step."""
        if accelerator.num_processes == 1:
            return self._received
        votes = accelerator.reduce(torch.tensor(float(self._received), device=accelerator.device))
        return bool(votes.item())
