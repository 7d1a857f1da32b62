"""`evaluate`: runs and files, the same numbers each time, copies as copies on real photos, and every wrong call."""

import functools
import json
import re
import shutil
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path

import cv2
import fake_shards as fake
import numpy as np
import pages
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from rich.console import Console
from rich.text import Text

import pipeline.train.__main__ as trainer
from pipeline.shared import terminal
from pipeline.shared.bases import find_base
from pipeline.train.evaluate import evaluation
from pipeline.train.evaluate.evaluation import estimate
from pipeline.train.evaluate.subject import read_subject
from pipeline.train.loader.dataset import open_dataset
from pipeline.train.settings import DataSettings
from pipeline.train.validate.judge import IdJudge
from pipeline.train.validate.validation import Sampler
from schemas.shard import encode_npy

pytestmark = pytest.mark.usefixtures("loaded_once")

NAME = "ip-adapter-faceid_sd15"
ONE_PROMPT = ("--set", "watch.validate_prompts=['a face']")
QUICK = ("--images", "1", "--set", "watch.validate_steps=1", "--set", "watch.validate_prompts=['a face', 'a house']")
PEOPLE = {1: 3, 2: 2, 3: 1}
"""Person -> photos."""


def portrait(number):
    noise = np.random.default_rng(number).integers(0, 256, (7, 7, 3), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(noise, fake.PORTRAIT))[1].tobytes()


def grouped(folder, first=0):
    """Shards that know persons, whose pictures differ."""
    owners = [person for person, count in PEOPLE.items() for _ in range(count)]
    samples = [
        {
            **fake.sample(number, has=("portrait",), person=person),
            "portrait.jpg": portrait(number),
            "arcface.npy": encode_npy(np.random.default_rng(number).normal(size=512).astype(np.float32)),
        }
        for number, person in enumerate(owners, first)
    ]
    return fake.write(folder, {"persons-00000": samples})


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with shards, a run on them in RUN, and other shards."""
    folder = tmp_path_factory.mktemp("evaluate")
    grouped(folder / "seen")
    grouped(folder / "other", first=50)
    run = ["--from-shards", folder / "seen", "--variant", "faceid", "--base", "tiny", "--steps", "2"]
    call([*run, "--set", "adapter.lora_rank=4", "--set", "watch.save_every=1", "--out", folder / "run"])
    return folder


def call(words):
    """The exit code of the command line."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["faceshards-train", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            trainer.main()
    return int(done.value.code or 0)


def evaluated(out, *words):
    assert call(["evaluate", *QUICK, *words, "--out", out]) == 0
    return json.loads((out / "evaluation.json").read_bytes())


def test_a_run_gets_the_same_json_each_time_which_says_what_it_is_worth(trained, tmp_path, capsys):
    words = [trained / "run", "--from-shards", trained / "other", *ONE_PROMPT]
    result = evaluated(tmp_path / "out", *words)
    seen = capsys.readouterr()
    assert result["subject"]["step"] == 2
    assert result["held_out"]["answer"] == "yes"
    assert result["means_something"] is False
    notes = " ".join(result["notes"])
    for note in ("None of these numbers means anything", "No recogniser judged", "No CLIP was given", "not 16."):
        assert note in notes
        assert note in seen.err
        assert note in (tmp_path / "out/evaluation.html").read_text()
    assert (tmp_path / "out/evaluation.html").read_text().count('class="warn"') == 1, "no wall of boxes"
    assert "Copy-paste by the pixels" in seen.out
    assert [len(one["others"]) for one in result["persons"]] == [2, 1, 0]
    assert result["results"].keys() == {"copy_paste_pixels"}, "a judge, CLIP and a second image of a prompt are lacking"
    assert result["results"]["copy_paste_pixels"]["persons"] == 2
    files = [tmp_path / "out" / row["file"] for row in result["images"]]
    assert len(files) == 3
    pixels = [path.read_bytes() for path in files]
    assert len(set(pixels)) == 3
    before = (tmp_path / "out/evaluation.json").read_bytes()
    (tmp_path / "out/images/9-9-9.png").touch()
    evaluated(tmp_path / "out", *words)
    assert (tmp_path / "out/evaluation.json").read_bytes() == before
    assert [path.read_bytes() for path in files] == pixels
    assert sorted(files) == sorted((tmp_path / "out/images").iterdir()), "images of another evaluation are left"
    other = evaluated(tmp_path / "other", *words, "--seed", "1", "--step", "1", "--faces", "1")
    assert other["subject"]["step"] == 1
    assert other["images"][0]["copy_paste_pixels"] != result["images"][0]["copy_paste_pixels"]


