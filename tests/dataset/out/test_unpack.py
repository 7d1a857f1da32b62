import io
import tarfile
import tracemalloc

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.dataset.out.unpack import salvage, unpack
from pipeline.train.loader.tars import Shard, samples
from schemas.errors import CorruptShardError


def tar_of(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if data == b"":
                info.type = tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(data))
    return path


def test_samples_are_those_that_webdataset_sees(tmp_path):
    members = [("a-0.clip.npy", b"1"), ("a-0.json", b"{}"), ("a-1.json", b"[]")]
    path = tar_of(tmp_path / "x.tar", members)
    assert [(sample.key, sample.files) for sample in unpack(path)] == [
        ("a-0", {"clip.npy": b"1", "json": b"{}"}),
        ("a-1", {"json": b"[]"}),
    ]
    with path.open("rb") as stream:
        seen = list(group_by_keys(tar_file_expander([{"url": path.name, "stream": stream}])))
    assert [sample["__key__"] for sample in seen] == ["a-0", "a-1"]
    assert seen[0]["clip.npy"] == b"1"


def test_an_empty_tar_has_no_samples(tmp_path):
    assert list(unpack(tar_of(tmp_path / "x.tar", []))) == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.json", b"1"), ("a.json", b"2")], r"a\.json occurs twice"),
        ([("folder", b"")], "folder is not a file"),
    ],
)
def test_other_things_than_files_of_samples(tmp_path, members, message):
    with pytest.raises(CorruptShardError, match=rf"x\.tar: {message}"):
        list(unpack(tar_of(tmp_path / "x.tar", members)))


@pytest.mark.parametrize("length", [0, 100, 700, 1500])
def test_a_tar_that_is_cut_off(tmp_path, length):
    path = tar_of(tmp_path / "x.tar", [("a.json", b"1" * 2000)])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CorruptShardError, match=r"x\.tar: not a readable tar"):
        list(unpack(path))


@pytest.mark.parametrize("size", [10**9, 2**40, 2**62])
def test_a_file_that_claims_more_than_there_is_takes_no_memory(tmp_path, size):
    path = tar_of(tmp_path / "a-00000.tar", [("a-000000000.json", b"{}")])
    claims = tarfile.TarInfo("a-000000000.json")
    claims.size = size
    path.write_bytes(claims.tobuf(tarfile.GNU_FORMAT) + path.read_bytes()[512:])
    tracemalloc.start()
    try:
        with pytest.raises(CorruptShardError, match="unexpected end of data"):
            list(unpack(path))
        with pytest.raises(CorruptShardError, match="unexpected end of data"):
            list(samples(Shard("x", "a-00000", path, 1), 0, 1, lambda suffix: True))
        (found,) = salvage(path)
        assert (found.key, found.clean) == ("a-000000000", False)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_tar_that_is_not_there(tmp_path):
    with pytest.raises(CorruptShardError, match=r"x\.tar"):
        list(unpack(tmp_path / "x.tar"))


def test_memory_does_not_grow_with_the_tar(tmp_path):
    path = tar_of(tmp_path / "x.tar", [(f"k{n:05d}.bin", b"x" * 1000) for n in range(5000)])
    tracemalloc.start()
    try:
        assert sum(1 for _ in unpack(path)) == 5000
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
