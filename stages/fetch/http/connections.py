"""aiohttp's connections, within bounds that it does not have itself.

What is overridden here is not part of aiohttp's public interface: the tests of the hostile web hold it.
"""

import asyncio
import contextlib
import socket
from asyncio.trsock import TransportSocket
from contextvars import ContextVar
from functools import partial
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.http_exceptions import BadHttpMessage

_MOST_INTERIM = 8
"""1xx heads before the answer itself."""
_MOST_OVERHEAD = 512 << 10
"""Bytes of heads, chunk lines and trailers, and those that wait to be parsed, beyond as many as the body has."""
_READ = 64 << 10
"""Bytes that are read at a time."""
_HEAD_PIECE = 4 << 10
"""Bytes that are read at a time until the head is there: of a flood of heads no more is parsed in one go."""
_GATHERED = 16 << 10
"""Bytes of a body that the kernel gathers until it wakes us, since a wake-up costs more than the packet that it is for.
Far less than a connection's window at its beginning, which they take up meanwhile."""
_EACH_PACKET = 16 << 10
"""So far into a body each packet wakes us: the first bytes of an image show whether more of it are wanted."""
_TLS_RECORD = 16 << 10
"""Bytes that may have left the kernel and wait for the rest of their record."""

is_reused: ContextVar[bool] = ContextVar("is_reused")
"""Whether this task's last request went out over a connection that had waited."""


class Connector(aiohttp.TCPConnector):
    """Few connections wait for a further request, and none over which something came unasked is used again."""

    def __init__(self, most_waiting: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._most_waiting = most_waiting
        self._factory = partial(_Handler, asyncio.get_running_loop())  # type: ignore[assignment]

    def _release(self, key: ConnectionKey, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        super()._release(key, protocol, should_close=should_close)
        if sum(map(len, self._conns.values())) > self._most_waiting:
            oldest = next(iter(self._conns))
            waiting, _ = self._conns[oldest].popleft()
            waiting.close()
            if not self._conns[oldest]:
                del self._conns[oldest]

    async def _get(self, key: ConnectionKey, traces: list[aiohttp.tracing.Trace]) -> Connection | None:
        waiting = self._conns.get(key)
        if waiting:
            waiting.rotate()  # the one that was used last is taken next: its window is the widest
            for protocol, _ in waiting:
                if protocol.should_close:
                    protocol.close()
        connection = await super()._get(key, traces)
        is_reused.set(connection is not None)
        return connection


class _Handler(ResponseHandler):
    """Reads answers; floods that hold no body are errors, and every error reaches who waits for the body."""

    _received = 0
    """Bytes of this answer."""
    _length = 0
    """Its Content-Length; 0 where there is none."""
    _socket: TransportSocket | None = None
    _undecrypted = 0
    """Bytes of a body that may have come, but not to us."""
    _wakes_at = 1
    """Bytes that have to be there until the kernel wakes us."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Read less at a time than asyncio does: larger buffers are mapped and given back to the system each time."""
        super().connection_made(transport)
        if hasattr(transport, "max_size"):
            transport.max_size = _READ
        self._socket = transport.get_extra_info("socket")
        self._undecrypted = _TLS_RECORD if transport.get_extra_info("ssl_object") else 0

    _interim: int | None = None
    """1xx heads that came; None once the head of the answer itself is there."""

    def set_response_params(self, **params: Any) -> None:
        self._interim = self._received = 0
        super().set_response_params(**params)

    def feed_data(self, data: Any, size: int = 0) -> None:
        """Take a head (and the stream of its body)."""
        code = data[0].code
        if not 100 <= code < 200 or code == 101:
            self._interim = None
            self._length = int(data[0].headers.get("Content-Length", 0))
        elif self._interim is not None:
            self._interim += 1
        super().feed_data(data, size)

    def data_received(self, data: bytes) -> None:
        """Take bytes from the network, and say how many more are to be there until the next call."""
        while self._interim is not None and len(data) > _HEAD_PIECE:
            self._take(data[:_HEAD_PIECE])
            data = data[_HEAD_PIECE:]
            if self._exception is not None:
                return
        self._take(data)
        # Never more than what is still to come, and a single byte again once all is there: what comes unasked has to
        # be noticed, and so has the next answer.
        body, wanted = self._payload, 1
        if body is not None and body.total_bytes >= _EACH_PACKET:
            wanted = max(1, min(_GATHERED, self._length - body.total_bytes - self._undecrypted))
        if wanted != self._wakes_at and self._socket is not None:
            self._wakes_at = wanted
            with contextlib.suppress(OSError):  # the connection has ended
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)

    def _take(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        body = self._payload
        if (self._interim or 0) > _MOST_INTERIM or (
            body is not None and self._received > _MOST_OVERHEAD + 2 * body.total_bytes
        ):
            self.set_exception(BadHttpMessage("a flood"))
            if self.transport is not None:
                self.transport.abort()
        if self._exception is not None and body is not None and not body.is_eof():
            body.set_exception(aiohttp.ClientError("no HTTP within the body"))
