"""A Ray cluster on this machine, whose nodes have addresses of their own; one dies in the middle, another joins.

    make cluster-demo                       or: python benchmarks/cluster_demo.py [--loopback]

A head and two workers are started as on machines of their own: in network namespaces that are joined by a bridge and
have no route out, where the system lets us make them, else (or with --loopback) at 127.0.0.1, 127.0.0.2, …. Then

1. OUT is a shared folder; one of the two workers is killed in the middle (SIGKILL of its raylet and all else there),
   and not replaced;
2. OUT is a bucket of an S3-compatible server; the run begins on the one worker that is left, is to use two, and gets
   the second while it runs: then the first is killed.

Both must end with 0, with the bytes of a run in one process, and with each row of the metadata in a ledger.
"""

import argparse
import contextlib
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from bench_kills import title
from moto.server import ThreadedMotoServer
from server import AWS_OF_NOBODY

from pipeline.dataset.finished.verify import verify
from pipeline.dataset.source.sample import write_sample
from pipeline.shared.files import AnyPath, names, to_path

ROOT = Path(__file__).resolve().parent.parent
COPIES = 6
"""Of each row of the sample, so that a run lasts."""
PATIENCE_S = 300.0
"""For anything to happen, on a machine that does much else."""
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_worker_niceness": "0",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    **AWS_OF_NOBODY,
}
"""Of all nodes and runs."""


class Network:
    """Addresses for nodes: of namespaces that a bridge joins, or of the loopback device."""

    def __init__(self, namespaces: bool) -> None:
        self.namespaces = namespaces
        # Addresses of networks without a route out, in which nothing answers but these nodes. They are outside the
        # private ranges, from which nothing is ever downloaded.
        self.prefix = "11.0.0." if namespaces else "127.0.0."
        self.server = f"{self.prefix}{100 if namespaces else 1}"
        if namespaces:
            ip("link set lo up", "link add bridge type bridge", f"addr add {self.server}/24 dev bridge")
            # an address of its own: it would take that of a port, and lose it with that, and nobody would reach it
            ip("link set bridge address 02:00:00:00:00:01", "link set bridge up")

    def start(self, number: int, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """A process in a network of its own, or where there are none, just a process."""
        if self.namespaces:
            inside = f"read _; ip link set lo up; ip addr add {self.prefix}{number}/24 dev eth0; ip link set eth0 up"
            command = ["unshare", "--net", "sh", "-c", f'{inside}; exec "$@"', "sh", *command]
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream, stderr=stream)
        if self.namespaces:
            wait(lambda: namespace(process.pid) != namespace(os.getpid()), "namespace")
            ip(f"link add node{number} type veth peer name eth0 netns {process.pid}")
            ip(f"link set node{number} master bridge up")
        process.stdin.write(b"\n")
        process.stdin.close()
        return process


def ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)


def namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def wait(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"error: {what}: waited in vain for {PATIENCE_S:g} s")
        time.sleep(0.1)


