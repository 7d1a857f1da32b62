"""Decoding by a GPU, with another decoder in nvJPEG's stead: what it gives, and what it leaves to others."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from skimage import data as samples

from schemas.errors import PlanError
from stages.pixels import images
from stages.pixels.nvjpeg import NvJpeg

PHOTO = np.asarray(Pillow.fromarray(samples.astronaut()).resize((90, 60)))


def jpeg(pixels=PHOTO, mode="RGB", orientation=1) -> bytes:
    stream, exif = io.BytesIO(), Pillow.Exif()
    exif[0x0112] = orientation
    Pillow.fromarray(pixels).convert(mode).save(stream, "JPEG", quality=95, exif=exif)
    return stream.getvalue()


class Decode:
    """As torchvision's decode_jpeg: as stored, no part of a batch in case of an error."""

    def __init__(self, offset=0):
        self.batches: list[int] = []
        self.offset = offset

    def __call__(self, files):
        self.batches.append(len(files))
        decoded = []
        for file in files:
            pixels = cv2.imdecode(file.numpy(), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
            if pixels is None or b"BROKEN" in file.numpy().tobytes():
                raise RuntimeError("nvjpegDecode failed")
            rgb = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) + np.uint8(self.offset)
            decoded.append(torch.from_numpy(rgb).permute(2, 0, 1))
        return decoded


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_any_other(orientation):
    data = jpeg(orientation=orientation)
    assert (NvJpeg(Decode())(data) == images.photo(f"upright {orientation}", data)).all()


def test_what_it_does_not_take_is_decoded_as_ever():
    decode = Decode()
    nvjpeg = NvJpeg(decode)
    images.set_decoding(1, nvjpeg)
    try:
        decode.batches.clear()
        others = {"cmyk": jpeg(mode="CMYK"), "png": images.encode_png(PHOTO), "broken": jpeg() + b"BROKEN"}
        for name, data in others.items():
            assert nvjpeg(data) is None
            assert images.photo(f"left by nvjpeg: {name}", data).shape == (60, 90, 3)
        assert decode.batches == [1, 1], "only the broken one came to it"
        decode.offset = 1
        assert (images.photo("by nvjpeg", jpeg()) == images.decode_jpeg(jpeg()) + np.uint8(1)).all()
    finally:
        images.set_decoding(1)


def test_threads_share_its_batches_and_a_broken_file_costs_itself_alone():
    decode, start = Decode(), threading.Barrier(8)
    nvjpeg = NvJpeg(decode)
    files = [jpeg(np.full((16, 16 + n, 3), 20 * n, np.uint8)) + b"BROKEN" * (n == 3) for n in range(8)]

    def one(data):
        start.wait(60)
        return [nvjpeg(data) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for n, found in enumerate(pool.map(one, files)):
            assert [None if pixels is None else pixels.shape for pixels in found] == [
                None if n == 3 else (16, 16 + n, 3)
            ] * 20
    assert max(decode.batches) > 1


def fails(files):
    raise RuntimeError("no such device")


@pytest.mark.parametrize("decode", [Decode(offset=3), fails])
def test_one_that_gives_another_picture_or_none_is_refused(decode):
    with pytest.raises(PlanError, match=r"models\.decoding = cpu"):
        NvJpeg(decode)


def test_without_a_gpu_it_is_an_error():
    with pytest.raises(PlanError, match="asks for a GPU"):
        NvJpeg()
