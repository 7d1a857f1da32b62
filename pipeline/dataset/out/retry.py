"""Second chances: rows whose fetch failed for a reason that may have passed, fetched again into further shards.

A round gives each such row of a part one more chance, in shards `<part>-r<round>_<NNNNN>`. The shards before it stay as
they are: of a row that several ledgers hold, the one of the last round counts. A round that was interrupted is gone on
with before another begins, and the rows of each of its shards follow from the ledgers before it alone.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.out.ledger import Rounds, read_ledger, shard_names
from pipeline.dataset.out.output import Output
from pipeline.dataset.out.takedowns import short_hashes
from pipeline.dataset.source.parts import Part, SourceSettings
from pipeline.dataset.source.seeds import Seeds, iter_again
from pipeline.shared.files import AnyPath
from schemas.arrays import Integers
from schemas.errors import SourceError
from schemas.names import shard_origin
from stages.fetch.answer import SECOND_CHANCE

_NO_ROWS: Integers = np.zeros(0, np.int64)


def second_chances(
    parts: Sequence[Part],
    settings: SourceSettings,
    out: AnyPath,
    is_done: Callable[[str], bool],
    expect: Callable[[int], None],
) -> Iterator[Iterator[Seeds]]:
    """The rows of some parts that get another chance now, part by part, in shards that are not done yet.

    `expect` is called with the number of them before those of a part come.

    Raises:
        SourceError: when a part does not hold the rows any more that OUT was made of.
        CorruptShardError: when a ledger cannot be read.
    """
    shards = shard_names(out)
    rounds, by_part = Rounds(out, shards), defaultdict[str, list[str]](list)
    for name in shards:
        by_part[shard_origin(name)[0]].append(name)
    for part in parts:
        yield _of_part(part, settings, out, rounds, by_part[part.name], is_done, expect)


def _of_part(
    part: Part,
    settings: SourceSettings,
    out: AnyPath,
    rounds: Rounds,
    own: Sequence[str],
    is_done: Callable[[str], bool],
    expect: Callable[[int], None],
) -> Iterator[Seeds]:
    """Those of a part, whose finished shards are `own`, and which must still be the one that OUT was made of."""
    last = rounds.last(part.name)
    for round in range(max(last, 1), last + 2):
        done = {
            name: read_ledger(out, name, ("row",))["row"].to_numpy()
            for name in own
            if shard_origin(name)[1] == round and is_done(name)
        }
        # The rows whose last verdict before the round is a transient failure.
        tables = [pa.table({"row": pa.array([], pa.int64()), "url": pa.array([], pa.string())})]
        for name in (name for name in own if shard_origin(name)[1] < round):
            ledger = read_ledger(out, name, ("row", "url", "verdict"))
            is_last = pa.array(~rounds.replaced(name, ledger["row"], round))
            failed = pc.is_in(ledger["verdict"], pa.array(sorted(map(str, SECOND_CHANCE))))
            tables.append(ledger.filter(pc.and_(failed, is_last)).select(["row", "url"]))
        table = pa.concat_tables(tables).sort_by("row")
        rows, urls = table["row"].to_numpy(), short_hashes(url or "" for url in table["url"].to_pylist())
        left = ~np.isin(rows, np.concatenate([_NO_ROWS, *done.values()]))
        if left.any():
            break
    else:
        return
    expect(int(left.sum()))
    count = 0
    for seeds in iter_again(part, settings, rows, round):
        numbers = seeds.table["row"].to_numpy()
        count += len(numbers)
        given = short_hashes(url or "" for url in seeds.table["url"].to_pylist())
        if not np.array_equal(urls[np.searchsorted(rows, numbers)], given):
            raise SourceError(f"{part.path} holds other URLs than OUT was made of: give the file that OUT was made of.")
        # A take-down in between moves the borders: some rows may stand in another finished shard of the round.
        others = np.concatenate([_NO_ROWS, *(held for name, held in done.items() if name != seeds.name)])
        rest = seeds.table.filter(pa.array(~np.isin(numbers, others)))
        if seeds.name not in done and rest.num_rows:
            yield replace(seeds, table=rest)
    if count < len(rows):
        raise SourceError(f"{part.path} has fewer rows than OUT was made of: give the file that OUT was made of.")


def discard(output: Output, further: Sequence[str], seeds: Seeds) -> None:
    """Remove those of the `further` shards that hold rows of a shard which is about to be made (anew)."""
    rows = seeds.table["row"].to_numpy()
    for name in further:
        if shard_origin(name)[0] == seeds.part:
            held = read_ledger(output.root, name, ("row",))["row"].to_numpy()
            if np.isin(held, rows).any():
                output.remove(name)
