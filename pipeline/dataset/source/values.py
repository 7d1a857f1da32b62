"""How the values of metadata files become seed columns: sizes, scores and texts in whatever types they came."""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.columns import SEED, SEED_SCHEMA
from schemas.errors import SourceError
from schemas.names import ROW_DIGITS

_NUMBER = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?$"
_INT32_MAX = 2**31 - 1
_ENCODINGS = {
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-32"),
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-16"),
}
"""By byte order mark; that of UTF-32 begins as one of UTF-16 does."""


def to_seeds(raw: pa.Table, part: str = "", first_row: int = 0, path: str = "") -> pa.Table:
    """A table of seed columns from one that has a file's values under their names; absent columns are null.

    Raises:
        SourceError: when a column holds what cannot be what its name says, such as lists or dates.
    """
    rows = pa.array(np.arange(first_row, first_row + raw.num_rows))
    digits = pc.utf8_lpad(rows.cast(pa.string()), ROW_DIGITS, "0")
    columns = {name: pa.nulls(raw.num_rows, SEED_SCHEMA.field(name).type) for name in SEED}
    columns |= {
        "key": pc.binary_join_element_wise(part, digits, "-"),  # `sample_key` of each, ten times as fast
        "part": pa.repeat(pa.scalar(part), raw.num_rows),
        "row": rows,
    }
    captions = []
    for name in raw.column_names:
        values = raw.column(name).combine_chunks()
        try:
            plain = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
            if name.partition(".")[0] == "text":
                captions.append(texts(plain))
            else:
                columns[name] = _CONVERT[name](plain)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise SourceError(
                f"{path} has {values.type} in the column for {name.partition('.')[0]}, which cannot be read as such."
            ) from error
    if len(captions) == 1 and captions[0].type == pa.string():
        columns["text"] = captions[0]
    elif captions:
        several = [distinct(row) for row in zip(*(column.to_pylist() for column in captions), strict=True)]
        columns["text"] = pa.array([row[0] if row else None for row in several], pa.string())
        columns["text_alternatives"] = pa.array([row[1:] or None for row in several], pa.list_(pa.string()))
    if "nsfw" in raw.column_names:
        # Some sets have a yes/no or a probability where LAION has a tag: judged as a score; as a tag it would pass.
        tags = pc.utf8_lower(columns["nsfw"])
        scores = pc.if_else(pc.equal(tags, "true"), "1", pc.if_else(pc.equal(tags, "false"), "0", columns["nsfw"]))
        columns["punsafe"] = pc.coalesce(columns["punsafe"], score(scores))
    length = pc.utf8_length(pc.utf8_trim_whitespace(columns["text"]))
    columns["caption_chars"] = pc.fill_null(length, 0)
    return pa.table([columns[name] for name in SEED], schema=SEED_SCHEMA)


def text(values: pa.Array) -> pa.Array:
    """Values as valid UTF-8 strings: broken bytes become U+FFFD, numbers and booleans their text."""
    options = pc.CastOptions(pa.string(), allow_invalid_utf8=True)
    strings = pc.cast(values, options=options)
    try:
        strings.validate(full=True)
    except pa.ArrowInvalid:
        raw = strings.cast(pa.binary()).to_pylist()
        return pa.array([None if item is None else item.decode("utf-8", "replace") for item in raw], pa.string())
    return strings


def decoded(data: bytes) -> str:
    """The text of a file: UTF-8, unless its byte order mark says otherwise; broken bytes become U+FFFD."""
    encoding = next((encoding for mark, encoding in _ENCODINGS.items() if data.startswith(mark)), "utf-8-sig")
    return data.decode(encoding, "replace")


def as_text(name: str) -> str:
    """A file's name as valid Unicode; bytes that are none become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def texts(values: pa.Array) -> pa.Array:
    """Values as strings, or lists of values as lists of strings."""
    if pa.types.is_null(values.type) or not hasattr(values.type, "value_type"):
        return text(values)
    lists = values.cast(pa.list_(values.type.value_type))
    return pa.ListArray.from_arrays(lists.offsets, text(lists.values), mask=lists.is_null())


def distinct(captions: Iterable[str | Sequence[str | None] | None]) -> list[str]:
    """All captions of a row, each once, none that is blank; the first counts."""
    every = (one for given in captions for one in ([given] if isinstance(given, str) else given or ()))
    return list(dict.fromkeys(one for one in every if one and not one.isspace()))


def size(values: pa.Array) -> pa.Array:
    """Pixels as int32, rounded down: null for what is no number, not finite, under 1 or beyond int32."""
    pixels = pc.floor(_numbers(values))
    known = pc.and_(pc.greater_equal(pixels, 1), pc.less_equal(pixels, _INT32_MAX))
    return pc.if_else(known, pixels, None).cast(pa.int32())


def score(values: pa.Array) -> pa.Array:
    """Probabilities as float32: null for what is no number or not finite."""
    scores = _numbers(values).cast(pa.float32(), safe=False)
    return pc.if_else(pc.is_finite(scores), scores, None)


def _numbers(values: pa.Array) -> pa.Array:
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_null(values.type):
        return values.cast(pa.float64(), safe=False)
    strings = pc.utf8_trim_whitespace(text(values))
    plain = pc.if_else(pc.match_substring_regex(strings, _NUMBER), pc.utf8_ltrim(strings, "+"), None)
    return plain.cast(pa.float64())


_CONVERT: Mapping[str, Callable[[pa.Array], pa.Array]] = {
    "url": lambda values: pc.utf8_trim_whitespace(text(values)),
    "meta_width": size,
    "meta_height": size,
    "nsfw": text,
    "punsafe": score,
    "pwatermark": score,
    "image_ref": text,
    "broken": lambda values: values.cast(pa.bool_()),
    "source_kind": text,
    "source_file": text,
    "text_alternatives": texts,
}
