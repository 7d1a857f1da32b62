"""Servers that accept connections and answer nothing, or take nothing: given up, once they had their time."""

import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from threading import Thread

import fsspec
import pytest
from aiohttp import ClientTimeout
from hostile import silent
from server import AWS_OF_NOBODY
from servers import HostileServer, first_then, says
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.shared.files import Draft, RemotePath, kind_of, locate
from pipeline.shared.s3_session import S3Session
from schemas.errors import RemoteError, SourceError, UserError

_TRIES = 8
READ_S = 0.1


@pytest.fixture
def store(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> HostileServer:
    """What stands behind s3://, with 0.1 s where there are 15, and none between attempts."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: the extra `dev` has it")
    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in {"AWS_ENDPOINT_URL": server.url(""), **AWS_OF_NOBODY}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": READ_S}})
    monkeypatch.setattr(random, "random", lambda: 0.0)
    server.find = lambda target, request: silent  # type: ignore[method-assign]
    return server


def _put(file: RemotePath) -> None:
    with closing(Draft(file)) as draft:
        draft.stream.write(b"shard")
        draft.publish()


@pytest.mark.parametrize(
    "request_of",
    [
        pytest.param(lambda file: file.read_range(0, 9), id="read"),
        pytest.param(RemotePath.is_file, id="head", marks=pytest.mark.long),
        pytest.param(RemotePath.listing, id="list", marks=pytest.mark.long),
        pytest.param(lambda file: file.write_bytes(b"manifest"), id="write", marks=pytest.mark.long),
        pytest.param(_put, id="put"),
    ],
)
def test_a_store_that_answers_nothing_is_given_up_after_eight_timeouts(request_of, store, monkeypatch):
    sent, send, begun = [], S3Session.send, time.monotonic()
    monkeypatch.setattr(S3Session, "send", lambda *args: sent.append(args) or send(*args))
    with pytest.raises(RemoteError, match=r"^s3://bucket/file: http://127\.0\.0\.1:\d+ gave no answer for \d+ s$"):
        request_of(RemotePath("s3://bucket/file"))
    assert time.monotonic() - begun >= _TRIES * READ_S
    assert 1 < len(sent) <= _TRIES  # on a busy machine each takes longer, and the server sees fewer


def test_verify_of_a_store_that_answers_nothing_is_one_sentence(store):
    done = CliRunner().invoke(app, ["verify", "s3://bucket/faces"])
    assert isinstance(done.exception, UserError)
    assert " gave no answer for " in str(done.exception)


def test_a_store_that_was_silent_for_some_time_is_tried_again(store):
    seldom = says("404 Not Found")
    for _ in range(3):
        seldom = first_then(silent, seldom)
    store.find = lambda target, request: seldom
    assert not RemotePath("s3://bucket/file").exists()


@pytest.fixture
def hoarder(store: HostileServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that takes connections, and nothing that comes by them."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        Thread(target=lambda: stack.enter_context(listener.accept()[0]), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield


def test_a_store_that_takes_nothing_is_given_up_too(hoarder):
    with pytest.raises(RemoteError, match="gave no answer for"):
        RemotePath("s3://bucket/file").write_bytes(bytes(40_000_000))  # more than the system keeps for it


def test_what_the_user_configured_of_s3_stays(store, monkeypatch):
    from aiobotocore.httpsession import AIOHTTPSession

    configured = {"retries": {"total_max_attempts": 1}, "read_timeout": READ_S, "http_session_cls": AIOHTTPSession}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": dict(configured)})
    assert locate("s3://bucket")[0].config_kwargs == configured


def test_a_site_that_answers_nothing_is_one_sentence_and_not_a_lack_of_a_file(server, monkeypatch):
    server.answers["/part.csv"] = silent
    locate(server.url("/part.csv"))
    limit = fsspec.config.conf["http"]["client_kwargs"]["timeout"]
    assert (limit.total, limit.sock_read) == (None, 60)
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"timeout": ClientTimeout(sock_read=READ_S)}})
    with pytest.raises(SourceError, match=r"/part\.csv cannot be read: Timeout on reading data from socket\.$"):
        kind_of(server.url("/part.csv"))
    with pytest.raises(RemoteError, match=r"/part\.csv: no answer in time$"):
        RemotePath(server.url("/part.csv")).read_bytes()
