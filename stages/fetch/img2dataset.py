"""The img2dataset engine: img2dataset's own download function, in threads, over our one client.

Left alone it would follow redirects to any address, read bodies of any size, and wait as long as a server drips. So the
one name by which it reaches the network, `urllib` in its module, is replaced there, once, for the whole process; the
urllib of everybody else stays as it is.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from email.message import Message
from functools import cache
from importlib import import_module
from io import BytesIO
from types import ModuleType, SimpleNamespace
from urllib.request import Request

from stages.base import Dropped
from stages.fetch.address import parse
from stages.fetch.ahead import Pending
from stages.fetch.engine import MOST_ROWS, Outcome
from stages.fetch.native import Native
from stages.fetch.robots_tag import DIRECTIVES
from stages.fetch.status import bare
from stages.fetch.times import FetchTimes
from stages.runtime import Runtime
from stages.settings import Settings

_TOKEN = "faceshards"  # noqa: S105 (a product name)


class Img2dataset:
    """Fetches with img2dataset."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self._settings = settings
        self._downloader = patched_downloader()
        self._native = Native(settings, runtime)
        self._pool = ThreadPoolExecutor(settings.download.concurrency, thread_name_prefix="faceshards-img2dataset")

    def stream(self, urls: Iterable[str | None], most_rows: int = MOST_ROWS) -> Iterator[Outcome]:
        return self._native.stream_by(self._begin, urls, most_rows)

    def take_times(self) -> FetchTimes:
        return self._native.take_times()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._native.close()

    def _begin(self, begun: Sequence[Pending]) -> None:
        for pending in begun:
            pending.work = self._pool.submit(self._outcome, pending)
            pending.work.add_done_callback(pending.done)

    def _outcome(self, pending: Pending) -> Outcome:
        opener = _Opener(self._native, pending)
        token = _opener.set(opener)
        try:
            url = parse(pending.url)
            # Retries are ours: img2dataset repeats every failure, a 404 and an opt-out too.
            _, stream, error = self._downloader.download_image_with_retry(
                (0, str(url)),
                timeout=self._settings.download.timeout_s,
                retries=0,
                user_agent_token=_TOKEN,
                disallowed_header_directives=DIRECTIVES if self._settings.download.respect_opt_out else None,
            )
        except Dropped as dropped:
            return bare(dropped)
        finally:
            _opener.reset(token)
        if stream is not None:
            return bytes(stream.getvalue())
        if isinstance(opener.outcome, Dropped):
            return opener.outcome
        raise opener.error or RuntimeError(f"img2dataset failed in an unforeseen way: {error}")


class _Opener:
    """Fetches one URL for img2dataset, and remembers what it sees no more of than its text."""

    def __init__(self, native: Native, pending: Pending) -> None:
        self._native = native
        self._pending = pending
        self.outcome: Outcome | None = None
        self.error: OSError | None = None

    def open(self) -> "_Response":
        try:
            self.outcome = self._native.fetch(self._pending)
        except OSError as error:
            self.error = error
            raise
        if isinstance(self.outcome, Dropped):
            raise self.outcome
        return _Response(self.outcome)


_opener: ContextVar[_Opener] = ContextVar("_opener")


class _Response(BytesIO):
    """As much of urllib's response as img2dataset uses."""

    headers = Message()  # X-Robots-Tag was heeded on every hop already


def urlopen(request: Request, timeout: float | None = None) -> _Response:
    """Stands in for urllib's: answers with the URL of this thread, whose deadline overrules `timeout`."""
    return _opener.get().open()


@cache
def patched_downloader() -> ModuleType:
    """img2dataset's module, that reaches the network through us alone."""
    # The package imports wandb and albumentations, which phone home by default.
    os.environ.setdefault("WANDB_MODE", "disabled")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports imghdr
        downloader = import_module("img2dataset.downloader")
    vars(downloader)["urllib"] = SimpleNamespace(request=SimpleNamespace(Request=Request, urlopen=urlopen))
    return downloader
