"""The loader: every sample once, in a known order, resumable at every batch; batches are what they say."""

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import fake_shards as fake
import fsspec
import numpy as np
import pytest
import torch

from pipeline.train.loader.batches import Batch
from pipeline.train.loader.dataset import Dataset, open_dataset
from pipeline.train.loader.loader import ShardLoader
from pipeline.train.settings import TrainConfig
from schemas.errors import ConfigError, CorruptShardError, SourceError
from schemas.shard import encode_npy

ID = ("arcface",)
ALL = ("arcface", "hidden")


def config(seed: int = 0, *, augment: Mapping[str, Any] | None = None, uncond: float = 0.0, **data: Any) -> TrainConfig:
    told = {"resolution": 64, "batch_size": 2, "workers": 0, "shuffle": 4, "verify": "size", **data}
    guidance = {"p_uncond_image": uncond, "p_uncond_text": uncond, "p_uncond_both": 0}
    return TrainConfig.model_validate({"seed": seed, "data": told, "augment": augment or {}, "guidance": guidance})


def opened(root: Any, shards: Mapping[str, Any], **changes: Any) -> Dataset:
    return open_dataset([fake.write(root, shards, **changes)], config().data)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """13 samples in three shards; every other one lacks `half`, three lack all but `full`."""
    has = [("portrait", "half", "full"), ("portrait", "full"), ("full",), ("portrait", "full")]
    samples = [fake.sample(number, has=has[number % 4]) for number in range(13)]
    shards = {"a-00000": samples[:6], "a-00001": samples[6:7], "b-00000": samples[7:]}
    return opened(tmp_path_factory.mktemp("data"), shards)


def take(loader: ShardLoader, count: int) -> list[Batch]:
    batches = iter(loader)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()  # type: ignore[attr-defined]


def observed(loader: ShardLoader, count: int, stops: Collection[int]) -> tuple[list[Batch], dict[int, Any]]:
    """So many batches, and the states between them as a checkpoint holds them: after those numbers of batches."""
    found, states, batches = [], {}, iter(loader)
    try:
        for number in range(1, count + 1):
            found.append(next(batches))
            if number in stops:
                states[number] = json.loads(json.dumps(loader.state_dict()))
    finally:
        batches.close()  # type: ignore[attr-defined]
    return found, states


def resumed(loader: ShardLoader, state: Mapping[str, Any]) -> ShardLoader:
    loader.load_state_dict(state)
    return loader


def epoch(loader: ShardLoader, number: int = 0) -> list[Batch]:
    """All batches of an epoch of a loader without workers."""
    found: list[Batch] = []
    for batch in loader:
        if batch.position.epoch > number:
            return found
        if batch.position.epoch == number:
            found.append(batch)
    raise AssertionError("a loader never ends")


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def every_key(dataset: Dataset) -> list[str]:
    return sorted(f"{shard.name}-{number:03d}" for shard in dataset.shards for number in range(shard.manifest.kept))


def same(one: Batch, other: Batch) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
        return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else bool(a == b)

    return all(equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Batch))


@pytest.mark.parametrize(
    ("world", "buckets"),
    [
        *((1, True), (3, True), (13, True), (2, False)),
        *(pytest.param(*case, marks=pytest.mark.long) for case in ((2, True), (1, False), (3, False), (13, False))),
    ],
)
def test_processes_share_every_epoch(dataset: Dataset, world: int, buckets: bool) -> None:
    for number in (0, 1):
        parts = [
            keys(epoch(ShardLoader(dataset, ID, config(buckets=buckets), rank=rank, world=world), number))
            for rank in range(world)
        ]
        assert sorted(key for part in parts for key in part) == every_key(dataset)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_workers_share_every_epoch_and_take_turns(dataset: Dataset) -> None:
    loaders = [ShardLoader(dataset, ID, config(workers=2), rank=rank, world=2) for rank in (0, 1)]
    batches = [batch for loader in loaders for batch in take(loader, 12)]
    assert [batch.position.worker for batch in batches] == [0, 1] * 12
    assert sorted(keys([batch for batch in batches if batch.position.epoch == 0])) == every_key(dataset)


