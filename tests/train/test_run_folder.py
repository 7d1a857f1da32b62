"""The folder of a run: started once, resumed only by the same run, and never without a whole checkpoint.

In test_train_resume it is killed at each of its calls.
"""

import os
import resource
import subprocess
import sys

import pytest
import torch

from pipeline.shared.configfile import leaves
from pipeline.train.run_folder import RunFolder
from pipeline.train.settings import TrainConfig, without_free_keys
from schemas.errors import OutputError

IDENTITY = {"variant": "faceid", "base": "tiny", "optim.lr": 1e-4}
WEIGHTS = {"image_proj.w": torch.arange(6.0).view(2, 3), "ip_adapter.1.w": torch.ones(4)}
STATE = {"step": 3, "ranks": [{"torch": torch.arange(4, dtype=torch.uint8), "loader": {"positions": [[0, 1]]}}]}


def described(**changes):
    return {"identity": {**IDENTITY, **changes}, "name": "x"}


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.fixture
def run(tmp_path):
    made = RunFolder(tmp_path / "deep" / "run")
    made.start(described(), resume=False)
    return made


def test_a_dataset_is_no_folder_for_a_run(tmp_path):
    (tmp_path / "dataset.json").touch()
    with pytest.raises(OutputError) as error:
        RunFolder(tmp_path).start(described(), resume=False)
    assert "holds a dataset" in sentence(error)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


HOLDS = """
import sys
from pathlib import Path
from pipeline.train.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.start({"identity": {}}, resume=True)
print("started", flush=True)
sys.stdin.read()
"""


def test_of_two_trainings_the_second_is_refused_until_the_first_ends_however(tmp_path):
    root = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "started\n"
        stray = root / "checkpoints" / ".tmp-step-00000003"
        stray.mkdir()
        for begin in (RunFolder(root).check, RunFolder(root).start):
            with pytest.raises(OutputError) as error:
                begin({"identity": {}}, resume=True)
            assert sentence(error) == f"Another training is writing to {root}: wait for it, or interrupt it."
        assert stray.exists()
        other.kill()
    RunFolder(root).start({"identity": {}}, resume=True)
    assert not stray.exists()


def save(run, step, keep=3, average=None, weights=WEIGHTS):
    state = {**STATE, "step": step, "average": None if average is None else {"decay": 0.9}}
    return run.save(step, weights, average, state, keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_is_nothing_until_it_is_started(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert (run.exists(), run.steps()) == (False, [])
    assert not run.root.exists()
    run.start(described(), resume=False)
    assert run.description() == described()
    assert names(run.root) == ["checkpoints", "run.json"]


def test_a_run_is_not_started_twice(run):
    save(run, 1)
    with pytest.raises(OutputError, match="--resume") as error:
        run.start(described(), resume=False)
    sentence(error)
    run.start(described(), resume=True)
    assert run.steps() == [1]


def test_a_run_begun_before_a_key_was_there_goes_on_with_its_default(run):
    key, default = "objective.id_loss", leaves(TrainConfig().model_dump(mode="json"))["objective.id_loss"]
    run.start(described(**{key: default}), resume=True)
    with pytest.raises(OutputError, match=f"{key} was {default}, now 0.5"):
        run.start(described(**{key: 0.5}), resume=True)


def test_what_is_watched_may_change_and_what_is_computed_may_not():
    whole = without_free_keys(leaves(TrainConfig().model_dump(mode="json")))
    free = {"steps", "data.verify", "data.allow_embedded", "optim.compile", "optim.channels_last"}
    free |= {"data.workers", "data.shuffle", "optim.gradient_checkpointing"}
    assert not free & whole.keys()
    assert not any(key.startswith("watch") for key in whole)
    assert {"seed", "data.batch_size", "optim.lr", "optim.warmup_steps", "adapter.lora_rank"} <= whole.keys()
    assert len(whole) > 25


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", b'{"identity": 3}'])
def test_a_run_json_that_is_none_is_one_sentence(run, content):
    (run.root / "run.json").write_bytes(content)
    with pytest.raises(OutputError, match="cannot be read") as error:
        run.description()
    assert str(run.root / "run.json") in sentence(error)


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be") as error:
        RunFolder(tmp_path / place).start(described(), resume=False)
    assert str(tmp_path / place) in sentence(error)


def test_a_checkpoint_gives_back_what_was_saved(run):
    average = {key: value / 2 for key, value in WEIGHTS.items()}
    folder = save(run, 7, average=average)
    assert names(folder) == ["adapter.safetensors", "average.safetensors", "state.pt"]
    weights, averaged, state = run.load(7)
    for found, expected in ((weights, WEIGHTS), (averaged, average)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    assert (state["step"], state["ranks"][0]["loader"]) == (7, {"positions": [[0, 1]]})
    save(run, 8)
    assert run.load(8)[1] is None


def test_weights_are_kept_in_float32_whatever_their_layout(run):
    save(run, 1, weights={"a": torch.rand(4, 6).half().t(), "b": torch.rand(2, requires_grad=True)})
    weights, _, _ = run.load(1)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert weights["a"].shape == (6, 4)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_gives(run, umask):
    before = os.umask(umask)
    try:
        folder = save(run, 1, average=WEIGHTS)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        names(folder), 0o666 & ~umask
    )


def test_only_the_last_checkpoints_stay(run):
    for step in (5, 10, 100, 20):
        save(run, step, keep=2)
    assert run.steps() == [20, 100], "by number, not by name or time"
    save(run, 101, keep=1)
    assert run.steps() == [101]
    assert names(run.checkpoints) == [".lock", "step-00000101"]


def test_other_names_are_no_checkpoints(run):
    save(run, 2)
    for name in (".tmp-step-00000009", "step-", "step-x", "step-00000003.old"):
        (run.checkpoints / name).mkdir()
    assert run.steps() == [2]
    run.start(described(), resume=True)
    assert ".tmp-step-00000009" not in names(run.checkpoints), "a torn checkpoint was kept"


@pytest.mark.parametrize("file", ["adapter.safetensors", "average.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["cut", "empty", "junk", "gone"])
def test_a_damaged_checkpoint_is_one_sentence_that_names_it(run, file, damage):
    path = save(run, 4, average=WEIGHTS) / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": path.read_bytes()[:-9], "empty": b"", "junk": b"junk" * 99}[damage])
    with pytest.raises(OutputError, match="remove it") as error:
        run.load(4)
    assert str(run.folder(4)) in sentence(error)


def test_a_checkpoint_that_would_run_code_is_not_loaded(run):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(run.root / "evil"),))

    path = save(run, 4) / "state.pt"
    torch.save({"step": 4, "ranks": [Evil()]}, path)
    with pytest.raises(OutputError, match="cannot be read"):
        run.load(4)
    assert not (run.root / "evil").exists()


def test_a_disk_that_is_full_is_one_sentence_and_the_last_checkpoint_stays(run):
    save(run, 1)
    big = {"image_proj.w": torch.zeros(100_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written") as error:
            save(run, 2, weights=big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(run.folder(2)) in sentence(error)
    assert run.steps() == [1]
    run.load(1)
    run.start(described(), resume=True)
    save(run, 2, weights=big)
    assert run.steps() == [1, 2]
