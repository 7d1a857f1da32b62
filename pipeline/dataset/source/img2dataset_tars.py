"""Existing downloads of img2dataset: webdataset tars, with a parquet beside each or the metadata in their members."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.dataset.source.aliases import STORED_ALIASES
from pipeline.dataset.source.formats import from_records, parse_record, probe_parquet, read_parquet
from pipeline.shared.files import kind_of, open_binary, reading
from pipeline.shared.tars import members, read, require_whole
from schemas.errors import SourceError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "jxl")
"""The image of a sample is its first member with one of these suffixes, in this order."""


class Member(NamedTuple):
    """Where a file's bytes lie in its tar."""

    offset: int
    size: int


Samples = dict[str, dict[str, Member]]
"""Key -> suffix -> member; webdataset's split at the first dot of the file's name."""


def is_tar(path: str) -> bool:
    """Whether a file is a tar by its name."""
    return path.lower().endswith(".tar")


def rows_in(path: str) -> int | None:
    """Check that a tar is whole, by its first and last blocks; its number of rows when a parquet stands beside it.

    Raises:
        SourceError: for a truncated or unreadable tar or parquet.
    """
    with reading(path), open_binary(path) as file:
        require_whole(file)
    table = table_path(path)
    return probe_parquet(table)[1] if kind_of(table) else None


def tables(path: str) -> Iterator[pa.Table]:
    """The rows of one tar in the order of their keys, under our names; `image_ref` says where each image lies.

    `image_ref` is `<path>#<offset>:<size>`, or "" for a row whose download failed.

    Raises:
        SourceError: for a truncated or corrupt tar, or a parquet that belongs to another tar.
    """
    samples = scan(path)
    table = table_path(path)
    beside = list(read_parquet(table, STORED_ALIASES)) if kind_of(table) else []
    if beside and "image_key" in beside[0].column_names:
        rows = pa.concat_tables(beside)
        keys = rows.column("image_key").cast(pa.string())
        rows = rows.set_column(rows.column_names.index("image_key"), "image_key", keys)
    else:
        rows = _rows_inside(path, samples)
    rows = rows.sort_by("image_key")
    refs = [_image_ref(path, samples.get(key, {})) for key in rows.column("image_key").to_pylist()]
    if any(_image_ref(path, members) for members in samples.values()) and not any(refs):
        raise SourceError(f"{table} does not describe {path}: no key of it occurs there.")
    yield rows.drop_columns(["image_key"]).append_column("image_ref", pa.array(refs, pa.string()))


def scan(path: str) -> Samples:
    """The members of a tar by key and suffix, from its headers alone.

    Raises:
        SourceError: when the tar cannot be read, or ends without its end mark.
    """
    samples: Samples = defaultdict(dict)
    with reading(path), open_binary(path) as file:
        for info in members(file):
            folder, slash, name = info.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if info.isreg():
                samples[folder + slash + stem][suffix.lower()] = Member(info.offset_data, info.size)
    return dict(samples)


def table_path(path: str) -> str:
    """Where the parquet of a tar stands."""
    return path[: -len(".tar")] + ".parquet"


def _image_ref(path: str, files: dict[str, Member]) -> str:
    for suffix in IMAGE_SUFFIXES:
        if suffix in files:
            return f"{path}#{files[suffix].offset}:{files[suffix].size}"
    return ""


def _rows_inside(path: str, samples: Samples) -> pa.Table:
    """Rows from the members: `json` where there is one, else the caption in `txt`."""
    records: list[dict[str, Any]] = []
    with reading(path), open_binary(path) as file:
        for key, files in samples.items():
            record = {}
            if "json" in files:
                record = parse_record(read(file, *files["json"]), f"{key}.json in {path}")
            elif not _image_ref(path, files):
                continue
            elif "txt" in files:
                record = {"txt": read(file, *files["txt"]).decode("utf-8", "replace")}
            records.append({**record, "key": key})
    return from_records(records, STORED_ALIASES)
