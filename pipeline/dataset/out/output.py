"""OUT, and the shards in it: each published whole, its manifest last. Same rows and plan, same bytes."""

import contextlib
import fcntl
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.out.forgotten import finish, load
from pipeline.dataset.out.ledger import counts, read_dataset, read_ledger
from pipeline.dataset.out.lost import lost_errors
from pipeline.dataset.out.takedowns import DROPS, Listed, Takedowns
from pipeline.dataset.plan import Plan
from pipeline.dataset.rows import Rows, tombstones
from pipeline.shared import tars
from pipeline.shared.atomic import TEMPORARY
from pipeline.shared.files import AnyPath, Draft, RemotePath, fsync_names, names, times, write, writing
from schemas.columns import KEPT, LEDGER_SCHEMA
from schemas.digest import sha256_of_stream
from schemas.errors import (
    CorruptShardError,
    LostError,
    OutputError,
    RemoteError,
    ShardError,
    SourceError,
    UserError,
    first_line,
)
from schemas.names import finished_shards, shard_origin
from schemas.shard import DATASET, PLAIN, SUFFIXES, Manifest, dataset_text, sample_files
from stages.pixels.images import thumbnail

_THUMBNAIL_PX = 256
_THUMBNAILS = pa.schema([("key", pa.string()), ("verdict", pa.string()), ("thumbnail", pa.binary())])


