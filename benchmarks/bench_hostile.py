"""100,000 rows from a loopback server that misbehaves in all the ways of tests/hostile.py.

    python benchmarks/bench_hostile.py                       # 100,000 rows, some minutes
    python benchmarks/bench_hostile.py --rows 2000

Names are looked up in a stub, and nothing goes beyond loopback. Rows go through the download stage as a shard's worker
calls it, tombstones and all, with more connections at a time than usual, since a tenth of the rows cost a whole
deadline. Prints what became of each behaviour, and fails when a row got a verdict that is not its own, when rows are
lost, when a URL was asked for after a refusal, or when memory grew beyond --most-mib.
"""

import argparse
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa

from pipeline.dataset.execute.runner import Loaded, apply_ahead
from pipeline.dataset.rows import Rows
from schemas.columns import LEDGER, SEED, schema
from stages.download import Download
from stages.runtime import Runtime
from stages.settings import DownloadSettings, Settings

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import hostile

BATCH = 64
MOST_ROWS = 2048
"""Fetched before their turn, at most a quarter of all, so that what was refused is known when it comes again."""


def batches(rows: Iterator[tuple[str, str]]) -> Iterator[Rows]:
    start = 0
    while part := list(islice(rows, BATCH)):
        values = {"key": [f"{start + n:09}" for n in range(len(part))], "url": [url for _, url in part]}
        fields = schema(SEED)
        columns = [
            pa.array(values[field.name]) if field.name in values else pa.nulls(len(part), field.type)
            for field in fields
        ]
        start += len(part)
        yield Rows.living(pa.table(columns, schema=fields))


def peak_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def run(args: argparse.Namespace, ports: dict[str, int]) -> tuple[dict[str, Counter], int, int, int]:
    settings = DownloadSettings(
        engine=args.engine,
        allow_loopback=True,
        timeout_s=args.timeout,
        max_bytes=hostile.MAX_BYTES,
        max_redirects=3,
        concurrency=512,
    )
    per_behaviour = -(-args.rows // len(hostile.BEHAVIOURS))
    stage = Download(Settings(download=settings), Runtime())
    step = Loaded(stage, frozenset(LEDGER))
    names = iter(name for name, _ in hostile.rows(per_behaviour, ports))
    verdicts: dict[str, Counter] = defaultdict(Counter)
    rows_in = kept = dropped = 0
    begun = time.monotonic()
    keys_of: deque[list[str]] = deque()

    def source() -> Iterator[Rows]:
        for rows in batches(hostile.rows(per_behaviour, ports)):
            keys_of.append(rows.alive["key"].to_pylist())
            yield rows

    for done in apply_ahead(step, source(), min(MOST_ROWS, args.rows // 4)):
        keys = keys_of.popleft()
        reasons = dict(zip(done.dead["key"].to_pylist(), done.dead["verdict"].to_pylist(), strict=True))
        for key in keys:
            verdicts[next(names)][reasons.get(key)] += 1
        rows_in, kept, dropped = rows_in + len(keys), kept + done.alive.num_rows, dropped + done.dead.num_rows
        if rows_in % (BATCH * 100) == 0:
            print(f"  {rows_in} rows, {rows_in / (time.monotonic() - begun):.0f}/s, {peak_mib():.0f} MiB", flush=True)
    stage.close()
    return verdicts, rows_in, kept, dropped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--engine", default="native")
    parser.add_argument("--timeout", type=float, default=20.0)
    parser.add_argument("--most-mib", type=float, default=800.0)
    args = parser.parse_args()
    stub = hostile.Names()
    stub.install()
    try:
        with hostile.elsewhere() as (ports, requests):
            verdicts, rows_in, kept, dropped = run(args, ports)
    finally:
        stub.remove()
    judge(args, verdicts, (rows_in, kept, dropped), hostile.refused(requests), stub.tried)


def judge(args: argparse.Namespace, verdicts: dict, counts: tuple, requests: dict, tried: Counter) -> None:
    wrong = 0
    for name, behaviour in hostile.BEHAVIOURS.items():
        own = verdicts[name].pop(behaviour.verdict, 0)
        wrong += sum(verdicts[name].values())
        others = ", ".join(f"{count} {reason}" for reason, count in verdicts[name].items())
        print(f"{name:22} {own:6} {behaviour.verdict or 'kept':18} {others}")
    rows_in, kept, dropped = counts
    again = sum(times - 1 for times in requests.values())
    disallowed = sum(times for (_, path), times in requests.items() if path.startswith("/robots-no/"))
    print(f"{len(hostile.BEHAVIOURS)} behaviours: {rows_in} rows in = {kept} kept + {dropped} dropped")
    print(f"{wrong} rows with another verdict than their own; connections to {', '.join(tried)} only")
    print(f"{again} requests after a refusal, {disallowed} that robots.txt disallows; {peak_mib():.0f} MiB at most")
    beyond = [address for address in tried if not address.startswith("127.")]
    if rows_in != kept + dropped or wrong or again or disallowed or beyond or peak_mib() > args.most_mib:
        sys.exit(1)


if __name__ == "__main__":
    main()
