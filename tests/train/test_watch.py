"""Metrics of a run: lines, resume, pace, TensorBoard, the screen."""

import errno
import importlib
import io
import json
import resource
import time

import pytest
import torch
from rich.console import Console
from torch.utils import tensorboard

from pipeline.shared.events import Hook
from pipeline.train import watch as module
from pipeline.train.settings import TrainConfig
from pipeline.train.watch import StepClock, Watch


def config(**watch):
    return TrainConfig.model_validate({"steps": 6, "watch": {"log_every": 1, "tensorboard": False, **watch}})


def lines(root):
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def go(root, first, last, start=0, console=None, quiet=False, accumulate=1, hook=None, **settings):
    console = console or Console(file=io.StringIO())
    with Watch(root, config(**settings), start, console, hook, quiet=quiet) as watch:
        step = first
        for index, _ in enumerate(watch.clock.timed(range((last - first + 1) * accumulate)), start=1):
            watch.batch(torch.tensor(float(step), requires_grad=True), samples=2)
            if index % accumulate == 0:
                watch.step(step, lr=0.1, grad_norm=torch.tensor(0.5), epoch=3)
                step += 1


def test_a_logged_step_is_a_line_with_all_its_numbers(tmp_path):
    go(tmp_path, 1, 3)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3]
    expected = {"step", "epoch", "loss", "lr", "grad_norm", "samples_per_s", "data_wait", "seconds"}
    assert all(set(line) == expected for line in found)
    told = {"step": 2, "epoch": 3, "loss": 2.0, "lr": 0.1, "grad_norm": 0.5}
    assert {name: found[1][name] for name in told} == told
    assert all(line["samples_per_s"] > 0 and 0 <= line["data_wait"] <= 1 for line in found)


def test_the_loss_between_logs_is_averaged_over_all_batches(tmp_path):
    go(tmp_path, 1, 6, log_every=4, accumulate=2)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(4, 2.5), (6, 5.5)]


def test_numbers_that_json_lacks_become_null(tmp_path):
    with Watch(tmp_path, config(), 0, Console(file=io.StringIO())) as watch:
        watch.batch(torch.tensor(float("nan")), samples=1)
        watch.step(1, lr=0.1, grad_norm=float("inf"), epoch=0)
    (line,) = lines(tmp_path)
    assert line["loss"] is None
    assert line["grad_norm"] is None


def test_a_resumed_run_goes_on_after_its_checkpoint(tmp_path):
    go(tmp_path, 1, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    go(tmp_path, 4, 6, start=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:3] == before[:3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.jsonl", "metrics.jsonl"]


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b'{"step": 3}', b"\x00\xff\n", b"[]\n", b'{"loss": 1}\n', b'{"step": null}\n']
)
def test_torn_lines_are_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 2, "loss": 1.0}\n' + torn)
    go(tmp_path, 6, 6, start=5)
    assert [line["step"] for line in lines(tmp_path)] == [2, 6]


def test_other_processes_are_quiet(tmp_path):
    console = Console(file=io.StringIO())
    go(tmp_path, 1, 6, console=console, quiet=True, tensorboard=True)
    assert not list(tmp_path.iterdir())
    assert not console.file.getvalue()


@pytest.fixture
def clock(monkeypatch):
    """A clock whose time only passes when it is told."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    made = StepClock()
    made.wait = wait
    return made


def fetched(clock, seconds, count):
    for index in range(count):
        clock.wait(seconds)
        yield index


def test_the_pace_counts_waiting_and_computing_but_not_what_lies_between_steps(clock):
    for _ in clock.timed(fetched(clock, 1.0, 4)):
        clock.count(5)
        clock.wait(3.0)
        clock.stop()
        clock.wait(1000.0)  # a checkpoint
    pace = clock.take()
    assert pace["samples_per_s"] == pytest.approx(20 / 16)
    assert pace["data_wait"] == pytest.approx(0.25)


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_holds_the_same_numbers_also_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    go(tmp_path, 1, 4, tensorboard=True)
    time.sleep(1.1)  # event files are named by the second
    go(tmp_path, 3, 5, start=2, tensorboard=True)
    found = scalars(tmp_path / "tensorboard")
    assert found["loss"] == [(step, float(step)) for step in range(1, 6)]
    assert {"lr", "grad_norm", "samples_per_s", "data_wait", "epoch"} <= set(found)


def test_without_tensorboard_the_rest_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    go(tmp_path, 1, 1, tensorboard=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.jsonl", "metrics.jsonl"]


def test_elsewhere_than_on_a_terminal_there_are_plain_lines_now_and_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=40)
    with Watch(tmp_path, config(), 0, console) as watch:
        for step in range(1, 7):
            now[0] += 10.0
            watch.batch(torch.tensor(0.25), samples=2)
            watch.step(step, lr=0.1, grad_norm=None, epoch=0)
    said = console.file.getvalue().splitlines()
    assert [line.split(",")[0] for line in said] == ["step 2 of 6", "step 4 of 6", "step 6 of 6"]
    assert "loss 0.2500" in said[0]
    assert "samples/s, data wait" in said[0]
    assert said[0].endswith("about 40 s left")
    assert "left" not in said[-1]


def test_a_terminal_gets_a_bar(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    go(tmp_path, 1, 6, console=console)
    drawn = console.file.getvalue()
    assert "6/6" in drawn
    assert "loss 6.0000" in drawn


def test_files_are_closed_when_the_loop_dies(tmp_path):
    watch = Watch(tmp_path, config(tensorboard=True), 0, Console(file=io.StringIO()))

    def loop():
        with watch:
            watch.note(1, {"loss": 1.0})
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        loop()
    assert watch._file._stream.closed
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["step"], event["words"]) for event in history] == [
        ("start", 0, ""),
        ("failed", 0, "out of memory"),
    ]


def test_a_hook_gets_each_event_as_a_dict(tmp_path, monkeypatch):
    (tmp_path / "my_hooks.py").write_text("events = []\nlog = events.append\n")
    monkeypatch.syspath_prepend(tmp_path)
    hook = Hook("my_hooks:log", lambda kind, words: pytest.fail(words))
    (tmp_path / "run").mkdir()
    go(tmp_path / "run", 1, 6, hook=hook, log_every=4)
    events = importlib.import_module("my_hooks").events
    assert [(event["kind"], event["step"]) for event in events] == [
        *(("start", 0), ("metrics", 4), ("metrics", 6), ("finished", 6))
    ]
    assert {"time", "loss", "lr", "samples_per_s"} <= events[1].keys()


def test_a_full_disk_does_not_stop_the_training(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, before[1]))
    try:
        go(tmp_path, 1, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written, and the run goes on") == 1
    go(tmp_path, 5, 6, start=4)
    assert [line["step"] for line in lines(tmp_path)][-2:] == [5, 6]


@pytest.mark.parametrize("fails", ["add_scalar", "close"])
def test_a_board_that_cannot_be_written_does_not_stop_the_training(fails, tmp_path, monkeypatch, capsys):
    class Board:
        def __init__(self, *_, **__):
            pass

        def add_scalar(self, *_):
            self.write("add_scalar")

        def close(self):
            self.write("close")

        def write(self, what):
            if what == fails:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorboard, "SummaryWriter", Board)
    go(tmp_path, 1, 6, tensorboard=True)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    words = "cannot be written, and the run goes on without it: No space left on device."
    assert capsys.readouterr().err == f"warning: {tmp_path / 'tensorboard'} {words}\n"