@pytest.mark.long
def test_several_processes_share_the_persons_and_the_main_one_writes_the_same(trained, tmp_path, monkeypatch):
    words = [trained / "run", "--from-shards", trained / "other", *ONE_PROMPT]
    whole, drawn = evaluated(tmp_path / "whole", *words), []
    # One after the other, as a second process and a first one that gathers what both drew; the first makes the folder.
    (tmp_path / "out" / "images").mkdir(parents=True)
    for share, is_main in (slice(2, None), False), (slice(2), True):
        monkeypatch.setattr(Accelerator, "is_main_process", property(lambda _, is_main=is_main: is_main))
        monkeypatch.setattr(Accelerator, "split_between_processes", lambda _, every, s=share: nullcontext(every[s]))
        monkeypatch.setattr(evaluation, "gather_object", lambda mine: drawn.extend(mine) or drawn)
        assert call(["evaluate", *QUICK, *words, "--out", tmp_path / "out"]) == 0
        assert (tmp_path / "out" / "evaluation.json").exists() == is_main
    assert [one.number for one in drawn] == [2, 0, 1]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_bytes()) == whole


@pytest.mark.long
def test_progress_is_a_bar_on_a_terminal_and_plain_lines_elsewhere(trained, tmp_path, monkeypatch, capsys):
    words = [trained / "run", "--from-shards", trained / "other", *ONE_PROMPT]
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.0)
    evaluated(tmp_path / "lines", *words)
    lines = [line for line in capsys.readouterr().out.splitlines() if " images, person " in line]
    assert [line.partition(",")[0] for line in lines] == [f"{done} of 3 images" for done in range(1, 4)]
    assert re.fullmatch(r"1 of 3 images, person 1, about \d+ (s|min) left", lines[0])
    assert lines[-1] == "3 of 3 images, person 3"
    monkeypatch.setattr(evaluation, "console", screen := Console(file=StringIO(), force_terminal=True, width=90))
    evaluated(tmp_path / "bar", *words)
    assert "3/3 person 3" in Text.from_ansi(screen.file.getvalue()).plain


def test_shards_that_it_was_trained_on_are_called_so_also_once_they_are_grouped(trained, tmp_path):
    result = evaluated(tmp_path / "out", trained / "run", "--from-shards", trained / "seen", "--faces", "1")
    assert result["held_out"]["answer"] == "no"
    assert result["held_out"]["why"] in result["notes"]
    assert result["held_out"]["why"].replace("'", "&#39;") in (tmp_path / "out/evaluation.html").read_text()

    digest = json.loads((trained / "run/run.json").read_text())["identity"]["dataset"]
    again = Path(shutil.copytree(trained / "other", tmp_path / "grouped"))
    described = json.loads((again / "dataset.json").read_text())
    described["plan"] = {"settings": {"group": {"of": [digest]}}}
    (again / "dataset.json").write_text(json.dumps(described))
    subject = read_subject(trained / "run", "", None)
    for dataset, answer in {trained / "other": "yes", again: "no"}.items():
        assert subject.held_out(open_dataset([str(dataset)], DataSettings()))[0] == answer

    began = replace(subject, sidecar={**subject.sidecar, "init_from": {"name": "file.bin", "is_known": False}})
    for dataset, answer in {trained / "other": "not known", again: "no"}.items():
        assert began.held_out(open_dataset([str(dataset)], DataSettings()))[0] == answer


