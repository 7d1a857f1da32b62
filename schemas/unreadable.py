"""What unreadable files raise, wherever they lie."""

import csv
import sys
import tarfile
import zlib

import pyarrow as pa

_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, tarfile.TarError, csv.Error, pa.ArrowException)
"""What unreadable, truncated or corrupt files raise, in all formats that are read here; ValueError: text and URLs."""
_FOREIGN = (
    ("aiohttp", "ClientError"),
    ("azure.core.exceptions", "AzureError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
)
"""Errors of remote file systems (no credentials, no route) that are no OSError; known once their module is loaded."""


def unreadable() -> tuple[type[BaseException], ...]:
    """All errors that mean: this file or folder cannot be read."""
    foreign = [getattr(sys.modules[module], name) for module, name in _FOREIGN if module in sys.modules]
    return (*_UNREADABLE, *foreign)
