"""The trainer's command line: every mistake is one sentence and exit code 2, and nothing was written."""

import hashlib
import json
import re
import resource
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import pipeline.train.__main__ as trainer
from pipeline.shared.bases import find_base
from pipeline.train.adapters import NAMES as VARIANT_NAMES
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.adapters.released import read_released
from pipeline.train.adapters.variants import VARIANTS
from pipeline.train.base_model import Base
from pipeline.train.export import described
from pipeline.train.job import Call, prepared
from pipeline.train.settings import TrainConfig

pytestmark = pytest.mark.usefixtures("loaded_once")

QUICK = ("--base", "tiny", "--steps", "1", "--set", "adapter.lora_rank=4")
FACEID = ("--variant", "faceid", *QUICK)
NAME = "ip-adapter-faceid_sd15"


class Cli:
    """Calls the trainer's command line in this process."""

    def __init__(self, monkeypatch, capsys):
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words):
        """Exit code, stdout, stderr."""
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self._monkeypatch.setattr(sys, "argv", ["faceshards-train", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            trainer.main()
        said = self._capsys.readouterr()
        return int(done.value.code or 0), said.out, said.err

    def refused(self, *words):
        """The one sentence that a mistake gets."""
        before = contents(Path.cwd())
        code, out, err = self(*words)
        assert (code, out) == (2, ""), err
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert contents(Path.cwd()) == before, "something was written"
        return lines[0]


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return Cli(monkeypatch, capsys)


@pytest.fixture
def copy(dataset, tmp_path):
    """A dataset that may be damaged."""
    return Path(shutil.copytree(dataset, tmp_path / "copy", ignore=shutil.ignore_patterns("drops", "*.html")))


@pytest.fixture(scope="module")
def real(dataset, tmp_path_factory):
    """A run of two steps, with a checkpoint of each; test_train_resume has one of the command in its own process."""
    out = tmp_path_factory.mktemp("real") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with pytest.MonkeyPatch.context() as patch:
        words = ["--from-shards", str(dataset), *FACEID, "--steps", "2", "--set", "watch.save_every=1"]
        patch.setattr(sys, "argv", ["faceshards-train", *words, "--out", str(out)])
        with pytest.raises(SystemExit) as done:
            trainer.main()
    assert not done.value.code
    return out


# --- what works ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["--from-shards DIR", "--from-shards=DIR", "DIR", "--from-shards DIR COPY", "run DIR"])
def test_shards_are_given_in_many_ways(how, cli, dataset, copy, monkeypatch):
    jobs, places = [], {"DIR": str(dataset), "COPY": str(copy)}
    monkeypatch.setattr("pipeline.train.loop.train", lambda job: jobs.append(job) or 0)
    words = [re.sub("DIR|COPY", lambda found: places[found[0]], word) for word in how.split()]
    code, _, err = cli(*words, *FACEID, "--out", "run")
    assert code == 0, err
    (job,) = jobs
    assert job.dataset.samples == 9 * ("COPY" in how) + 9
    assert job.run.root == Path("run")


def test_two_datasets_are_trained_on_as_one_and_options_and_files_and_pairs_are_all_heard(
    cli, dataset, copy, monkeypatch
):
    jobs = []
    monkeypatch.setattr("pipeline.train.loop.train", lambda job: jobs.append(job) or 0)
    Path("more.toml").write_text("seed = 5\n[optim]\nlr = 1e-3\nweight_decay = 0.5\n")
    words = ["--config", "more.toml", "--set", "optim.lr=2e-3", "--seed", "6", "--preset", "tiny"]
    code, _, err = cli("--from-shards", dataset, copy, *FACEID, "--out", "run", *words)
    assert code == 0, err
    (job,) = jobs
    assert job.dataset.samples == 18
    told = job.config
    assert (told.seed, told.optim.lr, told.optim.weight_decay) == (6, 2e-3, 0.5)
    assert told.data.resolution == 64


def test_the_sdxl_presets_take_the_sdxl_like_tiny_base(cli, dataset, monkeypatch):
    jobs, words = [], ["--preset", "sdxl-512"]
    monkeypatch.setattr("pipeline.train.loop.train", lambda job: jobs.append(job) or 0)
    code, _, err = cli("--from-shards", dataset, "--variant", "faceid", "--out", "run", *words)
    assert code == 0, err
    (job,) = jobs
    assert (job.base.name, job.preset, job.config.data.batch_size) == ("tiny-sdxl", "sdxl-512", 8)


def test_embedded_shards_train_a_real_base_where_that_is_allowed(cli, dataset, monkeypatch):
    monkeypatch.setenv("FACESHARDS_MODELS", str(Path.cwd() / "models"))
    Path("models").mkdir()
    Path("models/sd15").symlink_to(find_base("tiny").folder)
    words = ["--from-shards", dataset, "--variant", "faceid", "--steps", "1", "--out", "run", "--base", "sd15"]
    words += ["--set", "data.resolution=64", "--set", "data.workers=0", "--set", "adapter.lora_rank=4"]
    assert "`embedded` profile" in cli.refused(*words)
    code, _, err = cli(*words, "--set", "data.allow_embedded=true")
    assert code == 0, err
    assert "warning: these shards" in err
    told = json.loads(Path("run", f"{NAME}.json").read_text())
    assert (told["base"], told["preset"]) == ("sd15", "sd15")
    assert "CreativeML OpenRAIL-M" in told["licences"]


def test_a_released_adapter_is_a_starting_point(cli, dataset, real):
    start = real / f"{NAME}.bin"
    words = ["--from-shards", dataset, *FACEID, "--init-from", start, "--set", "optim.lr=1e-12"]
    words += ["--set", "optim.weight_decay=0"]
    code, _, err = cli(*words, "--out", "run")
    assert code == 0, err
    before, after = read_released(start), read_released(Path("run", f"{NAME}.bin"))
    assert all((before[key].float() - after[key].float()).abs().max() < 1e-6 for key in before)
    began_as = json.loads(Path("run", f"{NAME}.json").read_text())["init_from"]
    assert (began_as["name"], began_as["is_known"]) == (start.name, True)


def test_licences_and_lineage_of_a_starting_point_go_on(dataset, real, tmp_path):
    start = Path(shutil.copy(real / f"{NAME}.bin", tmp_path / "start.bin"))
    sha256 = hashlib.sha256(start.read_bytes()).hexdigest()
    papers = {
        "variant": "faceid",
        "recipe": {},
        "licences": ["not for sale"],
        "dataset": {"digest": "d", "lineage": ["x", "d"]},
    }

    def sidecar(start):
        adapter = {"init_from": str(start), "lora_rank": 4}
        job = prepared(Call((str(dataset),), "faceid", "tiny", tmp_path / "run", options={"adapter": adapter}))
        unet = Base(job.base, torch.device("cpu"), torch.float32).unet
        return described(job, AdapterModel(unet, job.variant, job.widths, job.config.adapter))["sidecar"]

    alone = sidecar(start)
    assert alone["init_from"] == {
        **{"name": "start.bin", "sha256": sha256, "licences": ["unknown (start.bin)"]},
        **{"lineage": [], "is_known": False},
    }
    start.with_suffix(".json").write_text(json.dumps(papers))
    known = sidecar(start)
    assert {"not for sale", "Apache-2.0"} <= {*known["licences"]}
    assert known["dataset"]["lineage"] == [known["dataset"]["digest"], "x", "d"]
    assert known["init_from"]["is_known"]
    # Two stages: what was not known once stays so.
    stage = Path(shutil.copy(start, tmp_path / "stage.bin"))
    stage.with_suffix(".json").write_text(json.dumps(alone))
    second = sidecar(stage)
    assert "unknown (start.bin)" in second["licences"]
    assert not second["init_from"]["is_known"]


def test_help_and_config_tell_everything(cli, monkeypatch):
    assert list(VARIANTS) == list(VARIANT_NAMES)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = cli("--help")
    assert code == 0
    options = "--from-shards --variant --base --out --steps --preset --resume --image-encoder --init-from --seed"
    for option in (*options.split(), "--config", "--set", *VARIANTS, "sdxl-1024", "dinov2", "export RUN"):
        assert option in out, option
    code, out, _ = cli("export", "--help")
    assert code == 0
    assert "--step" in out
    code, out, _ = cli("config")
    assert code == 0
    for section, model in TrainConfig.model_fields.items():
        fields = getattr(model.annotation, "model_fields", None)
        for name in [f"{section}.{field}" for field in fields] if fields else [section]:
            assert name in out, name


# --- export ----------------------------------------------------------------------------------------------------------


def test_export_writes_the_same_files_again(cli, real):
    run = real
    before = {path.name: path.read_bytes() for path in run.glob("ip-adapter*")}
    assert len(before) == 4
    for path in run.glob("ip-adapter*"):
        path.unlink()
    code, out, err = cli("export", run)
    assert code == 0, err
    assert {path.name: path.read_bytes() for path in run.glob("ip-adapter*")} == before
    assert set(out.split()) == {str(run / name) for name in before}


def test_export_takes_an_earlier_checkpoint_and_another_folder(cli, real):
    run = real
    code, _, err = cli("export", run, "--step", "1", "--out", "other/place")
    assert code == 0, err
    first = run / "checkpoints" / "step-00000001" / f"{NAME}.safetensors"
    written = Path("other/place", f"{NAME}.safetensors").read_bytes()
    assert written == first.read_bytes()
    assert written != (run / f"{NAME}.safetensors").read_bytes()
    assert json.loads(Path("other/place", f"{NAME}.json").read_text())["steps"] == 1


def test_export_names_the_files_of_a_folder_that_looks_like_markup(cli, real):
    code, out, err = cli("export", real, "--out", "[v2]/:cat:")
    assert code == 0, err
    assert set(out.split()) == set(map(str, Path("[v2]/:cat:").glob("ip-adapter*")))


def test_export_of_a_run_of_an_earlier_release_says_what_it_did_not(cli, real):
    run = Path(shutil.copytree(real, "run"))
    description = json.loads((run / "run.json").read_text())
    notes = description["sidecar"].pop("loading")
    del description["sidecar"]["init_from"], description["sidecar"]["dataset"]["lineage"], description["watch"]
    (run / "run.json").write_text(json.dumps(description))
    code, _, err = cli("export", run, "--out", "again")
    assert code == 0, err
    assert notes
    assert json.loads(Path("again", f"{NAME}.json").read_text())["loading"] == notes
    assert all(note in Path("again/README.md").read_text() for note in notes)


def test_export_refuses_what_is_no_run(cli, real):
    run = real
    assert "step 7" in cli.refused("export", run, "--step", "7")
    assert "1, 2" in cli.refused("export", run, "--step", "7")
    assert "holds no run" in cli.refused("export", "nowhere")
    Path("empty").mkdir()
    assert "holds no run" in cli.refused("export", "empty")
    Path("empty/run.json").write_bytes((run / "run.json").read_bytes())
    assert "no checkpoint" in cli.refused("export", "empty")
    Path("empty/run.json").write_text("{")
    assert "cannot be read" in cli.refused("export", "empty")
    Path("empty/run.json").write_text("{}")
    assert "cannot be read" in cli.refused("export", "empty")
    Path("file").write_text("")
    assert "file" in cli.refused("export", run, "--out", "file/below")


def test_report_writes_the_page_again_and_refuses_what_is_no_run(cli, real):
    path = Path(shutil.copytree(real, "run")) / "report.html"
    before = path.read_bytes()
    path.unlink()
    code, out, _ = cli("report", "run")
    assert (code, out) == (0, "run/report.html\n")
    assert abs(len(path.read_bytes()) - len(before)) < 10, "all but the time"
    assert "holds no run" in cli.refused("report", "nowhere")
    Path("run/metrics.jsonl").write_text("[]\n")
    assert "metrics.jsonl cannot be read" in cli.refused("report", "run")


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variant", "faceidd"], ["'faceidd'", *VARIANTS]),
        ([], ["--variant", *VARIANTS]),
        (["--variant", "faceid", "--base", "sd16"], ["'sd16'", "did you mean sd15", "tiny-sdxl"]),
        (["--variant", "faceid", "--base", "/no/such/folder"], ["/no/such/folder"]),
        (["--variant", "faceid", "--base", "."], ["no whole diffusers folder", "unet"]),
        (["--variant", "faceid", "--base", "sd15"], ["`embedded`", "data.allow_embedded=true", "--base tiny"]),
        (["--variant", "faceid", "--base", "sdxl"], ["`embedded`"]),
        (["--variant", "faceid", "--preset", "sd"], ["'sd'", "sdxl-1024"]),
        (["--variant", "faceid", "--preset", "sdxl-512", "--base", "tiny-sdxl", "--set", "data.resolution=8"], ["64"]),
        (["--variant", "faceid", "--preset", "sd15", "--base", "tiny-sdxl"], ["preset sd15", "tiny-sdxl"]),
        ([*FACEID, "--set", "optim.lrr=1"], ["optim.lrr", "optim.lr"]),
        ([*FACEID, "--set", "optim"], ["key=value"]),
        ([*FACEID, "--set", "optim.lr=fast"], ["optim.lr"]),
        ([*FACEID, "--set", "optim.lr=-1"], ["optim.lr"]),
        ([*FACEID, "--set", "optim.betas=[1.5, 0.9]"], ["'optim.betas.0' has the value 1.5", "less than 1"]),
        ([*FACEID, "--set", "watch.validate_prompts=[]"], ["'watch.validate_prompts'", "at least 1 item"]),
        ([*FACEID, "--set", "watch.validate_steps=1001"], ["'watch.validate_steps'", "less than or equal to 1000"]),
        ([*FACEID, "--set", f"adapter.lora_rank={10**14}"], ["'adapter.lora_rank'", "less than or equal to 8192"]),
        ([*FACEID, "--set", "optim.betas=[true,0.9]"], ["optim.betas", "give a number"]),
        ([*FACEID, "--set", f"optim.accumulate={10**20}"], ["optim.accumulate", "less than"]),
        ([*FACEID, "--set", "guidance.p_uncond_both=1"], ["guidance.p_uncond_image", "more than 1"]),
        ([*FACEID, "--set", "data.crops={portrait=0, half=0, full=0}"], ["data.crops.portrait", "all 0"]),
        ([*FACEID, "--steps", "0"], ["steps"]),
        (["--resume"], ["--variant", "with --resume too"]),
        ([*FACEID, "--config", "none.toml"], ["none.toml", "cannot be read"]),
        ([*FACEID, "--image-encoder", "clip"], ["adapter.image_encoder"]),
        ([*FACEID, "--set", "optim.precision=fp16"], ["fp16", "GPU"]),
        ([*FACEID, "--set", "watch.hook=nowhere:log"], ["nowhere:log"]),
        ([*FACEID, "--set", "optim.eight_bit=true"], ["bitsandbytes"]),
        ([*FACEID, "--set", "objective.id_loss=1"], ["objective.id_loss_weights", "https://"]),
        (
            [*FACEID, "--set", "objective.id_loss=1", "--set", "objective.id_loss_weights=no.pth"],
            ["no.pth", "does not exist"],
        ),
        ([*FACEID, "--set", "watch.validate_every=1", "--set", "watch.judge=nopack"], ["watch.judge", "nopack"]),
        ([*FACEID, "--init-from", "no.safetensors"], ["no.safetensors", "does not exist"]),
        (["--variant", "plus", *QUICK, "--image-encoder", "dinov2"], ["dino.npy", "models.image_embedder=dinov2"]),
        ([*FACEID, "--set", "data.latents=shards"], ["latents", "--with latents"]),
        ([*FACEID, "--set", "data.text=shards"], ["text", "--with text"]),
        ([*FACEID, "--out", "file/run"], ["file/run", "cannot be"]),
        ([*FACEID, "--out", "file"], ["file", "cannot be"]),
        ([*FACEID, "--out", ""], ["is empty"]),
        ([*FACEID, "--preset", ""], ["--preset is empty: "]),
        ([*FACEID, "--out", "s3://bucket/run"], ["s3://bucket/run is a URL", "this machine"]),
        ([*FACEID, "--out", "caf\udce9"], ["no Unicode"]),
        ([*FACEID, "--seed", str(2**64)], ["seed"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) and "--variant" in value else None,
)
def test_a_wrong_call_is_one_sentence_and_writes_nothing(words, said, cli, dataset, monkeypatch):
    monkeypatch.delenv("FACESHARDS_MODELS", raising=False)
    late = "shards were hashed, which may take hours, before a mistake was shown"
    monkeypatch.setattr("pipeline.train.loader.dataset._sha256", lambda shard: pytest.fail(late))
    Path("file").write_text("")
    line = cli.refused("--from-shards", dataset, *words)
    for each in said:
        assert each in line


def test_shards_without_a_sample_of_the_kind_leave_no_run_behind(cli, dataset):
    line = cli.refused("--from-shards", dataset, *FACEID, "--set", "data.kinds.web=0", "--out", "run")
    assert "data.kinds" in line
    assert not Path("run").exists()


def test_a_dir_that_is_no_dataset_is_one_sentence(cli):
    Path("empty").mkdir()
    line = cli.refused("--from-shards", *FACEID)
    assert re.search(r"\bout\b", line)
    assert "empty" in cli.refused("--from-shards", "empty", *FACEID)
    assert "nowhere" in cli.refused("--from-shards", "nowhere", *FACEID)
    assert "'sd16'" in cli.refused("--from-shards", "nowhere", "--variant", "faceid", "--base", "sd16")
    assert "nowhere" in cli.refused("--from-shards=nowhere", *FACEID)
    assert "A DIR of --from-shards cannot be opened: The name of a folder or URL is empty" in cli.refused(
        "--from-shards", "", *FACEID
    )
    assert "bucket" in cli.refused("--from-shards", "nocloud://bucket/out", *FACEID)


@pytest.mark.parametrize(("local", "lines"), [("0", 1), ("1", 0)])
def test_each_machine_says_once_what_it_lacks(local, lines, cli, monkeypatch):
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", local)
    code, _, err = cli("--from-shards", "nowhere", *FACEID)
    assert code == 2
    assert err.count("error: nowhere does not exist") == err.count("\n") == lines


def test_a_run_that_is_there_is_not_trained_over(cli, dataset, real):
    run = real
    before = contents(run)
    assert "--resume" in cli.refused("--from-shards", dataset, *FACEID, "--out", run)
    assert contents(run) == before


def test_an_adapter_of_another_variant_is_no_starting_point(cli, dataset, real):
    start = real / f"{NAME}.safetensors"
    line = cli.refused("--from-shards", dataset, "--variant", "plus", *QUICK, "--init-from", start)
    assert str(start) in line
    assert "plus" in line
    damaged = Path("damaged.safetensors")
    damaged.write_bytes(start.read_bytes()[:-100])
    assert "damaged.safetensors" in cli.refused("--from-shards", dataset, *FACEID, "--init-from", damaged)


def flip(path, place):
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_shard_with_a_flipped_byte_is_refused_by_name(cli, copy):
    (tar,) = copy.glob("shards/*.tar")
    flip(tar, tar.stat().st_size // 2)
    assert tar.name in cli.refused("--from-shards", copy, *FACEID)


def test_a_truncated_tar_is_refused_by_name(cli, copy):
    (tar,) = copy.glob("shards/*.tar")
    tar.write_bytes(tar.read_bytes()[:-20_000])
    assert tar.name in cli.refused("--from-shards", copy, *FACEID)
    assert tar.name in cli.refused("--from-shards", copy, *FACEID, "--set", "data.verify=size")


def test_a_missing_tar_manifest_or_features_are_refused_by_name(cli, copy):
    features = copy / "unconditional.safetensors"
    flip(features, -1)
    assert features.name in cli.refused("--from-shards", copy, "--variant", "plus", *QUICK)
    features.unlink()
    assert features.name in cli.refused("--from-shards", copy, "--variant", "plus", *QUICK)
    (tar,) = copy.glob("shards/*.tar")
    tar.unlink()
    assert tar.name in cli.refused("--from-shards", copy, *FACEID)
    tar.with_suffix(".json").unlink()
    assert "copy" in cli.refused("--from-shards", copy, *FACEID)


def test_a_sample_that_is_damaged_behind_the_manifest_s_back_names_shard_and_key(cli, copy):
    """Lengths alone were compared, so it shows when it is read."""
    (tar,) = copy.glob("shards/*.tar")
    with tarfile.open(tar) as members:
        place = next(member.offset_data for member in members if member.name.endswith(".arcface.npy"))
    flip(tar, place)
    code, _, err = cli("--from-shards", copy, *FACEID, "--out", "run", "--set", "data.verify=size", "--steps", "9")
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert tar.name in last
    assert re.search(r"sample-\d+\.arcface\.npy", last)
    assert not list(Path("run").glob("*.safetensors"))


def test_a_disk_that_fills_up_on_the_way_is_partial_work(cli, dataset, real):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        code, _, err = cli("--from-shards", dataset, *FACEID, "--out", "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 3
    assert "cannot be written" in err.splitlines()[-1]
    assert "--resume goes on" in err.splitlines()[-1]


def test_a_gpu_whose_memory_is_full_is_one_sentence(cli, dataset, monkeypatch):
    def train(job):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nException raised from malloc")

    monkeypatch.setattr("pipeline.train.loop.train", train)
    code, _, err = cli("--from-shards", dataset, *FACEID)
    assert code == 3
    assert err.splitlines()[-1].startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. Set optim.gradient_")
