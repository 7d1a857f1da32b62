"""The run's config: the settings of the stages, plus where data comes from and who does the work."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from pipeline.dataset.source.parts import SourceSettings
from pipeline.shared.configfile import explain, merge, read_values
from schemas.errors import ConfigError
from schemas.names import SAMPLE, split_kind, split_spec
from schemas.section import Section
from stages.settings import Settings

Profile = Literal["embedded", "insightface", "permissive"]

PROFILES: dict[str, dict[str, Any]] = {
    "embedded": {
        "models": {"detector": "haar", "segmenter": "grabcut", "face_embedder": "lbp", "image_embedder": "patches"}
    },
    "insightface": {
        "models": {
            "detector": "scrfd",
            "segmenter": "facexlib",
            "face_embedder": "arcface",
            "image_embedder": "clip-vit-h",
        }
    },
    "permissive": {
        "models": {
            "detector": "yunet",
            "segmenter": "grabcut",
            "face_embedder": "arcface",
            "image_embedder": "clip-vit-h",
            "pack": "auraface",
            "licences": [
                *("MIT*", "Apache-2.0*", "BSD*", "Intel License*BSD-style*", "CreativeML Open*RAIL*", "CC-BY-4.0*"),
            ],
        }
    },
}
"""What a profile sets; TOML and --set may override each of it."""


EXTRAS = ("latents", "text", "mirror")
"""The words of `--with`: switches of `encode`."""


class ExecutorSettings(Section):
    """Who does the work. None of this changes the bytes of a shard."""

    name: Literal["auto", "local", "ray"] = "auto"
    """`local`: this process. `ray`: worker processes, on this machine or a cluster. `auto`: local for the sample."""
    workers: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1)
    """Model processes on Ray; the local executor always works in its one process. With GPUs, the cores that decode
    for them, shared evenly."""
    gpus: int = Field(0, ge=0)
    """GPUs to use, each by one process that holds all models; more than there are is an error."""
    ray_address: str = ""
    """Join this Ray cluster instead of starting one."""
    batch_rows: int = Field(0, ge=0)
    """Rows that go through the models together; 0: 8 on a CPU, 32 on a GPU, where models take from several of these
    batches at a time."""
    fetch_ahead: int = Field(256, ge=1)
    """Batches per shard that are downloaded while earlier ones are computed, or wait for a slow host."""
    shard_timeout_s: float = Field(900.0, gt=0, le=1e9)
    """A shard of which no batch gets done for so long is given up: it fails, its workers are replaced."""


class ReportSettings(Section):
    """The report."""

    drops_per_reason: int = Field(2, ge=0)
    """Thumbnails of dropped photos kept per shard and reason; 0 keeps none."""


class WatchSettings(Section):
    """Who learns how a run goes, beside the screen and `status`. None of this changes the bytes of a shard."""

    events: str = ""
    """File or URL that gets a line of JSON per event, such as OUT/events.jsonl; see docs/watching.md."""
    metrics: str = ""
    """File, renewed every 15 s, in Prometheus' text format: node_exporter's collector wants a name ending in .prom."""
    hook: str = ""
    """A function, as `module:function`, that is called with each event, a dict: for W&B, TensorBoard, a chat."""


class Config(Settings):
    """Everything that `--config FILE` and `--set a.b=c` can say."""

    profile: Profile = "insightface"
    """embedded, insightface or permissive: which models, and which licences weights may have."""
    source: SourceSettings = SourceSettings()
    executor: ExecutorSettings = ExecutorSettings()
    report: ReportSettings = ReportSettings()
    watch: WatchSettings = WatchSettings()


def load_config(
    path: Path | None,
    sets: Sequence[str],
    *,
    shards: str = "",
    profile: str | None = None,
    executor: str | None = None,
    ray_address: str | None = None,
    extras: str | None = None,
) -> Config:
    """Merge profile, TOML file, `--set` pairs and the words of `--with` (`extras`), later ones winning, and validate.

    Raises:
        ConfigError: for an unreadable file, an unknown key (names the nearest), or a value that is not allowed.
    """
    is_sample = shards != "" and [split_kind(word)[1] for word in split_spec(shards)] == [SAMPLE]
    values = read_values(path, sets)
    if profile:
        values["profile"] = profile
    name = values.setdefault("profile", "embedded" if is_sample else "insightface")
    if name not in [*PROFILES]:  # a list, since it may be one that has no hash
        raise ConfigError(f"profile = {name!r} is not known; choose one of: {', '.join(PROFILES)}.")
    if executor == "local" and ray_address:
        raise ConfigError("--executor local joins no cluster: leave out --ray-address, or give --executor ray.")
    if executor or ray_address:
        merge(values, {"executor": {"name": executor or "ray", "ray_address": ray_address}})
    for word in filter(None, (extras or "").replace(" ", "").split(",")):
        if word not in EXTRAS:
            raise ConfigError(f"--with {word!r} is not known; give some of: {', '.join(EXTRAS)}.")
        merge(values, {"encode": {word: True}})
    all_values: dict[str, Any] = {}
    merge(all_values, PROFILES[name])
    merge(all_values, values)
    try:
        config = Config.model_validate(all_values)
    except ValidationError as error:
        raise ConfigError(explain(error, Config)) from error
    if config.executor.name != "auto":
        return config
    chosen = config.executor.model_copy(update={"name": "local" if is_sample else "ray"})
    return config.model_copy(update={"executor": chosen})
