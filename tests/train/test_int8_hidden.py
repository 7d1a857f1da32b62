"""`pack.hidden = int8`, from the bundled sample to trained weights, beside the same in float16."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from sample_runs import remembered_models
from typer.testing import CliRunner
from webdataset.autodecode import Decoder, imagehandler
from webdataset.tariterators import group_by_keys, tar_file_expander

import pipeline.train.loop as trainer
from pipeline.__main__ import app
from pipeline.dataset.finished.verify import verify
from pipeline.train.adapters.variants import VARIANTS
from pipeline.train.inputs import Preparer
from pipeline.train.job import Call, prepared
from pipeline.train.loader.dataset import open_dataset
from pipeline.train.settings import DataSettings
from pipeline.train.watch import METRICS
from schemas.errors import ExitCode, OutputError
from schemas.int8 import decode_int8, dequantise
from schemas.shard import UNCONDITIONAL, decode_npy

DOCS = Path(__file__).resolve().parents[2] / "docs"
TAR = "shards/sample-00000.tar"
READS_HIDDEN = [name for name, variant in VARIANTS.items() if "hidden" in variant.reads]
_ALWAYS = "faceid-plusv2"

pytestmark = pytest.mark.usefixtures("loaded_once")


def make_dataset(out, *words):
    with remembered_models():
        return CliRunner().invoke(app, ["dataset", "--out", str(out), "--executor", "local", *words])


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """The OUT of the bundled sample; tests must not write to it."""
    out = tmp_path_factory.mktemp("int8") / "out"
    done = make_dataset(out, "--set", "pack.hidden=int8")
    assert done.exit_code == 0, done.output
    return out


def members(out):
    with tarfile.open(out / TAR) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def cosine(one, other):
    one, other = one.astype(np.float64), other.astype(np.float64)
    return (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)


def test_all_but_the_hidden_states_is_as_in_float16_and_these_are_half_as_large(dataset, int8):
    assert verify(int8) == []
    usual, found = members(dataset), members(int8)
    hidden = sorted(name for name in usual if name.endswith(".clip_hidden.npy"))
    assert len(hidden) == 9
    for name in hidden:
        before, after = usual.pop(name), found.pop(name.replace(".npy", ".safetensors"))
        assert len(after) <= 0.52 * len(before)
        exact, values = decode_npy(before), dequantise(decode_int8(after))
        assert cosine(exact, values).min() >= 0.9995
        assert cosine(exact.ravel(), values.ravel()) >= 0.9999
    assert found == usual
    assert (int8 / UNCONDITIONAL).read_bytes() == (dataset / UNCONDITIONAL).read_bytes()


def test_the_documented_three_lines_read_it(int8):
    text = (DOCS / "training.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "safetensors.numpy" in block]
    assert len([line for line in code.splitlines() if line]) == 3
    # What WebDataset(…).decode("rgb8") does, with a file that is closed.
    with (int8 / TAR).open("rb") as stream:
        files = tar_file_expander([{"url": TAR, "stream": stream}])
        samples = list(map(Decoder([imagehandler("rgb8")]), group_by_keys(files)))
    assert len(samples) == 9
    for sample in samples:
        names = {"sample": sample}
        exec(code, names)
        assert (names["hidden"] == dequantise(decode_int8(sample["clip_hidden.safetensors"]))).all()


def test_a_finished_dataset_does_not_go_on_in_the_other_form(int8, tmp_path):
    out = Path(shutil.copytree(int8, tmp_path / "out"))
    done = make_dataset(out)
    assert isinstance(done.exception, OutputError)
    assert "another plan (pack.hidden was 'int8'" in str(done.exception)
    assert make_dataset(out, "--set", "pack.hidden=int8").exit_code == 0


@pytest.mark.long
def test_a_take_down_leaves_the_other_samples_as_they_are(int8, tmp_path):
    out = Path(shutil.copytree(int8, tmp_path / "out"))
    before = members(out)
    gone = next(name for name in before if name.endswith(".json")).partition(".")[0]
    url = json.loads(before[f"{gone}.json"])["url"]
    done = CliRunner().invoke(app, ["forget", str(out), "--url", url])
    assert done.exit_code == 0, done.output
    assert verify(out) == []
    assert members(out) == {name: data for name, data in before.items() if not name.startswith(f"{gone}.")}


def train(shards, out, name, steps, *pairs, **told):
    """A run on the tiny base, as the command line makes it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    pairs = ("adapter.lora_rank=4", "data.workers=0", "watch.save_every=2", *pairs)
    job = prepared(Call(tuple(map(str, shards)), name, "tiny", out, pairs=pairs, options={"steps": steps}, **told))
    assert trainer.train(job) == ExitCode.OK
    return job


def losses(job):
    return [json.loads(line)["loss"] for line in (job.run.root / METRICS).read_text().splitlines()]


def weights(job):
    return load_file(job.run.folder(job.run.steps()[-1]) / "adapter.safetensors")


@pytest.mark.parametrize(
    "name", [name if name == _ALWAYS else pytest.param(name, marks=pytest.mark.long) for name in READS_HIDDEN]
)
@pytest.mark.usefixtures("no_release")
def test_every_variant_is_given_nearly_the_same_from_either_form(dataset, int8, tmp_path, name, monkeypatch):
    given, prepare = [], Preparer.__call__

    def noted(self, batch):
        given.append(prepare(self, batch))
        return given[-1]

    monkeypatch.setattr(Preparer, "__call__", noted)
    usual, found = (losses(train([out], tmp_path / out.parent.name, name, 2)) for out in (dataset, int8))
    assert found == pytest.approx(usual, rel=1e-3)
    assert found != usual
    for one, other in zip(given[:2], given[2:], strict=True):
        exact, values = one.condition["hidden"], other.condition["hidden"]
        assert exact.dtype == values.dtype == torch.float32
        # So the cosine is 0.9995 or more; "no face" has a token of zeros.
        assert ((values - exact).norm(dim=-1) <= 0.0315 * exact.norm(dim=-1)).all()


@pytest.mark.long
@pytest.mark.usefixtures("no_release")
def test_both_forms_train_together_and_validation_reads_either(dataset, int8, tmp_path):
    assert open_dataset([str(dataset), str(int8)], DataSettings()).samples == 18
    pairs = ("watch.validate_every=2", "watch.validate_faces=1", "watch.validate_steps=1", "data.shuffle=18")
    job = train([int8, dataset], tmp_path / "run", "plus-face", 2, *pairs)
    assert all(loss > 0 for loss in losses(job))
    assert (job.run.root / "validation" / "step-00000002.png").exists()


@pytest.mark.long
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.usefixtures("no_release")
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_interrupted(dataset, int8, tmp_path, mixed):
    shards = [int8, dataset] if mixed else [int8]
    whole = train(shards, tmp_path / "whole", "faceid-plusv2", 3)
    train(shards, tmp_path / "run", "faceid-plusv2", 1)
    resumed = train(shards, tmp_path / "run", "faceid-plusv2", 3, resume=True)
    assert losses(resumed) == losses(whole)
    first, second = weights(whole), weights(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
