"""The plan: which steps run, where, with which models; proved before anything starts."""

import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pipeline.dataset.config import EXTRAS, Config
from pipeline.dataset.encoders import with_encoders
from schemas.columns import COLUMNS, LEDGER, SEED
from schemas.digest import sha256_of_json
from schemas.errors import PlanError
from schemas.record import SCHEMA_VERSION
from schemas.shard import SUFFIXES
from stages import STAGES
from stages.base import Stage
from stages.encode import Encode
from stages.models.backends import ModelCard, backends
from stages.models.weights import known, require_licences
from stages.settings import EncodeSettings

Place = Literal["source", "fetch", "models", "images", "write"]
"""Where a step runs: while the part is read; on the shard's worker; in a model pool; on the shard's worker again."""

_PLACES: dict[str, Place] = {
    "metadata": "source",
    "download": "fetch",
    "size": "fetch",
    "embed_image": "images",
    "encode": "images",
    "pack": "write",
}
_RUNNER_COLUMNS = {"verdict", "stage"}


@dataclass(frozen=True)
class Step:
    """One stage in its place."""

    name: str
    path: str
    """`module:Class`."""
    place: Place
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    drops: tuple[str, ...]

    def stage_class(self) -> type[Stage]:
        """The stage's class."""
        cls: type[Stage] = pkgutil.resolve_name(self.path)
        return cls


@dataclass(frozen=True)
class Pool:
    """Worker processes on Ray that hold the models of consecutive steps."""

    name: str
    steps: tuple[Step, ...]
    workers: int
    cpus: float
    """Per worker."""
    gpus: float
    """Per worker."""


@dataclass(frozen=True)
class Plan:
    """Proved steps and verified models under one config."""

    config: Config
    steps: tuple[Step, ...]
    cards: tuple[ModelCard, ...]

    def at(self, *places: Place) -> tuple[Step, ...]:
        """The steps that run at these places, in order."""
        return tuple(step for step in self.steps if step.place in places)

    def keep_after(self, step: Step) -> frozenset[str]:
        """Columns that must survive `step`: those that a later step reads, a ledger keeps, or a sample holds."""
        later = self.steps[self.steps.index(step) + 1 :]
        read = {name for other in later for name in other.reads}
        return frozenset(read | set(LEDGER) | set(SUFFIXES.values()))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every reason that some step declares, in the order of the steps."""
        return tuple(dict.fromkeys(str(reason) for step in self.steps for reason in step.drops))

    def pools(self) -> tuple[Pool, ...]:
        """The model pools: one without a GPU; with GPUs the image embedder has a pool of its own."""
        executor = self.config.executor
        faces, images = self.at("models"), self.at("images")
        if executor.gpus == 0:
            return (Pool("models", faces + images, executor.workers, 1, 0),)
        # Half of each GPU for many small face models fed by their own decoding core, half for the one large tower.
        share = executor.gpus / 2 / executor.workers
        return (
            Pool("faces", faces, executor.workers, 1, share),
            Pool("images", images, executor.gpus, 1, 0.5),
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the bytes of a shard, JSON-able; two runs with equal identities may share an OUT."""
        config = self.config
        models = config.models.model_dump(
            mode="json", exclude={"paths", "accept_noncommercial", "allow_download", "pack"}
        )
        encode = _asked(config.encode)
        return {
            "schema_version": SCHEMA_VERSION,
            "profile": config.profile,
            "rows_per_shard": config.source.rows_per_shard,
            "stages": [step.name for step in self.steps if config.encode.encodes or step.name != Encode.name],
            "settings": {
                **config.model_dump(mode="json", include={"metadata", "filter", "segment", "crop"}),
                "models": models,
                **({"encode": encode} if encode else {}),
                **({} if config.pack.embeddings else {"pack": {"embeddings": False}}),
            },
            "models": self.model_list,
        }

    @property
    def model_list(self) -> list[dict[str, str]]:
        """The models as manifests list them."""
        return [
            {"name": card.name, "task": card.task, "sha256": card.sha256, "licence": card.licence}
            for card in self.cards
        ]

    @cached_property
    def digest(self) -> str:
        """sha256 of the identity."""
        return sha256_of_json(self.identity)


def _asked(encode: EncodeSettings) -> dict[str, Any]:
    """What is asked of `encode`, and by which encoders; empty where it changes no byte of a shard."""
    asked: dict[str, Any] = {name: True for name in EXTRAS if getattr(encode, name)}
    if encode.latents:
        asked["resolution"] = encode.resolution
    if encode.source is not None:
        asked["source"] = encode.source.model_dump(mode="json", exclude={"folder"})
    return asked


def make_plan(config: Config) -> Plan:
    """Resolve the steps, prove that they fit together, and verify models and licences, without loading any.

    Raises:
        PlanError: when a step reads what nothing before it writes, or writes an unknown column.
        ConfigError: for an unknown backend.
        WeightsError: when a weight is missing or wrong, or its licence is not accepted.
    """
    config, encoders = with_encoders(config)
    steps = tuple(_step(name, path) for name, path in STAGES.items())
    prove(steps)
    for name in config.models.paths:
        known(name, config.models)
    cards = [card for cls in backends(config) for card in cls.cards(config.models)]
    cards += encoders
    require_licences(cards, config.models)
    return Plan(config, steps, tuple(cards))


def _step(name: str, path: str) -> Step:
    cls: type[Stage] = pkgutil.resolve_name(path)
    return Step(name, path, _PLACES.get(name, "models"), cls.reads, cls.writes, tuple(map(str, cls.drops)))


def prove(steps: Iterable[Step]) -> None:
    """Check that each step finds what it reads, and that all columns of ledger and samples get written.

    Raises:
        PlanError: names the step and the column.
    """
    available = set(SEED)
    for step in steps:
        for name in step.reads:
            if name not in available:
                raise PlanError(f"Stage {step.name} reads {name!r}, which no earlier stage writes.")
        for name in step.writes:
            if name not in COLUMNS:
                raise PlanError(f"Stage {step.name} writes {name!r}, which schemas/columns.py does not define.")
        available.update(step.writes)
    missing = ({*LEDGER, *SUFFIXES.values()} - _RUNNER_COLUMNS) - available
    if missing:
        raise PlanError(f"No stage writes the columns {sorted(missing)}.")
