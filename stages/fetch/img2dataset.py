"""The img2dataset engine: img2dataset's own download function, in a pool of threads.

It runs with an `urlopen` that keeps our promises (`stages.fetch.opener`): left alone it would follow redirects to any
address, read bodies of any size, and wait as long as a server drips. What it cannot promise: the deadline does not
cover the look-up of a name, which blocks its thread.
"""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import count
from threading import BoundedSemaphore
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any
from urllib.request import Request

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch import address, robots_tag
from stages.fetch.address import Guard, Url
from stages.fetch.base import Outcome, bare, wait_s
from stages.fetch.manners.hosts import Hosts
from stages.fetch.manners.refusals import Refusals
from stages.fetch.manners.robots_opened import Robots
from stages.fetch.named import Named
from stages.fetch.opener import Opener
from stages.runtime import Runtime
from stages.settings import Settings

_OPTED_OUT = "Use of image disallowed by X-Robots-Tag directive"
_TOKEN = "faceshards"  # noqa: S105 (a product name)


class Img2dataset:
    """Fetches with img2dataset; `fetch` may be called from several threads at once."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        """Import img2dataset and start the pool."""
        self._settings = settings
        self._guard = Guard(settings.download, runtime.sample_port)
        self._downloader = _import()
        self._pool = ThreadPoolExecutor(settings.download.concurrency, thread_name_prefix="faceshards-img2dataset")
        self._turns = Named[BoundedSemaphore](lambda: BoundedSemaphore(settings.download.per_host))
        self._hosts = Hosts(settings.download)
        self._refusals = Refusals(runtime.refusals)
        self._robots = Robots(settings, self._guard)

    def fetch(self, urls: Sequence[str | None]) -> list[Outcome]:
        """The outcome of each URL, in their order."""
        self._refusals.refresh()
        return list(self._pool.map(self._outcome, urls))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
        self._refusals.close()

    def _outcome(self, text: str | None) -> Outcome:
        way: list[Url] = []
        try:
            return self._fetched(address.parse(text), way)
        except Dropped as dropped:
            self._refusals.add(way, dropped.reason)
            return bare(dropped)

    def _fetched(self, url: Url, way: list[Url]) -> bytes:
        self._refusals.check(url)
        while True:
            with self._turns.of(url.host):
                # Only now: while it waited for its turn, those before it may have found the host down.
                pause = self._hosts.wait_s(url.origin)
                if not pause:
                    self._robots.check(url)
                    return self._persist(url, way)
            time.sleep(pause)

    def _hop(self, url: Url) -> None:
        """What holds for the first URL holds for where it redirects to."""
        self._refusals.check(url)
        if self._hosts.wait_s(url.origin):
            raise Dropped(DropReason.HOST_DOWN)
        self._robots.check(url)

    def _persist(self, url: Url, way: list[Url]) -> bytes:
        deadline = time.monotonic() + self._settings.download.timeout_s
        for attempt in count():
            try:
                return self._attempt(url, way, deadline)
            except Dropped as failure:
                self._hosts.saw(way[-1].origin, failure)
                pause = wait_s(failure, attempt, self._settings.download, deadline - time.monotonic())
            time.sleep(pause)
        raise AssertionError("count() does not end")

    def _attempt(self, url: Url, way: list[Url], deadline: float) -> bytes:
        opener = Opener(self._settings, self._guard, deadline, self._hop)
        try:
            return self._opened(url, opener)
        finally:
            way[:] = opener.way or [url]

    def _opened(self, url: Url, opener: Opener) -> bytes:
        # Retries are ours: img2dataset repeats every failure, a 404 and an opt-out too.
        _, stream, text = _with_urlopen(self._downloader, opener.open)(
            (0, str(url)),
            timeout=self._settings.download.timeout_s,
            retries=0,
            user_agent_token=_TOKEN,
            disallowed_header_directives=robots_tag.DIRECTIVES if self._settings.download.respect_opt_out else None,
        )
        if stream is not None:
            self._hosts.saw(opener.way[-1].origin, None)
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
