"""SHARDS words to parts: numbered files under the root, paths, globs, folders and URLs."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
from pydantic import Field

from pipeline.dataset.source import metadata_files
from pipeline.dataset.source import webdataset_tars as tars
from pipeline.dataset.source.aliases import (
    ALIASES,
    FILE_ALIASES,
    STORED_ALIASES,
    ColumnKey,
    mapped,
    require,
    require_url,
    resolve,
)
from pipeline.dataset.source.pictures import Pictures, is_image
from pipeline.dataset.source.values import to_seeds
from pipeline.shared.files import full_path, is_local, kind_of, locate, reading
from schemas.errors import SourceError
from schemas.names import SAMPLE, part_name, part_number, split_kind, split_spec
from schemas.section import Section
from schemas.shard import DATASET
from schemas.unreadable import unreadable

_KINDS = f"{metadata_files.EXTENSIONS} or .tar"
_PROBES_AT_A_TIME = 8
_MOST_LISTED = 6


class SourceSettings(Section):
    """Where rows come from."""

    root: str = ""
    """Folder or URL under which `laion-part-N` is the N-th metadata file in name order; LAION_ROOT when empty."""
    rows_per_shard: int = Field(1000, ge=1)
    """Candidate rows (those that pass the metadata filter) per shard."""
    kind: Literal["web", "made"] = "web"
    """Whether images are from the web (or of one's own), or were made by a model; `made:` before a word of SHARDS says
    it of that word."""
    columns: dict[ColumnKey, str] = Field(default_factory=dict)
    """Which column is what, where the usual names do not tell, such as {text = "my_caption"}."""


@dataclass(frozen=True)
class Part:
    """One metadata file, one file of images, or one folder of them."""

    name: str
    path: str
    """Absolute path or fsspec URL."""
    rows: int | None
    """Rows in it, where that is cheap to know."""
    kind: Literal["metadata", "tar", "embedded", "pictures"]
    source_kind: str = "web"
    columns: Mapping[ColumnKey, str] = field(default_factory=dict, compare=False)
    """As `source.columns` has them."""
    pictures: Pictures | None = field(default=None, compare=False)
    """Of a folder of images, its listing."""
    image: pa.Field | None = field(default=None, compare=False)
    """Of a parquet file with images, their column."""
    is_beside_images: bool = field(default=False, compare=False)
    """Whether there are image files in the folder that was given."""

    @property
    def origin(self) -> str:
        """The folder of its files, `made:` before it: the last name of a local one; of a URL, no user or signature."""
        if self.name == SAMPLE:
            return SAMPLE
        url = urlsplit(self.path.rpartition("::")[2])
        folder = PurePosixPath(url.path) if self.pictures else PurePosixPath(url.path).parent
        text = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{folder}" if url.scheme else folder.name
        return f"made:{text}" if self.source_kind == "made" else text

    def probed(self) -> "Part":
        """The same, once it is opened to see that it can be read."""
        if self.pictures is not None:
            _ = self.pictures.named
            if self.columns:
                require(self.path, self.pictures.keys(), self.columns)
            return replace(self, rows=len(self.pictures.images))
        if self.kind == "tar":
            return replace(self, rows=tars.rows_in(self.path))
        columns, rows = metadata_files.probe(self.path)
        require(self.path, columns.names, self.columns)
        usual = (self.columns["image"],) if "image" in self.columns else metadata_files.IMAGE_COLUMNS
        image = metadata_files.image_column(columns, usual)
        if image is not None and not metadata_files.holds_images(self.path, image):
            if "url" not in resolve(columns.names, mapped(ALIASES, self.columns)):
                raise SourceError(
                    f"{self.path} holds no images, but their paths in the column {image.name}: give the folder in "
                    "which they lie, or save it with them in it, which `datasets` does after "
                    '`.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)`.'
                )
            image = None
        aliases = mapped(FILE_ALIASES if image else ALIASES, self.columns)
        if image is None:
            require_url(self.path, columns.names, aliases, is_beside_images=self.is_beside_images)
        names = [name for name in columns.names if image is None or name != image.name]
        first = {seed: columns.get_all_field_indices(name)[0] for seed, name in resolve(names, aliases).items()}
        # Types that cannot be read show without a row.
        to_seeds(pa.table({seed: pa.array([], columns.field(i).type) for seed, i in first.items()}), path=self.path)
        return replace(self, rows=rows, kind="embedded" if image else "metadata", image=image)

    def tables(self) -> Iterator[pa.Table]:
        """The rows in order, in tables of bounded size, under our names and in the file's types."""
        if self.pictures is not None:
            return self.pictures.tables()
        if self.kind == "tar":
            return tars.tables(self.path, mapped(STORED_ALIASES, self.columns))
        aliases = mapped(ALIASES if self.image is None else FILE_ALIASES, self.columns)
        return metadata_files.tables(self.path, aliases, self.image)


def find_parts(spec: str, settings: SourceSettings) -> list[Part]:
    """The parts that SHARDS names, in its order; each is opened once to see that it can be read.

    Raises:
        SourceError: for what does not exist, cannot be read, has no URLs, or would give two parts one name.
    """
    root = os.path.expanduser(settings.root or os.environ.get("LAION_ROOT", ""))
    numbered: list[str] = []
    by_path: dict[str, Part] = {}
    by_name: dict[str, Part] = {}
    for whole_word in split_spec(spec):
        kind, word = split_kind(whole_word)
        number = part_number(word)
        if number is None:
            named = _parts_of(word, settings)
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
            named = [_part(numbered[number], settings, f"laion-part-{number}")]
        for part in named:
            name, path = part.name, part.path
            if path in by_path:
                names = " and as ".join(dict.fromkeys((repr(by_path[path].name), repr(name))))
                raise SourceError(f"SHARDS names {path} twice, as {names}: leave one out.")
            if name in by_name:
                raise SourceError(
                    f"Two parts would be called {name!r}: {by_name[name].path} and {path}; rename one, or run them "
                    "apart."
                )
            by_path[path] = by_name[name] = replace(part, source_kind=kind[:-1] or settings.kind)
    with ThreadPoolExecutor(_PROBES_AT_A_TIME) as pool:
        parts = list(pool.map(Part.probed, by_path.values()))
    first_tar = next((part.path for part in parts if part.kind == "tar"), "")
    if settings.columns and first_tar:  # of others it would take long
        require(first_tar, tars.keys(first_tar), settings.columns)
    return parts


def _part(path: str, settings: SourceSettings, name: str = "") -> Part:
    return Part(
        name or part_name(path), path, None, "tar" if tars.is_tar(path) else "metadata", columns=settings.columns
    )


def _files_under_root(word: str, root: str) -> list[str]:
    """The files that `laion-part-N` numbers, in name order: tars only where there is nothing else."""
    if not root:
        raise SourceError(
            f"{word} needs a metadata root: set source.root or LAION_ROOT to a folder or URL of metadata."
        )
    files = _rows_among(listing(root), full_path(*locate(root)))
    if not files:
        raise SourceError(f"{word} does not exist: the root {root} holds no metadata ({_KINDS}); {_listing(root)}.")
    return [path for path in files if not tars.is_tar(path)] or files


def _parts_of(word: str, settings: SourceSettings) -> list[Part]:
    """The parts that a path, folder, glob or URL stands for, not yet opened; at least one."""
    path = os.path.expanduser(word)
    fs, inside = locate(path)
    kind = kind_of(path)
    if kind == "file":
        whole = full_path(fs, inside, word=path)
        files, hint = data_files([whole]), _hint_for([whole])
        complaint = f"{whole} is no metadata file: the names of those end in {_KINDS}.{hint}"
    elif kind == "directory":
        return _parts_in(path, settings)
    elif has_magic(inside):
        with reading(path):
            matched = sorted(full_path(fs, str(name)) for name in fs.glob(inside))
        files = data_files(matched)
        matches = f"only files such as {matched[0]}" if matched else "no file"
        complaint = f"{word} matches {matches}: metadata is {_KINDS}.{_hint_for(matched)}"
    else:
        files, complaint = [], f"{word} is neither a part nor an existing file or folder: {_hint(word, fs, inside)}"
    if not files:
        raise SourceError(complaint)
    return [_part(file, settings) for file in files]


def _parts_in(word: str, settings: SourceSettings) -> list[Part]:
    """The parts in a folder: its files of rows, or the folder as a whole where they name images there, or are none."""
    listed, folder = listing(word), full_path(*locate(word)).rstrip("/")
    if f"{folder}/{DATASET}" in listed and any(path.startswith(f"{folder}/shards/") for path in listed):
        raise SourceError(f"{word} is a finished dataset: give what it was made of.")
    # An OUT, or a training run, among the images that it was made of is none of them.
    for mark, beside in ((DATASET, "shards/"), ("run.json", "metrics.jsonl")):
        for made in [path.removesuffix(mark) for path in listed if path.endswith(f"/{mark}")]:
            if any(path.startswith(made + beside) for path in listed):
                listed = [path for path in listed if not path.startswith(made)]
    files = _rows_among(listed, folder)
    pictures = Pictures.listed(folder, listed, mapped(FILE_ALIASES, settings.columns))
    if pictures.images:
        naming = {f"{folder}/{file}" for file in pictures.metadata}
        if naming or not files:
            whole = Part(part_name(folder), folder, None, "pictures", columns=settings.columns, pictures=pictures)
            return [whole, *(_part(file, settings) for file in files if file not in naming)]
    if not files:
        links = " (links that lead out of it are not read: give the folder that they lead to)"
        hint = _hint_for([path for path in listed if not is_image(path)])
        there = f"{_listing(word)}{links if pictures.left_out else ''}.{hint}"
        raise SourceError(f"{word} holds no images and no metadata ({_KINDS}); {there}")
    return [replace(_part(file, settings), is_beside_images=bool(pictures.images)) for file in files]


def _hint_for(paths: list[str]) -> str:
    """What to do with files that are no metadata."""
    names = [path.lower() for path in paths]
    if any(map(is_image, names)):
        return " Of images, give the folder."
    if any(name.endswith((".zip", ".gz", ".tgz", ".zst", ".xz", ".7z", ".rar")) for name in names):
        return " Unpack archives first."
    is_text = any(name.endswith(".txt") for name in names)
    return " Of a list of URLs, make a .csv whose first line is `url`." if is_text else ""


def _rows_among(paths: list[str], folder: str) -> list[str]:
    """The metadata files and tars of those below a folder; none in a `_folder`, or whose name begins so.

    Of images, `_MG_0001.jpg` is what cameras write. Pipes and devices are none: who opens one waits for ever.
    """
    files = data_files([path for path in paths if "/_" not in path[len(folder.rstrip("/")) :]])
    if not is_local(folder):
        return files
    return [path for path in files if os.path.isfile(path) or not os.path.exists(path)]  # what is gone is no pipe


def listing(folder: str) -> list[str]:
    """The full paths of all files under a folder, in name order; none that are hidden."""
    fs, inside = locate(folder)
    with reading(folder):
        # fsspec passes over local folders that may not be looked into, unless this raises.
        paths = [str(path) for path in fs.find(inside, **({"on_error": _no_access} if is_local(folder) else {}))]
    depth = len(inside.rstrip("/"))
    return sorted(full_path(fs, path) for path in paths if "/." not in f"/{path[depth:].lstrip('/')}")


def _no_access(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def data_files(paths: list[str]) -> list[str]:
    """The files among some that are parts; a parquet beside a tar of the same name describes that tar and is none."""
    beside = {tars.table_path(path) for path in paths if tars.is_tar(path)}
    return [path for path in paths if tars.is_tar(path) or (metadata_files.format_of(path) and path not in beside)]


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
    numbers = "..".join(re.findall("[0-9]+", word)[:2]) or "0"
    near += difflib.get_close_matches(word, [SAMPLE, f"laion-part-{numbers}"], n=1)
    return (
        f"did you mean {' or '.join(near)}?"
        if near
        else r"give sample, laion-part-0..99, or a path, glob or URL; a comma in one is written \,."
    )
