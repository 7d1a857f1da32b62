"""What a call of `evaluate` comes to, proved before anything large is imported."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.shared.bases import TINY, BaseSource, find_base
from pipeline.train.evaluate.subject import Subject, read_subject
from pipeline.train.job import DEFAULT_PRESETS, EMBEDDED, require_meaning
from pipeline.train.loader.dataset import Dataset, open_dataset
from pipeline.train.loader.reading import Features, features_of
from pipeline.train.settings import TrainConfig, load_train_config
from schemas.errors import ConfigError, SourceError, first_line


@dataclass(frozen=True)
class Call:
    """What the user typed."""

    path: Path
    shards: tuple[str, ...]
    variant: str = ""
    base: str | None = None
    step: int | None = None
    out: Path | None = None
    prompts: Path | None = None
    faces: int = 16
    images: int = 2
    """Of each face with each prompt."""
    config_file: Path | None = None
    pairs: Sequence[str] = ()
    options: dict[str, Any] = field(default_factory=dict)
    """See `job.Call`."""


@dataclass(frozen=True)
class EvaluationJob:
    """A proved call."""

    call: Call
    subject: Subject
    config: TrainConfig
    dataset: Dataset
    base: BaseSource
    features: Features


def prepared(call: Call) -> EvaluationJob:
    """Find the adapter, the dataset and the base, and prove that they fit.

    Raises:
        UserError: for whatever does not; nothing was written.
    """
    subject = read_subject(call.path, call.variant, call.step)
    config = _config(call, subject, "tiny")
    name = call.base or subject.sidecar.get("base")
    # One that is named is looked for before manifests are read, which may lie far away.
    source = _base(call, subject, name) if name else None
    dataset = open_dataset(call.shards, config.data.model_copy(update={"allow_no_captions": True}))
    subject.require_embedders(dataset)
    if source is None:
        source = _base(call, subject, "tiny" if EMBEDDED in dataset.profiles else subject.kind or "sd15")
    config = _config(call, subject, "tiny" if source.name in TINY else DEFAULT_PRESETS[source.kind])
    require_meaning(source.name, dataset, config)
    features = features_of(dataset, subject.variant.reads, config.adapter)
    return EvaluationJob(call, subject, config, dataset, source, features)


def _base(call: Call, subject: Subject, name: str) -> BaseSource:
    try:
        return find_base(name, sdxl=subject.kind == "sdxl")
    except SourceError as error:
        if call.base is not None or Path(name).exists():
            raise
        raise ConfigError(
            f"{call.path} was trained on the base {name}, of whose folder it knows the name alone: give it by --base."
        ) from error


def _config(call: Call, subject: Subject, preset: str) -> TrainConfig:
    """The settings of the training, or of a preset where they are not known, with those of the call over them."""
    options = dict(call.options)
    if call.prompts is not None:
        try:
            lines = call.prompts.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise ConfigError(f"--prompts {call.prompts} cannot be read: {first_line(error)}.") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"--prompts {call.prompts} is no text in UTF-8: save it as such.") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ConfigError(f"--prompts {call.prompts} holds no prompt: write one on each line.")
        options["watch"] = {**options.get("watch", {}), "validate_prompts": prompts}
    ranks = [len(tensor) for key, tensor in subject.tensors.items() if key.endswith("to_q_lora.down.weight")]
    if ranks:
        options["adapter"] = {**options.get("adapter", {}), "lora_rank": ranks[0]}
    return load_train_config(call.config_file, call.pairs, subject.recipe or preset, **options)
