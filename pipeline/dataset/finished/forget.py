"""`forget`: take-downs. Samples, ledger rows and thumbnails of what is to be forgotten go, and never come back.

A shard is rewritten beside itself. Its new manifest under a name of its own is the moment from which the new shard
counts: whoever is killed before it leaves the old shard as it was, whoever is killed after it leaves one that `finish`
makes whole. There is no search by face, and there will be none: what to forget is told by URL, site or file.
"""

import fcntl
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.finished.report import REPORT, write_report
from pipeline.dataset.out.forgotten import NEW, Forgotten, Mask, blank, finish, load, save
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
from pipeline.dataset.out.output import Output, fingerprint
from pipeline.shared.files import AnyPath, Draft, RemotePath, parquet, write
from pipeline.shared.tars import BROKEN, members
from schemas.columns import KEPT, LEDGER_SCHEMA
from schemas.drops import DropReason
from schemas.errors import CorruptShardError, LostError, OutputError
from schemas.shard import DATASET, Manifest

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Wanted:
    """What the user asks to forget; nothing means: what was asked for before."""

    urls: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()
    """sha256 of image files."""

    @staticmethod
    def listed(path: Path) -> "Wanted":
        """The lines of a file: URLs, sha256 and sites, each told by its form; empty lines and `#` are skipped.

        Raises:
            OutputError: when it cannot be read.
        """
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(f"The list {path} cannot be read: {error}.") from error
        lines = [line for line in lines if line and not line.startswith("#")]
        urls = tuple(line for line in lines if "://" in line)
        contents = tuple(line for line in lines if len(line) == 64 and "." not in line)
        return Wanted(urls, tuple(line for line in lines if line not in {*urls, *contents}), contents)

    def __add__(self, other: "Wanted") -> "Wanted":
        """Both."""
        return Wanted(self.urls + other.urls, self.domains + other.domains, self.contents + other.contents)

    def added_to(self, known: Forgotten) -> Forgotten:
        """What was to be forgotten before, and this.

        Raises:
            OutputError: for what is no site or no sha256.
        """
        return known.and_urls(self.urls).and_domains(self.domains).and_contents(self.contents)


@dataclass
class Gone:
    """What was (or would be) forgotten."""

    rows: dict[str, list[str]] = field(default_factory=dict)
    """Shard -> keys of its rows."""
    kept: dict[str, int] = field(default_factory=dict)
    """Shard -> how many of them were samples."""
    damaged: list[str] = field(default_factory=list)
    """Sentences on shards that could not be read or rewritten."""

    @property
    def count(self) -> int:
        """Rows in all."""
        return sum(map(len, self.rows.values()))

    @property
    def samples(self) -> int:
        """Samples in all."""
        return sum(self.kept.values())

    def fail(self, shard: str, error: CorruptShardError) -> None:
        """Leave a damaged shard out."""
        self.rows.pop(shard, None)
        self.kept.pop(shard, None)
        self.damaged.append(str(error))


def forget(out: AnyPath, wanted: Wanted, *, dry_run: bool = False) -> Gone:
    """Forget in OUT what `wanted` says, and what it was told before; later runs into OUT will not fetch it again.

    Any part of the work may be interrupted: the same call goes on with it.

    Raises:
        OutputError: when OUT is no dataset, cannot be written or is in use, or `wanted` makes no sense.
        LostError: when OUT cannot be written any more on the way.
        CorruptShardError: when the list of earlier take-downs, dataset.json or a manifest is damaged.
    """
    shards_folder(out)
    if dry_run:
        return _found(out, _asked(out, wanted))[1]
    with _held(out):
        forgotten = _asked(out, wanted)
        _begin(out, forgotten)
        try:
            return _forget(out, forgotten)
        except OSError as error:
            raise LostError(
                f"{out} cannot be written any more ({error.strerror or error}): what is left is forgotten by the same "
                "call, once it can be."
            ) from error


def _asked(out: AnyPath, wanted: Wanted) -> Forgotten:
    forgotten = wanted.added_to(load(out))
    if not forgotten:
        raise OutputError("There is nothing to forget: give --url, --domain, --sha256 or --list.")
    return forgotten


def _begin(out: AnyPath, forgotten: Forgotten) -> None:
    """Put the list down first of all: whatever happens then, nothing of it is fetched again."""
    try:
        finish(out)
        Output(out).clear()
        save(out, forgotten)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}.") from error


def _forget(out: AnyPath, forgotten: Forgotten) -> Gone:
    complete, gone = _found(out, forgotten)
    if complete != forgotten:
        save(out, complete)
    for shard, keys in list(gone.rows.items()):
        try:
            _rewrite(out, shard, keys)
        except CorruptShardError as error:
            gone.fail(shard, error)
    _summarise(out)
    _report(out)
    return gone


@contextmanager
def _held(out: AnyPath) -> Iterator[None]:
    """Hold OUT alone, as a run does; a remote one cannot be held."""
    if isinstance(out, RemotePath):
        yield
        return
    handle = os.open(out / "shards", os.O_RDONLY)
    try:
        _lock(handle, out)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"A run is writing to {out}: wait for it, or interrupt it, and forget then.") from None


