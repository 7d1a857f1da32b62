"""The contract of dataset.json, a manifest, a ledger, a tar, a sample, and the features of "no face"."""

import json
import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError
from safetensors.numpy import load

from pipeline.dataset.out.ledger import counts, summary
from pipeline.dataset.out.takedowns import DROPS, KEEPS, STAGE
from pipeline.shared.files import AnyPath
from pipeline.shared.tars import Sample, unpack
from schemas.buckets import PIXELS_PER_LATENT
from schemas.columns import COLUMNS, CROPS, FEATURES, KEPT, TOKENS
from schemas.digest import sha256_of_json
from schemas.drops import DropReason
from schemas.errors import ContractError, CorruptShardError
from schemas.int8 import decode_int8, encode_int8
from schemas.names import sample_key, shard_origin
from schemas.record import SCHEMA_VERSION
from schemas.shard import (
    DATASET,
    EMBEDDINGS,
    INT8,
    SUFFIXES,
    UNCONDITIONAL,
    Manifest,
    as_npy,
    dataset_text,
    decode_npy,
    encode_npy,
    sample_sha256,
)
from schemas.targets import Targets
from stages import STAGES
from stages.align import FACE_SIZE
from stages.pixels.headers import DECODER_ERRORS, sniff
from stages.pixels.images import decode_jpeg, decode_png

IDENTITY = ("schema_version", "profile", "plan_digest")
"""What dataset.json and every manifest repeat of the plan."""
_MEASURED = ("sha256", "n_bytes", "format", "width", "height", "bbox", "kps", "det_score", "face_px", "sample_sha256")
"""Ledger columns that no kept row may lack."""
_REQUIRED = ("json", "face.jpg", "mask.png")
_ID = "arcface.npy"
_SQUARE = ("portrait", "half")
_FEATURES = (
    {"clip.npy", "clip_hidden.npy"},
    {"clip_plain.npy", "clip_hidden_plain.npy"},
    {"dino.npy"},
    {"dino_plain.npy"},
)
"""What an image embedder writes: one of these must be whole."""
_LABELS = 19
_NORM_TOLERANCE = 1e-3

_ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "arcface.npy": ("<f4", (512,)),
    **{f"{name}.npy": ("<f2", (1024,)) for name in FEATURES if name not in TOKENS},
    **{f"{name}.npy": ("<f2", (257, -1 if name.startswith("dino") else 1280)) for name in TOKENS},
    "text.npy": ("<f2", (77, -1)),
    "text_pooled.npy": ("<f2", (-1,)),
}
"""dtype and shape; -1 is free. Latents are as large as the json says."""

_JSON_FIELDS = ("key", "part", "row", "url", "text", "sha256", "width", "height", "bbox", "kps", "det_score", "face_px")
_ROUNDED = 1e-4
"""The json holds measurements with four decimals."""


def dataset_problems(dataset: dict[str, Any], text: bytes, sums: Mapping[str, Any] | None) -> Iterator[str]:
    """What is wrong with dataset.json, whose text this is; it has `plan` and IDENTITY, and the types of `read_dataset`.

    `sums` is what the manifests add up to (`ledger.summary`), None when nobody knows.
    """
    plan = dataset["plan"]
    if sha256_of_json(plan) != dataset["plan_digest"]:
        yield "its plan is not the one of its plan_digest"
    for name in ("schema_version", "profile"):
        if plan.get(name) != dataset[name]:
            yield f"{name} is not that of its plan"
    if dataset_text(dataset) != text:
        yield f"the text is not that of a {DATASET} as it was written"
    summed = set(summary([]))
    # What is there when the run came to its end.
    more = set(dataset) - {*IDENTITY, "plan", "planned", "sources", "sources_before"}
    if missing := sorted(summed - more) if more else []:
        yield f"it lacks {', '.join(missing)}"
    if unknown := sorted(more - {*summed, "files"}):
        yield f"it has the unknown entries {', '.join(unknown)}"
    differing = [name for name, value in (sums or {}).items() if dataset.get(name) != value]
    if "shards" in dataset and differing:
        yield f"the manifests add up to other {', '.join(differing)}"
    foreign = [name for name in dataset.get("files", {}) if name != UNCONDITIONAL]
    yield from (f"it names the file {name!r}, which no dataset has" for name in foreign)


