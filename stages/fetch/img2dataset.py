"""The img2dataset engine: img2dataset's own download function, in threads, over our one client.

Left alone it would follow redirects to any address, read bodies of any size, and wait as long as a server drips. So the
one name by which it reaches the network, `urllib` in its module, is replaced there, once, for the whole process; the
urllib of everybody else stays as it is.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from email.message import Message
from functools import cache
from importlib import import_module
from io import BytesIO
from types import ModuleType, SimpleNamespace
from urllib.request import Request

from schemas.drops import Dropped
from stages.fetch.address import parse
from stages.fetch.ahead import Pending
from stages.fetch.answer import DIRECTIVES, bare
from stages.fetch.engine import Outcome
from stages.fetch.native import Native
from stages.runtime import Runtime
from stages.settings import Settings

_TOKEN = "faceshards"  # noqa: S105 (a product name)


class Img2dataset(Native):
    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        super().__init__(settings, runtime)
        self._settings = settings.download
        self._downloader = patched_downloader()
        self._pool = ThreadPoolExecutor(settings.download.concurrency, thread_name_prefix="faceshards-img2dataset")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        super().close()

    def _begin(self, begun: Sequence[Pending]) -> None:
        for pending in begun:
            pending.begin(self._pool.submit(self._outcome, pending))

    def _outcome(self, pending: Pending) -> Outcome:
        failure: Exception | None = None
        """What img2dataset sees no more of than its text."""

        def response() -> _Response:
            nonlocal failure
            try:
                outcome = self.fetch(pending)
            except OSError as error:
                failure = error
                raise
            if isinstance(outcome, Dropped):
                failure = outcome
                raise outcome
            return _Response(outcome)

        token = _response.set(response)
        try:
            # Retries are ours: img2dataset repeats every failure, a 404 and an opt-out too.
            _, stream, error = self._downloader.download_image_with_retry(
                (0, str(parse(pending.url))),
                timeout=self._settings.timeout_s,
                retries=0,
                user_agent_token=_TOKEN,
                disallowed_header_directives=DIRECTIVES if self._settings.respect_opt_out else None,
            )
        except Dropped as dropped:
            return bare(dropped)
        finally:
            _response.reset(token)
        if stream is not None:
            return bytes(stream.getvalue())
        if isinstance(failure, Dropped):
            return bare(failure)
        raise failure or RuntimeError(f"img2dataset failed at an unforeseen point: {error}")


class _Response(BytesIO):
    """As much of urllib's response as img2dataset uses."""

    headers = Message()  # X-Robots-Tag was heeded on every hop already


_response: ContextVar[Callable[[], _Response]] = ContextVar("_response")


def urlopen(request: Request, timeout: float | None = None) -> _Response:
    """Stands in for urllib's: answers with the URL of this thread, whose deadline overrules `timeout`."""
    return _response.get()()


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
