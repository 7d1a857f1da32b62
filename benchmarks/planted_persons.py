"""Planted persons for `group`: vectors of known persons, strangers, look-alikes, copies, and what is made of them."""

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset.finished.group.near_copies import SIDE, Looks, without_copies
from pipeline.dataset.finished.group.persons import SIMILARITY, persons
from schemas.arrays import Floats, Integers

if TYPE_CHECKING:
    from material import Material

WIDTH = 512
_CHUNK = 1 << 14


@dataclass(frozen=True)
class Planted:
    vectors: Floats
    looks: Looks
    person: Integers
    copies: int


def unit(vectors: Floats) -> Floats:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def planted(count: int, seed: int = 0) -> Planted:
    """`count` vectors of count / 10 persons, half as many strangers, count / 100 pairs of look-alikes, 5 % copies.

    A person has 2 to 40 photos; their cosines are about a number drawn from 0.35..0.85 for each person. The cosines of
    look-alikes are about one drawn from 0.35..0.45.
    """
    rng, number, twins = np.random.default_rng(seed), count // 10, count // 100

    def noise(rows: int) -> Floats:
        return unit(rng.normal(size=(rows, WIDTH)).astype(np.float32))

    centres = noise(number)
    photos = np.clip(1 + rng.geometric(1 / 9, number), 2, 40)
    within = rng.uniform(0.35, 0.85, number).astype(np.float32)
    one, other = 2 * np.arange(twins), 2 * np.arange(twins) + 1
    within[: 2 * twins] = np.maximum(within[: 2 * twins], 0.5)
    near = (rng.uniform(0.35, 0.45, twins) / np.sqrt(within[one] * within[other]))[:, None].astype(np.float32)
    across = noise(twins)
    across = unit(across - (across * centres[one]).sum(axis=1, keepdims=True) * centres[one])
    centres[other] = near * centres[one] + np.sqrt(1 - near**2) * across

    person = np.concatenate([np.repeat(np.arange(number), photos), number + np.arange(count // 2)])
    originals, copied = len(person), int(0.05 * len(person))
    source = np.concatenate([np.arange(originals), rng.choice(originals, copied, replace=False)])
    vectors = np.empty((len(source), WIDTH), np.float32)
    for start in range(0, len(source), _CHUNK):
        rows = source[start : start + _CHUNK]
        drawn = noise(len(rows))
        known = np.flatnonzero(person[rows] < number)
        who = person[rows[known]]
        share = within[who][:, None]
        drawn[known] = np.sqrt(share) * centres[who] + np.sqrt(1 - share) * drawn[known]
        vectors[start : start + _CHUNK] = unit(drawn)
        late = np.flatnonzero(np.arange(start, start + len(rows)) >= originals)
        vectors[start + late] = unit(vectors[rows[late]] + 0.15 * noise(len(late)))
    hashes = rng.integers(0, 2**64, (originals, 2), np.uint64)[source]
    hashes[originals:] ^= np.uint64(0b10001)
    faces = rng.integers(-127, 128, (originals, SIDE, SIDE), np.int8)[source]
    order = rng.permutation(len(source))
    looks = Looks(hashes[order], faces[order], np.zeros((len(order), 0), np.float32))
    return Planted(vectors[order], looks, person[source][order], copied)


def figures(count: int) -> dict[str, Any]:
    """What grouping planted persons comes to: cost, and quality by pairs of photos."""
    given = planted(count)
    before, begun = time.process_time(), time.perf_counter()
    worth = np.zeros(len(given.person), np.float32)
    copy_of, pairs = without_copies(given.vectors, given.looks, worth, SIMILARITY)
    got = persons(given.vectors, pairs, SIMILARITY)
    cost = {
        "photos": len(got),
        "cpu_s": round(time.process_time() - before, 1),
        "wall_s": round(time.perf_counter() - begun, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    stays = copy_of == np.arange(len(got))
    precision, recall = quality(given.vectors[stays], given.person[stays], got[stays])
    left_out = round(float((~stays).sum() / given.copies), 4)
    return {**cost, "precision": precision, "recall": recall, "copies_left_out": left_out}


def quality(vectors: Floats, person: Integers, got: Integers) -> tuple[float, float]:
    """The share of pairs in groups that are of one person, and of pairs of a person over SIMILARITY that are in one."""
    both = np.unique(np.stack([person, got]), axis=1, return_inverse=True)[1].ravel()
    precision = _pairs(both) / max(_pairs(got), 1)
    hit = total = 0
    order = np.argsort(person, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(person[order])) + 1):
        one, other = np.triu_indices(len(members), 1)
        near = (vectors[members] @ vectors[members].T)[one, other] >= SIMILARITY
        total += int(near.sum())
        hit += int((near & (got[members][one] == got[members][other])).sum())
    return round(precision, 5), round(hit / total, 4)


def _pairs(labels: npt.NDArray[Any]) -> int:
    counts = np.unique(labels, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def check(material: "Material", rounds: int) -> Iterator[dict[str, Any]]:
    """Grouping planted persons at three sizes, each in a process of its own."""
    for count in (500, 1000, 2000) if material.smoke else (50_000, 100_000, 200_000):
        with get_context("spawn").Pool(1) as pool:
            measured = pool.apply(figures, (count,))
        wanted = "precision 0.995, recall 0.90, 300 s, 4096 MiB" if count == 200_000 else ""
        yield {"part": f"group: {count:,} photos of {count // 10:,} persons", **measured, "wanted": wanted}
