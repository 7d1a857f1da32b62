"""Runs that are killed, stopped, continued and split over processes end with the very weights of an undisturbed run.

Real processes: one server imports the trainer once, as `python -m pipeline.train` does, and forks a process for each
command line.
"""

import datetime
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file

import pipeline.train.loop as trainer
from pipeline.shared.bases import find_base
from pipeline.train.inputs import Preparer
from pipeline.train.job import Call, hash_shards, prepared
from pipeline.train.loader import dataset as dataset_module
from pipeline.train.loader import reading
from pipeline.train.run_folder import RunFolder
from pipeline.train.settings import OptimSettings
from pipeline.train.stop import StopSignal
from pipeline.train.watch import METRICS
from schemas.digest import sha256_of_file
from schemas.errors import ExitCode, FaceShardsError, OutputError, SourceError, UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_once")]

WAIT_S = 150
STEPS, EVERY = 6, 2
COMMON = ("adapter.lora_rank=4", f"watch.save_every={EVERY}", "watch.keep=2")
PLANS = {
    "faceid": ("tiny", ("data.workers=2", "optim.accumulate=2", "optim.ema_decay=0.9", "objective.noise_offset=0.1")),
    "faceid-plusv2": (
        "tiny-sdxl",
        ("data.workers=0", "optim.accumulate=2", "optim.schedule=cosine", "optim.warmup_steps=3"),
    ),
}

REAL = ["--from-shards", "--variant", "faceid", "--steps", str(STEPS)]
REAL += [word for pair in (*COMMON, *PLANS["faceid"][1]) for word in ("--set", pair)]

_SERVER = """
import atexit, gc, importlib.util, json, os, runpy, sys, warnings
from pathlib import Path
folder = Path(os.environ["FOLDER"])
def note():
    loaded = dict(modules=list(sys.modules), left_alone=gc.get_freeze_count(), collects=gc.isenabled())
    (folder / "modules").write_text(json.dumps(loaded))
def on_to_file(path, *numbers):
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    for number in numbers:
        os.dup2(file, number)
class Once:  # what `python -m pipeline.train` calls, once all is imported for it: it forks, and its parent serves
    def find_spec(name, path=None, target=None):
        if name != "pipeline.train.loop":
            return None
        sys.meta_path.remove(Once)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def patched(module):
            load(module)
            train = module.train
            def here_or_there(job):
                module.train = train
                with warnings.catch_warnings():  # Python 3.12 warns of torch's threads
                    warnings.simplefilter("ignore", DeprecationWarning)
                    pid = os.fork()
                if not pid:
                    atexit.register(note)
                    on_to_file(folder / "real.out", 1)
                    return train(job)
                warm()
                print(pid, flush=True)
                serve()
            module.train = here_or_there
        spec.loader.exec_module = patched
        return spec
def warm():
    gc.disable()  # what is imported stays
    import torch
    torch.set_num_threads(1)
    from pipeline.shared.bases import find_base
    from pipeline.shared.page import _templates
    from pipeline.shared.readme import _compiled
    from pipeline.train import adapter_card
    from pipeline.train.base_model import Base
    from pipeline.train.run_page import run_page
    from torch.utils.tensorboard import SummaryWriter
    models, load_model = {}, Base._model  # names that no `first` gives to something else
    def model(base, cls, part, dtype):
        key = base.source.name, part
        models[key] = models.get(key) or load_model(base, cls, part, dtype)
        return models[key]
    Base._model = model
    base = Base(find_base("tiny"), torch.device("cpu"), torch.float32)
    base.encode_text(["warm"]), base.encode_images(torch.zeros(2, 3, 64, 64))
    # Without a gradient: autograd's threads would not be forked.
    base.unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 77, 128))
    _templates(Path(run_page.__file__).parent).get_template("run_page.html.jinja")
    _compiled(Path(adapter_card.__file__).with_name("adapter_card.md.jinja").read_text(encoding="utf-8"))
    gc.enable()
    gc.freeze()  # each training calls the collector, which would look at all modules in its fork, and so copy them
def serve():
    import torch
    import pipeline.train.__main__ as trainer
    for line in sys.stdin:
        call = json.loads(line)
        if "poll" in call:
            pid, status = os.waitpid(call["poll"], os.WNOHANG)
            print(os.waitstatus_to_exitcode(status) if pid else "running", flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        on_to_file(call["log"], 1, 2)
        os.environ.update(call["env"])
        exec(call["first"], {**globals(), "call": call, "torch": torch})
        sys.argv = ["faceshards-train", *call["words"]]
        try:
            trainer.main()
        finally:
            if call["is_brief"] and isinstance(ended := sys.exc_info()[1], SystemExit):
                atexit._run_exitfuncs()
                os._exit(int(ended.code or 0))
    os._exit(0)
sys.meta_path.insert(0, Once)
runpy.run_module("pipeline.train", run_name="__main__", alter_sys=True)
"""


