"""What faceshards costs against its peers: one table of ratios, each measured in one run, in turn.

    python benchmarks                      # all of it: 20 to 30 minutes on two cores that do nothing else
    python benchmarks whole stages         # some of it
    python benchmarks --smoke              # all of it in a minute, on photos and models made up: numbers mean nothing
    python benchmarks --log                # and put the table on top of docs/LOG.md

FACESHARDS_DATA names the folder with the labelled photos and weights; without it, the cases that need them are left
out. CPU time, one thread each; "loop" is insightface's own: decode, detect, recognise, cut out.
"""

import argparse
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "gpu"), str(Path(__file__).parents[1])]

import faces
import many_rows
import planted_persons
import report
import runs
import scaling_costs
from material import Material

Row = dict[str, Any]


def row(part: str, ours: Iterable[float], peers: Iterable[float], unit: str, wanted: str = "") -> Row:
    """The median ratio of measurements made in turn."""
    ours, peers = list(ours), list(peers)
    ratio = statistics.median(one / other for one, other in zip(ours, peers, strict=True))
    shown = [f"{statistics.median(values):.4g} {unit}" for values in (ours, peers)]
    return {"part": part, "ours": shown[0], "peer": shown[1], "ratio": round(ratio, 3), "wanted": wanted}


def screens(material: Material) -> dict[str, str]:
    """What models.screen may be."""
    return {"off": "off", "the pack's own": "detector", "500M": str(material.small_pack)}


def whole(material: Material, rounds: int) -> Iterator[Row]:
    """All of `dataset` on web-like photos, per photo."""
    wanted = {"the pack's own": "0.60", "500M": "0.50"}
    yield from _whole(material, rounds, material.pack, screens(material), wanted, "whole dataset, 88 % faceless")


def whole_10g(material: Material, rounds: int) -> Iterator[Row]:
    """The same where a full look costs ten times as much; screened by a real pack, whose verdicts are real."""
    given = {"real 2.5G": str(material.pack), "500M": str(material.small_pack)}
    wanted = {"real 2.5G": "0.45", "500M": "0.30"}
    yield from _whole(material, rounds, material.large_pack, given, wanted, "the same, detector of 10 GFLOP")


def _whole(
    material: Material, rounds: int, pack: Path, screens: dict[str, str], wanted: dict[str, str], part: str
) -> Iterator[Row]:
    names = sorted(path.name for path in material.web.iterdir())
    short = 0 if material.smoke else len(names) // 5
    loop, files = faces.naive(pack), [(material.web / name).read_bytes() for name in names[short:]]
    files = files if pack == material.pack else files[::5]  # each takes long, and as long as any other
    loop(files[:2])
    ours: dict[str, list[float]] = {name: [] for name in screens}
    peers = []
    with runs.served(material.web, names, len(names)) as urls:
        for _ in range(rounds):
            peers.append(1000 * faces.cpu_s(lambda: loop(files)) / len(files))
            for name, screen in screens.items():
                sets = {"models.pack": pack, "models.screen": screen, "executor.name": "local"}
                ours[name].append(1000 * runs.per_row(urls, short, runs.words(material, sets)).cpu_s)
    for name, costs in ours.items():
        yield row(f"{part}, screen {name}", costs, peers, "ms a photo", wanted.get(name, ""))


def stages(material: Material, rounds: int) -> Iterator[Row]:
    """From encoded bytes to ID vectors, in process."""
    web = [path.read_bytes() for path in sorted(material.web.iterdir())]
    large, small = ([(material.photos / name).read_bytes() for name in names] for names in material.names)
    wanted = {"the pack's own": "0.45", "500M": "0.38"}
    loop = faces.naive(material.pack)
    for name, screen in screens(material).items():
        mixes = {"88 % faceless": (web, wanted.get(name, ""))}
        if name == "the pack's own":
            mixes |= {
                "labelled photos": (large + small, "0.45"),
                "80 % too small": (large[:10] + (small * 4)[: 4 * len(large[:10])], "0.22"),
                "large labelled photos": (large, "0.83"),
            }
        ours = faces.ours(material, screen)
        for mix, (files, most) in mixes.items():
            costs: dict[Callable[[Sequence[bytes]], None], list[float]] = {ours: [], loop: []}
            for turn in range(rounds + 1):
                unseen = [data + b"%d" % turn for data in files]  # pixels of the last turn are no use
                for work, measured in costs.items():
                    measured.append(1000 * faces.cpu_s(partial(work, unseen)) / len(files))
            part = f"detection to embedding, {mix}, screen {name}"
            yield row(part, costs[ours][1:], costs[loop][1:], "ms a photo", most)


