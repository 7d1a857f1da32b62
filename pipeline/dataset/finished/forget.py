"""Take-downs in finished shards: what is to be forgotten goes from tar, ledger, thumbnails and report for good.

There is no search by face, and there will be none: what goes is named by URL, site or file.
"""

import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.finished.hub.card import write_card
from pipeline.dataset.finished.report import REPORT, write_report
from pipeline.dataset.finished.rewrite import rewrite
from pipeline.dataset.out.forgotten import finish, load, save
from pipeline.dataset.out.ledger import (
    funnel,
    read_dataset,
    read_ledger,
    read_manifests,
    replaced,
    shard_names,
    shards_folder,
    summary,
)
from pipeline.dataset.out.lists import entries
from pipeline.dataset.out.lost import lost_errors
from pipeline.dataset.out.output import Output
from pipeline.dataset.out.takedowns import Takedowns
from pipeline.dataset.source.formats import parse_record
from pipeline.shared.files import AnyPath, write
from schemas.columns import KEPT
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
        rows, samples, shards = sum(map(len, self.rows.values())), sum(self.kept.values()), len(self.rows)
        return f"{rows:,} rows, {samples:,} of them samples, in {shards:,} shard{'' if shards == 1 else 's'}"


def forget(
    out: AnyPath,
    lists: Iterable[Path] = (),
    urls: Iterable[str] = (),
    domains: Iterable[str] = (),
    contents: Iterable[str] = (),
    files: Iterable[str] = (),
    *,
    dry_run: bool = False,
) -> Gone:
    """Forget in OUT what is wanted, now and in earlier calls; later runs into OUT will not fetch it again.

    Any part of the work may be interrupted: the same call goes on with it; so does a call that wants nothing more.

    Args:
        out: OUT of a `dataset` run.
        lists: files of URLs and sha256; whatever else they hold is a site.
        urls: of images.
        domains: sites.
        contents: sha256 of image files.
        files: names of image files that needed no download.
        dry_run: write nothing.

    Raises:
        SourceError: when a list cannot be read.
        OutputError: when OUT is no dataset, cannot be written or is in use, for what is no site or no sha256, or when
            there is nothing at all.
        LostError: when OUT cannot be written any more.
        CorruptShardError: when the list of earlier take-downs, dataset.json or a manifest is damaged.
    """
    shards_folder(out)
    output = Output(out)
    listed = [entry for path in lists for entry in entries(str(path))]
    urls, contents, domains = (
        [*given, *(text for kind, text in listed if kind == word)]
        for word, given in (("url", urls), ("sha256", contents), ("other", domains))
    )
    with nullcontext() if dry_run else output.locked():
        forgotten = load(out).adding(urls=urls, domains=domains, contents=contents, files=files)
        if not forgotten:
            raise OutputError("There is nothing to forget: give --url, --domain, --sha256, --file or --list.")
        if dry_run:
            return _matches(out, Takedowns(forgotten))[1]
        try:
            finish(out)
            output.clear()
            save(out, forgotten)  # first of all: whatever happens then, nothing of it is fetched again
        except OSError as error:
            raise OutputError(f"{out} cannot be written: {error.strerror or error}.") from error
        try:
            if (out / EVENTS).exists():  # no run may be writing to it: names of hosts go, and a line that is none
                records = filter(None, map(parse_record, (out / EVENTS).read_bytes().splitlines()))
                events = [{**one, **({"slowest_hosts": {}} if "slowest_hosts" in one else {})} for one in records]
                write(out / EVENTS, "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in events).encode())
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
    dataset = read_dataset(out)
    if "shards" in dataset:  # the run came to its end: what the manifests add up to stands there
        write(out / DATASET, dataset_text({**dataset, **summary(read_manifests(out), replaced(out))}))
    try:
        counted = write_report(out) if (out / REPORT).exists() else None
        if (out / CARD).exists():
            write_card(out, counted or funnel(out), read_manifests(out))
    except CorruptShardError:  # it must not go on showing what is gone
        (out / REPORT).unlink(missing_ok=True)
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
