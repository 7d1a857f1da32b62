"""Images per second, and per CPU second, of the download stage against img2dataset's own `download()`.

    python benchmarks/bench_download.py                                           # from a server on loopback
    python benchmarks/bench_download.py --base 'http://h{host}.images.example' --mix a --mix b --connections 128

With --base the images come from a server elsewhere: `{host}` becomes 0 … --hosts - 1, and each of them must answer
`/l300-<anything>.jpg` with a JPEG of 300 kB and at least 1,024 pixels on both sides; so l150, l800 and l3000, and s60,
s90 and s120 with fewer pixels; anything else with 404. Over loopback only CPU time means something: it is a distance
that windows and connections are about.

Mixes: `a` is images of 300 kB alone. `b` is LAION-like: 33 % dead (404, refused, no such name), 50 % too small (60 to
120 kB), 17 % large (150 kB to 3 MB). Ours is the download stage as a shard's worker calls it (one process, hashes
and robots.txt included). Theirs is one process with as many threads, no retries, nothing encoded again, that writes a
webdataset (`theirs:webdataset`) or nothing at all (`theirs:dummy`). Each client is a process of its own; its start is
excluded as the difference between a long and a short run. Bytes are those that this machine's network received.
"""

import argparse
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from server import serving

KINDS = {"l150": (1200, 1100), "l300": (1280, 1100), "l800": (2048, 1536), "l3000": (3000, 2400)}
SMALL_KINDS = {"s60": (640, 480), "s90": (800, 600), "s120": (900, 700)}
LARGE = ["l150"] * 4 + ["l300"] * 4 + ["l800"] * 2 + ["l3000"]
DEAD = ["gone", "refused", "gone", "unknown", "gone", "refused"]
TIMEOUT_S = 60


def kind_of(mix: str, n: int) -> str:
    turn, block = n % 18, n // 18
    if mix == "a":
        return "l300"
    if turn < 9:
        return list(SMALL_KINDS)[turn % 3]
    return DEAD[turn - 9] if turn < 15 else LARGE[(3 * block + turn) % len(LARGE)]


def urls(args: argparse.Namespace, mix: str, rows: int) -> Iterator[str]:
    for n in np.random.default_rng(rows).permutation(rows):
        kind, base = kind_of(mix, int(n)), args.base.format(host=n % args.hosts)
        if kind == "refused":
            base = f"{base.rpartition(':')[0] if base.count(':') > 1 else base}:{args.dead_port}"
        yield f"http://no-such-name-{n}.invalid/x.jpg" if kind == "unknown" else f"{base}/{kind}-{n}.jpg"


# What is served, where no server is given


def jpeg(width: int, height: int, size: int) -> bytes:
    """A JPEG of noise, filled up behind its end mark, which every decoder ignores."""
    noise = np.random.default_rng(width).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    for quality in range(95, 1, -4):
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((width, height)).save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= size:
            break
    return buffer.getvalue().ljust(size, b"\0")


def write_images(folder: Path) -> None:
    """By the first word of the URLs' paths."""
    for name, sides in {**KINDS, **SMALL_KINDS}.items():
        (folder / name).write_bytes(jpeg(*sides, 1000 * int(name[1:])))


# The two clients, each a process of its own


def ours(args: argparse.Namespace, engine: str, listed: list[str]) -> Counter[str]:
    from pipeline.dataset.execute.make_shard import FETCH_ROWS
    from stages.base import DROP
    from stages.download import Download
    from stages.runtime import Runtime
    from stages.settings import DownloadSettings, Settings

    settings = DownloadSettings(
        engine=engine, allow_loopback=True, retries=0, concurrency=args.connections, timeout_s=TIMEOUT_S
    )
    stage = Download(Settings(download=settings), Runtime())
    parts = [listed[n : n + FETCH_ROWS] for n in range(0, len(listed), FETCH_ROWS)]
    tables = (pa.table({"url": part, "image_ref": pa.nulls(len(part), pa.string())}) for part in parts)
    counts = Counter(str(reason) for table in stage.stream(tables) for reason in table[DROP].to_pylist())
    stage.close()
    return counts


