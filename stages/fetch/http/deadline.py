"""Time that servers may take."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from schemas.drops import DropReason
from stages.base import Dropped


class Deadline:
    """What is left of the seconds that servers may take for one URL; waits in our own queues cost none of them."""

    def __init__(self, seconds: float) -> None:
        self.left_s = seconds

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Count the time that passes within.

        Raises:
            Dropped: TIMEOUT, once nothing is left.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            async with asyncio.timeout(self.left_s):
                yield
        except TimeoutError:
            raise Dropped(DropReason.TIMEOUT) from None
        finally:
            self.left_s -= loop.time() - begun
