"""The loader on a dataset that `make dataset` made of the bundled photos."""

from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest

from pipeline.train.loader.batches import Batch
from pipeline.train.loader.dataset import Dataset, open_dataset
from pipeline.train.loader.faces import first_faces
from pipeline.train.loader.loader import ShardLoader
from pipeline.train.settings import AdapterSettings, TrainConfig
from schemas.arrays import Image
from stages.pixels.geometry import norm_crop


@pytest.fixture(scope="module")
def made(dataset: Path) -> Dataset:
    return open_dataset([str(dataset)], TrainConfig().data)


def epoch(made: Dataset, reads: tuple[str, ...], buckets: bool, flip: float) -> list[Batch]:
    data = {"resolution": 256, "batch_size": 3, "workers": 0, "buckets": buckets, "latents": "images"}
    config = TrainConfig.model_validate({"data": data, "augment": {"flip": flip}})
    return list(takewhile(lambda batch: batch.position.epoch == 0, ShardLoader(made, reads, config)))


@pytest.fixture(scope="module")
def faces(made: Dataset) -> dict[str, Image]:
    every = first_faces(made, made.samples, ("arcface",), AdapterSettings())
    return {face.photo.key: face.photo.face for face in every}


@pytest.mark.parametrize("buckets", [True, False])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_face_is_where_the_points_say(made: Dataset, faces: dict[str, Image], buckets: bool, flip: float) -> None:
    batches = epoch(made, ("arcface",), buckets, flip)
    assert sorted(key for batch in batches for key in batch.keys) == sorted(faces)
    for batch in batches:
        assert batch.pixels is not None
        for key, pixels, kps in zip(batch.keys, batch.pixels.numpy(), batch.kps.numpy(), strict=True):
            picture = np.round((np.ascontiguousarray(pixels.transpose(1, 2, 0)) + 1) * 127.5).astype(np.uint8)
            found = norm_crop(picture, kps, 224)
            face = faces[key][:, ::-1] if flip else faces[key]
            assert np.corrcoef(found.ravel(), face.ravel())[0, 1] > 0.9, key


def test_a_variant_with_image_features_reads_it_too(made: Dataset) -> None:
    for batch in epoch(made, ("arcface", "hidden"), True, 0.5):
        assert batch.condition["hidden"].shape == (len(batch), 257, 1280)
        np.testing.assert_allclose(batch.condition["arcface"].norm(dim=1)[~batch.uncond_image], 1, atol=1e-4)
        assert all(batch.captions)