class Output:
    """The directory of a dataset: OUT/shards, OUT/drops and OUT/dataset.json."""

    def __init__(self, root: AnyPath) -> None:
        self.root = root
        self.shards = root / "shards"
        self.drops = root / "drops"
        self.takedowns = Takedowns()
        """What must not be used; known once OUT is prepared."""
        self.sources: list[str] = []
        """Where its rows come from (`Part.origin`), those of earlier runs among them, once OUT is prepared."""

    @contextlib.contextmanager
    def prepared(self, plan: Plan, *, replan: bool = False) -> Iterator[None]:
        """Create the directories, hold them alone for this run, and clear away what an interrupted run left.

        A remote OUT cannot be held: two runs into it would do the same work twice, and put the same bytes.

        Raises:
            OutputError: when OUT cannot be written, is in use by another run, or holds shards of another plan.
            SourceError: when a list of `download.removed` cannot be read.
            CorruptShardError: when the list of what is to be forgotten is damaged.
        """
        listed = Listed(plan.config.download.removed)
        with contextlib.ExitStack() as stack:
            before = None
            self.refuse_training_run()
            with writing(f"OUT {self.root}"):
                self.make_folders()
                stack.enter_context(self.locked())
                finish(self.root)
                self.takedowns = Takedowns(load(self.root), listed)
                self.refuse_other_plan(plan, replan=replan)
                self.clear()
                with contextlib.suppress(FileNotFoundError):
                    before = (self.root / DATASET).read_bytes()
                    self.sources = _sources(read_dataset(self.root), finished_shards(names(self.shards)))
                written = times(self.shards)
                if replan:
                    for shard in finished_shards(names(self.shards)):
                        with contextlib.suppress(CorruptShardError):  # it counts as not done
                            manifest = Manifest.from_json((self.shards / f"{shard}.json").read_bytes())
                            if manifest.plan_digest != plan.digest:
                                self.remove(shard)
                self.describe(plan, {})
            try:
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):  # of an OUT that is gone or read-only, which ended the run
                        self.clear()
            except (UserError, ImportError):  # models that do not load, for instance: nothing is to have been written
                if before is not None:
                    with contextlib.suppress(OSError):
                        if written and times(self.shards) == written:  # what it says still is so
                            write(self.root / DATASET, before)
                elif not names(self.shards):
                    (self.root / DATASET).unlink(missing_ok=True)
                    for folder in () if isinstance(self.root, RemotePath) else (self.shards, self.drops, self.root):
                        with contextlib.suppress(OSError):  # what is not empty holds files of others
                            Path(str(folder)).rmdir()
                raise

    def refuse_training_run(self) -> None:
        """Raises an OutputError where OUT is the folder of one, or no folder can be there."""
        with writing(f"OUT {self.root}"):
            is_run = (self.root / "run.json").exists() and (self.root / "metrics.jsonl").exists()
        if is_run:
            raise OutputError(f"{self.root} holds a training run, whose report this would replace: choose another OUT.")

    def make_folders(self) -> None:
        """Create the directories that are not there; a remote OUT has none."""
        with writing(f"OUT {self.root}"):
            for folder in () if isinstance(self.root, RemotePath) else (self.shards, self.drops):
                Path(str(folder)).mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold OUT alone; a remote one cannot be held."""
        if isinstance(self.root, RemotePath):
            yield
            return
        handle = os.open(str(self.shards), os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"Another run is writing to {self.root}: wait for it, or interrupt it.") from None
            yield
        finally:
            os.close(handle)

    def clear(self) -> None:
        """Remove temporary files: those of this run, or of one that was killed. A folder is none of ours."""
        if isinstance(self.root, RemotePath):
            return
        for folder in (self.root, self.shards, self.drops):
            for stray in folder.glob(f"{TEMPORARY}*"):
                if not stray.is_dir():
                    stray.unlink(missing_ok=True)

    def remove(self, shard: str) -> None:
        """Remove a shard, manifest first, so that no half of it ever counts as done."""
        for suffix in ("json", "tar", "parquet"):
            (self.shards / f"{shard}.{suffix}").unlink(missing_ok=True)
        (self.drops / f"{shard}.parquet").unlink(missing_ok=True)

    def refuse_other_plan(self, plan: Plan, *, replan: bool = False) -> None:
        """Check that OUT is new or was made under an equal plan."""
        try:
            if not (self.root / DATASET).exists():
                return
            before = read_dataset(self.root)
            identity: dict[str, Any] = before["plan"]
        except (CorruptShardError, OSError, KeyError) as error:
            raise OutputError(
                f"{self.root / DATASET} cannot be read ({first_line(error)}); choose another OUT."
            ) from error
        if before.get("plan_digest") == plan.digest or replan:
            return
        raise OutputError(
            f"{self.root} holds a dataset of another plan ({'; '.join(differences(identity, plan.identity))}): "
            "choose another OUT, or give --replan to make its shards anew."
        )

    def describe(self, plan: Plan, summary: dict[str, Any]) -> None:
        """Write dataset.json: the plan, and what the run came to."""
        content = {
            "schema_version": plan.identity["schema_version"],
            "profile": plan.config.profile,
            "plan_digest": plan.digest,
            "plan": plan.identity,
            **({"sources": self.sources} if self.sources else {}),
            **summary,
        }
        write(self.root / DATASET, dataset_text(content))

    def is_done(
        self, shard: str, plan: Plan, listed: Mapping[str, int] | None = None, rows_in: int | None = None
    ) -> bool:
        """Whether the shard has a manifest of this plan and files of the lengths that it names.

        `listed` is `files.sizes` of OUT/shards: over a network, one listing for many shards saves requests.
        `rows_in` are the rows that the part gives the shard now.

        Raises:
            SourceError: when it was made of another number of rows: borders differ, rows would be lost or doubled.
            LostError: when there is a manifest that cannot be read.
        """
        try:
            manifest = Manifest.from_json((self.shards / f"{shard}.json").read_bytes())
        except (FileNotFoundError, CorruptShardError):
            return False
        except OSError as error:
            trouble = error.strerror or first_line(error)
            raise LostError(
                f"{self.shards}/{shard}.json cannot be read ({trouble}), so nobody knows whether its shard is done: "
                "see to it, and the same command goes on."
            ) from error
        if listed is None:
            paths = [self.shards / name for name in manifest.files]
            listed = {path.name: path.stat().st_size for path in paths if path.is_file()}
        same = manifest.plan_digest == plan.digest
        done = same and all(listed.get(name) == entry["bytes"] for name, entry in manifest.files.items())
        if done and rows_in not in (None, manifest.rows_in):
            raise SourceError(
                f"{shard} was made of {manifest.rows_in:,} rows of its part, which gives it {rows_in:,} now: the part "
                "was changed, or is read otherwise; give the part that OUT was made of, or another OUT."
            )
        return done

    def require_same_files(self, shard: str, seeds: pa.Table) -> None:
        """Check that a finished shard was made of the files that its part gives it now; of rows with URLs is no check.

        Raises:
            SourceError: when files were added or removed, so that rows would be lost or doubled, or their kind changed.
        """
        is_of_one_kind = not any(source.startswith("made:") for source in self.sources)
        if seeds["source_file"].null_count == seeds.num_rows and is_of_one_kind:
            return
        ledger = read_ledger(self.root, shard, ("source_kind", "source_file"))
        for name in ledger.column_names:
            # Nulls are no evidence: rows of take-downs have them, and ledgers of earlier releases.
            row = pc.index(pc.not_equal(ledger[name], seeds[name]), True).as_py()
            if row >= 0:
                raise SourceError(
                    f"{shard} was made of {ledger[name][row]}, its part gives it {seeds[name][row]} in that row now: "
                    "give what OUT was made of, or another OUT."
                )


def by_part(files: Iterable[str]) -> defaultdict[str, set[str]]:
    """Part -> its shards that are finished, by the files of OUT/shards; those of second chances are none."""
    parts = defaultdict[str, set[str]](set)
    for shard in finished_shards(files):
        part, round = shard_origin(shard)
        parts[part].update(() if round else (shard,))
    return parts


def refuse_surplus(shards: Collection[str]) -> None:
    """Raises a SourceError where a part gives finished shards of its name no rows any more."""
    if shards:
        raise SourceError(
            f"{min(shards)} is finished, but its part gives it no rows any more: the part was changed, or is read "
            "otherwise; give the part that OUT was made of, or another OUT."
        )


def _sources(dataset: dict[str, Any], shards: list[str]) -> list[str]:
    """The origins in a dataset.json; without those that a run was given which was killed before it made a shard."""
    is_made = not {shard_origin(shard)[0] for shard in shards}.isdisjoint(dataset.get("planned", ()))
    sources: list[str] = dataset.get("sources", [])
    return sources if is_made else dataset.get("sources_before", sources)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if name == "models" and isinstance(old, list) and isinstance(new, list):  # a model by what it does and its name
            old, new = ({f"{one['task']} {one['name']}": one["sha256"][:12] for one in models} for models in (old, new))
        if isinstance(old, dict | None) and isinstance(new, dict | None):  # None where a plan has no such section
            yield from differences(old or {}, new or {}, f"{prefix}{name}.")
        elif old != new:
            label = f"{prefix}{name}".removeprefix("settings.")
            was, now_is = ("not set" if value is None else repr(value) for value in (old, new))
            yield label if isinstance(old, list) or isinstance(new, list) else f"{label} was {was}, is now {now_is}"


class ShardWriter:
    """Writes one shard, batch by batch, and publishes it whole; leaves nothing behind when it fails."""

    def __init__(self, output: Output, shard: str, plan: Plan) -> None:
        self._output, self._shard, self._plan = output, shard, plan
        self._ledgers: list[pa.Table] = []
        self._thumbnails: list[dict[str, Any]] = []
        self._pictured: Counter[str] = Counter()
        self._half_published = False
        with contextlib.ExitStack() as stack, lost_errors(output.root):
            self._tar_draft, self._ledger_draft = (
                stack.enter_context(contextlib.closing(Draft(self._path(suffix)))) for suffix in ("tar", "parquet")
            )
            self._drafts = stack.pop_all()
        self._tar = tars.created(self._tar_draft.stream)

    def _path(self, suffix: str) -> AnyPath:
        return self._output.shards / f"{self._shard}.{suffix}"

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk has failed the shard already
            self._tar.close()
        with contextlib.suppress(OSError):
            self._drafts.close()
        if self._half_published:
            with contextlib.suppress(OSError):
                # Interrupted right after the manifest got its name, it is whole, and others may have seen it.
                if not self._path("json").exists():
                    self._output.remove(self._shard)

    def add_tombstones(self, ledger: pa.Table) -> None:
        """Add ledger rows that were dropped before any batch was made."""
        self._ledgers.append(ledger)

    def add(self, rows: Rows) -> None:
        """Append the samples of the living rows, and all rows to the ledger."""
        names = PLAIN if self._plan.config.pack.layout == "plain" else {}
        for record in rows.alive.select(["key", *SUFFIXES.values()]).to_pylist():
            with lost_errors(self._output.root):
                tars.append(
                    self._tar, record["key"], {names.get(name, name): d for name, d in sample_files(record).items()}
                )
        verdicts = pa.array([KEPT] * rows.alive.num_rows, pa.string())
        self._ledgers += [rows.dead, tombstones(rows.alive, verdicts, self._plan.steps[-1].stage().name)]
        for record in rows.witnesses.to_pylist():
            verdict = record["verdict"]
            if self._pictured[verdict] < self._plan.config.report.drops_per_reason:
                # Reduced at once: photos at full size would pile up until the shard is done.
                small = thumbnail(record["image"], _THUMBNAIL_PX)
                if small is not None:
                    self._pictured[verdict] += 1
                    self._thumbnails.append({"key": record["key"], "verdict": verdict, "thumbnail": small})

    def publish(self, rows_in: int) -> Manifest:
        """Make the shard durable under its final names, the manifest last."""
        ledger = pa.concat_tables(self._ledgers).sort_by("row").combine_chunks()
        kept, dropped = counts(ledger.column("verdict"), [*self._plan.reasons, *DROPS])
        drafts = self._tar_draft, self._ledger_draft
        with lost_errors(self._output.root):
            self._tar.close()
            pq.write_table(ledger.cast(LEDGER_SCHEMA), self._ledger_draft.stream, compression="zstd")
            for draft in drafts:
                draft.fsync()
            manifest = Manifest(
                shard=self._shard,
                profile=self._plan.config.profile,
                plan_digest=self._plan.digest,
                rows_in=rows_in,
                kept=kept,
                dropped=dropped,
                models=self._plan.model_list,
                files={draft.target.name: fingerprint(draft.path) for draft in drafts},
            )
            if not manifest.conserves_rows() or pc.count_distinct(ledger.column("key")).as_py() != rows_in:
                raise ShardError(f"{self._shard}: {rows_in} rows in, but the ledger holds {ledger.num_rows}")
            self._half_published = True
            self._path("json").unlink(missing_ok=True)
            # Pictures of a few dropped photos, for the report: not part of the shard.
            pictures = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(self._thumbnails, schema=_THUMBNAILS), pictures)
            write(self._output.drops / f"{self._shard}.parquet", pictures.getvalue().to_pybytes())
            for draft in drafts:
                draft.publish()
            fsync_names(self._output.shards)
            write(self._path("json"), manifest.to_json().encode())
            self._half_published = False
        return manifest


def fingerprint(path: AnyPath) -> dict[str, Any]:
    """Length and sha256 of a file, as a manifest's `files` hold them."""
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": sha256_of_stream(stream)}


def is_whole(path: AnyPath, claimed: Mapping[str, Any]) -> bool:
    """Whether a file is there, and has the fingerprint that is claimed of it; a RemoteError where nobody knows."""
    try:
        return fingerprint(path) == claimed
    except RemoteError:
        raise
    except OSError:
        return False