def test_one_shard_serves_all_workers(tmp_path: Path) -> None:
    small = opened(tmp_path, {"a-00000": fake.counted(0, 2)})
    loader = ShardLoader(small, ID, config(workers=8, batch_size=8))
    assert loader.workers == 2, "no more workers than samples"
    assert sorted(keys(take(loader, 2))) == every_key(small)


def test_too_few_samples_for_the_processes(dataset: Dataset) -> None:
    with pytest.raises(SourceError, match="13 samples, too few for 14 processes"):
        ShardLoader(dataset, ID, config(), world=14)


def test_the_order_follows_from_the_seed_and_changes_with_the_epoch(dataset: Dataset) -> None:
    first, again = (keys(epoch(ShardLoader(dataset, ID, config(seed=5)))) for _ in range(2))
    assert first == again
    assert first != keys(epoch(ShardLoader(dataset, ID, config(seed=6))))
    assert first != keys(epoch(ShardLoader(dataset, ID, config(seed=5)), 1))


def test_a_buffer_of_one_keeps_the_order_of_the_shards(dataset: Dataset) -> None:
    found = keys(epoch(ShardLoader(dataset, ID, config(shuffle=1, batch_size=1))))
    by_shard = [key.rpartition("-")[0] for key in found]
    assert len([1 for one, other in pairwise(by_shard) if one != other]) == 2
    assert all(found.index(f"a-00000-{number:03d}") < found.index(f"a-00000-{number + 1:03d}") for number in range(5))
    mixed = keys(epoch(ShardLoader(dataset, ID, config(shuffle=13, batch_size=1))))
    assert sorted(mixed) == sorted(found)
    assert mixed != found


@pytest.mark.parametrize(
    ("workers", "buckets", "reads"),
    [(0, True, ID), pytest.param(0, False, ALL, marks=pytest.mark.long), (2, True, ALL)],
    ids=["id", "squares", "processes"],
)
def test_a_resumed_loader_goes_on_with_the_very_next_batch(
    dataset: Dataset, workers: int, buckets: bool, reads: tuple[str, ...]
) -> None:
    told = config(workers=workers, buckets=buckets, uncond=0.2, augment={"flip": 0.5, "colour": 0.5})
    # Each place of an epoch, and two further on.
    stops = (*range(1, 10), 15, 23) if workers == 0 else (1, 4)
    whole, states = observed(ShardLoader(dataset, reads, told), 24, stops)
    assert whole[-1].position.epoch >= 2
    for stop, state in states.items():
        rest = take(resumed(ShardLoader(dataset, reads, told), state), min(24 - stop, 4))
        assert rest
        assert all(map(same, whole[stop:], rest)), stop


def test_a_replay_reads_nothing_but_the_json(tmp_path: Path) -> None:
    samples = fake.counted(0, 8)
    good = opened(tmp_path / "good", {"a-00000": samples})
    loader = ShardLoader(good, ALL, config(batch_size=1, shuffle=1))
    passed = keys(take(loader, 5))
    for key in set(passed) - {"a-00000-000"}:  # the first sample tells the shapes
        samples[int(key[-3:])] |= {"clip_hidden.npy": b"damaged", "full.jpg": b"", "half.jpg": b"", "portrait.jpg": b""}
    fake.write(tmp_path / "good", {"a-00000": samples})
    rest = take(resumed(ShardLoader(good, ALL, config(batch_size=1, shuffle=1)), loader.state_dict()), 3)
    assert sorted(passed + keys(rest)) == every_key(good)


@pytest.mark.parametrize("other", [config(seed=1), config(batch_size=3), config(buckets=False), config(uncond=0.1)])
def test_a_place_in_another_order_is_refused(dataset: Dataset, other: TrainConfig) -> None:
    state = ShardLoader(dataset, ID, config()).state_dict()
    with pytest.raises(ConfigError, match="cannot be returned to"):
        ShardLoader(dataset, ID, other).load_state_dict(state)
    with pytest.raises(ConfigError, match="cannot be returned to"):
        ShardLoader(dataset, ID, config(), world=2).load_state_dict(state)
    with pytest.raises(ConfigError, match="cannot be returned to"):
        ShardLoader(dataset, ID, other, world=2).load_states_of([state])
    assert resumed(ShardLoader(dataset, ID, config(verify="sha256")), state).state_dict() == state


