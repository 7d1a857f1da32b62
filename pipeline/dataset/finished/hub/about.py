"""What is known of a finished dataset, and what its samples really hold: what its card and its Croissant say."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.dataset.out.ledger import Funnel, read_dataset
from pipeline.dataset.source.laion import is_old_laion
from pipeline.shared.files import AnyPath, times
from pipeline.shared.tars import Sample, unpack
from schemas.columns import COLUMNS, CROPS
from schemas.errors import CorruptShardError, first_line
from schemas.names import shard_origin
from schemas.shard import EMBEDDINGS, PLAIN, SUFFIXES, Manifest, decode_npy
from stages.pack import REPEATED
from stages.pixels.headers import DECODER_ERRORS

Feature = dict[str, Any]

_VIEWED_BYTES = 2_000_000
"""Larger rows are not shown by the hub's viewer."""
_KNOWN = {*SUFFIXES, *PLAIN.values()}
_HEAVY = re.compile(r"(clip_hidden|dino|latents\.|text\.)")


@dataclass(frozen=True)
class About:
    funnel: Funnel
    dataset: dict[str, Any]
    """dataset.json."""
    features: list[Feature]
    row_bytes: int
    """Of the largest sample that was looked at."""
    made: tuple[datetime, datetime]
    """When its first and its last shard were done."""

    @staticmethod
    def of(out: AnyPath, counted: Funnel) -> "About":
        """Read dataset.json and some samples; a CorruptShardError names the file that cannot be read."""
        samples = list(peek(out, counted.manifests))
        try:
            described = features(samples)
        except DECODER_ERRORS as error:  # of json that is none of ours
            raise CorruptShardError(f"the json of samples cannot be read: {first_line(error)}") from error
        written = times(out / "shards")
        done = [datetime.fromtimestamp(written.get(f"{one.shard}.json", 0), UTC) for one in counted.manifests]
        return About(
            funnel=counted,
            dataset=read_dataset(out),
            features=described,
            row_bytes=max((sum(map(len, sample.files.values())) for sample in samples), default=0),
            made=(min(done), max(done)) if done else (datetime.now(UTC),) * 2,
        )

    @property
    def manifests(self) -> Sequence[Manifest]:
        return self.funnel.manifests

    @property
    def sources(self) -> list[str]:
        """Where the rows come from, as far as it is known."""
        return self.dataset.get("sources") or self.parts

    @property
    def name(self) -> str:
        """The folder's own name would say nothing: it is `out`."""
        names = [one.removeprefix("made:").rpartition("/")[2] for one in self.sources[:3]]
        return f"Faces from {', '.join(names) or 'nowhere'}"

    @property
    def profile(self) -> str:
        return self.manifests[0].profile if self.manifests else ""

    @property
    def parts(self) -> list[str]:
        return sorted({shard_origin(one.shard)[0] for one in self.manifests})

    @property
    def is_old_laion(self) -> bool:
        return is_old_laion(self.sources, self.parts)

    @property
    def light(self) -> list[Feature]:
        """The features without the large ones, where the hub could not show rows with them."""
        too_large = self.row_bytes > _VIEWED_BYTES
        return [one for one in self.features if not (too_large and _HEAVY.match(one["name"]))]

    @property
    def models(self) -> list[dict[str, str]]:
        return self.manifests[0].models if self.manifests else []

    @property
    def is_biometric(self) -> bool:
        return any(one["name"] in EMBEDDINGS for one in self.features)

    @property
    def tar_bytes(self) -> int:
        return sum(one.files.get(f"{one.shard}.tar", {}).get("bytes", 0) for one in self.manifests)


_PEEKED = 8
"""Samples of a shard, and shards of a plan, that are looked at."""
_CROP = pa.struct(
    {**dict.fromkeys(("box", "size"), pa.list_(pa.int64())), "face_share": pa.float64(), "absent": pa.string()}
)
_DTYPES = {"halffloat": "float16", "float": "float32", "double": "float64", "null": "string"}


def peek(out: AnyPath, manifests: Sequence[Manifest]) -> Iterator[Sample]:
    """The first samples of some shards; a CorruptShardError names the tar that cannot be read."""
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
        *({"name": name, **_of_file(name, files[name], contents)} for name in sorted(files.keys() & _KNOWN)),
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
    if pa.types.is_list(type):
        inner = _of_type(type.value_type)
        return {"sequence": inner.get("dtype", inner)}
    return {"dtype": _DTYPES.get(str(type), str(type))}
