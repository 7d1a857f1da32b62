"""The img2dataset engine: img2dataset's own download function, in a pool of threads.

It runs with an `urlopen` that keeps our promises (`stages.fetch.opener`): left alone it would follow redirects to any
address, read bodies of any size, and wait as long as a server drips. What it cannot promise: the deadline does not
cover the look-up of a name, which blocks its thread.
"""

import os
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import count
from threading import BoundedSemaphore, Lock
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any
from urllib.request import Request

from yarl import URL

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch import address, robots
from stages.fetch.base import Outcome, bare, wait_s
from stages.fetch.opener import Opener
from stages.settings import Settings

_OPTED_OUT = "Use of image disallowed by X-Robots-Tag directive"
_TOKEN = "faceshards"  # noqa: S105 (a product name)


class Img2dataset:
    """Fetches with img2dataset; `fetch` may be called from several threads at once."""

    def __init__(self, settings: Settings) -> None:
        """Import img2dataset and start the pool."""
        self._settings = settings
        self._downloader = _import()
        self._pool = ThreadPoolExecutor(settings.download.concurrency, thread_name_prefix="faceshards-img2dataset")
        self._hosts: weakref.WeakValueDictionary[str, BoundedSemaphore] = weakref.WeakValueDictionary()
        self._lock = Lock()

    def fetch(self, urls: Sequence[str | None]) -> list[Outcome]:
        """The outcome of each URL, in their order."""
        return list(self._pool.map(self._outcome, urls))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _outcome(self, text: str | None) -> Outcome:
        try:
            url = address.parse(text)
            with self._host(url.raw_host or ""):
                return self._persist(url)
        except Dropped as dropped:
            return bare(dropped)

    def _host(self, host: str) -> BoundedSemaphore:
        with self._lock:
            gate = self._hosts.get(host)
            if gate is None:
                gate = self._hosts[host] = BoundedSemaphore(self._settings.download.per_host)
            return gate

    def _persist(self, url: URL) -> bytes:
        deadline = time.monotonic() + self._settings.download.timeout_s
        for attempt in count():
            try:
                return self._attempt(url, deadline)
            except Dropped as failure:
                pause = wait_s(failure, attempt, self._settings.download, deadline - time.monotonic())
            time.sleep(pause)
        raise AssertionError("count() does not end")

    def _attempt(self, url: URL, deadline: float) -> bytes:
        opener = Opener(self._settings, deadline)
        # Retries are ours: img2dataset repeats every failure, a 404 and an opt-out too.
        _, stream, text = _with_urlopen(self._downloader, opener.open)(
            (0, str(url)),
            timeout=self._settings.download.timeout_s,
            retries=0,
            user_agent_token=_TOKEN,
            disallowed_header_directives=robots.DIRECTIVES if self._settings.download.respect_opt_out else None,
        )
        if stream is not None:
            return bytes(stream.getvalue())
        if opener.failure is not None:
            raise opener.failure
        if text == _OPTED_OUT:
            raise Dropped(DropReason.OPTED_OUT)
        raise RuntimeError(f"img2dataset failed in an unforeseen way: {text}")


def _import() -> ModuleType:
    # The package imports wandb and albumentations, which phone home unless told not to.
    os.environ.setdefault("WANDB_MODE", "disabled")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports imghdr
        return import_module("img2dataset.downloader")


def _with_urlopen(downloader: ModuleType, urlopen: Callable[..., Any]) -> Callable[..., Any]:
    """img2dataset's download_image_with_retry, that sees another `urlopen`; the process's own stays as it is."""
    names = vars(downloader) | {"urllib": SimpleNamespace(request=SimpleNamespace(Request=Request, urlopen=urlopen))}
    names["download_image"] = FunctionType(downloader.download_image.__code__, names)
    return FunctionType(downloader.download_image_with_retry.__code__, names)
