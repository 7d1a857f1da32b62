"""Take-downs in finished shards: what is to be forgotten goes from tar, ledger, thumbnails and report for good.

A shard is rewritten beside itself. Its new manifest under a name of its own is the moment from which the new shard
counts: whoever is killed before it leaves the old shard as it was, whoever is killed after it leaves one that `finish`
makes whole. There is no search by face, and there will be none: what goes is named by URL, site or file.
"""

import json
import tarfile
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.finished.report import REPORT, write_report
from pipeline.dataset.out.forgotten import NEW, Forgotten, finish, load, save
from pipeline.dataset.out.ledger import (
    UNREADABLE,
    counts,
    read_ledger,
    read_manifest,
    read_manifests,
    replaced,
    shard_names,
    shards_folder,
    summary,
)
from pipeline.dataset.out.lists import entries
from pipeline.dataset.out.lost import lost_errors
from pipeline.dataset.out.output import Output, fingerprint
from pipeline.dataset.out.takedowns import DROPS, Takedowns, blank
from pipeline.shared.files import AnyPath, Draft, parquet, write
from pipeline.shared.tars import BROKEN, members
from schemas.columns import KEPT, LEDGER_SCHEMA
from schemas.errors import CorruptShardError, LostError, OutputError
from schemas.shard import DATASET, Manifest

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Wanted:
    """What the user wants forgotten; nothing means: what was wanted before."""

    urls: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()
    """sha256 of image files."""

    @staticmethod
    def listed(path: Path) -> "Wanted":
        """The URLs and sha256 in a list; whatever else it holds is a site.

        Raises:
            SourceError: when it cannot be read.
        """
        texts: dict[str, list[str]] = {"url": [], "other": [], "sha256": []}
        for kind, text in entries(str(path)):
            texts[kind].append(text)
        return Wanted(*map(tuple, texts.values()))

    def __add__(self, other: "Wanted") -> "Wanted":
        return Wanted(self.urls + other.urls, self.domains + other.domains, self.contents + other.contents)

    def added_to(self, known: Forgotten) -> Forgotten:
        """What was to be forgotten before, and this.

        Raises:
            OutputError: for what is no site or no sha256, or when there is nothing at all.
        """
        forgotten = known.and_urls(self.urls).and_domains(self.domains).and_contents(self.contents)
        if not forgotten:
            raise OutputError("There is nothing to forget: give --url, --domain, --sha256 or --list.")
        return forgotten


@dataclass
class Gone:
    """What was (or would be) taken out of finished shards."""

    rows: dict[str, list[str]] = field(default_factory=dict)
    """Shard -> keys of its rows."""
    kept: dict[str, int] = field(default_factory=dict)
    """Shard -> how many of them were samples."""
    damaged: list[str] = field(default_factory=list)
    """Sentences on shards that could not be read or rewritten."""

    def __str__(self) -> str:
        rows, samples, shards = sum(map(len, self.rows.values())), sum(self.kept.values()), len(self.rows)
        return f"{rows:,} rows, {samples:,} of them samples, in {shards:,} shard{'' if shards == 1 else 's'}"

    def fail(self, shard: str, error: CorruptShardError) -> None:
        """Leave a damaged shard out."""
        self.rows.pop(shard, None)
        self.kept.pop(shard, None)
        self.damaged.append(str(error))


def forget(out: AnyPath, wanted: Wanted, *, dry_run: bool = False) -> Gone:
    """Forget in OUT what is wanted, now and in earlier calls; later runs into OUT will not fetch it again.

    Any part of the work may be interrupted: the same call goes on with it.

    Raises:
        OutputError: when OUT is no dataset, cannot be written or is in use, or `wanted` makes no sense.
        LostError: when OUT cannot be written any more on the way.
        CorruptShardError: when the list of earlier take-downs, dataset.json or a manifest is damaged.
    """
    shards_folder(out)
    if dry_run:
        return _matches(out, Takedowns(wanted.added_to(load(out))))[1]
    output = Output(out)
    with output.locked():
        forgotten = wanted.added_to(load(out))
        try:
            finish(out)
            output.clear()
            save(out, forgotten)  # first of all: whatever happens then, nothing of it is fetched again
        except OSError as error:
            raise OutputError(f"{out} cannot be written: {error.strerror or error}.") from error
        try:
            return _take_down(out, Takedowns(forgotten))
        except OSError as error:
            raise LostError(
                f"{out} cannot be written any more ({error.strerror or error}): what is left is forgotten by the same "
                "call, once it can be."
            ) from error


def take_down_listed(output: Output) -> Gone:
    """Take what is on the lists of `download.removed` out of the finished shards of a prepared OUT.

    Once for each state of the lists: the shards that a run makes later are made under its lists.

    Raises:
        LostError: when OUT cannot be written any more on the way.
        CorruptShardError: when a finished shard is damaged; the others are done.
    """
    out, takedowns = output.root, output.takedowns
    gone = Gone()
    if takedowns.listed.digest == takedowns.forgotten.lists:
        return gone
    with lost_errors(out):
        if takedowns.listed:
            gone = _take_down(out, takedowns)
        if gone.damaged:
            raise CorruptShardError("; ".join(gone.damaged))
        save(out, replace(load(out), lists=takedowns.listed.digest))
    return gone


