"""The run's config: what stages are told (stages.settings) plus where data comes from and who does the work."""

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError

from pipeline.source import SourceSettings
from schemas.errors import ConfigError
from schemas.names import SAMPLE
from stages.settings import Section, Settings

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
    fetch_ahead: int = Field(16, ge=1)
    """Batches per shard that are downloaded while earlier ones are computed."""


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
    path: Path | None, sets: Sequence[str], *, shards: str = "", profile: str | None = None, executor: str | None = None
) -> Config:
    """Merge profile, TOML file and `--set` pairs, later ones winning, and validate.

    Raises:
        ConfigError: for an unreadable file, an unknown key (names the nearest), or a value that is not allowed.
    """
    told: dict[str, Any] = _read_toml(path) if path else {}
    for pair in sets:
        _merge(told, _parse_pair(pair))
    if profile:
        told["profile"] = profile
    told.setdefault("profile", "embedded" if shards == SAMPLE else "insightface")
    if executor:
        _merge(told, {"executor": {"name": executor}})
    if told["profile"] not in get_args(Profile):
        raise ConfigError(f"profile = {told['profile']!r} is not known; choose one of: {', '.join(get_args(Profile))}.")
    values: dict[str, Any] = {}
    _merge(values, PROFILES[told["profile"]])
    _merge(values, told)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error
    return _settle(config, shards)


def _settle(config: Config, shards: str) -> Config:
    """Fill what follows from other fields: the executor's name, and the device of the models."""
    name = config.executor.name
    if name == "auto":
        name = "local" if shards == SAMPLE else "ray"
    executor = config.executor.model_copy(update={"name": name})
    models = config.models.model_copy(update={"device": "cuda" if executor.gpus else "cpu"})
    return config.model_copy(update={"executor": executor, "models": models})


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The config file {path} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The config file {path} is not valid TOML: {error}.") from error


def _parse_pair(pair: str) -> dict[str, Any]:
    """`a.b=c` as nested dicts; c is read as TOML where it is TOML, else as the bare text."""
    key, separator, text = pair.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {pair!r} is not of the form key=value, such as --set filter.min_face_px=128.")
    try:
        value: Any = tomllib.loads(f"value = {text.strip()}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        value = text.strip()
    for name in reversed(key.strip().split(".")):
        value = {name: value}
    return dict(value)


def _merge(base: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, Mapping):
            inner = base.get(name)
            copy = dict(inner) if isinstance(inner, Mapping) else {}
            _merge(copy, value)
            base[name] = copy
        else:
            base[name] = value


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every config key with its explanation, in order."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""


def _leaf(key: str, value: Any) -> str:
    """The full name of what was set: pydantic stops at the first unknown section."""
    while isinstance(value, Mapping) and value:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key


def _explain(error: ValidationError) -> str:
    """The first problem of a validation as one sentence."""
    first = error.errors()[0]
    key = ".".join(str(piece) for piece in first["loc"])
    if first["type"] == "extra_forbidden":
        key = _leaf(key, first["input"])
        known = [name for name, _ in keys()]
        near = get_close_matches(key, known, n=1, cutoff=0.5) or get_close_matches(
            key.rsplit(".", 1)[-1], [name.rsplit(".", 1)[-1] for name in known], n=1
        )
        return f"Unknown config key {key!r}" + (f": did you mean {near[0]!r}?" if near else ".")
    if first["type"] == "value_error":
        return str(first["ctx"]["error"]) + "."
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"Config key {key!r} has the value {first['input']!r}: {message}."
