"""Parts of a take-down by themselves; what a whole one comes to is in test_forget."""

import fake_dataset as fake
import pytest

from pipeline.dataset.finished.forget import copy_without, rewrite
from pipeline.dataset.out.forgotten import Forgotten
from pipeline.dataset.out.takedowns import Takedowns
from schemas.errors import CorruptShardError

SHARD = "a-00000"


def test_a_tar_without_some_samples_is_the_one_that_a_writer_makes_without_them(tmp_path):
    rows = [fake.record("a", row) for row in range(3)]
    whole = fake.write(tmp_path / "whole", {SHARD: rows}) / "shards" / f"{SHARD}.tar"
    for gone in ([0], [1], [2], [0, 2], [0, 1, 2]):
        left = [record for number, record in enumerate(rows) if number not in gone]
        copy_without(whole, tmp_path / "new.tar", {rows[number]["key"] for number in gone})
        expected = fake.write(tmp_path / "".join(map(str, gone)), {SHARD: left}) / "shards" / f"{SHARD}.tar"
        assert (tmp_path / "new.tar").read_bytes() == expected.read_bytes(), gone


@pytest.mark.parametrize("damage", [lambda data: data[:-2048], lambda data: b"junk" * 300, lambda data: data[:700]])
def test_a_damaged_tar_is_named_and_nothing_is_left_of_the_new_one(tmp_path, damage):
    out = fake.write(tmp_path / "out", {SHARD: [fake.record("a", 0)]})
    tar = out / "shards" / f"{SHARD}.tar"
    tar.write_bytes(damage(tar.read_bytes().rstrip(b"\0")))
    with pytest.raises(CorruptShardError, match=tar.name):
        copy_without(tar, tmp_path / "new.tar", set())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_a_shard_that_is_not_what_its_manifest_says_is_left_alone(tmp_path, suffix):
    out = fake.write(tmp_path / "out", {SHARD: fake.mixed("a")})
    (out / "shards" / f"{SHARD}.{suffix}").unlink()
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(CorruptShardError, match=rf"{SHARD}\.{suffix}: it is not what its manifest says"):
        rewrite(out, SHARD, Takedowns(Forgotten().adding(domains=["photos.example"])))
    assert sorted(path.name for path in out.rglob("*")) == before
