"""Streams that are closed, full or of another alphabet, and a machine that fails."""

import errno
import io
import os
import pwd
import signal
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import pipeline.__main__ as pipeline_cli
from pipeline.shared.commands import application
from pipeline.shared.process import NO_TELEMETRY, standard_streams
from pipeline.train import __main__ as trainer
from schemas.errors import ShardError, UserError

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


def test_training_switches_off_the_same_telemetry_but_for_hooks():
    script = """
import os, pipeline.train
from pipeline.shared.process import NO_TELEMETRY
print([name for name, value in NO_TELEMETRY.items() if os.environ.get(name) != value])
"""
    environment = {name: value for name, value in os.environ.items() if name not in NO_TELEMETRY}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "['WANDB_MODE']\n"


def test_what_is_printed_into_closed_streams_lands_in_no_file(tmp_path):
    call = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", CLOSED, str(tmp_path / "file")]
    assert subprocess.run(call, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter is what the locale C gives
def test_no_text_is_too_strange_to_be_printed(errors, monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
    monkeypatch.setattr(sys, "stdout", written)
    standard_streams()
    written.write("caf\xe9 \udcff\n")
    written.flush()
    assert written.buffer.getvalue() == b"caf\\xe9 \\udcff\n"


IN_A_TERMINAL = """
import os, pty, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
pid, terminal = pty.fork()
if not pid:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
while b"begun" not in os.read(terminal, 1000):
    pass
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
PRINTING = """
import os, signal, sys, time
from pathlib import Path
import pipeline.__main__ as cli
from pipeline.options import console
def app():
    try:
        console.print("begun")
        for _ in range(600):
            time.sleep(0.1)  # one that begins just after the signal sleeps on
    finally:
        os.kill(os.getpid(), signal.SIGHUP)  # the kernel's, once the shell has ended
        console.print("ends")
        Path(sys.argv[1]).write_text("rows")
cli.app = app
cli.main()
"""


def test_a_terminal_that_is_closed_interrupts_and_what_is_printed_then_is_no_error(tmp_path):
    call = [sys.executable, "-c", IN_A_TERMINAL, "-c", PRINTING, str(tmp_path / "file")]
    ended = subprocess.run(call, check=False, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 130, ended.stderr
    assert (tmp_path / "file").read_text() == "rows"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_who_no_longer_reads_what_is_printed_ends_nothing(stream, tmp_path):
    code = f"""
import sys
from pipeline.shared.process import standard_streams
standard_streams()
for _ in range(3):
    print("x" * 100_000, file=sys.{stream}, flush=True)
open(sys.argv[1], "w").write("rows")
"""
    reading, writing = os.pipe()
    os.close(reading)
    call = [sys.executable, "-c", code, str(tmp_path / "file")]
    ended = subprocess.run(call, check=False, timeout=50, **{stream: writing})
    os.close(writing)
    assert (ended.returncode, (tmp_path / "file").read_text()) == (0, "rows")


def test_nohup_stays():
    source = """
import signal, pipeline.shared.process as process
process.on_interrupt(process.interrupt)
signal.raise_signal(signal.SIGHUP)
"""
    assert subprocess.run(["nohup", sys.executable, "-c", source], check=False, capture_output=True).returncode == 0


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    ("program", "called", "words"),
    [
        (pipeline_cli, "pipeline.dataset.finished.verify.verify", ["verify", "out"]),
        (pipeline_cli, "pipeline.dataset.config.load_config", ["models", "list"]),
        (trainer, "pipeline.train.run_page.run_page.write_page", ["report", "run"]),
    ],
)
def test_an_interrupted_command_says_what_is_left(monkeypatch, capsys, program, called, words):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(called, interrupted)
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 130
    assert "Interrupted. " in "".join(capsys.readouterr())


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

    for number in (errno.ENOSPC, errno.EACCES):
        with pytest.raises(SystemExit) as end:
            failing(number)
        assert end.value.code == 3
        assert capsys.readouterr().err.startswith("error: This machine fails: it failed (/a/log);")
    with pytest.raises(FileNotFoundError):
        failing(errno.ENOENT)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("module", [pipeline_cli, trainer])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("Unable to allocate 6.69 MiB"), "error: This machine fails: there is no memory left (Unable to"),
        (ShardError("No process can be started."), "error: No process can be started."),
    ],
)
def test_no_memory_and_no_process_are_one_sentence(module, error, expected, monkeypatch, capsys):
    def app(*_):
        raise error

    monkeypatch.setattr(module, "app", app)
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 3
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("module", [pipeline_cli, trainer])
def test_a_user_without_a_home_has_the_one_that_containers_give(module, monkeypatch):
    """Libraries would write into a folder `~` of the current one, or end in a trace."""

    def nobody(number):
        raise KeyError(number)

    monkeypatch.setattr(module, "app", lambda *_: None)
    module.main()
    assert os.path.expanduser("~") == os.environ.get("HOME", pwd.getpwuid(os.getuid()).pw_dir)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setenv("HOME", "")  # to be put back
    monkeypatch.delenv("HOME")
    module.main()
    assert os.path.expanduser("~") == "/"


@pytest.mark.usefixtures("signals")
def test_a_gpu_that_is_full_when_models_load_is_one_sentence(monkeypatch, capsys):
    def app(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nException raised from malloc")

    monkeypatch.setattr(pipeline_cli, "app", app)
    with pytest.raises(SystemExit) as end:
        pipeline_cli.main()
    assert end.value.code == 3
    err = capsys.readouterr().err
    assert err.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. Free that GPU of other programs, ")


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("import xyzzy.plugh", "No module named 'xyzzy'"),
        ("from torch import of_another_release", "cannot import name 'of_another_release' from 'torch'"),
    ],
)
def test_a_package_that_is_missing_or_of_another_release_is_one_sentence(statement, why):
    app = application()
    app.command("a")(lambda: exec(statement, {}))
    app.command("b")(lambda: None)
    error = CliRunner().invoke(app, ["a"]).exception
    assert isinstance(error, UserError)
    assert str(error).startswith(f"{statement.split()[1].split('.')[0]} cannot be imported here ({why}")


def test_a_mistake_of_our_own_imports_stays_one():
    app = application()
    app.command("a")(lambda: exec("from schemas import nothing_of_this_name", {}))
    app.command("b")(lambda: None)
    error = CliRunner().invoke(app, ["a"]).exception
    assert isinstance(error, ImportError)
