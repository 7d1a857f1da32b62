import io

import numpy as np
import pytest
from PIL import Image

from schemas.drops import Dropped
from stages.fetch.body import Body
from stages.pixels import headers
from stages.settings import DownloadSettings, Settings

SETTINGS = Settings(download=DownloadSettings(max_bytes=3_000_000), filter={"min_image_px": 64})


def picture(format, side, **options):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(
        buffer, format, **options
    )
    return buffer.getvalue()


def feed(data, piece=1000):
    """The reason, or the body; and how many bytes were taken."""
    body = Body(SETTINGS)
    taken = 0
    try:
        for start in range(0, len(data), piece):
            taken += len(data[start : start + piece])
            body.feed(data[start : start + piece])
        return body.finish(), taken
    except Dropped as dropped:
        return dropped.reason, taken


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_small_image_is_seen_within_the_first_bytes(format):
    data = picture(format, 48) + bytes(1_000_000)
    assert feed(data) == ("small_image", 4096 // 1000 * 1000 + 1000)


def test_a_header_behind_a_long_preamble_is_still_seen():
    data = picture("JPEG", 48, icc_profile=bytes(100_000)) + bytes(2_000_000)
    reason, taken = feed(data)
    assert reason == "small_image"
    assert taken <= 300_000


def test_looks_are_few(monkeypatch):
    looks = []
    monkeypatch.setattr(headers, "sniff", lambda prefix: looks.append(len(prefix)))
    body = Body(SETTINGS)
    for _ in range(290):
        body.feed(b"\x01" * 10_000)
    body.finish()
    assert len(looks) <= 5
    assert max(looks) < 1_100_000


def test_a_large_image_is_looked_at_once(monkeypatch):
    looks, sniff = [], headers.sniff
    monkeypatch.setattr(headers, "sniff", lambda prefix: looks.append(1) or sniff(prefix))
    data = picture("PNG", 600)
    assert feed(data)[0] == data
    assert len(looks) == 1


def test_the_cap_is_exact():
    body = Body(SETTINGS)
    body.announce(3_000_000)
    body.feed(b"\x01" * 3_000_000)
    assert len(body.finish()) == 3_000_000
    with pytest.raises(Dropped):
        body.feed(b"\x01")
    with pytest.raises(Dropped):
        Body(SETTINGS).announce(3_000_001)
