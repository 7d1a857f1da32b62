"""Parquet files with images in a column: Hugging Face's (`image: struct<bytes, path>`), img2dataset's (`jpg`)."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.source.aliases import Aliases, resolve
from pipeline.dataset.source.formats import BATCH_ROWS, IMAGE_SUFFIXES
from pipeline.shared.files import open_binary, reading
from stages.fetch.stored import of_cell

NAMES = ("image", "img", "picture", "photo", "image_bytes", "bytes", "content", *IMAGE_SUFFIXES)
"""What a column of encoded images is called; one of structs with `bytes`, as HF's, may have any name."""


def image_column(schema: pa.Schema, names: tuple[str, ...] = NAMES) -> pa.Field | None:
    """The column of encoded images; None where there is none."""
    resolved = (resolve(schema.names, {"image": (name,)}) for name in names)
    named = (schema.field(schema.names.index(one["image"])) for one in resolved if one)
    others = () if names != NAMES else (field for field in schema if _bytes_in(field))
    return next((field for field in (*named, *others) if _is_binary(field.type) or _bytes_in(field)), None)


def _bytes_in(field: pa.Field) -> bool:
    return pa.types.is_struct(field.type) and any(one.name == "bytes" and _is_binary(one.type) for one in field.type)


def _is_binary(type: pa.DataType) -> bool:
    return type in (pa.binary(), pa.large_binary())


def tables(path: str, image: pa.Field, aliases: Aliases) -> Iterator[pa.Table]:
    """The rows in order, under our names; no image is read.

    Raises:
        SourceError: for what cannot be read.
    """
    is_struct = pa.types.is_struct(image.type)
    cells = f"{image.name}.bytes" if is_struct else image.name
    paths = is_struct and image.type.get_field_index("path") >= 0
    with reading(path), open_binary(path) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
        others = [name for name in parquet.schema_arrow.names if name != image.name]
        names = resolve(others, aliases)
        row = 0
        columns = [*names.values(), *([f"{image.name}.path"] if paths else [])]
        for batch in parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            index = {seed: batch.schema.get_all_field_indices(name)[0] for seed, name in names.items()}
            table = {seed: batch.column(number) for seed, number in index.items()}
            if paths:
                given = batch.column(batch.schema.get_field_index(image.name)).field("path")
                table["source_file"] = pc.coalesce(given, table["source_file"]) if "source_file" in table else given
            refs = [of_cell(path, cells, number) for number in range(row, row + batch.num_rows)]
            yield pa.table({**table, "image_ref": pa.array(refs, pa.string())})
            row += batch.num_rows
