"""Validation: the same prompts, faces and seeds again and again, as a grid of images and as ID similarity."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pipeline.shared.atomic import write_atomically
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.base_model import Base
from pipeline.train.loader import Face, first_faces, unconditional
from pipeline.train.settings import TrainConfig
from pipeline.train.validate.grid import Row, draw
from pipeline.train.validate.judge import Judge

if TYPE_CHECKING:
    from pipeline.train.job import Job

Pixels = npt.NDArray[np.uint8]
"""(H, W, 3) RGB."""


class Validator:
    """Samples a grid of images with the adapter as it is, and writes RUN/validation/step-XXXXXXXX.png."""

    def __init__(self, job: "Job", base: Base) -> None:
        """Take the faces from the shards and load the judge; nothing where validation is off.

        Raises:
            WeightsError: when the judge's pack is not there.
            CorruptShardError: when a sample cannot be read.
        """
        config = job.config
        self._config, self._base = config, base
        self._folder = job.run.root / "validation"
        self._faces: Sequence[Face] = ()
        self._judge: Judge | None = None
        if config.watch.validate_every:
            encoder = config.adapter.image_encoder
            self._faces = first_faces(job.dataset, config.watch.validate_faces, job.variant.reads, encoder)
            nothing = unconditional(job.dataset, job.variant.reads, encoder)
            self._nothing = {role: torch.from_numpy(features) for role, features in nothing.items()}
            self._judge = Judge(config.watch.judge) if config.watch.judge else None

    def run(self, model: AdapterModel, step: int) -> dict[str, float]:
        """Write the grid of a step.

        Returns:
            With a judge: `faces_found`, the share of images that show a face, and `id_similarity`, the mean cosine
            over these, where there are any. Else nothing.
        """
        prompts = self._config.watch.validate_prompts
        with _undisturbed(model, self._base.device):
            sampler = Sampler(self._base, model, self._nothing, self._config)
            images = [[sampler(face, column) for column in range(len(prompts))] for face in self._faces]
        found = [self._judged(face, row) for face, row in zip(self._faces, images, strict=True)]
        rows = [
            Row(face.key, face.image, row, [_caption(one, self._judge) for one in judged])
            for face, row, judged in zip(self._faces, images, found, strict=True)
        ]
        self._write(draw(prompts, rows), step)
        return _metrics([one for judged in found for one in judged]) if self._judge else {}

    def _judged(self, face: Face, images: Sequence[Pixels]) -> list[float | None]:
        if self._judge is None:
            return [None] * len(images)
        return self._judge.similarity(np.stack(images), np.stack([face.image] * len(images)))

    def _write(self, sheet: Pixels, step: int) -> None:
        self._folder.mkdir(exist_ok=True)
        png = BytesIO()
        Image.fromarray(sheet).save(png, "PNG")
        write_atomically(self._folder / f"step-{step:08d}.png", png.getvalue())


class Sampler:
    """The stock pipeline of the base, handed the adapter's UNet and image tokens."""

    def __init__(
        self, base: Base, model: AdapterModel, unconditional: Mapping[str, Tensor], config: TrainConfig
    ) -> None:
        """Sample as the settings say; `unconditional` is role -> features of no face, one sample's."""
        self._base, self._model, self._config = base, model, config
        self._unconditional = unconditional
        self._pipeline: Any = base.sampler()

    def __call__(self, face: Face, column: int) -> Pixels:
        """One image of a face with the prompt of a column.

        All faces of a column start from the same noise, at each step of the training too: what differs is the face's.
        """
        watch, side = self._config.watch, self._config.data.resolution
        dtype = self._base.dtype
        with torch.autocast(self._base.device.type, dtype, enabled=dtype != torch.float32):
            latents = self._pipeline(
                watch.validate_prompts[column],
                negative_prompt="",  # what "no caption" was in training; SDXL's pipeline would take zeros
                height=side,
                width=side,
                num_inference_steps=watch.validate_steps,
                guidance_scale=watch.guidance_scale,
                generator=torch.Generator().manual_seed(self._config.seed + column),
                cross_attention_kwargs={"ip_hidden_states": self._tokens(face.condition, watch.guidance_scale > 1)},
                output_type="latent",
            ).images
        # Decoded by the base, which knows the precision that its VAE needs.
        image: Pixels = self._base.decode(latents)[0]
        return image

    def _tokens(self, condition: Mapping[str, Tensor], guided: bool) -> Tensor:
        """Image tokens of the face, below those of no face where the pipeline computes both."""
        pair = [self._unconditional, condition] if guided else [condition]
        device = self._base.device
        return self._model.tokens(
            {role: torch.stack([one[role].to(device, torch.float32) for one in pair]) for role in condition}
        )


@contextmanager
def _undisturbed(model: AdapterModel, device: torch.device) -> Iterator[None]:
    """Evaluate without gradients, and leave random states and the mode of every module as they were."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _caption(similarity: float | None, judge: Judge | None) -> str:
    if judge is None:
        return ""
    return "no face" if similarity is None else f"ID {similarity:.2f}"


def _metrics(found: Sequence[float | None]) -> dict[str, float]:
    known = [one for one in found if one is not None]
    share = {"faces_found": len(known) / len(found)}
    return {**share, "id_similarity": fmean(known)} if known else share