def _found(out: AnyPath, forgotten: Forgotten) -> tuple[Forgotten, Gone]:
    """The rows of all ledgers that are to be forgotten; URLs of files that are, are so from now on too."""
    gone = Gone()
    more: set[str] = set()
    for shard in shard_names(out):
        try:
            ledger = read_ledger(out, shard, ("key", "url", "sha256", "verdict"))
        except CorruptShardError as error:
            gone.fail(shard, error)
            continue
        contents = forgotten.contents_in(ledger)
        mask = contents | forgotten.urls_in(ledger)
        if mask.any():
            rows = ledger.filter(pa.array(mask))
            gone.rows[shard] = rows["key"].to_pylist()
            gone.kept[shard] = pc.sum(pc.equal(rows["verdict"], KEPT)).as_py()
        more |= {url for url in ledger["url"].filter(pa.array(contents)).to_pylist() if not forgotten.concerns_url(url)}
    if not more - {None}:
        return forgotten, gone
    return _found(out, forgotten.and_urls(more - {None}))


def _rewrite(out: AnyPath, shard: str, keys: list[str]) -> None:
    """Make a shard anew without some of its rows."""
    shards = out / "shards"
    manifest = read_manifest(out, shard)
    for name, told in manifest.files.items():
        _require(shards / name, told)
    ledger = parquet(shards / f"{shard}.parquet").read()
    mask = np.asarray(pc.is_in(ledger["key"], pa.array(keys, pa.string())).to_numpy(zero_copy_only=False), bool)
    _forget_thumbnails(out / "drops" / f"{shard}.parquet", keys)
    _write_ledger(blank(ledger, mask), shards / f"{NEW}{shard}.parquet")
    if _lost_samples(ledger, mask):
        _copy_tar(shards / f"{shard}.tar", shards / f"{NEW}{shard}.tar", _lost_samples(ledger, mask))
    _commit(out, _recounted(out, manifest))
    finish(out)


def _require(path: AnyPath, told: dict[str, Any]) -> None:
    """Refuse to write a new manifest over damage that the old one would show."""
    try:
        whole = fingerprint(path) == told
    except OSError:
        whole = False
    if not whole:
        raise CorruptShardError(
            f"{path.name}: it is not what its manifest says, so nothing of its shard was forgotten: remove the shard's "
            "files, and a rerun makes it anew without what is to be forgotten"
        )


def _lost_samples(ledger: pa.Table, mask: Mask) -> set[str]:
    kept = pc.and_(pa.array(mask), pc.equal(ledger["verdict"], KEPT))
    return set(ledger["key"].filter(kept).to_pylist())


def _write_ledger(ledger: pa.Table, path: AnyPath) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(ledger.combine_chunks().cast(LEDGER_SCHEMA), sink, compression="zstd")
    write(path, sink.getvalue().to_pybytes())


def _copy_tar(old: AnyPath, new: AnyPath, keys: set[str]) -> None:
    """Copy the bytes of all other samples; what comes out is what would have been written without these keys."""
    try:
        with closing(Draft(new)) as draft:
            with old.open("rb") as source:
                for member in members(source):
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if member.name.partition(".")[0] not in keys:
                        _copy(source, draft.stream, member.offset, end)
            draft.stream.write(bytes(2 * tarfile.BLOCKSIZE))
            draft.stream.write(bytes(-draft.stream.tell() % tarfile.RECORDSIZE))
            draft.fsync()
            draft.publish()
    except BROKEN as error:
        raise CorruptShardError(f"{old.name}: not a readable tar: {error}") from error


def _copy(source: IO[bytes], target: IO[bytes], start: int, end: int) -> None:
    source.seek(start)
    while start < end:
        piece = source.read(min(_CHUNK, end - start))
        if not piece:
            raise EOFError("unexpected end of data")
        target.write(piece)
        start += len(piece)


def _recounted(out: AnyPath, manifest: Manifest) -> Manifest:
    """The manifest of the new files."""
    shards = out / "shards"
    new = {name: shards / f"{NEW}{name}" for name in manifest.files}
    files = {name: fingerprint(path) if path.exists() else manifest.files[name] for name, path in new.items()}
    verdicts = parquet(new[f"{manifest.shard}.parquet"]).read(columns=["verdict"])["verdict"]
    kept, dropped = counts(verdicts, list({**manifest.dropped, str(DropReason.FORGOTTEN): 0}))
    fields = {**vars(manifest), "kept": kept, "dropped": dropped, "files": files}
    return Manifest(**fields)


def _commit(out: AnyPath, manifest: Manifest) -> None:
    """From here on the new shard counts."""
    write(out / "shards" / f"{NEW}{manifest.shard}.json", manifest.to_json().encode())


def _forget_thumbnails(path: AnyPath, keys: list[str]) -> None:
    """Remove pictures of dropped photos. The file serves the report alone: an unreadable one goes as a whole."""
    try:
        table = parquet(path).read()
        left = table.filter(pc.invert(pc.is_in(table["key"], pa.array(keys, pa.string()))))
    except FileNotFoundError:
        return
    except UNREADABLE:
        path.unlink()
        return
    if left.num_rows < table.num_rows:
        sink = pa.BufferOutputStream()
        pq.write_table(left, sink)
        write(path, sink.getvalue().to_pybytes())


def _report(out: AnyPath) -> None:
    """Write the report anew where there is one; one that cannot be written must not show what is gone."""
    if (out / REPORT).exists():
        try:
            write_report(out)
        except CorruptShardError:
            (out / REPORT).unlink()


def _summarise(out: AnyPath) -> None:
    """Have dataset.json tell what the manifests add up to, where it told that before."""
    path = out / DATASET
    try:
        told = json.loads(path.read_bytes())
        finished = "shards" in told
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CorruptShardError(f"{DATASET}: cannot be read: {error}") from error
    if finished:
        text = json.dumps(told | summary(read_manifests(out), replaced(out)), indent=2, sort_keys=True) + "\n"
        write(path, text.encode())
