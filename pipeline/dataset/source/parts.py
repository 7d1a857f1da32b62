"""SHARDS words to parts: numbered files under the root, paths, globs, folders and URLs."""

import difflib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import has_magic
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from pipeline.dataset.source import formats
from pipeline.dataset.source import img2dataset_tars as tars
from pipeline.shared.files import full_path, kind_of, locate, reading, unreadable
from schemas.errors import SourceError
from schemas.names import SAMPLE, part_name, part_number, split_spec
from schemas.section import Section

_KINDS = f"{formats.EXTENSIONS} or an img2dataset .tar"
_PROBES_AT_A_TIME = 8
_MOST_LISTED = 6


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

    @property
    def origin(self) -> str:
        """The folder that it lies in: the last name of a local one; of a URL, no user, password or signature."""
        if self.name == SAMPLE:
            return SAMPLE
        url = urlsplit(self.path.rpartition("::")[2])
        folder = PurePosixPath(url.path).parent
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{folder}" if url.scheme else folder.name

    @staticmethod
    def probed(name: str, path: str) -> "Part":
        """The part of a file, which is opened to see that it can be read."""
        if tars.is_tar(path):
            return Part(name, path, tars.rows_in(path), "tar")
        return Part(name, path, formats.rows_in(path), "metadata")


def find_parts(spec: str, settings: SourceSettings) -> list[Part]:
    """The parts that SHARDS names, in its order; each is opened once to see that it can be read.

    Raises:
        SourceError: for what does not exist, cannot be read, has no URLs, or would give two parts one name.
    """
    root = os.path.expanduser(settings.root or os.environ.get("LAION_ROOT", ""))
    numbered: list[str] = []
    path_of: dict[str, str] = {}
    name_of: dict[str, str] = {}
    for word in split_spec(spec):
        number = part_number(word)
        if number is None:
            named = [(part_name(path), path) for path in _files_of(word)]
        else:
            numbered = numbered or _files_under_root(word, root)
            if number >= len(numbered):
                first, last = (path.rsplit("/", 1)[-1] for path in (numbered[0], numbered[-1]))
                files = (
                    f"{len(numbered)} metadata files, {first} to {last}" if numbered[1:] else f"1 metadata file, {last}"
                )
                raise SourceError(
                    f"{word} does not exist: the root {root} holds {files}, so the last part is "
                    f"laion-part-{len(numbered) - 1}."
                )
            named = [(f"laion-part-{number}", numbered[number])]
        for name, path in named:
            if path in name_of:
                raise SourceError(f"SHARDS names {path} twice, as {name_of[path]!r} and as {name!r}: leave one out.")
            if name in path_of:
                raise SourceError(
                    f"Two parts would be called {name!r}: {path_of[name]} and {path}; rename one, or run them apart."
                )
            path_of[name], name_of[path] = path, name
    with ThreadPoolExecutor(_PROBES_AT_A_TIME) as pool:
        return list(pool.map(Part.probed, path_of, path_of.values()))


def _files_under_root(word: str, root: str) -> list[str]:
    """The files that `laion-part-N` numbers: tars only where there is nothing else."""
    if not root:
        raise SourceError(
            f"{word} needs a metadata root: set source.root or LAION_ROOT to a folder or URL of metadata."
        )
    files = files_under(root)
    if not files:
        raise SourceError(f"{word} does not exist: the root {root} holds no metadata ({_KINDS}); {_listing(root)}.")
    return [path for path in files if not tars.is_tar(path)] or files


def _files_of(word: str) -> list[str]:
    """The files that a path, folder, glob or URL stands for; at least one."""
    path = os.path.expanduser(word)
    fs, inside = locate(path)
    kind = kind_of(path)
    if kind == "file":
        whole = full_path(fs, inside, word=path)
        files, complaint = data_files([whole]), f"{whole} is no metadata file: the names of those end in {_KINDS}."
    elif kind == "directory":
        files = files_under(path)
        complaint = "" if files else f"{word} holds no metadata ({_KINDS}); {_listing(path)}."
    elif has_magic(inside):
        with reading(path):
            matched = sorted(full_path(fs, str(name)) for name in fs.glob(inside))
        files = data_files(matched)
        matches = f"only files such as {matched[0]}" if matched else "no file"
        complaint = f"{word} matches {matches}: metadata is {_KINDS}."
    else:
        files, complaint = [], f"{word} is neither a part nor an existing file or folder: {_hint(word, fs, inside)}"
    if not files:
        raise SourceError(complaint)
    return files


def files_under(folder: str) -> list[str]:
    """The metadata files and tars anywhere under a folder, in name order; none that are hidden."""
    fs, inside = locate(folder)
    with reading(folder):
        paths = [str(path) for path in fs.find(inside)]
    depth = len(inside.rstrip("/"))
    shown = [path for path in paths if not any(name[:1] in "._" for name in path[depth:].strip("/").split("/"))]
    return data_files(sorted(full_path(fs, path) for path in shown))


def data_files(paths: list[str]) -> list[str]:
    """The files among some that are parts; a parquet beside a tar of the same name describes that tar and is none."""
    beside = {tars.table_path(path) for path in paths if tars.is_tar(path)}
    return [path for path in paths if tars.is_tar(path) or (formats.format_of(path) and path not in beside)]


def _listing(folder: str) -> str:
    """What stands directly in a folder, for an error message: its first names, or why there are none."""
    if kind_of(folder) is None:
        return "it does not exist"
    fs, inside = locate(folder)
    names = sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(inside, detail=False))
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return f"found there: {', '.join(names[:_MOST_LISTED])}{more}" if names else "it is empty"


def _hint(word: str, fs: Any, inside: str) -> str:
    """What a word that is nothing may have been meant to be: a file beside, or a part."""
    folder, slash, name = inside.rstrip("/").rpartition("/")
    try:
        siblings = [str(path).rstrip("/").rpartition("/")[2] for path in fs.ls(folder + slash, detail=False)]
    except unreadable():  # the folder is missing too
        siblings = []
    paths = [folder + slash + sibling for sibling in difflib.get_close_matches(name, siblings, n=2)]
    near = [word[: -len(inside)] + path if word.endswith(inside) else path for path in paths]
    numbers = re.findall(r"[0-9]+", word)
    near += difflib.get_close_matches(word, [SAMPLE, f"laion-part-{numbers[0] if numbers else 0}"], n=1)
    return f"did you mean {' or '.join(near)}?" if near else "give sample, laion-part-0..99, or a path, glob or URL."