@pytest.mark.parametrize(
    "other",
    [
        config(shuffle=5),
        *(pytest.param(other, marks=pytest.mark.long) for other in (config(workers=2), config(workers=2, shuffle=1))),
    ],
)
def test_what_deals_out_samples_may_change_and_the_next_epoch_begins(dataset: Dataset, other: TrainConfig) -> None:
    loader = ShardLoader(dataset, ID, config())
    assert take(loader, 9)[-1].position.epoch == 1
    again = resumed(ShardLoader(dataset, ID, other), loader.state_dict())
    assert any("beginning of epoch 2" in notice for notice in again.notices)
    batches = take(again, 12)
    assert sorted(keys([batch for batch in batches if batch.position.epoch == 2])) == every_key(dataset)


@pytest.mark.parametrize(("before", "after"), [(3, 2), (1, 3), (2, 1)])
def test_another_number_of_processes_begins_the_next_epoch_and_shares_it(
    dataset: Dataset, before: int, after: int
) -> None:
    loaders = [ShardLoader(dataset, ID, config(), rank=rank, world=before) for rank in range(before)]
    ahead = [take(loader, 1 + 5 * (rank == 0))[-1].position.epoch for rank, loader in enumerate(loaders)]
    states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
    begun: list[str] = []
    for rank in range(after):
        again = ShardLoader(dataset, ID, config(), rank=rank, world=after)
        again.load_states_of(states)
        assert any(f"beginning of epoch {max(ahead) + 1}" in notice for notice in again.notices)
        batches = take(again, 12)
        assert batches[0].position == (0, max(ahead) + 1, 0)
        begun += keys([batch for batch in batches if batch.position.epoch == max(ahead) + 1])
    assert sorted(begun) == every_key(dataset)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_the_random_state_of_the_process_is_left_alone(dataset: Dataset, workers: int) -> None:
    before, numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    take(ShardLoader(dataset, ID, config(workers=workers)), 3)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy)  # type: ignore[index]


def test_batches_of_images(dataset: Dataset) -> None:
    batches = epoch(ShardLoader(dataset, ALL, config(batch_size=4)))
    sizes = Counter[tuple[int, int]]()
    for batch in batches:
        assert batch.pixels is not None
        assert batch.latents is None
        count, _, height, width = batch.pixels.shape
        sizes[width, height] += count
        assert count == len(batch) == len(batch.captions) == len(batch.uncond_text) == len(batch.crops)
        assert batch.pixels.dtype == torch.float32
        assert batch.pixels.min() >= -1
        assert batch.pixels.max() <= 1
        assert batch.condition["arcface"].shape == (count, 512)
        assert batch.condition["arcface"].dtype == torch.float32
        assert batch.condition["hidden"].shape == (count, *fake.HIDDEN)
        assert batch.condition["hidden"].dtype == torch.float16
        assert batch.size_ids[:, 4:].tolist() == [[height, width]] * count
        assert [int(value) for value in batch.condition["arcface"][:, 0]] == [int(text[8:]) for text in batch.captions]
    assert len(sizes) > 1, "full has an aspect of its own"
    left = sum(count % 4 > 0 for count in sizes.values())
    assert sum(len(batch) < 4 for batch in batches) == left > 0, "what is left at the end is not lost"
    squares = epoch(ShardLoader(dataset, ALL, config(batch_size=4, buckets=False)))
    assert {tuple(batch.size_ids[0, 4:].tolist()) for batch in squares} == {(64, 64)}


@pytest.mark.parametrize("flip", [0, 1])
def test_sizes_and_cuts_are_those_of_the_picture_as_it_is_seen(dataset: Dataset, flip: int) -> None:
    lefts = set()
    for batch in epoch(ShardLoader(dataset, ID, config(buckets=False, batch_size=1, augment={"flip": flip}))):
        height, width, top, left, *_ = map(int, batch.size_ids[0].tolist())
        assert (width, height) == fake.SIZES[batch.crops[0]]
        assert top == 0
        assert batch.pixels is not None
        # Red grows (mirrored: falls) over the width of the scaled picture, so that the first column tells where the
        # cut is.
        scaled = width * 64 / height
        red = (batch.pixels[0, 0, :, 0].mean().item() + 1) / 2
        assert abs((1 - red if flip else red) - left / scaled) < 0.03
        lefts.add(left / scaled)
    assert max(abs(left - (1 - 64 * 112 / (160 * 64)) / 2) for left in lefts if left) > 0.03, (
        "some are not in the middle"
    )


