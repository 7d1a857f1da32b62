"""Near-copies: the same photo once more, in another size, quality or frame, or mirrored. Two of them are no pair."""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.dataset.finished.group.persons import NEIGHBOURS, Pairs, mutual_neighbours
from schemas.arrays import Floats, Grey, Hashes, Integers, Mask
from stages.models import sscd

SIDE = 24
"""Of the details of faces, pixels."""
_SIGMA, _SHIFT = 3, 2
"""What is blurred over so many of these pixels is no detail; alignments of one face differ by so many."""
_PHOTO_BITS, _FACE, _COPY = 8, 0.8, 0.6
"""Differing bits of copies at most; least correlation of their faces' details, least cosine of their ID vectors:
docs/decisions/0050."""
_ODD = (-1.0) ** np.arange(8)
_BITS = 2 ** np.arange(64, dtype=np.uint64)
_ONES = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16).sum(axis=1, dtype=np.uint8)
"""Bits of each number of 16 that are one, as numpy counts them itself from 2.0 on."""
_TOGETHER = 1 << 14
"""Pairs whose descriptors are in memory at a time."""

Details = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Looks:
    """What N photos look like."""

    hashes: Hashes
    """(N, 2) of the photo and of its mirror image: 64 bits each."""
    faces: Details
    """(N, SIDE, SIDE)."""
    described: Floats
    """(N, D) of unit length, by SSCD; D = 0 without it."""


def hashes(image: Grey) -> tuple[np.uint64, np.uint64]:
    """Perceptual hashes (pHash) of a grey image (H, W) and of its mirror image: signs of its lowest frequencies."""
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8]
    one, mirrored = (((form > np.median(form)).ravel() * _BITS).sum(dtype=np.uint64) for form in (low, low * _ODD))
    return one, mirrored


def details(face: Grey) -> Details:
    """(SIDE, SIDE) what is not smooth in a grey face (H, W): all faces are alike in the rest."""
    small = cv2.resize(face, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    small -= cv2.GaussianBlur(small, (0, 0), _SIGMA)
    scaled: Details = np.round(small * (127 / max(float(np.abs(small).max()), 1))).astype(np.int8)
    return scaled


def copies(looks: Looks, pairs: Pairs) -> Mask:
    bits = looks.hashes[pairs.one, :1] ^ looks.hashes[pairs.other]
    differing = _ONES[bits.view(np.uint16)].reshape(-1, 2, 4).sum(axis=2, dtype=np.uint8).min(axis=1)
    alike = pairs.cosine >= _COPY
    same: Mask = alike & (differing <= _PHOTO_BITS)
    for at in np.flatnonzero(alike & ~same):
        inner = looks.faces[pairs.one[at], _SHIFT:-_SHIFT, _SHIFT:-_SHIFT].astype(np.float32)
        other = looks.faces[pairs.other[at]].astype(np.float32)
        both = np.hstack([other, other[:, ::-1]])  # windows over the seam are no face, and correlate with none
        same[at] = cv2.matchTemplate(both, inner, cv2.TM_CCOEFF_NORMED).max() >= _FACE
    for start in range(0, len(same), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        one, other = (looks.described[numbers[some]] for numbers in (pairs.one, pairs.other))
        same[some] |= np.einsum("nd,nd->n", one, other) >= sscd.COPY
    return same


def without_copies(vectors: Floats, looks: Looks, worth: Floats, least: float) -> tuple[Integers, Pairs]:
    """(N,) for each photo the one that it is a copy of, its own number for others; and the pairs of these others.

    Of copies the one of most worth stays, of equals the first. No chains: a copy of a copy is one of what stays only
    if it is so itself.
    """
    numbers = np.arange(len(vectors))
    ranked = np.lexsort((numbers, -worth))
    rank = np.empty_like(ranked)
    rank[ranked] = numbers
    original, photo = numbers.copy(), looks.hashes[:, 0]
    order = np.lexsort((rank, photo))  # copies of one hash first: some lie in the web a thousand times
    begins = np.diff(photo[order], prepend=~photo[order[:1]]) != 0
    first = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    for at in np.flatnonzero(~begins):
        if vectors[order[at]] @ vectors[first[at]] >= _COPY:
            original[order[at]] = first[at]
    while True:
        alive = np.flatnonzero(original == numbers)
        pairs, full = mutual_neighbours(vectors, alive, least)
        same = pairs.where(copies(looks, pairs))
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
