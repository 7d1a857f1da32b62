"""Streams that are closed, full or of another alphabet, and a machine that fails."""

import errno
import io
import signal
import subprocess
import sys

import pytest

import pipeline.__main__ as pipeline_cli
from pipeline.shared.process import standard_streams
from pipeline.train import __main__ as trainer

CLOSED = """
import os, sys
from pipeline.shared.process import standard_streams
standard_streams()
os.write(1, b"a library"), os.write(2, b"another")
print("words", flush=True), print("more", file=sys.stderr, flush=True)
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    file.write("content")
"""


def test_what_is_printed_into_closed_streams_lands_in_no_file(tmp_path):
    call = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", CLOSED, str(tmp_path / "file")]
    assert subprocess.run(call, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == "content"


def test_no_text_is_too_strange_to_be_printed(monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", written)
    standard_streams()
    written.write("caf\xe9 \udcff\n")
    written.flush()
    assert written.buffer.getvalue() == b"caf\\xe9 \\udcff\n"


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_a_second_interrupt_while_all_ends_is_no_traceback(monkeypatch):
    def app():
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline_cli, "app", app)
    with pytest.raises(SystemExit) as end:
        pipeline_cli.main()
    assert end.value.code == 130
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("module", [pipeline_cli, trainer])
def test_a_machine_that_fails_is_one_sentence_and_a_bug_is_none(module, monkeypatch, capsys):
    def failing(number):
        def app(*_):
            raise OSError(number, "it failed", "/a/log")

        monkeypatch.setattr(module, "app", app)
        module.main()

    with pytest.raises(SystemExit) as end:
        failing(errno.ENOSPC)
    assert end.value.code == 3
    assert capsys.readouterr().err.startswith("error: This machine fails: it failed (/a/log);")
    with pytest.raises(FileNotFoundError):
        failing(errno.ENOENT)
