"""CPU time and peak memory of the executors on a part served from loopback.

    FACESHARDS_DATA=folder python benchmarks/bench_executors.py --executor ray --rows 700 --large 1.0
    FACESHARDS_DATA=folder python benchmarks/bench_executors.py --executor ray --rows 20000 --large 0.1

The labelled photos under `--rows` different URLs, each answer with a few bytes of its own behind the image so that no
two are equal; `--large` is the share of photos of at least 1024 px. Models: the real pack, grabcut, patches. CPU is
that of the run's process and all its descendants (the server is not one), from the moment that `--warm` rows are
done: start-up is excluded. Peak memory is the largest VmHWM of any process, proportional to nothing but itself.
"""

import argparse
import contextlib
import csv
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from pipeline.dataset.config import load_config
from pipeline.dataset.execute.make_shard import Advanced, Finished
from pipeline.dataset.job import executor_of, prepared
from pipeline.dataset.out.output import Output

_SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
folder = Path(sys.argv[1])
files = {path.name: path.read_bytes() for path in folder.iterdir()}
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        name, _, query = self.path.lstrip("/").partition("?")
        found = name in files  # robots.txt is not
        body = files.get(name, b"") + query.encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True
    def log_message(self, *args):
        return
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
server.handle_error = lambda request, address: None
print(server.server_port, flush=True)
server.serve_forever()
"""


def write_part(data: Path, port: int, rows: int, large: float, path: Path) -> None:
    with (data / "photos" / "labels.csv").open(newline="") as stream:
        labels = [row for row in csv.DictReader(stream) if not row["ambiguous"]]
    big = [row["file"] for row in labels if min(int(row["width"]), int(row["height"])) >= 1024]
    small = [row["file"] for row in labels if row["file"] not in big]
    urls, credit = [], 0.0
    for n in range(rows):
        credit += large
        names, credit = (big, credit - 1) if credit >= 1 else (small, credit)
        urls.append(f"http://127.0.0.1:{port}/{names[n % len(names)]}?{n}")
    pq.write_table(pa.table({"URL": urls, "TEXT": ["a person"] * rows}), path)


def settings(data: Path, workers: int, rows_per_shard: int = 1000) -> list[str]:
    """`--set` pairs: the real pack, and backends without weights for the rest."""
    return [
        f"models.pack={data / 'models' / 'real'}",
        "models.accept_noncommercial=true",
        "models.segmenter=grabcut",
        "models.image_embedder=patches",
        "download.allow_loopback=true",
        f"executor.workers={workers}",
        f"source.rows_per_shard={rows_per_shard}",
    ]


def processes() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


class Watch(threading.Thread):
    """Samples the CPU time and the peak memory of all processes of the run."""

    def __init__(self, server: int) -> None:
        super().__init__(daemon=True)
        self._server, self.cpu, self.peaks, self.stop = server, {}, {}, False

    def sample(self) -> float:
        for process in processes():
            if process.pid == self._server:
                continue
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, IndexError):
                times = process.cpu_times()
                self.cpu[process.pid] = times.user + times.system
                status = Path(f"/proc/{process.pid}/status").read_text()
                name = " ".join(process.cmdline())[:40] or process.name()
                self.peaks[process.pid] = (int(status.split("VmHWM:")[1].split()[0]) / 1024, name)
        return sum(self.cpu.values())

    def run(self) -> None:
        while not self.stop:
            self.sample()
            time.sleep(0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", choices=["local", "ray"], required=True)
    parser.add_argument("--rows", type=int, default=700)
    parser.add_argument("--large", type=float, default=1.0)
    parser.add_argument("--warm", type=int, default=150)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows-per-shard", type=int, default=100)
    args = parser.parse_args()
    data = Path(os.environ["FACESHARDS_DATA"]).resolve()
    sets = settings(data, args.workers, args.rows_per_shard)
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(data / "photos")], stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(args, int(server.stdout.readline()), server.pid, data, sets, Path(folder))
        finally:
            server.kill()


def run(args: argparse.Namespace, port: int, server: int, data: Path, sets: list[str], folder: Path) -> None:
    spec = str(folder / "part.parquet")
    write_part(data, port, args.rows, args.large, Path(spec))
    watch = Watch(server)
    rows = kept = 0
    mark: tuple[float, float, int] | None = None
    with prepared(spec, load_config(None, sets, shards=spec, executor=args.executor)) as job:
        output = Output(folder / "out")
        start = executor_of(job.plan.config)
        with start(job.plan) as execute, output.prepared(job.plan):
            watch.start()
            for event in execute(job.plan, job.shards(), output):
                if isinstance(event, Advanced):
                    rows, kept = rows + event.rows, kept + event.kept
                    if mark is None and rows >= args.warm:
                        mark = (watch.sample(), time.monotonic(), rows)
                elif isinstance(event, Finished) and event.manifest is None:
                    sys.exit(event.error)
            cpu, wall, begun = mark or (0.0, time.monotonic(), 0)
            spent, elapsed = watch.sample() - cpu, time.monotonic() - wall
            watch.stop = True
    print(
        f"{args.executor}: {rows} rows, {kept} kept; after {begun} rows: {1000 * spent / (rows - begun):.1f} ms CPU "
        f"per row, {(rows - begun) / elapsed:.1f} rows/s"
    )
    table = sorted(watch.peaks.values(), reverse=True)[:6]
    costs: dict[str, float] = {}
    for pid, seconds in watch.cpu.items():
        name = watch.peaks.get(pid, (0, "?"))[1].split()[0].rsplit("/", 1)[-1]
        costs[name] = costs.get(name, 0.0) + seconds
    top = sorted(costs.items(), key=lambda item: -item[1])[:6]
    Console().print("CPU in all, s: " + "; ".join(f"{seconds:.1f} {name}" for name, seconds in top), soft_wrap=True)
    Console().print("peak memory, MiB: " + "; ".join(f"{peak:.0f} {name}" for peak, name in table), soft_wrap=True)


if __name__ == "__main__":
    main()
