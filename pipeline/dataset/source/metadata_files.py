"""Metadata files as a stream of tables: parquet, csv and tsv, and JSON lines; the last two may be gzipped.

Parquet files may hold images in a column: Hugging Face's (`image: struct<bytes, path>`), img2dataset's (`jpg`).
"""

import codecs
import csv
import io
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.dataset.source.aliases import ALIASES, Aliases, resolve
from pipeline.dataset.source.prompts import of_infotext
from pipeline.dataset.source.values import decoded, distinct
from pipeline.shared.files import open_binary, reading
from schemas.errors import SourceError
from stages.fetch.stored import of_cell

EXTENSIONS = ".parquet, .csv[.gz], .tsv[.gz], .jsonl[.gz]"
BESIDE = ("json", "txt", "caption")
"""Suffixes of files that tell of the image of the same name; of captions, those of the first count."""
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "jxl"),
    *("jfif", "jpe", "mpo", "apng", "heif", "hif", "jp2"),
)
"""The image of a sample is its first file with one of these suffixes, in this order.

Those that are not decoded here stand among them, so that such a file is a drop and not passed over.
"""
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "image_bytes", "bytes", "content", *IMAGE_SUFFIXES)
"""What a column of encoded images is called; one of structs with `bytes`, as HF's, may have any name."""
_IMAGE = re.compile(rf"^\w+://|\.(?:{'|'.join(IMAGE_SUFFIXES)})$", re.IGNORECASE)
"""A URL, or the name of an image."""
BATCH_ROWS = 32_768
_BUFFER = 4 << 20
_GROUP = 64 << 20
_ABSOLUTE = r"^(?:[A-Za-z]:|file://)?[/\\](?:.*[/\\])?"
"""The folders of an absolute path, which say who made a file of embedded images, and on which machine."""
_WITH_IMAGES = 16 << 10
"""Bytes of a row, from which on it holds more than names."""
_CSV_BLOCK = 8 << 20
_GIVEN_BACK_S = 10.0
"""How long Arrow may take to let go of a file; it reads a block ahead."""
_CSV_HEADER = 1 << 20
PROBED = 100
"""Records that are looked at for their keys."""


class Format(NamedTuple):
    probe: Callable[[str], tuple[pa.Schema, int | None]]
    """Path -> its columns, as far as known in their types, and the number of rows where that is cheap to know."""
    tables: Callable[[str, Aliases], Iterator[pa.Table]]
    """Path -> its rows in order, under our names and in the file's types."""


def format_of(path: str) -> Format | None:
    """The format of a file by its name, or None when it is not a metadata file."""
    match = re.search(r"\.(parquet)$|\.(csv|tsv|jsonl|ndjson)(?:\.gz)?$", path, re.IGNORECASE)
    return _FORMATS[(match[1] or match[2]).lower()] if match else None


def probe(path: str) -> tuple[pa.Schema, int | None]:
    """The columns of a metadata file, strings where types are not known, and its rows where that is cheap to know."""
    format = format_of(path)
    assert format is not None, "parts are metadata files by their names"
    columns, rows = format.probe(path)
    if not columns.names:
        raise SourceError(f"{path} is empty: it has no columns.")
    return columns, rows


def tables(path: str, aliases: Aliases = ALIASES, image: pa.Field | None = None) -> Iterator[pa.Table]:
    """The rows of a metadata file in order, in tables of bounded size, under our names and in the file's types.

    Of a parquet file with an `image` column, `image_ref` says where each image is; none is read.
    """
    format = format_of(path)
    assert format is not None, "parts are metadata files by their names"
    with reading(path):
        yield from read_parquet(path, aliases, image) if image is not None else format.tables(path, aliases)


