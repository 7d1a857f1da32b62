"""Validation: the same prompts, faces and seeds again and again, as a grid of images and as ID similarity."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.shared.atomic import write_atomically
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.base_model import Base
from pipeline.train.loader import Face, first_faces, unconditional
from pipeline.train.settings import TrainConfig
from pipeline.train.validate.grid import GridRow, Pixels, draw
from pipeline.train.validate.judge import IdJudge

if TYPE_CHECKING:
    from pipeline.train.job import TrainJob


class Validator:
    """Samples a grid of images with the adapter as it is, and writes RUN/validation/step-XXXXXXXX.png."""

    def __init__(self, job: "TrainJob", base: Base) -> None:
        """Take the faces from the shards and load the judge; nothing where validation is off.

        Raises:
            WeightsError: when the judge's pack is not there.
            CorruptShardError: when a sample cannot be read.
        """
        config = job.config
        self._config, self._base = config, base
        self._folder = job.run.root / "validation"
        self._faces: Sequence[Face] = ()
        self._judge: IdJudge | None = None
        if config.watch.validate_every:
            self._faces = first_faces(job.dataset, config.watch.validate_faces, job.variant.reads, config.adapter)
            nothing = unconditional(job.dataset, job.variant.reads, config.adapter)
            self._nothing = {role: torch.from_numpy(features) for role, features in nothing.items()}
            self._judge = IdJudge(config.watch.judge) if config.watch.judge else None

    def is_due(self, step: int, is_last: bool) -> bool:
        every = self._config.watch.validate_every
        return bool(every) and (is_last or step % every == 0)

    def run(self, model: AdapterModel, step: int) -> dict[str, float]:
        """Write the grid of a step.

        Returns:
            With a judge: `faces_found`, the share of images that show a face, and `id_similarity`, the mean cosine
            over these, where there are any. Else nothing.
        """
        prompts = self._config.watch.validate_prompts
        with _undisturbed(model, self._base):
            sampler = Sampler(self._base, model, self._nothing, self._config)
            images = [[sampler(face, column) for column in range(len(prompts))] for face in self._faces]
        rows, similarities = [], []
        for face, made in zip(self._faces, images, strict=True):
            captions = [""] * len(made)
            if self._judge is not None:
                judged = self._judge.similarity(np.stack(made), np.stack([face.image] * len(made)))
                captions = ["no face" if one is None else f"ID {one:.2f}" for one in judged]
                similarities += judged
            rows.append(GridRow(face.key, face.image, made, captions))
        png = BytesIO()
        Image.fromarray(draw(prompts, rows)).save(png, "PNG")
        self._folder.mkdir(exist_ok=True)
        write_atomically(self._folder / f"step-{step:08d}.png", png.getvalue())
        return mean_similarity(similarities) if self._judge else {}


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
        device, dtype = self._base.device, self._base.dtype
        # Below those of no face, where the pipeline computes both.
        pair = [self._unconditional, face.condition] if watch.guidance_scale > 1 else [face.condition]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            tokens = self._model.tokens(
                {role: torch.stack([one[role].to(device, torch.float32) for one in pair]) for role in face.condition}
            )
            latents = self._pipeline(
                watch.validate_prompts[column],
                negative_prompt="",  # what "no caption" was in training; SDXL's pipeline would take zeros
                height=side,
                width=side,
                num_inference_steps=watch.validate_steps,
                guidance_scale=watch.guidance_scale,
                generator=torch.Generator().manual_seed(self._config.seed + column),
                cross_attention_kwargs={"ip_hidden_states": tokens},
                output_type="latent",
            ).images
        # Decoded by the base, which knows the precision that its VAE needs.
        image: Pixels = self._base.decode(latents)[0]
        return image


@contextmanager
def _undisturbed(model: AdapterModel, base: Base) -> Iterator[None]:
    """Evaluate without gradients; random states, modules' modes, and which encoders are loaded stay as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), base.encoders_as_before():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def mean_similarity(similarities: Sequence[float | None]) -> dict[str, float]:
    """`faces_found` and, where there are any, `id_similarity`; None is an image without a face."""
    known = [one for one in similarities if one is not None]
    share = {"faces_found": len(known) / len(similarities)}
    return {**share, "id_similarity": fmean(known)} if known else share
