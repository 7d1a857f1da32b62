"""Headers that need a library are read where a crash costs one row."""

import io

import dying_decoder
import pyarrow as pa
import pytest
from PIL import Image

from schemas.drops import DropReason
from stages.base import DROP
from stages.pixels import decoding
from stages.runtime import Runtime
from stages.settings import Settings
from stages.size import Size


def test_drops_decoder_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decoder", decoding.Decoder)
    monkeypatch.setattr(decoding, "COMMAND", dying_decoder.COMMAND)
    files = []
    for format in ("TIFF", "PNG"):
        buffer = io.BytesIO()
        Image.new("RGB", (1200, 1200)).save(buffer, format)
        files.append(buffer.getvalue())
    dropped = Size(Settings(), Runtime())(pa.table({"image": files}))[DROP].to_pylist()
    assert dropped == [DropReason.DECODER_CRASH, None]
