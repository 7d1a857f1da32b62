"""One connection of the native engine, with nothing between it and its socket.

asyncio's transports cost more than a small image's whole way through this process, and take from the network ahead of
what was asked for. Here a read takes as much as there is room for, and no more; waits end by cancellation alone:
deadlines are the caller's.
"""

import asyncio
import socket
import ssl
from collections.abc import Sequence
from functools import cache

from stages.fetch.base import LOCAL_TROUBLE
from stages.fetch.http.resolve import Place

_NARROW = 32 << 10
"""Receive buffer and window, bytes: what a server can push at us in vain, after at most 64 KiB over a new connection.
Over such a link 100 ms away come some 300 kB/s: many at a time make up for it."""
_WIDE = 1 << 20
"""Receive buffer and window for large images, bytes."""
_SPACE = 8 << 10
"""For the head and what comes with it: enough of the body for a first look, and not much more."""
_BURST = 16
"""Reads in a row without letting others have their turn: a flood from one server must not hold up the rest."""
_TINY, _MOST_TINY, _GATHER_S = 512, 32, 0.01
"""A server that sends single bytes as fast as it can costs us a wake-up each: from then on they are let to gather."""


@cache
def tls_context() -> ssl.SSLContext:
    """The system's certificates, loaded once."""
    return ssl.create_default_context()


class Link:
    """A connected socket on the loop. Make it with `connect`; `close` it in the end."""

    def __init__(self, made: socket.socket) -> None:
        """Take over a socket that does not block."""
        self._socket = made
        self._loop = asyncio.get_running_loop()
        self._fd = made.fileno()
        self._waiter: asyncio.Future[int] | None = None
        self._room: memoryview | None = None
        self._listening = False
        self._unheard = 0
        self._reads = 0
        self._tiny = 0
        self._resting = False
        self.space = memoryview(bytearray(_SPACE))
        """For those who hold the link to receive into."""
        self.used = False
        """An answer came over it before."""
        self.wide = False
        """It was widened. Windows cannot shrink again without losing packets, and a fifth of a second with them."""
        self.closed = False

    async def connect(self, place: Place, port: int, tls_host: str | None) -> None:
        """Connect, and shake hands where `tls_host` names whom to expect.

        Raises:
            OSError: when that fails.
        """
        self._socket.setblocking(False)
        try:
            self._socket.connect((place.address, port))
        except BlockingIOError:
            await self._connected()
        self._buffer(_NARROW)  # not before: the scale of the window is fixed then, and with it the widest one
        if tls_host is not None:
            await self._shake_hands(tls_host)

    async def send(self, data: bytes) -> None:
        """Send all of `data`.

        Raises:
            OSError: when the connection breaks.
        """
        while data:
            try:
                data = data[self._socket.send(data) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await self._writable()
            except ssl.SSLWantReadError:
                await self._heard_of()

    async def receive(self, room: memoryview) -> int:
        """Bytes that were put into `room`, 0 at the end.

        Raises:
            OSError: when the connection breaks.
        """
        self._reads += 1
        if self._tiny > _MOST_TINY:
            await asyncio.sleep(_GATHER_S)
        elif self._reads > _BURST:
            self._reads = 0
            await asyncio.sleep(0)
        count = await self._taken(room)
        self._tiny = max(0, self._tiny + (1 if count < _TINY else -1))
        return count

    async def answer(self, room: memoryview) -> int:
        """As `receive`, right after a request: nothing can be there yet."""
        return await self._received(room)

    async def _taken(self, room: memoryview) -> int:
        while True:
            try:
                return self._socket.recv_into(room)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._reads = 0
                return await self._received(room)
            except ssl.SSLWantWriteError:
                await self._writable()

    def widen(self) -> None:
        """Let the server send ahead: what comes is wanted, and much. Do not use the link again."""
        if not self.wide:
            self.wide = True
            self._buffer(_WIDE)

    def rest(self) -> None:
        """Wait for a further request: any byte, and the end, close the link."""
        self.used = self._resting = True
        self._listen()

    def wake(self) -> None:
        """A further request follows."""
        self._resting = False

    def close(self) -> None:
        """Let go of the socket."""
        if not self.closed:
            self.closed = True
            self._ignore()
            self._socket.close()

    def _buffer(self, size: int) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        if hasattr(socket, "TCP_WINDOW_CLAMP"):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, size)

    async def _connected(self) -> None:
        try:
            self._socket.getpeername()  # on loopback, and to a neighbour, that was all
        except OSError:
            await self._writable()
            failed = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failed:
                raise OSError(failed, "no connection") from None

    async def _shake_hands(self, host: str) -> None:
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            secured = tls_context().wrap_socket(self._socket, server_hostname=host, do_handshake_on_connect=False)
        except ValueError as error:  # no name that a certificate could have
            raise ssl.SSLError(str(error)) from error
        self._socket = secured
        while True:
            try:
                return secured.do_handshake()
            except ssl.SSLWantReadError:
                await self._heard_of()
            except ssl.SSLWantWriteError:
                await self._writable()

    async def _received(self, room: memoryview) -> int:
        """Wait for bytes; they are read as soon as they are there, so that the loop does not report them again."""
        self._room = room
        try:
            return await self._heard_of()
        finally:
            self._room = None

    async def _heard_of(self) -> int:
        self._listen()
        self._waiter = self._loop.create_future()
        return await self._waiter

    async def _writable(self) -> None:
        waiter = self._loop.create_future()
        self._loop.add_writer(self._fd, _set, waiter)
        try:
            await waiter
        finally:
            self._loop.remove_writer(self._fd)

    def _listen(self) -> None:
        self._unheard = 0
        if not self._listening:
            self._listening = True
            self._loop.add_reader(self._fd, self._heard)

    def _ignore(self) -> None:
        if self._listening:
            self._listening = False
            self._loop.remove_reader(self._fd)

    def _heard(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._answer(waiter)
        elif self._resting:
            self._stirred()
        else:
            # Registering anew for every wait costs a system call each; but the loop must not spin either.
            self._unheard += 1
            if self._unheard > 1:
                self._ignore()

    def _stirred(self) -> None:
        """A resting link became readable: nothing is due, so that bytes and the end both are a reason to part."""
        try:
            self._socket.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return  # news of what was read already, or of TLS itself
        except OSError:
            pass
        self.close()

    def _answer(self, waiter: "asyncio.Future[int]") -> None:
        if waiter.done():
            self._waiter = None
            return
        try:
            count = 0 if self._room is None else self._socket.recv_into(self._room)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError as error:
            self._waiter = None
            waiter.set_exception(error)
        else:
            self._waiter = None
            waiter.set_result(count)


def _set(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


async def connect(places: Sequence[Place], port: int, tls_host: str | None, each_s: float) -> Link:
    """A link to the first of these addresses that answers; all but the last have `each_s` seconds for it.

    Raises:
        OSError: what went wrong with the last.
    """
    *others, last = places
    for place in others:
        try:
            async with asyncio.timeout(each_s):
                return await _connect(place, port, tls_host)
        except OSError as error:
            if error.errno in LOCAL_TROUBLE:
                raise
    return await _connect(last, port, tls_host)


async def _connect(place: Place, port: int, tls_host: str | None) -> Link:
    link = Link(socket.socket(place.family, socket.SOCK_STREAM))
    try:
        await link.connect(place, port, tls_host)
    except BaseException:
        link.close()
        raise
    return link
