"""The run's config: what stages are told (stages.settings) plus where data comes from and who does the work."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from pipeline.dataset.source.parts import SourceSettings
from pipeline.shared.configfile import explain, merge, told
from schemas.errors import ConfigError
from schemas.names import SAMPLE
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
        }
    },
}
"""What a profile sets; TOML and --set may override each of it."""


EXTRAS = ("latents", "text", "mirror")
"""The words of `--with`: switches of `encode`."""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ExecutorSettings(Section):
    """Who does the work. None of this changes the bytes of a shard."""

    name: Literal["auto", "local", "ray"] = "auto"
    """`local`: this process. `ray`: worker processes, on this machine or a cluster. `auto`: local for the sample."""
    workers: int = Field(default_factory=_cores, ge=1)
    """Model processes on Ray; the local executor always works in its one process."""
    gpus: int = Field(0, ge=0)
    """GPUs to use; asked for and absent is an error."""
    ray_address: str = ""
    """Join this Ray cluster instead of starting one."""
    batch_rows: int = Field(8, ge=1)
    """Rows that go through the models together."""
    fetch_ahead: int = Field(256, ge=1)
    """Batches per shard that are downloaded while earlier ones are computed, or wait for a slow host."""
    shard_timeout_s: float = Field(900.0, gt=0)
    """A shard of which no batch gets done for so long is given up: it fails, its workers are replaced."""


class ReportSettings(Section):
    """The report."""

    drops_per_reason: int = Field(2, ge=0)
    """Thumbnails of dropped photos kept per shard and reason; 0 keeps none."""


class Config(Settings):
    """Everything that `--config FILE` and `--set a.b=c` can say."""

    profile: Profile = "insightface"
    """Names the models; see PROFILES."""
    source: SourceSettings = SourceSettings()
    executor: ExecutorSettings = ExecutorSettings()
    report: ReportSettings = ReportSettings()


def load_config(
    path: Path | None,
    sets: Sequence[str],
    *,
    shards: str = "",
    profile: str | None = None,
    executor: str | None = None,
    extras: str | None = None,
) -> Config:
    """Merge profile, TOML file, `--set` pairs and the words of `--with` (`extras`), later ones winning, and validate.

    Raises:
        ConfigError: for an unreadable file, an unknown key (names the nearest), or a value that is not allowed.
    """
    asked = told(path, sets)
    if profile:
        asked["profile"] = profile
    name = asked.setdefault("profile", "embedded" if shards == SAMPLE else "insightface")
    if executor:
        merge(asked, {"executor": {"name": executor}})
    if extras:
        merge(asked, {"encode": dict.fromkeys(_words(extras), True)})
    if name not in get_args(Profile):
        raise ConfigError(f"profile = {name!r} is not known; choose one of: {', '.join(get_args(Profile))}.")
    values: dict[str, Any] = {}
    merge(values, PROFILES[name])
    merge(values, asked)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, Config)) from error
    return _settle(config, shards)


def _words(extras: str) -> list[str]:
    words = [word.strip() for word in extras.split(",") if word.strip()]
    unknown = [word for word in words if word not in EXTRAS]
    if unknown:
        raise ConfigError(f"--with {unknown[0]!r} is not known; give some of: {', '.join(EXTRAS)}.")
    return words


def _settle(config: Config, shards: str) -> Config:
    """Fill in the executor's name, where it follows from SHARDS."""
    name = config.executor.name
    if name == "auto":
        name = "local" if shards == SAMPLE else "ray"
    executor = config.executor.model_copy(update={"name": name})
    return config.model_copy(update={"executor": executor})
