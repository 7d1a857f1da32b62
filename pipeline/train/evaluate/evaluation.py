"""`evaluate`: images of persons with prompts, by an adapter, and what judges say of them: does it work?"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import cv2
import numpy as np
import torch
from rich.progress import track

from pipeline.shared.atomic import write_atomically
from pipeline.shared.bases import BaseSource, find_base
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.adapters.released import require_fit
from pipeline.train.adapters.variants import Widths
from pipeline.train.base_model import Base
from pipeline.train.evaluate.page import Pictures, write_page
from pipeline.train.evaluate.subject import Subject, read_subject
from pipeline.train.job import DEFAULT_PRESETS, EMBEDDED, TINY, require_meaning
from pipeline.train.loader import Dataset, Face, first_faces, open_dataset, unconditional, widths
from pipeline.train.loop import FROZEN, make_accelerator
from pipeline.train.run_folder import writing
from pipeline.train.settings import TrainConfig, load_train_config
from pipeline.train.validate.validation import NAMES, OTHERS, Sampler, judged, viewer_of
from pipeline.train.validate.views import View, Viewer, scale, spread
from pipeline.train.watch import console, say
from schemas.errors import ConfigError

SCHEMA_VERSION = 1
_RESAMPLED = 1000


@dataclass(frozen=True)
class Call:
    """What the user typed."""

    path: Path
    shards: tuple[str, ...]
    variant: str = ""
    base: str | None = None
    step: int | None = None
    out: Path | None = None
    prompts: Path | None = None
    faces: int = 16
    images: int = 2
    """Of each face with each prompt."""
    config_file: Path | None = None
    pairs: Sequence[str] = ()
    options: dict[str, Any] = field(default_factory=dict)
    """See `job.Call`."""


def evaluate(call: Call) -> tuple[Path, dict[str, Any]]:
    """Write evaluation.json, evaluation.html and images/ into a folder; returns that, and what the JSON says.

    Raises:
        UserError: for what is wrong with the call; nothing was written.
        CorruptShardError: for a damaged sample.
    """
    subject = read_subject(call.path, call.variant, call.step)
    config = _config(call, subject, "tiny")
    dataset = open_dataset(call.shards, config.data.model_copy(update={"allow_no_captions": True}))
    subject.require_embedders(dataset)
    name = call.base or subject.sidecar.get("base") or ("tiny" if EMBEDDED in dataset.profiles else subject.kind)
    source = find_base(name or "sd15", sdxl=subject.kind == "sdxl")
    config = _config(call, subject, "tiny" if source.name in TINY else DEFAULT_PRESETS[source.kind])
    require_meaning(source.name, dataset, config)
    reads = subject.variant.reads
    faces = first_faces(dataset, call.faces, reads, config.adapter, OTHERS)
    nothing = {role: torch.from_numpy(one) for role, one in unconditional(dataset, reads, config.adapter).items()}
    accelerator = make_accelerator(config.optim)
    viewer = viewer_of(config.watch, accelerator.device)

    base = Base(source, accelerator.device, FROZEN.get(accelerator.mixed_precision, torch.float32))
    shape = Widths(source.kind, source.text_width, **widths(dataset, config.adapter))
    model = AdapterModel(base.unet, subject.variant, shape, config.adapter)
    require_fit(call.path, subject.tensors, model.trained(), subject.variant.name)
    model.load_trained(subject.tensors)
    model.to(base.device).eval()
    sampler = Sampler(base, model, nothing, config)

    papers = _papers(subject, dataset, source, viewer, faces, call.faces)
    for note in papers["notes"]:
        say(f"note: {note}")
    out = call.out or subject.folder
    with writing(out):
        (out / "images").mkdir(parents=True, exist_ok=True)
        for old in (out / "images").glob("[0-9]*-[0-9]*-[0-9]*.png"):
            old.unlink()
    drawn = Drawn(config, call.images, viewer, out)
    with torch.no_grad():
        for face in track(faces, "Drawing", console=console, transient=True, disable=not console.is_terminal):
            drawn.person(face, sampler)
        if viewer.clip is not None:
            model.switch_off()
            drawn.without_adapter(faces[0], sampler)
    settings = {
        "prompts": config.watch.validate_prompts,
        "images": call.images,
        "seed": config.seed,
        "steps": config.watch.validate_steps,
        "guidance_scale": config.watch.guidance_scale,
        "resolution": config.data.resolution,
    }
    result = {"schema_version": SCHEMA_VERSION, **papers, "settings": settings, **drawn.result()}
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    with writing(out):
        write_atomically(out / "evaluation.json", text.encode())
        write_page(out / "evaluation.html", result, drawn.pictures)
    return out, result


def _config(call: Call, subject: Subject, preset: str) -> TrainConfig:
    """The settings of the training, or of a preset where they are not known, with those of the call over them."""
    options = dict(call.options)
    if call.prompts is not None:
        try:
            lines = call.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {call.prompts} cannot be read: {error}.") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ConfigError(f"--prompts {call.prompts} holds no prompt: write one on each line.")
        options["watch"] = {**options.get("watch", {}), "validate_prompts": prompts}
    ranks = [len(tensor) for key, tensor in subject.tensors.items() if key.endswith("to_q_lora.down.weight")]
    if ranks:
        options["adapter"] = {**options.get("adapter", {}), "lora_rank": ranks[0]}
    return load_train_config(call.config_file, call.pairs, subject.recipe or preset, **options)


def _papers(
    subject: Subject, dataset: Dataset, source: BaseSource, viewer: Viewer, faces: Sequence[Face], wanted: int
) -> dict[str, Any]:
    """What evaluation.json says of what was evaluated, on what and by whom; `notes` are what a reader must know."""
    answer, why = subject.held_out(dataset)
    means_something = source.name not in TINY and EMBEDDED not in dataset.profiles
    judges = [*(viewer.judge.weights if viewer.judge else ()), *(viewer.clip.weights if viewer.clip else ())]
    licences = {model["sha256"]: model["licence"] for model in dataset.models if model["sha256"]}
    is_partial = "arcface" in subject.variant.reads and any(
        one["task"] == "face_embedder" and one["sha256"] in licences for one in judges
    )
    notes = {
        "None of these numbers means anything: the base is tiny and random.": source.name in TINY,
        "None of these numbers means anything: the features of shards of the profile embedded were not "
        "learned.": EMBEDDED in dataset.profiles,
        why: answer != "yes",
        "No recogniser judged the images (--judge FOLDER of an insightface pack): whether they show a face, whose, and "
        "how it is turned is not known.": viewer.judge is None,
        "The judge is the recogniser whose vectors are the condition, which favours the adapter: another one is "
        "fairer.": is_partial,
        "No CLIP was given (--clip FOLDER): how the images follow their prompts is not known.": viewer.clip is None,
        "No two photos of one person are known in these shards (python -m pipeline group finds them): copy-paste and "
        "how alike two real photos of a person are is not known.": not any(face.others for face in faces),
        f"There are {len(faces)} persons in the first samples, not {wanted}.": len(faces) < wanted,
        "The base is not the one that the adapter was trained on.": subject.base_sha256 not in ("", source.sha256),
    }
    return {
        "faceshards": metadata.version("faceshards"),
        "subject": {**subject.about, "variant": subject.variant.name},
        "base": {"name": source.name, "kind": source.kind, "sha256": source.sha256, "licence": source.licence},
        "dataset": {"digest": dataset.digest, "profiles": dataset.profiles, "samples": dataset.samples},
        "held_out": {"answer": answer, "why": why},
        "means_something": means_something,
        "notes": [note for note, applies in notes.items() if applies],
        "judges": [{**one, "licence": licences.get(one["sha256"], one["licence"])} for one in judges],
    }


class Drawn:
    """All that was drawn so far, and what was seen of it."""

    def __init__(self, config: TrainConfig, images: int, viewer: Viewer, out: Path) -> None:
        """`images` of each face with each prompt go into `out`/images."""
        self._prompts, self._seed = config.watch.validate_prompts, config.seed
        self._images, self._viewer, self._out = images, viewer, out
        self._texts = [viewer.clip.text(prompt) for prompt in self._prompts] if viewer.clip else []
        self._rows: list[dict[str, Any]] = []
        self._photos: list[list[str]] = []
        self._views: list[list[View]] = []
        self._diversity: list[dict[str, float]] = []
        self._without: list[float] = []
        self.pictures = Pictures()

    def person(self, face: Face, sampler: Sampler) -> None:
        """Draw a face with each prompt and seed, and look at the images and at the person's photos."""
        photos = [face.photo, *face.others]
        condition, *others = views = [self._viewer.photo(photo) for photo in photos]
        number, made = len(self._photos), []
        self._photos.append([photo.key for photo in photos])
        self._views.append(views)
        self.pictures.add_person([photo.crop for photo in photos])
        for at, prompt in enumerate(self._prompts):
            for turn in range(self._images):
                name, noise = f"images/{number}-{at}-{turn}.png", self._seed + at * self._images + turn
                image = sampler(face, prompt, noise)
                with writing(self._out):
                    write_atomically(self._out / name, cv2.imencode(".png", image[..., ::-1])[1].tobytes())
                view = self._viewer.image(image)
                score = judged(view, condition, others)
                if self._viewer.judge is None:
                    del score["faces_found"]
                if self._texts:
                    score["clip_similarity"] = float(view["clip"] @ self._texts[at])
                pose = dict(zip(("yaw", "pitch", "roll"), map(float, view.get("pose", ())), strict=False))
                row = {"person": number, "prompt": at, "seed": noise, "file": name, **score, **pose}
                self._rows.append({key: round(one, 6) if isinstance(one, float) else one for key, one in row.items()})
                self.pictures.add_image(image, prompt, score)
                made.append(view)
        one_prompt = [spread(made[at : at + self._images]) for at in range(0, len(made), self._images)]
        means = {space: [one[space] for one in one_prompt if space in one] for space in ("pixels", "clip")}
        pose_spread = {space: value for space, value in spread(made).items() if space == "pose"}
        self._diversity.append(pose_spread | {space: fmean(some) for space, some in means.items() if some})

    def without_adapter(self, face: Face, sampler: Sampler) -> None:
        """What the base by itself makes of the same prompts and noise, where the sampler's adapter is switched off."""
        assert self._viewer.clip is not None, "callers have a measure for it"
        for at, prompt in enumerate(self._prompts):
            for turn in range(self._images):
                image = self._viewer.clip.image(sampler(face, prompt, self._seed + at * self._images + turn))
                self._without.append(float(image @ self._texts[at]))

    def result(self) -> dict[str, Any]:
        """The part of evaluation.json that comes of the images."""
        persons = range(len(self._photos))

        def by_person(name: str) -> list[list[float]]:
            return [[row[name] for row in self._rows if row["person"] == at and name in row] for at in persons]

        results = {name: estimate(by_person(name)) for name in NAMES}
        real = [spread(views) for views in self._views]
        for space in ("pose", "pixels", "clip"):
            results[f"diversity_{space}"] = estimate([one[space]] if space in one else [] for one in self._diversity)
        same, strangers = scale(self._views)
        levels = {
            "id_same_person": estimate(same),
            "id_strangers": estimate(strangers),
            "clip_similarity_without_adapter": estimate([one] for one in self._without),
            **{
                f"diversity_{space}": estimate([one[space]] if space in one else [] for one in real)
                for space in ("pose", "pixels", "clip")
            },
        }
        by_prompt = [
            {
                "prompt": prompt,
                **{
                    name: round(fmean(values), 6)
                    for name in NAMES
                    if (values := [row[name] for row in self._rows if row["prompt"] == at and name in row])
                },
            }
            for at, prompt in enumerate(self._prompts)
        ]
        return {
            "results": {name: one for name, one in results.items() if one},
            "levels": {name: one for name, one in levels.items() if one},
            "by_prompt": by_prompt,
            "persons": [{"condition": first, "others": others} for first, *others in self._photos],
            "images": self._rows,
        }


def estimate(values: Iterable[Sequence[float]]) -> dict[str, float] | None:
    """Of values, person by person: their mean, and how sure it is; None where there is none.

    Returns:
        `mean` over all values; `low` and `high`, between which 95 % of the means lie when as many persons are drawn
        from these again and again, absent for one person; `p5` and `p95` of the values; how many `values`, `persons`.
    """
    some = [list(one) for one in values if len(one)]
    if not some:
        return None
    sums, counts = np.array([sum(one) for one in some]), np.array([len(one) for one in some])
    p5, p95 = np.percentile(np.concatenate(some), [5, 95])
    about = {"mean": sums.sum() / counts.sum(), "p5": p5, "p95": p95}
    if len(some) > 1:
        at = np.random.default_rng(0).integers(len(some), size=(_RESAMPLED, len(some)))
        about["low"], about["high"] = np.percentile(sums[at].sum(axis=1) / counts[at].sum(axis=1), [2.5, 97.5])
    rounded = {name: round(float(one), 6) for name, one in about.items()}
    return {**rounded, "values": int(counts.sum()), "persons": len(some)}