def test_a_file_is_evaluated_with_its_sidecar_by_its_name_or_by_what_is_said_of_it(trained, tmp_path):
    shards = ["--from-shards", trained / "other", "--faces", "1", *ONE_PROMPT]
    alone = Path(shutil.copy(trained / "run" / f"{NAME}.bin", tmp_path))
    nameless = shutil.copy(alone, tmp_path / "mine.bin")
    run, with_sidecar, said = (
        evaluated(tmp_path / str(number), *words, *shards)
        for number, words in enumerate(
            [
                [trained / "run"],
                [trained / "run" / f"{NAME}.safetensors"],
                [nameless, "--variant", "faceid", "--base", "tiny"],
            ]
        )
    )
    scores = [[one["copy_paste_pixels"] for one in result["images"]] for result in (run, with_sidecar, said)]
    assert scores[0] == pytest.approx(scores[1], abs=0.01) == scores[2], "float16 apart, it is the same adapter"
    assert [result["held_out"]["answer"] for result in (with_sidecar, said)] == ["yes", "not known"]
    assert said["held_out"]["why"] in said["notes"]
    by_name = read_subject(alone, "", None)
    assert (by_name.variant.name, by_name.kind, by_name.recipe) == ("faceid", "sd15", None)
    assert by_name.folder == tmp_path / f"evaluation-{NAME}"


def test_the_card_beside_what_was_evaluated_has_the_numbers(trained, tmp_path):
    for file in (trained / "run").glob("*.*"):
        shutil.copy(file, tmp_path)
    card, file = tmp_path / "README.md", tmp_path / f"{NAME}.safetensors"
    words = ["evaluate", file, *QUICK, *ONE_PROMPT, "--from-shards", trained / "other", "--faces", "2"]
    before = card.read_text()
    assert call([*words, "--out", tmp_path / "elsewhere"]) == 0
    assert card.read_text() == before
    assert call(words) == 0
    result = json.loads((tmp_path / f"evaluation-{NAME}" / "evaluation.json").read_bytes())
    value = result["results"]["copy_paste_pixels"]
    row = f"| Copy-paste by the pixels | {value['mean']:.2f} | {value['low']:.2f} to {value['high']:.2f} |"
    assert row in card.read_text()
    assert result["held_out"]["why"] in card.read_text()
    assert before.partition("## Does it work?")[0] in card.read_text()


def test_the_condition_is_of_the_pictures_that_it_was_trained_on(trained):
    subject = read_subject(trained / "run", "", None)
    assert subject.recipe["adapter"]["condition"] == "auto", "an ID vector has no choice"
    for picture, chosen in {"plain": "plain", "segmented": "segmented", "segmented or plain": "auto"}.items():
        sidecar = {**subject.sidecar, "condition": {"hidden": f"token features of the {picture} 224x224 norm_crop"}}
        assert replace(subject, sidecar=sidecar).recipe["adapter"]["condition"] == chosen