class Server:
    """`python -m pipeline.train`, which goes on in a fork of it (`real`); itself it forks trainers."""

    def __init__(self, folder, cwd):
        """Logs go to `folder`."""
        self._folder, self.cwd = folder, cwd
        self._count = 0
        # One thread, and no base to make: a fork has none of its parent's other threads.
        for base, _ in PLANS.values():
            find_base(base)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "FOLDER": str(folder)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with (folder / "real.err").open("wb") as errors:
            command = [sys.executable, "-c", _SERVER, *REAL]
            self._process = subprocess.Popen(command, **pipes, stderr=errors, env=environment, cwd=cwd)
        pid = self._process.stdout.readline()
        assert pid, (folder / "real.err").read_text()
        self.real = Trainer(self, int(pid), folder / "real.out")

    def ask(self, **call):
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def start(self, *words, first="", env=None, is_brief=True):
        """A `brief` process does not tidy up its modules, for which Python takes longer than for a step."""
        self._count += 1
        log = self._folder / f"{self._count}.log"
        told = {"words": list(map(str, words)), "log": str(log), "first": first, "env": env or {}, "is_brief": is_brief}
        return Trainer(self, int(self.ask(**told)), log)

    def close(self):
        self.real.end()
        with self._process:
            self._process.stdin.close()


class Trainer:
    """One forked process."""

    def __init__(self, server, pid, log):
        self._server, self.pid, self.log = server, pid, log
        self.code = None

    @property
    def said(self):
        return self.log.read_text()

    def running(self):
        if self.code is None:
            answer = self._server.ask(poll=self.pid)
            self.code = None if answer == "running" else int(answer)
        return self.code is None

    def until(self, found):
        """Wait until something is so."""
        end = time.monotonic() + WAIT_S
        while not found():
            assert self.running(), f"ended with {self.code}: {self.said}"
            assert time.monotonic() < end, self.said
            time.sleep(0.01)

    def end(self):
        """Wait for the exit code."""
        end = time.monotonic() + WAIT_S
        while self.running():
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                pytest.fail(f"hangs: {self.said}")
            time.sleep(0.02)
        return self.code


@pytest.fixture(scope="module")
def server(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    (folder / "out").symlink_to(dataset)
    made = Server(tmp_path_factory.mktemp("logs"), folder)
    yield made
    made.close()


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(server):
    """A run of the real command, in a folder without anything else, and its logs; the undisturbed run of faceid."""
    errors = server.real.log.with_name("real.err").read_text
    assert server.real.end() == 0, errors()
    loaded = json.loads(server.real.log.with_name("modules").read_text())
    run = server.cwd / "runs" / "faceid-tiny"
    return SimpleNamespace(folder=server.cwd, run=run, stdout=server.real.said, stderr=errors(), **loaded)


def test_without_dir_base_and_out_it_trains_the_tiny_base_on_out(real):
    listed = [real.folder / line for line in real.stdout.splitlines() if line.startswith("runs/")]
    ends = (".safetensors", ".bin", ".json", "_lora.safetensors")
    assert {path.name for path in listed} == {f"ip-adapter-faceid_sd15{end}" for end in ends}
    assert all(path.parent == real.run and path.is_file() for path in listed)
    assert f"step {STEPS} of {STEPS}" in real.stdout
    assert sorted(path.name for path in real.folder.iterdir()) == ["out", "runs"]


def test_embedded_shards_are_warned_of_and_stderr_holds_nothing_else(real):
    warning, need = real.stderr.splitlines()
    assert warning.startswith("warning: these shards are of the `embedded` profile")
    assert need.startswith("diffusers needs peft beside it")


def test_the_trainer_loads_neither_ray_nor_stages_nor_what_it_has_no_use_for(real):
    assert "torch" in real.modules
    assert not {"ray", "stages"}.intersection(real.modules)
    assert not {"albumentations", "pandas"}.intersection(real.modules), "for mirrored targets, and curves"


def test_the_collector_goes_on_but_not_among_what_was_imported(real):
    assert real.collects
    assert real.left_alone > 500_000, "of torch and diffusers"


# --- processes that are killed and stopped ------------------------------------------------------------------------


def words(dataset, name, out, *more, steps=STEPS):
    base, pairs = PLANS[name]
    sets = [word for pair in (*COMMON, *pairs) for word in ("--set", pair)]
    asked = ["--variant", name, "--base", base, "--steps", steps, "--out", out]
    return ["--from-shards", str(dataset), *asked, *sets, *more]


@pytest.fixture(scope="module", params=["faceid", pytest.param("faceid-plusv2", marks=pytest.mark.long)])
def whole(request, server, real, dataset, tmp_path_factory):
    """A variant, and its undisturbed run."""
    if request.param == "faceid":
        return request.param, RunFolder(real.run)
    out = tmp_path_factory.mktemp("whole") / "run"
    done = server.start(*words(dataset, request.param, out), is_brief=False)
    assert done.end() == 0, done.said
    return request.param, RunFolder(out)


_TIMES = ("samples_per_s", "data_wait", "seconds")


def lines(run):
    """Metrics by step, without times."""
    path = run.root / METRICS
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in line.items() if key not in _TIMES} for line in found]


def exported(run):
    return {path.name: path for path in run.root.glob("ip-adapter*")}


def assert_same(run, other):
    """Bit for bit: what is exported, the last checkpoints in float32, and every step's loss."""
    files, others = exported(run), exported(other)
    assert files.keys() == others.keys()
    assert len(files) == 4
    checkpoints = [each.folder(each.steps()[-1]) for each in (run, other)]
    names = [path.name for path in checkpoints[0].glob("*.safetensors")]
    pairs = [(files[name], others[name]) for name in files if name.endswith(".safetensors")]
    for path, twin in [*pairs, *((checkpoints[0] / name, checkpoints[1] / name) for name in names)]:
        tensors, twins = load_file(path), load_file(twin)
        assert tensors.keys() == twins.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, twins[key]), f"{path.name}: {key}"
    assert lines(run) == lines(other)


