"""How long a large run takes on more machines, and what it waits for: a small simulator, fed with measured costs.

    FACESHARDS_DATA=folder python benchmarks/scaling.py   # costs by stage and process, and the table of docs/scaling.md
    make bench ARGS=scaling                               # what is simulated against what is measured, on this machine

A thread of the driver looks at each row of the metadata; one of 30 is large enough to be fetched, by the process that
makes its shard; what arrives goes to a worker with the models, and what is kept comes back to be written.
"""

import argparse
import heapq
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "gpu"), str(Path(__file__).parents[1])]

BATCH = 32
"""Rows that travel together in the simulator."""

# 100 of the 128 parts of laion2B-en: an order of magnitude, each factor from another source.
FETCHES, ALIVE, WITH_FACE, KEPT = 59e6, 0.65, 0.12, 2e6
IMAGE_BYTES, SAMPLE_BYTES = 300e3, 2.2e6
ROWS_PER_SHARD = 1000
# A node, and what all share.
CORES, NODE_BYTES_S, SITE_BYTES_S = 16, 10e9 / 8, 100e9 / 8
FETCHES_S = 827.0
"""Of one process over 100 ms of distance, LAION-like mix, 256 connections."""
# CPU seconds of one core that no small pack stands for: ViT-H/14 in float32, and BiSeNet.
VIT_S, PARSE_S = 5.1, 0.32
# One H200, decoded photos to features: 972 photos/s with 12 % faces, 370 with one in each; a core that decodes for it.
FACE_GPU_S = (1 / 370 - 1 / 972) / (1 - WITH_FACE)
PHOTO_GPU_S = 1 / 370 - FACE_GPU_S
REDUCED_S, DECODED_S = 16 / 3115, 16 / 1287


class Stage(NamedTuple):
    """A batch occupies one of each resource for so long."""

    seconds: float
    on: tuple[str, ...]


def simulate(
    stages: Sequence[Stage], capacity: Mapping[str, int], batches: int, ahead: int
) -> tuple[float, dict[str, float]]:
    """Seconds until all batches went through the stages, and the share of them in which each resource was busy.

    A stage of a batch begins as soon as one of each of its resources is free; who has waited longest goes first.
    `ahead` batches are on their way at a time.
    """
    free, busy, now = dict(capacity), Counter[str](), 0.0
    waiting = deque((batch, 0) for batch in range(min(ahead, batches)))
    following = iter(range(len(waiting), batches))
    running: list[tuple[float, int, int]] = []  # when it ends, batch, stage
    while waiting or running:
        for _ in range(len(waiting)):
            batch, number = waiting.popleft()
            stage = stages[number]
            if not all(free[name] for name in stage.on):
                waiting.append((batch, number))
                continue
            for name in stage.on:
                free[name] -= 1
                busy[name] += stage.seconds
            heapq.heappush(running, (now + stage.seconds, batch, number))
        now, batch, number = heapq.heappop(running)
        for name in stages[number].on:
            free[name] += 1
        if number + 1 < len(stages):
            waiting.append((batch, number + 1))
        elif (new := next(following, None)) is not None:
            waiting.append((new, 0))
    return now, {name: busy[name] / (now * count) for name, count in capacity.items()}


def one_machine(cpu: Mapping[str, float], workers: int, cores: int = 2) -> float:
    """Seconds per row of a run on Ray on this machine, where the web is a process too; CPU seconds per row by kind."""
    on = {"server": (), "shard": ("shards",), "ray": (), "models": ("workers",), "driver": ("driver",)}
    stages = [Stage(BATCH * cpu[kind], (*others, "cores")) for kind, others in on.items()]
    capacity = {"cores": cores, "workers": workers, "shards": workers + 1, "driver": 1}
    return simulate(stages, capacity, 400, ahead=4 * (workers + 1))[0] / (400 * BATCH)