def test_prompts_come_from_a_file_a_line_each(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("a man in the rain\n\n  a  woman, é\n")
    result = evaluated(
        tmp_path / "out",
        trained / "run",
        "--from-shards",
        trained / "other",
        "--prompts",
        tmp_path / "prompts.txt",
        "--faces",
        "1",
    )
    assert result["settings"]["prompts"] == ["a man in the rain", "a  woman, é"]
    assert len(result["images"]) == 2


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A tiny random CLIP in transformers' layout."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = transformers.CLIPTokenizer.from_pretrained(find_base("tiny").folder / "tokenizer")
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": len(tokenizer)},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**sizes).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture(scope="module")
def page(trained, clip, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    evaluated(out, trained / "run", "--from-shards", trained / "other", "--clip", clip, "--images", "2", "--faces", "2")
    return out / "evaluation.html"


def test_with_clip_prompts_count_and_the_base_alone_stands_beside(page):
    result = json.loads(page.with_suffix(".json").read_bytes())
    assert {"clip_similarity", "copy_paste_clip"} <= result["results"].keys()
    assert result["results"]["diversity_pixels"]["mean"] > 0, "each image of a prompt has noise of its own"
    assert {row["seed"] for row in result["images"]} == {0, 1, 2, 3}
    without = result["levels"]["clip_similarity_without_adapter"]
    rows = [row["clip_similarity"] for row in result["images"] if row["person"] == 0]
    assert without["values"] == len(rows) == 4
    assert abs(without["mean"] - np.mean(rows)) > 2e-6
    assert result["levels"]["diversity_clip"]["persons"] == 2
    assert {(one["task"], one["licence"]) for one in result["judges"]} == {("clip", "mit")}


# --- real photos -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(data):
    return IdJudge(str(data / "models" / "real"))


@pytest.fixture(scope="module")
def real(data, judge, tmp_path_factory):
    """Shards of five labelled photos of two men and three others: real pictures, with features that mean nothing."""
    files = {
        "obama": ["obama3", "obama-1080p", "obama1"],
        "kit": ["john2", "john1"],
        "biden": ["biden2"],
        "alex": ["alex_lacamoire1"],
    }
    from insightface.utils import face_align

    samples = []
    for number, (person, name) in enumerate((person, name) for person, names in files.items() for name in names):
        bgr = cv2.imread(str(data / "photos" / f"face_recogniti__{name}.jpg"))
        box, kps = (one[0] for one in judge._app.det_model.detect(bgr, max_num=1, metric="default"))
        middle, reach = (box[:2] + box[2:4]) / 2, max(box[2:4] - box[:2])
        left, top = np.maximum(middle - reach, 0).astype(int)
        crop = cv2.resize(bgr[top : int(middle[1] + reach), left : int(middle[0] + reach)], (320, 320))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            face = face_align.norm_crop(bgr, kps, 224)
        crops = {"portrait": {"box": [0, 0, 320, 320], "size": [320, 320]}, "half": {}, "full": {}}
        sample = fake.sample(number, has=(), person=list(files).index(person), crops=crops)
        pictures = {"portrait.jpg": crop, "face.jpg": face}
        samples.append(sample | {name: cv2.imencode(".jpg", one)[1].tobytes() for name, one in pictures.items()})
    recogniser = {**judge.weights[1], "licence": "as the manifest says"}
    return fake.write(tmp_path_factory.mktemp("real"), {"persons-00000": samples}, models=[recogniser, fake.MODELS[1]])


@pytest.mark.real_data
def test_copies_are_copies_other_photos_the_person_and_strangers_strangers(
    trained, real, judge, data, tmp_path, monkeypatch
):
    """In the adapter's stead, one that gives real photos, or nothing."""
    monkeypatch.setattr("pipeline.train.validate.distances.IdJudge", lambda *_: judge)  # it takes seconds to load
    look = functools.cache(lambda pixels, shape, real=judge.look: real(np.frombuffer(pixels, np.uint8).reshape(shape)))
    monkeypatch.setattr(judge, "look", lambda image: look(image.tobytes(), image.shape))  # the same pictures come often
    alien = cv2.resize(cv2.imread(str(data / "photos" / "face_recogniti__biden2.jpg"))[..., ::-1], (320, 320))
    gives = {
        "copy": lambda face: face.photo.crop,
        "other": lambda face: face.others[0].crop,
        "stranger": lambda _: alien,
        "nobody": lambda _: np.zeros((64, 64, 3), np.uint8),
    }
    monkeypatch.setattr(Sampler, "__call__", lambda _, face, prompt, seed: gives[prompt](face))
    file = shutil.copy(trained / "run" / f"{NAME}.bin", tmp_path)  # of which it is not known what it was trained on
    words = ["--from-shards", real, "--base", "tiny", "--judge", data / "models" / "real", "--faces", "2"]
    (tmp_path / "prompts.txt").write_text("\n".join(gives))
    result = evaluated(tmp_path / "out", file, *words, "--prompts", tmp_path / "prompts.txt")
    copy, other, stranger, nobody = result["by_prompt"]
    same, unlike = (result["levels"][name]["mean"] for name in ("id_same_person", "id_strangers"))
    assert 0.5 < same < 0.8
    assert unlike < 0.2
    assert [one["faces_found"] for one in result["by_prompt"]] == [1, 1, 1, 0]

    for space in ("id", "pose", "pixels"):
        assert copy[f"copy_paste_{space}"] == pytest.approx(1, abs=0.01)
    assert copy["id_similarity"] == pytest.approx(1, abs=0.01)
    assert copy["id_to_others"] == pytest.approx(same, abs=0.1)

    assert other["id_similarity"] == pytest.approx(same, abs=0.1)
    assert other["copy_paste_id"] < -0.4, "it is nearer to the person's other photos than to the condition"

    assert stranger["id_to_others"] == pytest.approx(unlike, abs=0.15)
    assert abs(stranger["copy_paste_id"]) < 0.2, "it is as far from all photos"
    assert not {"id_similarity", "copy_paste_id"} & nobody.keys()
    assert [one["licence"] for one in result["judges"]][1] == "as the manifest says"
    assert any("The judge is the recogniser whose vectors are the condition" in note for note in result["notes"])
    assert not any("No recogniser" in note for note in result["notes"])


# --- numbers, the page -----------------------------------------------------------------------------------------------


def test_an_interval_is_over_persons_and_the_same_each_time():
    draws = np.random.default_rng(1)
    values = [list(centre + draws.normal(size=50) / 100) for centre in draws.normal(size=40)]
    one = estimate(values)
    assert one == estimate(values)
    assert one["mean"] == pytest.approx(np.mean(values), abs=1e-5)
    assert one["low"] < one["mean"] < one["high"]
    error = np.std([np.mean(some) for some in values]) / 40**0.5
    assert (one["high"] - one["low"]) / 4 == pytest.approx(error, rel=0.1), "50 images of a person are one person"
    assert estimate([[], [2.0, 4.0]]) == {"mean": 3, "p5": 2.1, "p95": 3.9, "values": 2, "persons": 1}
    assert estimate([[], []]) is None


# The trainer's page is in Chromium by default: this one is of the same parts.
@pytest.mark.long
@pages.in_every_window
def test_the_page_fits_its_window_and_everything_has_a_name(visit, page, window):
    pages.require_fit(visit, page, window)


@pytest.mark.long
def test_the_page_has_each_image_beside_its_condition_and_the_person_s_other_photos(visit, page):
    opened = visit(page)
    first = opened.locator(".person").first
    assert first.locator(".condition").count() == 1
    assert first.locator(".other").count() == 2
    assert first.locator("figure").count() == 1 + 2 + 4
    assert "a house" in first.inner_text()
    first.locator(".zoom").first.press("Enter")
    opened.keyboard.press("ArrowRight")
    assert opened.inner_text("#about") == "other photo of person 1 (2 of 13)"


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nowhere"], ["nowhere is neither", "run", ".safetensors"]),
        (["."], ["holds no run"]),
        (["run", "--step", "9"], ["no checkpoint of step 9", "1, 2"]),
        (["photo.jpg"], ["photo.jpg is neither"]),
        (["broken.safetensors"], ["broken.safetensors cannot be read as an adapter"]),
        (["mine.bin"], ["does not tell which variant", "--variant", "faceid-plusv2"]),
        (["mine.bin", "--variant", "face"], ["'face'", "faceid"]),
        (["mine.bin", "--variant", "plus"], ["mine.bin is no plus adapter", "lacks"]),
        (["mine.bin", "--variant", "faceid", "--base", "tiny-sdxl"], ["mine.bin is no faceid adapter for this base"]),
        (["mine.bin", "--step", "1"], ["--step is for runs"]),
        ([f"run/{NAME}.bin", "--variant", "plus"], ["is of the variant faceid, not plus"]),
        ([f"run/{NAME}_lora.safetensors", "--variant", "faceid"], ["is no faceid adapter"]),
        (["run", "--prompts", "empty.txt"], ["empty.txt holds no prompt"]),
        (["run", "--prompts", "none.txt"], ["none.txt cannot be read"]),
        (["run", "--prompts", "photo.jpg"], ["photo.jpg is no text in UTF-8"]),
        (["run", "--prompts", "mark.txt"], ["mark.txt holds no prompt"]),
        (["run", "--judge", "nopack"], ["--judge: nopack"]),
        (["run", "--clip", "noclip"], ["--clip: noclip", "no such folder"]),
        (["run", "--set", "watch.judge=nopack"], ["watch.judge: nopack"]),
        (["run", "--clip", "run"], ["--clip: run is no folder of a whole CLIP"]),
        (["run", "--base", "sd16"], ["'sd16'"]),
        (["run", "--set", "watch.validate_step=1"], ["watch.validate_steps"]),
        (["run", "--out", "photo.jpg/below"], ["photo.jpg/below cannot be written"]),
    ],
)
def test_a_wrong_call_is_one_sentence_and_writes_nothing(words, parts, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(trained / "run")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "empty.txt").write_bytes(b" \n\n")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf\r\n")  # Windows' editor writes it before a text
    shutil.copy(trained / "run" / f"{NAME}.bin", "mine.bin")
    before = sorted(tmp_path.rglob("*"))
    assert call(["evaluate", *words, "--from-shards", trained / "other"]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if not one.startswith("note: ")]
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_base_that_is_none_is_refused_before_the_dataset_is_read(trained, capsys):
    assert call(["evaluate", trained / "run", "--base", "sd16", "--from-shards", trained / "nowhere"]) == 2
    assert "'sd16'" in capsys.readouterr().err


