"""What a call of `python -m pipeline.train` comes to, proved before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.shared.bases import BaseSource, find_base
from pipeline.train.adapters.variants import Variant, Widths, variant
from pipeline.train.loader import Dataset, open_dataset, require, widths
from pipeline.train.run_folder import RunFolder, identity_of
from pipeline.train.settings import Precision, TrainConfig, load_train_config
from schemas.errors import ConfigError, SourceError, WeightsError

EMBEDDED = "embedded"
_TINY = ("tiny", "tiny-sdxl")
_DEFAULT_PRESETS = {"sd15": "sd15", "sdxl": "sdxl-512"}


@dataclass(frozen=True)
class Call:
    """What the user typed."""

    shards: tuple[str, ...]
    variant: str
    base: str | None = None
    out: Path | None = None
    preset: str | None = None
    config_file: Path | None = None
    pairs: Sequence[str] = ()
    resume: bool = False
    told: dict[str, Any] = field(default_factory=dict)
    """Sections of the config that have options of their own, such as {"steps": 100}; None is not given."""


@dataclass(frozen=True)
class Job:
    """A proved call."""

    config: TrainConfig
    preset: str
    variant: Variant
    base: BaseSource
    dataset: Dataset
    run: RunFolder
    resume: bool

    @property
    def widths(self) -> Widths:
        """The widths that the adapter's shapes follow from."""
        return Widths(self.base.kind, self.base.text_width, **widths(self.dataset, self.config.adapter.image_encoder))

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed."""
        return {
            "variant": self.variant.name,
            "base": self.base.name,
            "kind": self.base.kind,
            "dataset": self.dataset.digest,
            **identity_of(self.config.model_dump(mode="json")),
        }

    @property
    def warnings(self) -> list[str]:
        """What the user should know before it starts."""
        if EMBEDDED not in self.dataset.profiles:
            return []
        return [
            "these shards are of the `embedded` profile: its features stand in for a face recogniser and CLIP, and an "
            "adapter trained on them is for trying things out only."
        ]


def prepared(call: Call) -> Job:
    """Find the dataset and the base, merge the config, and prove that they fit the variant.

    Raises:
        UserError: for whatever does not; nothing was written.
    """
    chosen = variant(call.variant)
    told = load_train_config(call.config_file, call.pairs, call.preset or "tiny", **call.told)
    dataset = open_dataset(call.shards, told.data, verified=_verified(call))
    require(dataset, chosen.reads, told.adapter.image_encoder)
    base, preset = _base(call, dataset, told)
    config = load_train_config(call.config_file, call.pairs, preset, **call.told)
    run = RunFolder(call.out or Path("runs") / f"{call.variant}-{base.name}")
    return Job(config, preset, chosen, base, dataset, run, call.resume)


def _verified(call: Call) -> list[str]:
    """The dataset that the run to be resumed has hashed before."""
    known = RunFolder(call.out).known() if call.resume and call.out else None
    return [known["identity"]["dataset"]] if known else []


def _base(call: Call, dataset: Dataset, config: TrainConfig) -> tuple[BaseSource, str]:
    """The base and the preset, where they are not given: a real base for real features, else a tiny one."""
    is_sdxl = (call.preset or "").startswith("sdxl")
    name = call.base or ("tiny" if EMBEDDED in dataset.profiles else "sdxl" if is_sdxl else "sd15")
    try:
        base = find_base(name, sdxl=is_sdxl)
    except WeightsError:
        _require_meaning(name, dataset, config)  # nobody need fetch what would be refused then
        raise
    _require_meaning(name, dataset, config)
    if call.preset:
        if is_sdxl != (base.kind == "sdxl") and call.preset != "tiny":
            raise ConfigError(f"The preset {call.preset} is not for {base.name}, which has the layout of {base.kind}.")
        return base, call.preset
    return base, "tiny" if name in _TINY else _DEFAULT_PRESETS[base.kind]


def _require_meaning(base: str, dataset: Dataset, config: TrainConfig) -> None:
    """Refuse to spend GPU days on features that mean nothing."""
    if EMBEDDED in dataset.profiles and base not in _TINY and not config.data.allow_embedded:
        raise SourceError(
            f"These shards are of the `embedded` profile, which is for trying things out, and {base} is a real "
            "base: use --base tiny, make the dataset with real models, or give --set data.allow_embedded=true."
        )


def precision(asked: Precision, device: torch.device) -> str:
    """The precision as accelerate calls it.

    Raises:
        ConfigError: when the device cannot do it.
    """
    if asked == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    if asked == "fp16" and device.type == "cpu":
        raise ConfigError(
            "optim.precision = fp16 needs a GPU, and torch has none here; use no (or bf16, slow on CPUs)."
        )
    return asked
