"""Prompts in images that A1111 and ComfyUI made, and in the .txt files that A1111 writes beside them."""

import io
import json
import tarfile

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.source.aliases import FILE_ALIASES
from pipeline.dataset.source.metadata_files import from_files
from pipeline.dataset.source.prompts import in_image, of_infotext

SETTINGS = "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 5, Size: 1024x1024, Model: x"
GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 1, "model": ["4", 0], "positive": ["9", 0], "negative": ["7", 0]},
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["8", 0], "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "ugly", "clip": ["4", 1]}},
    "8": {"class_type": "PrimitiveString", "inputs": {"value": "a portrait, größer"}},
    "9": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["6", 0], "conditioning_2": ["9", 0]}},
}


def png(path, **texts):
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return str(path)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (f"a man,\nsmiling\nNegative prompt: ugly,\nbad\n{SETTINGS}", "a man,\nsmiling"),
        (f"a man, <lora:x:0.8>, park\n{SETTINGS}\n", "a man, park"),
        (f"Negative prompt: ugly\n{SETTINGS}", ""),
        (SETTINGS, ""),
        ("A recipe.\nSteps: 3, easy", "A recipe.\nSteps: 3, easy"),
        ("", ""),
    ],
)
def test_of_what_a1111_writes_the_prompt_alone_is_the_caption(text, prompt):
    assert of_infotext(text) == prompt
    beside = from_files([{"txt": text.encode()}], FILE_ALIASES)
    assert beside["text"].to_pylist() == [[prompt] if prompt else []]


def caption(path):
    with path.open("rb") as file:
        return "".join(*from_files([{"txt": in_image(file)}], FILE_ALIASES)["text"].to_pylist())


def with_exif(path, comment=b"", **texts):
    exif = Image.Exif()
    for name, text in texts.items():
        exif[{"Model": 0x0110, "Make": 0x010F, "ImageDescription": 0x010E}[name]] = text
    if comment:
        exif.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    return path


def test_prompts_in_png_files(tmp_path):
    for text, prompt in (("a woman\nNegative prompt: ugly", "a woman"), ("größer 人", "größer 人")):
        png(tmp_path / "a.png", parameters=f"{text}\n{SETTINGS}")
        assert caption(tmp_path / "a.png") == prompt
    png(tmp_path / "c.png", workflow="{}", prompt=json.dumps(GRAPH))
    assert caption(tmp_path / "c.png") == "a portrait, größer"


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_prompts_in_exif(name, tmp_path):
    text, path = f"größer 人\nNegative prompt: ugly\n{SETTINGS}", tmp_path / name
    for encoding in ("utf-16-be", "utf-16-le"):
        assert caption(with_exif(path, b"UNICODE\0" + text.encode(encoding))) == "größer 人"
    graph = json.dumps(GRAPH)
    assert caption(with_exif(path, Model=f"prompt:{graph}", Make="workflow:{}")) == "a portrait, größer"
    assert caption(with_exif(path, Make=f"Prompt:{graph}", ImageDescription="Workflow:{}")) == "a portrait, größer"
    for other in ({}, {"Make": "prompt:{"}, {"ImageDescription": "DIGITAL CAMERA", "comment": b"ASCII\0\0\0hello"}):
        assert caption(with_exif(path, **other)) == ""


@pytest.mark.parametrize(
    "prompt", ["", "[]", "{", "[" * 100_000, '{"1": 2}', '{"1": {"inputs": {"positive": ["1", 0]}}}']
)
def test_what_is_no_prompt_is_none(prompt, tmp_path):
    png(tmp_path / "a.png", prompt=prompt, other="x")
    assert caption(tmp_path / "a.png") == ""


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_file_that_ends_anywhere_has_no_prompt_or_a_whole_one(name, tmp_path):
    comment = f"a woman\n{SETTINGS}"
    if name == "a.png":
        png(tmp_path / name, parameters=comment)
    else:
        with_exif(tmp_path / name, b"UNICODE\0" + comment.encode("utf-16-be"))
    whole = (tmp_path / name).read_bytes()
    for length in range(len(whole)):
        assert of_infotext(in_image(io.BytesIO(whole[:length])).decode()) in ("", "a woman")
    assert caption(tmp_path / name) == "a woman"


def test_a_folder_of_generated_images_has_captions_and_a_file_beside_comes_first(tmp_path):
    png(tmp_path / "a.png", parameters=f"a woman\n{SETTINGS}")
    png(tmp_path / "b.png", prompt=json.dumps(GRAPH))
    png(tmp_path / "c.png", parameters="another")
    (tmp_path / "c.txt").write_text(f"a man\nNegative prompt: ugly\n{SETTINGS}")
    png(tmp_path / "d.png")
    with_exif(tmp_path / "e.webp", Model=f"prompt:{json.dumps(GRAPH)}")
    for name, text in (("f", ""), ("g", '{"seed": 1}'), ("h", '{"seed": 1, "caption": "h"}')):  # a caption may be none
        png(tmp_path / f"{name}.png", parameters=f"a woman\n{SETTINGS}")
        (tmp_path / f"{name}.{'json' if text else 'txt'}").write_text(text)
    tar = tmp_path.with_suffix(".tar")
    with tarfile.open(tar, "w") as file:
        for name in (
            "a.png",
            "c.png",
            "c.txt",
            "d.png",
            "e.webp",
            "f.png",
            "f.txt",
            "g.png",
            "g.json",
            "h.png",
            "h.json",
        ):
            file.add(tmp_path / name, name)
    for source, captions in ((tmp_path, "6 of 8"), (tar, "5 of 7")):
        words = ["plan", "--shards", f"made:{source}", "--profile", "embedded", "--executor", "local"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert f"Captions: {captions} rows" in done.output
