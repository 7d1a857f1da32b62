"""Where weights lie: at a given path, in FACESHARDS_MODELS, in the cache, on the web. And how they get there.

Known weights are verified by sha256 wherever they lie; a file or folder that the user names is taken as it is,
and its sha256 recorded. Nothing is fetched unless `models.allow_download` is set or `models fetch` is called.
"""

import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import translate
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import NamedTuple

from filelock import FileLock

from schemas.digest import sha256_of_file
from schemas.errors import WeightsError
from stages.models import REGISTRIES
from stages.models.backends import ModelCard, backend
from stages.models.papers import WEIGHTS, Weight, WeightFile
from stages.settings import ModelSettings

_RESTRICTED = re.compile(r"\bnc\b|non-?commercial|research|unknown|^other$", re.IGNORECASE)
"""In licences that forbid commercial use, or say nothing."""


def cache_root() -> Path:
    """The folder that weights are fetched into."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("faceshards")) / "models"


def known_weights(settings: ModelSettings) -> dict[str, Weight]:
    """Name -> papers: those of the table, and those that a registered backend brings itself."""
    backends = [backend(task, name) for task, names in REGISTRIES.items() for name in names]
    return WEIGHTS | {weight.name: weight for cls in backends for weight in cls.weights(settings)}


def known(name: str, settings: ModelSettings, others: Mapping[str, Weight] = MappingProxyType({})) -> Weight:
    """The papers of a weight, or of one of `others`; a WeightsError for an unknown name lists the known ones."""
    weights = {**known_weights(settings), **others}
    if name not in weights:
        near = get_close_matches(name, weights, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise WeightsError(f"No weight is called {name!r}{hint}; known are {', '.join(weights)}.")
    return weights[name]


def find(weight: Weight, settings: ModelSettings, task: str = "") -> Path:
    """The path of a weight (a folder, or the file of a one-file weight), verified; only what `task` needs.

    Raises:
        WeightsError: when it is missing and may not be fetched, or a file has the wrong sha256.
    """
    state = weight_state(weight, settings, task=task, hashes=weight.name not in settings.paths)
    if state.path is None and settings.allow_download:
        return fetch(weight)
    if state.path is None:
        raise WeightsError(f"The weights {weight.name!r} are missing: {_remedy(weight, state.target)}")
    if not state.is_ready:
        files = weight.paths(state.path, task).items()
        file, path = next((file, path) for file, path in files if not _matches(path, file))
        wrong = f"{path} has sha256 {sha256_of_file(path)}, not {file.sha256}"
        raise WeightsError(f"{wrong}: delete it, then {_remedy(weight, state.path)}")
    return state.path


def located(weight: Weight, task: str, settings: ModelSettings) -> tuple[Path, bool]:
    """The path of a weight's file for a task, and whether it is there and whole; if it is not, where it belongs.

    Raises:
        WeightsError: when the weight holds no such file, or its path in `models.paths` is wrong.
    """
    state = weight_state(weight, settings, task=task, hashes=True)
    for file, path in weight.paths(state.target, task).items():
        if file.task == task:
            return path, state.is_ready
    raise WeightsError(f"The weights {weight.name!r} do not hold a {task}.")


def card(weight: Weight, task: str, settings: ModelSettings) -> ModelCard:
    """The card of a weight's file for a task: of the verified file, or, while it is lacking, by its papers.

    Raises:
        WeightsError: when the weight holds no such file, or its path in `models.paths` is wrong.
    """
    path, is_ready = located(weight, task, settings)
    sha256 = next(file.sha256 for file in weight.files if file.task == task)
    return ModelCard(
        weight.name,
        task,
        sha256_of_file(path) if is_ready else sha256,
        weight.licence,
        weight.commercial,
        lacks=None if is_ready else weight,
    )


def stated_card(name: str, task: str, sha256: str, licence: str, by: str) -> ModelCard:
    """The card of a model that has no papers here, under the licence that `by` states.

    Where that is none, it counts as one that forbids commercial use (docs/decisions/0049).
    """
    commercial = bool(licence) and not _RESTRICTED.search(licence)
    return ModelCard(name, task, sha256, licence or f"not known: {by} names none", commercial)


def not_allowed(cards: Iterable[ModelCard | Weight], settings: ModelSettings) -> str:
    """A sentence that names all weights whose licence is not on the list `models.licences`, and what to do."""
    if not settings.licences:
        return ""
    listed = re.compile("|".join(map(translate, settings.licences)), re.IGNORECASE)
    out = {f"{card.name} ({card.licence})": None for card in cards if not listed.match(card.licence)}
    if not out:
        return ""
    return (
        f"models.licences allows {', '.join(settings.licences)} alone, which leaves out: {'; '.join(out)}. "
        "Choose other models, another profile, or add the licence."
    )


def unaccepted(cards: Iterable[ModelCard], settings: ModelSettings) -> str:
    """As `not_allowed`; else of weights that forbid commercial use, until the user has accepted that once, and how."""
    cards = list(cards)
    if refusal := not_allowed(cards, settings):
        return refusal
    bound = {card.name: card.licence for card in cards if not card.commercial}
    if settings.accept_noncommercial or not bound:
        return ""
    licences = dict.fromkeys(bound.values())
    names = [f"{', '.join(name for name in bound if bound[name] == licence)} ({licence})" for licence in licences]
    return (
        f"These weights may not be used commercially: {'; '.join(names)}. Accept their licences once with "
        "`--set models.accept_noncommercial=true`, or choose `--profile permissive`."
    )


class WeightState(NamedTuple):
    """Where a weight is, as `models list` and `models check` show it."""

    weight: Weight
    state: str
    """missing, found (not compared), verified, given (by models.paths), or wrong: and which file."""
    path: Path | None
    is_ready: bool
    """Whether a run can use it: it is given, or there and, where files were compared, whole."""

    @property
    def target(self) -> Path:
        """The path of the weight, or, while it is missing, the one that it should get."""
        return self.path or self.weight.under(roots()[0])


def weight_state(weight: Weight, settings: ModelSettings, *, task: str = "", hashes: bool = False) -> WeightState:
    """Where a weight is, or what a task needs of it; with `hashes`, its files are read and compared too.

    Raises:
        WeightsError: when its path in `models.paths` is wrong.
    """
    given = Path(settings.paths[weight.name]).expanduser() if weight.name in settings.paths else None
    if given and given.is_dir() and not weight.is_folder:
        given /= weight.files[0].name
    for absent in _absent(weight, given, task) if given else ():
        setting = f"models.paths.{weight.name} = {settings.paths[weight.name]!r}"
        raise WeightsError(f"{setting} is wrong: {absent} does not exist; correct it.")
    path = given or next((path for path in map(weight.under, roots()) if not _absent(weight, path, task)), None)
    state, is_ready = "given" if given else "found" if path else "missing", path is not None
    if path and hashes:
        wrong = [at.name for file, at in weight.paths(path, task).items() if not _matches(at, file)]
        state = f"{'given, ' if given else ''}wrong sha256: {', '.join(wrong)}" if wrong else "verified"
        is_ready = not wrong or given is not None
    return WeightState(weight, state, path, is_ready)


def roots() -> list[Path]:
    """The folders in which weights are looked for, in order."""
    given = os.environ.get("FACESHARDS_MODELS")
    return [Path(given).expanduser(), cache_root()] if given else [cache_root()]


def _absent(weight: Weight, path: Path, task: str) -> list[Path]:
    return [location for location in weight.paths(path, task).values() if not location.is_file()]


def _matches(path: Path, file: WeightFile) -> bool:
    return path.is_file() and (not file.sha256 or sha256_of_file(path) == file.sha256)


def _remedy(weight: Weight, path: Path) -> str:
    """What to do when a weight is not at `path`."""
    files = ", ".join(f"{weight.url(file)} (sha256 {file.sha256 or 'not known'})" for file in weight.downloads)
    names = " and ".join(file.name for file in weight.files)
    action = f"unpack {names} into" if weight.archive else f"put {names} into"
    folder = path if weight.is_folder else path.parent
    return f"run `python -m pipeline models fetch {weight.name}`, or fetch {files} and {action} {folder}."


def fetch(weight: Weight) -> Path:
    """Fetch what is missing or damaged of a weight into the cache; returns its path there.

    A file gets its name once it is whole and verified. Files of the hub go on where they were interrupted.

    Raises:
        WeightsError: when it cannot be fetched or is not what it should be; says what to do.
    """
    root = cache_root()
    path, partial = weight.under(root), root / f".{weight.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(
            f"Cannot write {root} ({error.strerror}): set XDG_CACHE_HOME to a writable folder."
        ) from error
    try:
        with FileLock(root / ".lock"):
            targets = {file: target for file, target in weight.paths(path).items() if not _matches(target, file)}
            for file, whole in _downloaded(weight, list(targets), partial):
                if file.sha256 and sha256_of_file(whole) != file.sha256:
                    wrong = sha256_of_file(whole)
                    whole.unlink()
                    raise ValueError(f"{file.name} has sha256 {wrong}, not {file.sha256}, and was deleted")
                whole.chmod(partial.stat().st_mode & 0o666)  # pooch's files are for their owner's eyes only
                targets[file].parent.mkdir(parents=True, exist_ok=True)
                os.replace(whole, targets[file])
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise WeightsError(f"Cannot fetch {weight.name} ({error}): {_remedy(weight, path)}") from error
    return path


def _downloaded(weight: Weight, files: list[WeightFile], folder: Path) -> Iterator[tuple[WeightFile, Path]]:
    """The files one after the other, each where it was downloaded to, in `folder`."""
    if weight.repository:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its HTTP client's

        for file in files:
            try:
                whole = hf_hub_download(weight.repository, file.source, revision=weight.revision, local_dir=folder)
            except HTTPError as error:
                raise OSError(str(error)) from error
            yield file, Path(whole)
    elif weight.archive and files:
        with zipfile.ZipFile(_retrieve(weight.archive, folder)) as archive:
            members = {PurePosixPath(name).name: name for name in archive.namelist()}
            for file in files:
                if file.name not in members:
                    raise ValueError(f"{weight.archive.name} holds no {file.name}")
                with archive.open(members[file.name]) as source, (folder / file.name).open("wb") as target:
                    shutil.copyfileobj(source, target)
                yield file, folder / file.name
    else:
        for file in files:
            yield file, _retrieve(file, folder)


def _retrieve(file: WeightFile, folder: Path) -> Path:
    import pooch

    pooch.get_logger().setLevel("WARNING")
    bar = sys.stderr.isatty()
    return Path(pooch.retrieve(file.source, f"sha256:{file.sha256}", file.name, folder, progressbar=bar))
