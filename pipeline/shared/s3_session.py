"""What S3 is spoken to by: a session of aiobotocore that gives up a store which is silent.

By themselves s3fs and botocore try 25 or 125 times, 15 s each, and a put waits without bound: aiohttp counts no time
before a body is sent, neither while it awaits `100 Continue` nor while nobody takes what is written.
"""

import errno
import inspect
import socket
import time
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError, ReadTimeoutError

from schemas.errors import RemoteError

if "http_session_cls" not in inspect.signature(AioConfig).parameters:
    raise ImportError("aiobotocore is older than its choice of sessions")

_PATIENCE, _READ_S = 8, 15
"""Times the read timeout, which is 15 s (of s3fs) unless the user's configuration says otherwise."""


class S3Session(AIOHTTPSession):  # type: ignore[misc]
    """Raises a `RemoteError`, after which nobody tries again, for a request that nobody answered for so long."""

    def __init__(self, *, timeout: Any, connector_args: dict[str, Any] | None = None, **options: Any) -> None:
        read_timeout = timeout[1] if isinstance(timeout, list | tuple) else timeout
        self._patience_s = _PATIENCE * (read_timeout or _READ_S)
        self._silent: dict[tuple[str, str], tuple[float, float]] = {}
        """Of a request that nobody answered: when it was first sent, and when it was given up last."""
        connector_args = {"socket_factory": self._socket, **(connector_args or {})}
        super().__init__(timeout=timeout, connector_args=connector_args, **options)

    def _socket(self, address: Any) -> socket.socket:
        made = socket.socket(*address[:3])
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # of what is sent, and neither acknowledged nor taken
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._patience_s * 1000))
        return made

    async def send(self, request: Any) -> Any:
        if "Expect" in request.headers:
            del request.headers["Expect"]
        name, now = (request.method, request.url), time.monotonic()
        first, last = self._silent.pop(name, (now, now))
        if now - last > self._patience_s:  # of an earlier attempt, whose end has nothing to do with this one
            first = now
        try:
            return await super().send(request)
        except (ConnectTimeoutError, EndpointConnectionError, ReadTimeoutError) as error:
            now = time.monotonic()
            is_silent = getattr(error.kwargs["error"], "errno", None) in (None, errno.ETIMEDOUT)
            if is_silent and now - first >= self._patience_s:
                host = "/".join(request.url.split("/", 3)[:3])
                raise RemoteError(f"{host} gave no answer for {now - first:.0f} s") from error
            if is_silent:
                self._silent[name] = (first, now)
            raise