class Node:
    """A head or a worker: all processes under its `ray start --block`."""

    def __init__(self, network: Network, name: str, number: int, folder: Path) -> None:
        self.name, self.address = name, f"{network.prefix}{number}"
        words = ["--head", "--port=6379", "--include-dashboard=false", "--num-cpus=0"]
        if name != "head":
            words = [f"--address={network.prefix}1:6379", "--num-cpus=1"]
        words += [f"--node-ip-address={self.address}", "--num-gpus=0", f"--temp-dir={folder / name}", "--block"]
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--disable-usage-stats", *words]
        command = [*ray, "--object-store-memory=100000000"]
        self.log = folder / f"{name}.log"
        self.process = network.start(number, command, self.log)
        wait(lambda: "Ray runtime started" in self.log.read_text() or self.process.poll() is not None, self.log)
        if self.process.poll() is not None:
            sys.exit(f"error: {name} did not start: {self.log.read_text()}")

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def actors(self, name: str) -> list[psutil.Process]:
        return [process for process in self.processes() if title(process).startswith(f"ray::{name}")]

    def models_seconds(self) -> float:
        """CPU time of the models."""
        return sum(process.cpu_times().user for process in self.actors("_Models"))

    def has_models(self) -> bool:
        """Whether models are loaded."""
        return any(not title(process).startswith("ray::_Models.__init__") for process in self.actors("_Models"))

    def kill(self) -> None:
        """As if its plug were pulled."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


class Pictures(SimpleHTTPRequestHandler):
    """Serves the sample's pictures, two thirds of them only once the gate is open; remembers who got them."""

    gate = threading.Event()
    fetched: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        if self.path.partition("=")[2] >= str(COPIES // 3):
            self.gate.wait(PATIENCE_S)
        self.fetched[self.client_address[0]] += 1
        with contextlib.suppress(ConnectionError):  # who has seen enough of a picture hangs up
            super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


class Story:
    """What happens, with the seconds since the beginning; and whether all checks held."""

    def __init__(self) -> None:
        self.begun, self.holds = time.monotonic(), True

    def tell(self, text: str) -> None:
        print(f"{time.monotonic() - self.begun:5.0f} s  {text}", flush=True)

    def check(self, promise: str, holds: bool) -> None:
        self.holds &= holds
        self.tell(f"{'  ok   ' if holds else '  FAILED '}{promise}")


@contextlib.contextmanager
def services(network: Network, folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Metadata whose pictures are served, and the environment in which a bucket is found."""
    folder.mkdir()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    sample = pq.read_table(write_sample(folder))
    with ThreadingHTTPServer((network.server, 0), partial(Pictures, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://{network.server}:{server.server_port}/"
        urls = pc.replace_substring(sample["URL"], "http://sample.localhost/", base)
        tables = [
            sample.set_column(0, "URL", pc.binary_join_element_wise(urls, f"copy={n}", "?")) for n in range(COPIES)
        ]
        metadata = folder.parent / "part.parquet"
        pq.write_table(pa.concat_tables(tables), metadata)
        bucket = ThreadedMotoServer(network.server, 0, verbose=False)
        bucket.start()
        yield metadata, {"AWS_ENDPOINT_URL": "http://{}:{}".format(*bucket.get_host_and_port())}
        bucket.stop()
        server.shutdown()


def finished(out: AnyPath) -> int:
    return sum(name.endswith(".json") for name in names(out / "shards"))


def contents(out: AnyPath) -> dict[str, bytes]:
    return {name: (out / "shards" / name).read_bytes() for name in names(out / "shards")}


class Run:
    """A run on the cluster, in a process beside the head."""

    def __init__(self, command: list[str], out: str, head: Node, network: Network, log: Path) -> None:
        self.out, self.log = to_path(out), log
        enter = ["nsenter", f"--net=/proc/{head.process.pid}/ns/net"] if network.namespaces else []
        words = ["--out", out, "--ray-address", f"{head.address}:6379", "--set", "executor.workers=2"]
        with log.open("wb") as stream:
            self.process = subprocess.Popen([*enter, *command, *words], stdout=stream, stderr=stream)

    def goes_on_until(self, condition: Callable[[], object], what: str) -> None:
        wait(lambda: self.process.poll() is not None or condition(), what)
        if self.process.poll() is not None:
            sys.exit(f"error: the run ended before this: {what}\n{self.log.read_text()}")

    def goes_on_until_it_works_on(self, node: Node) -> None:
        """Until a shard is made there, and models compute; the gate opens when they are ready to."""
        made: list[psutil.Process] = []
        self.goes_on_until(lambda: made.extend(node.actors("_Maker.make")) or node.has_models(), "models are loaded")
        before = node.models_seconds()
        Pictures.gate.set()
        works = lambda: made.extend(node.actors("_Maker.make")) or (made and node.models_seconds() > before + 0.1)  # noqa: E731
        self.goes_on_until(works, f"{node.name} works")


def ends_alike(story: Story, run: Run, local: AnyPath, rows: int, survivor: str) -> None:
    """Wait for the end of a run, and look at what it made."""
    wait(lambda: run.process.poll() is not None, "the end of the run")
    story.check(f"the run goes on with {survivor}, and ends with 0", run.process.returncode == 0)
    if run.process.returncode:
        print(run.log.read_text())
    made, expected = contents(run.out), contents(local)
    others = sorted(name for name in made | expected if made.get(name) != expected.get(name))
    story.check(f"{len(made)} files in OUT, byte for byte those of a run in one process", not others)
    if others:
        story.tell(f"         not so: {', '.join(others)}")
    ledgers = [name for name in made if name.endswith(".parquet")]
    verdicts = sum(pq.read_metadata(pa.BufferReader(made[name])).num_rows for name in ledgers)
    story.check(
        f"{verdicts} of {rows} rows have a verdict in a ledger, and verify finds no fault",
        verdicts == rows and verify(run.out) == [],
    )


def demo(network: Network, folder: Path, stack: contextlib.ExitStack, story: Story) -> None:
    metadata, bucket = stack.enter_context(services(network, folder / "pictures"))
    os.environ.update(bucket)
    command = [sys.executable, "-m", "pipeline", "dataset", "--shards", str(metadata)]
    for pair in (
        "profile=embedded",
        f"download.timeout_s={PATIENCE_S}",
        "download.allow_loopback=true",
        "source.rows_per_shard=6",
        "executor.batch_rows=2",
    ):
        command += ["--set", pair]
    Pictures.gate.set()
    local, rows = folder / "local", pq.read_metadata(metadata).num_rows
    subprocess.run([*command, "--out", str(local), "--executor", "local"], check=True, stdout=subprocess.DEVNULL)
    shards = finished(local)
    story.tell(f"a run in one process: {rows} rows, {shards} shards")

    def node(name: str, number: int) -> Node:
        made = Node(network, name, number, folder)
        stack.callback(made.kill)
        story.tell(f"{name} is up at {made.address}")
        return made

    head, one, two = node("head", 1), node("worker1", 2), node("worker2", 3)

    Pictures.gate.clear()
    run = Run(command, str(folder / "shared"), head, network, folder / "run1.log")
    story.tell("a run on both workers, into a shared folder")
    run.goes_on_until_it_works_on(two)
    wait(lambda: finished(run.out), "the first shard")
    two.kill()
    done = finished(run.out)
    story.tell(f"worker2 is killed as it computes, with {done} of {shards} shards done, and not replaced")
    ends_alike(story, run, local, rows, "worker1")

    import s3fs

    s3fs.S3FileSystem().mkdir("s3://faces")
    Pictures.gate.clear()
    run = Run(command, "s3://faces/out", head, network, folder / "run2.log")
    story.tell("a run for two workers on the one that is left, into a bucket")
    run.goes_on_until(lambda: finished(run.out) >= 1, "a shard of worker1")
    three = node("worker3", 4)
    run.goes_on_until_it_works_on(three)
    story.check("worker3, which joined later, computes and makes shards", True)
    one.kill()
    story.tell(f"worker1 is killed, with {finished(run.out)} of {shards} shards done, and not replaced")
    ends_alike(story, run, local, rows, "worker3")
    if network.namespaces:
        counts = ", ".join(f"{address} {count}" for address, count in sorted(Pictures.fetched.items()))
        story.tell(f"pictures were fetched by {counts}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loopback", action="store_true", help="no network namespaces, even where they can be made")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    new = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    probe = [*new, "sh", "-c", "ip link add bridge type bridge && ip link add one type veth peer name two"]
    if not words.loopback and not words.inside and subprocess.run(probe, capture_output=True).returncode == 0:
        os.execvp(new[0], [*new, sys.executable, __file__, "--inside"])
    os.environ.update(ENVIRONMENT)
    story = Story()
    story.tell(f"nodes have {'network namespaces without a route out' if words.inside else 'loopback addresses'}")
    made = tempfile.TemporaryDirectory(prefix="cluster-", ignore_cleanup_errors=True)
    with made as folder, contextlib.ExitStack() as stack:
        demo(Network(words.inside), Path(folder), stack, story)
    story.tell("all checks hold" if story.holds else "a check FAILED")
    return 0 if story.holds else 1


if __name__ == "__main__":
    sys.exit(main())
