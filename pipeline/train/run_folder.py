"""The folder of a run: what it trains, its checkpoints, and where everything else lies.

RUN/run.json                       what is trained, on what; compared before a run is resumed
RUN/checkpoints/.lock              held by the training that writes to RUN
RUN/checkpoints/step-00002000/     adapter.safetensors (float32), state.pt (the rest), and the released files
RUN/metrics.jsonl  RUN/history.jsonl  RUN/tensorboard/  RUN/validation/  RUN/report.html
RUN/<released name>.*  RUN/README.md   at the end
"""

import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import EACCES, EAGAIN, EINVAL, ENOTDIR
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.shared.atomic import TEMPORARY, fsync_file, fsync_folder, write_atomically
from pipeline.shared.configfile import leaves
from pipeline.train.adapters.released import save_tensors
from pipeline.train.settings import TrainConfig, without_free_keys
from schemas.errors import LostError, OutputError, first_line
from schemas.shard import DATASET

_STEP = "step-"
_ADAPTER, _AVERAGE, _STATE, _RUN = "adapter.safetensors", "average.safetensors", "state.pt", "run.json"
_LOCK = ".lock"


class RunFolder:
    """One run's directory, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"

    def exists(self) -> bool:
        return (self.root / _RUN).exists()

    def description(self) -> dict[str, Any]:
        """What run.json says; an OutputError when it cannot be read, or there is no run."""
        try:
            content = json.loads((self.root / _RUN).read_bytes())
            if not isinstance(content, dict) or not isinstance(content.get("identity"), dict):
                raise ValueError("it does not describe a run")
        except FileNotFoundError:
            advice = "give the --out of a training run"
            raise OutputError(f"{self.root} holds no run (there is no run.json): {advice}.") from None
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.root / _RUN} cannot be read ({first_line(error)}); choose another --out."
            ) from error
        return content

    def check(self, description: Mapping[str, Any], *, resume: bool) -> None:
        """See that a run may begin, or go on, in the directory, and write nothing.

        Raises:
            OutputError: when another run, or a dataset, is there, a training writes to it, or no directory can be.
        """
        if not self.exists() and (self.root / DATASET).exists():
            raise OutputError(f"{self.root} holds a dataset, whose report this would replace: choose another --out.")
        if self.exists() and not resume:
            raise OutputError(f"{self.root} holds a run: give --resume to go on with it, or another --out.")
        if self.exists():
            before = self.description()
            # A run that a release without some key began was trained as its default has it.
            defaults = leaves(TrainConfig().model_dump(mode="json"))
            was, now = (without_free_keys({**defaults, **each["identity"]}) for each in (before, description))
            differing = [
                f"{key} was {was.get(key)!r}, now {now.get(key)!r}"
                for key in sorted({*was, *now})
                if was.get(key) != now.get(key)
            ]
            if differing:
                raise OutputError(f"{self.root} was trained otherwise ({'; '.join(differing)}): choose another --out.")
            if (self.checkpoints / _LOCK).exists():
                os.close(self._hold())
        with writing(self.root):
            try:
                str(self.root).encode()
            except UnicodeEncodeError:  # TensorBoard and safetensors take no other names
                raise OSError(EINVAL, "its name is no Unicode") from None
            there = next(path for path in (self.root, *self.root.absolute().parents) if os.path.lexists(path))
            if not (there.is_dir() and os.access(there, os.W_OK)):
                trouble = EACCES if there.is_dir() else ENOTDIR
                raise OSError(trouble, os.strerror(trouble))

    def start(self, description: Mapping[str, Any], *, resume: bool) -> None:
        """Create the folder for a run, or go on in it; an OutputError as in `check`, and when it cannot be written."""
        self.check(description, resume=resume)
        with writing(self.root):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            weakref.finalize(self, os.close, self._hold())
            write_atomically(self.root / _RUN, (json.dumps(description, indent=2, sort_keys=True) + "\n").encode())
        for stray in self.checkpoints.glob(f"{TEMPORARY}*"):
            shutil.rmtree(stray, ignore_errors=True)

    def _hold(self) -> int:
        """The number of a file that is held until it is closed; an OutputError when another process holds it.

        Of two trainings in RUN, each would remove the other's checkpoints and metrics. It is not flock, which processes
        of the loader would inherit, and hold on after a kill of this one.
        """
        with writing(self.root):
            lock = os.open(self.checkpoints / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (EACCES, EAGAIN):
                os.close(lock)
                raise OutputError(
                    f"Another training is writing to {self.root}: wait for it, or interrupt it."
                ) from None
            # Some disks know no locks.
        return lock

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        numbers = [path.name.removeprefix(_STEP) for path in self.checkpoints.glob(f"{_STEP}*")]
        return sorted(int(number) for number in numbers if number.isdigit())

    def chosen(self, step: int | None) -> int:
        """A step that has a checkpoint: this one, or the last; an OutputError when there is none."""
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            there = f"there are those of steps {', '.join(map(str, steps))}" if steps else "there is none yet"
            raise OutputError(f"{self.root} has no checkpoint{'' if step is None else f' of step {step}'}: {there}.")
        return steps[-1] if step is None else step

    def folder(self, step: int) -> Path:
        return self.checkpoints / f"{_STEP}{step:08d}"

    def save(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        average: Mapping[str, Tensor] | None,
        state: Mapping[str, Any],
        keep: int,
    ) -> Path:
        """Write a checkpoint under a temporary name, rename it, and remove all but the last `keep`.

        Raises:
            OutputError: when it cannot be written; earlier checkpoints stay.
        """
        final = self.folder(step)
        temporary = final.with_name(f"{TEMPORARY}{final.name}")
        with writing(final):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for name, tensors in ((_ADAPTER, weights), (_AVERAGE, average)):
                if tensors is not None:
                    save_tensors({key: tensor.float() for key, tensor in tensors.items()}, temporary / name)
            torch.save(dict(state), temporary / _STATE)
            for path in temporary.iterdir():
                with path.open("rb") as stream:
                    fsync_file(stream)
            fsync_folder(temporary)
            if final.exists():
                _remove(final)
            temporary.rename(final)
            fsync_folder(self.checkpoints)
            for old in self.steps()[:-keep]:
                _remove(self.folder(old))
        return final

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Any]]:
        """Weights, their average if there is one, and state of a checkpoint; an OutputError when it is damaged."""
        weights, average = self.weights(step)
        with self._reading(step) as folder:
            state: dict[str, Any] = torch.load(folder / _STATE, weights_only=True, map_location="cpu")
            if average is None and state.get("average") is not None:
                raise ValueError(f"{_AVERAGE} is missing")
        return weights, average, state

    def weights(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Weights and averaged weights of a checkpoint: all that an export needs; an OutputError when damaged."""
        with self._reading(step) as folder:
            average = folder / _AVERAGE
            return load_file(folder / _ADAPTER), load_file(average) if average.exists() else None

    @contextmanager
    def _reading(self, step: int) -> Iterator[Path]:
        folder = self.folder(step)
        try:
            yield folder
        except Exception as error:  # whatever the readers of damaged files raise; it is raised on
            raise OutputError(
                f"The checkpoint {folder} cannot be read ({first_line(error)}): remove it, then resume."
            ) from error


@contextmanager
def partly_done() -> Iterator[None]:
    """Tell an RUN that cannot be written any more from one that never could."""
    try:
        yield
    except OutputError as error:
        raise LostError(
            f"{error} Checkpoints are kept: once it can be, the same command with --resume goes on."
        ) from error


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Tell the user when what happens inside cannot write `target`.

    Raises:
        OutputError: for a disk that is full or read-only, a folder that is a file, and the like.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # what Python, safetensors and torch raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"{target} cannot be written: {reason}.") from error


def _remove(checkpoint: Path) -> None:
    """Whoever is killed in between leaves no half of it under its name."""
    removed = checkpoint.with_name(f"{TEMPORARY}{checkpoint.name}.old")
    checkpoint.rename(removed)
    shutil.rmtree(removed)
