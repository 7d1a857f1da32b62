"""From a checkpoint to the files that people load: released names, float16, a sidecar that tells all about them."""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline.train.adapters.attention import named_attention
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.adapters.released import write_released
from pipeline.train.job import Job
from pipeline.train.loader import unconditional
from pipeline.train.run_folder import RunFolder, writing
from schemas.errors import OutputError

_CONDITIONS = {
    "arcface": "normed embedding of the 112x112 norm_crop",
    "pooled": "pooled features of the segmented 224x224 norm_crop, RGB",
    "hidden": "token features of the segmented 224x224 norm_crop, RGB",
}
"""What a role was computed from."""


def described(job: Job, model: AdapterModel) -> dict[str, Any]:
    """What run.json says: the identity of the run, and all that an export needs besides weights."""
    encoder = job.config.adapter.image_encoder
    return {
        "identity": job.identity,
        "name": job.variant.released_name(job.base.kind, encoder),
        "attention_paths": [path for path, _ in named_attention(model.unet)],
        "sidecar": _sidecar(job, _num_tokens(job, model)),
    }


def _sidecar(job: Job, num_tokens: int) -> dict[str, Any]:
    base = {"name": job.base.name, "task": "base", "licence": job.base.licence, "sha256": ""}
    weights = [*job.dataset.models, base]
    return {
        "faceshards": metadata.version("faceshards"),
        "variant": job.variant.name,
        "base": job.base.name,
        "kind": job.base.kind,
        "image_encoder": job.config.adapter.image_encoder,
        "condition": {role: _CONDITIONS[role] for role in job.variant.reads},
        "num_tokens": num_tokens,
        "lora_rank": job.config.adapter.lora_rank if job.variant.lora else 0,
        **job.variant.sidecar,
        "preset": job.preset,
        "recipe": _recipe(job),
        "dataset": {
            "digest": job.dataset.digest,
            "profiles": sorted(job.dataset.profiles),
            "samples": job.dataset.samples,
        },
        "weights": weights,
        "licences": sorted({weight["licence"] for weight in weights}),
    }


def _recipe(job: Job) -> dict[str, Any]:
    """The config, without what was watched, and with the names of files in place of their paths."""
    recipe = job.config.model_dump(mode="json", exclude={"watch"})
    for section, key in (("adapter", "init_from"), ("objective", "id_loss_weights")):
        recipe[section][key] = Path(recipe[section][key]).name
    return recipe


@torch.no_grad()
def _num_tokens(job: Job, model: AdapterModel) -> int:
    """Image tokens per face."""
    nothing = unconditional(job.dataset, job.variant.reads, job.config.adapter.image_encoder)
    device = next(model.image_proj.parameters()).device
    condition = {role: torch.from_numpy(value)[None].to(device, torch.float32) for role, value in nothing.items()}
    return model.tokens(condition).shape[1]


def export(run: RunFolder, told: Mapping[str, Any], step: int, folder: Path) -> list[Path]:
    """Write the released files of the checkpoint at `step` into `folder`.

    Raises:
        OutputError: when the checkpoint is damaged, or the folder cannot be written.
    """
    tensors = run.exported(step)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return write_released(
            folder,
            told["name"],
            tensors,
            attention_paths=told["attention_paths"],
            kind=told["identity"]["kind"],
            sidecar={**told["sidecar"], "steps": step},
        )


def export_run(root: Path, step: int | None, folder: Path | None) -> list[Path]:
    """`export RUN`: the released files of a checkpoint, the last one by default, into RUN or another folder.

    Raises:
        OutputError: when RUN is no run, or has no such checkpoint.
    """
    run = RunFolder(root)
    told = run.known()
    if told is None:
        raise OutputError(f"{root} holds no run (there is no run.json): give the --out of a training run.")
    steps = run.steps()
    if not steps or (step is not None and step not in steps):
        there = f"there are those of steps {', '.join(map(str, steps))}" if steps else "there is none yet"
        raise OutputError(f"{root} has no checkpoint{'' if step is None else f' of step {step}'}: {there}.")
    return export(run, told, steps[-1] if step is None else step, folder or root)
