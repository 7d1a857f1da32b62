"""What a user may get wrong: one sentence, exit code 2, nothing written, never a traceback."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset import job
from pipeline.dataset.config import Config
from pipeline.dataset.finished.verify import good_news
from pipeline.shared.commands import local_path
from pipeline.shared.configfile import keys
from pipeline.shared.files import to_path
from pipeline.train.__main__ import app as train_app
from pipeline.train.settings import TrainConfig
from schemas.errors import OutputError, UserError, WeightsError

EMBEDDED = ["--profile", "embedded", "--executor", "local"]


@pytest.fixture
def part(tmp_path) -> Path:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"URL": ["http://127.0.0.1:9/a.jpg"], "WIDTH": [2000], "HEIGHT": [1500]}), path)
    return path


def mistakes(tmp_path: Path, part: Path) -> dict[str, tuple[list[str], str]]:
    """Words of a call, and what the one sentence must name."""
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nonsense PAR1")
    no_url = tmp_path / "no_url.parquet"
    pq.write_table(pa.table({"caption": ["x"]}), no_url)
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.toml").write_text("[filter\n")
    return {
        "unknown word": (["--shards", "nonsense", *EMBEDDED], "nonsense"),
        "missing part": (["--shards", "laion-part-9", "--set", f"source.root={tmp_path}", *EMBEDDED], str(tmp_path)),
        "no root": (["--shards", "laion-part-0", *EMBEDDED], "LAION_ROOT"),
        "unreadable parquet": (["--shards", str(broken), *EMBEDDED], "broken.parquet"),
        "missing column": (["--shards", str(no_url), *EMBEDDED], "caption"),
        "out below a file": (["--shards", str(part), "--out", str(tmp_path / "file" / "o"), *EMBEDDED], "cannot be"),
        "out as a url": (["--shards", str(part), "--out", "nonsense://bucket/o", *EMBEDDED], "nonsense://"),
        "config typo": (["--shards", str(part), "--set", "filter.min_face=1", *EMBEDDED], "filter.min_face_px"),
        "config file": (["--shards", str(part), "--config", str(tmp_path / "bad.toml"), *EMBEDDED], "bad.toml"),
        "missing weights": (["--shards", str(part), "--executor", "local"], "models fetch"),
        "unknown word, no weights": (["--shards", "smaple"], "smaple"),
        "absent gpu": (["--shards", str(part), "--set", "executor.gpus=64", *EMBEDDED], "executor.gpus is 64"),
        "absent cluster": (["--shards", str(part), "--ray-address", "127.0.0.1:1", *EMBEDDED[:2]], "joined"),
        "unknown pack": (["--shards", str(part), "--set", "models.pack=buffalo_x", "--executor", "local"], "buffalo_l"),
        "unknown executor": (["--shards", str(part), "--executor", "spark"], "executor.name"),
        "unknown weight": (["--shards", str(part), "--set", "models.paths.yunett=x", *EMBEDDED], "yunet"),
        "damaged weights": (
            [
                "--shards",
                str(part),
                "--set",
                "models.detector=yunet",
                "--set",
                f"models.paths.yunet={broken}",
                *EMBEDDED,
            ],
            "broken.parquet cannot be loaded",
        ),
    }


NAMES = (
    *("unknown word", "missing part", "no root", "unreadable parquet", "missing column", "out below a file"),
    *("out as a url", "config typo", "config file", "missing weights", "unknown word, no weights"),
    *("absent gpu", "absent cluster", "unknown pack", "unknown executor", "unknown weight"),
    "damaged weights",
)


NO_MATTER_TO_PLAN = ("missing weights", "damaged weights")


@pytest.mark.parametrize(
    ("command", "name"),
    # plan neither writes nor starts anything, and needs no weights
    [("dataset", name) for name in NAMES]
    + [("plan", name) for name in NAMES if not ("out" in name or "absent" in name or name in NO_MATTER_TO_PLAN)],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(name, command, part, tmp_path, monkeypatch):
    monkeypatch.delenv("LAION_ROOT", raising=False)
    monkeypatch.setenv("FACESHARDS_MODELS", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    cases = mistakes(tmp_path, part)
    assert tuple(cases) == NAMES
    words, named = cases[name]
    out = tmp_path / "out"
    result = CliRunner().invoke(app, [command, *(["--out", str(out)] if "--out" not in words else []), *words])
    assert isinstance(result.exception, UserError), result.output
    assert named in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not out.exists()


def without_weights(part, tmp_path, monkeypatch) -> list[str]:
    """Words of a call that lacks all weights of its profile."""
    monkeypatch.setenv("FACESHARDS_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return ["--shards", str(part), "--out", str(tmp_path / "out")]


def test_main_turns_a_mistake_into_exit_code_2_without_a_traceback(part, tmp_path, monkeypatch):
    """With what is to be done about it; also on a terminal that knows no width, as some serial ones and CI have it."""
    words = ["dataset", *without_weights(part, tmp_path, monkeypatch)]
    mistake = CliRunner().invoke(app, words).exception
    assert isinstance(mistake, WeightsError)
    env = {**os.environ, "COLUMNS": "0"}
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {mistake}\n\n{mistake.details}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["dataset", "--shards", "sample", "--out", ""], ["report", ""], ["group", "x", "--out", ""]]
)
def test_an_empty_name_is_a_mistake_and_not_the_current_folder(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert "is empty" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_sentences_have_the_words_of_the_system_and_not_its_numbers(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces/dataset.json").mkdir()
    for words in (
        ["forget", str(dataset), "--dry-run", "--list", "."],
        ["plan", "--shards", "sample", "--out", "faces"],
        ["plan", "--shards", "sample", "--config", "."],
    ):
        sentence = str(CliRunner().invoke(app, words).exception)
        assert "Is a directory" in sentence
        assert "Errno" not in sentence


def test_the_sample_twice_is_named_as_it_was_given():
    result = CliRunner().invoke(app, ["plan", "--shards", "sample,made:sample"])
    assert str(result.exception) == "SHARDS names sample twice: leave one out."


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        (["dataset", "--shards", "My", "photos"], ["(photos)", "wants quotes", "--shards"]),
        (["dataset", "photos"], ["(photos)", "by --shards"]),
        (["plan", "--set", "filter.min_face_px", "=", "96"], ["(= 96)", "one word"]),
        (["report", "out", "x"], ["(x)"]),
        (["train", "--from-shards", "out"], ["python -m pipeline.train --from-shards DIR"]),
        (["evaluate", "runs/x"], ["python -m pipeline.train evaluate RUN"]),
        (["replay", "DATASET", "--set", "min_face_px=96"], ["did you mean 'filter.min_face_px'?"]),
    ],
)
def test_words_that_no_command_takes_are_one_sentence_that_says_what_to_do(words, hints, dataset):
    result = CliRunner().invoke(app, [str(dataset) if word == "DATASET" else word for word in words])
    assert isinstance(result.exception, UserError)
    for hint in hints:
        assert hint in str(result.exception)


def test_a_home_folder_that_no_shell_wrote_out_is_none_of_that_name(tmp_path, monkeypatch):
    """As in `make dataset OUT=~/faces` from most shells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert to_path("~/faces") == local_path("~/faces") == tmp_path / "home/faces"
    assert to_path("~nobody-here/x") == local_path("~nobody-here/x") == Path("~nobody-here/x")
    assert to_path("file:///a/~b") == tmp_path / "/a/~b"


