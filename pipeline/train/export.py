"""From a checkpoint to the files that people load: released names, float16, a sidecar with all about them."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline.train.adapter_card import write_adapter_card
from pipeline.train.adapters.attention import named_attention
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.adapters.released import read_sidecar, write_released
from pipeline.train.adapters.variants import Variant, variant
from pipeline.train.job import TrainJob
from pipeline.train.run_folder import RunFolder, writing
from schemas.arcface import LICENCES, PACK_FILES
from schemas.digest import sha256_of_file
from schemas.errors import OutputError
from schemas.targets import BaseKind

_CONDITIONS = {
    "arcface": "normed embedding of the 112x112 norm_crop",
    "pooled": "pooled features of the {picture} 224x224 norm_crop, RGB",
    "hidden": "token features of the {picture} 224x224 norm_crop, RGB",
}
"""What a role was computed from."""
_LORA = (
    "diffusers needs peft beside it, else it leaves the LoRA out with one line in its log; load_ip_adapter brings the "
    "LoRA along: _lora.safetensors is for ComfyUI and webui, and whoever loads both in diffusers has it twice."
)
_SHORTCUT = (
    "In diffusers set pipe.unet.encoder_hid_proj.image_projection_layers[0].shortcut = True after loading: no file can "
    "say it."
)
_SEGMENTED = (
    "It was trained on features of the face alone, on the fill colour of its shards: give it such pictures, as "
    "docs/training.md shows, or train with segment.condition = plain."
)


def loading(
    variant: Variant, kind: BaseKind, encoder: str, condition: str, models: Sequence[Mapping[str, str]]
) -> list[str]:
    """What whoever loads the files should know, a sentence each; `models` are those behind the condition."""
    is_sdxl = kind == "sdxl"
    embedder = next((one for one in models if one["task"] == "face_embedder" and "arcface" in variant.reads), None)
    notes = {
        _LORA: variant.lora,
        _SHORTCUT: variant.shortcut,
        _SEGMENTED: condition == "segmented" and variant.reads != ("arcface",),
        "Neither ComfyUI nor webui loads full-face on SDXL; diffusers does.": is_sdxl and variant.name == "full-face",
        "ComfyUI's and webui's presets leave faceid-plus on SDXL out: choose model and preprocessor by hand.": is_sdxl
        and variant.name == "faceid-plus",
        "Only diffusers loads it, with features handed in: other programs have no DINOv2.": encoder == "dinov2"
        and variant.reads != ("arcface",),
    }
    if embedder and embedder["sha256"] not in ("", PACK_FILES["w600k_r50"][1]):
        notes[
            f"Its ID vectors are of {embedder['name']}: ComfyUI and webui compute buffalo_l's by themselves, with "
            "which it draws other people. Choose that recogniser there, or hand its vectors to diffusers."
        ] = True
    return [note for note, applies in notes.items() if applies]


def _initial(path: Path) -> dict[str, Any] | None:
    """The adapter that a run began as, and what is known of its own training, which the run carries on."""
    if path == Path():
        return None
    sidecar = read_sidecar(path)
    before, dataset = sidecar.get("init_from"), sidecar.get("dataset", {})
    return {
        "name": path.name,
        "sha256": sha256_of_file(path),
        "licences": sidecar.get("licences", [f"unknown ({path.name})"]),
        "lineage": dataset.get("lineage", []),
        "is_known": "lineage" in dataset and (before is None or before["is_known"]),
    }


@torch.no_grad()
def described(job: TrainJob, model: AdapterModel) -> dict[str, Any]:
    """What run.json says: the identity of the run, and all that an export needs besides weights."""
    config, base, variant = job.config, job.base, job.variant
    encoder = config.adapter.image_encoder
    picture = " or ".join(job.features.pictures)
    device = next(model.image_proj.parameters()).device
    nothing = job.features.unconditional.items()
    condition = {role: torch.from_numpy(value)[None].to(device, torch.float32) for role, value in nothing}
    weights = [
        *job.dataset.models,
        {"name": base.name, "task": "base", "licence": base.licence, "sha256": base.sha256},
    ]
    if config.objective.id_loss:
        path = Path(config.objective.id_loss_weights).expanduser()
        sha = sha256_of_file(path)
        licence = LICENCES.get(sha, f"unknown ({path.name})")
        weights.append({"name": path.name, "task": "id_loss", "licence": licence, "sha256": sha})
    if job.last_step and job.run.exists():  # what lies at that path by now may be another file than it began as
        init_from = job.run.description()["sidecar"].get("init_from")
    else:
        init_from = _initial(Path(config.adapter.init_from))
    before = init_from or {"licences": [], "lineage": []}
    # The config without what was watched, and with names of files instead of paths.
    recipe = config.model_dump(mode="json", exclude={"watch"})
    for section, key in (("adapter", "init_from"), ("objective", "id_loss_weights")):
        recipe[section][key] = Path(recipe[section][key]).name
    sidecar = {
        "faceshards": metadata.version("faceshards"),
        "variant": variant.name,
        "base": base.name,
        "kind": base.kind,
        "image_encoder": encoder,
        "condition": {role: _CONDITIONS[role].format(picture=picture) for role in variant.reads},
        "num_tokens": model.tokens(condition).shape[1],
        "lora_rank": config.adapter.lora_rank if variant.lora else 0,
        "shortcut": variant.shortcut,
        "loading": loading(variant, base.kind, encoder, picture, job.dataset.models),
        "preset": job.preset,
        "recipe": recipe,
        "dataset": {
            "digest": job.dataset.digest,
            "profiles": sorted(job.dataset.profiles),
            "samples": job.dataset.samples,
            "lineage": list(dict.fromkeys([*job.dataset.lineage, *before["lineage"]])),
        },
        "weights": weights,
        "init_from": init_from,
        "licences": sorted({*(weight["licence"] for weight in weights), *before["licences"]}),
    }
    watch = config.watch.model_dump(mode="json")
    return {
        "identity": job.identity,
        "name": variant.released_name(base.kind, encoder),
        "attention_paths": [path for path, _ in named_attention(model.unet)],
        "sidecar": sidecar,
        "watch": {**watch, **{key: Path(watch[key]).name for key in ("judge", "clip")}},
    }


def export(run: RunFolder, description: Mapping[str, Any], step: int, folder: Path) -> list[Path]:
    """Write the released files of the checkpoint at `step`, of its average where there is one, into `folder`.

    Outside of the run's checkpoints, a card is written beside them.

    Raises:
        OutputError: when the checkpoint is damaged, or the folder cannot be written.
    """
    weights, average = run.weights(step)
    if average is None and description["sidecar"]["recipe"]["optim"]["ema_decay"]:
        raise OutputError(f"The checkpoint {run.folder(step)} lacks its averaged weights: remove it, then resume.")
    name, kind, about = description["name"], description["identity"]["kind"], description["sidecar"]
    if "loading" not in about:  # of a release that knew of no other picture than the segmented one
        of = variant(about["variant"])
        notes = loading(of, kind, about["image_encoder"], "segmented", about["weights"])
        about = {"init_from": None, "loading": notes, **about}
    paths, sidecar = description["attention_paths"], {**about, "steps": step}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files = write_released(
            folder, name, weights if average is None else average, attention_paths=paths, kind=kind, sidecar=sidecar
        )
    if folder != run.folder(step):
        write_adapter_card(folder, name, sidecar)
    return files


def export_run(root: Path, step: int | None, folder: Path | None) -> list[Path]:
    """`export RUN`: the released files of a checkpoint, the last one by default, into RUN or another folder.

    Raises:
        OutputError: when RUN is no run, or has no such checkpoint.
    """
    run = RunFolder(root)
    return export(run, run.description(), run.chosen(step), folder or root)
