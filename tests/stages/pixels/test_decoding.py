"""Decoding in a process of its own: what kills that process costs one file, and nothing else."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import dying_decoder
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sample_runs import DRAWN, SHARDS, make, without
from skimage import data as samples

from pipeline.dataset.finished.verify import verify
from pipeline.dataset.source.sample import sample_rows
from schemas.drops import Dropped, DropReason
from schemas.errors import ExitCode, ShardError
from stages.pixels import decoding, headers, images

SIDE = 200
TROUBLE = {
    b"SEGFAULT": "os.kill(os.getpid(), signal.SIGSEGV)",
    b"MEMORY": "bytearray(64 << 30)",
    b"ENDLESS": "exec('while True: pass')",
    b"UNFORESEEN": "1 / 0",
    b"ASLEEP": "time.sleep(100)",
    b"ONCE": "os.path.exists(once) or (open(once, 'w').close(), os.kill(os.getpid(), signal.SIGKILL))",
}
"""Marks in a file, and what a faulty decoder does when it meets them."""


def faulty(folder: Path) -> str:
    """Source that gives this process a decoder with every fault."""
    return textwrap.dedent(f"""
        import os, signal, time
        from stages.pixels import headers
        real, once = headers.read_stored, {str(folder / "once")!r}
        def read_stored(format, data):
            for mark, trouble in {TROUBLE!r}.items():
                if mark in data:
                    exec(trouble)
            return real(format, data)
        headers.read_stored = read_stored
    """)


def picture(mark: bytes = b"", side: int = SIDE) -> bytes:
    """A JPEG with a mark behind its end, where no decoder looks."""
    return images.encode_jpeg(np.asarray(Image.fromarray(samples.astronaut()).resize((side, side))), 95) + mark


def child_of(decoder: decoding.Decoder) -> int:
    return decoder._child._process.pid


def program(folder: Path, faults: str, more: str = "") -> tuple[str, str]:
    """The command of children with these faults."""
    path = folder / "child.py"
    main = "\nimport runpy\nrunpy.run_module('stages.pixels.decoding_child', run_name='__main__', alter_sys=False)\n"
    path.write_text(more + faults + main)
    return sys.executable, str(path)


@pytest.fixture(scope="module")
def faulty_children(tmp_path_factory):
    """The command of children with every fault, and a decoder that may have one of them from the test before."""
    folder = tmp_path_factory.mktemp("faulty")
    hurry = "from stages.pixels import decoding\ndecoding.CPU_S = 1\n"
    return program(folder, faulty(folder), hurry), decoding.Decoder()


@pytest.fixture
def decoder(faulty_children, monkeypatch):
    """A decoder whose children have every fault."""
    command, decoder = faulty_children
    monkeypatch.setattr(decoding, "COMMAND", command)
    return decoder


def reason(decoder: decoding.Decoder, data: bytes) -> DropReason | None:
    try:
        decoder.pixels(data, SIDE * SIDE * 3)
    except Dropped as dropped:
        return dropped.reason
    return None


def test_pixels_of_one_file_are_never_written_over_another_s(monkeypatch):
    """Files that fill the shared memory, need more of it, and then little, while all earlier pictures live."""
    monkeypatch.setattr(decoding, "_CANVAS", SIDE * SIDE * 3)
    decoder = decoding.Decoder()
    files = {side: picture(side=side) for side in (SIDE, 1, 3 * SIDE, SIDE, 2 * SIDE, 7)}
    pictures = {side: decoder.pixels(data, side * side * 3) for side, data in files.items()}
    for side, data in files.items():
        assert (pictures[side] == images.decode_jpeg(data)).all()
        assert pictures[side].shape == (side, side, 3)


@pytest.mark.parametrize("mark", [b"SEGFAULT", b"MEMORY", pytest.param(b"UNFORESEEN", marks=pytest.mark.long)])
def test_what_kills_the_decoder_costs_its_own_file_alone(decoder, mark):
    outcomes = [reason(decoder, data) for data in (picture(), picture(mark), picture())]
    assert outcomes == [None, DropReason.DECODER_CRASH, None]


def test_an_endless_decoder_is_killed_by_its_processor_time_and_tried_once(decoder, monkeypatch):
    assert reason(decoder, picture()) is None
    starts = []
    monkeypatch.setattr(decoding, "_Child", lambda *files, child=decoding._Child: starts.append(1) or child(*files))
    assert reason(decoder, picture(b"ENDLESS")) is DropReason.DECODER_CRASH
    assert not starts
    assert reason(decoder, picture()) is None


def test_a_decoder_that_sleeps_is_given_up(decoder):
    assert reason(decoder, picture()) is None
    decoder._child._socket.settimeout(0.5)
    assert reason(decoder, picture(b"ASLEEP")) is DropReason.DECODER_CRASH
    assert reason(decoder, picture()) is None


def test_a_child_that_somebody_else_kills_costs_nothing(decoder):
    assert reason(decoder, picture(b"ONCE")) is None  # killed in the middle of the file, and tried again
    os.kill(child_of(decoder), signal.SIGKILL)
    assert reason(decoder, picture()) is None


@pytest.mark.long
def test_a_child_that_is_killed_while_it_starts_again_and_again_costs_nothing(tmp_path, monkeypatch):
    count = tmp_path / "starts"
    program = tmp_path / "child.py"
    program.write_text(f"""