def probe_parquet(path: str) -> tuple[pa.Schema, int]:
    with reading(path), open_binary(path) as file, pq.ParquetFile(file) as parquet:
        return parquet.schema_arrow, parquet.metadata.num_rows


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """A parquet file whose large column chunks are read through small buffers."""
    with open_binary(path) as file:
        footer = pq.read_metadata(file)
    # Not column by column: pyarrow ends the process when it meets damaged statistics there.
    sizes = [footer.row_group(number).total_byte_size for number in range(footer.num_row_groups)]
    # Small groups are read whole: behind a buffer, a damaged page gets whatever 2 GB it claims to need.
    buffer = _BUFFER if max(sizes, default=0) > _GROUP else 0
    # Columns take turns behind buffers: what a remote file reads ahead in one, 50 MB on S3, is lost at the next.
    cache = {"cache_type": "none"} if buffer else {}
    # pre_buffer, on by default, would fetch whole column chunks in spite of the buffer size.
    options: dict[str, Any] = {"metadata": footer, "pre_buffer": False, "buffer_size": buffer}
    with open_binary(path, **cache) as file, pq.ParquetFile(file, **options) as parquet:
        yield parquet


def read_parquet(path: str, aliases: Aliases = ALIASES, image: pa.Field | None = None) -> Iterator[pa.Table]:
    name, type, row = (image.name, image.type, 0) if image is not None else ("", pa.null(), 0)
    is_struct = pa.types.is_struct(type)
    name_cells = [f"{name}.path"] if is_struct and type.get_field_index("path") >= 0 else []
    with reading(path), _opened(path) as parquet:
        names = resolve([one for one in parquet.schema_arrow.names if image is None or one != name], aliases)
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=[*names.values(), *name_cells]):
            # By number, since a file may hold a name twice.
            index = {seed: batch.schema.get_all_field_indices(name)[0] for seed, name in names.items()}
            table = {seed: batch.column(number) for seed, number in index.items()}
            if name_cells:
                given = batch.column(batch.schema.get_field_index(name)).field("path").cast(pa.string())
                table["source_file"] = pc.coalesce(given, table["source_file"]) if "source_file" in table else given
            if image is not None:
                if "source_file" in table and pa.types.is_string(table["source_file"].type):
                    table["source_file"] = pc.replace_substring_regex(table["source_file"], _ABSOLUTE, "")
                cells = f"{name}.bytes" if is_struct else name
                refs = [of_cell(path, cells, number) for number in range(row, row + batch.num_rows)]
                table["image_ref"] = pa.array(refs, pa.string())
                row += batch.num_rows
            yield pa.table(table)


def _csv_header(path: str) -> tuple[list[str], str, bool]:
    """Names of the columns, what separates them, and whether rows may follow.

    Where a comma is for decimals, programs separate the columns of a CSV by semicolons.
    """
    delimiter = "\t" if re.search(r"\.tsv(\.gz)?$", path, re.IGNORECASE) else ","
    with reading(path), open_binary(path, "infer") as file:
        # Not readline with a limit, which fsspec's remote files do not know.
        line, end, _ = file.read(_CSV_HEADER).partition(b"\n")
        _refuse_utf16(path, line)
        text = line.decode("utf-8-sig", "replace")
        if delimiter not in text:
            delimiter = next((one for one in ";\t" if one in text), delimiter)
        names = next(csv.reader([text], delimiter=delimiter), [])
        return names, delimiter, bool(end) or len(line) == _CSV_HEADER


def _refuse_utf16(path: str, data: bytes) -> None:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SourceError(f"{path} is UTF-16: save it as UTF-8.")


def _is_quoted(path: str) -> bool:
    """Whether quotation marks of a TSV enclose cells: whichever begins with one ends with one, and has pairs inside.

    Else they are marks of captions, and one that is not closed would take the rows after it into its cell.
    """
    with reading(path), _by_lines(path) as file:
        try:
            for _ in csv.reader((line.decode("latin-1") for line in file), delimiter="\t", strict=True):
                pass
        except csv.Error:
            return False
    return True


