"""RUN/report.html: how a training goes, or went, made from what its folder holds. One file that needs nothing else."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.shared.atomic import write_atomically
from pipeline.shared.configfile import leaves
from pipeline.shared.page import data_uri, rendered
from pipeline.train.run_folder import RunFolder, writing
from pipeline.train.run_page import curves
from pipeline.train.run_page.curves import Metrics
from pipeline.train.watch import HISTORY, METRICS, say
from schemas.arrays import Doubles
from schemas.errors import OutputError

REPORT = "report.html"

_GRIDS = 24
_GRID_PX, _GRID_BYTES, _QUALITY = 1280, 250_000, 80
"""Bounds on a picture; all together they are 8 MB as text."""
_RECENT = 0.05
"""Share of the run that the numbers on top are means of."""
_EVENTS = 30


@contextmanager
def page_of(run: RunFolder, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """What writes RUN/report.html; it is called once more when the run ends, however it does. `quiet` writes nothing.

    A page that cannot be written does not stop a training.
    """

    def write() -> None:
        try:
            if not quiet:
                write_page(run)
        except OutputError as error:
            say(f"warning: {error}")

    try:
        yield write
    finally:
        write()


def write_page(run: RunFolder) -> Path:
    """Write RUN/report.html, whose length is bounded, whatever the number of steps; returns its path.

    Raises:
        OutputError: when there is no run, its metrics are damaged, or the page cannot be written.
    """
    description = run.description()
    sidecar, metrics, events = description["sidecar"], curves.read_metrics(run.root / METRICS), _events(run.root)
    steps, bad = metrics["step"], curves.not_finite("loss", metrics)
    last = int(max([0, *steps[-1:], *(event["step"] for event in events[-1:])]))
    resumed = sorted({event["step"] for event in events if event["kind"] == "start" and event["step"]})
    grids = _grids(run.root / "validation", metrics)
    page = rendered(
        Path(__file__).with_name("run_page"),
        data=[{"about": grid["about"], "position": 100 * grid["step"] / max(last, 1)} for grid in grids],
        sidecar=sidecar,
        last=last,
        total=sidecar["recipe"]["steps"],
        end=events[-1] if events else {"kind": "start"},
        events=events[-_EVENTS:],
        earlier=len(events[:-_EVENTS]),
        written=_day(datetime.now(UTC).timestamp()),
        resumed={step: 100 * step / max(last, 1) for step in resumed},
        numbers=dict(_numbers(metrics, [0, *resumed])),
        slow_data=_recent(metrics.get("data_wait", steps[:0])) > 0.2,
        bad=bad.sum(),
        first_bad=int(steps[bad][:1].sum()),
        charts=list(curves.charts(metrics, last)),
        grids=grids,
        files={path.name: path.stat().st_size for path in sorted(run.root.glob(f"{description['name']}*"))},
        checkpoints=run.steps(),
        settings=leaves({**sidecar["recipe"], "watch": description.get("watch", {})}),
    )
    with writing(run.root / REPORT):
        write_atomically(run.root / REPORT, page)
    return run.root / REPORT


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _events(root: Path) -> list[dict[str, Any]]:
    """When the run was started, and how it ended each time; torn lines are left out."""
    events = []
    for line in (root / HISTORY).read_bytes().splitlines() if (root / HISTORY).exists() else ():
        with suppress(ValueError, LookupError, TypeError):
            time, kind, step, words = (json.loads(line)[name] for name in ("time", "kind", "step", "words"))
            events.append({"day": _day(time), "kind": kind, "step": int(step), "words": words})
    return events


def _recent(values: Doubles) -> float:
    """Mean of the latest values that are finite, NaN where none is."""
    known = values[np.isfinite(values)]
    return float(known[-max(round(_RECENT * len(known)), 1) :].mean()) if len(known) else float("nan")


def _numbers(metrics: Metrics, starts: list[int]) -> Iterator[tuple[str, str]]:
    """The numbers on top: title -> value in words."""
    for name, title in {"loss": "loss", "id_similarity": "ID similarity", "samples_per_s": "samples / s"}.items():
        if name in metrics:
            known, lost = np.isfinite(metrics[name]).nonzero()[0], curves.not_finite(name, metrics).nonzero()[0]
            is_lost = lost.max(initial=-1) > known.max(initial=-1)
            yield title, "not finite" if is_lost else curves.number(_recent(metrics[name]))
    if "data_wait" in metrics:
        yield "data wait", curves.percent(_recent(metrics["data_wait"]))
    if "seconds" in metrics:
        steps, seconds = metrics["step"], np.nan_to_num(metrics["seconds"])
        turns = np.searchsorted(starts, steps)  # the steps after one start, to the next
        hours = sum(float(seconds[turns == turn].max(initial=0)) for turn in range(len(starts) + 1)) / 3600
        short = f"{3600 * hours:.0f} s" if hours < 1 / 30 else f"{60 * hours:.1f} min"
        yield "time", short if hours < 2 else f"{hours:,.1f} h"
    if "epoch" in metrics:
        yield "epoch", f"{np.nanmax(metrics['epoch'], initial=0):,.0f}"


def _grids(folder: Path, metrics: Metrics) -> list[dict[str, Any]]:
    """Those of at most _GRIDS steps: every one, or every second, fourth, …, and the last. So few are new each time.

    `step`, words `about` it, `uri`, and `size`: width and height.
    """
    paths = {int(path.stem[5:]): path for path in folder.glob("step-*.png") if path.stem[5:].isdigit()}
    steps = sorted(paths)
    stride = 1
    while len(steps) / stride > _GRIDS:
        stride *= 2
    judged = {}
    for name in ("id_similarity", "faces_found"):
        values = metrics.get(name, metrics["step"][:0])
        judged[name] = {int(metrics["step"][at]): values[at] for at in np.flatnonzero(np.isfinite(values))}
    grids: list[dict[str, Any]] = []
    for step in sorted({*steps[::stride], *steps[-1:]}):
        about = [f"{step:,}"]
        if step in judged["id_similarity"]:
            about.append(f"ID similarity {judged['id_similarity'][step]:.3f}")
        if step in judged["faces_found"]:
            about.append(f"faces in {curves.percent(judged['faces_found'][step])}")
        picture = _picture(paths[step], paths[step].stat().st_mtime_ns)
        grids += [{"step": step, "about": ", ".join(about), **picture}] if picture else []
    return grids


@lru_cache(2 * _GRIDS)
def _picture(path: Path, mtime_ns: int) -> dict[str, Any] | None:
    """A picture, reduced, for the page, and its size; None where it cannot be read."""
    image = cv2.imread(str(path))
    if image is None:
        return None
    side = _GRID_PX
    while True:
        scale = min(side / max(image.shape), 1)
        size = (max(round(scale * image.shape[1]), 1), max(round(scale * image.shape[0]), 1))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        jpeg = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1].tobytes()
        if len(jpeg) <= _GRID_BYTES:
            return {"uri": data_uri(jpeg), "size": size}
        side = side * 3 // 4
