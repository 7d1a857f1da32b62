"""Rows per CPU second of the download stage against img2dataset's own `download()`, on loopback.

    NO_ALBUMENTATIONS_UPDATE=1 python benchmarks/bench_download.py       # all mixes, native against img2dataset
    NO_ALBUMENTATIONS_UPDATE=1 python benchmarks/bench_download.py --rounds 5 --mix dead

The server has a process of its own and answers on 64 loopback addresses ("hosts"). Mixes: `dead` is 300 kB JPEGs with
33 % dead URLs (404, 410, refused connections, resets); `small` is 300 kB JPEGs of which 80 % are under
filter.min_image_px. Ours is the download stage as a shard's worker calls it (batches of FETCH_ROWS, fetch_ahead of them
begun before their turn, one process), hashes included. Theirs is `img2dataset.download` with one process, 128 threads,
no retries, nothing decoded or encoded again (`disable_all_reencoding`), sha256, no EXIF; it writes a webdataset
(`webdataset`) or nothing at all (`dummy`, the writer that flatters it most). CPU time is user + system of the process
and all its children, from `wait4`; start-up is excluded as the difference between a long and a short run. Bytes
received are what the clients' kernels acknowledged.
"""

import argparse
import asyncio
import io
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HOSTS = [f"127.0.9.{n}" for n in range(1, 65)]
CONCURRENCY = 128
MIXES = {
    "dead": ["large"] * 6 + ["404", "410", "refused"] + ["large"] * 6 + ["404", "404", "reset"],
    "small": ["small"] * 4 + ["large"],
}
_BYTES_ACKED = 120  # offset of tcpi_bytes_acked in struct tcp_info


# The server


def jpeg(side: int, size: int) -> bytes:
    """A square JPEG of noise, filled to `size` bytes behind its header by a comment of the pixels' own length."""
    rng = np.random.default_rng(side)
    for quality in range(95, 5, -1):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= size:
            break
    data = buffer.getvalue()
    return data + bytes(size - len(data))  # what lies behind the end mark is ignored by every decoder


