import hashlib
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from skimage import data as samples

from schemas.drops import DropReason
from stages.base import DROP
from stages.models.segmenters.grabcut import GrabCut
from stages.pixels import geometry
from stages.pixels.images import decode_png
from stages.runtime import Runtime
from stages.segment import Segment, occlusion
from stages.settings import FilterSettings, ModelSettings, SegmentSettings, Settings

KPS = [[204.4, 100.8], [247.3, 103.1], [223.5, 128.4], [201.2, 138.5], [246.4, 140.6]]
"""The astronaut's face, as SCRFD finds it."""

MODELS = ModelSettings(segmenter="grabcut")


def segment(pixels: np.ndarray, kps: object = KPS, max_occlusion: float = 1, **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    data = buffer.getvalue()
    table = pa.table({"image": [data], "sha256": [hashlib.sha256(data).hexdigest()], "kps": [kps]})
    limits = FilterSettings(max_occlusion=max_occlusion)
    settings = Settings(models=MODELS, segment=SegmentSettings(**options), filter=limits)
    return Segment(settings, Runtime())(table).to_pylist()[0]


def test_a_real_face_is_foreground_and_the_mask_says_how_much() -> None:
    row = segment(samples.astronaut())
    mask = decode_png(row["mask"])
    assert (mask.shape, mask.dtype, row[DROP]) == ((224, 224), np.uint8, None)
    assert (mask[90:190, 80:145] == 1).mean() > 0.95
    assert row["mask_share"] == pytest.approx((mask == 1).mean())
    assert 0.3 < row["mask_share"] < 1


def test_the_mask_lies_on_the_face_crop() -> None:
    """A face drawn in one colour on another: the mask must be that colour's shape in the norm_crop."""
    rows, columns = np.indices((512, 512))
    disc = (((columns - 224) / 42) ** 2 + ((rows - 115) / 55) ** 2 < 1)[..., None]
    drawn = np.where(disc, np.uint8([230, 180, 150]), np.uint8([20, 60, 20]))
    mask = decode_png(segment(drawn)["mask"])
    face = geometry.norm_crop(drawn, KPS, 224)[..., 0] > 128
    assert (mask & face).sum() / (mask | face).sum() > 0.9


def test_the_segmenter_sees_the_ffhq_crop_and_its_points(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(self: GrabCut, image: np.ndarray, kps: np.ndarray) -> np.ndarray:
        seen.append((image, kps))
        return np.full((512, 512), 17, np.uint8)

    monkeypatch.setattr(GrabCut, "segment", watched)
    row = segment(samples.astronaut())
    ((image, kps),) = seen
    assert (image == geometry.ffhq_crop(samples.astronaut(), KPS)).all()
    assert np.abs(kps - geometry.FFHQ_TEMPLATE).max() < 15
    assert (decode_png(row["mask"]) == 17).all()
    assert row["mask_share"] == 1
    assert segment(samples.astronaut(), keep=(1,))[DROP] == DropReason.EMPTY_MASK


def test_beyond_the_photo_there_is_only_background(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrabCut, "segment", lambda *_: np.full((512, 512), 1, np.uint8))
    tight = samples.astronaut()[60:170, 190:260]
    kps = np.subtract(KPS, [190, 60]).tolist()
    mask = decode_png(segment(tight, kps)["mask"])
    assert (mask == geometry.inside_photo(kps, 70, 110, 224)).all()
    assert not mask.all()


@pytest.mark.usefixtures("remembered")
def test_drops_empty_mask() -> None:
    row = segment(samples.astronaut(), keep=(16,))
    assert row == {"mask": None, "mask_share": 0, "occlusion": None, DROP: DropReason.EMPTY_MASK}
    share = segment(samples.astronaut())["mask_share"]
    assert segment(samples.astronaut(), min_share=share + 0.01)[DROP] == DropReason.EMPTY_MASK
    assert segment(samples.astronaut(), min_share=share - 0.01)[DROP] is None


def test_drops_occluded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Glasses over the upper half of the face, hair over all of it, nothing."""
    glasses = np.where(np.indices((512, 512))[0] < 285, 6, 1).astype(np.uint8)
    for labels, low, high in ((glasses, 0.3, 0.7), (np.full_like(glasses, 17), 1, 1), (np.ones_like(glasses), 0, 0)):
        monkeypatch.setattr(GrabCut, "segment", lambda *_, labels=labels: labels)
        covered = segment(samples.astronaut())["occlusion"]
        assert low <= covered <= high
        for limit, reason in ((covered, None), (covered - 0.01, DropReason.OCCLUDED)):
            if limit >= 0:
                row = segment(samples.astronaut(), max_occlusion=limit)
                assert (row[DROP], row["occlusion"]) == (reason, covered)


def test_what_is_beside_the_five_points_occludes_nothing() -> None:
    mask = np.zeros((224, 224), np.uint8)
    kps = np.float32([[80, 100], [140, 100], [110, 130], [90, 160], [130, 160]])
    mask[98:163, 78:143] = 1
    assert occlusion(mask, kps) == 0
    mask[:130] = 18
    assert 0.4 < occlusion(mask, kps) < 0.6
