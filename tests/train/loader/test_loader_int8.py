"""The loader on token features in int8: they arrive as they are stored, beside float16, as the same numbers."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import fake_shards as fake
import numpy as np
import pytest
import torch
from safetensors.numpy import save

from pipeline.train.loader.batches import Batch, MixedTokens, mixed
from pipeline.train.loader.dataset import Dataset, open_dataset
from pipeline.train.loader.faces import first_faces
from pipeline.train.loader.loader import ShardLoader
from pipeline.train.loader.reading import features_of
from pipeline.train.settings import AdapterSettings, TrainConfig
from schemas.errors import CorruptShardError, SourceError
from schemas.int8 import Quantised, dequantise, encode_int8, quantise
from schemas.shard import encode_npy

ALL = ("arcface", "pooled", "hidden")
DINO = AdapterSettings(image_encoder="dinov2")
NEAR = {"rtol": 1e-3, "atol": 0.0}
"""A scale has 11 bits."""


def config(encoder: str = "clip-vit-h", uncond: float = 0.0, **data: Any) -> TrainConfig:
    settings = {"resolution": 64, "batch_size": 3, "workers": 0, "shuffle": 4, "verify": "size", **data}
    guidance = {"p_uncond_image": uncond, "p_uncond_text": 0, "p_uncond_both": 0}
    return TrainConfig.model_validate({"data": settings, "guidance": guidance, "adapter": {"image_encoder": encoder}})


def with_all(number: int) -> fake.Files:
    """A sample with the features of both encoders, and of its mirrored face."""
    dino = {"dino.npy": number, "dino_mirror.npy": -number}
    tokens = {suffix: encode_npy(np.full(fake.HIDDEN, value, np.float16)) for suffix, value in dino.items()}
    return {**fake.sample(number, has=("portrait",)), **fake.mirrors(number), **tokens}


def opened(*folders: tuple[Path, Sequence[fake.Files]]) -> Dataset:
    """Datasets whose shards, of one name each, are of another plan each."""
    dirs = [
        fake.write(root, {f"{root.name}-00000": samples}, plan_digest=f"plan {root.name}") for root, samples in folders
    ]
    return open_dataset(dirs, config().data)


def batches(loader: ShardLoader, count: int) -> list[Batch]:
    stream = iter(loader)
    try:
        return list(islice(stream, count))
    finally:
        stream.close()  # type: ignore[attr-defined]


def hidden(batch: Batch) -> torch.Tensor:
    return batch.condition["hidden"].float()


def expected(batch: Batch, nothing: int) -> torch.Tensor:
    """(B,): the one number of each sample's features: its own, that of the mirrored face, or that of no face."""
    assert batch.pixels is not None
    flipped = batch.pixels[:, 0, :, 0].mean(1) > batch.pixels[:, 0, :, -1].mean(1)
    numbers = torch.tensor([float(text[8:]) for text in batch.captions])
    return torch.where(batch.uncond_image, nothing, torch.where(flipped, -numbers, numbers))