def manifest_problems(shard: str, manifest: Manifest, text: bytes) -> Iterator[str]:
    """What is wrong with a manifest, whose text this is."""
    if manifest.to_json().encode() != text:
        yield "the text is not that of a manifest as it was written"
    if unknown := sorted(set(manifest.dropped) - set(DropReason)):
        yield f"it counts the unknown reasons {unknown}"
    if not manifest.conserves_rows():
        yield f"{manifest.rows_in} rows in, but {manifest.kept} kept + {sum(manifest.dropped.values())} dropped"
    if set(manifest.files) != {f"{shard}.tar", f"{shard}.parquet"}:
        yield f"it names the files {sorted(manifest.files)}"


def ledger_problems(manifest: Manifest, ledger: pa.Table) -> Iterator[str]:
    """What is wrong with a ledger (LEDGER_SCHEMA), given its manifest."""
    if ledger.num_rows != manifest.rows_in:
        yield f"it has {ledger.num_rows} rows; the manifest says {manifest.rows_in}"
    try:
        if counts(ledger["verdict"], list(manifest.dropped)) != (manifest.kept, manifest.dropped):
            yield "it counts the verdicts differently from the manifest"
    except ContractError as error:
        yield str(error)
    if unknown := set(pc.unique(ledger["stage"]).to_pylist()) - set(STAGES):
        yield f"unknown stages {sorted(map(str, unknown))}"
    kept = ledger.filter(pc.equal(ledger["verdict"], KEPT))
    if set(pc.unique(kept["stage"]).to_pylist()) - {list(STAGES)[-1]}:
        yield "it keeps rows that did not pass the last stage"
    for column in _MEASURED:
        if kept[column].null_count:
            yield f"{kept[column].null_count} kept rows have no {column}"
    taken = pc.and_(pc.is_in(ledger["verdict"], pa.array(list(map(str, DROPS)))), pc.equal(ledger["stage"], STAGE))
    gone = ledger.filter(taken)
    if known := [name for name in ledger.column_names if name not in KEEPS and gone[name].null_count < len(gone)]:
        yield f"rows that must not be used still tell {', '.join(known)}"
    part, _ = shard_origin(manifest.shard)
    rows = list(zip(*(ledger[name].to_pylist() for name in ("key", "part", "row")), strict=True))
    if strange := [
        key for key, origin, row in rows if origin != part or row is None or row < 0 or key != sample_key(part, row)
    ]:
        yield f"the key {strange[0]!r} is not that of a row of {part}"
    elif unsorted := [after[0] for before, after in pairwise(rows) if before[2] >= after[2]]:
        yield f"the key {unsorted[0]!r} is out of order or occurs twice"


def tar_problems(tar: AnyPath, ledger: pa.Table, *, embeddings: bool | None = True) -> Iterator[tuple[str | None, str]]:
    """Key of a sample, None for the tar as a whole, and what is wrong with it, given the ledger of its shard."""
    kept = ledger.filter(pc.equal(ledger["verdict"], KEPT))
    index = {key: position for position, key in enumerate(kept["key"].to_pylist())}
    keys = []
    try:
        for sample in unpack(tar):
            keys.append(sample.key)
            record = kept.slice(index[sample.key], 1).to_pylist()[0] if sample.key in index else None
            for message in sample_problems(sample, record, embeddings=embeddings):
                yield sample.key, message
    except CorruptShardError as error:
        yield None, str(error).removeprefix(f"{tar}: ")
    for key in sorted(set(index) - set(keys)):
        yield key, "the ledger keeps it, but the tar has no such sample"
    if any(first >= second for first, second in pairwise(keys)):
        yield None, "its keys are not sorted, or a key occurs twice"


