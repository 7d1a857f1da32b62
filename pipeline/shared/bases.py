"""Base models by name: where their folders lie, which layout they have, and the tiny ones that are made here.

Shared by the dataset's encoders and the trainer. Nothing is ever downloaded.
"""

import json
import os
import re
import tempfile
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from schemas.digest import sha256_of_file, sha256_of_json
from schemas.errors import SourceError, WeightsError
from schemas.targets import BaseKind

_TINY_VERSION = 1
"""Part of the folder's name; to be raised when what `pipeline.shared.tiny` builds changes."""


_SD2_WIDTH = 1024
"""Text width of Stable Diffusion 2, whose adapters no program knows."""


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
_SD15 = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_MODELS = {"sd15": _SD15, "sdxl": {**_SD15, "text_encoder_2": "model"}}
"""Parts with weights, and how the names of their files begin."""
_HASHED = (".json", ".safetensors", ".txt")
_TOKENIZERS = {"sd15": ("tokenizer",), "sdxl": ("tokenizer", "tokenizer_2")}
_KINDS: dict[str | None, BaseKind] = {None: "sd15", "text_time": "sdxl"}
"""Layout by what the UNet's `addition_embed_type` says."""


@dataclass(frozen=True)
class BaseSource:
    """A base model's folder in diffusers' layout."""

    name: str
    folder: Path
    kind: BaseKind
    licence: str
    text_width: int
    """Width of the text tokens, the UNet's `cross_attention_dim`."""

    @cached_property
    def sha256(self) -> str:
        """Over the configs and weights of all its parts, hex: a name says little, and any folder may have it."""
        parts = ("scheduler", *_MODELS[self.kind], *_TOKENIZERS[self.kind])
        files = [path for part in parts for path in sorted((self.folder / part).iterdir()) if path.suffix in _HASHED]
        return sha256_of_json({str(path.relative_to(self.folder)): sha256_of_file(path) for path in files})


def find_base(name: str, *, sdxl: bool = False) -> BaseSource:
    """The base of that name: `tiny`, `tiny-sdxl`, `sd15`, `sdxl`, or the path of a diffusers folder.

    Args:
        name: what the user gave.
        sdxl: whether `tiny` stands for the SDXL-like one.

    Raises:
        WeightsError: when it, or the weights of a part, are not on this machine; says what to fetch.
        SourceError: when a path is no diffusers folder of Stable Diffusion 1.5's or SDXL's layout.
    """
    if name in ("tiny", "tiny-sdxl"):
        kind: BaseKind = "sdxl" if sdxl or name == "tiny-sdxl" else "sd15"
        return _described("tiny" if kind == "sd15" else "tiny-sdxl", _tiny(kind), "Apache-2.0 (random weights)")
    if name in _KNOWN:
        return _described(name, _known_folder(name, _KNOWN[name]), _KNOWN[name].licence)
    folder = Path(name)
    if not folder.is_dir():
        near = get_close_matches(name.lower(), _NAMES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise SourceError(f"The base {name!r} is neither a folder nor one of {', '.join(_NAMES)}{hint}.")
    return _described(folder.resolve().name, folder, _licence(folder) or f"unknown ({folder.resolve().name})")


def _described(name: str, folder: Path, licence: str) -> BaseSource:
    config = _json(folder, "unet/config.json")
    kind = _KINDS.get(config.get("addition_embed_type"))
    width = config.get("cross_attention_dim")
    if kind is None or not isinstance(width, int) or width == _SD2_WIDTH or config.get("in_channels", 4) != 4:
        raise SourceError(
            f"{folder}/unet is not the UNet of Stable Diffusion 1.5 or SDXL: its config has another in_channels, "
            "cross_attention_dim or addition_embed_type."
        )
    # A missing part is an error now, not when it is needed first.
    for part, stem in _MODELS[kind].items():
        _json(folder, f"{part}/config.json")
        if not any((folder / part).glob(f"{stem}*.safetensors")):
            raise WeightsError(
                f"{folder}/{part} has no {stem}.safetensors; fetch it (pickled weights are not loaded, .fp16 ones are)."
            )
    _json(folder, "scheduler/scheduler_config.json")
    for part in _TOKENIZERS[kind]:
        if not (folder / part / "tokenizer.json").is_file():
            _json(folder, f"{part}/vocab.json")
    return BaseSource(name, folder, kind, licence, width)


def _json(folder: Path, file: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / file).read_bytes())
    except FileNotFoundError as error:
        raise SourceError(
            f"{folder} is no whole diffusers folder of Stable Diffusion 1.5 or SDXL: it has no {file}."
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder / file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise SourceError(f"{folder / file} is not the config of a model.")
    return content


def _licence(folder: Path) -> str | None:
    """What the head of the model card says, as `creativeml-openrail-m`."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    entries = dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([\w.+-]+)", head[1], re.MULTILINE)) if head else {}
    return entries.get("license_name") or entries.get("license")


def _known_folder(name: str, hub: _Hub) -> Path:
    """FACESHARDS_MODELS/<name>, or the Hugging Face cache."""
    root = os.environ.get("FACESHARDS_MODELS")
    folder = Path(root).expanduser() / name if root else None
    if folder and folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub.repository, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        target = folder or f"$FACESHARDS_MODELS/{name}"
        raise WeightsError(
            f"The base {name} is not on this machine: fetch {hub.repository} in diffusers' layout with safetensors "
            f"({hub.licence}), as by `hf download {hub.repository} --local-dir {target}`, or give its folder's path."
        ) from error


def _tiny(kind: BaseKind) -> Path:
    """The folder of a tiny base, made once; a second process that makes it at the same time loses harmlessly."""
    parent = Path(user_cache_dir("faceshards")) / "bases"
    folder = parent / f"tiny-{kind}-v{_TINY_VERSION}"
    if folder.is_dir():
        return folder
    from pipeline.shared.tiny import write_tiny

    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=parent) as temporary:
            made = Path(temporary) / folder.name
            write_tiny(made, kind)
            made.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise WeightsError(f"{parent} cannot be written ({error.strerror}): set XDG_CACHE_HOME.") from error
    return folder