import os, runpy, signal
starts = open({str(count)!r}, "a+")
starts.write(".")
if starts.tell() < 8:
    starts.close()
    os.kill(os.getpid(), signal.SIGKILL)
runpy.run_module("stages.pixels.decoding_child", run_name="__main__")
""")
    monkeypatch.setattr(decoding, "COMMAND", (sys.executable, str(program)))
    assert reason(decoding.Decoder(), picture()) is None
    assert count.read_text() == 8 * "."


def test_where_no_child_ever_starts_no_photo_is_blamed(monkeypatch):
    monkeypatch.setattr(decoding, "COMMAND", ("false",))
    monkeypatch.setattr(decoding, "decoder", decoding.Decoder)
    with pytest.raises(ShardError, match="20 times before it took one"):
        decoding.Decoder().pixels(picture(), SIDE * SIDE * 3)
    tiff = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(tiff, "TIFF")
    with pytest.raises(ShardError, match="20 times before it took one"):
        headers.read_header(tiff.getvalue())
    monkeypatch.setattr(decoding, "COMMAND", ("/none/such",))
    with pytest.raises(ShardError, match="cannot be started"):
        headers.read_header(tiff.getvalue())


def test_a_thumbnail_of_what_kills_its_decoder_is_none(decoder, monkeypatch):
    assert decoder.thumbnail(picture(), 32)[:2] == b"\xff\xd8"
    monkeypatch.setattr(decoding, "COMMAND", dying_decoder.COMMAND)
    monkeypatch.setattr(decoding, "decoder", decoding.Decoder)
    assert images.thumbnail(picture(), 32) is None


def test_a_child_ends_with_its_parent():
    code = "import os; from stages.pixels import decoding, images; import sys\n"
    code += "images.photo('a', sys.stdin.buffer.read()); print(decoding.decoder()._child._process.pid, flush=True)\n"
    code += "os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], input=picture(), capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    deadline = time.monotonic() + 10
    while Path(f"/proc/{int(done.stdout)}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_an_answer_that_nobody_waited_for_is_never_taken_for_another(decoder, monkeypatch):
    assert reason(decoder, picture()) is None
    before = child_of(decoder)

    monkeypatch.setattr(decoder._child, "_socket", Interrupted(decoder._child._socket))
    with pytest.raises(KeyboardInterrupt):
        decoder.pixels(picture(), SIDE * SIDE * 3)
    assert decoder.header(picture(side=7))[:2] == (7, 7)
    assert child_of(decoder) != before


class Interrupted:
    """A socket whose user presses Ctrl-C while waiting."""

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)

    def recv(self, size):
        raise KeyboardInterrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_a_terminal_sends_to_all_its_processes_does_not_end_the_child(decoder, number):
    assert reason(decoder, picture()) is None
    child = child_of(decoder)
    os.kill(child, number)
    assert reason(decoder, picture()) is None
    assert child_of(decoder) == child


def test_several_threads_take_turns(decoder):
    files = {side: picture(side=side) for side in range(20, 60, 5)}
    with ThreadPoolExecutor(len(files)) as threads:
        work = [(side, threads.submit(decoder.pixels, files[side], side * side * 3)) for side in [*files] * 5]
        assert all(pixels.result().shape == (side, side, 3) for side, pixels in work)


@pytest.fixture
def own_decoders():
    images.set_decoding(2)
    yield
    images.set_decoding(1)


def test_each_thread_has_a_decoder_and_one_that_is_killed_costs_nothing(own_decoders):
    files = [picture(side=side) for side in range(20, 60)]
    expected = [images.decode_jpeg(data) for data in files]
    used: set[decoding.Decoder] = set()

    def decode(number):
        found = images.photo(f"{number}", files[number % 40])
        used.add(decoding.decoder())
        if number == 29:
            os.kill(child_of(decoding.decoder()), signal.SIGKILL)
        small = images.reduced("", files[number % 40], 2)
        return found, small.shape[0]

    with ThreadPoolExecutor(2) as threads:
        for number, (pixels, half) in enumerate(threads.map(decode, range(60))):
            assert (pixels == expected[number % 40]).all()
            assert half == -(-(20 + number % 40) // 2)
    assert len(used) == 2
    assert decoding.decoder() not in used


def test_threads_share_the_photos_within_one_bound(monkeypatch):
    cache = images.PhotoCache(2 * SIDE * SIDE * 3)
    monkeypatch.setattr(images, "_CACHE", cache)
    records = [{"sha256": str(number), "image": picture(bytes([number]))} for number in range(4)]
    with ThreadPoolExecutor(4) as threads:  # each is let go by another one as soon as it is there
        for photo in threads.map(images.photo_of, records * 40):
            assert photo.shape == (SIDE, SIDE, 3)
    assert cache.n_bytes == sum(photo.nbytes for photo in cache._photos.values()) == cache.max_bytes


def test_another_process_has_another_decoder(monkeypatch):
    mine = decoding.decoder()
    assert decoding.decoder() is mine
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as after a fork
    assert decoding.decoder() is not mine


@pytest.mark.long
def test_a_forked_process_has_a_decoder_of_its_own():
    code = textwrap.dedent("""
        import os, sys
        from stages.pixels import decoding, images
        def child(name, data=sys.stdin.buffer.read()):
            images.photo(name, data)
            return decoding.decoder()._child._process.pid
        mine = child("first")
        forked = os.fork()
        if forked == 0:
            os._exit(child("second") == mine)
        _, status = os.waitpid(forked, 0)
        assert child("third") == mine
        sys.exit(status)
    """)
    done = subprocess.run([sys.executable, "-c", code], input=picture(), capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def no_decoder_yet(monkeypatch):
    """Photos are decoded anew, by children of another command."""
    monkeypatch.setattr(images, "_CACHE", images.PhotoCache(images._CACHE_BYTES))
    monkeypatch.setattr(decoding, "_decoder_of", cache(lambda process, thread: decoding.Decoder()))


@pytest.mark.long
def test_a_run_loses_the_row_and_keeps_its_neighbours(whole, tmp_path, monkeypatch, no_decoder_yet):
    """A run whose decoder dies of a segmentation fault over one photo of the sample, and nothing else differs."""
    faults = faulty(tmp_path).replace("b'SEGFAULT'", repr(signature("admiral.jpg")))
    monkeypatch.setattr(decoding, "COMMAND", program(tmp_path, faults))
    expected, urls = (sample_rows()[name].to_pylist() for name in ("expected", "URL"))
    admiral = next(number for number, url in enumerate(urls) if url.endswith("/admiral.jpg"))
    ledger = {name: pq.read_table(whole / "shards" / f"{name}.parquet") for name in SHARDS}
    out = without(whole, tmp_path / "out", *(name for name in SHARDS if admiral in ledger[name]["row"].to_pylist()))
    assert make(out)[0] is ExitCode.OK
    assert verify(out) == []
    ledgers = [pq.read_table(path).to_pylist() for path in sorted((out / "shards").glob("*.parquet"))]
    verdicts = {row["row"]: row["verdict"] for ledger in ledgers for row in ledger}
    assert verdicts == dict(enumerate(expected)) | {admiral: "decoder_crash"}


def signature(name: str) -> bytes:
    """Bytes from the middle of a picture of the sample, which no other has."""
    content = DRAWN[name]()
    return content[len(content) // 2 :][:24]


def test_no_more_than_the_file_is_written_to_the_child(decoder):
    """A shorter file after a longer one: its tail must not be the other's."""
    assert reason(decoder, picture()) is None
    assert reason(decoder, picture()[:2000] + b"\xff\xd9") is DropReason.CORRUPT_IMAGE


def test_what_is_no_picture_never_reaches_the_child(monkeypatch):
    monkeypatch.setattr(decoding, "decoder", None)
    for junk in (b"", b"<html>", b"MZ" * 100):
        assert images.thumbnail(junk, 32) is None
        with pytest.raises(Dropped) as dropped:
            images.photo("junk", junk)
        assert dropped.value.reason is DropReason.CORRUPT_IMAGE
