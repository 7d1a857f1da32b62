"""Several files of a store at a time: over a network, each of them is mostly waited for."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipeline.shared.files import AnyPath, RemotePath

T = TypeVar("T")

_AT_A_TIME = 16


def of_each(folder: AnyPath, read: Callable[[str], T], names: Iterable[str]) -> Iterator[T]:
    """What is read of each name, in their order; of a local folder one by one, of a store no more than 16 ahead."""
    if not isinstance(folder, RemotePath):
        yield from map(read, names)
        return
    pool, ahead = ThreadPoolExecutor(_AT_A_TIME), deque[Future[T]]()
    try:
        for name in names:
            ahead.append(pool.submit(read, name))
            if len(ahead) == _AT_A_TIME:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
