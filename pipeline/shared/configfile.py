"""TOML files and `--set a.b=c` pairs as one mapping, and what pydantic says of it as one sentence."""

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel, ValidationError

from schemas.errors import ConfigError

_MEANINGS_AT = 44
"""Column."""


def read_values(path: Path | None, pairs: Sequence[str]) -> dict[str, Any]:
    """The values of a TOML file and of `--set` pairs, as nested dicts; pairs win, later ones over earlier ones.

    Raises:
        ConfigError: for an unreadable file, or a pair that is none.
    """
    values: dict[str, Any] = {}
    try:
        if path:
            # "sig": Windows' editor puts a byte order mark before the text.
            values = tomllib.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"The config file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The config file {path} is no text in UTF-8: save it as such.") from error
    except (ValueError, RecursionError) as error:  # also what Python says of endless numbers and nesting
        raise ConfigError(f"The config file {path} is not valid TOML: {error}.") from error
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {pair!r} is not of the form key=value, such as --set filter.min_face_px=128.")
        try:
            value: Any = tomllib.loads(f"value = {text.strip()}")["value"]
        except (ValueError, KeyError, RecursionError):  # no TOML: the bare text
            value = text.strip()
        for name in reversed(key.strip().split(".")):
            value = {name: value}
        merge(values, value)
    return values


def merge(base: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Put `more` over `base`, section by section; None is not given."""
    for name, value in more.items():
        if isinstance(value, Mapping):
            inner = base.get(name)
            copy = dict(inner) if isinstance(inner, Mapping) else {}
            merge(copy, value)
            base[name] = copy
        elif value is not None:
            base[name] = value


def leaves(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config as one level: {"optim.lr": 1e-4, …}."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every config key with its explanation, in order."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""


def print_keys(defaults: BaseModel) -> None:
    """Print every config key with its default and meaning, a line each, as TOML in which all of it is a comment."""
    typer.echo("# A file for --config: take the # off what you change.")
    for name, meaning in keys(type(defaults)):
        value = reduce(getattr, name.split("."), defaults)
        typer.echo(f"{f'# {name} = {json.dumps(value)}':<{_MEANINGS_AT}} # {' '.join(meaning.split())}")


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a validation of `model` as one sentence."""
    first = error.errors()[0]
    key = ".".join(str(piece) for piece in first["loc"])
    if first["type"] == "extra_forbidden":
        value = first["input"]
        while isinstance(value, Mapping) and value:  # pydantic stops at the first unknown section
            name, value = next(iter(value.items()))
            key = f"{key}.{name}"
        known = {name: name.rpartition(".")[2] for name, _ in keys(model)}
        section, _, last = key.rpartition(".")
        # By the whole name only where that is near: of a long section, any key would do.
        near = get_close_matches(key.lower(), known, n=1, cutoff=0.8)
        near = near or [
            name
            for one in get_close_matches(last.lower(), known.values(), n=1, cutoff=0.75)
            for name in known
            if known[name] == one
        ]
        if near:
            return f"Unknown config key {key!r}: did you mean {near[0]!r}?"
        beside = [known[name] for name in known if section and name.rpartition(".")[0] == section]
        return f"Unknown config key {key!r}: " + (
            f"{section} has {', '.join(beside)}." if beside else "`config` lists those that there are."
        )
    if key.endswith(".[key]"):  # of a table of keys, such as source.columns
        key, allowed = key.removesuffix(".[key]"), re.findall(r"'(\w+)'", first["ctx"]["expected"])
        near = get_close_matches(str(first["input"]), allowed, n=1, cutoff=0.4)
        hint = f"did you mean {key.rpartition('.')[0]}.{near[0]}?" if near else f"known are {', '.join(allowed)}."
        return f"Unknown config key {key!r}: {hint}"
    if first["type"] == "model_type":
        inside = next(name for name, _ in keys(model) if name.startswith(f"{key}."))
        return f"{key!r} is a section and takes no value: give one of its keys, such as {inside}."
    if first["type"] == "value_error":
        return str(first["ctx"]["error"]) + "."
    of_python = {"tuple_type": 'give a list, such as ["a", "b"]', "dict_type": f"give its keys, such as {key}.NAME=…"}
    text = first["msg"].removeprefix("Assertion failed, ")
    message = of_python.get(first["type"], text[0].lower() + text[1:])
    return f"Config key {key!r} has the value {first['input']!r}: {message}."
