"""Prompts in images that A1111 and ComfyUI made, and in the .txt files that A1111 writes beside them."""

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.source.aliases import FILE_ALIASES
from pipeline.dataset.source.metadata_files import from_files
from pipeline.dataset.source.prompts import in_png, of_infotext

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


def test_prompts_in_png_files(tmp_path):
    assert in_png(png(tmp_path / "a.png", parameters=f"a woman\nNegative prompt: ugly\n{SETTINGS}")) == "a woman"
    assert in_png(png(tmp_path / "u.png", parameters=f"größer 人\n{SETTINGS}")) == "größer 人"
    assert in_png(png(tmp_path / "c.png", workflow="{}", prompt=json.dumps(GRAPH))) == "a portrait, größer"


@pytest.mark.parametrize(
    "prompt", ["", "[]", "{", "[" * 100_000, '{"1": 2}', '{"1": {"inputs": {"positive": ["1", 0]}}}']
)
def test_what_is_no_prompt_is_none(prompt, tmp_path):
    assert in_png(png(tmp_path / "a.png", prompt=prompt, other="x")) == ""


def test_a_file_that_ends_anywhere_or_is_no_png_has_no_prompt(tmp_path):
    whole = (tmp_path / "a.png", png(tmp_path / "a.png", parameters="a woman"))[0].read_bytes()
    for length in range(len(whole)):
        (tmp_path / "b.png").write_bytes(whole[:length])
        assert in_png(str(tmp_path / "b.png")) in ("", "a woman")
    assert in_png(str(tmp_path / "none.png")) == ""


def test_a_folder_of_generated_images_has_captions_and_a_file_beside_comes_first(tmp_path):
    png(tmp_path / "a.png", parameters=f"a woman\n{SETTINGS}")
    png(tmp_path / "b.png", prompt=json.dumps(GRAPH))
    png(tmp_path / "c.png", parameters="another")
    (tmp_path / "c.txt").write_text(f"a man\nNegative prompt: ugly\n{SETTINGS}")
    png(tmp_path / "d.png")
    words = ["plan", "--shards", f"made:{tmp_path}", "--profile", "embedded", "--executor", "local"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "Captions: 3 of 4 rows" in done.output
