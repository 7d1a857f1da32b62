"""Base models by name: where their folders lie, which layout they have, and the tiny ones that are made here.

Shared by the dataset's encoders and the trainer. Nothing is downloaded but by `python -m pipeline models fetch`.
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
from schemas.errors import SourceError, WeightsError, first_line
from schemas.targets import BaseKind

_TINY_VERSION = 1
"""Part of the folder's name; to be raised when what `pipeline.shared.tiny` builds changes."""
_SD2_WIDTH = 1024
"""Text width of Stable Diffusion 2, whose adapters no program knows."""


@dataclass(frozen=True)
class Hub:
    repository: str
    revision: str
    kind: BaseKind
    licence: str
    paper: str
    weights: dict[str, tuple[int, str]]
    """File -> bytes and sha256, hex. Other files of a base are small, and neither is known here."""

    @property
    def files(self) -> tuple[str, ...]:
        """All that a base needs, relative to its folder."""
        configs = [f"{part}/config.json" for part in _MODELS[self.kind]]
        words = [f"{part}/{name}" for part in _TOKENIZERS[self.kind] for name in _TOKENIZER_FILES]
        return (*self.weights, *configs, *words, "scheduler/scheduler_config.json")

    @property
    def vae_sha256(self) -> str:
        """As `schemas.targets.vae_sha256` gives it of the folder."""
        return self._sha256("vae")

    @property
    def text_sha256(self) -> str:
        """As `schemas.targets.text_sha256` gives it of the folder."""
        return self._sha256("text_encoder")

    def _sha256(self, part: str) -> str:
        return "+".join(sha256 for file, (_, sha256) in self.weights.items() if file.startswith(part))


_SD15 = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_MODELS = {"sd15": _SD15, "sdxl": {**_SD15, "text_encoder_2": "model"}}
"""Parts with weights, and how the names of their files begin."""


def _files(kind: BaseKind, **parts: tuple[int, str]) -> dict[str, tuple[int, str]]:
    return {f"{part}/{_MODELS[kind][part]}.safetensors": known for part, known in parts.items()}


BASES = {
    "sd15": Hub(
        repository="stable-diffusion-v1-5/stable-diffusion-v1-5",
        revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        kind="sd15",
        licence="CreativeML OpenRAIL-M",
        paper="Latent diffusion (arXiv 2112.10752)",
        weights=_files(
            "sd15",
            unet=(3_438_167_540, "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1"),
            vae=(334_643_276, "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c"),
            text_encoder=(492_265_874, "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334"),
        ),
    ),
    "sdxl": Hub(
        repository="stabilityai/stable-diffusion-xl-base-1.0",
        revision="462165984030d82259a11f4367a4eed129e94a7b",
        kind="sdxl",
        licence="CreativeML Open RAIL++-M",
        paper="SDXL (arXiv 2307.01952)",
        weights=_files(
            "sdxl",
            unet=(10_270_077_736, "357650fbfb3c7b4d94c1f5fd7664da819ad1ff5a839430484b4ec422d03f710a"),
            vae=(334_643_268, "1598f3d24932bcfe6634e8b618ea1e30ab1d57f5aad13a6d2de446d2199f2341"),
            text_encoder=(492_265_168, "5c3d6454dd2d23414b56aa1b5858a72487a656937847b6fea8d0606d7a42cdbc"),
            text_encoder_2=(2_778_702_264, "3a6032f63d37ae02bbc74ccd6a27440578cd71701f96532229d0154f55a8d3ff"),
        ),
    ),
}
"""Name -> where its files come from, of the bases that are known by name."""
TINY = ("tiny", "tiny-sdxl")
"""Those that are made here, of random weights."""
_NAMES = (*TINY, *BASES)
_HASHED = (".json", ".safetensors", ".txt")
_TOKENIZERS = {"sd15": ("tokenizer",), "sdxl": ("tokenizer", "tokenizer_2")}
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_KINDS: dict[str | None, BaseKind] = {None: "sd15", "text_time": "sdxl"}
"""Layout by what the UNet's `addition_embed_type` says."""


