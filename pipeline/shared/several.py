"""Work beside work: files of a store are mostly waited for, those on a disk may be work for all cores."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from pipeline.shared.files import AnyPath, RemotePath

T = TypeVar("T")

_OF_A_STORE = 16


def of_each(folder: AnyPath, read: Callable[[str], T], names: Iterable[str], threads: int = 1) -> Iterator[T]:
    """What is read of each name, in their order, of a store by 16 threads and no more ahead, else by `threads`."""
    threads = _OF_A_STORE if isinstance(folder, RemotePath) else threads
    if threads == 1:
        yield from map(read, names)
        return
    pool, begun = ThreadPoolExecutor(threads), deque[Future[T]]()
    try:
        for name in names:
            begun.append(pool.submit(read, name))
            if len(begun) == threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same, each made in a thread while the one before is in use; whoever stops early does not wait for it."""
    pool = ThreadPoolExecutor(1)
    try:
        following = pool.submit(list, islice(items, 1))
        while made := following.result():
            following = pool.submit(list, islice(items, 1))
            yield from made
    finally:
        pool.shutdown(wait=False)