def test_the_undisturbed_run_stops_and_saves_in_the_middle_of_epochs(whole):
    _, run = whole
    assert run.steps() == [STEPS - EVERY, STEPS], "keep = 2"
    assert [line["step"] for line in lines(run)] == list(range(1, STEPS + 1))
    assert lines(run)[-1]["epoch"] >= 1
    _, _, state = run.load(STEPS - EVERY)
    assert any(place for _, place in state["ranks"][0]["loader"]["positions"]), "a checkpoint in the middle is wanted"


_KILL_SOON = """
import signal, threading
from pipeline.train.session import Session
real = Session.save
def save(session):
    real(session)
    threading.Timer(float(os.environ["DELAY_S"]), os.kill, (os.getpid(), signal.SIGKILL)).start()
Session.save = save
"""


with_plusv2 = pytest.mark.parametrize("whole", [pytest.param("faceid-plusv2", marks=pytest.mark.long)], indirect=True)


@with_plusv2
def test_killed_at_a_random_moment_and_resumed(whole, server, dataset, tmp_path):
    name, undisturbed = whole
    seed = random.SystemRandom().randrange(1000)
    delay = random.Random(seed).uniform(0, 0.3)
    print(f"seed {seed}: killed {delay:.3f} s after the first checkpoint")  # noqa: T201  # to do it again
    run = RunFolder(tmp_path / "run")
    child = server.start(*words(dataset, name, run.root), first=_KILL_SOON, env={"DELAY_S": f"{delay}"})
    assert child.end() == -signal.SIGKILL, child.said
    before = run.steps()
    assert not exported(run)
    again = server.start(*words(dataset, name, run.root, "--resume"))
    assert again.end() == 0, again.said
    assert before
    assert_same(run, undisturbed)
    assert run.steps() == undisturbed.steps()
    assert not list(run.root.rglob(".tmp-*"))


_KILL_WHILE_SAVING = """
import pipeline.train.run_folder as room, signal
real, calls = room.save_tensors, []
def save_tensors(tensors, path):
    real(tensors, path)
    calls.append(path)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
room.save_tensors = save_tensors
"""


_NO_HURRY = """
import time
from pipeline.train.session import Session
count = Session.count_step
def count_step(session):
    if session.step > 2:
        open(call["log"] + ".step", "w").close()
        time.sleep(0.3)
    return count(session)
Session.count_step = count_step
"""
"""Steps that last long enough for a signal to come before the last of them, on a busy machine too."""


def stop(child, run, *numbers):
    """Stop a trainer in no hurry by signals; the step that it stopped at."""
    child.until(lambda: Path(f"{child.log}.step").exists())
    for number in numbers:
        os.killpg(child.pid, number)
        time.sleep(0.02)
    assert child.end() == ExitCode.INTERRUPTED, child.said
    stopped = lines(run)[-1]["step"]
    assert stopped < STEPS
    assert run.steps()[-1] == stopped
    assert not exported(run)
    assert f"Stopped at step {stopped}" in child.said
    assert "Traceback" not in child.said
    return stopped


@pytest.mark.parametrize("whole", ["faceid"], indirect=True)
def test_killed_while_a_checkpoint_is_written_and_then_stopped_it_ends_like_the_undisturbed_run(
    server, dataset, tmp_path, whole
):
    name, undisturbed = whole
    run = RunFolder(tmp_path / "run")
    child = server.start(*words(dataset, name, run.root), first=_KILL_WHILE_SAVING)
    assert child.end() == -signal.SIGKILL
    assert run.steps() == [EVERY], "weights and their average are two files, so this was the second checkpoint"
    assert list(run.checkpoints.glob(".tmp-*"))
    # A cluster sends SIGTERM to the loader's processes too, and its launcher again; a terminal does with Ctrl-C, and
    # with SIGHUP once it is closed.
    again = server.start(*words(dataset, name, run.root, "--resume"), first=_NO_HURRY)
    stopped = stop(again, run, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP)
    assert stopped > EVERY
    last = server.start(*words(dataset, name, run.root, "--resume"))
    assert last.end() == 0, last.said
    assert_same(run, undisturbed)
    assert run.steps() == [stopped, STEPS]
    assert not list(run.root.rglob(".tmp-*"))


# Each child is killed at another of its calls that change the disk.
_KILLED_AT_EACH_CALL = """
import shutil
from pipeline.train import run_folder
root = Path(call["words"][0])
real = {"rename": Path.rename, "rmtree": shutil.rmtree, "mkdir": Path.mkdir, "fsync": os.fsync}
count = 0
def counted(name, before):
    def call(*given, **options):
        global count
        count += 1
        if count == limit and before:
            os.kill(os.getpid(), 9)
        done = real[name](*given, **options)
        if count == limit:
            os.kill(os.getpid(), 9)
        return done
    return call
def patched(before):
    Path.rename, Path.mkdir = counted("rename", before), counted("mkdir", before)
    shutil.rmtree, os.fsync = counted("rmtree", before), counted("fsync", before)
for limit in range(1, 50):
    ends = []
    for before in json.loads(os.environ["BEFORE"]):
        pid = os.fork()
        if not pid:
            patched(before)
            run = run_folder.RunFolder(root / f"{limit}-{before}")
            run.checkpoints.mkdir(parents=True)
            count = 0
            for step in (1, 2, 3):
                run.save(step, {"w": torch.full((9,), float(step))}, None, {"step": step, "ranks": []}, 2)
            os._exit(0)
        ends.append(os.waitpid(pid, 0)[1])
    print(limit, *ends, flush=True)
    if not any(ends):
        break
os._exit(0)
"""


