"""A server of a folder's files on loopback, for benchmarks: `python server.py FOLDER` prints its port.

`/name?tail` is the file with `tail` behind it, which every decoder ignores: so no two images are equal. Where there is
no such file it is `/name-anything`; all else, robots.txt as well, gets 404.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AWS_OF_NOBODY = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
"""Environment for an S3-compatible server on loopback, in which no file and no host is asked who one is."""


async def serve(folder: Path, host: str = "0.0.0.0") -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with_body = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                name, _, tail = request.split(b" ", 2)[1].decode().strip("/").partition("?")
                body = files.get(name) or files.get(name.split("-")[0])
                size = len(body or b"") + len(tail)
                head = with_body % size if body else b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
                writer.write(head + (body + tail.encode() if body else b""))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, host, 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


@contextmanager
def serving(folder: Path) -> Iterator[tuple[int, int]]:
    """Its port and its process's id, while the block runs."""
    server = subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        yield int(server.stdout.readline()), server.pid
    finally:
        server.kill()
        server.communicate()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
