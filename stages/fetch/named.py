"""Things by name, made when first asked for, and kept as long as somebody holds them."""

import weakref
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class Named(Generic[T]):
    """A semaphore per host, a lock per origin: everybody who asks for a name gets the same one; safe for threads."""

    def __init__(self, make: Callable[[], T]) -> None:
        """Remember how to make one."""
        self._make = make
        self._known: weakref.WeakValueDictionary[Hashable, T] = weakref.WeakValueDictionary()
        self._lock = Lock()

    def of(self, name: Hashable) -> T:
        """The one of this name."""
        with self._lock:
            known = self._known.get(name)
            if known is None:
                known = self._known[name] = self._make()
            return known
