"""The one digest of this project: sha256 as 64 hex digits, of bytes, of files and of JSON values."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import IO, Any


def sha256(data: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_stream(stream: IO[bytes]) -> str:
    """Of what is left to read of a binary file, local or of fsspec, in bounded memory."""
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def sha256_of_file(path: Path) -> str:
    """Of a local file that others leave alone, such as weights: read once per process while size and time stay."""
    stat = path.stat()
    return _of_file(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _of_file(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as stream:
        return sha256_of_stream(stream)


def sha256_of_json(value: Mapping[str, Any]) -> str:
    """Of a JSON-able mapping in canonical form: sorted keys, no white space, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return sha256(text.encode(errors="surrogatepass"))  # JSON may hold halves of surrogates