def theirs(args: argparse.Namespace, writer: str, listed: list[str]) -> Counter[str]:
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    from img2dataset import download

    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({"url": listed}), f"{folder}/urls.parquet")
        download(
            url_list=f"{folder}/urls.parquet",
            input_format="parquet",
            output_folder=f"{folder}/out",
            output_format=writer,
            processes_count=1,
            thread_count=args.connections,
            number_sample_per_shard=100_000,
            disable_all_reencoding=True,
            resize_mode="no",
            extract_exif=False,
            compute_hash="sha256",
            timeout=TIMEOUT_S,
            retries=0,
        )
        stats = json.loads(next(Path(folder, "out").glob("*_stats.json")).read_text())
        return Counter({"None": stats["successes"], "failed": stats["failed_to_download"]})


def received(interfaces: list[str]) -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    counts = {name.strip(): int(values.split()[0]) for name, values in (line.split(":") for line in lines)}
    return sum(count for name, count in counts.items() if name in interfaces or (not interfaces and name != "lo"))


def measured(args: argparse.Namespace, who: str, mix: str, rows: int) -> tuple[np.ndarray, str]:
    """Seconds, CPU seconds and bytes of one run, and its outcomes."""
    interfaces = ["lo"] if args.is_local else []
    command = [sys.executable, __file__, "--client", who, "--mix", mix, "--rows", str(rows), "--base", args.base]
    command += ["--hosts", str(args.hosts), "--connections", str(args.connections), "--dead-port", str(args.dead_port)]
    begun, before = time.monotonic(), received(interfaces)
    client = subprocess.Popen(command, stdout=subprocess.PIPE)
    output = client.stdout.read().decode().strip().splitlines()
    _, status, usage = os.wait4(client.pid, 0)
    client.returncode = status
    if status:
        sys.exit(f"{who} failed")
    spent = [time.monotonic() - begun, usage.ru_utime + usage.ru_stime, received(interfaces) - before]
    return np.array(spent), output[-1]


def compare(args: argparse.Namespace, mix: str) -> None:
    """Alternate all clients, so that each meets the same noise; print medians."""
    costs: dict[str, list[np.ndarray]] = {who: [] for who in args.who}
    for _ in range(args.rounds):
        for who in args.who:
            short, _ = measured(args, who, mix, args.short)
            long, outcomes = measured(args, who, mix, args.short + args.rows)
            costs[who].append((long - short) / args.rows)
            print(f"  {mix} {who:18} {1 / costs[who][-1][0]:.0f} rows/s {outcomes}", flush=True)
    for who in args.who:
        seconds, cpu, size = (statistics.median(cost[n] for cost in costs[who]) for n in range(3))
        mine = [statistics.median(cost[n] for cost in costs[args.who[0]]) for n in range(3)]
        print(
            f"{mix} {who:18} {1 / seconds:.0f} rows/s, {1 / cpu:.0f} rows per CPU second, {size / 1000:.0f} kB per row;"
            f" {args.who[0]}: {seconds / mine[0]:.2f} x rows/s, {cpu / mine[1]:.2f} x rows per CPU second,"
            f" {mine[2] / size:.2f} x bytes",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="URL of a server, with {host} where its host names differ")
    parser.add_argument("--hosts", type=int, default=64)
    parser.add_argument("--connections", type=int, default=128)
    parser.add_argument("--mix", choices=["a", "b"], action="append")
    parser.add_argument("--who", nargs="+", default=["native", "theirs:webdataset", "theirs:dummy"])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--short", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dead-port", type=int, default=81, help="a port at which nobody listens")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        kind, _, writer = args.client.partition(":")
        listed = list(urls(args, args.mix[0], args.rows))
        print(json.dumps(theirs(args, writer, listed) if kind == "theirs" else ours(args, kind, listed)))
        return
    args.is_local = args.base is None
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if args.is_local:
            write_images(Path(folder))
            port, _ = stack.enter_context(serving(Path(folder)))
            args.base = f"http://127.0.9.{{host}}:{port}"
        with socket.create_server(("127.0.0.1", 0)) as closed:
            args.dead_port = closed.getsockname()[1] if args.is_local else args.dead_port
        for mix in args.mix or ["a", "b"]:
            compare(args, mix)


if __name__ == "__main__":
    main()
