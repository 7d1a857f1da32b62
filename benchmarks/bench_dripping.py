"""What a host that drips costs the other rows: the same good rows with and without it strewn among them.

    python benchmarks/bench_dripping.py
    python benchmarks/bench_dripping.py --rate 200 --rows 12000   # stages behind it take their time

Rows go through the download stage as a shard's worker calls it: batches of FETCH_ROWS rows, in order, `--ahead` of them
begun before their turn (executor.fetch_ahead). Server: that of bench_download.py. Only the good rows are counted; their
throughput is good rows per second up to the last of them, once with one deadline taken off, since that much the host
may cost.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parent))

import bench_download as shared

from pipeline.dataset.execute.make_shard import FETCH_ROWS, ordered_ahead
from stages.base import DROP
from stages.download import Download
from stages.runtime import Runtime
from stages.settings import DownloadSettings, Settings


def rows(args: argparse.Namespace, port: int, drips: bool) -> list[str]:
    listed = []
    for n in range(args.rows):
        listed.append(f"http://{shared.HOSTS[n % 60]}:{port}/{args.good}-{n}.jpg")
        if drips and n % args.every == 0:
            listed.append(f"http://{shared.HOSTS[63]}:{port}/drip-{n}.jpg")
    return listed


def run(args: argparse.Namespace, port: int, drips: bool) -> tuple[float, dict[str, int]]:
    """Seconds, and outcomes."""
    told = DownloadSettings(allow_loopback=True, timeout_s=args.timeout, concurrency=args.concurrency)
    stage = Download(Settings(download=told), Runtime())
    listed = rows(args, port, drips)
    parts = [listed[start : start + FETCH_ROWS] for start in range(0, len(listed), FETCH_ROWS)]
    tables = (pa.table({"url": pa.array(part), "image_ref": pa.nulls(len(part), pa.string())}) for part in parts)
    outcomes: dict[str, int] = {}
    begun = time.monotonic()
    for table in ordered_ahead(stage, tables, args.ahead):
        for reason in table[DROP].to_pylist():
            outcomes[str(reason)] = outcomes.get(str(reason), 0) + 1
        if args.rate:
            time.sleep(table.num_rows / args.rate)
    seconds = time.monotonic() - begun
    stage.close()
    return seconds, outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=100, help="good rows per dripping one")
    parser.add_argument("--good", default="404", help="what the good rows are: 404, small or large")
    parser.add_argument("--ahead", type=int, default=256)
    parser.add_argument("--timeout", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=0, help="rows per second that later stages take; 0: all")
    parser.add_argument("--concurrency", type=int, default=128)
    args = parser.parse_args()
    server = subprocess.Popen([sys.executable, shared.__file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline())
        alone, _ = run(args, port, drips=False)
        together, outcomes = run(args, port, drips=True)
    finally:
        server.kill()
    print(
        f"ahead {args.ahead}: {args.rows / alone:.0f} good rows/s alone, {args.rows / together:.0f} beside a dripping "
        f"host ({100 * alone / together:.0f} %; {100 * alone / max(together - args.timeout, 1e-9):.0f} % when one "
        f"deadline of {args.timeout:g} s is taken off); {outcomes}"
    )


if __name__ == "__main__":
    main()