def test_a_mirrored_picture_has_mirrored_features_and_points(tmp_path: Path) -> None:
    samples = [{**fake.sample(number, has=("portrait",)), **fake.mirrors(number)} for number in range(1, 31)]
    mirrored = Counter[bool]()
    loader = ShardLoader(opened(tmp_path, {"a-00000": samples}), ("hidden", "pooled"), config(batch_size=1))
    for batch in epoch(loader):
        assert batch.pixels is not None
        number = int(batch.captions[0][8:])
        flipped = bool(batch.pixels[0, 0, :, 0].mean() > batch.pixels[0, 0, :, -1].mean())
        assert set(batch.condition["hidden"].unique().tolist()) == {-number if flipped else number}
        assert set(batch.condition["pooled"].unique().tolist()) == {-number if flipped else number}
        eyes = batch.kps[0, :2, 0]
        assert eyes[0] < eyes[1]
        # 75 is 36 of portrait's 72 columns; the eyes are 7 to either side of it.
        assert (eyes.sum() / 2 - (31.1 if flipped else 31.9)).abs() < 0.5
        mirrored[flipped] += 1
    assert min(mirrored.values()) >= 8


@pytest.mark.parametrize(("condition", "expected"), [("auto", 2), ("both", 2), ("segmented", 1), ("plain", 1)])
def test_the_condition_is_of_the_segmented_face_the_plain_one_or_either_by_a_draw(
    tmp_path: Path, condition: str, expected: int
) -> None:
    def both(number: int) -> fake.Files:
        own, plain = ({**fake.sample(n, has=("portrait",)), **fake.mirrors(n)} for n in (number, number + 100))
        return own | {
            re.sub(r"(clip|clip_hidden)(_mirror)?\.npy", r"\1_plain\2.npy", suffix): data
            for suffix, data in plain.items()
            if suffix.startswith("clip")
        }

    given = config(batch_size=1)
    given = given.model_copy(update={"adapter": given.adapter.model_copy(update={"condition": condition})})
    loader = ShardLoader(opened(tmp_path, {"a-00000": [*map(both, range(1, 41))]}), ("hidden", "pooled"), given)
    drawn = Counter[bool]()
    for batch in epoch(loader):
        assert batch.pixels is not None
        number = int(batch.captions[0][8:])
        flipped = bool(batch.pixels[0, 0, :, 0].mean() > batch.pixels[0, 0, :, -1].mean())
        (hidden,), (pooled,) = (batch.condition[role].unique().tolist() for role in ("hidden", "pooled"))
        assert hidden == pooled
        assert abs(hidden) in (number, number + 100)
        assert (hidden < 0) == flipped
        drawn[abs(hidden) > 100] += 1
    assert len(drawn) == expected
    assert min(drawn.values()) >= 10
    assert expected == 2 or drawn[condition == "plain"] == 40


def test_colours_change_for_the_id_alone(dataset: Dataset) -> None:
    def pixels(reads: tuple[str, ...], colour: float) -> torch.Tensor:
        told = config(augment={"flip": 0, "colour": colour}, buckets=False, batch_size=13)
        (batch,) = epoch(ShardLoader(dataset, reads, told))
        assert batch.pixels is not None
        return batch.pixels

    plain, changed = pixels(ID, 0), pixels(ID, 1)
    differences = (plain - changed).abs().mean((1, 2, 3))
    assert (differences > 0.002).all(), "every picture"
    assert (differences < 0.3).all(), "slightly"
    assert torch.equal(pixels(ALL, 1), plain)


