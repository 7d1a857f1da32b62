"""A few seconds of benchmarks/fuzz.py; the long run is a command, its result in docs/LOG.md."""

import subprocess
import sys
import time

import fuzz
import pytest

SECONDS = 0.1
MOST = 400


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damaged_bytes_end_in_what_the_reader_may_raise(name, tmp_path, capfd):
    fuzz.tried(name, 0, tmp_path)
    deadline = time.monotonic() + SECONDS
    for number in range(MOST):  # the same each time; the command tries others
        outcome, finding = fuzz.tried(name, number, tmp_path)
        assert not finding, finding
        assert outcome != "decoder_crash", f"{name} {number}"
        if time.monotonic() > deadline:
            break
    assert number > 0
    assert capfd.readouterr().err == ""


OTHER_SCHEMA = (500041, 502020)
"""Of parquet: pyarrow calls std::terminate when it is asked for such a column's metadata."""


def test_statistics_of_another_schema_are_not_asked_for(tmp_path):
    """In this process, which would end."""
    assert fuzz.tried("parquet", OTHER_SCHEMA[0], tmp_path) in (("ok", ""), ("SourceError", ""))


@pytest.mark.long
@pytest.mark.parametrize("number", OTHER_SCHEMA)
def test_statistics_of_another_schema_do_not_end_the_process(number):
    words = [sys.executable, fuzz.__file__, "--target", "parquet", "--only", str(number)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[0] in ("ok", "SourceError")


def test_inputs_depend_on_their_number_alone_and_most_are_damaged():
    for name in fuzz.TARGETS:
        inputs = [fuzz.input_of(name, number) for number in range(8)]
        assert all(inputs[number] == fuzz.input_of(name, number) for number in (6, 4, 1))
        assert sum(data in fuzz.corpus(name) for data in inputs) < 3


def test_a_reader_that_raises_or_takes_too_long_is_a_finding(monkeypatch, tmp_path):
    def slow(data, folder):
        started = time.process_time()
        while time.process_time() - started < 0.2:
            pass
        return "ok"

    npy = fuzz.TARGETS["npy"]
    monkeypatch.setitem(fuzz.TARGETS, "npy", npy._replace(read=lambda data, folder: 1 / 0))
    assert "ZeroDivisionError" in fuzz.tried("npy", 7, tmp_path)[1]
    monkeypatch.setitem(fuzz.TARGETS, "npy", npy._replace(read=slow))
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    assert "npy 7: took" in fuzz.tried("npy", 7, tmp_path)[1]
