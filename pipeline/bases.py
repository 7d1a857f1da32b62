"""Base models by name: where their folders lie, which layout they have, and the tiny ones that are made here.

Shared by the dataset's encoders and the trainer. Nothing is ever downloaded.
"""

import json
import os
import shutil
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_cache_dir

from schemas.errors import SourceError, WeightsError

Kind = Literal["sd15", "sdxl"]

_TINY_VERSION = 1
"""Part of the folder's name; to be raised when what `pipeline.tiny` builds changes."""


@dataclass(frozen=True)
class _Hub:
    """A base on the Hugging Face hub."""

    repository: str
    licence: str


_KNOWN = {
    "sd15": _Hub("stable-diffusion-v1-5/stable-diffusion-v1-5", "CreativeML OpenRAIL-M"),
    "sdxl": _Hub("stabilityai/stable-diffusion-xl-base-1.0", "CreativeML Open RAIL++-M"),
}
_NAMES = ("tiny", "tiny-sdxl", *_KNOWN)


@dataclass(frozen=True)
class BaseSource:
    """A base model's folder in diffusers' layout."""

    name: str
    folder: Path
    kind: Kind
    licence: str
    text_width: int
    """Width of the text tokens, the UNet's `cross_attention_dim`."""


def find_base(name: str, *, sdxl: bool = False) -> BaseSource:
    """The base of that name: `tiny`, `tiny-sdxl`, `sd15`, `sdxl`, or the path of a diffusers folder.

    Args:
        name: what the user gave.
        sdxl: whether `tiny` stands for the SDXL-like one.

    Raises:
        WeightsError: when it is not on this machine; says what to fetch and where to put it.
        SourceError: when a path is no diffusers folder of Stable Diffusion 1.5's or SDXL's layout.
    """
    if name in ("tiny", "tiny-sdxl"):
        kind: Kind = "sdxl" if sdxl or name == "tiny-sdxl" else "sd15"
        return _described("tiny" if kind == "sd15" else "tiny-sdxl", _tiny(kind), "Apache-2.0 (random weights)")
    if name in _KNOWN:
        return _described(name, _known_folder(name, _KNOWN[name]), _KNOWN[name].licence)
    folder = Path(name)
    if not folder.is_dir():
        near = get_close_matches(name.lower(), _NAMES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise SourceError(f"The base {name!r} is neither a folder nor one of {', '.join(_NAMES)}{hint}.")
    return _described(folder.resolve().name, folder, f"unknown ({folder.resolve().name})")


def _described(name: str, folder: Path, licence: str) -> BaseSource:
    for part in ("unet", "vae", "scheduler", "text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise SourceError(f"{folder} is no diffusers folder of a Stable Diffusion model: it has no {part}/.")
    config = _json(folder / "unet" / "config.json")
    width = config.get("cross_attention_dim")
    if not isinstance(width, int):
        raise SourceError(
            f"{folder}/unet/config.json has no single cross_attention_dim: it is no Stable Diffusion UNet."
        )
    is_sdxl = config.get("addition_embed_type") == "text_time" and (folder / "text_encoder_2").is_dir()
    return BaseSource(name, folder, "sdxl" if is_sdxl else "sd15", licence, width)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path} is not the config of a model.")
    return content


def _known_folder(name: str, hub: _Hub) -> Path:
    """FACESHARDS_MODELS/<name>, or the Hugging Face cache."""
    root = os.environ.get("FACESHARDS_MODELS")
    if root and (Path(root) / name).is_dir():
        return Path(root) / name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub.repository, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        place = f"{root or '$FACESHARDS_MODELS'}/{name}"
        raise WeightsError(
            f"The base {name} is not on this machine: fetch {hub.repository} in diffusers' layout with safetensors "
            f"({hub.licence}), as by `hf download {hub.repository} --local-dir {place}`, or give its folder's path."
        ) from error


def _tiny(kind: Kind) -> Path:
    """The folder of a tiny base, made once; a second process that makes it at the same time loses harmlessly."""
    parent = Path(user_cache_dir("faceshards")) / "bases"
    folder = parent / f"tiny-{kind}-v{_TINY_VERSION}"
    if folder.is_dir():
        return folder
    from pipeline.tiny import write_tiny

    temporary = parent / f".tmp-{folder.name}.{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        write_tiny(temporary, kind)
        temporary.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise WeightsError(f"{parent} cannot be written ({error.strerror}): set XDG_CACHE_HOME.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
