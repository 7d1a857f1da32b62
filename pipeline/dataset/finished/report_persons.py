"""What the report shows of a grouped dataset: how many photos persons have, and how sure it is that they are theirs.

Sizes are counted in all ledgers; cosines and faces are those of the persons at the beginning of a few shards.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.dataset.finished.report_cards import reduced
from pipeline.dataset.out.ledger import occurrences, read_ledger
from pipeline.shared.files import AnyPath, RemotePath
from pipeline.shared.page import data_uri
from pipeline.shared.tars import samples
from schemas.arrays import Floats, Integers
from schemas.columns import KEPT
from schemas.errors import CorruptShardError
from schemas.shard import Manifest, decode_npy
from stages.pixels.headers import DECODER_ERRORS
from stages.pixels.images import decode_jpeg

_SIZES = (1, 2, 3, 6, 11, 21, 1 << 62)
_LOOKED_AT, _LOOKED_AT_REMOTE = 512, 64
"""Samples per shard."""
_SHOWN, _FACES = 8, 6
_FACE_PX = 96
_WANTED = ("arcface.npy", "face.jpg")


def persons(out: AnyPath, chosen: Sequence[Manifest], every: Sequence[Manifest], *, pictures: bool) -> dict[str, Any]:
    """Read the ledgers of all shards, and the beginnings of the tars of some; returns what the template names.

    Raises:
        CorruptShardError: names a file that is damaged.
    """
    count: Counter[int] = Counter()
    for manifest in every:
        column = read_ledger(out, manifest.shard, ("person",), KEPT)["person"]
        count.update(occurrences(column).values())
    sizes = []
    for low, high in pairwise(_SIZES):
        inside = {size: number for size, number in count.items() if low <= size < high}
        words = f"{low}" if high == low + 1 else f"{low} to {high - 1}" if high < _SIZES[-1] else f"{low} and more"
        sizes.append((words, sum(inside.values()), sum(size * number for size, number in inside.items())))

    numbers, vectors, faces = _looked_at(out, chosen)
    _, first, group, size = np.unique(numbers, return_index=True, return_inverse=True, return_counts=True)
    sums = np.zeros((len(first), vectors.shape[1]), np.float32)
    np.add.at(sums, group, vectors)
    near = vectors @ sums.T
    rows, others = np.arange(len(group)), near / size
    others[rows, group] = -1
    several = np.flatnonzero(size[group] > 1)
    own = (near[rows, group] - 1)[several] / (size[group[several]] - 1)

    def sheet(words: str, members: Iterable[int]) -> dict[str, Any]:
        shown = [data_uri(reduced(decode_jpeg(faces[at]), _FACE_PX)) for at in members] if pictures else []
        return {"words": words, "faces": shown}

    together = [one for one in np.argsort(first) if size[one] > 1]
    groups = [sheet(f"{size[one]} photos", np.flatnonzero(group == one)[:_FACES]) for one in together[:_SHOWN]]
    worst = {int(group[several[at]]): at for at in np.argsort(-own)}  # of each person the last that is written stays
    farthest = [
        sheet(
            f"mean cosine {own[at]:.2f} with {size[one] - 1} other{'s' * bool(size[one] > 2)}",
            [several[at], *np.flatnonzero((group == one) & (rows != several[at]))[: _FACES - 1]],
        )
        for one, at in sorted(worst.items(), key=lambda entry: own[entry[1]])[:_SHOWN]
    ]
    nearest = others.argmax(axis=1) if len(others) else np.zeros(0, int)
    closest = np.argsort(-others[rows, nearest])[: 20 * _SHOWN]
    pairs = {tuple(sorted((int(group[at]), int(nearest[at])))) for at in closest if group[at] != nearest[at]}
    alike = sorted(
        ((float(sums[one] @ sums[two] / (size[one] * size[two])), one, two) for one, two in pairs), reverse=True
    )
    strangers = [sheet(f"mean cosine {mean:.2f}", (first[one], first[two])) for mean, one, two in alike[:_SHOWN]]
    return {
        "sizes": sizes,  # photos of a person in words, persons that have so many, their photos
        "looked_at": len(own),  # photos of persons with several; what follows is of these
        # Mean cosine of a photo with the others of its person: median, and what 5 % are under.
        "own": (float(np.median(own)), float(np.quantile(own, 0.05))) if len(own) else (0.0, 0.0),
        # Photos that are nearer to another of these persons, by the mean.
        "nearer": int((others[several, nearest[several]] > own).sum()),
        "groups": groups,
        "farthest": farthest,
        "strangers": strangers,
    }


def _looked_at(out: AnyPath, chosen: Sequence[Manifest]) -> tuple[Integers, Floats, list[bytes]]:
    """Person, ID vector and face of the first samples of some shards."""
    numbers: list[int] = []
    vectors, faces = [np.zeros((0, 512), np.float32)], []
    most = _LOOKED_AT_REMOTE if isinstance(out, RemotePath) else _LOOKED_AT
    for manifest in chosen:
        ledger = read_ledger(out, manifest.shard, ("key", "person"), KEPT)
        tar = out / "shards" / f"{manifest.shard}.tar"
        person = dict(zip(ledger["key"].to_pylist(), ledger["person"].to_pylist(), strict=True))
        for key, files in samples(tar, 0, most, lambda suffix: True if suffix in _WANTED else None):
            try:
                vector, face = (bytes(files[suffix]) for suffix in _WANTED)  # type: ignore[arg-type]
                decode_jpeg(face)
                vectors.append(decode_npy(vector).reshape(1, 512))
            except (*DECODER_ERRORS, CorruptShardError) as error:
                raise CorruptShardError(f"{tar.name}: {key} cannot be shown: {error}") from error
            numbers.append(person.get(key) or 0)
            faces.append(face)
    return np.array(numbers, np.int64), np.concatenate(vectors), faces
