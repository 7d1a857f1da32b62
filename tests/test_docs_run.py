"""Blocks of README and docs: shell and Python run in one folder, TOML is a config; what cannot run here is parsed.

`<!-- not run: why -->` right above a block says that it cannot. docs/readers.md has a test of its own. README and the
first page are run; of the others it is enough, but with -m long, that their commands and keys are known.
"""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from accelerate.state import AcceleratorState, GradientState
from typer.testing import CliRunner

import pipeline.__main__ as datasets
import pipeline.train.__main__ as trainer
from pipeline.dataset.config import Config, load_config
from pipeline.shared.configfile import keys, read_values
from pipeline.train.adapters.variants import VARIANTS
from pipeline.train.settings import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
OWN_TEST = {"readers.md"}
ALWAYS_RUN = {"README.md", "index.md"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```", re.M | re.S)
OTHER_PROGRAMS = {
    "apt-get",
    "bash",
    "cd",
    "docker",
    "export",
    "git",
    "kubectl",
    "pip",
    "python3",
    "ray",
    "source",
    "tensorboard",
}
NO_KEYS = (".csv", ".html", ".json", ".parquet", ".py", ".safetensors")
SHORT = {"run": ["--steps", "2", "--set", "adapter.lora_rank=4", "--set", "data.workers=0"]}
LOCAL = {"dataset": ["--executor", "local"], "plan": ["--executor", "local"]}


class Block(NamedTuple):
    page: str
    why: str | None
    language: str
    code: str


BLOCKS = [
    Block(page.name, match["why"], match["language"], match["code"])
    for page in PAGES
    if page.name not in OWN_TEST
    for match in BLOCK.finditer(page.read_text(encoding="utf-8"))
]


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory) -> Path:
    """Where all of it runs: `out` is the sample's dataset, `photos` its pictures (one is lisa.jpg) and captions."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(dataset, folder / "out")
    runner = CliRunner()
    done = runner.invoke(datasets.app, ["export-json", str(folder / "out"), "--out", str(folder / "exported")])
    assert done.exit_code == 0, done.output
    (folder / "exported/images").rename(folder / "photos")
    shutil.rmtree(folder / "exported")
    min((folder / "photos").iterdir()).rename(folder / "photos" / "lisa.jpg")
    for path in [*(folder / "photos").iterdir()]:
        path.with_suffix(".txt").write_text("a photo of a person")
    return folder


def words_of(line: str) -> list[str]:
    """The words of a command, without the `…` that stands for further ones (it may stand for an option's value)."""
    words = shlex.split(line, comments=True)
    pairs = zip(["", *words], words, strict=False)
    return [word for before, word in pairs if "…" not in word or before.startswith("--")]


def commands(code: str) -> list[list[str]]:
    """The words of each line."""
    return [words for line in code.replace("\\\n", " ").splitlines() if (words := words_of(line))]


def made(words: list[str]) -> list[list[str]]:
    """The commands of a call of make."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    variables = set(re.findall(r"^## (\w+)", text, re.M))
    assert {word.split("=")[0] for word in words if "=" in word} <= variables
    setups = [word for extra in ("cpu", "gpu") for word in ("-o", f".venv/.setup-{extra}")]
    call = ["make", "-n", *setups, *words[1:]]
    # What the `make test ARGS=…` that runs this was given is passed on to every make below it.
    env = {name: value for name, value in os.environ.items() if name not in {*variables, "MAKEFLAGS", "MAKEOVERRIDES"}}
    done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if " -m pipeline" in line]


def leaf(app: typer.Typer, words: list[str]) -> tuple[Any, list[str]]:
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words, "a command is missing"
        assert words[0] in command.commands, f"no such command: {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def parse(app: typer.Typer, words: list[str]) -> None:
    """Options, their values, and config keys are known ones."""
    command, rest = leaf(app, words)
    given = command.make_context(words[0], list(rest)).params
    sets = [pair for pair in given.get("sets") or [] if "…" not in pair]
    if app is trainer.app:
        TrainConfig.model_validate(read_values(None, sets))
        assert given.get("name", "") in {*VARIANTS, "NAME", ""}
    else:
        load_config(None, sets, profile=given.get("profile"), extras=given.get("extras"))


def call(words: list[str], run: bool, done: set[tuple[str, ...]]) -> None:
    """Run, once, or parse one line."""
    if words[0] == "make":
        for one in made(words):
            call(one, run, done)
        return
    if "-m" in words and words[words.index("-m") + 1] in ("pipeline", "pipeline.train"):
        at = words.index("-m") + 1
        app, words = (datasets if words[at] == "pipeline" else trainer).app, words[at + 1 :]
    elif words[0] in ("faceshards", "faceshards-train"):
        app, words = (datasets if words[0] == "faceshards" else trainer).app, words[1:]
    else:
        assert words[0] in OTHER_PROGRAMS or (ROOT / words[1]).exists(), words
        return
    if app is trainer.app and words[0] not in trainer._COMMANDS:
        words = ["run", *words]
    parse(app, words)
    if not run or tuple(words) in done:
        return
    done.add(tuple(words))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    more = SHORT if app is trainer.app else LOCAL
    result = CliRunner().invoke(app, [*words, *more.get(words[0], [])], catch_exceptions=False)
    assert result.exit_code == 0, f"{words}: {result.output}"


def check_imports(code: str) -> None:
    """The code is Python, and what it takes from this project is there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("pipeline", "stages", "schemas"):
            module = importlib.import_module(node.module or "")
            assert [one.name for one in node.names if not hasattr(module, one.name)] == []


@pytest.fixture(scope="module")
def done() -> set[tuple[str, ...]]:
    return set()


def test_every_block_says_what_it_is():
    assert {block.language for block in BLOCKS} <= {"sh", "python", "toml", "text", "yaml"}
    assert len([block for block in BLOCKS if block.why is None and block.language in ("sh", "python")]) > 5


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "LOG.md"], ids=lambda page: page.name)
def test_commands_and_keys_in_sentences_are_known(page):
    known = {key for model in (Config, TrainConfig) for key, _ in keys(model)}
    sections = {key.split(".")[0] for key in known}
    for span in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        if span.startswith(("python -m pipeline", "make ")) and " --" in span and "[" not in span:
            call(words_of(span), run=False, done=set())
        key = re.fullmatch(r"(?:--set )?([a-z]+\.[a-z_.]+[a-z])(?: ?=.*)?", span)
        if key and key[1].split(".")[0] in sections and not key[1].endswith(NO_KEYS):
            assert any(f"{one}.".startswith(f"{key[1]}.") or key[1].startswith(f"{one}.") for one in known), span


def do(page: str, run: bool, done: set[tuple[str, ...]]) -> None:
    """Run, or parse, all that a page has."""
    names: dict[str, Any] = {}
    for block in BLOCKS:
        if block.page != page:
            continue
        if block.language == "sh":
            for words in commands(block.code):
                call(words, run=run and block.why is None, done=done)
        elif block.language == "python":
            check_imports(block.code)
            if run and block.why is None:
                exec(compile(block.code, page, "exec"), names)
        elif block.language == "toml":
            values = tomllib.loads(block.code)
            (Config if values.keys() <= Config.model_fields.keys() else TrainConfig).model_validate(values)


RUN = sorted({block.page for block in BLOCKS}, key=lambda page: (page not in ALWAYS_RUN, page))


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[] if page in ALWAYS_RUN else [pytest.mark.long]) for page in RUN]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_what_a_page_says_can_be_done(page, folder, done, monkeypatch, remembered):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LAION_ROOT", str(folder))
    do(page, True, done)
    assert os.getcwd() == str(folder)


@pytest.mark.parametrize("page", [page for page in RUN if page not in ALWAYS_RUN])
def test_what_a_page_says_is_known(page):
    do(page, False, set())