def sample_problems(
    sample: Sample, record: Mapping[str, Any] | None, *, embeddings: bool | None = True
) -> Iterator[str]:
    """What is wrong with a sample, given its ledger row (None where the ledger does not keep it).

    `embeddings` says whether the plan writes them; None when nobody knows.
    """
    if record is None:
        yield "the ledger does not keep it"
    elif record["sample_sha256"] != sample_sha256(sample.files):
        yield "its files are not those that the ledger's sample_sha256 stands for"
    suffixes = set(sample.files)
    crops = {name for name in CROPS if f"{name}.jpg" in suffixes}
    if record and record["crops_made"] is not None and set(record["crops_made"]) != crops:
        yield "its crops are not those of the ledger's crops_made"
    if unknown := sorted(suffixes - set(SUFFIXES)):
        yield f"unknown files: {', '.join(unknown)}"
    if missing := sorted({*_REQUIRED, *((_ID,) if embeddings else ())} - suffixes):
        yield f"missing files: {', '.join(missing)}"
    if embeddings and not any(wanted <= as_npy(suffixes) for wanted in _FEATURES):
        yield "no image features: neither clip.npy with clip_hidden.npy nor dino.npy, nor these as _plain"
    if twice := sorted(suffix for suffix, int8 in INT8.items() if {suffix, int8} <= suffixes):
        yield f"{', '.join(twice)}: there in int8 too"
    if embeddings is False and suffixes & EMBEDDINGS:
        yield f"embeddings, which its plan leaves out: {', '.join(sorted(suffixes & EMBEDDINGS))}"
    for suffix in ("face.jpg", "mask.png"):
        if suffix in suffixes:
            yield from _image_problems(suffix, sample.files[suffix], (FACE_SIZE, FACE_SIZE))
    for suffix in sorted(set(_ARRAYS) & suffixes):
        yield from _array_problems(suffix, sample.files[suffix], *_ARRAYS[suffix])
    for suffix in sorted(set(INT8.values()) & suffixes):
        yield from _int8_problems(suffix, sample.files[suffix])
    for mirror in sorted(suffix for suffix in suffixes if "_mirror." in suffix):
        own = mirror.replace("_mirror.", ".")
        if len(sample.files.get(own, b"")) != len(sample.files[mirror]):
            yield f"{mirror} has not the shape of {own}"
    if "json" in suffixes:
        yield from json_problems(sample, record or {})


def _image_problems(suffix: str, data: bytes, size: tuple[int, int]) -> Iterator[str]:
    """`size` is (width, height), pixels; nothing larger is ever decoded."""
    header = sniff(data)
    wanted = "PNG" if suffix.endswith("png") else "JPEG"
    if header is None or header.format != wanted:
        yield f"{suffix} is not a {wanted}"
        return
    if (header.width, header.height) != size:
        yield f"{suffix} is {header.width} x {header.height} pixels, not {size[0]} x {size[1]}"
        return
    try:
        pixels = decode_png(data) if wanted == "PNG" else decode_jpeg(data)
    except DECODER_ERRORS as error:
        yield f"{suffix} cannot be decoded: {error}"
        return
    if wanted == "JPEG" and pixels.shape != (size[1], size[0], 3):
        yield f"{suffix} has the shape {pixels.shape}"
    if wanted == "PNG" and (pixels.shape != (size[1], size[0]) or pixels.dtype != np.uint8 or pixels.max() >= _LABELS):
        yield f"{suffix} is not a map of {_LABELS} labels, one byte per pixel"


