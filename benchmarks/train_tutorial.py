"""The loop of the published tutorial, for train_loop.py to compare with: everything is computed in each step.

What its scripts do, in our words: photos and face crops are opened, resized and normalised in the loader; the frozen
VAE, text encoder and CLIP image tower run in each step; then UNet, loss, backward, AdamW, and the loss is read. Model,
optimiser, precision and attention are the trainer's own, which flatters it: its scripts keep the frozen UNet in float32
and compute attention maps that nothing uses.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from train_made import Made

from pipeline.train.base_model import Base
from pipeline.train.session import Session

CAPTION = "a photo of a person"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Photos(Dataset[dict[str, Any]]):
    """The tutorial's data list: a photo, the aligned face of it, its ID vector, a caption."""

    def __init__(self, made: Made, resolution: int) -> None:
        self._paths = sorted(made.photos.glob("*.face.jpg"))
        self._resolution = resolution

    def __len__(self) -> int:
        return 1_000_000  # no epoch ends, which would start all workers again

    def __getitem__(self, index: int) -> dict[str, Any]:
        face = self._paths[index % len(self._paths)]
        stem = face.name.removesuffix(".face.jpg")
        return {
            "pixels": (_pixels(_square(Image.open(face.with_name(f"{stem}.jpg")), self._resolution)) - 0.5) / 0.5,
            "face": (_pixels(_square(Image.open(face), 224)) - _channels(MEAN)) / _channels(STD),
            "arcface": torch.from_numpy(np.load(face.with_name(f"{stem}.npy"))),
            "text": CAPTION,
        }


def _square(photo: Image.Image, side: int) -> Image.Image:
    """The short side scaled to `side`, and the centre cut."""
    photo = photo.convert("RGB")
    scale = side / min(photo.size)
    width, height = (round(length * scale) for length in photo.size)
    left, top = (width - side) // 2, (height - side) // 2
    return photo.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))


def _pixels(photo: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 255


def _channels(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


class Tutorial:
    """Steps of the tutorial's loop on a session's model and optimiser."""

    def __init__(self, session: Session, base: Base, made: Made) -> None:
        self._session, self._base = session, base
        self._reads, data = session.model.variant.reads, session._job.config.data
        tower = transformers.CLIPVisionModelWithProjection.from_pretrained(made.vision, dtype=base.dtype)
        self._tower = tower.eval().requires_grad_(False).to(base.device)
        photos = Photos(made, data.resolution)
        self._batches = iter(DataLoader(photos, data.batch_size, shuffle=True, num_workers=data.workers))
        self.parts: dict[str, float] = {}
        """What a part of the steps took so far in CPU time of this process; means nothing on a GPU."""

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.process_time() - start

    def step(self) -> float:
        """One step; the loss, which the tutorial reads each time."""
        with self._part("image files"):
            batch = next(self._batches)
        with self._part("VAE"):
            latents = self._base.encode_images(batch["pixels"], self._session.generator)
        with self._part("image encoder"):
            condition = self._condition(batch)
        with self._part("text encoder"):
            text = self._base.encode_text(batch["text"])
        with self._part("UNet, backward, AdamW"):
            loss = self._loss(latents, text.embeds, condition, self._added(text.pooled))
            self._session._accelerator.backward(loss)
            self._session.optimizer.step()
            self._session.optimizer.zero_grad()
            return loss.item()

    @torch.no_grad()
    def _condition(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        features = {"arcface": batch["arcface"].to(self._base.device)}
        if set(self._reads) - {"arcface"}:
            face = batch["face"].to(self._base.device, self._base.dtype)
            out = self._tower(face, output_hidden_states=True)
            features |= {"pooled": out.image_embeds.float(), "hidden": out.hidden_states[-2].float()}
        return {role: features[role] for role in self._reads}

    def _added(self, pooled: Tensor | None) -> dict[str, Tensor] | None:
        if pooled is None:
            return None
        side = self._session._job.config.data.resolution
        return {
            "text_embeds": pooled,
            "time_ids": pooled.new_tensor([side, side, 0, 0, side, side]).expand(len(pooled), 6),
        }

    def _loss(
        self, latents: Tensor, text: Tensor, condition: dict[str, Tensor], added: dict[str, Tensor] | None
    ) -> Tensor:
        scheduler = self._base.scheduler
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noise = torch.randn_like(latents)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = self._session.forward(noisy, timesteps, text, condition, added)
        return functional.mse_loss(predicted.float(), noise)
