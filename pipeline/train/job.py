"""What a call of `python -m pipeline.train` comes to, proved before the first step."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.shared.bases import TINY, BaseSource, find_base
from pipeline.shared.configfile import leaves
from pipeline.train.adapters.variants import Variant, Widths, variant
from pipeline.train.loader.dataset import Dataset, check_hashes, open_dataset
from pipeline.train.loader.reading import Features, features_of
from pipeline.train.run_folder import RunFolder
from pipeline.train.settings import TrainConfig, load_train_config, without_free_keys
from schemas.errors import ConfigError, SourceError, WeightsError

EMBEDDED = "embedded"
DEFAULT_PRESETS = {"sd15": "sd15", "sdxl": "sdxl-512"}


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
    options: dict[str, Any] = field(default_factory=dict)
    """Sections of the config that have options of their own, such as {"steps": 100}; None is not given."""


@dataclass(frozen=True)
class TrainJob:
    config: TrainConfig
    preset: str
    variant: Variant
    base: BaseSource
    dataset: Dataset
    features: Features
    run: RunFolder
    resume: bool

    @property
    def widths(self) -> Widths:
        return Widths(self.base.kind, self.base.text_width, **self.features.widths)

    @property
    def last_step(self) -> int:
        """That of the checkpoint from which a resumed run goes on, 0 for one that begins."""
        return max(self.run.steps(), default=0) if self.resume else 0

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed."""
        return {
            "variant": self.variant.name,
            "base": self.base.name,
            "base_sha256": self.base.sha256,
            "kind": self.base.kind,
            "dataset": self.dataset.digest,
            **without_free_keys(leaves(self.config.model_dump(mode="json"))),
        }


def prepared(call: Call) -> TrainJob:
    """Find the dataset and the base, merge the config, and prove that they fit the variant.

    Raises:
        UserError: for whatever does not; nothing was written.
    """
    chosen = variant(call.variant)
    config = load_train_config(call.config_file, call.pairs, call.preset or "tiny", **call.options)
    is_sdxl = (call.preset or "").startswith("sdxl")
    dataset = open_dataset(call.shards, config.data)
    features = features_of(dataset, chosen.reads, config.adapter)

    # What is not given: a real base for real features, else a tiny one, and the preset of the base.
    name = call.base or ("tiny" if EMBEDDED in dataset.profiles else "sdxl" if is_sdxl else "sd15")
    try:
        base = find_base(name, sdxl=is_sdxl)
    except WeightsError:
        require_meaning(name, dataset, config)  # nobody need fetch what would be refused then
        raise
    require_meaning(name, dataset, config)
    if call.preset and is_sdxl != (base.kind == "sdxl") and call.preset != "tiny":
        raise ConfigError(f"The preset {call.preset} is not for {base.name}, which has the layout of {base.kind}.")
    preset = call.preset or ("tiny" if name in TINY else DEFAULT_PRESETS[base.kind])
    config = load_train_config(call.config_file, call.pairs, preset, **call.options)

    run = RunFolder(call.out or Path("runs") / f"{call.variant}-{base.name}")
    return TrainJob(config, preset, chosen, base, dataset, features, run, call.resume)


def hash_shards(job: TrainJob) -> None:
    """Compare the tars with their manifests, as far as it is this process's share and no earlier run did.

    Raises:
        CorruptShardError: for a tar that is not the one of its manifest; only the process that hashed it raises.
    """
    if job.config.data.verify != "sha256":
        return
    hashed_before = None
    if job.resume and job.run.exists():
        before = job.run.description()
        if leaves(before.get("sidecar", {})).get("recipe.data.verify") == "sha256":
            hashed_before = before["identity"].get("dataset")
    # The processes of a machine read the same disk, and a dataset may take hours: each hashes its share of it.
    rank, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check_hashes(job.dataset, rank, ranks, hashed_before=hashed_before)


def require_meaning(base: str, dataset: Dataset, config: TrainConfig) -> None:
    """Refuse to spend GPU days on features that mean nothing."""
    if EMBEDDED in dataset.profiles and base not in TINY and not config.data.allow_embedded:
        raise SourceError(
            f"These shards are of the `embedded` profile, which is for trying things out, and {base} is a real "
            "base: use --base tiny, make the dataset with real models, or give --set data.allow_embedded=true."
        )
