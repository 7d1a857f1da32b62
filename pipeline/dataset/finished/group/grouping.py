"""`group`: a dataset whose photos of one person lie side by side, made of other datasets.

Its rows are their kept samples. Their keys are new, since keys sort as rows do; the json has the old one as `origin`.
There is no search for a person, and the numbers of persons are those of one dataset alone.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import track

from pipeline.dataset.config import Config
from pipeline.dataset.finished.group.near_copies import without_copies
from pipeline.dataset.finished.group.persons import SIMILARITY, persons
from pipeline.dataset.finished.group.photos import Photos, read_photos
from pipeline.dataset.finished.hub.card import write_card
from pipeline.dataset.finished.report import write_report
from pipeline.dataset.out.ledger import Funnel, read_dataset, read_manifests, shard_names, summary
from pipeline.dataset.out.lost import lost_errors
from pipeline.dataset.out.output import Output, ShardWriter, differences, fingerprint, is_whole
from pipeline.dataset.out.takedowns import blank
from pipeline.dataset.plan import Plan
from pipeline.dataset.rows import NO_WITNESSES, Rows, put
from pipeline.shared.files import AnyPath, sizes, write
from pipeline.shared.tars import NATIVE
from schemas.arrays import Integers
from schemas.columns import KEPT
from schemas.digest import sha256
from schemas.drops import DropReason
from schemas.errors import CorruptShardError, OutputError, first_line
from schemas.names import sample_key, shard_name, shard_origin
from schemas.shard import DATASET, SUFFIXES, UNCONDITIONAL, dataset_digest, sample_sha256
from stages import STAGES
from stages.models.sscd import Sscd
from stages.runtime import Runtime
from stages.settings import PackSettings

PART = "persons"
"""The part that rows of grouped datasets belong to."""
DROPS = (DropReason.NEAR_COPY, DropReason.SINGLE_PHOTO)
"""The reasons that are given here, in the name of the last stage: samples were made, and then left out."""
_SAME = ("schema_version", "profile", "settings", "models")
"""What the plans of the sources must agree in."""
_TOGETHER = 16
"""Samples in memory at a time."""
_SAMPLE_WEIGHT = 10
"""A sample counts as so many dropped rows where shards are cut."""


@dataclass(frozen=True)
class Wish:
    similarity: float = SIMILARITY
    """Least mean cosine within a person."""
    singles: bool = True
    """Whether to keep photos of which no other shows the same person."""
    samples_per_shard: int = 1000
    sscd: Path | None = None
    """Weights of SSCD, by which copies are known besides the hashes."""


@dataclass(frozen=True)
class GroupPlan(Plan):
    """The plan of the source datasets, and how they were grouped."""

    described: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def identity(self) -> dict[str, Any]:
        return self.described

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        return DROPS

    @property
    def model_list(self) -> list[dict[str, str]]:
        models: list[dict[str, str]] = self.described["models"]
        return models


@dataclass(frozen=True)
class Layout:
    """What becomes of N photos, in the order in which their rows stand in the new dataset."""

    photos: Integers
    """Their numbers in the source."""
    person: Integers
    """From 0, in order of appearance."""
    verdict: npt.NDArray[np.object_]
    shard: Integers

    @property
    def digest(self) -> str:
        arrays = (self.photos, self.person, self.verdict.astype("U"), self.shard)
        return sha256(b"".join(np.ascontiguousarray(one).tobytes() for one in arrays))

    @property
    def summary(self) -> str:
        photos = np.bincount(self.person[self.verdict != DropReason.NEAR_COPY.value])
        copies = len(self.person) - int(photos.sum())
        several = photos[photos > 1]
        return (
            f"Near-copies: {copies:,}; persons with several photos: {len(several):,}, with {several.sum():,} photos; "
            f"with one: {(photos == 1).sum():,}."
        )


def layout(copy_of: Integers, person_of: Integers, wish: Wish) -> Layout:
    """Members beside each other, persons in the order of their first photos, copies among the photos of the person."""
    person_of = person_of[copy_of]
    own = copy_of == np.arange(len(copy_of))
    _, person, members = np.unique(person_of, return_inverse=True, return_counts=True)
    others = np.bincount(person, own)[person]
    verdict = np.full(len(own), KEPT, object)
    if not wish.singles:
        verdict[others < 2] = DropReason.SINGLE_PHOTO.value
    verdict[~own] = DropReason.NEAR_COPY.value
    first = np.full(len(members), len(own))
    np.minimum.at(first, person, np.arange(len(own)))
    order = np.lexsort((np.arange(len(own)), first[person]))

    # A shard takes whole persons, unless one has more photos than fit.
    person, verdict = np.unique(first[person][order], return_inverse=True)[1], verdict[order]
    weight = np.where(verdict == KEPT, _SAMPLE_WEIGHT, 1)
    begin, most = np.cumsum(weight) - weight, wish.samples_per_shard * _SAMPLE_WEIGHT
    starts = np.flatnonzero(np.diff(person, prepend=-1))
    small = np.add.reduceat(weight, starts) <= most
    cut = np.where(small[person], begin[starts][person], begin) // most
    return Layout(order, person, verdict, np.unique(cut, return_inverse=True)[1])


def group(folders: Sequence[AnyPath], out: AnyPath, wish: Wish, console: Console, *, replan: bool = False) -> Funnel:
    """Make OUT of the finished shards of other datasets. The same call goes on where it stopped.

    Raises:
        UserError: when a folder is no dataset with ID vectors, they do not fit together, or OUT cannot be written.
        CorruptShardError: when a file of theirs is damaged; finished shards of OUT are kept.
        LostError: when OUT cannot be written any more.
    """
    *given, target = (one.resolve() if isinstance(one, Path) else one for one in (*folders, out))
    if target in given:
        raise OutputError(f"{out} is what is to be grouped: give another --out.")
    folders = [one for number, one in enumerate(folders) if given[number] not in given[:number]]
    sources = _sources(folders)
    if not any(source.get("kept", 1) for source in sources):
        raise OutputError("No photo was kept in what is to be grouped: there is nothing to group.")
    if sources[0]["plan"]["profile"] == "embedded":
        console.print("The profile embedded is for trying out: its ID vectors tell no persons apart.")
    output, outcome, done = Output(out), "", []
    with suppress(OSError, ValueError, KeyError, TypeError):  # who is whose in OUT, where a run came to its end
        before = json.loads((out / DATASET).read_bytes())
        outcome, done = str(before["plan"]["settings"]["group"]["layout"]), list(before.get("shards", ()))
    sscd = Sscd(wish.sscd) if wish.sscd else None
    if sscd:
        console.print(f"SSCD computes on {sscd.device}.")
    plan = _plan(folders, sources, wish, outcome, sscd)
    output.make_folders()  # now, before hours of reading, it shows whether it can be written
    output.refuse_other_plan(plan, replan=replan)
    shown = partial(track, console=console, transient=True, disable=not console.is_terminal)
    photos = None
    with lost_errors(out):
        listed = sizes(output.shards)
    if replan or not (done and all(output.is_done(shard, plan, listed) for shard in done)):
        shards = [(folder, shard) for folder in folders for shard in shard_names(folder)]
        photos = read_photos(shown(shards, "reading"), sscd)
        console.print(f"{len(photos):,} photos are read; who is whose is looked for among their nearest neighbours.")
        copy_of, pairs = without_copies(photos.vectors, photos.looks, photos.worth(), wish.similarity)
        laid = layout(copy_of, persons(photos.vectors, pairs, wish.similarity), wish)
        plan = _plan(folders, sources, wish, laid.digest, sscd)
        console.print(laid.summary)
    with output.prepared(plan, replan=replan):
        known = (
            source.get("sources") or {shard_origin(shard)[0] for shard in shard_names(folder)}  # once not written
            for folder, source in zip(folders, sources, strict=True)
        )
        output.sources = sorted(set(chain(*known)))
        if photos:
            listed = sizes(output.shards)
            output.describe(plan, {"planned": {PART: len(photos)}})
            numbers = np.random.default_rng(int(plan.digest, 16)).permutation(int(laid.person.max()) + 1)
            for shard in shown(range(int(laid.shard.max()) + 1), "writing"):
                if not output.is_done(shard_name(PART, shard), plan, listed):
                    _write_shard(output, plan, photos, laid, numbers, shard)
        with lost_errors(out):
            files: dict[str, Any] = {}
            for folder, source in zip(folders, sources, strict=True):  # the features of "no face": those of the models
                if not files and source.get("files", {}).get(UNCONDITIONAL):
                    write(out / UNCONDITIONAL, (folder / UNCONDITIONAL).read_bytes())
                    files = {UNCONDITIONAL: fingerprint(out / UNCONDITIONAL)}
            output.describe(plan, {**summary(read_manifests(out)), "files": files})
            counted = write_report(out)
            write_card(out, counted)
        return counted


def _sources(folders: Sequence[AnyPath]) -> list[dict[str, Any]]:
    """dataset.json of each dataset, all of which must have ID vectors and have been made alike."""
    sources: list[dict[str, Any]] = []
    for folder in folders:
        if not (folder / DATASET).exists():
            raise OutputError(f"{folder} holds no dataset: give the OUT of a `dataset` run.")
        try:
            content = read_dataset(folder)
            now = {name: content["plan"][name] for name in _SAME}
        except (CorruptShardError, OSError, KeyError) as error:
            raise OutputError(
                f"{folder / DATASET} cannot be read ({first_line(error)}): `verify` tells more."
            ) from error
        claimed = content.get("files", {}).get(UNCONDITIONAL)
        if claimed is not None and not is_whole(folder / UNCONDITIONAL, claimed):
            raise OutputError(
                f"{folder / UNCONDITIONAL} is not what {DATASET} says of it: a rerun of `dataset` mends it."
            )
        if not now["settings"].get("pack", {}).get("embeddings", True):
            raise OutputError(f"{folder} was made without ID vectors (pack.embeddings = false): it cannot be grouped.")
        sources.append(content)
        first = {name: sources[0]["plan"][name] for name in _SAME}
        if len(folders) > 1 and "group" in now["settings"]:
            raise OutputError(f"{folder} was made by `group`: beside others, give the datasets that it was made of.")
        if first != now:
            raise OutputError(
                f"{folders[0]} and {folder} were made in different ways ({'; '.join(differences(first, now))}): "
                "group datasets that were made with the same models and settings."
            )
    return sources


def _plan(
    folders: Sequence[AnyPath], sources: Sequence[dict[str, Any]], wish: Wish, outcome: str, sscd: Sscd | None
) -> GroupPlan:
    """What decides the bytes of the new shards: what they are made of, and which photos are whose."""
    source = sources[0]["plan"]
    grouped = {
        "of": sorted(dataset_digest(read_manifests(folder)) for folder in folders),
        "similarity": wish.similarity,
        "singles": wish.singles,
        "layout": outcome,
        **({"sscd": sscd.stamp["sha256"]} if sscd else {}),
    }
    described = {
        **{name: value for name, value in source.items() if name != "source"},
        "models": [*source["models"], *([sscd.stamp] if sscd else [])],
        "rows_per_shard": wish.samples_per_shard,
        "settings": {**source["settings"], "group": grouped},
    }
    layout = PackSettings(layout=source["settings"].get("pack", {}).get("layout", "native"))
    config = Config().model_copy(update={"profile": source["profile"], "pack": layout})
    return GroupPlan(config, Runtime(), tuple(STAGES.values()), (), described=described)


def _write_shard(output: Output, plan: Plan, photos: Photos, laid: Layout, numbers: Integers, shard: int) -> None:
    rows = np.flatnonzero(laid.shard == shard)
    with ShardWriter(output, shard_name(PART, shard), plan) as writer:
        for start in range(0, len(rows), _TOGETHER):
            some = rows[start : start + _TOGETHER]
            ledger = photos.rows(laid.photos[some])
            origins = ledger["key"].to_pylist()
            new = {
                "key": pa.array([sample_key(PART, row) for row in some.tolist()]),
                "part": pa.array([PART] * len(some)),
                "row": pa.array(some),
                "person": pa.array(numbers[laid.person[some]]),
                "verdict": pa.array(laid.verdict[some].tolist()),
            }
            for name, values in new.items():
                ledger = put(ledger, name, values)
            ledger = blank(ledger, output.takedowns.reasons(ledger)).combine_chunks()
            lives = pc.equal(ledger["verdict"], KEPT).to_numpy()
            samples = [
                _sample(photos, photo, record, origin)
                for photo, record, origin, alive in zip(
                    laid.photos[some].tolist(), ledger.to_pylist(), origins, lives, strict=True
                )
                if alive
            ]
            alive = ledger.filter(pa.array(lives)).drop_columns(["verdict", "stage"])
            alive = put(alive, "sample_sha256", pa.array(map(sample_sha256, samples), pa.string()))
            for suffix, column in SUFFIXES.items():
                alive = put(alive, column, pa.array([files.get(suffix) for files in samples], pa.binary()))
            writer.add(Rows(alive, ledger.filter(pa.array(~lives)), NO_WITNESSES))
        writer.publish(len(rows))


def _sample(photos: Photos, number: int, record: dict[str, Any], origin: str) -> dict[str, bytes]:
    """The files of a sample, with its new json; a CorruptShardError when its ledger stands for others."""
    tar, data = photos.files(number)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as members:
            read = {one.name.partition(".")[2]: members.extractfile(one).read() for one in members}  # type: ignore[union-attr]
        files = {NATIVE.get(suffix, suffix): content for suffix, content in read.items()}
        if sample_sha256(files) != record["sample_sha256"]:
            raise CorruptShardError(f"{tar}: the files of {origin} are not those that its ledger stands for")
        content = json.loads(files["json"])
        content.setdefault("origin", origin)
        content.update({name: record[name] for name in ("key", "part", "row", "person")})
        return {**files, "json": json.dumps(content, sort_keys=True, ensure_ascii=False).encode()}
    except (tarfile.TarError, OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptShardError(f"{tar}: {origin}: {error}") from error
