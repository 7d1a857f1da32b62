"""Second chances: rows whose fetch failed for a reason that may have passed, fetched again into further shards.

A round gives each such row of a part one more chance, in shards `<part>-r<round>_<NNNNN>`. The shards before it stay as
they are: of a row that several ledgers hold, the one of the last round counts. A round that was interrupted is gone on
with before another begins, and the rows of each of its shards follow from the ledgers before it alone.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.out.ledger import Rounds, read_ledger, shard_names
from pipeline.dataset.out.output import Output
from pipeline.dataset.source.parts import Part, SourceSettings
from pipeline.dataset.source.seeds import Seeds, iter_again
from pipeline.shared.files import AnyPath
from schemas.errors import SourceError
from schemas.names import shard_origin
from stages.fetch.base import SECOND_CHANCE

IsDone = Callable[[str], bool]


@dataclass(frozen=True)
class _Rows:
    """Rows of a part that failed, in order."""

    numbers: npt.NDArray[np.int64]
    urls: npt.NDArray[np.uint64]
    """Hashes of their URLs."""

    def without(self, numbers: npt.NDArray[np.int64]) -> "_Rows":
        left = ~np.isin(self.numbers, numbers)
        return _Rows(self.numbers[left], self.urls[left])


def second_chances(parts: Sequence[Part], settings: SourceSettings, out: AnyPath, is_done: IsDone) -> Iterator[Seeds]:
    """The rows of some parts that get another chance now, in shards that are not done yet.

    Raises:
        SourceError: when a part does not hold the rows any more that OUT was made of.
        CorruptShardError: when a ledger cannot be read.
    """
    names = shard_names(out)
    rounds = Rounds(out, names)
    for part in parts:
        own = [name for name in names if shard_origin(name)[0] == part.name]
        yield from _of_part(part, settings, out, own, rounds, is_done)


def _of_part(
    part: Part, settings: SourceSettings, out: AnyPath, shards: Sequence[str], rounds: Rounds, is_done: IsDone
) -> Iterator[Seeds]:
    round = rounds.last(part.name)
    done = {name: _numbers(out, name) for name in shards if round and shard_origin(name)[1] == round and is_done(name)}
    failed = _failed(out, shards, rounds, round) if round else None
    if failed is None or not len(failed.without(_joined(done.values())).numbers):
        round, done = round + 1, {}
        failed = _failed(out, shards, rounds, round)
    if not len(failed.numbers):
        return
    found = 0
    for seeds in iter_again(part, settings, failed.numbers, round):
        found += seeds.table.num_rows
        _require_same(part, seeds.table, failed)
        left = _without(seeds, [rows for name, rows in done.items() if name != seeds.name])
        if seeds.name not in done and left.table.num_rows:
            yield left
    if found < len(failed.numbers):
        raise SourceError(f"{part.path} has fewer rows than OUT was made of: give the file that OUT was made of.")


def _failed(out: AnyPath, shards: Sequence[str], rounds: Rounds, before: int) -> _Rows:
    """The rows of which the last that was said, before a round, is a transient failure."""
    reasons = pa.array(sorted(map(str, SECOND_CHANCE)))
    tables = []
    for name in shards:
        if shard_origin(name)[1] < before:
            ledger = read_ledger(out, name, ("row", "url", "verdict"))
            chosen = pc.and_(
                pc.is_in(ledger["verdict"], reasons), pa.array(~rounds.replaced(name, ledger["row"], before))
            )
            tables.append(ledger.filter(chosen).select(["row", "url"]))
    if not tables:
        return _Rows(np.zeros(0, np.int64), np.zeros(0, np.uint64))
    table = pa.concat_tables(tables).sort_by("row")
    return _Rows(table["row"].to_numpy(), _hashes(table["url"]))


def _hashes(urls: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    texts = ((url or "").encode() for url in urls.to_pylist())
    return np.frombuffer(b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts), np.uint64)


def _numbers(out: AnyPath, shard: str) -> npt.NDArray[np.int64]:
    numbers: npt.NDArray[np.int64] = read_ledger(out, shard, ("row",))["row"].to_numpy()
    return numbers


def _joined(arrays: Iterable[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _without(seeds: Seeds, others: Sequence[npt.NDArray[np.int64]]) -> Seeds:
    """The rows that no other finished shard of the round holds: a take-down in between has moved the borders."""
    again = np.isin(seeds.table["row"].to_numpy(), _joined(others))
    return replace(seeds, table=seeds.table.filter(pa.array(~again))) if again.any() else seeds


def _require_same(part: Part, table: pa.Table, failed: _Rows) -> None:
    at = np.searchsorted(failed.numbers, table["row"].to_numpy())
    if not np.array_equal(failed.urls[at], _hashes(table["url"])):
        raise SourceError(f"{part.path} holds other URLs than OUT was made of: give the file that OUT was made of.")


def discard(output: Output, further: Sequence[str], seeds: Seeds) -> None:
    """Remove those of the `further` shards that hold rows of a shard which is about to be made (anew)."""
    rows = seeds.table["row"].to_numpy()
    for name in further:
        if shard_origin(name)[0] == seeds.part and np.isin(_numbers(output.root, name), rows).any():
            output.remove(name)
