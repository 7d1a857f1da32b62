"""A finished shard made anew without the rows that must not be used, by `forget` and `download.removed`.

The new shard lies beside the old one until it is whole. Its new manifest, under a name of its own, is the moment from
which it counts: whoever is killed before leaves the old shard as it was, whoever is killed after it leaves one that
`forgotten.finish` makes whole.
"""

from collections.abc import Collection
from contextlib import closing, suppress
from dataclasses import replace
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.out.forgotten import NEW, finish
from pipeline.dataset.out.ledger import UNREADABLE, counts, read_manifest
from pipeline.dataset.out.output import fingerprint
from pipeline.dataset.out.takedowns import DROPS, Takedowns, blank
from pipeline.shared.files import AnyPath, Draft, parquet, write
from pipeline.shared.tars import BROKEN, created, members, read
from schemas.columns import KEPT, LEDGER_SCHEMA, complete
from schemas.errors import CorruptShardError


def rewrite(out: AnyPath, shard: str, takedowns: Takedowns) -> None:
    """Make a shard anew without the rows that must not be used.

    Raises:
        CorruptShardError: when it is not what its manifest says: a new one would sign the damage as whole.
    """
    shards = out / "shards"
    manifest = read_manifest(out, shard)
    for name, claimed in manifest.files.items():
        with suppress(OSError):
            if fingerprint(shards / name) == claimed:
                continue
        raise CorruptShardError(
            f"{name}: it is not what its manifest says, so nothing was taken out of its shard: remove the shard's "
            "files, and a rerun makes it anew without what must not be used"
        )
    ledger = complete(parquet(shards / f"{shard}.parquet").read())
    reasons = takedowns.reasons(ledger)
    rows = ledger.filter(pc.is_valid(reasons))
    thumbnails = out / "drops" / f"{shard}.parquet"
    try:
        pictures = parquet(thumbnails).read()
        others = pictures.filter(pc.invert(pc.is_in(pictures["key"], rows["key"].combine_chunks())))
    except FileNotFoundError:
        pass
    except UNREADABLE:  # it serves the report alone
        thumbnails.unlink()
    else:
        if others.num_rows < pictures.num_rows:
            _write_parquet(others, thumbnails)

    ledger = blank(ledger, reasons).combine_chunks().cast(LEDGER_SCHEMA)
    new = {name: shards / name for name in manifest.files}
    new[f"{shard}.parquet"] = shards / f"{NEW}{shard}.parquet"
    _write_parquet(ledger, new[f"{shard}.parquet"], compression="zstd")
    samples = set(rows["key"].filter(pc.equal(rows["verdict"], KEPT)).to_pylist())
    if samples:
        new[f"{shard}.tar"] = shards / f"{NEW}{shard}.tar"
        copy_without(shards / f"{shard}.tar", new[f"{shard}.tar"], samples)

    kept, dropped = counts(ledger["verdict"], [*manifest.dropped, *DROPS])
    files = {name: fingerprint(path) for name, path in new.items()}
    manifest = replace(manifest, kept=kept, dropped=dropped, files=files)
    write(shards / f"{NEW}{shard}.json", manifest.to_json().encode())  # from here on the new shard counts
    finish(out)


def _write_parquet(table: pa.Table, path: AnyPath, **options: Any) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    write(path, sink.getvalue().to_pybytes())


def copy_without(old: AnyPath, new: AnyPath, keys: Collection[str]) -> None:
    """Copy the bytes of a tar's samples, except those of `keys`; the result is what a writer makes without them.

    Raises:
        CorruptShardError: when it is no whole tar; names it.
    """
    try:
        with closing(Draft(new)) as draft:
            with old.open("rb") as source, closing(created(draft.stream)) as tar:
                for member in members(source):
                    if member.name.partition(".")[0] not in keys:
                        tar.addfile(member, BytesIO(read(source, member.offset_data, member.size)))
            draft.fsync()
            draft.publish()
    except BROKEN as error:
        raise CorruptShardError(f"{old.name}: not a readable tar: {error}") from error