@pytest.fixture(params=["int8", "mixed"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    """24 samples in two folders, both in int8 or the second one alone."""
    first, second = [with_all(number) for number in range(1, 13)], [with_all(number) for number in range(13, 25)]
    in_int8 = list(map(fake.in_int8, second))
    other = first if request.param == "mixed" else list(map(fake.in_int8, first))
    return opened((tmp_path / "a", other), (tmp_path / "b", in_int8))


@pytest.mark.parametrize(
    ("workers", "encoder"),
    [
        (0, "clip-vit-h"),
        pytest.param(0, "dinov2", marks=pytest.mark.long),
        (1, "clip-vit-h"),
        pytest.param(1, "dinov2", marks=pytest.mark.long),
    ],
)
def test_features_in_either_form_arrive_as_the_same_numbers(stored: Dataset, encoder: str, workers: int) -> None:
    forms, nothing = set(), -7 if encoder == "clip-vit-h" else -8
    for batch in batches(ShardLoader(stored, ALL, config(encoder, uncond=0.3, workers=workers)), 16):
        features = batch.condition["hidden"]
        forms.add(type(features))
        if isinstance(features, MixedTokens):
            types = features.plain.dtype, features.int8.dtype, features.scale.dtype
            assert types == (torch.float16, torch.int8, torch.float16)
            assert len(features.int8) + len(features.plain) == len(batch)
        values, numbers = hidden(batch), expected(batch, nothing)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, numbers.view(-1, 1, 1).expand(-1, *fake.HIDDEN), **NEAR)
        pooled = batch.condition["pooled"].float()
        if encoder == "clip-vit-h":
            numbers[batch.uncond_image] = 0
        torch.testing.assert_close(pooled, numbers.view(-1, 1).expand_as(pooled), **NEAR)
    assert MixedTokens in forms


def test_no_face_is_not_rounded(tmp_path: Path) -> None:
    dataset = opened((tmp_path / "a", [fake.in_int8(with_all(number)) for number in range(6)]))
    nothing = np.linspace(-1, 1, 40).reshape(fake.HIDDEN).astype(np.float16)
    fake.write(tmp_path / "a", {}, empty={"clip_hidden": nothing})
    again = open_dataset([str(tmp_path / "a")], config().data)
    assert again.digest == dataset.digest
    (batch,) = batches(ShardLoader(again, ALL, config(uncond=0.5, batch_size=6)), 1)
    assert 0 < batch.uncond_image.sum() < 6
    assert (hidden(batch)[batch.uncond_image] == torch.from_numpy(nothing).float()).all()


def test_the_order_of_samples_does_not_depend_on_the_form(tmp_path: Path) -> None:
    samples = [with_all(number) for number in range(9)]
    usual, int8 = opened((tmp_path / "a", samples)), opened((tmp_path / "b" / "a", list(map(fake.in_int8, samples))))
    pairs = zip(*(batches(ShardLoader(one, ALL, config()), 8) for one in (usual, int8)), strict=True)
    for one, other in pairs:
        assert (one.keys, one.crops, one.position) == (other.keys, other.crops, other.position)
        torch.testing.assert_close(hidden(one), hidden(other), **NEAR)


def test_a_loader_goes_on_where_it_was(stored: Dataset) -> None:
    settings = config(uncond=0.3)
    whole = batches(ShardLoader(stored, ALL, settings), 12)
    first = ShardLoader(stored, ALL, settings)
    batches(first, 5)
    second = ShardLoader(stored, ALL, settings)
    second.load_state_dict(first.state_dict())
    for one, other in zip(whole[5:], batches(second, 7), strict=True):
        assert one.keys == other.keys
        assert torch.equal(hidden(one), hidden(other))


def test_the_device_computes_what_numpy_does() -> None:
    random = np.random.default_rng(0)
    rows: list[Any] = [random.normal(size=(4, 70)).astype(np.float16) for _ in range(5)]
    stored = [quantise(row) if number in (0, 3, 4) else row for number, row in enumerate(rows)]
    values = mixed(stored).float()
    for value, row in zip(values.numpy(), stored, strict=True):
        assert (value == (dequantise(row) if isinstance(row, Quantised) else row.astype(np.float32))).all()
    assert mixed(stored[:1]).float().shape == (1, 4, 70)


def test_a_batch_in_int8_moves_as_a_whole(stored: Dataset) -> None:
    every = batches(ShardLoader(stored, ALL, config()), 8)
    batch = next(one for one in every if isinstance(one.condition["hidden"], MixedTokens))
    features = batch.to("meta").condition["hidden"]
    assert isinstance(features, MixedTokens)
    assert {part.device.type for part in features} == {"meta"}


def test_validation_and_widths_read_int8(stored: Dataset) -> None:
    assert {"clip_hidden.npy", "dino.npy", "clip_hidden_mirror.npy"} <= stored.suffixes
    features = features_of(stored, ("pooled", "hidden"), AdapterSettings())
    assert features.files == ({"pooled": "clip.npy", "hidden": "clip_hidden.npy"},)
    assert features.widths == {"features": fake.HIDDEN[1], "pooled": fake.POOLED}
    assert features_of(stored, ("pooled", "hidden"), DINO).widths == dict.fromkeys(
        ["features", "pooled"], fake.HIDDEN[1]
    )
    assert features.unconditional["hidden"].dtype == np.float16
    for adapter in (AdapterSettings(), DINO):
        for number, face in enumerate(first_faces(stored, 24, ALL, adapter), start=1):
            for features in face.condition.values():
                assert features.dtype == torch.float32
                torch.testing.assert_close(features, torch.full_like(features, number), **NEAR)


def test_a_folder_without_hidden_states_in_any_form_is_refused(tmp_path: Path) -> None:
    lacking = {suffix: data for suffix, data in fake.sample(1).items() if suffix != "clip_hidden.npy"}
    dataset = opened((tmp_path / "a", [fake.in_int8(fake.sample(0))]), (tmp_path / "b", [lacking]))
    with pytest.raises(SourceError, match=r"no clip_hidden\.npy"):
        ShardLoader(dataset, ALL, config())


WHOLE = encode_int8(quantise(np.ones(fake.HIDDEN, np.float16)))
DAMAGE = {
    "nothing": b"",
    "cut": WHOLE[:-3],
    "another tensor": save({"int8": np.ones(fake.HIDDEN, np.int8)}),
    "another shape": encode_int8(quantise(np.ones((5, 9), np.float16))),
    "no tokens": encode_int8(Quantised(np.zeros((0, 0), np.int8), np.zeros((0, 0), np.float16))),
    "not finite": encode_int8(quantise(np.full(fake.HIDDEN, np.inf, np.float16))),
    "float16": encode_npy(np.ones(fake.HIDDEN, np.float16)),
}


@pytest.mark.parametrize(
    ("workers", "damage"),
    [
        pytest.param(workers, damage, marks=[pytest.mark.long] if workers else [])
        for workers in (0, 1)
        for damage in DAMAGE
    ],
)
def test_a_damaged_file_names_shard_and_key(tmp_path: Path, damage: str, workers: int) -> None:
    samples = [fake.in_int8(fake.sample(number)) for number in range(4)]
    samples[2]["clip_hidden.safetensors"] = DAMAGE[damage]
    dataset = opened((tmp_path / "a", samples))
    with pytest.raises(CorruptShardError, match=r"a-00000\.tar: a-00000-002\.clip_hidden\.safetensors \w+"):
        batches(ShardLoader(dataset, ALL, config(workers=workers)), 9)