def test_no_face_is_put_in_place_where_it_was_drawn(dataset: Dataset) -> None:
    found = Counter[tuple[bool, bool]]()
    for batch in take(ShardLoader(dataset, ALL, config(uncond=0.4)), 30):
        for index, (image, text) in enumerate(
            zip(batch.uncond_image.tolist(), batch.uncond_text.tolist(), strict=True)
        ):
            number = int(batch.captions[index][8:])
            assert batch.condition["arcface"][index].unique().tolist() == [0 if image else number]
            assert batch.condition["hidden"][index].unique().tolist() == [-7 if image else number]
            found[image, text] += 1
    assert set(found) == {(True, False), (False, True), (False, False)}


def test_precomputed_latents_and_texts(tmp_path: Path) -> None:
    samples = [fake.encoded(number) for number in range(1, 9)]
    batches = epoch(ShardLoader(opened(tmp_path, {"a-00000": samples}), ALL, config()))
    assert {batch.crops[0] for batch in batches} == {"portrait", "full"}
    for batch in batches:
        assert batch.pixels is None
        assert batch.latents is not None
        assert batch.text_embeds is not None
        assert batch.text_pooled is None
        assert batch.latents.dtype == batch.text_embeds.dtype == torch.float16
        assert batch.text_embeds.shape == (len(batch), 77, 4)
        assert batch.latents.shape[1:] == ((8, 8, 8) if batch.crops[0] == "portrait" else (8, 6, 10))
        numbers = [int(text[8:]) for text in batch.captions]
        assert batch.latents[:, 0, 0, 0].tolist() == numbers
        assert batch.text_embeds[:, 0, 0].tolist() == numbers
        expected = [72, 72, 0, 0, 64, 64] if batch.crops[0] == "portrait" else [112, 160, 0, 3, 48, 80]
        assert batch.size_ids.tolist() == [expected] * len(batch)


def test_a_photo_without_any_crop_is_left_out(tmp_path: Path) -> None:
    some = opened(tmp_path / "some", {"a-00000": [fake.sample(0, has=()), fake.sample(1), fake.sample(2)]})
    assert sorted(keys(epoch(ShardLoader(some, ID, config())))) == ["a-00000-001", "a-00000-002"]
    none = opened(tmp_path / "none", {"a-00000": [fake.sample(0, has=())]})
    with pytest.raises(SourceError, match="has a crop of"):
        take(ShardLoader(none, ID, config()), 1)


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://loader-stream"
    fsspec.filesystem("memory").rm("/loader-stream", recursive=True)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_a_dataset_in_memory(memory: str, tmp_path: Path, workers: int) -> None:
    shards = {"a-00000": fake.counted(0, 4), "a-00001": fake.counted(4, 3)}
    remote, local = opened(memory, shards), opened(tmp_path, shards)
    told = config(workers=workers)
    batches, states = observed(ShardLoader(remote, ALL, told), 6, (2,))
    assert all(map(same, batches, take(ShardLoader(local, ALL, told), 6)))
    assert all(map(same, batches[2:], take(resumed(ShardLoader(remote, ALL, told), states[2]), 4)))


DAMAGE = {
    "not an array": {"clip_hidden.npy": b"\x93NUMPY"},
    "another shape": {"clip_hidden.npy": encode_npy(np.zeros((5, 9), np.float16))},
    "not finite": {"clip_hidden.npy": encode_npy(np.full(fake.HIDDEN, np.nan, np.float16))},
    "infinite": {"arcface.npy": encode_npy(np.full(512, np.inf, np.float32))},
    "whole numbers": {"arcface.npy": encode_npy(np.zeros(512, np.int32))},
    "no picture": {f"{crop}.jpg": b"\xff\xd8\xff\xd9" for crop in fake.SIZES},
    "half a picture": {f"{crop}.jpg": fake.picture(*size)[:900] for crop, size in fake.SIZES.items()},
    "another picture": {f"{crop}.jpg": fake.picture(50, 50) for crop in fake.SIZES},
    "no json": {"json": b"{"},
    "a missing file": {"clip_hidden.npy": None},
    "a missing json": {"json": None},
}
_OF_WORKERS = ("not finite",)
"""What a loader's process tells its parent by default; with -m long all."""


