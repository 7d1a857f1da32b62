"""Webdataset tars of any origin: with a parquet beside each, as img2dataset writes it, or metadata in their members."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import pyarrow as pa
from PIL.ContainerIO import ContainerIO

from pipeline.dataset.source.aliases import STORED_ALIASES, Aliases
from pipeline.dataset.source.metadata_files import (
    BESIDE,
    IMAGE_SUFFIXES,
    PROBED,
    from_files,
    parse_record,
    probe_parquet,
    read_parquet,
)
from pipeline.dataset.source.prompts import in_image
from pipeline.dataset.source.values import as_text
from pipeline.shared.files import is_local, kind_of, open_binary, reading
from pipeline.shared.tars import members, read, require_whole
from schemas.errors import SourceError

_PROBE = 1 << 18
"""Bytes of a request where the ends of a tar are looked at."""


class Member(NamedTuple):
    """Where a file's bytes lie in its tar."""

    name: str
    offset: int
    size: int


Samples = dict[str, dict[str, Member]]
"""Key -> suffix -> member; webdataset's split at the first dot of the file's name."""
Texts = dict[str, dict[str, bytes]]
"""Key -> suffix -> content."""


def is_tar(path: str) -> bool:
    return path.lower().endswith(".tar")


def rows_in(path: str) -> int | None:
    """Check that a tar is whole, by its ends, and holds images; its number of rows when a parquet stands beside it."""
    table = table_path(path)
    with reading(path), open_binary(path, block_size=_PROBE) as file:
        require_whole(file)
        file.seek(0)
        names = (info.name for info in members(file) if info.isreg())
        others: list[str] = []
        for name in names:
            if suffix_of(name) in IMAGE_SUFFIXES:
                break
            others.append(name)
        else:
            if others:
                raise SourceError(f"{path} holds no image that is one of a sample: {_why(others)}.")
    return probe_parquet(table)[1] if kind_of(table) else None


def keys(path: str) -> list[str]:
    """The columns of the parquet beside a tar, or what its first records have."""
    if kind_of(table_path(path)):
        return list(probe_parquet(table_path(path))[0].names)
    with reading(path), open_binary(path) as file:
        first = islice((info for info in members(file) if info.isreg()), 10 * PROBED)
        files = [info for info in first if suffix_of(info.name) == "json"][:PROBED]
        records = [parse_record(read(file, info.offset_data, info.size)) or {} for info in files]
    return list(dict.fromkeys(key for record in records for key in record))


def _why(names: list[str]) -> str:
    dotted = next((name for name in names if name.lower().rpartition(".")[2] in IMAGE_SUFFIXES), "")
    if dotted.endswith((".face.jpg", ".full.jpg")):
        return f"{dotted} is a finished dataset's: give what that was made of"
    if dotted:
        return f"in {dotted}, the suffix is all behind the first dot of the name; rename the files"
    return f"there are {', '.join(names[:3])}{', …' if names[3:] else ''}"


def tables(path: str, aliases: Aliases = STORED_ALIASES) -> Iterator[pa.Table]:
    """The rows of one tar in the order of their keys, under our names; `image_ref` says where each image lies.

    `image_ref` is `<path>#<offset>:<size>`, or "" for a row whose download failed.
    """
    table = table_path(path)
    beside = list(read_parquet(table, aliases)) if kind_of(table) else []
    is_described = bool(beside) and "image_key" in beside[0].column_names
    samples, texts = scan(path, with_texts=not is_described)
    if is_described:
        rows = pa.concat_tables(beside)
        with reading(table):
            keys = rows.column("image_key").cast(pa.string())
    else:  # of samples with an image (under a dotted suffix too, which is not read), or a json
        suffixes = {"json", *IMAGE_SUFFIXES}
        named = [key for key, files in samples.items() if any(one.rpartition(".")[2] in suffixes for one in files)]
        keys = pa.array(named, pa.string())

        def prompt(number: int) -> bytes:
            image = _image(samples[named[number]])
            if image is None:
                return b""
            with reading(path), open_binary(path) as file:
                return in_image(ContainerIO(file, image.offset, image.size))

        # Of a remote tar it would fetch most.
        rows = from_files([texts.get(key, {}) for key in named], aliases, prompt if is_local(path) else None)
    rows = rows.set_column(rows.column_names.index("image_key"), "image_key", keys).sort_by("image_key")
    images = [_image(samples.get(key, {})) for key in rows.column("image_key").to_pylist()]
    if any(map(_image, samples.values())) and not any(images):
        raise SourceError(f"{table} does not describe {path}: no key of it occurs there.")
    rows = rows.drop_columns([name for name in ("image_key", "source_file") if name in rows.column_names])
    refs = [f"{path}#{image.offset}:{image.size}" if image else "" for image in images]
    names = [image.name.removeprefix("./") if image else None for image in images]
    rows = rows.append_column("source_file", pa.array(names, pa.string()))
    yield rows.append_column("image_ref", pa.array(refs, pa.string()))


def scan(path: str, *, with_texts: bool = False) -> tuple[Samples, Texts]:
    """The members of a tar by key and suffix, from its headers alone, and what BESIDE's files hold where wanted."""
    samples: Samples = defaultdict(dict)
    texts: Texts = defaultdict(dict)
    with reading(path), open_binary(path) as file:
        for info in members(file):
            if info.isreg():
                name = as_text(info.name)
                folder, slash, last = name.rpartition("/")
                if last.startswith("."):  # macOS puts `._a.jpg` beside `a.jpg`; webdataset passes over them too
                    continue
                key = folder + slash + last.partition(".")[0]
                suffix = suffix_of(name)
                samples[key][suffix] = Member(name, info.offset_data, info.size)
                if with_texts and suffix in BESIDE:  # at once: behind a URL a second pass fetches all of the tar again
                    texts[key][suffix] = read(file, info.offset_data, info.size)
    return dict(samples), dict(texts)


def suffix_of(name: str) -> str:
    """What is behind the first dot of a file's name, as webdataset splits it."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def table_path(path: str) -> str:
    return path[: -len(".tar")] + ".parquet"


def _image(files: dict[str, Member]) -> Member | None:
    return next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