# What is after a call is nearly what is before the next one.
@pytest.mark.parametrize("before", [[True], pytest.param([True, False], marks=pytest.mark.long)])
def test_a_kill_at_any_moment_leaves_the_last_whole_checkpoint(before, server, tmp_path):
    child = server.start(tmp_path, first=_KILLED_AT_EACH_CALL, env={"BEFORE": json.dumps(before)})
    assert child.end() == 0, child.said
    ends = [tuple(map(int, line.split())) for line in child.said.splitlines()]
    assert not any(ends[-1][1:]), "the save was never over"
    assert all(end[1:] == (9,) * len(before) for end in ends[:-1])
    assert len(ends) > 15
    for folder in tmp_path.iterdir():
        run = RunFolder(folder)
        for step in run.steps():
            weights, _, state = run.load(step)
            assert (weights["w"].tolist(), state["step"]) == ([float(step)] * 9, step)
    numbers = [number for number, *_ in ends]
    newest = [max(RunFolder(tmp_path / f"{number}-True").steps(), default=0) for number in numbers]
    assert newest == sorted(newest), "a later kill lost an earlier checkpoint"
    assert set(newest) == {0, 1, 2, 3}
    assert RunFolder(tmp_path / f"{numbers[-1]}-True").steps() == [2, 3]


# In a process of its own: torch tells of dead workers from a signal handler, at any later moment.
_KILLS_ITS_WORKER = """
import multiprocessing, signal
from itertools import islice
from pipeline.train.loader.dataset import open_dataset
from pipeline.train.loader.loader import ShardLoader, worker_died
from pipeline.train.settings import TrainConfig
from schemas.errors import UserError
told = {"resolution": 64, "batch_size": 2, "workers": 1, "shuffle": 4, "verify": "size"}
config = TrainConfig.model_validate({"data": told})
try:
    batches = iter(ShardLoader(open_dataset(call["words"], config.data), ("arcface",), config))
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGHUP):  # as a terminal sends to all: its parent may need another batch
        os.kill(worker.pid, number)
    list(islice(batches, 20))
    print("lives")
    os.kill(worker.pid, signal.SIGKILL)
    list(islice(batches, 1000))
except UserError as error:
    print(error)
except RuntimeError as error:
    print(worker_died(error))
sys.stdout.flush()
os._exit(0)
"""


def test_a_worker_leaves_a_terminal_to_its_parent_and_one_that_is_killed_is_told(server, dataset):
    child = server.start(dataset, first=_KILLS_ITS_WORKER)
    assert child.end() == 0, child.said
    assert child.said.startswith("lives\nA loader process died"), child.said


@with_plusv2
def test_stopped_by_a_signal_it_saves_and_goes_on(whole, server, dataset, tmp_path):
    """By Ctrl-C; the default test above has the other signals."""
    name, undisturbed = whole
    run = RunFolder(tmp_path / "run")
    stop(server.start(*words(dataset, name, run.root), first=_NO_HURRY), run, signal.SIGINT)
    again = server.start(*words(dataset, name, run.root, "--resume"))
    assert again.end() == 0, again.said
    final, twin = (each.load(STEPS)[0] for each in (run, undisturbed))
    assert all(torch.equal(final[key], twin[key]) for key in twin)
    assert lines(run) == lines(undisturbed)


_SLOW = """
import time
from pipeline.train.session import Session
def optimizer_step(session):
    open(call["log"] + ".step", "w").close()
    for _ in range(6000):
        time.sleep(0.1)  # a signal that comes just before a sleep does not end it
Session.optimizer_step = optimizer_step
"""


