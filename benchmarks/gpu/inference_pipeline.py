"""From bytes to embeddings: one process with the GPU and many that decode, against one photo after the other."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing.connection import Listener, wait
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, ClassVar

import cv2
import inference_decoder as decoder
import numpy as np
from inference_bench import Bench, mixed_photos, per_second, prepared, vit_features

_MOST_PHOTOS = 48
"""That a process has in hand at once: with 88 % faceless ones some 6 of them go on, and fill batches."""
_PATIENCE_S = 0.01
"""How long a request waits for others to fill its batch: a GPU computes it in full either way."""


class Network:
    """One of the pipeline's networks on a thread and a stream of its own: requests that wait together are a batch."""

    outputs: ClassVar = {"parse": ["labels"], "identity": ["vector"], "tower": ["clip", "hidden"]}

    def __init__(
        self, bench: Bench, kind: str, side: int, batches: Any, look: Callable[..., Any] | None = None
    ) -> None:
        self.kind, self.batches, self._look, self._bench = kind, batches, look, bench
        self.requests: SimpleQueue[Any] = SimpleQueue()
        self.images = self.launches = 0
        self.host_seconds = 0.0
        self.error: BaseException | None = None
        hosts, given, compute = prepared(bench, kind, batches, side)

        def call() -> None:
            given.copy_(hosts[0], non_blocking=True)
            compute()

        self.launch_seconds = 1 / per_second(bench, call, 1, 0.15)
        self._thread = Thread(target=self._serve, daemon=True)
        self._thread.start()

    def totals(self) -> Any:
        """Images, launches, and seconds of the host."""
        return np.array([self.images, self.launches, self.host_seconds])

    def _serve(self) -> None:
        """Answer requests (link, lock, rows) until None comes."""
        import torch

        try:
            with torch.cuda.stream(torch.cuda.Stream()) if self._bench.on_gpu else nullcontext():
                while request := self.requests.get():
                    requests = [request]
                    end = time.perf_counter() + _PATIENCE_S
                    while sum(len(rows) for _, _, rows in requests) < self.batches.size:
                        try:
                            if more := self.requests.get(timeout=max(end - time.perf_counter(), 0)):
                                requests.append(more)
                        except Empty:
                            break
                    begin = time.perf_counter()
                    answers = iter(self._answers([row for _, _, rows in requests for row in rows]))
                    for link, lock, rows in requests:
                        with lock:
                            link.send((self.kind, [next(answers) for _ in rows]))
                    self.host_seconds += time.perf_counter() - begin
        except BaseException as error:
            self.error = error

    def _answers(self, rows: Sequence[Any]) -> list[Any]:
        self.images += len(rows)
        self.launches += -(-len(rows) // self.batches.size)
        images = [row[self.kind] for row in rows]
        if self._look:
            return [tuple(found) for found in self._look(images, 0.2)]
        answers: list[Any] = []
        for row, values in zip(rows, self.batches(images), strict=True):
            for name, value in zip(self.outputs.get(self.kind, []), values, strict=False):
                row[name][:] = value
            answers.append(float(values[0]) if self.kind == "screen" else True)
        return answers


def _networks(bench: Bench, look: int, parse: int, compiled: bool) -> dict[str, Network]:
    from stages.models.detectors.scrfd_torch import ScrfdTorch
    from stages.models.face_embedders.arcface_torch import ArcFaceTorch
    from stages.models.segmenters.facexlib import label_batches
    from stages.models.torch_backend import IMAGENET, Batches

    size = 2 if bench.smoke else 32
    detector = ScrfdTorch(bench.detector, bench.device, size=size, compiled=compiled)
    tower = vit_features(bench.vit_half, bench.device, bench.half())

    parser = label_batches(copy.deepcopy(bench.bisenet), IMAGENET, bench.device, size=size // 2, compiled=compiled)

    def screen(images: Any) -> tuple[Any]:
        return (detector._decoded(images)[0][..., 0].amax(1),)

    return {
        kind: Network(bench, kind, side, batches, detector if kind.startswith("look") else None)
        for kind, side, batches in (
            ("screen", decoder.SCREEN, Batches(screen, 2 * size, bench.device, compiled=compiled)),
            (f"look{look}", look, detector.batches),
            (f"look{decoder.BORDER}", decoder.BORDER, detector.batches),
            ("parse", parse, parser),
            ("identity", 112, ArcFaceTorch(bench.recogniser, bench.device, size=size, compiled=compiled).batches),
            ("tower", 224, Batches(tower, size, bench.device)),
        )
    }


def pipeline_compiled(bench: Bench) -> None:
    """The same with all but the tower compiled by torch, which takes most of this step's time."""
    if not bench.on_gpu:
        bench.record({"skipped": "without CUDA"})
        return
    pipeline(bench, compiled=True)


def pipeline(bench: Bench, *, compiled: bool = False) -> None:
    """One process with the GPU makes batches of the requests of many that decode: 88 % and 0 % without a face."""
    look, parse = (128, 64) if bench.smoke else (640, 512)
    n, chunk = (2, 2) if bench.smoke else (2 * (os.cpu_count() or 1), _MOST_PHOTOS)
    hidden, clip = (257, bench.vit.config.hidden_size), bench.vit.config.projection_dim
    dtype = decoder.rows_of(look, parse, hidden, clip)
    needed = 2 * n * chunk * dtype.itemsize
    shared = Path("/dev/shm")
    fits = shared.is_dir() and shutil.disk_usage(shared).free > needed
    memory = Path(tempfile.mkdtemp(dir=shared if fits else bench.folder))
    options = {
        "look": look,
        "parse": parse,
        "hidden": hidden,
        "clip": clip,
        "chunk": chunk,
        "address": str(memory / "socket"),
    }
    processes: list[Any] = []
    rows: dict[Any, Any] = {}
    try:
        with Listener(options["address"], family="AF_UNIX", backlog=n) as listener:
            for i in range(n):
                (memory / f"rows{i}").write_bytes(b"")
                os.truncate(memory / f"rows{i}", chunk * dtype.itemsize)
                job = json.dumps({**options, "memory": str(memory / f"rows{i}"), "index": i})
                command = [sys.executable, decoder.__file__, "serve", job]
                processes.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
            networks = _networks(bench, look, parse, compiled)
            times = {kind: round(1e3 * each.launch_seconds, 3) for kind, each in networks.items()}
            sizes = {kind: each.batches.size for kind, each in networks.items()}
            bench.record({"batch_ms": times, "batch": sizes, "shared_memory": fits})
            mixes = {faceless: mixed_photos(bench, faceless) for faceless in (0.88, 0.0)}
            listener._listener._socket.settimeout(20)  # type: ignore[attr-defined]
            for _ in processes:
                link = listener.accept()
                rows[link] = np.memmap(memory / f"rows{link.recv()[1]}", dtype, "r+", shape=(chunk,))
        for faceless, files in mixes.items():
            forced = not (bench.pack and bench.pictures)
            at_once = chunk if faceless else max(chunk // 3, 1)  # few of those with a face are many for the networks
            row = {
                "faceless": faceless,
                "forced": forced,
                "compiled": compiled,
                "processes": n,
                "photos_per_process": at_once,
            }
            jobs = [
                {"chunk": at_once, "forced": forced, "first": i * len(files) // n, "photos": files} for i in range(n)
            ]
            settle, seconds = (0.5, 2.0) if bench.smoke else (1.5, 5.0)
            bench.record({**row, **_served(networks, rows, jobs, settle, seconds)})
        for network in networks.values():
            network.requests.put(None)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(memory, ignore_errors=True)


def _served(
    networks: dict[str, Network], rows: dict[Any, Any], jobs: Sequence[Any], settle: float, seconds: float
) -> dict[str, Any]:
    """Pass the requests of the processes on for so many seconds after the first ones; what was done meanwhile."""
    links = {link: Lock() for link in rows}
    for link, job in zip(rows, jobs, strict=True):
        link.send(job)
    done, begin, before = 0, time.perf_counter(), {}
    counted, busy, asked = begin, [], begin
    while (now := time.perf_counter()) < begin + settle + seconds:
        if not before and now >= begin + settle:
            counted, done = now, 0
            before = {kind: each.totals() for kind, each in networks.items()}
        for link in wait(list(links), timeout=0.05):
            kind, count = link.recv()
            if kind == "done":
                done += count
            else:
                networks[kind].requests.put((link, links[link], [rows[link][i] for i in range(count)]))
        if before and now > asked + 0.2:
            busy, asked = busy + _utilisation(), now
        for network in networks.values():
            if network.error:
                raise network.error
    elapsed = time.perf_counter() - counted
    changes = {kind: each.totals() - before[kind] for kind, each in networks.items()}
    stats = _ended(links)
    shares = {
        kind: round(launches * networks[kind].launch_seconds / elapsed, 3) for kind, (_, launches, _) in changes.items()
    }
    return {
        "photos_per_s": round(done / elapsed, 1),
        "gpu_busy_share": round(sum(shares.values()), 3),
        "gpu_share_by_kind": shares,
        "nvml_utilisation": round(float(np.mean(busy)), 1) if busy else None,
        "thread_share_by_kind": {kind: round(host / elapsed, 3) for kind, (_, _, host) in changes.items()},
        "images_by_kind": {kind: int(images) for kind, (images, _, _) in changes.items()},
        "images_per_batch": {kind: round(total[0] / max(total[1], 1), 1) for kind, total in changes.items()},
        **{
            part: {name: round(sum(each[part][name] for each in stats), 2) for name in stats[0][part]}
            for part in stats[0]
        },
    }


def _utilisation() -> list[float]:
    """Share of the last moments in which the GPU computed, percent, by its driver; none where that is not to be had."""
    import torch

    try:
        return [float(torch.cuda.utilization())] if torch.cuda.is_available() else []
    except Exception:  # no driver library, or no right to ask
        return []


def _ended(links: dict[Any, Any]) -> list[Any]:
    """End the jobs: every request is answered with nothing; what the processes then say of them."""
    stats, open_links, end = [], set(links), time.monotonic() + 10
    while open_links and time.monotonic() < end:
        for link in wait(list(open_links), timeout=0.2):
            kind, content = link.recv()
            if kind == "stats":
                stats.append(content)
                open_links.remove(link)
            elif kind != "done":
                with links[link]:
                    link.send((kind, None))
    if open_links:
        raise TimeoutError(f"{len(open_links)} of {len(links)} processes did not end in time")
    return stats


def naive_loop(bench: Bench) -> None:
    """insightface's ten lines, in torch on the same device: one process, one photo at a time, eager."""
    import torch

    from stages.models.detectors.scrfd import _letterbox
    from stages.models.detectors.scrfd_torch import ScrfdTorch
    from stages.models.face_embedders.arcface_torch import ArcFaceTorch
    from stages.models.torch_backend import Batches
    from stages.pixels import geometry

    decoder.similarity_of_old_skimage()
    detector = ScrfdTorch(bench.detector, bench.device, size=1, dtype=torch.float32, graphs=False)
    recogniser = ArcFaceTorch(bench.recogniser, bench.device, size=1, dtype=torch.float32, graphs=False)
    tower = Batches(vit_features(bench.vit_half, bench.device, bench.half()), 1, bench.device, graphs=False)
    side = 128 if bench.smoke else 640

    def one(path: str) -> None:
        image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
        view = _letterbox(image, side)
        (found,) = detector([view.canvas], 0.5)
        if "face" not in Path(path).name:
            return
        kps = found.points[int(found.scores.argmax())] / view.scale if len(found.scores) else geometry.FFHQ_TEMPLATE
        recogniser.embed(geometry.norm_crop(image, kps, 112)[None])
        tower([geometry.norm_crop(image, kps, 224)])

    for faceless in (0.88, 0.0):
        files = mixed_photos(bench, faceless)
        for path in (files[0], files[-1]):
            one(path)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < (0.5 if bench.smoke else 4.0):
            one(files[count % len(files)])
            count += 1
        bench.record({"faceless": faceless, "photos_per_s": round(count / (time.perf_counter() - begin), 2)})