@pytest.mark.parametrize(
    ("workers", "damage"),
    [
        pytest.param(workers, damage, marks=[pytest.mark.long] if workers and damage not in _OF_WORKERS else [])
        for workers in (0, 1)
        for damage in DAMAGE
    ],
)
def test_a_damaged_sample_names_shard_and_key(tmp_path: Path, damage: str, workers: int) -> None:
    samples = fake.counted(0, 4)
    sound = opened(tmp_path, {"a-00000": samples, "a-00001": samples})
    samples[2] |= DAMAGE[damage]
    samples[2] = {suffix: data for suffix, data in samples[2].items() if data is not None}
    fake.write(tmp_path, {"a-00001": samples})
    suffix = next(iter(DAMAGE[damage])).replace(".", r"\.") if len(DAMAGE[damage]) == 1 else r"\w+\.jpg"
    with pytest.raises(CorruptShardError, match=rf"shards/a-00001\.tar: a-00001-002\.{suffix} \w+") as caught:
        take(ShardLoader(sound, ALL, config(workers=workers)), 9)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(("count", "message"), [(3, "ends after 3 samples"), (5, "more samples than the 4")])
@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_samples(tmp_path: Path, count: int, message: str, world: int) -> None:
    sound = opened(tmp_path, {"a-00000": fake.counted(0, 4)})
    fake.write(tmp_path, {"a-00000": fake.counted(0, count)})
    last = ShardLoader(sound, ID, config(), rank=world - 1, world=world)
    with pytest.raises(CorruptShardError, match=rf"a-00000\.tar: .*{message}"):
        take(last, 4)


@pytest.mark.parametrize("cut", [100, 512, 5000, 20_000])
def test_a_tar_that_ends_early(tmp_path: Path, cut: int) -> None:
    sound = opened(tmp_path, {"a-00000": fake.counted(0, 4)})
    tar = tmp_path / "shards/a-00000.tar"
    tar.write_bytes(tar.read_bytes()[: -10_240 - cut])
    with pytest.raises(CorruptShardError, match=r"a-00000\.tar: "):
        take(ShardLoader(sound, ID, config()), 4)


def test_a_file_that_occurs_twice(tmp_path: Path) -> None:
    sound = opened(tmp_path, {"a-00000": fake.counted(0, 2)})
    one = fake.tar({"a-00000-000": fake.sample(0)}).rstrip(b"\0")
    one += b"\0" * (-len(one) % 512)
    (tmp_path / "shards/a-00000.tar").write_bytes(one + fake.tar({"a-00000-000": fake.sample(0)}))
    with pytest.raises(CorruptShardError, match=r"a-00000-000\.arcface\.npy .*occurs twice"):
        take(ShardLoader(sound, ID, config()), 2)


def test_files_that_are_not_read_are_not_looked_at(tmp_path: Path) -> None:
    broken = {"clip_hidden.npy": b"?", "clip.npy": b"?", "face.jpg": b"?", "unknown.bin": b"?"}
    dataset = opened(tmp_path, {"a-00000": [{**fake.sample(number), **broken} for number in range(3)]})
    assert len(keys(epoch(ShardLoader(dataset, ID, config())))) == 3


def test_a_vanished_tar_is_named(tmp_path: Path) -> None:
    dataset = opened(tmp_path, {"a-00000": fake.counted(0, 2)})
    loader = ShardLoader(dataset, ID, config())
    (tmp_path / "shards/a-00000.tar").unlink()
    with pytest.raises(CorruptShardError, match=r"a-00000\.tar: not a readable tar: .*No such file"):
        take(loader, 1)


def test_workers_end_with_the_iteration(dataset: Dataset) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = set(children.read_text().split())
    take(ShardLoader(dataset, ID, config(workers=2)), 3)
    left = set(children.read_text().split()) - before
    assert not [pid for pid in left if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_consumer_that_happens_to_get_no_fitting_sample_for_some_epochs_goes_on(tmp_path: Path) -> None:
    shards = {f"a-{number:05}": [fake.sample(number, has=("full",) * (number % 4 == 0))] for number in range(16)}
    dataset = opened(tmp_path, shards)
    first = [take(ShardLoader(dataset, ID, config(), rank=rank, world=8), 1)[0].position for rank in range(8)]
    assert max(position.epoch for position in first) >= 3
