"""A photo that kills its decoder is a row of the ledger, like any other; the real thing is in test_decoding."""

import dying_decoder
import pyarrow as pa
import pytest
from skimage import data

from schemas.columns import schema
from schemas.drops import DropReason
from stages.base import DROP
from stages.detect import Detect
from stages.pixels import decoding
from stages.pixels.images import encode_jpeg
from stages.runtime import Runtime
from stages.settings import Settings


def test_drops_decoder_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decoder", decoding.Decoder)
    monkeypatch.setattr(decoding, "COMMAND", dying_decoder.COMMAND)
    photo = {"image": encode_jpeg(data.astronaut(), 90), "sha256": "a photo that was never decoded before"}
    table = pa.Table.from_pylist([photo], schema=schema(("image", "sha256")))
    stage = Detect(Settings.model_validate({"models": {"detector": "haar"}}), Runtime())
    assert stage(table)[DROP].to_pylist() == [DropReason.DECODER_CRASH]
