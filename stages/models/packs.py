"""Packs of insightface: which file of a named pack, or of any folder, detects and which recognises."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from schemas.arcface import INSIGHTFACE_LICENCE
from schemas.digest import sha256_of_file
from schemas.errors import WeightsError
from stages.models.backends import ModelCard
from stages.models.papers import WEIGHTS, Weight
from stages.models.weights import card, find, located
from stages.settings import ModelSettings

_UNUSED = ("1k3d68.onnx", "2d106det.onnx", "genderage.onnx")
_MANIFEST = "manifest.json"
_MANIFEST_TASKS = {"detector": "detection", "face_embedder": "recognition"}


def pack_weights(settings: ModelSettings) -> tuple[Weight, ...]:
    """The weights of `models.pack`, none when it is a folder; a WeightsError when it is neither a name nor a folder."""
    if settings.pack in WEIGHTS:
        return (WEIGHTS[settings.pack],)
    if not Path(settings.pack).expanduser().is_dir():
        packs = [weight.name for weight in WEIGHTS.values() if "face_embedder" in weight.tasks]
        raise WeightsError(f"models.pack = {settings.pack!r} is neither a folder nor one of {', '.join(packs)}.")
    return ()


def pack_file(task: str, settings: ModelSettings) -> Path:
    """The ONNX file of `models.pack` that does a task (detector or face_embedder), verified if the pack is known.

    Raises:
        WeightsError: when the pack is neither a known name nor a folder, or has no file for the task.
    """
    if pack_weights(settings):
        weight = WEIGHTS[settings.pack]
        for file, path in weight.paths(find(weight, settings, task), task).items():
            if file.task == task:
                return path
        raise _no_task(task, settings)
    # a folder of unknown origin: by its manifest, known names, then graphs
    folder = Path(settings.pack).expanduser()
    if declared := _declared(folder, task):
        if not (folder / declared[0]).is_file():
            raise WeightsError(f"{folder / _MANIFEST} names {declared[0]}, which is not there: correct or remove it.")
        return folder / declared[0]
    names = {file.name for weight in WEIGHTS.values() for file in weight.files if file.task == task}
    others = {file.name for weight in WEIGHTS.values() for file in weight.files} - names
    candidates = sorted(path for path in folder.glob("*.onnx") if path.name not in (*_UNUSED, *others))
    for path in [path for path in candidates if path.name in names] or candidates:
        if path.name in names or _task_of(path) == task:
            return path
    raise WeightsError(f"The pack {folder} holds no ONNX file for the {task}: set models.pack to a folder with one.")


def _declared(folder: Path, task: str) -> tuple[str, Any] | None:
    """A task's file and preprocessing by insightface's manifest of version 2; older ones do not count."""
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        return None
    try:
        content = json.loads(manifest.read_bytes())
        if content.get("manifest_version") != 2:
            return None
        entry = content["tasks"][_MANIFEST_TASKS[task]]
        return str(entry["file"]), entry.get("preprocessing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{manifest} names no file for the {task} ({error!r}): correct or remove it.") from error


def declared_pixels(path: Path, task: str) -> tuple[float, float] | None:
    """Mean and standard deviation of pixels as the manifest beside a file declares them; None where there is none."""
    _, pixels = _declared(path.parent, task) or ("", None)
    if pixels == "embedded":
        return 0.0, 1.0
    return (float(pixels["mean"]), float(pixels["std"])) if pixels else None


def _task_of(path: Path) -> str:
    """The task of an ONNX graph, by the rules of insightface's router; empty when it is neither of ours."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise WeightsError(f"{path} is not an ONNX model: remove it from the pack or fetch it again.") from error
    fed = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in fed]
    if len(graph.output) >= 5:
        return "detector"
    shape = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    square = len(shape) == 4 and shape[2] == shape[3] and shape[2] >= 112 and shape[2] % 16 == 0 and shape[2] != 192
    return "face_embedder" if square and len(graph.output) == 1 else ""


def pack_card(task: str, settings: ModelSettings) -> ModelCard:
    """The card of the file of `models.pack` for a task; in a folder, a file's sha256 shows its licence."""
    if pack_weights(settings):
        weight = WEIGHTS[settings.pack]
        if task not in weight.tasks:
            raise _no_task(task, settings)
        return replace(card(weight, task, settings), name=f"{settings.pack}/{located(weight, task, settings)[0].name}")
    path = pack_file(task, settings)
    sha256 = sha256_of_file(path)
    name = f"{Path(settings.pack).expanduser().resolve().name}/{path.name}"
    for weight in WEIGHTS.values():
        if any(file.sha256 == sha256 for file in weight.files):
            return ModelCard(name, task, sha256, weight.licence, weight.commercial)
    return ModelCard(name, task, sha256, INSIGHTFACE_LICENCE, False)


def _no_task(task: str, settings: ModelSettings) -> WeightsError:
    return WeightsError(f"models.pack = {settings.pack!r} has no {task}: choose another models.{task} or pack.")
