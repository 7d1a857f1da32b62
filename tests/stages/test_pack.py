"""What stands in the json of every sample."""

import json

import pytest

from stages.pack import Pack
from stages.runtime import Runtime
from stages.settings import Settings


def content(**columns):
    record = {**dict.fromkeys(Pack.reads), "key": "a-000000000", "source_kind": "web", "crops": "{}", **columns}
    return json.loads(Pack(Settings(), Runtime()).row(record)["json"])


@pytest.mark.parametrize("kind", ["web", "made"])
def test_a_sample_says_whether_its_image_is_of_the_web_or_was_made(kind):
    assert content(source_kind=kind)["source_kind"] == kind


def test_a_sample_has_all_that_was_measured_of_it():
    measured = {
        "yaw_deg": -12.5,
        "pitch_deg": 3.0,
        "roll_deg": 1.0,
        "eye_px": 88.25,
        "sharpness": 400.0,
        "brightness": 90.0,
        "occlusion": 0.0,
        "jpeg_quality": 0,
        "embedding_norm": 20.5,
        "mask_share": 0.5,
    }
    models = {"fiqa": 0.0, "photo": 0.9, "aesthetic": 5.5, "nsfw_score": 0.01, "ai_mark": "c2pa"}
    assert content(**measured, **models).items() >= {**measured, **models}.items()
    assert not content(**measured, **{**dict.fromkeys(models), "ai_mark": ""}).keys() & models.keys()
