"""`evaluate`: images of persons with prompts, by an adapter, and what judges say of them: does it work?"""

import json
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console

from pipeline.shared.atomic import write_atomically
from pipeline.shared.bases import TINY, BaseSource
from pipeline.shared.terminal import Screen
from pipeline.train.adapter_card import Results, write_adapter_card
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.adapters.released import read_sidecar, require_fit
from pipeline.train.adapters.variants import Widths
from pipeline.train.base_model import Base
from pipeline.train.evaluate.call import EvaluationJob
from pipeline.train.evaluate.page import SHOWN, reduced, table, title, write_page
from pipeline.train.evaluate.subject import Subject
from pipeline.train.job import EMBEDDED
from pipeline.train.loader.dataset import Dataset
from pipeline.train.loader.faces import Face, first_faces
from pipeline.train.loop import FROZEN, make_accelerator
from pipeline.train.run_folder import writing
from pipeline.train.validate.distances import View, Viewer, scale, spread
from pipeline.train.validate.validation import NAMES, OTHERS, Sampler, Turn, drawings, means, turns_of
from pipeline.train.watch import console, say
from schemas.shard import CARD

SCHEMA_VERSION = 1
_RESAMPLED = 1000


def evaluate(job: EvaluationJob) -> tuple[Path, dict[str, Any]] | None:
    """Write evaluation.json, evaluation.html and images/ into a folder; one process of possibly several.

    Returns:
        The folder, and what the JSON says; None on other processes than the main one, which draw their share.

    Raises:
        UserError: for what is wrong with the call; nothing was written.
        CorruptShardError: for a damaged sample.
    """
    call, subject, config, source = job.call, job.subject, job.config, job.base
    faces = first_faces(job.dataset, call.faces, subject.variant.reads, config.adapter, OTHERS)
    accelerator, watch, typed = make_accelerator(config.optim), config.watch, call.options.get("watch", {})
    options = [f"--{name}" if typed.get(name) else f"watch.{name}" for name in ("judge", "clip")]
    viewer = Viewer(watch.judge, watch.clip, str(accelerator.device), options)
    turns = turns_of(config, viewer, call.images)

    base = Base(source, accelerator.device, FROZEN.get(accelerator.mixed_precision, torch.float32))
    model = AdapterModel(
        base.unet, subject.variant, Widths(source.kind, source.text_width, **job.features.widths), config.adapter
    )
    require_fit(call.path, subject.tensors, model.trained(), subject.variant.name)
    model.load_trained(subject.tensors)
    model.to(base.device).eval()
    sampler = Sampler(base, model, job.features.unconditional, config)

    papers = _papers(subject, job.dataset, source, viewer, faces, call.faces)
    for note in papers["notes"]:
        say(f"note: {note}")
    out = call.out or subject.folder
    persons = _persons(faces, turns, viewer, sampler, out, accelerator)
    if not accelerator.is_main_process:
        return None
    model.switch_off()
    with torch.no_grad():
        texts = [(turn, turn.text, viewer.clip) for turn in turns if turn.text is not None and viewer.clip]
        without = [float(clip.image(sampler(faces[0], one.prompt, one.seed)) @ text) for one, text, clip in texts]
    settings = {
        "prompts": watch.validate_prompts,
        "images": call.images,
        "seed": config.seed,
        "steps": watch.validate_steps,
        "guidance_scale": watch.guidance_scale,
        "resolution": config.data.resolution,
    }
    seen = _result(persons, watch.validate_prompts, without)
    result = {"schema_version": SCHEMA_VERSION, **papers, "settings": settings, **seen}
    with writing(out):
        write_atomically(out / "evaluation.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
        write_page(out / "evaluation.html", result, [one.pictures for one in persons if one.pictures["photos"]])
    file, sidecar = subject.released, read_sidecar(subject.released)
    # The card beside the very files that were evaluated has the numbers too, unless they were to go elsewhere.
    is_it = "steps" in sidecar and sidecar["steps"] == subject.about["step"]
    if is_it and call.out is None and file.with_name(CARD).exists():
        notes = list(dict.fromkeys([papers["held_out"]["why"], *papers["notes"]]))
        write_adapter_card(file.parent, file.stem, sidecar, Results(table(result), notes))
    return out, result


def _papers(
    subject: Subject, dataset: Dataset, source: BaseSource, viewer: Viewer, faces: Sequence[Face], wanted: int
) -> dict[str, Any]:
    """What evaluation.json says of what was evaluated, on what and by whom; `notes` are what a reader must know."""
    answer, why = subject.held_out(dataset)
    bases = {weight["sha256"] for weight in subject.sidecar.get("weights", ()) if weight["task"] == "base"}
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
        "The base is not the one that the adapter was trained on.": bool(bases - {"", source.sha256}),
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


class Person(NamedTuple):
    number: int
    keys: list[str]
    """Of the photos, the condition's first."""
    photos: list[View]
    rows: list[dict[str, Any]]
    """The images as in evaluation.json."""
    diversity: dict[str, float]
    """Space -> mean distance between two images: of one prompt, for the pose of all."""
    pictures: dict[str, list[dict[str, str]]]
    """`photos` and `images` for the page, empty once there are enough on it."""


def _persons(
    faces: Sequence[Face], turns: Sequence[Turn], viewer: Viewer, sampler: Sampler, out: Path, accelerator: Accelerator
) -> list[Person]:
    """Draw all faces into `out`/images, each process its share; returns what all have drawn."""
    if accelerator.is_main_process:
        with writing(out):
            (out / "images").mkdir(parents=True, exist_ok=True)
            for old in (out / "images").glob("[0-9]*-[0-9]*-[0-9]*.png"):
                old.unlink()
    accelerator.wait_for_everyone()
    shown_on = console if accelerator.is_main_process else Console(quiet=True)
    with (
        torch.no_grad(),
        accelerator.split_between_processes(list(enumerate(faces))) as mine,
        Screen(shown_on, "draw", "{done:,} of {total} images", len(mine) * len(turns)) as screen,
    ):
        drawn = [_person(number, face, turns, viewer, sampler, out, screen) for number, face in mine]
    # Where there are fewer faces than processes, some have drawn the last one too.
    persons = [one for _, one in sorted({one.number: one for one in gather_object(drawn)}.items())]
    accelerator.end_training()
    return persons


def _person(
    number: int, face: Face, turns: Sequence[Turn], viewer: Viewer, sampler: Sampler, out: Path, screen: Screen
) -> Person:
    """Draw a face with each prompt and seed into `out`/images, and look at the images beside the person's photos."""
    photos, views = [face.photo, *face.others], viewer.photos(face)
    images, room = len(turns) // (1 + turns[-1].number), SHOWN - number * (len(photos) + len(turns))
    rows, made = [], []
    pictures: dict[str, list[dict[str, str]]] = {"photos": [], "images": []}
    if room > 0:
        pictures["photos"] = [reduced(one.crop, "other photo" if at else "condition") for at, one in enumerate(photos)]
    for at, (turn, image, view, score) in enumerate(drawings(face, views, turns, viewer, sampler)):
        name = f"images/{number}-{turn.number}-{at % images}.png"
        with writing(out):
            write_atomically(out / name, cv2.imencode(".png", image[..., ::-1])[1].tobytes())
        pose = dict(zip(("yaw", "pitch", "roll"), map(float, view.get("pose", ())), strict=False))
        row = {"person": number, "prompt": turn.number, "seed": turn.seed, "file": name, **score, **pose}
        rows.append({key: round(one, 6) if isinstance(one, float) else one for key, one in row.items()})
        made.append(view)
        if at < room:
            pictures["images"].append(reduced(image, title(turn.prompt, score)))
        screen.advance(1, f"person {number + 1}")
    one_prompt = [spread(made[at : at + images]) for at in range(0, len(made), images)]
    of_prompts = {space: [one[space] for one in one_prompt if space in one] for space in ("pixels", "clip")}
    diversity = {space: value for space, value in spread(made).items() if space == "pose"}
    diversity |= {space: fmean(some) for space, some in of_prompts.items() if some}
    return Person(number, [photo.key for photo in photos], views, rows, diversity, pictures)


def _result(persons: Sequence[Person], prompts: Sequence[str], without: Sequence[float]) -> dict[str, Any]:
    """The part of evaluation.json that comes of the images; `without` is CLIP similarity without the adapter."""
    rows = [row for person in persons for row in person.rows]
    results = {name: estimate([row[name] for row in one.rows if name in row] for one in persons) for name in NAMES}
    same, strangers = scale([one.photos for one in persons])
    levels = {
        "id_same_person": estimate(same),
        "id_strangers": estimate(strangers),
        "clip_similarity_without_adapter": estimate([one] for one in without),
    }
    for where, spreads in (
        (results, [one.diversity for one in persons]),
        (levels, [spread(one.photos) for one in persons]),
    ):
        for space in ("pose", "pixels", "clip"):
            where[f"diversity_{space}"] = estimate([one[space]] if space in one else [] for one in spreads)
    by_prompt = [means([row for row in rows if row["prompt"] == at]) for at in range(len(prompts))]
    return {
        "results": {name: one for name, one in results.items() if one},
        "levels": {name: one for name, one in levels.items() if one},
        "by_prompt": [
            {"prompt": prompt, **{name: round(value, 6) for name, value in scores.items()}}
            for prompt, scores in zip(prompts, by_prompt, strict=True)
        ],
        "persons": [{"condition": one.keys[0], "others": one.keys[1:]} for one in persons],
        "images": rows,
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
