"""Pairs: the condition is of another photo of the person, as often as it was set, and resumable like all else."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import fake_shards as fake
import numpy as np
import pytest
import torch

from pipeline.train.loader.batches import Batch, MixedTokens
from pipeline.train.loader.dataset import Dataset, open_dataset
from pipeline.train.loader.loader import ShardLoader
from pipeline.train.loader.pairs import WINDOW, persons
from pipeline.train.loader.plan_sample import Planner
from pipeline.train.loader.reading import plan_reading
from pipeline.train.loader.shards import Raw, Shard
from pipeline.train.settings import TrainConfig
from schemas.errors import ConfigError, SourceError
from schemas.shard import encode_npy

ID, ALL = ("arcface",), ("arcface", "hidden", "pooled")
PEOPLE = [3, 1, 2, WINDOW + 1, 1, 5, 2]
"""Photos of each person; samples are numbered from 1, since features of the mirrored face are negative."""
PERSON = dict(enumerate(np.repeat(np.arange(len(PEOPLE)), PEOPLE).tolist(), 1))
"""Number of a sample -> person."""


def config(uncond: float = 0.0, flip: float = 0.0, condition: str = "auto", **data: Any) -> TrainConfig:
    told = {"resolution": 64, "batch_size": 2, "workers": 0, "shuffle": 4, "verify": "size", "pairs": 1.0, **data}
    guidance = {"p_uncond_image": uncond, "p_uncond_text": 0, "p_uncond_both": 0}
    return TrainConfig.model_validate(
        {"data": told, "guidance": guidance, "augment": {"flip": flip}, "adapter": {"condition": condition}}
    )


def samples(people: Sequence[int] = PEOPLE) -> list[fake.Files]:
    """Every other single photo says no person, as one may; features say the number, and mirrored ones its negative."""
    owners = [person for person, photos in enumerate(people) for _ in range(photos)]
    return [
        {
            **fake.sample(
                number, has=("portrait",), **({} if people[owner] == 1 and owner % 2 else {"person": 900 + owner})
            ),
            **fake.mirrors(number),
        }
        for number, owner in enumerate(owners, 1)
    ]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """All the people in float16, and once more in int8."""
    shards = {"a-00000": samples(), "b-00000": [*map(fake.in_int8, samples())]}
    return open_dataset([fake.write(tmp_path_factory.mktemp("data"), shards)], config().data)


def take(loader: ShardLoader, count: int) -> list[Batch]:
    batches = iter(loader)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()  # type: ignore[attr-defined]


def epochs(loader: ShardLoader, count: int = 1) -> list[Batch]:
    """All batches of the first epochs of a new loader without workers."""
    found: list[Batch] = []
    for batch in loader:
        if batch.position.epoch == count:
            return found
        found.append(batch)
    raise AssertionError("a loader never ends")


def numbers(batch: Batch) -> list[int]:
    return [int(text[8:]) for text in batch.captions]


def sources(batch: Batch, role: str) -> list[list[int]]:
    """Of which samples each condition is, negative for those of mirrored faces."""
    values = batch.condition[role]
    values = (values.float() if isinstance(values, MixedTokens) else values).flatten(1)
    return [[round(value) for value in dict.fromkeys(row.tolist())] for row in values]


def same(one: Batch, other: Batch) -> bool:
    def tensors(batch: Batch) -> list[torch.Tensor]:
        features = [
            part for value in batch.condition.values() for part in (value if isinstance(value, tuple) else [value])
        ]
        return [*features, batch.kps, batch.size_ids, batch.uncond_image, batch.pixels]  # type: ignore[list-item]

    return one.keys == other.keys and all(map(torch.equal, tensors(one), tensors(other)))


@pytest.mark.parametrize(("draws", "people"), [(5_000, 60), pytest.param(100_000, 300, marks=pytest.mark.long)])
def test_over_many_draws_no_condition_is_of_the_sample_itself(dataset: Dataset, draws: int, people: int) -> None:
    photos = np.random.default_rng(0).integers(2, 60, people).tolist()
    shard = Shard("out", Path("a.tar"), fake.manifest("a-00000", b"", sum(photos)))
    content = json.loads(fake.sample(0, has=("portrait",))["json"])
    raws = [
        Raw(shard, f"{person}-{each}", {"json": data, "portrait.jpg": b"", "arcface.npy": b""})
        for person, count in enumerate(photos)
        for data in [json.dumps({**content, "person": person}).encode()]
        for each in range(count)
    ]
    reading = replace(plan_reading(dataset, ID, config()), faces=5)
    planner, drawn, lengths = Planner(reading, config(), np.random.default_rng(3)), 0, Counter[int]()
    partners: dict[str, set[str]] = {raw.key: set() for raw in raws}
    while drawn < draws:
        for members in persons(((True, raw) for raw in raws), reading.condition):
            for raw, others in members:
                planned = planner(raw, others)
                assert planned is not None
                keys = {one.key for one in planned.id_from}
                assert raw.key not in keys
                assert {key.split("-")[0] for key in keys} == {raw.key.split("-")[0]}
                assert len(keys) == len(planned.id_from) <= min(5, len(others))
                assert not any("portrait.jpg" in one.files for one in planned.id_from), "pictures are not held"
                partners[raw.key] |= keys
                lengths[len(keys)] += 1
                drawn += len(keys)
                assert len(others) < 2 * WINDOW
    assert set(lengths) == {1, 2, 3, 4, 5}
    assert min(map(len, partners.values())) >= 1


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 7])
def test_conditions_are_of_the_person_and_each_sample_comes_once(
    dataset: Dataset, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = plan_reading(dataset, ALL, config(flip=0.5))  # the same for every process, of which each would plan it
    monkeypatch.setattr("pipeline.train.loader.loader.plan_reading", lambda *_: reading)
    loaders = [ShardLoader(dataset, ALL, config(flip=0.5), rank=rank, world=world) for rank in range(world)]
    batches = [batch for loader in loaders for batch in epochs(loader)]
    assert sorted(number for batch in batches for number in numbers(batch)) == sorted([*PERSON, *PERSON])
    mirrored = Counter[bool]()
    for batch in batches:
        assert batch.pixels is not None
        flipped = (batch.pixels[:, 0, :, 0].mean(1) > batch.pixels[:, 0, :, -1].mean(1)).tolist()
        roles = [sources(batch, role) for role in ALL]
        for number, is_mirrored, *conditions in zip(numbers(batch), flipped, *roles, strict=True):
            (id_of,), (hidden_of,), (pooled_of,) = conditions
            assert (id_of == number) == (PEOPLE[PERSON[number]] == 1), "itself, where there is no other"
            assert PERSON[id_of] == PERSON[number]
            assert hidden_of == pooled_of == (-id_of if is_mirrored else id_of)
            mirrored[is_mirrored] += 1
    assert min(mirrored.values()) > 10


@pytest.mark.parametrize(("part", "id_is_own", "image_is_own"), [("id", False, True), ("image", True, False)])
def test_a_part_of_the_features_may_be_of_another_photo(
    dataset: Dataset, part: str, id_is_own: bool, image_is_own: bool
) -> None:
    for batch in epochs(ShardLoader(dataset, ALL, config(pair_features=part))):
        ids, images = sources(batch, "arcface"), sources(batch, "hidden")
        for number, (id_of,), (image_of,) in zip(numbers(batch), ids, images, strict=True):
            if PEOPLE[PERSON[number]] > 1:
                assert (id_of == number, image_of == number) == (id_is_own, image_is_own)


def test_pairs_are_as_often_as_they_were_set_and_move_no_other_draw(dataset: Dataset) -> None:
    def drawn(pairs: float, count: int) -> list[Batch]:
        loader = ShardLoader(dataset, ALL, config(pairs=pairs, flip=0.5, uncond=0.2))
        return epochs(loader, count)

    plain, some = drawn(0, 1), drawn(0.25, 4)
    for one, other in zip(plain, some[: len(plain)], strict=True):
        assert one.keys == other.keys
        assert one.pixels is not None
        assert other.pixels is not None
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.uncond_image, other.uncond_image)
    paired = [
        [number] != id_of
        for batch in some
        for number, id_of, dropped in zip(numbers(batch), sources(batch, "arcface"), batch.uncond_image, strict=True)
        if PEOPLE[PERSON[number]] > 1 and not dropped
    ]
    assert abs(sum(paired) / len(paired) - 0.25) < 0.05


@pytest.mark.parametrize(
    ("workers", "reads", "faces", "balance"),
    [
        (0, ALL, 1, "photo"),
        (0, ID, 5, "person"),
        pytest.param(2, ID, 5, "photo", marks=pytest.mark.long),
    ],
    ids=["features", "persons", "processes"],
)
def test_a_resumed_loader_draws_the_same(
    dataset: Dataset, workers: int, reads: tuple[str, ...], faces: int, balance: str
) -> None:
    told = config(pairs=0.7, workers=workers, uncond=0.2, flip=0.5, balance=balance)
    loader, states = ShardLoader(dataset, reads, told, faces=faces), {}
    batches = iter(loader)
    whole = []
    for number in range(1, 37):
        whole.append(next(batches))
        if number in ((1, 9, 20, 30) if workers == 0 else (9,)):
            states[number] = json.loads(json.dumps(loader.state_dict()))
    batches.close()  # type: ignore[attr-defined]
    assert whole[-1].position.epoch >= 1
    for stop, state in states.items():
        after = ShardLoader(dataset, reads, told, faces=faces)
        after.load_state_dict(state)
        assert all(map(same, whole[stop:], take(after, 4))), stop


@pytest.mark.long
def test_reading_pairs_costs_at_most_1_3_of_reading_without(tmp_path: Path) -> None:
    """CPU time of this process, the least of six in turn; hidden states as large as real ones."""
    hidden = {"clip_hidden.npy": encode_npy(np.ones((257, 1280), np.float16))}
    people = [{**files, **hidden} for files in samples([2, 3, 5, 8, 20, 1, 1, 20])]
    many = open_dataset([fake.write(tmp_path, {"a-00000": people})], config().data)

    def cost(pairs: float) -> float:
        loader, begun = ShardLoader(many, ALL[:2], config(pairs=pairs, batch_size=8)), time.process_time()
        epochs(loader, 3)
        return time.process_time() - begun

    costs = [(cost(0), cost(1)) for _ in range(6)]
    assert min(paired for _, paired in costs) <= 1.3 * min(plain for plain, _ in costs)


def test_several_photos_lie_side_by_side_equally_many_in_a_batch(dataset: Dataset) -> None:
    shapes = Counter[int]()
    loader = ShardLoader(dataset, ID, config(uncond=0.3), faces=5)
    for batch in epochs(loader, 4):
        values = batch.condition["arcface"]
        assert isinstance(values, torch.Tensor)
        faces = values.shape[1] if values.ndim == 3 else 1
        assert values.shape[-1] == 512
        shapes[faces] += len(batch)
        for number, of, dropped in zip(numbers(batch), sources(batch, "arcface"), batch.uncond_image, strict=True):
            if dropped:
                assert of == [0]
            elif PEOPLE[PERSON[number]] > 1:
                assert number not in of
                assert len(of) == faces, "different photos"
                assert {PERSON[one] for one in of} == {PERSON[number]}
    assert set(shapes) == {1, 2, 3, 4, 5}


def test_each_person_is_as_likely_as_another(dataset: Dataset) -> None:
    count, drawn = 15, Counter[int]()
    people = defaultdict[int, Counter[int]](Counter)
    for batch in epochs(ShardLoader(dataset, ID, config(pairs=0, balance="person")), count):
        drawn.update(numbers(batch))
        people[batch.position.epoch].update(PERSON[number] for number in numbers(batch))
    assert [*people.values()] == [dict.fromkeys(range(len(PEOPLE)), 2)] * count, "one photo of each in either shard"
    five = [drawn[number] for number, person in PERSON.items() if PEOPLE[person] == 5]
    assert sum(five) == 2 * count
    assert 0 < min(five) <= max(five) < 15


def test_shards_that_know_no_persons_are_refused(tmp_path: Path) -> None:
    for people in ([1] * 6, []):
        alone = [*samples(people), *(fake.sample(number) for number in range(2))]
        nobody = open_dataset([fake.write(tmp_path, {"a-00000": alone})], config().data)
        for told in (config(), config(pairs=0, balance="person")):
            with pytest.raises(SourceError, match="`python -m pipeline group` made"):
                ShardLoader(nobody, ID, told)
        ShardLoader(nobody, ID, config(pairs=0))


def test_what_pairs_come_to_is_said(dataset: Dataset) -> None:
    (notice,) = ShardLoader(dataset, ID, config(flip=0.5)).notices
    assert notice.startswith("of 62 photos that were looked at, 4 (6%) are the only one")
    assert ShardLoader(dataset, ID, config(pairs=0)).notices == ()
    with pytest.raises(ConfigError, match=r"data\.pair_features = image pairs nothing"):
        ShardLoader(dataset, ID, config(pair_features="image"))
