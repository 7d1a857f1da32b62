"""What samples really hold, as the Hugging Face `datasets` library declares features of webdataset tars."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.dataset.finished.report_numbers import CROPS
from pipeline.shared.files import AnyPath
from pipeline.shared.tars import Sample, unpack
from schemas.columns import COLUMNS
from schemas.shard import PLAIN, SUFFIXES, Manifest, decode_npy
from stages.pack import REPEATED

_PEEKED = 8
"""Samples of a shard, and shards of a plan, that are looked at."""
_CROP = pa.struct(
    {**dict.fromkeys(("box", "size"), pa.list_(pa.int64())), "face_share": pa.float64(), "absent": pa.string()}
)
_DTYPES = {"halffloat": "float16", "float": "float32", "double": "float64", "null": "string"}

Feature = dict[str, Any]


def peek(out: AnyPath, manifests: Sequence[Manifest]) -> Iterator[Sample]:
    """The first samples of some shards.

    Raises:
        CorruptShardError: names the tar that cannot be read.
    """
    seen: Counter[str] = Counter()
    for manifest in manifests:
        if manifest.kept and seen[manifest.plan_digest] < _PEEKED:
            seen[manifest.plan_digest] += 1
            yield from islice(unpack(out / "shards" / f"{manifest.shard}.tar"), _PEEKED)


def features(samples: Sequence[Sample]) -> list[Feature]:
    """One feature per file of a sample, sorted, each with its name; a crop is there though no sample shown has it."""
    files: dict[str, bytes] = {}
    for sample in samples:
        files = {**sample.files, **files}
    for prefix, suffix in (("", ".jpg"), ("latents.", ".npy")):
        some = [data for crop in CROPS if (data := files.get(f"{prefix}{crop}{suffix}"))]
        files = {**{f"{prefix}{crop}{suffix}": some[0] for crop in CROPS if some}, **files}
    if "txt" in files:
        files = {PLAIN.get(name, name): data for name, data in files.items()}
    contents = [json.loads(sample.files["json"]) for sample in samples]
    return [
        *({"name": name, "dtype": "string"} for name in ("__key__", "__url__")),
        *({"name": name, **_of_file(name, data, contents)} for name, data in sorted(files.items())),
    ]


def _of_file(name: str, data: bytes, contents: Sequence[Mapping[str, Any]]) -> Feature:
    match name.rpartition(".")[2]:
        case "jpg" | "png":
            return {"dtype": "image"}
        case "npy":
            array = decode_npy(data)
            type = pa.from_numpy_dtype(array.dtype)
            for _ in array.shape:
                type = pa.list_(type)
            return _of_type(type)
        case "json":
            # What `pack` repeats has its columns' types, also where no sample shown has it; the rest as it is seen.
            seen = {field.name: field.type for field in pa.array(contents).type}
            columns = {*REPEATED, *seen} & set(COLUMNS) - {*SUFFIXES.values(), "targets"}
            crops = pa.struct([(crop, _CROP) for crop in CROPS])
            types = {**seen, **{name: COLUMNS[name].type for name in columns}, "crops": crops}
            return _of_type(pa.struct(sorted(types.items())))
        case "txt":
            return {"dtype": "string"}
        case _:
            return {"dtype": "binary"}


def _of_type(type: pa.DataType) -> Feature:
    """A type as the front matter of a card has it, which versions 3 to 5 of `datasets` read."""
    if pa.types.is_struct(type):
        return {"struct": [{"name": field.name, **_of_type(field.type)} for field in type]}
    if pa.types.is_list(type) or pa.types.is_fixed_size_list(type):
        inner = _of_type(type.value_type)
        return {"sequence": inner.get("dtype", inner)}
    return {"dtype": _DTYPES.get(str(type), str(type))}
