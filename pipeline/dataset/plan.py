"""The plan: which steps run, where, with which models; proved before anything starts."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from pipeline.dataset.config import EXTRAS, Config
from pipeline.dataset.needed_weights import base_papers, block, described, lacking, state_of
from pipeline.shared.bases import BASES, find_base
from schemas.columns import COLUMNS, LEDGER, SEED
from schemas.digest import sha256_of_json
from schemas.errors import PlanError, WeightsError
from schemas.record import SCHEMA_VERSION
from schemas.shard import EMBEDDINGS, SUFFIXES
from schemas.targets import text_sha256, vae_sha256
from stages import STAGES, Step, Where
from stages.base import Stage
from stages.caption.stage import Caption, captioner_class
from stages.encode import Encode
from stages.filter import QUALITIES, unused
from stages.models.backends import PACK_TASKS, ModelCard, backend, backends, runtime_of
from stages.models.heads import MEASURES, head_cards, heads_of
from stages.models.weights import WeightState, fetch, known, unaccepted
from stages.runtime import EncoderSource, Runtime
from stages.screen import Screen
from stages.screen import factor as screen_factor

_NO_STAGE = {"person", "verdict", "stage"}
"""Columns that no stage writes: `group` and the runner do."""
_MEASURED_BY = {
    "fiqa": "set models.fiqa, to ediffiqa-t for instance",
    "photo": "with models.image_embedder = clip-vit-h, `python -m pipeline models fetch photo` makes what does",
    "aesthetic": "set models.heads.aesthetic to a file",
    "nsfw_score": "set models.heads.nsfw to a file",
}
"""Measures that not every run takes -> what does."""
_NO_BYTES = (
    *("captioner", "fiqa", "heads", "paths", "licences", "accept_noncommercial", "allow_download", "pack", "runtime"),
    *("compile", "decoding", "screen", "screen_thresh", "second_look"),
)
"""Settings of models that are not in a plan as they are: files are known by their hashes, and whether they may be used
changes no byte."""
_CPU_ROWS, _GPU_ROWS = 8, 32
_GPU_THREADS_PER_CPU = 2
"""One decodes while the other's batch is in the models."""


@dataclass(frozen=True)
class Pool:
    """The workers that hold the models: threads or processes of one machine, or actors on Ray."""

    steps: tuple[Step, ...]
    workers: int
    cpus: float
    """Per worker."""
    gpus: float
    """Per worker."""
    threads: int
    """Per worker: batches of rows that it computes at a time, one each."""