@dataclass(frozen=True)
class BaseSource:
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
    """The base of that name: `tiny` (with `sdxl` the SDXL-like one), `tiny-sdxl`, one of BASES, or a diffusers folder.

    Raises:
        WeightsError: when it, or the weights of a part, are not on this machine; says what to fetch.
        SourceError: when a path is no diffusers folder of Stable Diffusion 1.5's or SDXL's layout.
    """
    if name in TINY:
        kind: BaseKind = "sdxl" if sdxl or name == "tiny-sdxl" else "sd15"
        return _described("tiny" if kind == "sd15" else "tiny-sdxl", _tiny(kind), "Apache-2.0 (random weights)")
    if name in BASES:
        hub, known, root = BASES[name], base_folder(name), os.environ.get("FACESHARDS_MODELS")
        if known is None:
            target = Path(root).expanduser() / name if root else f"$FACESHARDS_MODELS/{name}"
            raise WeightsError(
                f"The base {name} is not on this machine: run `python -m pipeline models fetch {name}`, or fetch "
                f"{hub.repository} in diffusers' layout with safetensors ({hub.licence}), as by `hf download "
                f"{hub.repository} --local-dir {target}`, or give its folder's path; "
                "`--base tiny` tries things out without any."
            )
        return _described(name, known, hub.licence)
    folder = Path(name)
    if folder.is_file():
        raise SourceError(
            f"The base {name} is a single file: write it as a folder first, by diffusers' "
            "StableDiffusionPipeline.from_single_file(…).save_pretrained(FOLDER), or StableDiffusionXLPipeline's."
        )
    if not folder.is_dir():
        near = get_close_matches(name.lower(), _NAMES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise SourceError(f"The base {name!r} is neither a folder nor one of {', '.join(_NAMES)}{hint}.")
    return _described(folder.resolve().name, folder, card_licence(folder) or f"unknown ({folder.resolve().name})")


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
    # Read as a DDPM schedule, that of another process would train on noise of another, made-up one; and latents that
    # are not just scaled would be of the wrong size. Both without a word.
    noise, vae = _json(folder, "scheduler/scheduler_config.json"), _json(folder, "vae/config.json")
    if "beta_schedule" not in noise or noise.get("use_flow_sigmas"):
        raise SourceError(
            f"{folder}/scheduler ({noise.get('_class_name')}) is no noise schedule of betas, as Stable Diffusion 1.5 "
            "and SDXL have: bases of EDM or flow matching cannot be trained."
        )
    if any(vae.get(key) for key in ("latents_mean", "shift_factor")):
        raise SourceError(f"{folder}/vae shifts its latents (latents_mean, shift_factor): it cannot be trained.")
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
        raise SourceError(f"{folder / file} cannot be read as JSON: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise SourceError(f"{folder / file} is not the config of a model.")
    return content


def card_licence(folder: Path) -> str | None:
    """What the head of the model card in a folder says, as `creativeml-openrail-m`; None where there is none."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    entries = dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([\w.+-]+)", head[1], re.MULTILINE)) if head else {}
    return entries.get("license_name") or entries.get("license")


def base_folder(name: str) -> Path | None:
    """Where a base of BASES lies: FACESHARDS_MODELS/<name>, the cache of `models fetch`, or the Hugging Face cache."""
    root = os.environ.get("FACESHARDS_MODELS")
    for folder in ([Path(root).expanduser()] if root else []) + [Path(user_cache_dir("faceshards")) / "models"]:
        if (folder / name).is_dir():
            return folder / name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(BASES[name].repository, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None


def _tiny(kind: BaseKind) -> Path:
    """The folder of a tiny base, made once; a second process that makes it at the same time loses harmlessly."""
    parent = Path(user_cache_dir("faceshards")) / "bases"
    folder = parent / f"tiny-{kind}-v{_TINY_VERSION}"
    if folder.is_dir():
        return folder
    from safetensors import SafetensorError

    from pipeline.shared.tiny import write_tiny

    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=parent) as temporary:
            made = Path(temporary) / folder.name
            write_tiny(made, kind)
            made.rename(folder)
    except (OSError, SafetensorError) as error:  # the latter for a full disk
        if not folder.is_dir():
            reason = getattr(error, "strerror", None) or first_line(error)
            raise WeightsError(f"{parent} cannot be written ({reason}): set XDG_CACHE_HOME.") from error
    return folder