def read_csv(path: str, aliases: Aliases) -> Iterator[pa.Table]:
    header, delimiter, may_have_rows = _csv_header(path)
    if not may_have_rows:  # pyarrow has no line to skip
        return
    # A CSV is written by programs that know its rules; what tabs separate is often written as it comes.
    is_quoted = delimiter != "\t" or _is_quoted(path)
    ours = {header.index(name): seed for seed, name in resolve(header, aliases).items()}
    names = [ours.get(number, f"unused{number}") for number in range(len(header))]
    options = (
        pa.csv.ReadOptions(column_names=names, skip_rows=1, block_size=_CSV_BLOCK, use_threads=False),
        pa.csv.ParseOptions(delimiter=delimiter, quote_char=is_quoted and '"', newlines_in_values=is_quoted),
        pa.csv.ConvertOptions(
            # All as strings: a type guessed from the first block would fail on a later one.
            column_types=dict.fromkeys(names, pa.string()),
            check_utf8=False,
            strings_can_be_null=False,
        ),
    )
    with open_binary(path, "infer") as file, _given_back(file):
        for batch in pa.csv.open_csv(file, *options):
            table = pa.Table.from_batches([batch])
            if is_quoted:
                _require_closed_quotes(path, table, names, delimiter)
            yield table.select(list(ours.values()))


def _require_closed_quotes(path: str, table: pa.Table, names: Sequence[str], delimiter: str) -> None:
    """A quotation mark that is not closed takes the rows after it into its cell: nobody would see that they are lost.

    Raises:
        SourceError: for a cell in which further lines are rows of the file, each with its image.
    """
    image = next((names.index(seed) for seed in ("url", "source_file") if seed in names), 0)
    for name in names:
        cells = table[name].filter(pc.match_substring(table[name], "\n"))
        for cell in cells.cast(pa.binary()).to_pylist():  # in any encoding
            first, *lines = re.split(r"\r?\n|\r", cell.decode("utf-8", "replace"))
            for line in lines:
                row = next(csv.reader([line[: csv.field_size_limit()]], delimiter=delimiter), [])
                if len(row) == len(names) and _IMAGE.search(row[image]):
                    raise SourceError(
                        f"{path} has a quotation mark that is not closed, at {first[:60]!r}: it would take the rows "
                        'after it. Close it, or write it twice ("") where it is part of the text.'
                    )


@contextmanager
def _given_back(file: Any) -> Iterator[None]:
    """Wait at the end until Arrow has let go of a file: a thread of it that does so at exit aborts the process."""
    held = sys.getrefcount(file)
    try:
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # of a damaged file: those that were reading hold it too
        raise
    finally:
        end = time.monotonic() + _GIVEN_BACK_S
        while sys.getrefcount(file) > held and time.monotonic() < end:
            time.sleep(0.001)


def probe_jsonl(path: str) -> tuple[pa.Schema, None]:
    with reading(path), _by_lines(path) as file:
        records = list(islice(_records(path, file), PROBED))
    if records and not any(records):
        raise SourceError(f"{path} holds no JSON objects, one a line.")
    return _strings(dict.fromkeys(name for record in records for name in record or ())), None


def _strings(names: Iterable[str]) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names])


def read_jsonl(path: str, aliases: Aliases) -> Iterator[pa.Table]:
    with _by_lines(path) as file:
        records = _records(path, file)
        while batch := list(islice(records, BATCH_ROWS)):
            yield from_records(batch, aliases)


@contextmanager
def _by_lines(path: str) -> Iterator[io.BufferedReader]:
    """Splits lines by itself: fsspec's of a remote file copies a whole block, of 50 MB on S3, for each of them."""
    with open_binary(path, "infer") as file, io.BufferedReader(file, _BUFFER) as lines:
        _refuse_utf16(path, lines.peek(2)[:2])
        yield lines


