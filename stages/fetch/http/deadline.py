"""Time that servers may take."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from schemas.drops import Dropped, DropReason
from stages.fetch.answer import wait_s
from stages.settings import DownloadSettings


class Deadline:
    """What is left of the seconds that servers may take for one URL; waits in our own queues cost none of them."""

    def __init__(self, seconds: float) -> None:
        self.left_s = seconds

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Count the time that passes within; a drop as TIMEOUT, once nothing is left."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            async with asyncio.timeout(self.left_s):
                yield
        except TimeoutError:
            raise Dropped(DropReason.TIMEOUT) from None
        finally:
            self.left_s -= loop.time() - begun

    async def persist(self, attempt: Callable[[], Awaitable[bytes]], settings: DownloadSettings) -> bytes:
        """What an attempt gives, or a further one after a failure that may pass, within the same seconds."""
        failures = 0
        while True:
            try:
                return await attempt()
            except Dropped as failure:
                pause = wait_s(failure, failures, settings, self.left_s)
            failures += 1
            async with self.running():
                await asyncio.sleep(pause)
