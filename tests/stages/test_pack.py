"""What stands in the json of every sample."""

import json

import pytest

from stages.pack import Pack
from stages.runtime import Runtime
from stages.settings import Settings


@pytest.mark.parametrize("kind", ["web", "made"])
def test_a_sample_says_whether_its_image_is_of_the_web_or_was_made(kind):
    record = {**dict.fromkeys(Pack.reads), "key": "a-000000000", "source_kind": kind, "crops": "{}"}
    assert json.loads(Pack(Settings(), Runtime()).row(record)["json"])["source_kind"] == kind