def executors(material: Material, rounds: int) -> Iterator[Row]:
    """Ray with two workers against the local executor, per row."""
    large, small = material.names
    others = cycle(small)
    mixed = [name for big in large for name in (*islice(others, 9), big)]
    cases = {"all large": (large, 320, "1.10"), "90 % small": (mixed, 2400, "1.15")}
    if material.smoke:
        cases = {"10 % large": (mixed, 20, "")}
    for mix, (names, count, most) in cases.items():
        short = 0 if material.smoke else count // 4
        sets = {"executor.workers": 2, "source.rows_per_shard": -(-count // 16)}
        costs: dict[str, list[float]] = {"ray": [], "local": []}
        with runs.served(material.photos, names, count) as urls:
            for _ in range(rounds):
                for name, measured in costs.items():
                    words = runs.words(material, {**sets, "executor.name": name})
                    measured.append(1000 * runs.per_row(urls, short, words).cpu_s)
        yield row(f"Ray against local, {mix}", costs["ray"], costs["local"], "ms a row", most)


def sizes(material: Material, rounds: int) -> Iterator[Row]:
    """Ten times the rows, most of them dead links or small images: as much per row, and as much memory."""
    large, small = material.names
    names = [*["gone"] * 100, *islice(cycle(small), 99), large[0]]
    counts = (10, 30, 60) if material.smoke else (1_000, 10_000, 100_000)
    words = runs.words(material, {"executor.name": "local"})
    with runs.served(material.photos, names, counts[-1]) as urls:
        few, some, many = (runs.dataset(runs.plain(urls[:count]), words) for count in counts)
    less = 1000 * (some.cpu_s - few.cpu_s) / (counts[1] - counts[0])
    more = 1000 * (many.cpu_s - some.cpu_s) / (counts[2] - counts[1])
    part = f"{counts[2]:,} rows against {counts[1]:,}"
    yield row(f"{part}, CPU of a further row", [more], [less], "ms", "1.0 ± 0.1")
    yield row(f"{part}, largest process", [many.peak_mib], [some.peak_mib], "MiB", "1.0 ± 0.1")


def ledgers(material: Material, rounds: int) -> Iterator[Row]:
    """The report of a million rows, against what is wanted of it."""
    rows = 10_000 if material.smoke else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        many_rows.write(out, rows)
        cost = runs.measured([sys.executable, "-m", "pipeline", "report", str(out)])
        page = (out / "report.html").stat().st_size / 1e6
    for unit, spent, limit in (("s CPU", cost.cpu_s, 15), ("MiB", cost.peak_mib, 1000), ("MB of page", page, 10)):
        yield row(f"report of {rows:,} rows against what is wanted", [spent], [limit], unit, "1.0")


def loader(material: Material, rounds: int) -> Iterator[Row]:
    """Reading samples to train on: against webdataset, int8 against fp16, pairs against none."""
    import train_loader

    with tempfile.TemporaryDirectory() as folder:
        costs = train_loader.in_turn(Path(folder), 16 if material.smoke else 600, rounds)
    part = "loader: ID, hidden states, latents"
    yield row(f"{part}, against webdataset", costs["fp16"], costs["webdataset"], "ms a sample")
    yield row(f"{part}, int8 against fp16", costs["int8"], costs["fp16"], "ms a sample")
    yield row(f"{part}, paired against unpaired", costs["paired"], costs["fp16"], "ms a sample", "1.3")


CASES = {
    "whole": whole,
    "whole-10g": whole_10g,
    "stages": stages,
    "executors": executors,
    "sizes": sizes,
    "ledgers": ledgers,
    "loader": loader,
    "scaling": scaling_costs.check,
    "group": planted_persons.check,
}
NEED_DATA = ("whole", "whole-10g", "stages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="CASE", help=f"{', '.join(CASES)} [default: all]")
    parser.add_argument("--rounds", type=int, default=2, help="of each measurement [default: %(default)s]")
    parser.add_argument("--out", type=Path, default=Path("build/bench.jsonl"), help="[default: %(default)s]")
    parser.add_argument("--smoke", action="store_true", help="tiny models, few photos, one round")
    parser.add_argument("--log", action="store_true", help="put the table on top of docs/LOG.md")
    args = parser.parse_args()
    if unknown := set(args.names) - set(CASES):
        parser.error(f"{', '.join(unknown)}: no such case; there are {', '.join(CASES)}")
    record = report.recorder(args.out, args.smoke)
    failed = False
    with tempfile.TemporaryDirectory(prefix="faceshards-bench-") as folder:
        material = Material(Path(folder), args.smoke)
        left_out = [] if material.data or args.smoke else [name for name in NEED_DATA if name in (args.names or CASES)]
        for name in args.names or CASES:
            if name in left_out:
                continue
            try:
                for result in CASES[name](material, 1 if args.smoke else args.rounds):
                    record(result)
            except Exception:  # the other cases are measured all the same
                failed = True
                traceback.print_exc()
    print(f"\n{report.table(args.out)}")
    if left_out:
        print(f"\nLeft out without FACESHARDS_DATA, the folder with labelled photos and weights: {', '.join(left_out)}")
    if args.log:
        report.log(args.out, "make bench")
    sys.exit(failed)


if __name__ == "__main__":
    main()
