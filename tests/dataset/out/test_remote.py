"""OUT behind an fsspec URL: equal bytes, the manifest last without any rename, and what a store that fails leaves."""

import errno
import re
from collections.abc import Iterator
from pathlib import Path

import fake_dataset as fake
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from sample_runs import SHARDS, make, without

from pipeline.dataset.finished.report import write_report
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.out.ledger import funnel
from pipeline.dataset.out.lost import lost_errors
from pipeline.dataset.out.output import Output
from pipeline.shared.files import RemotePath, sizes, to_path
from schemas.errors import ExitCode, LostError, OutputError


class StoreFS(MemoryFileSystem):
    """An object store that remembers its puts, may refuse one, and may be dead after that."""

    protocol = "teststore"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    puts: list[str] = []  # noqa: RUF012
    refuse_at: int | None = None
    """The number of the put that fails, from 0."""
    stays_dead = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("teststore://", "memory://"))

    def _put(self, path: str) -> None:
        number, cls = len(self.puts), type(self)
        refused = cls.refuse_at is not None and (number >= cls.refuse_at if cls.stays_dead else number == cls.refuse_at)
        self.puts.append(path.rpartition("/")[2])
        if refused:
            raise OSError(errno.EIO, "the store does not answer")

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._put(path)
        super().pipe_file(path, value, **kwargs)

    def put_file(self, lpath, rpath, **kwargs):
        self._put(rpath)
        super().pipe_file(rpath, Path(lpath).read_bytes())

    def rm_file(self, path):
        if self.stays_dead and self.refuse_at is not None and len(self.puts) > self.refuse_at:
            raise OSError(errno.EIO, "the store does not answer")
        super().rm_file(path)

    def mv(self, *args, **kwargs):
        raise AssertionError("an object store renames nothing")

    cp_file = move = rename = mv


@pytest.fixture
def store() -> Iterator[RemotePath]:
    fsspec.register_implementation("teststore", StoreFS, clobber=True)
    StoreFS.store.clear()
    StoreFS.puts.clear()
    StoreFS.refuse_at, StoreFS.stays_dead = None, False
    folder = to_path("teststore://bucket/faces/")
    assert isinstance(folder, RemotePath)
    yield folder
    StoreFS.refuse_at = None


def objects() -> dict[str, bytes]:
    return {path.removeprefix("/bucket/faces/"): file.getvalue() for path, file in sorted(StoreFS.store.items())}


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def undated(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without the days on which shards were made, as cards say them: midnight may lie between two datasets."""
    return {name: re.sub(rb"\d{4}-\d\d-\d\d", b"DAY", content) for name, content in files.items()}


def shards() -> dict[str, list]:
    return {"a-00000": fake.mixed("a"), "a-00001": fake.mixed("a", 6)}


def test_a_remote_dataset_has_the_bytes_of_a_local_one_and_is_read_alike(store, tmp_path):
    fake.write(store, shards())
    fake.write(tmp_path, shards())
    assert objects() == files(tmp_path)
    assert verify(store) == verify(tmp_path) == []
    assert funnel(store) == funnel(tmp_path)
    write_report(store)
    write_report(tmp_path)
    assert objects()["report.html"] == (tmp_path / "report.html").read_bytes()


def test_the_manifest_is_put_last(store):
    fake.write(store, {"a-00000": fake.mixed("a")})
    names = [name for name in StoreFS.puts if name.startswith("a-")]
    assert names[-3:] == ["a-00000.tar", "a-00000.parquet", "a-00000.json"]


@pytest.mark.parametrize("stays_dead", [False, True])
@pytest.mark.parametrize("refused", ["a-00000.tar", "a-00000.parquet", "a-00000.json"])
def test_a_put_that_fails_leaves_no_shard_and_a_rerun_makes_the_same(store, tmp_path, refused, stays_dead):
    fake.write(tmp_path, shards())
    fake.write(store, {})  # how many puts come before the shard's own
    wanted = {"a-00000.tar": 1, "a-00000.parquet": 2, "a-00000.json": 3}[refused]
    StoreFS.refuse_at, StoreFS.stays_dead = 2 * len(StoreFS.puts) - 1 + wanted, stays_dead
    with pytest.raises(LostError, match=r"cannot be written any more .*does not answer"):
        fake.write(store, shards())
    assert StoreFS.puts[StoreFS.refuse_at] == refused
    StoreFS.refuse_at = None
    assert not Output(store).is_done("a-00000", fake.plan())
    assert not [name for name in objects() if name.endswith(".json") and name.startswith("shards/")]
    if not stays_dead:
        assert not [name for name in objects() if "a-00000" in name]
    fake.write(store, shards())
    assert objects() == files(tmp_path)


def test_a_busy_store_fails_one_shard_and_not_the_run(store):
    with pytest.raises(OSError, match="slow down"), lost_errors(store):
        raise OSError(errno.EBUSY, "slow down")


def test_a_shard_is_done_when_its_objects_have_their_lengths(store):
    fake.write(store, shards())
    output = Output(store)
    listed = sizes(output.shards)
    assert output.is_done("a-00000", fake.plan(), listed)
    assert output.is_done("a-00001", fake.plan())
    assert not output.is_done("a-00002", fake.plan(), listed)
    (output.shards / "a-00000.tar").write_bytes(b"short")
    assert not output.is_done("a-00000", fake.plan())


def test_replan_removes_the_shards_of_the_other_plan(store):
    fake.write(store, shards())
    manifest = (store / "shards" / "a-00000.json").read_bytes()
    (store / "shards" / "a-00000.json").write_bytes(manifest.replace(fake.plan().digest.encode(), b"0" * 64))
    with Output(store).prepared(fake.plan(), replan=True):
        assert sorted(path.name for path in (store / "shards").iterdir()) == [
            "a-00001.json",
            "a-00001.parquet",
            "a-00001.tar",
        ]


def test_a_store_that_can_only_be_read_is_one_sentence(tmp_path):
    with (
        pytest.raises(OutputError, match="cannot be written") as told,
        Output(to_path("http://127.0.0.1:9/x")).prepared(fake.plan()),
    ):
        pytest.fail("prepared what cannot be written")
    assert "\n" not in str(told.value)


def test_a_run_into_memory_equals_a_local_one(whole, tmp_path):
    """Of which other shards were done before."""
    memory = to_path("memory://faces")
    for path, data in files(without(whole, tmp_path, SHARDS[2], SHARDS[6])).items():
        (memory / path).write_bytes(data)
    assert make(memory, report=True)[0] is ExitCode.OK
    store = {path: file.getvalue() for path, file in MemoryFileSystem.store.items() if path.startswith("/faces/")}
    found = {path.removeprefix("/faces/"): content for path, content in store.items()}
    assert undated(found) == undated(files(whole))
    assert verify(memory) == []
    assert make(memory)[0] is ExitCode.OK  # a rerun
    MemoryFileSystem.store.clear()


def test_what_lives_in_one_process_is_refused_for_several():
    with pytest.raises(OutputError, match="one process alone"):
        make(to_path("memory://faces"), executor="ray")
