"""Take-downs in finished shards: what is to be forgotten goes from tar, ledger, thumbnails and report for good.

There is no search by face, and there will be none: what goes is named by URL, site or file. A shard that loses rows is
made anew beside the old one. Its new manifest, under a name of its own, is the moment from which it counts: whoever is
killed before leaves the old shard as it was, whoever is killed after it leaves one that `forgotten.finish` makes whole.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.finished.hub.card import write_card
from pipeline.dataset.finished.report import REPORT, write_report
from pipeline.dataset.out.forgotten import NEW, finish, given_forms, load, row_forms, save
from pipeline.dataset.out.ledger import (
    LIVE,
    UNREADABLE,
    counts,
    funnel,
    read_dataset,
    read_ledger,
    read_manifest,
    read_manifests,
    shard_names,
    shards_folder,
    summary,
)
from pipeline.dataset.out.lost import lost_errors
from pipeline.dataset.out.output import Output, fingerprint, is_whole
from pipeline.dataset.out.takedowns import DROPS, Takedowns, blank, entries
from pipeline.dataset.source.metadata_files import parse_record
from pipeline.shared.files import AnyPath, Draft, parquet, write, writing
from pipeline.shared.tars import BROKEN, created, members, read
from schemas.columns import KEPT, LEDGER_SCHEMA, complete
from schemas.errors import CorruptShardError, LostError, OutputError
from schemas.shard import CARD, DATASET, EVENTS, dataset_text


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
        # Of a row that had a second chance, several shards may hold the key.
        rows, samples, shards = len(set(chain(*self.rows.values()))), sum(self.kept.values()), len(self.rows)
        many = ["" if count == 1 else "s" for count in (rows, shards)]
        return f"{rows:,} row{many[0]}, {samples:,} of them samples, in {shards:,} shard{many[1]}"


def forget(
    out: AnyPath,
    lists: Iterable[str | Path] = (),
    urls: Iterable[str] = (),
    domains: Iterable[str] = (),
    contents: Iterable[str] = (),
    files: Iterable[str] = (),
    *,
    dry_run: bool = False,
) -> Gone:
    """Forget in OUT what is wanted, now and in earlier calls; later runs into OUT will not fetch it again.

    Any part of the work may be interrupted: the same call goes on with it; so does a call that wants nothing more.
    `lists` are files (or URLs of these) of URLs and sha256; whatever else they hold is a site. `contents` are sha256 of
    image files, `files` names of those that needed no download.

    Raises:
        SourceError: when a list cannot be read.
        OutputError: when OUT is no dataset, cannot be written or is in use, for what is no URL, site or sha256, for a
            file that is in no row of a whole dataset, or when there is nothing at all.
        LostError: when OUT cannot be written any more.
        CorruptShardError: when the list of earlier take-downs, dataset.json or a manifest is damaged.
    """
    shards_folder(out)
    output = Output(out)
    if bare := [url for url in urls if "//" not in url]:  # it would match no row, and be remembered in vain
        raise OutputError(
            f"{bare[0]!r} is no URL: give it with its http://; an image that needed no download goes by --file, a "
            "site by --domain."
        )
    listed = [entry for path in lists for entry in entries(str(path))]
    urls, contents, domains = (
        [*given, *(text for kind, text in listed if kind == word)]
        for word, given in (("url", urls), ("sha256", contents), ("other", domains))
    )
    with nullcontext() if dry_run else output.locked():
        before = load(out)
        forgotten = before.adding(urls=urls, domains=domains, contents=contents, files=files)
        if not forgotten:
            raise OutputError("There is nothing to forget: give --url, --domain, --sha256, --file or --list.")
        if unknown := _in_no_row(out, [name for name in files if before.adding(files=[name]) != before]):
            is_grouped = "group" in read_dataset(out).get("plan", {}).get("settings", {})
            of_group = "; a dataset of `group` knows no PART of before: give the source_file alone, or --sha256"
            raise OutputError(
                f"No row of {out} has the file {min(unknown)!r}: give its source_file as the ledger has it, which "
                "begins below the folder of the images; a file with URLs, sites and sha256 goes by --list"
                f"{of_group if is_grouped else ''}."
            )
        if dry_run:
            return _matches(out, Takedowns(forgotten))[1]
        with writing(out):
            finish(out)
            output.clear()
            (out / LIVE).unlink(missing_ok=True)  # a run that was killed leaves it behind a URL, with names of hosts
            save(out, forgotten)  # first of all: whatever happens then, nothing of it is fetched again
        try:
            if (out / EVENTS).exists():  # no run may be writing to it: names of hosts go, and a line that is none
                records = filter(None, map(parse_record, (out / EVENTS).read_bytes().splitlines()))
                events = [{**one, **({"slowest_hosts": {}} if "slowest_hosts" in one else {})} for one in records]
                text = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in events)
                write(out / EVENTS, text.encode(errors="backslashreplace"))  # a path in it may be no Unicode
            return _take_down(out, Takedowns(forgotten))
        except OSError as error:
            raise LostError(
                f"{out} cannot be written any more ({error.strerror or error}): what is left is forgotten by the same "
                "call, once it can be."
            ) from error
        except OutputError as error:
            raise LostError(f"{str(error).rstrip('.')}, once all else was done: give the same call again.") from error


def _in_no_row(out: AnyPath, files: Sequence[str]) -> set[str]:
    """Names of image files that are in no row; none before a run came to its end, which may still meet them."""
    left = set(files) if files and "shards" in read_dataset(out) else set()
    for shard in shard_names(out) if left else ():
        try:
            ledger = read_ledger(out, shard, ("part", "source_file"))
        except CorruptShardError:  # they may be there
            return set()
        rows = zip(ledger["part"].to_pylist(), ledger["source_file"].to_pylist(), strict=True)
        there = {form for part, name in rows if name for form in row_forms(part, name)}
        left = {name for name in left if there.isdisjoint(given_forms(name))}
    return left


def take_down_listed(output: Output) -> Gone:
    """Take what is on the lists of `download.removed` out of the finished shards of a prepared OUT.

    Once for each state of the lists: the shards that a run makes later are made under its lists.

    Raises:
        LostError: when OUT cannot be written any more.
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
            rewrite(out, shard, complete)
        except CorruptShardError as error:
            del gone.rows[shard], gone.kept[shard]
            gone.damaged.append(str(error))
    try:
        dataset = read_dataset(out)
    except CorruptShardError as error:
        dataset = {}
        gone.damaged.append(str(error))
    try:
        if "shards" in dataset:  # the run came to its end: what the manifests add up to stands there
            write(out / DATASET, dataset_text({**dataset, **summary(read_manifests(out), out)}))
        counted = write_report(out) if (out / REPORT).exists() else None
        if (out / CARD).exists():
            write_card(out, counted or funnel(out))
    except CorruptShardError as error:
        (out / REPORT).unlink(missing_ok=True)  # it must not go on showing what is gone
        if "shards" in dataset:  # else a run goes on, and makes what is damaged anew
            gone.damaged = gone.damaged or [str(error)]
    return gone