def _records(path: str, file: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    for line in filter(bytes.strip, file):
        record = parse_record(line)
        if record is None and not line.endswith(b"\n"):
            raise SourceError(f"{path} is cut off, or holds no JSON object a line: its last line is no whole one.")
        yield record


def parse_record(data: bytes) -> dict[str, Any] | None:
    """A JSON object; None for what is none."""
    try:
        record = json.loads(decoded(data))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def from_records(records: Sequence[dict[str, Any] | None], aliases: Aliases = ALIASES) -> pa.Table:
    """JSON objects as a table under our names, all values as text: their types may differ from row to row.

    `text` is a list of all captions. `broken` is true where there is no object.
    """
    known: dict[tuple[str, ...], dict[str, str]] = {}
    rows = []
    for record in records:
        if record is None:
            rows.append({"broken": True})
            continue
        keys = tuple(record)
        if keys not in known:
            known[keys] = resolve(keys, aliases)
        names = known[keys]
        row: dict[str, Any] = {seed: _text(record[name]) for seed, name in names.items() if seed in aliases}
        given = (record[name] for seed, name in names.items() if seed.partition(".")[0] == "text")
        row["text"] = distinct(list(map(_text, one)) if isinstance(one, list) else _text(one) for one in given)
        rows.append(row)
    types = {seed: pa.string() for seed in aliases} | {"text": pa.list_(pa.string()), "broken": pa.bool_()}
    return pa.Table.from_pylist(rows, schema=pa.schema(types))


def from_files(
    samples: Sequence[Mapping[str, bytes]], aliases: Aliases, prompt: Callable[[int], bytes] | None = None
) -> pa.Table:
    """What the files with BESIDE's suffixes, beside an image, say of it: a row each, as `from_records`.

    Where they hold no caption, and none is one by its suffix, that is `prompt` of the sample's number: what a .txt
    would hold.
    """
    table = from_records([parse_record(files["json"]) if "json" in files else {} for files in samples], aliases)
    texts = []
    for number, (known, files) in enumerate(zip(table["text"].to_pylist(), samples, strict=True)):
        contents = [files[suffix] for suffix in BESIDE[1:] if suffix in files]
        if prompt is not None and not known and not contents:
            contents = [prompt(number)]
        texts.append(distinct([known, *(of_infotext(decoded(content).strip()) for content in contents)]))
    return table.set_column(table.column_names.index("text"), "text", pa.array(texts, pa.list_(pa.string())))


def _text(value: Any) -> str | None:
    """A scalar as text; null for lists, objects, and NaN, as which Python writes what pandas lacks."""
    if isinstance(value, str):
        # A lone surrogate from a \u escape has no UTF-8 form.
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    return str(value) if isinstance(value, int | float) and value == value else None


_CSV = Format(lambda path: (_strings(_csv_header(path)[0]), None), read_csv)
_JSONL = Format(probe_jsonl, read_jsonl)
_FORMATS = {"parquet": Format(probe_parquet, read_parquet), "csv": _CSV, "tsv": _CSV, "jsonl": _JSONL, "ndjson": _JSONL}


def image_column(schema: pa.Schema, names: tuple[str, ...] = IMAGE_COLUMNS) -> pa.Field | None:
    """The column of encoded images; None where there is none."""
    resolved = (resolve(schema.names, {"image": (name,)}) for name in names)
    named = (schema.field(schema.names.index(one["image"])) for one in resolved if one)
    others = () if names != IMAGE_COLUMNS else (field for field in schema if _bytes_in(field))
    return next((field for field in (*named, *others) if _is_binary(field.type) or _bytes_in(field)), None)


def _bytes_in(field: pa.Field) -> bool:
    return pa.types.is_struct(field.type) and any(one.name == "bytes" and _is_binary(one.type) for one in field.type)


def _is_binary(type: pa.DataType) -> bool:
    return type in (pa.binary(), pa.large_binary())


def holds_images(path: str, image: pa.Field) -> bool:
    """Whether a parquet file with rows has an image in any cell: `datasets` by itself saves their paths alone."""
    if not pa.types.is_struct(image.type):
        return True
    with reading(path), _opened(path) as parquet:
        groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
        if any(one.total_byte_size > _WITH_IMAGES * one.num_rows for one in groups) or not parquet.metadata.num_rows:
            return True
        batches = parquet.iter_batches(batch_size=BATCH_ROWS, columns=[f"{image.name}.bytes"])
        return any(batch.column(0).field("bytes").null_count < batch.num_rows for batch in batches)