def _array_problems(name: str, data: bytes, dtype: str, shape: tuple[int, ...]) -> Iterator[str]:
    wrong = f"{name} is not an npy of {np.dtype(dtype).name} {shape}"
    if math.prod(shape) > len(data):  # a json may claim more than memory holds
        yield wrong
        return
    array = np.empty([max(side, 1) for side in shape], dtype)
    if -1 in shape:
        header_bytes = len(encode_npy(array)) - array.nbytes
        array = np.empty([*shape[:-1], max((len(data) - header_bytes) // array.nbytes, 1)], dtype)
    # The header is compared, not parsed: parsing a broken one can raise anything, or ask for any amount of memory.
    expected = encode_npy(array)
    if len(data) != len(expected) or data[: -array.nbytes] != expected[: -array.nbytes]:
        yield wrong
    elif not np.isfinite(values := decode_npy(data)).all():
        yield f"{name} holds numbers that are not finite"
    elif name == _ID and abs(length := float(np.linalg.norm(values.astype(np.float64))) - 1) >= _NORM_TOLERANCE:
        yield f"{name} has the length {length + 1:.4f}, not 1"


def _int8_problems(name: str, data: bytes) -> Iterator[str]:
    """Of the file in the stead of an npy of _ARRAYS."""
    tokens, width = _ARRAYS[name.replace(".safetensors", ".npy")][1]
    try:
        features = decode_int8(data)
    except CorruptShardError as error:
        yield f"{name}: {error}"
        return
    if features.shape[0] != tokens or width not in (-1, features.shape[1]) or encode_int8(features) != data:
        yield f"{name} is not a safetensors file of int8 {(tokens, width)} and its scale"
    elif not np.isfinite(features.scale).all():
        yield f"{name} holds numbers that are not finite"


def json_problems(sample: Sample, record: Mapping[str, Any]) -> Iterator[str]:
    """Where the json, and the crops that it describes, are not those of the sample and its ledger row."""
    try:
        content = json.loads(sample.files["json"])
    except (ValueError, RecursionError) as error:
        yield f"json cannot be parsed: {error}"
        return
    if not isinstance(content, dict):
        yield "json is not an object"
        return
    if missing := [name for name in (*_JSON_FIELDS, "crops", "schema_version") if name not in content]:
        yield f"json lacks {', '.join(missing)}"
    if content.get("key", sample.key) != sample.key:
        yield f"json is that of the key {content['key']!r}"
    if content.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        yield f"json has the schema version {content['schema_version']!r}"
    for name in sorted(set(content) & set(record)):
        if COLUMNS[name].ledger and not _equal(content[name], record[name]):
            yield f"json and ledger differ in {name}"
    if sample.files.get("txt", b"") not in (b"", str(content.get("text")).encode(errors="replace")):
        yield "txt is not the text of json"
    crops = content.get("crops")
    for name in CROPS:
        crop, suffix = crops.get(name) if isinstance(crops, dict) else None, f"{name}.jpg"
        size = crop.get("size") if isinstance(crop, dict) else None
        if not isinstance(crop, dict):
            yield f"json does not describe {suffix}"
        elif suffix not in sample.files:
            if not crop.get("absent"):
                yield f"{suffix} is absent, and json does not say why"
        elif not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
            yield f"json does not give the size of {suffix}"
        else:
            if name in _SQUARE and size[0] != size[1]:
                yield f"{suffix} is not square"
            yield from _image_problems(suffix, sample.files[suffix], (size[0], size[1]))
    yield from encoded_problems(sample, content.get("targets"))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, float) or isinstance(other, float):
        # An int may be larger than any float.
        is_number = (isinstance(x, float) or (isinstance(x, int) and abs(x) < 1e300) for x in (one, other))
        return all(is_number) and math.isclose(one, other, rel_tol=1e-6, abs_tol=_ROUNDED)
    return bool(one == other)


def encoded_problems(sample: Sample, described: Any) -> Iterator[str]:
    """Where latents and text embeddings are not those that the json's `targets` describe."""
    encoded = sorted(suffix for suffix in sample.files if suffix.startswith(("latents.", "text")))
    if described is None:
        if encoded:
            yield f"json does not say what encoded {', '.join(encoded)}"
        return
    try:
        targets = Targets.from_object(described)
    except CorruptShardError as error:
        yield f"json: {error}"
        return
    for crop in sorted({*CROPS, *targets.latents}):
        fit, data = targets.latents.get(crop), sample.files.get(f"latents.{crop}.npy")
        if (fit is None) != (data is None) or (data is not None and f"{crop}.jpg" not in sample.files):
            yield f"latents.{crop}.npy, {crop}.jpg and json do not go together"
        elif fit is not None and data is not None:
            width, height = fit.size[0] // PIXELS_PER_LATENT, fit.size[1] // PIXELS_PER_LATENT
            channels = 8 if len(data) > 8 * height * width * 2 else 4  # earlier releases wrote the mean alone
            yield from _array_problems(f"latents.{crop}.npy", data, "<f2", (channels, height, width))
    if "text.npy" in encoded and (targets.kind == "sdxl") != ("text_pooled.npy" in encoded):
        yield f"text.npy and text_pooled.npy are not those of {targets.kind}"


def unconditional_problems(path: AnyPath) -> Iterator[str]:
    try:
        features = load(path.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        yield f"cannot be read: {error}"
        return
    if len(features) != 1 or not set(features) <= {"clip_hidden", "dino"}:
        yield f"it holds {sorted(features)}, not clip_hidden or dino"
        return
    for name, array in features.items():
        expected = _ARRAYS[f"{name}.npy"]
        yield from _array_problems(f"{name}, {array.dtype} {array.shape},", encode_npy(array), *expected)