def test_an_empty_value_of_an_option_is_a_mistake_that_names_it(dataset):
    """As of a shell variable that is not set; `--profile ''` was the default one."""
    for option in ("profile", "executor", "ray-address", "with", "config", "set"):
        for words in ([f"--{option}", ""], [f"--{option}="]):
            result = CliRunner().invoke(app, ["plan", "--shards", "sample", *words])
            assert isinstance(result.exception, UserError)
            assert str(result.exception) == f"--{option} is empty: give it a value, or leave it out."
    for words in (["models", "list", "--profile", ""], ["forget", str(dataset), "--dry-run", "--list", ""]):
        assert str(CliRunner().invoke(app, words).exception).startswith(f"{words[-2]} is empty: ")
    assert "folder or URL is empty" in str(CliRunner().invoke(app, ["report", "--no-pictures", ""]).exception)


def test_a_url_is_a_mistake_where_files_go_to_this_machine_and_no_folder_of_its_letters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export-json", "x", "--out", "s3://bucket/files"])
    assert "s3://bucket/files is a URL" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_an_out_that_will_not_do_is_known_before_anything_starts(part, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")

    def start(plan):
        pytest.fail("Ray, or a model, was started for nothing")

    monkeypatch.setattr(job, "executor_of", lambda config: start)
    result = CliRunner().invoke(app, ["dataset", "--shards", str(part), "--out", str(tmp_path / "file"), *EMBEDDED])
    assert "cannot be written" in str(result.exception)


def test_verify_does_not_praise_what_is_not_there(tmp_path):
    (tmp_path / "shards").mkdir()
    assert good_news(tmp_path).startswith("no shard is finished yet")
    (tmp_path / "shards" / "part-00000.json").touch()
    assert good_news(tmp_path) == "all shards verify."


@pytest.mark.parametrize("command", ["dataset", "plan"])
def test_a_training_run_is_no_out(part, tmp_path, command):
    run = {name: tmp_path / name for name in ("run.json", "metrics.jsonl", "report.html")}
    for path in run.values():
        path.write_text("of the run")
    result = CliRunner().invoke(app, [command, "--shards", str(part), "--out", str(tmp_path), *EMBEDDED])
    assert "holds a training run" in str(result.exception)
    assert {path.read_text() for path in run.values()} == {"of the run"}
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("command", ["plan", "dataset"])
def test_an_out_whose_name_no_system_takes_is_one_sentence(command, tmp_path):
    result = CliRunner().invoke(app, [command, "--shards", "sample", "--out", str(tmp_path / ("x" * 300))])
    assert isinstance(result.exception, OutputError)
    assert "File name too long" in str(result.exception)


@pytest.mark.parametrize("words", [["report"], ["verify"]])
def test_a_folder_that_is_no_dataset_is_a_mistake(words, tmp_path):
    result = CliRunner().invoke(app, [*words, str(tmp_path / "nothing")])
    assert isinstance(result.exception, UserError)


@pytest.mark.parametrize(
    "words",
    [["--help"], *([name, "--help"] for name in ("dataset", "plan", "report", "verify", "config", "models"))],
)
def test_each_command_explains_itself(words):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("application", [app, train_app])
def test_help_fits_a_line_a_command_and_each_ends_with_a_call_that_parses(application):
    group = typer.main.get_command(application)
    commands = {**group.commands, **getattr(group.commands.get("models"), "commands", {})}
    for name, command in commands.items():
        if name == "models":
            continue
        call = (command.epilog or "").partition("Example: ")[2].split()
        assert call[:2] == ["python", "-m"], name
        words = call[3 + (name in call) + ("models" in call) : call.index(">") if ">" in call else None]
        flags = [word for word in words if word != "--from-shards"]  # the trainer makes a flag and arguments of it
        command.make_context(name, flags)  # raises where an option is none
    if application is app:
        assert list(commands)[:3] == ["dataset", "plan", "status"]
        assert [one.name for one in commands["plan"].params[:2]] == ["shards", "out"]
        summaries = [one.help.split("\n\n")[0] for name, one in group.commands.items()]
        assert max(map(len, summaries)) <= 63, "at 80 columns"


def test_plan_shows_steps_models_and_work_and_writes_nothing(tmp_path):
    result = CliRunner().invoke(app, ["plan", "--out", str(tmp_path / "out")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    words = (
        "embed_face",
        "several_faces",
        "grabcut",
        "Intel License",
        "22 pass the metadata filter",
        "unsafe 2",
        "1 left",
    )
    for word in (*words, "Verdict: ready."):
        assert word in result.output
    assert not (tmp_path / "out").exists()


def test_plan_without_weights_is_a_whole_plan_that_says_what_is_missing(part, tmp_path, monkeypatch):
    words = without_weights(part, tmp_path, monkeypatch)
    planned = CliRunner().invoke(app, ["plan", *words])
    assert planned.exit_code == 0, planned.output
    assert "Shards: 1 of" in planned.stdout
    listed, verdict = planned.stdout.rstrip("\n").split("Missing on this machine:")[1].rsplit("\n", 1)
    assert verdict.startswith(
        "Verdict: NOT READY. Weights are missing: buffalo_l, bisenet, clip-vit-h (2,870,284,265 bytes"
    )
    assert "`--profile embedded` is for trying out" in verdict
    refused = CliRunner().invoke(app, ["dataset", *words]).exception
    assert isinstance(refused, WeightsError)
    assert str(refused) == verdict.removeprefix("Verdict: NOT READY. ")
    assert refused.details.strip() == listed.strip()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "models").exists()


def test_config_lists_every_key_a_line_each():
    lines = CliRunner().invoke(app, ["config"], env={"COLUMNS": "80"}).output.splitlines()
    rows = {words[1]: line for line in lines if len(words := line.split()) > 2}
    meanings = {name: " ".join(meaning.split()) for name, meaning in keys(Config)}
    assert [name for name, meaning in meanings.items() if meaning not in rows[name]] == []
    assert "crop.face_share.portrait" in rows


@pytest.mark.long
def test_a_terminal_that_knows_no_width_is_written_to():
    """As some serial ones, editors and CI have it; a mistake is said there too, as above."""
    call = [sys.executable, "-m", "pipeline", "status", "--help"]
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    usual, none = (subprocess.run(call, env={**env, **more}, capture_output=True) for more in ({}, {"COLUMNS": "0"}))
    assert (none.returncode, none.stdout, none.stderr) == (usual.returncode, usual.stdout, usual.stderr)


@pytest.mark.parametrize(("command", "model"), [(app, Config), (train_app, TrainConfig)])
def test_config_is_a_file_that_changes_nothing_until_a_key_is_taken_out_of_its_comment(command, model):
    """It was a table, whose values no TOML file takes."""
    text = CliRunner().invoke(command, ["config"]).output
    assert tomllib.loads(text) == {}
    first, *others = text.splitlines()
    assert first.startswith("# A file for --config")
    assert model.model_validate(tomllib.loads("\n".join(line.removeprefix("# ") for line in others))) == model()
