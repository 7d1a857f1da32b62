"""Fixtures shared by all tests: telemetry off, loopback servers, the real photos where they are given."""

import csv
import gc
import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hostile
import hypothesis
import pytest
import servers
from hypothesis.internal.conjecture import providers
from sample_runs import MEMORY, make, remembered_models, shared
from typer.testing import CliRunner

# The suite tries the same examples each time: what turns red was changed. New ones, and more, are looked for with
# --hypothesis-profile=default, which is asked for or not, but never waits in ambush.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("suite")

for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "WANDB_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "RAY_AUTH_MODE": "token",  # test modules import Ray, which remembers these, before a run sets them
    "RAY_AUTH_TOKEN": "0" * 64,
    "RAY_worker_niceness": "0",  # on a busy machine, the workers of Ray would starve, and their deadlines pass
    "CUDA_VISIBLE_DEVICES": "",  # a GPU computes other bits than the CPU, and would be there where none may be
    "OMP_NUM_THREADS": "1",  # the processes of the suite fill the cores; their threads would only fight for them
}.items():
    os.environ[_name] = _value
# A run in a process of its own would compile hundreds of modules first, each time, and each worker of Ray too.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
gc.disable()  # what is imported for the tests stays; to look through it again and again took a fifth of that time

_NO_DATA = "FACESHARDS_DATA is not set to a folder with labelled photos and weights"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; skip real-data tests, with a reason, where there is no real data.

    Of these the first and the last take turns: those of the executors wait for processes, those of the trainer compute.
    """
    slow = list(dict.fromkeys(item.path for item in items if item.get_closest_marker("slow")))
    turns = [path for pair in zip(slow, reversed(slow), strict=True) for path in pair]
    turn = {path: number for number, path in enumerate(dict.fromkeys(turns))}
    items.sort(key=lambda item: turn.get(item.path, len(turn)))
    if not os.environ.get("FACESHARDS_DATA"):
        for item in items:
            if item.get_closest_marker("real_data"):
                item.add_marker(pytest.mark.skip(reason=_NO_DATA))


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: at times tests wait, for deadlines, and for Ray to see who died.

    A further one would import all that the tests do once more, and fill no core.
    """
    return len(os.sched_getaffinity(0)) + 1


def pytest_sessionstart() -> None:
    """Numbers and words of all sources would be among the examples: others after each change, and all were parsed."""
    if hypothesis.settings.get_current_profile_name() == "suite":
        providers._get_local_constants = lambda: providers._local_constants


def pytest_collection_finish() -> None:
    """All modules are imported: the collector, which each training calls, need not look at them half a second long."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000, 10, 10)  # 1 % of the time that tests compute, where 700 takes 3 %


@pytest.fixture(scope="session", autouse=True)
def _cache(shared_folder: Path) -> Iterator[None]:
    """Whatever is cached, such as the tiny bases, is made and kept in a folder of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared_folder / "cache"))
        patch.setenv(MEMORY, str(shared_folder / "computed"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    """What a process wrote outlives it without; only a machine that loses its power would show the difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with real photos and weights."""
    given = os.environ.get("FACESHARDS_DATA")
    if not given:
        pytest.skip(_NO_DATA)
    return Path(given).resolve()


@pytest.fixture(scope="session")
def labels(data: Path) -> list[dict[str, str]]:
    """The unambiguous labelled photos."""
    with (data / "photos" / "labels.csv").open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if not row["ambiguous"]]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def dataset(shared_folder: Path) -> Path:
    """The OUT of `make dataset` on the bundled sample, made once for all; tests must not write to it."""
    out = shared_folder / "dataset"
    with shared(shared_folder):
        if not (out / "README.md").exists():  # what a run writes last
            from pipeline.__main__ import app

            with remembered_models():
                done = CliRunner().invoke(app, ["dataset", "--shards", "sample", "--out", str(out)])
            assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="session")
def whole(shared_folder: Path) -> Path:
    """What an undisturbed run in one process makes of the sample, once for all; tests must not write to it."""
    out = shared_folder / "whole"
    with shared(shared_folder):
        if not (out / "README.md").exists():  # what a run writes last
            assert make(out, report=True)[0] == 0
    return out


@pytest.fixture
def remembered() -> Iterator[None]:
    """Runs of the sample in this process compute once what they all do with its pictures."""
    with remembered_models():
        yield


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder without writing a log."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="session")
def photo_server(data: Path) -> Iterator[str]:
    """A loopback server of the labelled photos; the value is its base URL."""
    handler = partial(QuietHandler, directory=str(data / "photos"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def names() -> Iterator[hostile.Names]:
    """A stub in place of the system's resolver."""
    stub = hostile.Names()
    stub.install()
    yield stub
    stub.remove()


@pytest.fixture
def server() -> Iterator[servers.HostileServer]:
    """A loopback server that answers by path, and remembers what it was asked for."""
    made = servers.HostileServer()
    yield made
    made.close()


@pytest.fixture(params=["native", pytest.param("img2dataset", marks=pytest.mark.long)])
def engine(request: pytest.FixtureRequest) -> str:
    """Each download engine; the second one's promises in short are in tests/stages/fetch/test_fetch_img2dataset.py."""
    return str(request.param)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium. Its client holds this thread's event loop, so it is closed after each file."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not importlib.util.find_spec("playwright") or not binary:
        pytest.skip("there is no headless Chromium: apt-get install chromium, and pip install playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page, which must not have anything to complain of when the test is over."""
    complaints, contexts = [], []

    def opened(path: Path, width: int = 1400, scheme: str = "light") -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
