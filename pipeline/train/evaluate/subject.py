"""What is evaluated: a checkpoint of a run, or a released file, and what is known of its training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.train.adapters.released import read_released, read_sidecar
from pipeline.train.adapters.variants import VARIANTS, Variant, variant
from pipeline.train.loader.dataset import Dataset, models_of
from pipeline.train.run_folder import RunFolder
from schemas.digest import sha256_of_file
from schemas.errors import ConfigError, SourceError

_SUFFIXES = (".safetensors", ".bin")
_RELEASED = {
    chosen.released_name(kind, encoder): (chosen, kind)
    for chosen in VARIANTS.values()
    for kind in ("sd15", "sdxl")
    for encoder in ("clip-vit-h", "dinov2")
}
"""Name of a file without its suffix -> variant, and layout of the base."""


@dataclass(frozen=True)
class Subject:
    about: dict[str, Any]
    """`name` of the file or the run's folder, `step` of a run, `sha256` of the file."""
    variant: Variant
    tensors: dict[str, Tensor]
    """Under the flat keys of `AdapterModel.trained`."""
    sidecar: Mapping[str, Any]
    """What its training wrote down, see `export.described`; empty for files that come without."""
    watch: Mapping[str, Any]
    """The section of that name of the run's settings, where it is a run."""
    kind: str
    """Layout of the base that the name of the file tells, else ""."""
    folder: Path
    """Where its evaluation belongs."""
    released: Path
    """Its released file, which a run may not have yet."""

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The settings that it was trained with, of which pictures its condition was among them."""
        if "recipe" not in self.sidecar:
            return None
        pictures = [
            one
            for one in ("segmented", "plain")
            if any(f" {one} " in how for how in self.sidecar["condition"].values())
        ]
        adapter = self.sidecar["recipe"]["adapter"]
        if len(pictures) == 1:
            adapter = {**adapter, "condition": pictures[0]}
        watch = {key: value for key, value in self.watch.items() if key not in ("judge", "clip", "hook")}
        return {**self.sidecar["recipe"], "adapter": adapter, "watch": watch}

    def held_out(self, dataset: Dataset) -> tuple[str, str]:
        """Whether a dataset is another one than it was trained on: "yes", "no" or "not known", and why, a sentence."""
        trained, began_as = self.sidecar.get("dataset", {}), self.sidecar.get("init_from")
        before = {*trained.get("lineage", ()), *([trained["digest"]] if trained else ())}
        if not before:
            return "not known", "Nothing tells what the adapter was trained on: these photos may be among it."
        if before & set(dataset.lineage):
            return "no", (
                "The adapter was trained on these shards, or on shards that were grouped from, or into, the same ones: "
                "the numbers flatter it."
            )
        if began_as and not began_as["is_known"]:
            return "not known", (
                f"It began as {began_as['name']}, and nothing tells what that was trained on: these photos may be "
                "among it."
            )
        return "yes", (
            "By their digests, neither these shards nor those that they were grouped from are what the adapter was "
            "trained on. Not compared: single photos and persons, which may be in both; a dataset that has grown or "
            "shrunk since then counts as another one."
        )

    def require_embedders(self, dataset: Dataset) -> None:
        """Check that the condition comes from the models that the adapter was trained with, where that is known.

        Raises:
            SourceError: names both.
        """
        tasks = {"face_embedder" if role == "arcface" else "image_embedder" for role in self.variant.reads}
        for task in sorted(tasks):
            trained, given = (models_of(task, models) for models in (self.sidecar.get("weights", ()), dataset.models))
            if trained and trained != given:
                raise SourceError(
                    f"It was trained on vectors of the {task.replace('_', ' ')} {', '.join(trained)}, those of "
                    f"{dataset.folders} are of {', '.join(given)}: give shards that were made with the same one."
                )


def read_subject(path: Path, name: str, step: int | None) -> Subject:
    """A run's folder, at its last step or at `step`; or a .safetensors or .bin file.

    `name` is that of the variant, where it is not known otherwise; "" for what is known.

    Raises:
        UserError: when it is neither, its variant is not known, or is another one.
    """
    kind = ""
    if path.is_dir():
        run = RunFolder(path)
        description = run.description()
        step = run.chosen(step)
        weights, average = run.weights(step)
        tensors = weights if average is None else average
        file = run.folder(step) / ("adapter.safetensors" if average is None else "average.safetensors")
        sidecar, watch, folder = description["sidecar"], description.get("watch", {}), path / "evaluation"
        released = path / f"{description['name']}.safetensors"
    elif path.suffix in _SUFFIXES:
        if step is not None:
            raise ConfigError(f"--step is for runs, and {path} is a file.")
        file, tensors, watch, folder = path, read_released(path), {}, path.with_name(f"evaluation-{path.stem}")
        sidecar, released = read_sidecar(path), path
    else:
        raise SourceError(
            f"{path} is neither the folder of a training run nor a file of an adapter ({' or '.join(_SUFFIXES)})."
        )
    known = sidecar.get("variant", "")
    if path.stem in _RELEASED and not known:
        chosen, kind = _RELEASED[path.stem]
        known = chosen.name
    if not (known or name):
        raise ConfigError(
            f"{path} does not tell which variant it is of, as a sidecar or a released name would: say it by --variant "
            f"and one of: {', '.join(VARIANTS)}."
        )
    if name and sidecar and name != known:
        raise ConfigError(f"{path} is of the variant {known}, not {name}: leave --variant out.")
    about = {"name": path.resolve().name, "step": sidecar.get("steps", step), "sha256": sha256_of_file(file)}
    return Subject(about, variant(name or known), tensors, sidecar, watch, kind, folder, released)
