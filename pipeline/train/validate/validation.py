"""Validation: the same prompts, faces and seeds again and again, as a grid of images and as what judges see of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image as Pillow

from pipeline.shared.atomic import write_atomically
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.base_model import Base
from pipeline.train.loader.faces import Face, first_faces
from pipeline.train.settings import TrainConfig
from pipeline.train.validate.distances import DISTANCES, View, Viewer, copy_paste, scale
from pipeline.train.validate.grid import GridRow, draw
from schemas.arrays import Array, Doubles, Image

if TYPE_CHECKING:
    from pipeline.train.job import TrainJob

OTHERS = 4
"""Photos of a person, beside that of the condition, that images are compared with."""
NAMES = (
    *("faces_found", "id_similarity", "id_to_others", "clip_similarity"),
    *(f"copy_paste_{space}" for space in DISTANCES),
)
"""What may be known of an image; copy_paste_… by `distances.copy_paste`."""


class Turn(NamedTuple):
    """What is drawn of each face."""

    number: int
    """Of the prompt."""
    prompt: str
    text: Doubles | None
    """The prompt as CLIP has it."""
    seed: int
    """Of the noise, from which all faces start: what differs is the face's."""


def turns_of(config: TrainConfig, viewer: Viewer, images: int = 1) -> list[Turn]:
    """So many images with each prompt, the same each time."""
    prompts = config.watch.validate_prompts
    texts = [viewer.clip.text(prompt) if viewer.clip else None for prompt in prompts]
    numbers = [turn // images for turn in range(images * len(prompts))]
    return [Turn(number, prompts[number], texts[number], config.seed + at) for at, number in enumerate(numbers)]


def drawings(
    face: Face, photos: Sequence[View], turns: Sequence[Turn], viewer: Viewer, sampler: "Sampler"
) -> Iterator[tuple[Turn, Image, View, dict[str, float]]]:
    """Draw a face; `photos` are what is seen of its condition's photo and of the others of the person.

    Yields:
        The turn, an image, what judges see of it, and what is known of NAMES.
    """
    condition, *others = photos
    for turn in turns:
        image = sampler(face, turn.prompt, turn.seed)
        view = viewer.image(image)
        score = {"faces_found": float("id" in view)} if viewer.judge else {}
        if "id" in view and "id" in condition:
            score["id_similarity"] = float(view["id"] @ condition["id"])
            if others:
                score["id_to_others"] = fmean(float(view["id"] @ other["id"]) for other in others)
        score |= {f"copy_paste_{space}": value for space, value in copy_paste(view, condition, others).items()}
        if turn.text is not None:
            score["clip_similarity"] = float(view["clip"] @ turn.text)
        yield turn, image, view, score


def means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of what is known of images, in the order of NAMES."""
    return {name: fmean(values) for name in NAMES if (values := [one[name] for one in scores if name in one])}


class Validator:
    """Samples a grid of images with the adapter as it is, and writes RUN/validation/step-XXXXXXXX.png."""

    def __init__(self, job: "TrainJob", base: Base) -> None:
        """Take the faces from the shards and load the judge; nothing where validation is off.

        Raises:
            WeightsError: when the judge's pack is not there.
            CorruptShardError: when a sample cannot be read.
        """
        self._job, self._base, config = job, base, job.config
        self._faces: Sequence[Face] = ()
        if config.watch.validate_every:
            count, reads = config.watch.validate_faces, job.variant.reads
            self._faces = first_faces(job.dataset, count, reads, config.adapter, OTHERS)
            self._viewer = Viewer(config.watch.judge, config.watch.clip)
            self._turns = turns_of(config, self._viewer)
            self._persons = [self._viewer.photos(face) for face in self._faces]

    def is_due(self, step: int, is_last: bool) -> bool:
        every = self._job.config.watch.validate_every
        return bool(every) and (is_last or step % every == 0)

    def run(self, model: AdapterModel, step: int) -> dict[str, float]:
        """Write the grid of a step; returns what can be known of it.

        Of NAMES, means over images. Where the shards know other photos of the persons too, `id_same_person` and
        `id_strangers` of the real photos, the same at each step.
        """
        config, folder = self._job.config, self._job.run.root / "validation"
        with _undisturbed(model, self._base):
            sampler = Sampler(self._base, model, self._job.features.unconditional, config)
            both = zip(self._faces, self._persons, strict=True)
            drawn = [list(drawings(face, seen, self._turns, self._viewer, sampler)) for face, seen in both]
        rows = []
        for face, some in zip(self._faces, drawn, strict=True):
            _, images, _, scores = zip(*some, strict=True)
            rows.append(GridRow(face.photo.key, face.photo.face, images, [_caption(score) for score in scores]))
        png = BytesIO()
        Pillow.fromarray(draw(config.watch.validate_prompts, rows)).save(png, "PNG")
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"step-{step:08d}.png", png.getvalue())
        same, strangers = (list(chain(*values)) for values in scale(self._persons))
        levels = {"id_same_person": same, "id_strangers": strangers if same else []}
        known = means([score for some in drawn for *_, score in some])
        return known | {name: fmean(values) for name, values in levels.items() if values}


def _caption(score: Mapping[str, float]) -> str:
    copied = f", copied {score['copy_paste_id']:.2f}" if "copy_paste_id" in score else ""
    no_face = "no face" if "faces_found" in score else ""
    return f"ID {score['id_similarity']:.2f}{copied}" if "id_similarity" in score else no_face


class Sampler:
    """The stock pipeline of the base, handed the adapter's UNet and image tokens."""

    def __init__(
        self, base: Base, model: AdapterModel, unconditional: Mapping[str, Array], config: TrainConfig
    ) -> None:
        """Sample as the settings say; `unconditional` is role -> features of no face, one sample's."""
        self._base, self._model, self._config = base, model, config
        self._unconditional = {role: torch.from_numpy(features) for role, features in unconditional.items()}
        self._pipeline: Any = base.sampler()

    def __call__(self, face: Face, prompt: str, seed: int) -> Image:
        """One image (H, W, 3) of a face with a prompt, from the noise of a seed."""
        watch, side = self._config.watch, self._config.data.resolution
        device, dtype = self._base.device, self._base.dtype
        # Below those of no face, where the pipeline computes both.
        pair = [self._unconditional, face.condition] if watch.guidance_scale > 1 else [face.condition]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            tokens = self._model.tokens(
                {role: torch.stack([one[role].to(device, torch.float32) for one in pair]) for role in face.condition}
            )
            latents = self._pipeline(
                prompt,
                negative_prompt="",  # what "no caption" was in training; SDXL's pipeline would take zeros
                height=side,
                width=side,
                num_inference_steps=watch.validate_steps,
                guidance_scale=watch.guidance_scale,
                generator=torch.Generator().manual_seed(seed),
                cross_attention_kwargs={"ip_hidden_states": tokens},
                output_type="latent",
            ).images
        # Decoded by the base, which knows the precision that its VAE needs.
        image: Image = self._base.decode(latents)[0]
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
