"""The card beside an adapter: what the hub reads of it, whose it is, and what an evaluation adds."""

import re

import pytest
from huggingface_hub import ModelCard

from pipeline.train.adapter_card import Results, write_adapter_card
from schemas.errors import OutputError

SIDECAR = {
    "faceshards": "1",
    "variant": "faceid",
    "base": "sd15",
    "kind": "sd15",
    "image_encoder": "clip-vit-h",
    "condition": {"arcface": "normed embedding of the 112x112 norm_crop"},
    "num_tokens": 4,
    "loading": ["Mind this."],
    "preset": "sd15-512",
    "recipe": {"optim": {"lr": 1e-4}, "steps": 7},
    "dataset": {"digest": "d" * 64, "profiles": ["insightface"], "samples": 12345, "lineage": []},
    "weights": [{"task": "face_embedder", "name": "w600k_r50", "licence": "non-commercial", "sha256": "a" * 64}],
    "init_from": None,
    "licences": ["non-commercial"],
    "steps": 7,
}
NAME = "ip-adapter-faceid_sd15"


def test_the_hub_reads_its_head_and_people_what_binds_it(tmp_path):
    write_adapter_card(tmp_path, NAME, SIDECAR)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert card.data.license == "other"
    assert {"ip-adapter", "faceid"} <= set(card.data.tags)
    assert "| face_embedder | w600k_r50 | non-commercial | `aaaaaaaaaaaaaaaa…` |" in card.text
    assert "12,345 samples" in card.text
    assert "* Mind this." in card.text
    assert "`optim.lr` | `0.0001`" in card.text
    assert "For trying out" not in card.text
    assert "Not evaluated" in card.text


def test_of_what_it_began_as_the_licences_are_named(tmp_path):
    before = {"name": "old.bin", "sha256": "b" * 64, "licences": ["research only"], "lineage": [], "is_known": False}
    write_adapter_card(tmp_path, NAME, {**SIDECAR, "init_from": before, "base": "tiny"})
    text = (tmp_path / "README.md").read_text()
    assert "It began as `old.bin`, of whose own training nothing is known." in text
    assert "| beginning | old.bin | research only | `bbbbbbbbbbbbbbbb…` |" in text
    assert "For trying out" in text
    assert ModelCard(text).data.base_model is None


def test_what_the_user_added_stays_and_other_cards_are_left_alone(tmp_path):
    path = tmp_path / "README.md"
    write_adapter_card(tmp_path, NAME, SIDECAR)
    path.write_text(path.read_text() + "My own words.\n")
    results = Results([("ID similarity", "0.41", "0.38 to 0.44", "strangers 0.05")], ["Held out."])
    write_adapter_card(tmp_path, NAME, {**SIDECAR, "steps": 8}, results)
    text = path.read_text()
    assert text.endswith("My own words.\n")
    assert len(re.findall("for 8 steps", text)) == 1
    assert "| ID similarity | 0.41 | 0.38 to 0.44 | strangers 0.05 |" in text
    assert "* Held out." in text
    assert "Not evaluated" not in text
    write_adapter_card(tmp_path, "ip-adapter-faceid_sdxl", SIDECAR)
    assert path.read_text() == text, "the card of another adapter"
    path.write_text(f"About {NAME}.safetensors, by hand.\n")
    write_adapter_card(tmp_path, NAME, SIDECAR)
    assert path.read_text() == f"About {NAME}.safetensors, by hand.\n"


def test_a_card_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "README.md").mkdir()
    with pytest.raises(OutputError, match=r"README\.md cannot be written"):
        write_adapter_card(tmp_path, NAME, SIDECAR)