def test_the_folder_of_its_base_is_to_be_given_where_only_its_name_is_known(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    described = json.loads((run / "run.json").read_text())
    described["sidecar"]["base"] = "realistic-vision"
    (run / "run.json").write_text(json.dumps(described))
    words = ["evaluate", run, "--from-shards", trained / "other"]
    assert call(words) == 2
    assert "run was trained on the base realistic-vision, of whose folder" in capsys.readouterr().err
    assert call([*words, *QUICK, *ONE_PROMPT, "--faces", "1", "--base", "tiny", "--out", tmp_path / "out"]) == 0


def test_shards_that_lack_what_it_reads_or_hold_other_vectors_are_refused(trained, tmp_path, capsys):
    samples = [{name: data for name, data in fake.sample(0).items() if name != "arcface.npy"}]
    lacking = fake.write(tmp_path / "lacking", {"a-00000": samples})
    assert call(["evaluate", trained / "run", "--from-shards", lacking]) == 2
    assert "have no arcface.npy" in capsys.readouterr().err
    models = [{**fake.MODELS[0], "name": "arcface", "sha256": "ab" * 32}, fake.MODELS[1]]
    another = fake.write(tmp_path / "another", {"a-00000": [fake.sample(0)]}, models=models)
    assert call(["evaluate", trained / "run", "--from-shards", another]) == 2
    assert re.search(r"trained on vectors of the face embedder lbp, .*arcface abababababab", capsys.readouterr().err)
    assert call(["evaluate", trained / "run", "--from-shards", Path("nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
