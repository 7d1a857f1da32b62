"""The shard contract: which file of a sample holds which column, and what a manifest says.

A sample is the files of one key in a tar: `<key>.<suffix>`, split at the first dot as webdataset does.
Array files are npy without pickles, or int8 with scales in safetensors; all images are RGB.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from schemas.arrays import Array
from schemas.columns import CROPS, FEATURES, TOKENS
from schemas.digest import sha256_of_json
from schemas.errors import CorruptShardError
from schemas.record import SCHEMA_VERSION

SUFFIXES: dict[str, str] = dict(
    sorted(
        {
            "arcface.npy": "arcface",
            **{f"{name}.npy": name for name in FEATURES},
            **{f"{name}.safetensors": f"{name}_int8" for name in TOKENS},
            **{f"{name}.jpg": name for name in ("face", *CROPS)},
            "json": "json",
            **{f"latents.{crop}.npy": f"latents_{crop}" for crop in CROPS},
            "mask.png": "mask",
            "text.npy": "text_embeds",
            "text_pooled.npy": "text_pooled",
            "txt": "txt",
        }.items()
    )
)
"""Suffix in the tar -> column that holds the file's bytes, in the order in which they are written."""

PLAIN = {"full.jpg": "jpg"}
"""With pack.layout = plain, this file has the name by which most tools look for the image, and `txt` is beside it."""

INT8 = {suffix.replace(".safetensors", ".npy"): suffix for suffix in SUFFIXES if suffix.endswith(".safetensors")}
"""Suffix of features in float16 -> suffix of the same in int8 (schemas.int8): a sample holds either."""

EMBEDDINGS = frozenset(suffix for suffix in SUFFIXES if suffix.startswith(("arcface", "clip", "dino")))
"""Files that describe a face in numbers: biometric data, which a dataset may do without."""

DATASET = "dataset.json"
"""Beside the shards' folder: the plan, what the run came to, and the files below."""
CARD, CROISSANT = "README.md", "croissant.json"
"""Beside the shards' folder: what the dataset is, for people and for the tools that load it."""
EVENTS = "events.jsonl"
"""Of the run, where the user names it so: see docs/watching.md."""
UNCONDITIONAL = "unconditional.safetensors"
"""Beside the shards' folder: clip_hidden or dino (float16, as in a sample) of "no face", for guidance."""
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|][A-Za-z]\d+)', 'fortran_order': (True|False), 'shape': \((|\d+,|\d+(?:, \d+)+)\), \} *\n"
)


def sample_files(record: Mapping[str, Any]) -> dict[str, bytes]:
    """Suffix -> content of the files of a record's sample, in the order in which they are written."""
    return {suffix: record[column] for suffix, column in SUFFIXES.items() if record.get(column) is not None}


def as_npy(suffixes: Iterable[str]) -> frozenset[str]:
    """Suffixes of files by what they hold, whichever form it has: features in int8 count as their npy."""
    return frozenset(suffix.replace(".safetensors", ".npy") for suffix in suffixes)


def either_form(suffixes: Iterable[str]) -> frozenset[str]:
    """The same suffixes, and those of the same features in int8."""
    given = frozenset(suffixes)
    return given | {INT8[suffix] for suffix in given & INT8.keys()}


def sample_sha256(files: Mapping[str, bytes]) -> str:
    """sha256 over the names, lengths and contents of a sample's files, hex: a ledger holds it for each kept row."""
    digest = hashlib.sha256()
    for suffix in sorted(files):
        digest.update(f"{suffix} {len(files[suffix])}\n".encode("utf-8", "surrogateescape"))
        digest.update(files[suffix])
    return digest.hexdigest()


def encode_npy(array: Array) -> bytes:
    """An array as the bytes of an npy file, version 1.0, C order, no pickles."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def decode_npy(data: bytes) -> Array:
    """The array in the bytes of an npy file, version 1.0; pickled objects are refused, and so is any wrong length.

    Raises:
        CorruptShardError: when the bytes are no such file.
    """
    try:
        if np.lib.format.read_magic(io.BytesIO(data)) != (1, 0):
            raise ValueError("not version 1.0")
        start = 10 + int.from_bytes(data[8:10], "little")
        header = _NPY_HEADER.fullmatch(data, 10, start)
        if not header:
            raise ValueError("its header is not as numpy writes it")  # numpy would warn of some, and repair them
        # numpy has Python's own parser read it, which fails in several threads at a time (SystemError, Python 3.11).
        dtype, shape = np.dtype(header[1].decode()), tuple(map(int, re.findall(rb"\d+", header[3])))
        count = math.prod(shape)
        # Compared before anything is allocated: a damaged header may claim any shape.
        if dtype.hasobject or count * dtype.itemsize != len(data) - start:
            raise ValueError("the header does not fit the length, or asks for pickled objects")
        array: Array = np.frombuffer(data, dtype, count, start)
        return array.reshape(shape, order="F" if header[2] == b"True" else "C")
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise CorruptShardError(f"not an npy file: {error}") from error


@dataclass(frozen=True)
class Manifest:
    """The proof of a shard: written last, so that a shard with a manifest is done. See `to_json` for the text."""

    shard: str
    profile: str
    plan_digest: str
    rows_in: int
    kept: int
    dropped: dict[str, int]
    """Count for every reason that the plan can give, zeros too."""
    models: list[dict[str, str]]
    """name, task, sha256 and licence of each weight (and of each method without weights)."""
    files: dict[str, dict[str, Any]]
    """File name -> {bytes, sha256}."""
    schema_version: int = SCHEMA_VERSION

    def conserves_rows(self) -> bool:
        """Whether every row in is either kept or dropped for a reason."""
        return self.rows_in == self.kept + sum(self.dropped.values())

    def _has_its_types(self) -> bool:
        words: list[object] = [self.shard, self.profile, self.plan_digest]
        numbers: list[object] = [self.rows_in, self.kept]
        if not (isinstance(self.dropped, dict) and isinstance(self.files, dict) and isinstance(self.models, list)):
            return False
        entries = [*self.files.values(), *self.models]
        if not all(isinstance(entry, dict) for entry in entries):
            return False
        numbers += [*self.dropped.values(), *(entry.get("bytes") for entry in self.files.values())]
        words += [entry.get("sha256") for entry in entries]
        words += [model.get(name) for model in self.models for name in ("name", "task", "licence")]
        return all(isinstance(word, str) for word in words) and all(
            type(number) is int and number >= 0 for number in numbers
        )

    def to_json(self) -> str:
        """The manifest as stable, readable JSON text."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> "Manifest":
        """Read a manifest; a CorruptShardError when the text is none of this schema version."""
        try:
            fields = json.loads(text)
            manifest = Manifest(**{name: fields[name] for name in Manifest.__dataclass_fields__})
            json.dumps(fields, ensure_ascii=False).encode()  # JSON may hold halves of surrogates, which are no text
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptShardError(f"not a manifest: {type(error).__name__}: {error}") from error
        if not manifest._has_its_types():
            raise CorruptShardError("not a manifest: a field has another type")
        if manifest.schema_version != SCHEMA_VERSION:
            raise CorruptShardError(f"schema version {manifest.schema_version}; this faceshards reads {SCHEMA_VERSION}")
        return manifest


def dataset_text(content: Mapping[str, Any]) -> bytes:
    """The one text of a dataset.json: `verify` holds any other for damage."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def dataset_digest(manifests: Iterable[Manifest]) -> str:
    """sha256 that tells datasets apart by the bytes of their shards, whatever the order of the manifests, hex."""
    return sha256_of_json({manifest.shard: manifest.files for manifest in manifests})