def test_sighup_is_a_wish_to_stop_unless_nohup_has_it_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, is_wanted in ((lambda *_: None, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            with StopSignal() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert stop.is_wanted(Accelerator(cpu=True)) is is_wanted
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not():
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        assert stop.is_wanted(Accelerator(cpu=True))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.long
def test_a_second_ctrl_c_stops_a_step_that_lasts(server, dataset, tmp_path):
    run = RunFolder(tmp_path / "run")
    # Not brief: what holds the loader's processes would live on while they are waited for, a minute long.
    child = server.start(*words(dataset, "faceid", run.root), first=_SLOW, is_brief=False)
    child.until(lambda: Path(f"{child.log}.step").exists())
    os.kill(child.pid, signal.SIGINT)
    child.until(lambda: "stops at once" in child.said)
    os.kill(child.pid, signal.SIGINT)
    assert child.end() == ExitCode.INTERRUPTED, "it waits for the end of its step"
    assert "Traceback" not in child.said
    assert run.steps() == []


# --- in this process ------------------------------------------------------------------------------------------


def train(dataset, out, *pairs, name="faceid", base="tiny", steps=2, resume=False, **told):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    pairs = ("adapter.lora_rank=4", "watch.save_every=1", *pairs)
    return trainer.train(
        prepared(Call((str(dataset),), name, base, out, pairs=pairs, resume=resume, options={"steps": steps, **told}))
    )


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A run of two steps with a checkpoint of each."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(dataset, out) == 0
    return out


@pytest.fixture
def short(finished, tmp_path):
    """A copy of it."""
    return RunFolder(Path(shutil.copytree(finished, tmp_path / "run")))


def refused(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "faceid-portrait"}, "variant was 'faceid', now 'faceid-portrait'"),
        ({"base": "tiny-sdxl"}, "base was 'tiny', now 'tiny-sdxl'"),
        pytest.param({"pairs": ["optim.lr=1e-3"]}, "optim.lr was 0.0001, now 0.001", marks=pytest.mark.long),
        ({"pairs": ["data.batch_size=1", "optim.lr=1e-3"]}, "data.batch_size was 2, now 1; optim.lr was 0.0001, now"),
        pytest.param({"seed": 1}, "seed was 0, now 1", marks=pytest.mark.long),
        pytest.param({"pairs": ["optim.ema_decay=0.5"]}, "optim.ema_decay", marks=pytest.mark.long),
    ],
)
def test_another_run_is_not_continued(short, dataset, changes, said):
    changes = dict(changes)
    pairs = changes.pop("pairs", [])
    before = {path: path.read_bytes() for path in short.root.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        train(dataset, short.root, *pairs, resume=True, **changes)
    assert said in refused(error)
    assert {path: path.read_bytes() for path in short.root.rglob("*") if path.is_file()} == before


@pytest.mark.long
@pytest.mark.usefixtures("no_release")
def test_what_a_short_of_memory_machine_needs_may_change(short, dataset, capsys):
    """The very advice of the loader when one of its processes died."""
    pairs = ("data.workers=1", "optim.gradient_checkpointing=true")
    assert train(dataset, short.root, *pairs, steps=3, resume=True) == 0
    assert "note:" not in capsys.readouterr().err, "one worker deals out samples as none does"
    more = ("data.workers=2", "data.shuffle=1", "optim.accumulate=2")
    assert train(dataset, short.root, *more, steps=4, resume=True) == 0
    errors = capsys.readouterr().err
    assert "data.workers or data.shuffle differ" in errors
    assert "note: a step had 2 samples and has 4, by the number of processes" in errors
    assert [line["step"] for line in lines(short)] == [1, 2, 3, 4]
    assert lines(short)[3]["epoch"] == lines(short)[2]["epoch"] + 1


@pytest.mark.usefixtures("no_release")
def test_other_weights_under_the_same_name_are_not_continued(dataset, tmp_path):
    bases = [Path(shutil.copytree(find_base("tiny").folder, tmp_path / parent / "mine")) for parent in ("a", "b")]
    unet = bases[1] / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"] + 1}, unet, {"format": "pt"})
    options = {"pairs": ("data.resolution=64", "data.workers=0", "data.allow_embedded=true")}
    assert train(dataset, tmp_path / "run", *options["pairs"], base=str(bases[0]), steps=1) == 0
    with pytest.raises(UserError, match="base_sha256 was") as error:
        train(dataset, tmp_path / "run", *options["pairs"], base=str(bases[1]), steps=2, resume=True)
    refused(error)


@pytest.mark.usefixtures("no_release")
def test_a_step_that_the_scaler_skips_is_not_counted(dataset, tmp_path, monkeypatch):
    """fp16's scaler finds an infinite gradient now and then, and leaves the optimiser step out."""
    skips, batches = iter([True, True, False, True, False]), []
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda _: next(skips)))
    prepare = Preparer.__call__
    monkeypatch.setattr(Preparer, "__call__", lambda made, batch: batches.append(batch) or prepare(made, batch))
    assert train(dataset, tmp_path / "run", "optim.warmup_steps=2", steps=2) == 0
    run = RunFolder(tmp_path / "run")
    assert len(batches) == 5
    assert [(line["step"], line["lr"]) for line in lines(run)] == [(1, 0), (2, 5e-5)]
    assert run.load(2)[2]["schedule"]["last_epoch"] == 2


