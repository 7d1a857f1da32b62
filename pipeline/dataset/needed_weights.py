"""The weights and bases that a machine needs: their files, and where each comes from and belongs."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from pipeline.dataset.config import PROFILES, Config, load_config
from pipeline.shared.bases import BASES, base_folder, find_base
from schemas.digest import sha256_of_file
from schemas.errors import UserError, WeightsError
from stages.caption.stage import captioner_class
from stages.filter import unused
from stages.models import REGISTRIES
from stages.models.backends import backend, backends
from stages.models.heads import head_cards, read_head
from stages.models.papers import Weight, WeightFile
from stages.models.photo_or_art import photo_papers
from stages.models.weights import WeightState, known, known_weights, roots, weight_state
from stages.settings import ModelSettings

_OTHERWISE = {
    "photo": "filter.photo, and whoever wants the column photo in ledgers",
    "clip-vit-h-text": "models fetch photo, training with watch.clip (the path of its folder)",
    **{name: f"training with --base {name}, encode.base={name}" for name in BASES},
    "arcface-ir-se50": "training with objective.id_loss (objective.id_loss_weights is the path of its file)",
}


def base_papers(name: str) -> Weight:
    hub = BASES[name]
    known_files = {file: ("base", *hub.weights[file]) for file in hub.weights}
    return Weight(
        name=name,
        files=tuple(WeightFile(file, *known_files.get(file, ("", 0, "")), file) for file in hub.files),
        licence=hub.licence,
        commercial=True,
        source=f"https://huggingface.co/{hub.repository}",
        revision=hub.revision,
        paper=hub.paper,
        preprocessing="RGB, (x - 127.5) / 127.5",
        repository=hub.repository,
    )


def known_models(settings: ModelSettings) -> dict[str, Weight]:
    """Name -> papers of all weights and bases."""
    return known_weights(settings) | _others(settings)


def _others(settings: ModelSettings) -> dict[str, Weight]:
    """What is fetched as weights are, but is nothing that a path in `models.paths` may stand for."""
    return {"photo": photo_papers(settings), **{name: base_papers(name) for name in BASES}}


def named(names: Iterable[str], settings: ModelSettings) -> list[Weight]:
    """The papers of weights and bases; a WeightsError for an unknown name lists the known ones."""
    others = _others(settings)
    return [known(name, settings, others) for name in names]


def needed(config: Config) -> list[Weight]:
    """What a run under this config needs, each once; not a pack, file or base that is given as a path."""
    weights = [weight for cls in backends(config) for weight in cls.weights(config.models)]
    if (config.encode.latents or config.encode.text) and config.encode.base in BASES:
        weights.append(base_papers(config.encode.base))
    words = any(hasattr(cls, "text") for cls in backends(config)) and "photo" not in config.models.heads
    if words and "photo" not in unused(config.filter):
        weights.append(photo_papers(config.models))
    return list(dict.fromkeys(weights))


def state_of(weight: Weight, settings: ModelSettings, *, hashes: bool = False) -> WeightState:
    """Where a weight or base is; with `hashes`, its files are read and compared too.

    A base may have other files than the published ones, of half precision for instance, and still be used.
    """
    if weight.made_of:
        state, models = weight_state(weight, settings), settings.model_copy(update={"image_embedder": "clip-vit-h"})
        if not hashes or not state.path:
            return state
        try:
            head_cards({"photo": read_head(state.path)}, models)
        except WeightsError as error:
            return state._replace(state=f"wrong: {error}", is_ready=False)
        return state._replace(state="verified")
    if weight.name not in BASES:
        return weight_state(weight, settings, hashes=hashes)
    folder = base_folder(weight.name)
    if folder is None:
        return WeightState(weight, "missing", None, is_ready=False)
    try:
        find_base(weight.name)
    except UserError as error:
        return WeightState(weight, f"not whole: {error}", folder, is_ready=False)
    if not hashes:
        return WeightState(weight, "found", folder, is_ready=True)
    files = [(file, path) for file, path in weight.paths(folder).items() if file.sha256]
    others = [file.name for file, path in files if not path.is_file() or sha256_of_file(path) != file.sha256]
    return WeightState(weight, f"other than published: {', '.join(others)}" if others else "verified", folder, True)


class Use(NamedTuple):
    """A registered backend that computes a weight, and the settings under which it does."""

    task: str
    backend: str
    changes: dict[str, str]
    """Of the model settings: what has to be set for it."""


def uses(weight: Weight, settings: ModelSettings) -> Iterator[Use]:
    """The backends that compute a weight, under these settings or with `models.pack` or `models.parser` set to it."""
    variants: list[dict[str, str]] = [{}, {"parser": weight.name}]
    if "face_embedder" in weight.tasks:
        variants.append({"pack": weight.name, "screen": "detector"})
    for task in REGISTRIES:
        for name in REGISTRIES[task] if task in weight.tasks else ():
            for changes in variants:
                if weight in backend(task, name).weights(settings.model_copy(update=changes)):
                    yield Use(task, name, changes)
                    break


def described(state: WeightState, settings: ModelSettings) -> dict[str, Any]:
    """All that is known of a weight and its files, JSON-able; what is not known is None."""
    weight = state.weight
    used_by = [f"profile {name}" for name in PROFILES if weight in needed(load_config(None, [], profile=name))]
    for use in uses(weight, settings):
        words = [f"models.{use.task}={use.backend}", *(f"models.{key}={value}" for key, value in use.changes.items())]
        used_by.append(" ".join(word for word in words if word != "models.screen=detector"))
    used_by += [_OTHERWISE[weight.name]] if weight.name in _OTHERWISE else []
    return {
        "name": weight.name,
        "state": state.state,
        "ready": state.is_ready,
        "path": str(state.path) if state.path else None,
        "target": str(state.target),
        "tasks": list(dict.fromkeys(weight.tasks)),
        "used_by": used_by,
        "licence": weight.licence,
        "commercial": weight.commercial,
        "page": weight.source,
        "repository": weight.repository or None,
        "revision": weight.revision,
        "paper": weight.paper,
        "preprocessing": weight.preprocessing,
        "archive": weight.archive is not None,
        "made_of": weight.made_of.name if weight.made_of else None,
        "downloads": [{"url": weight.url(file), **_facts(file)} for file in weight.downloads],
        "files": [
            {"name": file.name, "task": file.task or None, "path": str(path), **_facts(file)}
            for file, path in weight.paths(state.target).items()
        ],
    }


def _facts(file: WeightFile) -> dict[str, Any]:
    return {"bytes": file.bytes or None, "sha256": file.sha256 or None}


def block(entry: dict[str, Any]) -> str:
    """`described` in lines for a terminal, a pipe, or a note to take to another machine: no line is ever cut."""
    lines = [
        f"{entry['name']}: {entry['state']}",
        f"  for {', '.join(entry['tasks'])}; used by {'; '.join(entry['used_by'])}",
        f"  licence: {entry['licence']}",
        f"  commercial use: {'yes' if entry['commercial'] else 'no (models.accept_noncommercial=true accepts that)'}",
        f"  page: {entry['page']}",
    ]
    verb = "at" if entry["path"] else "to"
    if entry["archive"]:
        (archive,) = entry["downloads"]
        lines += [f"  fetch {archive['url']}", *_fact_lines(archive), "  and unpack of it"]
    if entry["made_of"]:
        made_by = f"  made by `python -m pipeline models fetch {entry['name']}` of {entry['made_of']}"
        return "\n".join([*lines, made_by, f"    {verb} {entry['target']}", ""])
    for number, file in enumerate(entry["files"]):
        lines.append(f"    {file['name']}" if entry["archive"] else f"  fetch {entry['downloads'][number]['url']}")
        lines += [f"    {verb} {file['path']}", *_fact_lines(file)]
    return "\n".join([*lines, ""])


def _fact_lines(file: dict[str, Any]) -> list[str]:
    size = f"{file['bytes']:,} bytes" if file["bytes"] else "size not known (small)"
    return [f"    {size}", f"    sha256 {file['sha256'] or 'not known'}"]


def lacking(lacks: Sequence[WeightState]) -> str:
    """A sentence that names all weights which are missing or damaged, and says what to do; empty without any."""
    if not lacks:
        return ""
    words = [one.weight.name if one.state == "missing" else f"{one.weight.name} ({one.state})" for one in lacks]
    names = " ".join(one.weight.name for one in lacks)
    return (
        f"Weights are missing: {', '.join(words)} ({bytes_of(lacks):,} bytes to fetch): run `python -m pipeline models "
        f"fetch {names}`, or put each file where the list says; `--profile embedded` is for trying out, without any."
    )


def bytes_of(lacks: Iterable[WeightState]) -> int:
    """What is to be fetched for these."""
    return sum(file.bytes for file in {file for one in lacks for file in one.weight.downloads})


def document(weights: Iterable[Weight], config: Config, *, only: bool) -> dict[str, Any]:
    """What `models list` tells: the weights, and the backends that are registered (or, with `only`, in use)."""
    listed = [state_of(weight, config.models) for weight in weights]
    lacks = [state for state in listed if not state.is_ready]
    used: list[dict[str, Any]] = []
    names = [(task, name) for task, names in REGISTRIES.items() for name in names]
    chosen = config.models.captioner
    for task, name in [*names, ("captioner", chosen)] if chosen else names:
        needs: list[str] = []
        if task == "captioner":
            cards = [captioner_class(config.models).card(config)]
        elif only and getattr(config.models, task) != name:
            continue
        else:  # where its weights are none of the list (a pack by path, say), its models
            needs = [one.name for one in backend(task, name).weights(config.models)]
            cards = [] if needs else backend(task, name).cards(config.models)
        described_cards = [
            {"name": one.name, "licence": one.licence, "commercial": one.commercial, "sha256": one.sha256 or None}
            for one in cards
        ]
        used.append({"task": task, "name": name, "weights": needs, "cards": described_cards})
    return {
        "models": [described(state, config.models) for state in listed],
        "backends": used,
        "searched": ["models.paths.NAME", *map(str, roots())],
        "missing": [state.weight.name for state in lacks],
        "bytes_missing": bytes_of(lacks),
    }


def text_of(listed: dict[str, Any], *, only: bool) -> str:
    """`document` for people, in lines of any length; `only`: no others are meant, these may be fetched as they are."""
    lines = [block(entry) for entry in listed["models"]]
    for one in listed["backends"]:
        cards = [
            f"{card['name']} ({card['licence']}, {'sha256 ' + card['sha256'] if card['sha256'] else 'no weights'})"
            for card in one["cards"]
        ]
        lines.append(f"models.{one['task']}={one['name']}: {', '.join([*one['weights'], *cards])}")
    lines.append(f"Searched, in this order: {', '.join(listed['searched'])}.")
    names = " ".join(listed["missing"]) if only else "NAME"
    if listed["missing"]:
        lines.append(
            f"{len(listed['missing'])} of {len(listed['models'])} are missing, {listed['bytes_missing']:,} bytes: "
            f"`python -m pipeline models fetch {names}`; --profile lists what a run needs. "
            "For a machine without network: fetch on another one with "
            "XDG_CACHE_HOME=/some/disk, and set FACESHARDS_MODELS=/some/disk/faceshards/models here."
        )
    return "\n".join(lines)