def _take_down(out: AnyPath, takedowns: Takedowns) -> Gone:
    complete, gone = _matches(out, takedowns)
    if complete.forgotten != takedowns.forgotten:
        save(out, complete.forgotten)
    for shard in list(gone.rows):
        try:
            _rewrite(out, shard, complete)
        except CorruptShardError as error:
            gone.fail(shard, error)
    try:
        dataset = json.loads((out / DATASET).read_bytes())
        if "shards" in dataset:  # the run has come to its end, and said what the manifests add up to
            dataset |= summary(read_manifests(out), replaced(out))
            write(out / DATASET, (json.dumps(dataset, indent=2, sort_keys=True) + "\n").encode())
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CorruptShardError(f"{DATASET}: cannot be read: {error}") from error
    if (out / REPORT).exists():
        try:
            write_report(out)
        except CorruptShardError:  # it must not go on showing what is gone
            (out / REPORT).unlink()
    return gone


def _matches(out: AnyPath, takedowns: Takedowns) -> tuple[Takedowns, Gone]:
    """The rows of all ledgers that must not be used. URLs of files that are to be forgotten are so from now on too."""
    while True:
        gone = Gone()
        urls: set[str] = set()
        for shard in shard_names(out):
            try:
                ledger = read_ledger(out, shard, ("key", "url", "sha256", "verdict"))
            except CorruptShardError as error:
                gone.fail(shard, error)
                continue
            rows = ledger.filter(pc.is_valid(takedowns.reasons(ledger)))
            if rows.num_rows:
                gone.rows[shard] = rows["key"].to_pylist()
                gone.kept[shard] = pc.sum(pc.equal(rows["verdict"], KEPT)).as_py()
            urls.update(ledger["url"].filter(pa.array(takedowns.forgotten.contents_in(ledger))).drop_null().to_pylist())
        if all(map(takedowns.forgotten.concerns_url, urls)):
            return takedowns, gone
        takedowns = replace(takedowns, forgotten=takedowns.forgotten.and_urls(urls))


def _rewrite(out: AnyPath, shard: str, takedowns: Takedowns) -> None:
    """Make a shard anew without the rows that must not be used.

    Raises:
        CorruptShardError: when it is not what its manifest says: a new one would sign the damage as whole.
    """
    shards = out / "shards"
    manifest = read_manifest(out, shard)
    for name, claimed in manifest.files.items():
        try:
            whole = fingerprint(shards / name) == claimed
        except OSError:
            whole = False
        if not whole:
            raise CorruptShardError(
                f"{name}: it is not what its manifest says, so nothing was taken out of its shard: remove the shard's "
                "files, and a rerun makes it anew without what must not be used"
            )
    ledger = parquet(shards / f"{shard}.parquet").read()
    reasons = takedowns.reasons(ledger)
    rows = ledger.filter(pc.is_valid(reasons))
    _remove_thumbnails(out / "drops" / f"{shard}.parquet", rows["key"])

    ledger = blank(ledger, reasons).combine_chunks().cast(LEDGER_SCHEMA)
    new = {name: shards / name for name in manifest.files}
    new[f"{shard}.parquet"] = shards / f"{NEW}{shard}.parquet"
    _write_parquet(ledger, new[f"{shard}.parquet"], compression="zstd")
    samples = set(rows["key"].filter(pc.equal(rows["verdict"], KEPT)).to_pylist())
    if samples:
        new[f"{shard}.tar"] = shards / f"{NEW}{shard}.tar"
        _copy_tar(shards / f"{shard}.tar", new[f"{shard}.tar"], samples)

    kept, dropped = counts(ledger["verdict"], [*manifest.dropped, *DROPS])
    files = {name: fingerprint(path) for name, path in new.items()}
    fields: dict[str, Any] = {**vars(manifest), "kept": kept, "dropped": dropped, "files": files}
    write(shards / f"{NEW}{shard}.json", Manifest(**fields).to_json().encode())  # from here on the new shard counts
    finish(out)


def _write_parquet(table: pa.Table, path: AnyPath, **options: Any) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    write(path, sink.getvalue().to_pybytes())


def _remove_thumbnails(path: AnyPath, keys: pa.ChunkedArray) -> None:
    """Remove pictures of dropped photos. The file serves the report alone: an unreadable one goes as a whole."""
    try:
        table = parquet(path).read()
        left = table.filter(pc.invert(pc.is_in(table["key"], keys.combine_chunks())))
    except FileNotFoundError:
        return
    except UNREADABLE:
        path.unlink()
        return
    if left.num_rows < table.num_rows:
        _write_parquet(left, path)


def _copy_tar(old: AnyPath, new: AnyPath, keys: set[str]) -> None:
    """Copy the bytes of all other samples; what comes out is what would have been written without these keys."""
    try:
        with closing(Draft(new)) as draft:
            with old.open("rb") as source:
                for member in members(source):
                    if member.name.partition(".")[0] in keys:
                        continue
                    position, end = member.offset, member.offset_data + member.size
                    end += -end % tarfile.BLOCKSIZE
                    source.seek(position)
                    while position < end:
                        piece = source.read(min(_CHUNK, end - position))
                        if not piece:
                            raise EOFError("unexpected end of data")
                        draft.stream.write(piece)
                        position += len(piece)
            draft.stream.write(bytes(2 * tarfile.BLOCKSIZE))
            draft.stream.write(bytes(-draft.stream.tell() % tarfile.RECORDSIZE))
            draft.fsync()
            draft.publish()
    except BROKEN as error:
        raise CorruptShardError(f"{old.name}: not a readable tar: {error}") from error