@dataclass(frozen=True)
class Plan:
    """Proved steps and verified models under one config."""

    config: Config
    runtime: Runtime
    steps: tuple[Step, ...]
    cards: tuple[ModelCard, ...]
    lacks: tuple[WeightState, ...] = ()
    """Weights that are missing or damaged on this machine: of a dry run only."""

    @property
    def refusal(self) -> str:
        """Why this plan cannot be carried out on this machine, and what to do; empty where it can."""
        return " ".join(filter(None, (lacking(self.lacks), unaccepted(self.cards, self.config.models))))

    @property
    def shopping_list(self) -> str:
        """Every file that is lacking: URL, size, sha256 and where it belongs."""
        return "\n".join(block(described(state, self.config.models)) for state in self.lacks)

    def at(self, *where: Where) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.at in where)

    @cached_property
    def keeps(self) -> dict[Step, frozenset[str]]:
        """Columns that must survive each step: those that a later step reads, a ledger keeps, or a sample holds."""
        keeps, needed = {}, frozenset(LEDGER) | frozenset(SUFFIXES.values())
        for step in reversed(self.steps):
            keeps[step] = needed
            needed |= frozenset(step.stage().reads)
        return keeps

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """Every reason that some step declares, in the order of the steps."""
        return tuple(dict.fromkeys(str(reason) for step in self.steps for reason in step.stage().drops))

    @property
    def suffixes(self) -> set[str]:
        """Those of the files that a sample may have."""
        config = self.config
        written = {
            "clip": not config.models.image_embedder.startswith("dino"),
            "latents": config.encode.latents,
            "mirror": config.encode.mirror,
            "plain": config.segment.condition != "segmented",
            "safetensors": config.pack.hidden == "int8",
        }
        no = {suffix for word, is_written in written.items() if not is_written for suffix in SUFFIXES if word in suffix}
        return SUFFIXES.keys() - no - (set() if config.pack.embeddings else EMBEDDINGS)

    def __getstate__(self) -> dict[str, Any]:
        """With all that the stages declare: processes that make shards import only the stages that they run."""
        declared = ("keeps", "reasons", "identity", "digest")
        return {**self.__dict__, **{name: getattr(self, name) for name in declared}}

    @property
    def pool(self) -> Pool:
        """The workers of the models: a core each without a GPU, and a GPU with the cores that decode for it else."""
        executor, steps = self.config.executor, self.at("models")
        if executor.gpus == 0:
            return Pool(steps, executor.workers, 1, 0, 1)
        cpus = max(1, executor.workers // executor.gpus)
        return Pool(steps, executor.gpus, cpus, 1, _GPU_THREADS_PER_CPU * cpus)

    @property
    def batch_rows(self) -> int:
        """Rows that go through the models together. On a GPU batches of rows share those of the models."""
        return self.config.executor.batch_rows or (_GPU_ROWS if self.config.executor.gpus else _CPU_ROWS)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the bytes of a shard, JSON-able; two runs with equal identities may share an OUT."""
        config, models, encoders = self.config, self.config.models, self.runtime.encoders
        works = {
            Encode.name: encoders,
            Screen.name: screen_factor(models, config.filter),
            Caption.name: models.captioner,
        }
        stages = [name for name in (step.stage().name for step in self.steps) if works.get(name, True)]
        low, high = models.second_look
        settings: dict[str, Any] = config.model_dump(
            mode="json",
            include={"metadata", "filter", "segment", "crop", "models"},
            exclude={"filter": unused(config.filter), "models": set(_NO_BYTES)},
        )
        if config.segment.condition == "segmented":
            del settings["segment"]["condition"]
        settings["models"]["device"] = self.runtime.device
        if on_torch := [task for task in PACK_TASKS if self._runtime_of(task) == "torch"]:
            settings["models"]["on_torch"] = on_torch
        # torch rounds otherwise than onnxruntime; what the latter computes is called as before there was a choice
        if models.compile and self.runtime.device == "cuda":
            settings["models"]["compile"] = True
        if models.decoding == "gpu":
            settings["models"]["decoding"] = "gpu"
        if works[Screen.name]:
            settings["models"]["screen"] = {"factor": works[Screen.name], "thresh": models.screen_thresh}
        if low < high and (rule := getattr(backend("detector", models.detector), "closer_look", None)):
            settings["models"]["second_look"] = {"scores": [low, high], "rule": rule}
        encode: dict[str, Any] = {name: True for name in EXTRAS if getattr(config.encode, name)}
        if config.encode.latents:
            encode |= {"latents": "moments", "resolution": config.encode.resolution}
        if encoders is not None:
            encode["source"] = {name: value for name, value in asdict(encoders).items() if name != "folder"}
        pack: dict[str, Any] = {"hidden": "int8"} if config.pack.hidden == "int8" else {}
        if not config.pack.embeddings:
            pack = {"embeddings": False}  # in whatever form
        if config.pack.layout == "plain":
            pack["layout"] = "plain"
        caption = config.caption.model_dump(include={"prompt", "max_tokens", "max_side"}) if models.captioner else {}
        further = {"encode": encode, "caption": caption, "pack": pack}
        source = {"kind": config.source.kind if config.source.kind != "web" else "", "columns": config.source.columns}
        source = {name: value for name, value in source.items() if value}
        return {
            "schema_version": SCHEMA_VERSION,
            "profile": config.profile,
            "rows_per_shard": config.source.rows_per_shard,
            "stages": stages,
            **({"source": source} if source else {}),
            "settings": settings | {name: section for name, section in further.items() if section},
            "models": self.model_list,
        }

    def _runtime_of(self, task: str) -> str:
        """What computes the pack's file for a task; nothing where it is not used."""
        models = self.config.models
        used = PACK_TASKS.get(task) == getattr(models, task, "")
        return runtime_of(task, models, self.runtime.device) if used else ""

    @property
    def model_list(self) -> list[dict[str, str]]:
        """The models as manifests list them, with what computes those of a pack, but for ONNX Runtime on a CPU."""
        models = [
            {"name": card.name, "task": card.task, "sha256": card.sha256, "licence": card.licence}
            for card in self.cards
        ]
        for model in models:
            runtime = self._runtime_of("detector" if model["task"] == "screen" else model["task"])
            if runtime == "torch" or (runtime and self.runtime.device == "cuda"):
                model["runtime"] = runtime
        return models

    @cached_property
    def digest(self) -> str:
        return sha256_of_json(self.identity)


def make_plan(config: Config, runtime: Runtime | None = None, *, dry_run: bool = False) -> Plan:
    """Resolve the steps, prove that they fit together, and verify models and licences, without loading any.

    `runtime` is completed by what follows from the config: the device, and where the encoders of `encode.base` are.
    In a dry run weights may be missing and licences not accepted: the plan says which, and is otherwise the same.

    Raises:
        PlanError: when a step reads what nothing before it writes, or writes an unknown column.
        ConfigError: for an unknown backend.
        WeightsError: names all weights that are missing or wrong, and all licences that are not accepted.
    """
    steps = tuple(STAGES.values())
    prove([step.stage() for step in steps])
    for name in config.models.paths:
        known(name, config.models)
    runtime = replace(runtime or Runtime(), device="cuda" if config.executor.gpus else "cpu")
    if config.models.decoding == "gpu" and runtime.device == "cpu":
        raise PlanError(
            "models.decoding is gpu, but executor.gpus is 0: set that to 1 or more, or models.decoding = cpu."
        )
    cards = [card for cls in backends(config) for card in cls.cards(config.models)]
    heads = heads_of(config)
    runtime = replace(runtime, heads=tuple((name, head.sha256) for name, head in heads.items()))
    cards += head_cards(heads, config.models)
    measured = {MEASURES[name] for name in heads} | ({"fiqa"} if config.models.fiqa else set())
    for quality in QUALITIES:
        if quality.key not in unused(config.filter) and quality.measure in _MEASURED_BY.keys() - measured:
            by = _MEASURED_BY[quality.measure]
            raise PlanError(f"filter.{quality.key} is set, but nothing measures `{quality.measure}`: {by}.")
    if config.models.captioner:
        cards.append(captioner_class(config.models).card(config))
    if config.encode.latents or config.encode.text:
        encoders, encoder_cards = _encoders(config)
        runtime, cards = replace(runtime, encoders=encoders), cards + encoder_cards
    weights = dict.fromkeys(card.lacks for card in cards if card.lacks)
    lacks = tuple(state_of(weight, config.models, hashes=True) for weight in weights)
    plan = Plan(config, runtime, steps, tuple(cards), lacks)
    if dry_run or not plan.refusal:
        return plan
    missing = [state.weight for state in lacks if state.state == "missing"]
    if not config.models.allow_download or len(missing) < len(lacks) or unaccepted(cards, config.models):
        raise WeightsError(plan.refusal, plan.shopping_list)
    for weight in missing:
        fetch(weight)
    return make_plan(config, runtime)


def _encoders(config: Config) -> tuple[EncoderSource, list[ModelCard]]:
    """The encoders of `encode.base`, and the cards of those in use: by its papers where it is lacking."""
    name, lacks = config.encode.base, None
    state = state_of(base_papers(name), config.models) if name in BASES else None
    if state is None or state.is_ready:
        base = find_base(name)
        vae, text = vae_sha256(base.folder), text_sha256(base.folder)
        source, licence = EncoderSource(base.name, str(base.folder.resolve()), base.kind, vae, text), base.licence
    else:
        hub, lacks = BASES[name], state.weight
        source = EncoderSource(name, str(state.target), hub.kind, hub.vae_sha256, hub.text_sha256)
        licence = hub.licence
    parts = [("vae", source.vae_sha256)] if config.encode.latents else []
    if config.encode.text:
        parts += zip(("text_encoder", "text_encoder_2"), source.text_sha256.split("+"), strict=False)
    cards = [ModelCard(f"{source.name}/{part}", "encoder", sha256, licence, True, lacks) for part, sha256 in parts]
    return source, cards


def prove(stages: Iterable[type[Stage]]) -> None:
    """Check that each stage gets what it reads, and that all columns of ledger and samples get written.

    Raises:
        PlanError: names the stage and the column.
    """
    available = set(SEED)
    for stage in stages:
        for name in stage.reads:
            if name not in available:
                raise PlanError(f"Stage {stage.name} reads {name!r}, which no earlier stage writes.")
        for name in stage.writes:
            if name not in COLUMNS:
                raise PlanError(f"Stage {stage.name} writes {name!r}, which schemas/columns.py does not define.")
        available.update(stage.writes)
    missing = ({*LEDGER, *SUFFIXES.values()} - _NO_STAGE) - available
    if missing:
        raise PlanError(f"No stage writes the columns {sorted(missing)}.")
