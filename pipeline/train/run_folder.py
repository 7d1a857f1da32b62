"""The folder of a run: what it trains, its checkpoints, and where everything else lies.

RUN/run.json                       what is trained, on what; compared before a run is resumed
RUN/checkpoints/step-00002000/     adapter.safetensors (float32), state.pt (the rest), and the released files
RUN/metrics.jsonl  RUN/tensorboard/  RUN/validation/
RUN/<released name>.*              at the end
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.shared.atomic import TEMPORARY, fsync_file, fsync_folder, write_atomically
from schemas.errors import OutputError, first_line

_STEP = "step-"
_ADAPTER, _AVERAGE, _STATE, _RUN = "adapter.safetensors", "average.safetensors", "state.pt", "run.json"

FREE_TO_CHANGE = ("steps", "watch", "data.verify", "data.allow_embedded", "optim.compile", "optim.channels_last")
"""Config keys that may differ when a run is resumed."""


class RunFolder:
    """One run's directory."""

    def __init__(self, root: Path) -> None:
        """Name the directory; nothing is created yet."""
        self.root = root
        self.checkpoints = root / "checkpoints"

    def known(self) -> dict[str, Any] | None:
        """What run.json says, or None where there is no run.

        Raises:
            OutputError: when it cannot be read.
        """
        try:
            content = json.loads((self.root / _RUN).read_bytes())
            if not isinstance(content, dict) or not isinstance(content.get("identity"), dict):
                raise ValueError("it does not describe a run")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.root / _RUN} cannot be read ({error}); choose another --out.") from error
        return content

    def start(self, told: Mapping[str, Any], *, resume: bool) -> None:
        """Create the directory for a run, or go on in it.

        Raises:
            OutputError: when another run is there, or it cannot be written.
        """
        before = self.known()
        if before is not None and not resume:
            raise OutputError(f"{self.root} holds a run: give --resume to go on with it, or another --out.")
        if before is not None:
            differing = list(_differences(before["identity"], told["identity"]))
            if differing:
                raise OutputError(f"{self.root} was trained otherwise ({'; '.join(differing)}): choose another --out.")
        with writing(self.root):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.root / _RUN, (json.dumps(told, indent=2, sort_keys=True) + "\n").encode())
        for stray in self.checkpoints.glob(f"{TEMPORARY}*"):
            shutil.rmtree(stray, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        found = [path.name.removeprefix(_STEP) for path in self.checkpoints.glob(f"{_STEP}*")]
        return sorted(int(step) for step in found if step.isdigit())

    def folder(self, step: int) -> Path:
        """The folder of the checkpoint at `step`."""
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
            save_file(_on_cpu(weights), temporary / _ADAPTER)
            if average is not None:
                save_file(_on_cpu(average), temporary / _AVERAGE)
            torch.save(dict(state), temporary / _STATE)
            _sync_files(temporary)
            if final.exists():
                _remove(final)
            temporary.rename(final)
            fsync_folder(self.checkpoints)
            for old in self.steps()[:-keep]:
                _remove(self.folder(old))
        return final

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Any]]:
        """Weights, averaged weights (None where there are none) and state of a checkpoint.

        Raises:
            OutputError: when it is damaged.
        """
        folder = self.folder(step)
        try:
            weights = load_file(folder / _ADAPTER)
            average = load_file(folder / _AVERAGE) if (folder / _AVERAGE).exists() else None
            state: dict[str, Any] = torch.load(folder / _STATE, weights_only=True, map_location="cpu")
            if average is None and state.get("average") is not None:
                raise ValueError(f"{_AVERAGE} is missing")
        except Exception as error:  # whatever the readers of damaged files raise; told and raised on
            raise OutputError(
                f"The checkpoint {folder} cannot be read ({first_line(error)}): remove it, then resume."
            ) from error
        return weights, average, state

    def exported(self, step: int) -> dict[str, Tensor]:
        """The weights that a checkpoint exports: the average where there is one."""
        weights, average, _ = self.load(step)
        return weights if average is None else average


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


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as stream:
            fsync_file(stream)
    fsync_folder(folder)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in tensors.items()}


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys that may change when a run is resumed."""

    def is_free(key: str) -> bool:
        return any(key == name or key.startswith(f"{name}.") for name in FREE_TO_CHANGE)

    return {key: value for key, value in _leaves(config) if not is_free(key)}


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
