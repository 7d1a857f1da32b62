"""Validation: the same prompts, faces and seeds again and again, as a grid of images and as what judges see of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.shared.atomic import write_atomically
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.base_model import Base
from pipeline.train.loader import Face, Pixels, first_faces, unconditional
from pipeline.train.settings import TrainConfig, WatchSettings
from pipeline.train.validate.clip import Clip
from pipeline.train.validate.grid import GridRow, draw
from pipeline.train.validate.judge import IdJudge
from pipeline.train.validate.views import DISTANCES, View, Viewer, copy_paste, scale

if TYPE_CHECKING:
    from pipeline.train.job import TrainJob


OTHERS = 4
"""Photos of a person, beside that of the condition, that images are compared with."""
NAMES = (
    *("faces_found", "id_similarity", "id_to_others", "clip_similarity"),
    *(f"copy_paste_{space}" for space in DISTANCES),
)
"""What may be known of an image."""


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
        if not config.watch.validate_every:
            return
        self._faces = first_faces(job.dataset, config.watch.validate_faces, job.variant.reads, config.adapter, OTHERS)
        nothing = unconditional(job.dataset, job.variant.reads, config.adapter)
        self._nothing = {role: torch.from_numpy(features) for role, features in nothing.items()}
        self._viewer = viewer = viewer_of(config.watch, torch.device("cpu"))
        self._persons = [[viewer.photo(photo) for photo in (face.photo, *face.others)] for face in self._faces]
        self._texts = [viewer.clip.text(prompt) for prompt in config.watch.validate_prompts] if viewer.clip else []

    def is_due(self, step: int, is_last: bool) -> bool:
        every = self._config.watch.validate_every
        return bool(every) and (is_last or step % every == 0)

    def run(self, model: AdapterModel, step: int) -> dict[str, float]:
        """Write the grid of a step.

        Returns:
            What can be known of it, each a mean over images: with a judge `faces_found` and, of images that show a
            face, `id_similarity` to the condition photo; where the shards know the person's other photos too,
            `id_to_others` and copy_paste_… (see `views.copy_paste`), and of the real photos, the same at each step,
            `id_same_person` and `id_strangers`; with CLIP `clip_similarity`.
        """
        prompts, seed = self._config.watch.validate_prompts, self._config.seed
        with _undisturbed(model, self._base):
            sampler = Sampler(self._base, model, self._nothing, self._config)
            # All faces of a column start from the same noise, at each step too: what differs is the face's.
            images = [
                [sampler(face, prompt, seed + column) for column, prompt in enumerate(prompts)] for face in self._faces
            ]
        seen, rows = [], []
        for face, made, (condition, *others) in zip(self._faces, images, self._persons, strict=True):
            views = [self._viewer.image(image) for image in made]
            scores = [judged(view, condition, others) for view in views]
            for score, view, text in zip(scores, views, self._texts, strict=False):
                score["clip_similarity"] = float(view["clip"] @ text)
            captions = ["" if self._viewer.judge is None else _caption(score) for score in scores]
            rows.append(GridRow(face.photo.key, face.photo.face, made, captions))
            seen += scores
        png = BytesIO()
        Image.fromarray(draw(prompts, rows)).save(png, "PNG")
        self._folder.mkdir(exist_ok=True)
        write_atomically(self._folder / f"step-{step:08d}.png", png.getvalue())
        means = {name: fmean(values) for name in NAMES if (values := [one[name] for one in seen if name in one])}
        if self._viewer.judge is None:
            means.pop("faces_found")
        same, strangers = ([value for some in values for value in some] for values in scale(self._persons))
        return (
            means
            | ({"id_same_person": fmean(same)} if same else {})
            | ({"id_strangers": fmean(strangers)} if same and strangers else {})
        )


def viewer_of(watch: WatchSettings, device: torch.device) -> Viewer:
    """The judges that the settings name.

    Raises:
        WeightsError: when the judge's pack or CLIP's folder is not there.
    """
    return Viewer(IdJudge(watch.judge) if watch.judge else None, Clip(watch.clip, device) if watch.clip else None)


def judged(image: View, condition: View, others: Sequence[View]) -> dict[str, float]:
    """Name -> what is seen of an image, beside the photo of its condition and the person's other photos."""
    score = {"faces_found": float("id" in image)}
    if "id" in image and "id" in condition:
        score["id_similarity"] = float(image["id"] @ condition["id"])
        if others:
            score["id_to_others"] = fmean(float(image["id"] @ other["id"]) for other in others)
    return score | {f"copy_paste_{space}": value for space, value in copy_paste(image, condition, others).items()}


def _caption(score: Mapping[str, float]) -> str:
    copied = f", copied {score['copy_paste_id']:.2f}" if "copy_paste_id" in score else ""
    return f"ID {score['id_similarity']:.2f}{copied}" if "id_similarity" in score else "no face"


class Sampler:
    """The stock pipeline of the base, handed the adapter's UNet and image tokens."""

    def __init__(
        self, base: Base, model: AdapterModel, unconditional: Mapping[str, Tensor], config: TrainConfig
    ) -> None:
        """Sample as the settings say; `unconditional` is role -> features of no face, one sample's."""
        self._base, self._model, self._config = base, model, config
        self._unconditional = unconditional
        self._pipeline: Any = base.sampler()

    def __call__(self, face: Face, prompt: str, seed: int) -> Pixels:
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
