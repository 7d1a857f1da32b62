import io
import random
import tarfile
import tracemalloc

import fake_shards as fake
import pytest
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.dataset.source.webdataset_tars import scan
from pipeline.shared import tars
from pipeline.shared.tars import Sample, append, created, unpack, unpack_one
from pipeline.train.loader.shards import Shard, samples
from schemas.errors import CorruptShardError, SourceError


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


def test_samples_are_written_as_webdataset_writes_them(tmp_path):
    files = {"json": b"{}", "clip.npy": b"1" * 5000, "a.jpg": b""}
    written, theirs = io.BytesIO(), io.BytesIO()
    options = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}
    with tars.created(written) as tar, TarWriter(theirs, **options) as other:
        for key in ("a-0", "a-1"):
            tars.append(tar, key, files)
            other.write({"__key__": key, **files})
    assert written.getvalue() == theirs.getvalue()


def test_an_empty_tar_has_no_samples(tmp_path):
    assert list(unpack(tar_of(tmp_path / "x.tar", []))) == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.json", b"1"), ("a.json", b"2")], r"a\.json occurs twice"),
        ([("folder", b"")], "folder is not a file"),
        ([("a", b"1")], "a is not a file of a sample"),
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
            list(samples(Shard("x", path, fake.manifest("a-00000", b"", 1)), 0, 1, lambda suffix: True))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [10**9, 2**40, 2**62])
def test_a_long_name_that_claims_more_than_there_is_takes_no_memory(tmp_path, kind, size):
    claims = tarfile.TarInfo("name")
    claims.type, claims.size = kind, size
    path = tmp_path / "a-00000.tar"
    path.write_bytes(claims.tobuf(tarfile.GNU_FORMAT) + tar_of(tmp_path / "x.tar", [("a.json", b"{}")]).read_bytes())
    tracemalloc.start()
    try:
        with pytest.raises(CorruptShardError, match="unexpected end of data"):
            list(unpack(path))
        with pytest.raises(SourceError, match="unexpected end of data"):
            scan(str(path))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_header_that_is_damaged_in_the_middle_is_no_end(tmp_path):
    path = tar_of(tmp_path / "x.tar", [("a.json", b"1"), ("b.json", b"2")])
    data = bytearray(path.read_bytes())
    data[1024 + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match=r"x\.tar: not a readable tar: .*does not end as a tar does"):
        list(unpack(path))


def test_some_samples_with_some_of_their_files(tmp_path):
    path = tar_of(tmp_path / "x.tar", [(f"k{n}.{suffix}", b"%d" % n) for n in range(4) for suffix in ("a", "b", "c")])
    wish = {"a": True, "b": False}.get
    found = list(tars.samples(path, 1, 3, wish))
    assert [(key, files["a"], files["b"].read(), sorted(files)) for key, files in found] == [
        ("k1", b"1", b"1", ["a", "b"]),
        ("k2", b"2", b"2", ["a", "b"]),
    ]


def test_one_sample_of_many_is_read_without_the_others(tmp_path):
    noise, path = random.Random(0), tmp_path / "a.tar"
    keys = [f"a-{number:09d}" for number in range(0, 2000, 2)]
    files = {key: {"json": key.encode(), "face.jpg": noise.randbytes(noise.choice([10, 600, 99_999]))} for key in keys}
    with path.open("wb") as stream, created(stream) as tar:
        for key in keys:
            append(tar, key, files[key])
    for key in (keys[0], keys[1], keys[999], keys[-1], *noise.sample(keys, 20)):
        assert unpack_one(path, key) == Sample(key, files[key])
    assert unpack_one(path, keys[500], lambda suffix: suffix == "json" or None) == Sample(
        keys[500], {"json": keys[500].encode()}
    )
    assert [unpack_one(path, key) for key in ("a-000000001", "a-000001001", "a-000009999", "A")] == [None] * 4

    counted = []

    class Counting(io.FileIO):
        def readinto(self, buffer):
            counted.append(super().readinto(buffer))
            return counted[-1]

    class Remote(type(path)):
        def open(self, mode, buffering):
            return io.BufferedReader(Counting(self), buffering)

    assert unpack_one(Remote(path), keys[750]) == Sample(keys[750], files[keys[750]])
    assert path.stat().st_size > 30e6 > 10 * sum(counted)


def test_one_sample_of_a_tar_that_is_none(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"junk" * 1_000_000)
    with pytest.raises(CorruptShardError, match=r"a\.tar"):
        unpack_one(tmp_path / "a.tar", "a")


def test_a_tar_that_is_not_there(tmp_path):
    with pytest.raises(CorruptShardError, match=r"x\.tar"):
        list(unpack(tmp_path / "x.tar"))


def test_memory_does_not_grow_with_the_tar(tmp_path):
    path = tar_of(tmp_path / "x.tar", [(f"k{n:05d}.bin", b"x" * 1000) for n in range(2000)])
    tracemalloc.start()
    try:
        assert sum(1 for _ in unpack(path)) == 2000
        assert tracemalloc.get_traced_memory()[1] < 1_500_000 < path.stat().st_size / 2
    finally:
        tracemalloc.stop()
