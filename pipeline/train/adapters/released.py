"""The community's file layout: names, containers, and the stand-alone LoRA file; written and read strictly."""

import json
import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.shared.atomic import replace_atomically, write_atomically
from schemas.errors import FaceShardsError, SourceError, first_line
from schemas.targets import BaseKind

_PARTS = ("image_proj", "ip_adapter")
_LORA_LAYERS = {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out_0"}
"""Module in an adapter file -> module in a LoRA file."""
DAMAGED = (
    *(OSError, SafetensorError, RuntimeError, ValueError, EOFError, MemoryError, OverflowError, pickle.UnpicklingError),
    *(AssertionError, AttributeError, LookupError, TypeError, struct.error),
)
"""What readers of weights raise for files that are torn or hold other things; torch's gives its own mistakes away."""


def write_released(
    folder: Path,
    name: str,
    tensors: Mapping[str, Tensor],
    *,
    attention_paths: Iterable[str],
    kind: BaseKind,
    sidecar: Mapping[str, Any],
) -> list[Path]:
    """Write `name`.safetensors, .bin, .json, and the LoRA file where there is a LoRA; all in float16.

    `tensors` have the flat keys of `AdapterModel.trained`; `attention_paths` are the UNet's attention layers in the
    order of `named_attention`.

    Raises:
        FaceShardsError: when a weight is not finite in float16.
    """
    half = {key: tensor.detach().to("cpu", torch.float16).contiguous() for key, tensor in tensors.items()}
    for key, tensor in half.items():
        if not torch.isfinite(tensor).all():
            raise FaceShardsError(f"{key} holds numbers that are not finite in float16: the training diverged")
    files = [folder / f"{name}.safetensors", folder / f"{name}.bin"]
    replace_atomically(files[0], lambda path: save_tensors(half, path))
    nested: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for key, tensor in half.items():
        part, _, rest = key.partition(".")
        nested[part][rest] = tensor

    def save_bin(path: Path) -> None:
        with path.open("wb") as stream:  # given a path, torch writes its name, here a temporary one, into the file
            torch.save(nested, stream)

    replace_atomically(files[1], save_bin)
    lora = lora_tensors(half, list(attention_paths), kind)
    if lora:
        files.append(folder / f"{name}_lora.safetensors")
        replace_atomically(files[-1], lambda path: save_tensors(lora, path))
    files.append(folder / f"{name}.json")
    write_atomically(files[-1], (json.dumps(sidecar, indent=2, sort_keys=True) + "\n").encode())
    return files


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a .safetensors file; with the mode that the umask gives, as `save_file` makes it its owner's alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
    path.chmod(mode)


def lora_tensors(tensors: Mapping[str, Tensor], paths: list[str], kind: BaseKind) -> dict[str, Tensor]:
    """The LoRA part of an adapter under Kohya-style names (`lora_unet_<path>_to_q.lora_down.weight`, …)."""
    lora: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        part, number, *rest = key.split(".")
        if part != "ip_adapter" or rest[0] not in _LORA_LAYERS:
            continue
        module = f"lora_unet_{paths[int(number)].replace('.', '_')}_{_LORA_LAYERS[rest[0]]}"
        lora[f"{module}.lora_{rest[1]}.weight"] = tensor
        if kind == "sdxl" and rest[1] == "down":  # strength alpha / rank = 1, as in the published SDXL files
            lora[f"{module}.alpha"] = torch.tensor(len(tensor))
    return lora


def read_released(path: Path) -> dict[str, Tensor]:
    """The tensors of a released adapter, .safetensors or .bin, under flat keys; pickled objects are never loaded.

    Raises:
        SourceError: when there is no such file, or it is no adapter.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        nested = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(nested, dict) or set(nested) != set(_PARTS):
            raise ValueError("it does not hold image_proj and ip_adapter")
        flat = {f"{part}.{key}": tensor for part in _PARTS for key, tensor in nested[part].items()}
        for tensor in flat.values():
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
                raise ValueError("it holds other things than plain tensors")
        return flat
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist; give the .safetensors or .bin file of a released adapter.") from None
    except pickle.UnpicklingError as error:  # torch's own words would advise to load it all the same
        reason = "it is damaged, or holds pickled objects that are no tensors, which are never loaded"
        raise SourceError(f"{path} cannot be read as an adapter: {reason}.") from error
    except DAMAGED as error:
        raise SourceError(f"{path} cannot be read as an adapter: {first_line(error)}.") from error


def read_sidecar(path: Path) -> dict[str, Any]:
    """What the JSON beside a released adapter says of it; empty where there is none that `export` wrote."""
    try:
        sidecar = json.loads(path.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(sidecar, dict) and {"variant", "recipe", "dataset"} <= sidecar.keys()
    return sidecar if is_ours else {}


def require_fit(path: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], variant: str) -> None:
    """Raises a SourceError with what a file has otherwise than a variant: keys, shapes, numbers that are not finite."""
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    whole = [key for key, tensor in tensors.items() if not tensor.is_floating_point()]
    broken = [key for key in tensors if key not in whole and not torch.isfinite(tensors[key].float()).all()]
    problems = [
        *(f"it lacks {key}" for key in missing[:1]),
        *(f"it has the unknown {key}" for key in extra[:1]),
        *(f"{key} is {list(tensors[key].shape)}, not {list(own[key].shape)}" for key in shapes[:1]),
        *(f"{key} holds {tensors[key].dtype}, no floating-point numbers" for key in whole[:1]),
        *(f"{key} holds numbers that are not finite" for key in broken[:1]),
    ]
    if problems:
        raise SourceError(f"{path} is no {variant} adapter for this base: {'; '.join(problems)}.")
