"""Where weights lie: at a given path, in FACESHARDS_MODELS, in the cache, on the web. And how they get there.

Known weights are verified by sha256 wherever they lie; a file or folder that the user names is taken as it is,
and its sha256 recorded. Nothing is fetched unless `models.allow_download` is set or `models fetch` is called.
"""

import os
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from filelock import FileLock

from schemas.digest import sha256_of_file
from schemas.errors import WeightsError
from stages.models.backends import REGISTRIES, ModelCard, backend
from stages.models.papers import WEIGHTS, Weight, WeightFile
from stages.settings import ModelSettings


def cache_root() -> Path:
    """The folder that weights are fetched into."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("faceshards")) / "models"


def known_weights(settings: ModelSettings) -> dict[str, Weight]:
    """Name -> papers: those of the table, and those that a registered backend brings itself."""
    backends = [backend(task, name) for task, names in REGISTRIES.items() for name in names]
    return WEIGHTS | {weight.name: weight for cls in backends for weight in cls.weights(settings)}


def known(name: str, settings: ModelSettings) -> Weight:
    """The papers of a weight.

    Raises:
        WeightsError: for an unknown name; lists the known ones.
    """
    weights = known_weights(settings)
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
    path = _given(weight, settings, task)
    if path:
        return path
    path = _installed(weight, task)
    if path is None and settings.allow_download:
        return fetch(weight)
    if path is None:
        raise WeightsError(f"The weights {weight.name!r} are missing: {_remedy(weight, weight.under(_roots()[0]))}")
    for file, location in weight.paths(path, task).items():
        if not _matches(location, file):
            wrong = f"{location} has sha256 {sha256_of_file(location)}, not {file.sha256}"
            raise WeightsError(f"{wrong}: delete it, then {_remedy(weight, path)}")
    return path


def card(weight: Weight, task: str, settings: ModelSettings) -> ModelCard:
    """The card of a weight's file for a task; the file is found and verified for it."""
    for file, location in weight.paths(find(weight, settings, task), task).items():
        if file.task == task:
            return ModelCard(weight.name, task, sha256_of_file(location), weight.licence, weight.commercial)
    raise WeightsError(f"The weights {weight.name!r} do not hold a {task}.")


def require_licences(cards: Iterable[ModelCard], settings: ModelSettings) -> None:
    """Refuse weights that forbid commercial use until the user has accepted that once.

    Raises:
        WeightsError: names the weights, their licences, and the setting that accepts them.
    """
    if settings.accept_noncommercial:
        return
    bound = [f"{model.name} ({model.licence})" for model in cards if not model.commercial]
    if bound:
        raise WeightsError(
            f"These weights may not be used commercially: {'; '.join(bound)}. Accept their licences once with "
            "`--set models.accept_noncommercial=true`, or choose `--profile permissive`."
        )


class WeightState(NamedTuple):
    """A weight as `models list` and `models check` show it."""

    weight: Weight
    state: str
    """missing, found (not compared), verified, given (by models.paths), or wrong: and which file."""
    path: Path | None


def states(weights: Iterable[Weight], settings: ModelSettings, *, hashes: bool = False) -> list[WeightState]:
    """Where weights are; with `hashes`, their files are read and compared too."""
    rows = []
    for weight in weights:
        given = _given(weight, settings)
        path = given or _installed(weight)
        state = "given" if given else "found" if path else "missing"
        if path and hashes:
            wrong = [at.name for file, at in weight.paths(path).items() if not _matches(at, file)]
            state = f"{'given, ' if given else ''}wrong sha256: {', '.join(wrong)}" if wrong else "verified"
        rows.append(WeightState(weight, state, path))
    return rows


def _roots() -> list[Path]:
    given = os.environ.get("FACESHARDS_MODELS")
    return [Path(given).expanduser(), cache_root()] if given else [cache_root()]


def _given(weight: Weight, settings: ModelSettings, task: str = "") -> Path | None:
    """The path that the user set for a weight; it is not compared with the known sha256."""
    text = settings.paths.get(weight.name)
    if text is None:
        return None
    path = Path(text).expanduser()
    if path.is_dir() and not weight.is_folder:
        path /= weight.files[0].name
    absent = [location for location in weight.paths(path, task).values() if not location.is_file()]
    if absent:
        raise WeightsError(f"models.paths.{weight.name} = {text!r} is wrong: {absent[0]} does not exist; correct it.")
    return path


def _installed(weight: Weight, task: str = "") -> Path | None:
    for root in _roots():
        path = weight.under(root)
        if all(location.is_file() for location in weight.paths(path, task).values()):
            return path
    return None


def _matches(path: Path, file: WeightFile) -> bool:
    return path.is_file() and (not file.sha256 or sha256_of_file(path) == file.sha256)


def _remedy(weight: Weight, path: Path) -> str:
    """What to do when a weight is not at `path`."""
    sources = [weight.archive] if weight.archive else list(weight.files)
    files = ", ".join(f"{weight.url(file)} (sha256 {file.sha256 or 'not known'})" for file in sources)
    names = " and ".join(file.name for file in weight.files)
    action = f"unpack {names} into" if weight.archive else f"put {names} into"
    folder = path if weight.is_folder else path.parent
    return f"run `python -m pipeline models fetch {weight.name}`, or fetch {files} and {action} {folder}."


def fetch(weight: Weight, root: Path | None = None) -> Path:
    """Fetch what is missing or damaged of a weight into `root` (default: the cache); returns its path there.

    A file gets its name once it is whole and verified. Files of the hub go on where they were interrupted.

    Raises:
        WeightsError: when it cannot be fetched or is not what it should be; says what to do.
    """
    root = root or cache_root()
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
                targets[file].parent.mkdir(exist_ok=True)
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
    """Download a file by its URL, and compare its sha256."""
    import pooch

    pooch.get_logger().setLevel("WARNING")
    bar = sys.stderr.isatty()
    return Path(pooch.retrieve(file.source, f"sha256:{file.sha256}", file.name, folder, progressbar=bar))