@pytest.mark.long
@pytest.mark.usefixtures("no_release")
def test_a_scaler_that_skips_all_ends_the_run(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", True)
    monkeypatch.setattr("pipeline.train.session._MOST_SKIPPED", 2)
    with pytest.raises(FaceShardsError, match="not finite, the training diverged"):
        train(dataset, tmp_path / "run")


@pytest.mark.usefixtures("no_release")
def test_processes_of_a_machine_hash_the_dataset_once_and_a_resumed_run_not_again(
    dataset, finished, tmp_path, monkeypatch
):
    hashed, real = [], dataset_module._sha256
    monkeypatch.setattr(dataset_module, "_sha256", lambda shard: hashed.append(shard.name) or real(shard))
    monkeypatch.chdir(tmp_path)
    call = Call((str(dataset),), "faceid", "tiny")
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        hash_shards(prepared(call))
    assert hashed == ["sample-00000"]
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    shutil.copytree(finished, tmp_path / "runs" / "faceid-tiny")
    hashed.clear()
    hash_shards(prepared(replace(call, resume=True)))
    assert hashed == [], "without --out too"
    shutil.rmtree(tmp_path / "runs")
    assert train(dataset, None, "data.verify=size", steps=1) == 0
    assert hashed == []
    hash_shards(prepared(replace(call, resume=True)))
    assert hashed == ["sample-00000"], "none of these was hashed before"


def other_dataset(dataset, other):
    """The same samples, made by another plan, as the manifest says."""
    (other / "shards").mkdir(parents=True)
    for path in (dataset / "shards").iterdir():
        os.link(path, other / "shards" / path.name)
    (manifest,) = other.glob("shards/*.json")
    told = json.loads(manifest.read_text())
    manifest.unlink()
    told["files"] = dict(told["files"])
    told["plan_digest"] = "0" * 64
    (ledger,) = other.glob("shards/*.parquet")
    told["files"][ledger.name] = {**told["files"][ledger.name], "sha256": "0" * 64}
    manifest.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    return other


def test_another_dataset_is_not_continued_on(short, dataset, tmp_path):
    other = other_dataset(dataset, tmp_path / "other")
    with pytest.raises(UserError, match="dataset was '") as error:
        train(other, short.root, resume=True)
    refused(error)


@pytest.mark.long
@pytest.mark.usefixtures("no_release")
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_good(short, dataset):
    state = short.folder(2) / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(UserError, match="remove it, then resume") as error:
        train(dataset, short.root, resume=True)
    assert str(short.folder(2)) in refused(error)
    final = load_file(short.folder(2) / "adapter.safetensors")
    for path in short.folder(2).iterdir():
        path.unlink()
    short.folder(2).rmdir()
    assert train(dataset, short.root, resume=True) == 0
    again = load_file(short.folder(2) / "adapter.safetensors")
    assert all(torch.equal(again[key], final[key]) for key in final)
    assert [line["step"] for line in lines(short)] == [1, 2]


def test_a_finished_run_that_is_resumed_exports_again(short, dataset):
    before = {name: path.read_bytes() for name, path in exported(short).items()}
    assert len(before) == 4
    for path in exported(short).values():
        path.unlink()
    assert train(dataset, short.root, resume=True) == 0
    assert {name: path.read_bytes() for name, path in exported(short).items()} == before
    assert [line["step"] for line in lines(short)] == [1, 2]


@pytest.mark.usefixtures("no_release")
def test_a_finished_run_can_be_made_longer(short, dataset, tmp_path, monkeypatch):
    plans, real = [], reading.plan_reading
    monkeypatch.setattr("pipeline.train.loader.loader.plan_reading", lambda *of: plans.append(of) or real(*of))
    assert train(dataset, short.root, steps=3, resume=True) == 0
    assert len(plans) == 1, "a resumed run plans what it reads once: it hashes the encoders of the base for it"
    assert train(dataset, tmp_path / "straight", steps=3) == 0
    straight = RunFolder(tmp_path / "straight")
    ends = [load_file(run.folder(3) / "adapter.safetensors") for run in (short, straight)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[1])
    assert lines(short) == lines(straight)


@pytest.mark.long
@pytest.mark.usefixtures("no_release")
def test_what_a_run_began_as_is_not_needed_to_go_on_and_may_be_another_file_by_then(short, dataset, tmp_path):
    start = exported(short)["ip-adapter-faceid_sd15.safetensors"]
    again, began_as = RunFolder(tmp_path / "again"), f"adapter.init_from={start}"
    assert train(dataset, again.root, began_as, steps=1) == 0
    before = again.description()["sidecar"]["init_from"]
    shutil.copy(short.folder(1) / start.name, start)
    assert sha256_of_file(start) != before["sha256"]
    assert train(dataset, again.root, began_as, resume=True, steps=2) == 0
    assert again.description()["sidecar"]["init_from"] == before
    start.unlink()
    assert train(dataset, again.root, began_as, resume=True, steps=3) == 0
    with pytest.raises(UserError, match="does not exist"):
        train(dataset, tmp_path / "anew", began_as, resume=True, steps=1)


@pytest.mark.usefixtures("no_release")
def test_resume_where_nothing_is_begins(dataset, tmp_path):
    assert train(dataset, tmp_path / "run", steps=1, resume=True) == 0
    assert RunFolder(tmp_path / "run").steps() == [1]


def test_weights_that_are_not_finite_are_never_saved(dataset, tmp_path):
    with pytest.raises(FaceShardsError, match="not finite") as error:
        train(dataset, tmp_path / "run", "optim.lr=1e38", steps=3)
    assert "lower optim.lr" in str(error.value)
    assert "not finite, the training diverged" in (tmp_path / "run" / "report.html").read_text()
    run = RunFolder(tmp_path / "run")
    for step in run.steps():
        assert all(torch.isfinite(weight).all() for weight in run.load(step)[0].values())


# --- two processes --------------------------------------------------------------------------------------------

_OBSERVED = """
import hashlib
from pipeline.train.inputs import Preparer
from pipeline.train.session import Session
call_real, count_real = Preparer.__call__, Session.count_step
def note(**what):
    with open(os.path.join(os.environ["OBSERVED"], os.environ["RANK"]), "a") as stream:
        stream.write(json.dumps(what) + "\\n")
def prepare(preparer, batch):
    note(epoch=batch.position.epoch, keys=batch.keys)
    return call_real(preparer, batch)
def count_step(session):
    lr = count_real(session)
    weights = b"".join(weight.detach().numpy().tobytes() for weight in session.trained.values())
    note(step=session.step, weights=hashlib.sha256(weights).hexdigest())
    return lr
Preparer.__call__, Session.count_step = prepare, count_step
"""
DDP_STEPS = 4
ALONE = ("--set", "data.workers=0")


def two(server, dataset, run, observed, *more, first="", steps=DDP_STEPS, is_brief=True):
    """Two training processes over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    observed.mkdir(exist_ok=True)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    common |= {"LOCAL_WORLD_SIZE": "2", "OBSERVED": str(observed)}
    asked = words(dataset, "faceid", run.root, *ALONE, *more, steps=steps)
    environments = ({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2))
    return [server.start(*asked, first=first + _OBSERVED, env=env, is_brief=is_brief) for env in environments]


def notes(observed):
    return [[json.loads(line) for line in (observed / str(rank)).read_text().splitlines()] for rank in range(2)]


def addresses(processes):
    found = set()
    for process in processes:
        try:
            for one in psutil.Process(process.pid).net_connections(kind="inet"):
                found |= {end.ip for end in (one.laddr, one.raddr) if end}
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def pair(server, dataset, tmp_path_factory):
    """A run of two processes: its folder, what each was seen to do, and the addresses that they used."""
    folder = tmp_path_factory.mktemp("pair")
    run = RunFolder(folder / "run")
    processes = two(server, dataset, run, folder / "observed", is_brief=False)
    used = set()
    while any(process.running() for process in processes):
        used |= addresses(processes)
        time.sleep(0.05)
    assert [process.code for process in processes] == [0, 0], processes[0].said + processes[1].said
    return run, notes(folder / "observed"), processes, used


def test_two_processes_see_disjoint_samples_and_all_of_them_together(pair):
    _, seen, _, _ = pair
    keys = [[key for note in rank if note.get("epoch") == 0 for key in note["keys"]] for rank in seen]
    assert not set(keys[0]) & set(keys[1])
    assert len(keys[0]) + len(keys[1]) == len({*keys[0], *keys[1]}) == 9
    assert abs(len(keys[0]) - len(keys[1])) <= 1


def test_two_processes_hold_the_same_weights_after_every_step(pair):
    _, seen, _, _ = pair
    weights = [[(note["step"], note["weights"]) for note in rank if "step" in note] for rank in seen]
    assert weights[0] == weights[1]
    assert [step for step, _ in weights[0]] == list(range(1, DDP_STEPS + 1))
    assert len({digest for _, digest in weights[0]}) == DDP_STEPS


def test_two_processes_write_and_export_once(pair):
    run, _, (first, second), _ = pair
    assert [line["step"] for line in lines(run)] == list(range(1, DDP_STEPS + 1))
    assert len(exported(run)) == 4
    for path in exported(run).values():
        assert first.said.count(f"{path}\n") == 1
    assert second.said == ""
    assert len(run.load(DDP_STEPS)[2]["ranks"]) == 2


def test_two_processes_talk_over_loopback_alone(pair):
    *_, used = pair
    assert used, "nothing was seen of their connections"
    assert {ip.removeprefix("::ffff:") for ip in used} <= {"127.0.0.1", "::1", "::", "0.0.0.0"}


@pytest.mark.long
def test_two_processes_go_on_as_if_they_had_not_stopped(pair, server, dataset, tmp_path):
    undisturbed = pair[0]
    run = RunFolder(Path(shutil.copytree(undisturbed.root, tmp_path / "run")))
    shutil.rmtree(run.folder(DDP_STEPS))
    assert run.steps() == [DDP_STEPS - EVERY]
    again = two(server, dataset, run, tmp_path / "observed", "--resume")
    assert [process.end() for process in again] == [0, 0], again[0].said
    final, twin = (each.load(DDP_STEPS)[0] for each in (run, undisturbed))
    assert all(torch.equal(final[key], twin[key]) for key in twin)
    assert lines(run) == lines(undisturbed)


@pytest.mark.parametrize(("own", "other"), [(0, 0), (1, 0), (0, 1)])
def test_a_signal_to_any_process_is_a_wish_to_stop_of_all(own, other):
    """With -m long there are two of them."""
    peers = SimpleNamespace(num_processes=2, device="cpu", reduce=lambda vote: vote + other)
    with StopSignal() as stop:
        if own:
            signal.raise_signal(signal.SIGTERM)
        assert stop.is_wanted(peers) == bool(own or other)


@pytest.mark.long
def test_one_of_two_processes_hears_the_signal_and_both_stop_and_go_on(pair, server, dataset, tmp_path):
    undisturbed = pair[0]
    run = RunFolder(tmp_path / "run")
    processes = two(server, dataset, run, tmp_path / "observed", first=_NO_HURRY)
    processes[0].until(lambda: len(lines(run)) > 1)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [process.end() for process in processes] == [ExitCode.INTERRUPTED] * 2, processes[0].said
    stopped = run.steps()[-1]
    assert stopped < DDP_STEPS
    again = two(server, dataset, run, tmp_path / "observed", "--resume")
    assert [process.end() for process in again] == [0, 0], again[0].said
    final, twin = (each.load(DDP_STEPS)[0] for each in (run, undisturbed))
    assert all(torch.equal(final[key], twin[key]) for key in twin)
    assert lines(run) == lines(undisturbed)


_SLOW_GRID = """
import datetime
import torch.distributed.distributed_c10d
from pipeline.train.validate.validation import Validator
torch.distributed.distributed_c10d._get_default_timeout = lambda _: datetime.timedelta(seconds=3)
Validator.run = lambda *_: __import__("time").sleep(6) or {}
load_judges = Validator.__init__
Validator.__init__ = lambda *given: note(judges=os.environ["RANK"]) or load_judges(*given)
"""


@pytest.mark.usefixtures("no_release")
def test_only_the_main_process_loads_judges_and_the_others_wait_for_it(dataset, tmp_path, monkeypatch):
    """As if this were the second process; with -m long there is one."""
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    monkeypatch.setattr(trainer, "Validator", lambda *_: pytest.fail("judges were loaded"))
    assert train(dataset, tmp_path / "run", "watch.validate_every=1", steps=1) == 0
    assert not (tmp_path / "run").exists()
    assert trainer.make_accelerator(OptimSettings()).init_handler.timeout == datetime.timedelta(hours=2)


@pytest.mark.long
def test_the_other_process_waits_for_a_grid_that_takes_long_and_loads_no_judges(server, dataset, tmp_path):
    grids = ("--set", "watch.validate_every=1", "--set", "watch.save_every=9")
    both = two(server, dataset, RunFolder(tmp_path / "run"), tmp_path / "seen", *grids, first=_SLOW_GRID, steps=2)
    assert [process.end() for process in both] == [0, 0], both[0].said + both[1].said
    assert [sum("judges" in each for each in rank) for rank in notes(tmp_path / "seen")] == [1, 0]


def seeds_of(ranks):
    """Of the generators of all processes: for noise, and torch's own."""
    seeds = []
    for name in ("generator", "torch"):
        generator = torch.Generator()
        for rank in ranks:
            generator.set_state(rank[name])
            seeds.append((name, generator.initial_seed()))
    return seeds


@pytest.mark.long
@pytest.mark.usefixtures("no_release")
def test_one_process_goes_on_with_the_next_epoch_of_two(pair, dataset, tmp_path, capsys):
    run = RunFolder(Path(shutil.copytree(pair[0].root, tmp_path / "run")))
    before = lines(run)[-1]["epoch"]
    base, pairs = PLANS["faceid"]
    pairs = (*pairs, "data.workers=0", "optim.accumulate=4")  # twice as much: a step has as many samples as before
    assert train(dataset, run.root, *COMMON, *pairs, base=base, steps=DDP_STEPS + 1, resume=True) == 0
    said = capsys.readouterr().err
    assert "processes was 2 and is 1" in said
    assert f"beginning of epoch {before + 1}" in said
    assert "a step had" not in said
    assert [line["step"] for line in lines(run)] == list(range(1, DDP_STEPS + 2))
    # It draws other noise than at the beginning, and than either process.
    seeds = seeds_of([*pair[0].load(DDP_STEPS)[2]["ranks"], *run.load(DDP_STEPS + 1)[2]["ranks"]])
    assert len({*seeds}) == 6


@pytest.mark.long
def test_another_number_of_processes_goes_on_with_the_next_epoch(pair, server, dataset, tmp_path):
    run = RunFolder(Path(shutil.copytree(pair[0].root, tmp_path / "run")))
    before = lines(run)[-1]["epoch"]
    more = ("--resume", "--set", "optim.accumulate=4")  # twice as much: a step has as many samples as before
    child = server.start(*words(dataset, "faceid", run.root, *ALONE, *more, steps=DDP_STEPS + 1))
    assert child.end() == 0, child.said
    assert "processes was 2 and is 1" in child.said
    assert f"beginning of epoch {before + 1}" in child.said
    again = two(server, dataset, run, tmp_path / "observed", "--resume", steps=DDP_STEPS + 2)
    assert [process.end() for process in again] == [0, 0], again[0].said
    assert "processes was 1 and is 2" in again[0].said
    assert "a step had" not in child.said + again[0].said
    assert [line["step"] for line in lines(run)] == list(range(1, DDP_STEPS + 3))
    weights = [[note["weights"] for note in rank if "step" in note] for rank in notes(tmp_path / "observed")]
    assert weights[0] == weights[1]
    alone, last = (run.load(step)[2]["ranks"] for step in (DDP_STEPS + 1, DDP_STEPS + 2))
    assert (len(alone), len(last)) == (1, 2)
    # Whoever goes on draws other noise than at the beginning, and than the other process.
    assert len({*seeds_of([*pair[0].load(DDP_STEPS)[2]["ranks"], *alone, *last])}) == 10


@pytest.mark.parametrize(
    ("other", "error", "words"),
    [
        ((0, "digest"), OutputError, "(step of the last checkpoint: 2, none)"),
        ((2, "another"), SourceError, "is not the same on all machines"),
        ((2, "digest"), None, ""),
    ],
)
def test_machines_that_see_other_things_are_refused(other, error, words, dataset, tmp_path, monkeypatch):
    """As if another process had given what it saw; beside it, -m long has two processes."""
    job = prepared(Call((str(dataset),), "faceid", "tiny", tmp_path / "run"))
    seen = {"digest": job.dataset.digest, "another": "0" * 64}
    monkeypatch.setattr(trainer, "gather_object", lambda mine: [*mine, (other[0], seen[other[1]])])
    with pytest.raises(error) if error else nullcontext() as refusal:
        trainer.require_agreement(Accelerator(cpu=True), job, 2)
    assert not error or words in refused(refusal)


_ELSEWHERE = """
if os.environ["RANK"] == "1":
    call["words"][call["words"].index({here!r})] = {there!r}
"""


@pytest.mark.long
def test_machines_that_see_other_checkpoints_do_not_train_each_by_itself(pair, server, dataset, tmp_path):
    run = RunFolder(Path(shutil.copytree(pair[0].root, tmp_path / "run")))
    first = _ELSEWHERE.format(here=str(run.root), there=str(tmp_path / "there"))
    again = two(server, dataset, run, tmp_path / "observed", "--resume", first=first, steps=DDP_STEPS + 2)
    assert [process.end() for process in again] == [ExitCode.USER_ERROR] * 2, again[0].said
    assert f"(step of the last checkpoint: {DDP_STEPS}, none)" in again[0].said
    assert run.steps()[-1] == DDP_STEPS
    assert not (tmp_path / "there").exists()


@pytest.mark.long
def test_machines_that_see_other_datasets_do_not_train(server, dataset, tmp_path):
    run, other = RunFolder(tmp_path / "run"), other_dataset(dataset, tmp_path / "other")
    first = _ELSEWHERE.format(here=str(dataset), there=str(other))
    both = two(server, dataset, run, tmp_path / "observed", first=first)
    assert [process.end() for process in both] == [ExitCode.USER_ERROR] * 2, both[0].said
    assert "is not the same on all machines" in both[0].said
    assert not run.root.exists()
