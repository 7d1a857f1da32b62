"""SHARDS words to parts: numbered files under the root, paths, globs, folders and URLs."""

import difflib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import has_magic
from typing import Any, Literal

from pydantic import Field

from pipeline.dataset.source import formats
from pipeline.dataset.source import img2dataset_tars as tars
from pipeline.shared.files import full_path, kind_of, locate, reading, unreadable
from schemas.errors import SourceError
from schemas.names import SAMPLE, part_name, part_number, split_spec
from schemas.section import Section

_KINDS = f"{formats.EXTENSIONS} or an img2dataset .tar"
_PROBES_AT_A_TIME = 8


class SourceSettings(Section):
    """Where rows come from."""

    root: str = ""
    """Folder or URL under which `laion-part-N` is the N-th metadata file in name order; LAION_ROOT when empty."""
    rows_per_shard: int = Field(1000, ge=1)
    """Candidate rows (those that pass the metadata filter) per shard."""


@dataclass(frozen=True)
class Part:
    """One metadata file, or one tar of an existing download."""

    name: str
    path: str
    """Absolute path or fsspec URL."""
    rows: int | None
    """Rows in it, where that is cheap to know."""
    kind: Literal["metadata", "tar"]


def find_parts(spec: str, settings: SourceSettings) -> list[Part]:
    """The parts that SHARDS names, in its order; each is opened once to see that it can be read.

    Raises:
        SourceError: for what does not exist, cannot be read, has no URLs, or would give two parts one name.
    """
    words = split_spec(spec)
    numbers = [word for word in words if part_number(word) is not None]
    numbered = _root_files(settings, numbers[0]) if numbers else []
    named = [pair for word in words for pair in _resolve(word, numbered, settings)]
    _require_distinct(named)
    with ThreadPoolExecutor(_PROBES_AT_A_TIME) as pool:
        return list(pool.map(lambda pair: _probe(*pair), named))


def _probe(name: str, path: str) -> Part:
    if tars.is_tar(path):
        return Part(name, path, tars.rows_in(path), "tar")
    return Part(name, path, formats.rows_in(path), "metadata")


def _require_distinct(named: list[tuple[str, str]]) -> None:
    by_name: dict[str, str] = {}
    by_path: dict[str, str] = {}
    for name, path in named:
        if path in by_path:
            raise SourceError(f"SHARDS names {path} twice, as {by_path[path]!r} and as {name!r}: leave one out.")
        if name in by_name:
            raise SourceError(
                f"Two parts would be called {name!r}: {by_name[name]} and {path}; rename one, or run them apart."
            )
        by_name[name] = path
        by_path[path] = name


def _root_files(settings: SourceSettings, word: str) -> list[str]:
    root = _root(settings)
    if not root:
        raise SourceError(
            f"{word} needs a metadata root: set source.root or LAION_ROOT to a folder or URL of metadata."
        )
    found = files_under(root)
    return [path for path in found if not tars.is_tar(path)] or found


def _root(settings: SourceSettings) -> str:
    return os.path.expanduser(settings.root or os.environ.get("LAION_ROOT", ""))


def _resolve(word: str, numbered: list[str], settings: SourceSettings) -> list[tuple[str, str]]:
    """Name and path of each part that one word stands for."""
    number = part_number(word)
    if number is None:
        return [(part_name(path), path) for path in _resolve_path(word)]
    if number >= len(numbered):
        raise SourceError(_missing_part(word, numbered, _root(settings)))
    return [(f"laion-part-{number}", numbered[number])]


def _missing_part(word: str, numbered: list[str], root: str) -> str:
    if not numbered:
        return f"{word} does not exist: the root {root} holds no metadata ({_KINDS}); {_listing(root)}."
    first, last = (path.rsplit("/", 1)[-1] for path in (numbered[0], numbered[-1]))
    held = f"{len(numbered)} metadata files, {first} to {last}" if len(numbered) > 1 else f"1 metadata file, {first}"
    return f"{word} does not exist: the root {root} holds {held}, so the last part is laion-part-{len(numbered) - 1}."


def _listing(folder: str, limit: int = 6) -> str:
    """What stands directly in a folder, for an error message: its first names, or why there are none."""
    if kind_of(folder) is None:
        return "it does not exist"
    fs, inside = locate(folder)
    names = sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(inside, detail=False))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"found there: {', '.join(names[:limit])}{more}" if names else "it is empty"


def _resolve_path(word: str) -> list[str]:
    path = os.path.expanduser(word)
    fs, inside = locate(path)
    kind = kind_of(path)
    if kind == "file":
        return [_require_readable(full_path(fs, inside, word=path))]
    if kind == "directory":
        return files_under(path) or _none(f"{word} holds no metadata ({_KINDS}); {_listing(path)}.")
    if has_magic(inside):
        with reading(path):
            matched = sorted(full_path(fs, str(name)) for name in fs.glob(inside))
        found = f"only files such as {matched[0]}" if matched else "no file"
        return data_files(matched) or _none(f"{word} matches {found}: metadata is {_KINDS}.")
    return _none(_unknown(word, fs, inside))


def _none(message: str) -> list[str]:
    raise SourceError(message)


def _require_readable(path: str) -> str:
    if not data_files([path]):
        raise SourceError(f"{path} is no metadata file: the names of those end in {_KINDS}.")
    return path


def files_under(folder: str) -> list[str]:
    """The metadata files and tars anywhere under a folder, in name order; none that are hidden."""
    fs, inside = locate(folder)
    with reading(folder):
        found = [str(path) for path in fs.find(inside)]
    depth = len(inside.rstrip("/"))
    shown = [path for path in found if not any(name[:1] in "._" for name in path[depth:].strip("/").split("/"))]
    return data_files(sorted(full_path(fs, path) for path in shown))


def data_files(paths: list[str]) -> list[str]:
    """The files among some that are parts; a parquet beside a tar of the same name describes that tar and is none."""
    beside = {tars.table_path(path) for path in paths if tars.is_tar(path)}
    return [path for path in paths if tars.is_tar(path) or (formats.format_of(path) and path not in beside)]


def _unknown(word: str, fs: Any, inside: str) -> str:
    near = [word[: -len(inside)] + name if word.endswith(inside) else name for name in _near_paths(fs, inside)]
    numbers = re.findall(r"[0-9]+", word)
    near += difflib.get_close_matches(word, [SAMPLE, f"laion-part-{numbers[0] if numbers else 0}"], n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else "give sample, laion-part-0..99, or a path, glob or URL."
    return f"{word} is neither a part nor an existing file or folder: {hint}"


def _near_paths(fs: Any, inside: str) -> list[str]:
    folder, slash, name = inside.rstrip("/").rpartition("/")
    try:
        siblings = [str(path).rstrip("/").rpartition("/")[2] for path in fs.ls(folder + slash, detail=False)]
    except unreadable():
        # The folder is missing too, so there is nothing to suggest.
        return []
    return [folder + slash + near for near in difflib.get_close_matches(name, siblings, n=2)]