def cluster(
    cpu: Mapping[str, float], nodes: int, gpus: int, drivers: int = 1
) -> tuple[float, dict[str, float], dict[str, float]]:
    """Rows fetched per second, busy shares, and seconds per row by resource, with so many GPUs in each node.

    Nodes are alike: each is simulated as if it were alone, and what many share were as many times slower. `drivers`
    runs, each of some of the parts, share the nodes.
    """
    features = KEPT / FETCHES * (VIT_S + PARSE_S)
    decoding = ALIVE * (REDUCED_S + WITH_FACE * DECODED_S)
    stages = {
        "metadata": Stage(nodes / drivers * cpu["metadata"], ("metadata",)),
        "driver": Stage(nodes / drivers * (cpu["driver"] - cpu["metadata"]), ("driver",)),
        "distance": Stage(1 / FETCHES_S, ("distance",)),
        "site's link": Stage(nodes * ALIVE * IMAGE_BYTES / SITE_BYTES_S, ("site's link",)),
        "node's link": Stage(ALIVE * IMAGE_BYTES / NODE_BYTES_S, ("node's link",)),
        "shard": Stage(cpu["shard"] + cpu["ray"], ("shards", "cores")),
        "models": Stage(decoding if gpus else cpu["models"] + features, ("workers", "cores")),
        "GPU": Stage(ALIVE * (PHOTO_GPU_S + WITH_FACE * FACE_GPU_S) if gpus else 0.0, ("GPU",)),
    }
    capacity = dict.fromkeys(("metadata", "driver", "site's link", "node's link"), 1)
    capacity |= {"distance": CORES + 1, "shards": CORES + 1, "workers": CORES, "cores": CORES, "GPU": max(1, gpus)}
    batches = [Stage(BATCH * stage.seconds, stage.on) for stage in stages.values()]
    seconds, busy = simulate(batches, capacity, 600, ahead=8 * CORES)
    per_row = {"cores": stages["shard"].seconds + stages["models"].seconds, "GPU": stages["GPU"].seconds}
    return nodes * 600 * BATCH / seconds, busy, per_row


def table(cpu: Mapping[str, float]) -> str:
    """Of docs/scaling.md."""
    lines = ["| nodes | fetches/s | hours | core hours | GPU hours | Gbit/s | waits for | busy |", "|" + "---|" * 8]
    for gpus, nodes, drivers in ((1, 1, 1), (1, 10, 1), (1, 100, 1), (1, 100, 10), (0, 1, 1), (0, 10, 1), (0, 100, 1)):
        rate, busy, per_row = cluster(cpu, nodes, gpus, drivers)
        most = sorted(busy, key=lambda name: -busy[name])[:3]
        cells = [
            f"{nodes} {'with a GPU' if gpus else 'of CPUs alone'}{f', {drivers} runs' if drivers > 1 else ''}",
            f"{rate:,.0f}",
            f"{FETCHES / rate / 3600:.3g}",
            *(f"{FETCHES * per_row[name] / 3600:,.0f}" for name in ("cores", "GPU")),
            f"{8 * rate * ALIVE * IMAGE_BYTES / 1e9:.3g}",
            most[0],
            ", ".join(f"{name} {busy[name]:.0%}" for name in most),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import scaling_costs
    from material import Material

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        material, tiny = Material(Path(folder), smoke=False), Material(Path(other), smoke=True)
        print("| stage | rows | CPU ms a row |\n|---|---|---|")
        for name, rows, cost in scaling_costs.by_stage(material):
            print(f"| {name} | {rows} | {cost:.2f} |", flush=True)
        cpu = dict(scaling_costs.on_ray(material, 1, 50, 24).cpu)
        per_row, per_shard = scaling_costs.of_driver(tiny)
        metadata = scaling_costs.of_metadata()
    print("\nCPU ms a fetched row on Ray: " + ", ".join(f"{kind} {1000 * value:.2f}" for kind, value in cpu.items()))
    print(f"of the driver: {1000 * per_row:.3f} ({1000 * metadata:.3f} metadata), {1000 * per_shard:.1f} a shard")
    print(f"\n{table({**cpu, 'driver': per_row + per_shard / ROWS_PER_SHARD, 'metadata': metadata})}")


if __name__ == "__main__":
    main()