def _matches(out: AnyPath, takedowns: Takedowns) -> tuple[Takedowns, Gone]:
    """The rows of all ledgers that must not be used. URLs of files that are to be forgotten are so from now on too."""
    while True:
        gone = Gone()
        urls: set[str] = set()
        for shard in shard_names(out):
            try:
                ledger = read_ledger(out, shard, ("key", "part", "url", "source_file", "sha256", "verdict"))
            except CorruptShardError as error:
                gone.damaged.append(str(error))
                continue
            rows = ledger.filter(pc.is_valid(takedowns.reasons(ledger)))
            if rows.num_rows:
                gone.rows[shard] = rows["key"].to_pylist()
                gone.kept[shard] = pc.sum(pc.equal(rows["verdict"], KEPT)).as_py()
            urls.update(ledger["url"].filter(pa.array(takedowns.forgotten.contents_in(ledger))).drop_null().to_pylist())
        if all(map(takedowns.forgotten.concerns_url, urls)):
            return takedowns, gone
        takedowns = replace(takedowns, forgotten=takedowns.forgotten.adding(urls=urls))


def rewrite(out: AnyPath, shard: str, takedowns: Takedowns) -> None:
    """Make a shard anew without the rows that must not be used.

    Raises:
        CorruptShardError: when it is not what its manifest says: a new one would sign the damage as whole.
    """
    shards = out / "shards"
    manifest = read_manifest(out, shard)
    for name, claimed in manifest.files.items():
        if not is_whole(shards / name, claimed):
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
