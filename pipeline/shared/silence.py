"""How long a server may be silent that lies behind a URL: some two minutes, however many times a library tries."""

from contextlib import suppress
from typing import Any

_CONNECT_S, _READ_S = 30, 60
"""Of HTTP, which fsspec tries twice."""


def limit_silence(url: str, conf: dict[str, dict[str, Any]]) -> None:
    """Put limits into fsspec's configuration `conf`, for the protocol of a URL.

    What the user configured (FSSPEC_S3_…, ~/.config/fsspec) stays, as do the timeouts and numbers of tries that
    botocore reads (AWS_MAX_ATTEMPTS, ~/.aws/config). Who is slow has no limit: total times have none.
    """
    if "http://" in url or "https://" in url:
        from aiohttp import ClientTimeout

        options = conf.setdefault("http", {}).setdefault("client_kwargs", {})
        options.setdefault("timeout", ClientTimeout(sock_connect=_CONNECT_S, sock_read=_READ_S))
    if "s3://" in url or "s3a://" in url:
        with suppress(ImportError):  # whoever looks up the file system says what is to be installed
            from pipeline.shared.s3_session import S3Session

            options = conf.setdefault("s3", {}).setdefault("config_kwargs", {})
            options.setdefault("http_session_cls", S3Session)