def answer(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Serve(asyncio.Protocol):
    """Answers by the first word of the path, and counts what clients acknowledged."""

    answers: dict[str, bytes]
    acked = 0
    requests = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.pending = transport, b""
        self.link = transport.get_extra_info("socket")

    def data_received(self, data: bytes) -> None:
        self.pending += data
        while b"\r\n\r\n" in self.pending:
            request, self.pending = self.pending.split(b"\r\n\r\n", 1)
            self._answer(request.split(b" ", 2)[1].decode().strip("/").split("-")[0])

    def _answer(self, word: str) -> None:
        Serve.requests += 1
        if word == "stats":
            told = json.dumps({"acked": Serve.acked, "requests": Serve.requests}).encode()
            self.transport.write(answer("200 OK", told))
        elif word == "drip":
            self.transport.write(answer("200 OK", bytes(300_000))[:1000])
        elif word == "reset":
            self.link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self.transport.write(self.answers.get(word, self.answers["404"]))

    def connection_lost(self, error: Exception | None) -> None:
        # The client hung up, when it had what it wanted: no connection is ended here, but for the resets.
        told = self.link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
        Serve.acked += struct.unpack_from("Q", told, _BYTES_ACKED)[0]


async def serve() -> None:
    Serve.answers = {
        "large": answer("200 OK", jpeg(1100, 300_000)),
        "small": answer("200 OK", jpeg(900, 300_000)),
        "404": answer("404 Not Found", b"<html>gone</html>"),
        "410": answer("410 Gone", b""),
    }
    loop = asyncio.get_running_loop()
    first = await loop.create_server(Serve, HOSTS[0], 0, backlog=1024)
    port = first.sockets[0].getsockname()[1]
    for host in HOSTS[1:]:
        await loop.create_server(Serve, host, port, backlog=1024)
    print(port, flush=True)
    await asyncio.Event().wait()


# The two clients, each a process of its own


def urls(mix: str, rows: int, port: int, dead: int) -> Iterator[str]:
    kinds = MIXES[mix]
    for n in range(rows):
        host, kind = HOSTS[n * 7 % len(HOSTS)], kinds[n % len(kinds)]
        yield f"http://{host}:{dead if kind == 'refused' else port}/{kind}-{n}.jpg"


def ours(engine: str, listed: list[str]) -> dict[str, int]:
    from pipeline.dataset.config import ExecutorSettings
    from pipeline.dataset.execute.make_shard import FETCH_ROWS, ordered_ahead
    from stages.base import DROP
    from stages.download import Download
    from stages.runtime import Runtime
    from stages.settings import DownloadSettings, Settings

    told = DownloadSettings(engine=engine, allow_loopback=True, retries=0, concurrency=CONCURRENCY, timeout_s=60)
    stage = Download(Settings(download=told), Runtime())
    size = FETCH_ROWS
    batches = (
        pa.table({"url": pa.array(listed[n : n + size]), "image_ref": pa.nulls(len(listed[n : n + size]), pa.string())})
        for n in range(0, len(listed), size)
    )
    counts: dict[str, int] = {}
    for table in ordered_ahead(stage, batches, ExecutorSettings().fetch_ahead):
        for reason in table[DROP].to_pylist():
            counts[str(reason)] = counts.get(str(reason), 0) + 1
    stage.close()
    return counts


def theirs(writer: str, listed: list[str]) -> dict[str, int]:
    from img2dataset import download

    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/urls.parquet"
        pq.write_table(pa.table({"url": listed}), source)
        download(
            url_list=source,
            input_format="parquet",
            output_folder=f"{folder}/out",
            output_format=writer,
            processes_count=1,
            thread_count=CONCURRENCY,
            number_sample_per_shard=10_000,
            disable_all_reencoding=True,
            resize_mode="no",
            extract_exif=False,
            compute_hash="sha256",
            timeout=60,
            retries=0,
        )
        stats = json.loads(next(Path(folder, "out").glob("*_stats.json")).read_text())
        return {"None": stats["successes"], "failed": stats["failed_to_download"]}


# Measuring


def measured(who: str, mix: str, rows: int, port: int, dead: int) -> tuple[float, float, int, dict[str, int]]:
    """CPU seconds, seconds, bytes received and outcomes of one run."""
    before = stats(port)["acked"]
    command = [sys.executable, __file__, "--client", who, "--mix", mix, "--rows", str(rows)]
    begun = time.monotonic()
    client = subprocess.Popen([*command, "--ports", str(port), str(dead)], stdout=subprocess.PIPE)
    said = client.stdout.read().decode().strip().splitlines()
    _, status, usage = os.wait4(client.pid, 0)
    client.returncode = status
    if status:
        sys.exit(f"{who} failed")
    wall = time.monotonic() - begun
    time.sleep(0.3)  # the last connections end
    return usage.ru_utime + usage.ru_stime, wall, stats(port)["acked"] - before, json.loads(said[-1])


def stats(port: int) -> dict[str, int]:
    with urlopen(f"http://{HOSTS[0]}:{port}/stats") as response:
        told: dict[str, int] = json.loads(response.read())
        return told


def compare(args: argparse.Namespace, mix: str, port: int, dead: int) -> None:
    """Alternate all clients, so that each meets the same noise; print medians."""
    costs: dict[str, list[float]] = {who: [] for who in args.who}
    received: dict[str, float] = {}
    for _ in range(args.rounds):
        for who in args.who:
            short = measured(who, mix, args.short, port, dead)
            long = measured(who, mix, args.short + args.rows, port, dead)
            costs[who].append(1000 * (long[0] - short[0]) / args.rows)
            received[who] = (long[2] - short[2]) / args.rows
            speed = args.rows / (long[1] - short[1])
            print(f"  {mix} {who:20} {costs[who][-1]:.3f} ms CPU/row, {speed:.0f} rows/s, {long[3]}", flush=True)
    own = args.who[0]
    for who in args.who:
        ratios = [theirs / ours for theirs, ours in zip(costs[who], costs[own], strict=True)]
        print(
            f"{mix:6} {who:20} {statistics.median(costs[who]):.3f} ms CPU per row = "
            f"{1000 / statistics.median(costs[who]):.0f} rows per CPU second, {received[who] / 1000:.0f} kB received "
            f"per row; {own} is {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f}) on {100 * received[own] / received[who]:.0f} % of the bytes",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", choices=list(MIXES), action="append")
    parser.add_argument("--who", nargs="+", default=["native", "theirs:webdataset", "theirs:dummy"])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--short", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--ports", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve())
    elif args.client:
        kind, _, writer = args.client.partition(":")
        listed = list(urls(args.mix[0], args.rows, *args.ports))
        print(json.dumps(theirs(writer, listed) if kind == "theirs" else ours(kind, listed)))
    else:
        server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
        port = int(server.stdout.readline())
        with socket.create_server((HOSTS[0], 0)) as closed:
            dead = closed.getsockname()[1]
        try:
            for mix in args.mix or MIXES:
                compare(args, mix, port, dead)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
