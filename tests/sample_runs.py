"""Runs of the bundled sample in eight small shards, in this process or in processes of their own."""

import copy
import functools
import io
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import xxhash
from filelock import FileLock
from rich.console import Console

from pipeline.dataset import job as running
from pipeline.dataset.config import load_config
from pipeline.dataset.execute.make_shard import Event
from pipeline.dataset.finished import contract, report_cards
from pipeline.dataset.job import make_dataset, prepared
from pipeline.dataset.out.ledger import funnel
from pipeline.dataset.source.sample import FILES
from schemas.errors import ExitCode
from stages.models.detectors.haar import Haar
from stages.models.segmenters.grabcut import GrabCut
from stages.pixels import images

REMEMBERING = Path(__file__).with_name("remembering.py")
SHARDS = [f"sample-0000{n}" for n in range(8)]
_SMALL = "source.rows_per_shard=3"


MEMORY = "FACESHARDS_TESTS_REMEMBER"
"""The variable that names the file in which the processes of a test run leave what they computed."""
DRAWN = {name: functools.cache(draw) for name, draw in FILES.items()}
"""The pictures of the bundled sample, each drawn once."""
FRESH = dict(FILES)
"""The same, drawn each time, as users have them."""
_computed: dict[Any, Any] = {}
_recalled: set[Path] = set()


def _recall() -> None:
    file = Path(os.environ.get(MEMORY, "/none"))
    if file not in _recalled and file.exists():
        _recalled.add(file)
        pictures, computed = pickle.loads(file.read_bytes())
        DRAWN.update({name: lambda picture=picture: picture for name, picture in pictures.items()})
        _computed.update(computed)


def _remembering(compute: Callable[..., Any], pause_s: float = 0) -> Callable[..., Any]:
    """The same, computed once for the same pixels; what is known comes after a pause."""

    @functools.wraps(compute)
    def remembered(model: Any, *arrays: Any) -> Any:
        key = compute.__qualname__, getattr(model, "_long_side", 0), *map(_digest, arrays)
        if key not in _computed:
            _computed[key] = compute(model, *arrays)
        time.sleep(pause_s)
        return copy.deepcopy(_computed[key])

    return remembered


def _digest(array: Any) -> tuple[Any, ...]:
    return array.shape, xxhash.xxh3_128_digest(np.ascontiguousarray(array))


def _once(compute: Callable[..., Any], gather: Callable[[Any], Any] = lambda result: result) -> Callable[..., Any]:
    """A function that is called once for the same bytes, pixels and other values."""

    @functools.wraps(compute)
    def remembered(*given: Any) -> Any:
        key = compute.__qualname__, *map(_key, given)
        if key not in _computed:
            _computed[key] = gather(compute(*given))
        return _computed[key]

    return remembered


def _key(given: Any) -> Any:
    if isinstance(given, bytes):
        return xxhash.xxh3_128_digest(given)
    return _digest(given) if isinstance(given, np.ndarray) else repr(given)


_OF_CARDS = {
    name: _once(getattr(report_cards, name)) for name in ("decode_jpeg", "decode_png", "marked", "masked", "reduced")
}
_image_problems = _once(contract._image_problems, tuple)


def _encoded(suffix: str, image: Any, options: Any, real: Callable[..., bytes] = images._encode) -> bytes:
    key = real.__qualname__, suffix, *options, _digest(image)
    if key not in _computed:
        _computed[key] = real(suffix, image, options)
    return _computed[key]


@contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Within is one process of a test run at a time, which remembers what the first of them did."""
    file = Path(os.environ[MEMORY])
    with FileLock(folder / "computed.lock"):
        _recall()
        yield
        if not file.exists():
            draft = file.with_suffix(".new")
            draft.write_bytes(pickle.dumps(({name: draw() for name, draw in DRAWN.items()}, _computed)))
            draft.rename(file)  # whole, for who reads without the lock


@contextmanager
def remembered_models(pause_s: float = 0) -> Iterator[None]:
    """Within, all runs draw the sample's pictures, find faces, cut them out, encode them and reduce them only once.

    With a pause, a run that others interrupt takes as long as if it looked for faces, without their processor time.
    """
    _recall()
    with (
        patch.object(Haar, "detect", _remembering(Haar.detect, pause_s)),
        patch.object(GrabCut, "segment", _remembering(GrabCut.segment)),
        remembered_pictures(),
    ):
        yield


@contextmanager
def remembered_pictures() -> Iterator[None]:
    """Within, pictures of the sample are drawn once; any is encoded, reduced for the report and verified once."""
    with (
        patch.dict(FILES, DRAWN),
        patch.object(images, "_encode", _encoded),
        patch.multiple(report_cards, **_OF_CARDS),
        patch.object(contract, "_image_problems", _image_problems),
    ):
        yield


@contextmanager
def no_report() -> Iterator[None]:
    """Within, runs count their funnel and write no page, which is a third of a small run that nobody looks at."""
    with patch.object(running, "write_report", funnel):
        yield


def make(
    out: Any,
    *pairs: str,
    shards: str = "sample",
    replan: bool = False,
    afresh: bool = False,
    report: bool = False,
    watch: Callable[[Event], None] | None = None,
    **words: str,
) -> tuple[ExitCode, str]:
    """A run in this process, and what it printed; the models do not see the same photo twice, unless `afresh`.

    There is no page without `report`.
    """
    _recall()
    screen = io.StringIO()
    config = load_config(None, [_SMALL, *pairs], shards=shards, **{"executor": "local", **words})
    with (
        patch.dict(FILES, DRAWN) if afresh else remembered_models(),
        nullcontext() if report else no_report(),
        prepared(shards, config) as job,
    ):
        return make_dataset(job, out, Console(file=screen, width=200), replan=replan, watch=watch), screen.getvalue()


def command(out: object, *words: str) -> list[str]:
    """The words of a run in a process of its own, which remembers what this test run computed of the sample."""
    run = [sys.executable, str(REMEMBERING), "dataset", "--shards", "sample", "--out", str(out)]
    return [*run, "--set", _SMALL, *words]


def manifests(out: Any) -> list[str]:
    return sorted(path.name.removesuffix(".json") for path in (out / "shards").glob("*.json"))


def contents(out: Any) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


def without(whole: Path, out: Path, *shards: str) -> Path:
    """A copy of a whole run that lacks some shards, as one that was interrupted."""
    for path in whole.rglob("*"):
        copy = out / path.relative_to(whole)
        if path.is_file() and path.stem not in shards:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return out


def begun(out: Any, *words: str, shards: int = 1, **options) -> subprocess.Popen:
    """A run that goes on, with so many shards more than before done; it may be over by then."""
    before = len(manifests(out))
    process = subprocess.Popen(
        command(out, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    while len(manifests(out)) < before + shards and process.poll() is None:
        time.sleep(0.03)
    return process


def stopped(out: Path, sign: signal.Signals, *words: str) -> tuple[int, str]:
    """The exit code and stderr of a run that got a signal when its next shard was done."""
    process = begun(out, *words)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@contextmanager
def forks() -> Iterator[Callable[..., int]]:
    """`stopped`, which gives the exit code alone, by forks of one process: what all runs import is imported once."""
    words = [sys.executable, str(REMEMBERING), "forks"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def stopped(out: Path, sign: signal.Signals, *words: str) -> int:
            before = len(manifests(out))
            print(json.dumps(command(out, *words)[2:]), file=process.stdin, flush=True)
            run, is_over = int(process.stdout.readline()), False
            while len(manifests(out)) == before and not is_over:
                is_over = bool(select.select([process.stdout], [], [], 0.03)[0])
            if not is_over:
                os.kill(run, sign)
            return int(process.stdout.readline())

        yield stopped
        process.stdin.close()
