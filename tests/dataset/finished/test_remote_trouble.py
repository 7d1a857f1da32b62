"""What commands make of a store that stops answering at any request: one sentence, and nothing is called damaged."""

import errno
from collections.abc import Callable, Iterator
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any

import fake_dataset as fake
import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.finished.report import write_report
from pipeline.dataset.finished.verify import verify
from pipeline.shared.files import to_path
from pipeline.shared.process import trouble_of_machine
from schemas.errors import LostError, RemoteError, UserError

OUT = "dyingstore://bucket/faces"


class DyingFS(MemoryFileSystem):
    """A store that answers so many requests; like others, it is asked by fsspec whether there is a file."""

    protocol = "dyingstore"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    requests = 0
    answers: float = float("inf")
    isfile, isdir, exists = AbstractFileSystem.isfile, AbstractFileSystem.isdir, AbstractFileSystem.exists

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("dyingstore://", "memory://"))

    def open(self, path, mode="rb", **kwargs):
        return BytesIO(self.store[self._strip_protocol(path)].getvalue())

    def pipe_file(self, path, value, **kwargs):
        path = self._strip_protocol(path)
        self.store[path] = MemoryFile(self, path, value)

    def put_file(self, lpath, rpath, **kwargs):
        self.pipe_file(rpath, Path(lpath).read_bytes())


def _request(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        DyingFS.requests += 1
        if DyingFS.requests > DyingFS.answers:
            raise OSError(errno.EBUSY, "it does not answer")
        return method(*args, **options)

    return call


for _name in ("info", "ls", "cat_file", "pipe_file", "put_file", "rm_file", "open"):
    setattr(DyingFS, _name, _request(getattr(DyingFS, _name)))


@pytest.fixture
def make() -> Iterator[Callable[[], None]]:
    """Makes the dataset anew, and the store alive."""
    fsspec.register_implementation("dyingstore", DyingFS, clobber=True)
    DyingFS.store.clear()
    fake.write(to_path(OUT), {"a-00000": fake.mixed("a"), "a-00001": fake.mixed("a", 6)})
    write_report(to_path(OUT))
    whole = dict(DyingFS.store)

    def anew() -> None:
        DyingFS.answers, DyingFS.requests = float("inf"), 0
        DyingFS.store.clear()
        DyingFS.store.update(whole)

    yield anew
    DyingFS.answers = float("inf")


@pytest.mark.parametrize("moments", [3, pytest.param(12, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "words",
    [
        ["verify", OUT],
        ["report", OUT],
        ["status", OUT],
        ["replay", OUT, "--set", "filter.min_face_px=96"],
        ["quality", OUT],
        ["forget", OUT, "--url", "http://photos.example/a/0.jpg"],
        ["export-json", OUT, "--out", "FOLDER"],
    ],
    ids=lambda words: words[0],
)
def test_a_store_that_stops_answering_is_one_sentence_and_no_damage(words, moments, make, tmp_path):
    make()
    CliRunner().invoke(app, [word.replace("FOLDER", str(tmp_path / "whole")) for word in words])
    total = DyingFS.requests
    for answers in range(0, total, -(-total // moments)):
        make()
        DyingFS.answers = answers
        done = CliRunner().invoke(app, [word.replace("FOLDER", str(tmp_path / str(answers))) for word in words])
        if words[0] == "verify" and "Problems found" in done.output:
            assert "it does not answer" in done.output
            continue
        assert isinstance(done.exception, UserError | LostError | RemoteError), (answers, done.output)
        assert str(done.exception).count("it does not answer") == 1, answers
        assert "\n" not in str(done.exception)
        for wrong in ("holds no dataset", "not a readable tar", "not a ledger", "is not what its manifest says"):
            assert wrong not in str(done.exception), answers
    make()
    assert verify(to_path(OUT)) == []


def test_trouble_with_a_store_is_no_bug():
    sentence = trouble_of_machine(RemoteError("s3://bucket/a.tar: slow down"), "")
    assert sentence == "s3://bucket/a.tar: slow down; see to it, and give the same command again."
