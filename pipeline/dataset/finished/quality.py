"""Which measure of quality is of use: errors of recognition after the worst photos by it were discarded.

Error-versus-discard curves (Grother and Tabassi, TPAMI 2007) where persons are known, which `group` writes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.table import Table

from pipeline.dataset.finished.replay import floats, ledgers, posed
from pipeline.dataset.out.ledger import shard_names
from pipeline.shared.files import AnyPath
from pipeline.shared.tars import samples
from schemas.arrays import Doubles, Floats, Integers, Mask
from schemas.columns import KEPT
from schemas.errors import CorruptShardError, OutputError
from schemas.shard import decode_npy
from stages.filter import FROM_POINTS, QUALITIES

DISCARDED = (0.0, 0.1, 0.3)
_DRAWN = tuple(share / 100 for share in range(0, 55, 5))
_BLOCKS = "▁▂▃▄▅▆▇█"
_FACE_SIZE = "face_px"
"""What every photo is judged by already: other measures have to say more."""
_MEASURES = tuple(dict.fromkeys([_FACE_SIZE, *(one.measure for one in QUALITIES if one.measure != "ai_mark")]))
_SIDES = {name: {one.is_least for one in QUALITIES if one.measure == name} or {True} for name in _MEASURES}
_MOST = 3000
"""Photos that are compared, each with each."""


@dataclass(frozen=True)
class Faces:
    """N photos of known persons, in random order."""

    persons: Integers
    vectors: Floats
    """(N, 512), of unit length."""
    goodness: dict[str, Doubles]
    """Measure -> (N,), larger is better; NaN where it was not measured."""

    @cached_property
    def pairs(self) -> tuple[Integers, Integers, Mask, Floats]:
        """All pairs (P,): the numbers of both, whether they show one person, and the cosine of their vectors."""
        one, other = np.triu_indices(len(self.persons), 1)
        cosine: Floats = (self.vectors @ self.vectors.T)[one, other]
        return one.astype(np.int64), other.astype(np.int64), np.equal(self.persons[one], self.persons[other]), cosine


@dataclass(frozen=True)
class Curve:
    """Errors after DISCARDED shares of the photos were left out, the worst first."""

    missed: list[float]
    """Share of pairs of one person under the similarity."""
    mistaken: list[float]
    """Share of pairs of two persons at or over it."""
    drawn: list[float]
    """As `missed`, after 0 to 50 % were left out; NaN where no pair of one person is left."""
    photos: int


def read_faces(out: AnyPath) -> Faces:
    """The first 3,000 photos of the dataset.

    Raises:
        OutputError: when persons or ID vectors are not known, or no person has two photos.
        CorruptShardError: names a file that cannot be read.
    """
    columns = ("key", "person", "kps", *(name for name in _MEASURES if name not in FROM_POINTS))
    tables: list[pa.Table] = []
    vectors: list[Floats] = []
    shards = shard_names(out)  # once: another run may finish more meanwhile
    for shard, ledger in zip(shards, ledgers(out, columns, shards), strict=True):
        rows = ledger.filter(pc.and_(pc.equal(ledger["verdict"], KEPT), pc.is_valid(ledger["person"])))
        rows = rows.slice(0, _MOST - len(vectors))
        if rows.num_rows:
            tar = out / "shards" / f"{shard}.tar"
            files = dict(samples(tar, wish=lambda suffix: suffix == "arcface.npy"))
            try:
                own = [cast(bytes, files[key]["arcface.npy"]) for key in rows["key"].to_pylist()]
                vectors += [decode_npy(data).reshape(512) for data in own]
            except KeyError as error:
                raise OutputError(f"{tar} has no ID vectors (pack.embeddings = false).") from error
            except (ValueError, CorruptShardError) as error:
                raise CorruptShardError(f"{tar}: an arcface.npy is no ID vector ({error})") from error
            tables.append(rows)
        if len(vectors) == _MOST:
            break
    if not tables:
        raise OutputError(
            f"{out} has no photos of known persons: give what `python -m pipeline group {out} --out NEW` makes of it."
        )
    order = np.random.default_rng(0).permutation(len(vectors))
    table = pa.concat_tables(tables).take(pa.array(order))
    persons = table["person"].to_numpy()
    if len(set(persons.tolist())) == len(persons):
        raise OutputError(f"No person in {out} has two photos, so nothing can be compared.")
    by_points = posed(table["kps"], np.ones(len(persons), bool))
    goodness = {}
    for name in _MEASURES:  # as thresholds have it; of what has a least and a most, nearness to the median
        values = by_points[name] if name in by_points else floats(table[name])
        if len(_SIDES[name]) == 2 and np.isfinite(values).any():
            values = -abs(values - np.nanmedian(values))
        goodness[name] = -abs(values) if _SIDES[name] == {False} else values
    return Faces(persons, np.stack(vectors)[order], goodness)


def curve(faces: Faces, name: str, similarity: float) -> Curve | None:
    """The errors by one measure, over the photos of which it is known; None where these leave too few pairs."""
    known = np.flatnonzero(np.isfinite(faces.goodness[name]))
    rank = np.full(len(faces.persons), -1)
    rank[known[np.argsort(faces.goodness[name][known], kind="stable")]] = np.arange(len(known))
    one, other, same, cosine = faces.pairs
    first, alike = np.minimum(rank[one], rank[other]), cosine >= similarity

    def left(pairs: Mask) -> Doubles:
        """(n + 1,) how many of these pairs are left after 0 to n photos went, the worst first."""
        gone = np.bincount(first[pairs & (first >= 0)], minlength=len(known) + 1)
        return np.cumsum(gone[::-1], dtype=np.float64)[::-1]

    with np.errstate(invalid="ignore"):  # 0 / 0 where no pair is left
        missed, mistaken = left(same & ~alike) / left(same), left(~same & alike) / left(~same)
    at, drawn = ([round(share * len(known)) for share in shares] for shares in (DISCARDED, _DRAWN))
    if not np.isfinite([missed[at], mistaken[at]]).all():
        return None
    return Curve(missed[at].tolist(), mistaken[at].tolist(), missed[drawn].tolist(), len(known))


def judgement(one: Curve, size: Curve) -> str:
    """Whether a measure leaves fewer pairs missed than the size of the face, by more than twice the standard error."""
    mean, least = (float(np.mean(which.missed[1:])) for which in (one, size))
    spread = 2 * np.sqrt(max(least * (1 - least), 1e-12) / one.photos)
    return "better" if mean < least - spread else "worse" if mean > least + spread else "no better"


def drawing(values: Sequence[float], most: float) -> str:
    """A curve as a line of blocks, the full ones at `most`, and nothing where a value is NaN."""
    steps = (len(_BLOCKS) - 1) / max(most, 1e-12)
    return "".join(" " if np.isnan(value) else _BLOCKS[round(value * steps)] for value in values)


def lines(out: AnyPath, similarity: float) -> Iterator[str | Table]:
    """What `quality` says of OUT; raises what `read_faces` raises."""
    faces = read_faces(out)
    yield f"{len(faces.persons):,} photos of {len(set(faces.persons.tolist())):,} persons."
    yield (
        f"Errors at a cosine of {similarity:g}: % of the pairs of one person that are under it / % of the pairs of two "
        "persons that are not; of all photos, and without the worst 10 % and 30 % by each measure."
    )
    without = [f"all but {100 * share:.0f} %" if share else "all photos" for share in DISCARDED]
    table = Table("measure", *without, "than size", box=box.ASCII)
    drawn = Table("measure", "curve", "from, to", box=box.ASCII)
    curves = {name: curve(faces, name, similarity) for name in _MEASURES}
    size = curves[_FACE_SIZE]
    most = max((np.nanmax(one.drawn) for one in curves.values() if one), default=0.0)
    better = []
    for name, one in curves.items():
        if one is None or size is None:
            is_measured = np.isfinite(faces.goodness[name]).any()
            table.add_row(name, "too few pairs" if is_measured else "not measured")
            continue
        cells = [f"{100 * a:.2f} / {100 * b:.3f}" for a, b in zip(one.missed, one.mistaken, strict=True)]
        word = "" if name == _FACE_SIZE else judgement(one, size)
        better += [name] if word == "better" else []
        table.add_row(name, *cells, word)
        last = next(value for value in reversed(one.drawn) if not np.isnan(value))  # beyond it no pair is left
        drawn.add_row(name, drawing(one.drawn, most), f"{100 * one.drawn[0]:.2f} %, {100 * last:.2f} %")
    yield table
    if drawn.row_count:
        yield "The pairs of one person that are under it, as the worst 0 to 50 % of the photos are left out:"
        yield drawn
    if size and not any(size.missed):
        yield "Every pair of one person is recognised: on more, or poorer, photos the measures would differ."
    else:
        yield f"Of more use than the size of the face, by two standard errors: {', '.join(better) or 'none'}."
    yield "Persons that `group` made are groups by these vectors: photos that it did not recognise are missing here."
