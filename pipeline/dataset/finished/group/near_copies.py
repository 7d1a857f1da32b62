"""Near-copies: the same photo once more, in another size, quality or frame, or mirrored. Two of them are no pair."""

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.dataset.finished.group.persons import NEIGHBOURS, Numbers, Pairs, Vectors, mutual_neighbours
from stages.models.backends import Image

HASHES = 4
"""Of the photo, of its mirror image, of the face, of its mirror image: 64 bits each."""
_PHOTO_BITS, _FACE_BITS = 8, 6
"""Differing bits of copies, at most: docs/decisions/0041."""
_COPY = 0.8
"""Least cosine of the ID vectors of copies."""
_ODD = (-1.0) ** np.arange(8)
_BITS = 2 ** np.arange(64, dtype=np.uint64)

Hashes = npt.NDArray[np.uint64]


def hashes(image: Image | npt.NDArray[np.uint8]) -> tuple[np.uint64, np.uint64]:
    """Perceptual hashes (pHash) of a grey image (H, W) and of its mirror image: signs of its lowest frequencies."""
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8]
    one, mirrored = (((form > np.median(form)).ravel() * _BITS).sum(dtype=np.uint64) for form in (low, low * _ODD))
    return one, mirrored


def copies(hashed: Hashes, pairs: Pairs) -> npt.NDArray[np.bool_]:
    """Which pairs are near-copies by their (N, HASHES)."""

    def bits(kind: int) -> npt.NDArray[np.uint8]:
        own, others = hashed[pairs.one, kind], hashed[pairs.other]
        differing = np.bitwise_count(own[:, None] ^ others[:, kind : kind + 2])
        return np.asarray(differing.min(axis=1))

    return ((bits(0) <= _PHOTO_BITS) | (bits(2) <= _FACE_BITS)) & (pairs.cosine >= _COPY)


def without_copies(
    vectors: Vectors, hashed: Hashes, worth: npt.NDArray[np.float32], least: float
) -> tuple[Numbers, Pairs]:
    """(N,) for each photo the one that it is a copy of, its own number for others; and the pairs of these others.

    Of copies the one of most worth stays, of equals the first. No chains: a copy of a copy is one of what stays only
    if it is so itself.
    """
    numbers = np.arange(len(vectors))
    ranked = np.lexsort((numbers, -worth))
    rank = np.empty_like(ranked)
    rank[ranked] = numbers
    original = _of_one_hash(vectors, hashed[:, 0], rank)
    while True:
        alive = np.flatnonzero(original == numbers)
        pairs, full = mutual_neighbours(vectors, alive, least)
        same = pairs.where(copies(hashed, pairs))
        best, worse = (pick(rank[same.one], rank[same.other]) for pick in (np.minimum, np.maximum))
        for at in np.lexsort((worse, best)):
            one, other = ranked[best[at]], ranked[worse[at]]
            if original[one] == one and original[other] == other:
                original[other] = one
        stays = original == numbers
        crowd = np.bincount(np.concatenate([same.one, same.other]), minlength=len(numbers))[alive]
        if not (full & (crowd > NEIGHBOURS / 2)).any():  # else copies stood before further neighbours
            while (original[original] != original).any():  # what a copy was one of turned out to be one itself
                original = original[original]
            return original, pairs.where(stays[pairs.one] & stays[pairs.other])


def _of_one_hash(vectors: Vectors, photo: Hashes, rank: Numbers) -> Numbers:
    """(N,) as `without_copies` has it, of photos with one hash (N,) alone: some lie in the web a thousand times."""
    original = np.arange(len(photo))
    order = np.lexsort((rank, photo))
    begins = np.diff(photo[order], prepend=~photo[order[:1]]) != 0
    first = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    for at in np.flatnonzero(~begins):
        if vectors[order[at]] @ vectors[first[at]] >= _COPY:
            original[order[at]] = first[at]
    return original
