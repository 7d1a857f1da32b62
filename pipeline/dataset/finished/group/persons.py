"""Persons from ID vectors: mutual nearest neighbours, joined by average linkage, so that look-alikes make no chain."""

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from schemas.arrays import Floats, Integers, Mask

SIMILARITY = 0.48
"""Least mean cosine within a person: docs/decisions/0041."""
NEIGHBOURS = 32
_EXACT = 10_000
"""So few vectors are compared each with each."""
_CELLS, _PROBED, _TRAINED = 4, 24, 48
"""Cells of the index: 4 x the square root of the number of vectors; how many of them are searched; vectors per cell
that decide where it lies."""
_QUERIES = 1 << 14
_MOST = 4000
"""Photos whose similarities are held at a time, each with each: 256 MB. More of them that hang together are parted."""
_STRICTER = 0.05
_LOOSER = 0.08
"""How much lower the mean cosine of one that linkage left alone may be."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of vectors, each once and in order."""

    one: Integers
    """The smaller number of each pair."""
    other: Integers
    cosine: Floats

    def where(self, mask: Mask) -> "Pairs":
        return Pairs(self.one[mask], self.other[mask], self.cosine[mask])


def mutual_neighbours(vectors: Floats, chosen: Integers, least: float) -> tuple[Pairs, Mask]:
    """Pairs of the `chosen` of (N, 512) unit vectors, with a cosine of at least `least`, each a nearest of the other.

    Also which of the chosen have more such neighbours than were looked at. The same vectors give the same pairs.
    """
    count, width = len(chosen), vectors.shape[1]
    index: Any = faiss.IndexFlatIP(width)
    if count > _EXACT:  # in half precision, in cells that a fixed seed decides
        cells = int(_CELLS * count**0.5)
        index = faiss.index_factory(width, f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.by_residual, index.nprobe = False, _PROBED
        index.cp.seed, index.cp.niter = 1, 6
        index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, _TRAINED
        some = np.random.default_rng(1).permutation(count)[: _TRAINED * cells]
        index.train(vectors[chosen[np.sort(some)]])
    for start in range(0, count, _QUERIES):
        index.add(vectors[chosen[start : start + _QUERIES]])
    ones, others, cosines, full = [], [], [], []
    for start in range(0, count, _QUERIES):
        cosine, near = index.search(vectors[chosen[start : start + _QUERIES]], NEIGHBOURS + 1)
        rows = np.arange(start, start + len(near))[:, None]
        good = (near >= 0) & (cosine >= least)
        full.append(good.all(axis=1))
        good &= near != rows
        ones.append(np.broadcast_to(rows, near.shape)[good])
        others.append(near[good])
        cosines.append(cosine[good])
    one, other, cosine = np.concatenate(ones), np.concatenate(others), np.concatenate(cosines)
    low, high = np.minimum(one, other), np.maximum(one, other)
    _, first, seen = np.unique(low * np.int64(count) + high, return_index=True, return_counts=True)
    first = first[seen == 2]
    return Pairs(chosen[low[first]], chosen[high[first]], cosine[first]), np.concatenate(full)


def persons(vectors: Floats, pairs: Pairs, least: float) -> Integers:
    """(N,) for each vector the smallest number of a vector of the same person, its own where it is alone.

    Vectors that pairs connect are one person as long as their mean cosine is at least `least`: average linkage. A poor
    photo, left alone though it has a pair, joins the person of its nearest one where the mean is nearly as high.
    """
    labels = np.arange(len(vectors))
    graph = coo_array((np.ones(len(pairs.one), bool), (pairs.one, pairs.other)), shape=(len(labels), len(labels)))
    _, component = connected_components(graph, directed=False)
    several = np.flatnonzero((np.bincount(component) > 1)[component])
    order = several[np.argsort(component[several], kind="stable")]
    for members in np.split(order, np.flatnonzero(np.diff(component[order])) + 1) if len(order) else ():
        if len(members) == 2:
            labels[members] = members[0]
        elif len(members) <= _MOST:
            wide = np.asarray(vectors[members], np.float64)
            near = wide @ wide.T
            distances = 1 - near
            np.fill_diagonal(distances, 0)
            np.fill_diagonal(near, -1)
            linked = fcluster(linkage(squareform(distances, checks=False), "average"), 1 - least, "distance")
            flat = linked.copy()
            for one in np.flatnonzero(np.bincount(linked)[linked] == 1):
                host = linked[near[one].argmax()]
                if near[one].max() >= least and near[one, linked == host].mean() >= least - _LOOSER:
                    flat[one] = host
            _, first, cluster = np.unique(flat, return_index=True, return_inverse=True)
            labels[members] = members[first[cluster]]
        else:  # so many are no person alone: what holds them together is parted at its weakest
            inner = pairs.where(np.isin(pairs.one, members))
            floor = float(inner.cosine.min()) + _STRICTER
            inner = inner.where(inner.cosine >= floor)
            lookup = Pairs(np.searchsorted(members, inner.one), np.searchsorted(members, inner.other), inner.cosine)
            labels[members] = members[persons(vectors[members], lookup, least)]
    return labels
