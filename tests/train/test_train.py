"""Real runs on the bundled sample's shards: what they write, that diffusers computes the same, that options count."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from sample_runs import remembered_models
from tiny_adapters import TOKENS, WITH_LORA, by_default

import pipeline.train.loop as trainer
from pipeline.train import objective
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.adapters.released import read_released, require_fit
from pipeline.train.adapters.variants import variant
from pipeline.train.base_model import Base
from pipeline.train.export import described, export_run, loading
from pipeline.train.job import Call, prepared
from pipeline.train.session import Session
from pipeline.train.settings import ObjectiveSettings, OptimSettings
from pipeline.train.watch import METRICS
from schemas.arcface import PACK_FILES
from schemas.errors import ConfigError, ExitCode, OutputError

pytestmark = pytest.mark.usefixtures("loaded_once")

CPU = torch.device("cpu")
BASES = {"sd15": "tiny", "sdxl": "tiny-sdxl"}
SMALL = ("adapter.lora_rank=4", "data.verify=size")
RANK = 4
RUN = {"README.md", "checkpoints", METRICS, "history.jsonl", "report.html", "run.json", "tensorboard"}


def train(dataset, out, *pairs, name="faceid", base="tiny", steps=2, code=ExitCode.OK, **told):
    """A run in this process, as the command line makes it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    job = prepared(Call((str(dataset),), name, base, out, pairs=(*SMALL, *pairs), options={"steps": steps, **told}))
    assert trainer.train(job) == code
    return job


@pytest.fixture(scope="module")
def kept():
    """The last session and base that a run made."""
    last = SimpleNamespace(session=None, base=None)

    class KeptSession(Session):
        def __init__(self, *given):
            super().__init__(*given)
            last.session = self

    class KeptBase(Base):
        def __init__(self, *given):
            super().__init__(*given)
            last.base = self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Session", KeptSession)
        patch.setattr(trainer, "Base", KeptBase)
        yield last


def metrics(job):
    return [json.loads(line) for line in (job.run.root / METRICS).read_text().splitlines()]


def weights(job, file="adapter"):
    """What the last checkpoint holds, in float32."""
    return load_file(job.run.folder(job.run.steps()[-1]) / f"{file}.safetensors")


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


def distance(first, second):
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


# --- every variant on both layouts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_and_model(kept, dataset, tmp_path_factory):
    """Two steps of faceid without any option, and what they trained."""
    job = train(dataset, tmp_path_factory.mktemp("plain") / "out")
    return job, kept.session.model


# adapters/ has network, gradients and files of every variant.
@pytest.fixture(scope="module", params=by_default("faceid-sd15"))
def run(request, plain_and_model, kept, dataset, tmp_path_factory):
    """Two steps of a variant on a base: in the first, what stands before zeros has no gradient yet."""
    name, kind = request.param
    base = BASES[kind]
    if request.param == ("faceid", "sd15"):
        job, model = plain_and_model
        return SimpleNamespace(job=job, name=name, base=base, kind=kind, model=model)
    job = train(dataset, tmp_path_factory.mktemp("run") / "out", name=name, base=base)
    return SimpleNamespace(job=job, name=name, base=base, kind=kind, model=kept.session.model)


def released(run):
    return run.job.variant.released_name(run.kind, "clip-vit-h")


def test_a_run_leaves_the_released_files_and_nothing_else(run):
    name, root = released(run), run.job.run.root
    files = {f"{name}.safetensors", f"{name}.bin", f"{name}.json"}
    if run.name in WITH_LORA:
        files.add(f"{name}_lora.safetensors")
    assert {path.name for path in root.iterdir()} == files | RUN
    assert {path.name for path in (root / "checkpoints").iterdir()} == {".lock", "step-00000002"}
    checkpoint = root / "checkpoints" / "step-00000002"
    assert {path.name for path in checkpoint.iterdir()} == files | {"adapter.safetensors", "state.pt"}
    for file in files:
        assert (checkpoint / file).read_bytes() == (root / file).read_bytes()
    card, sidecar = (root / "README.md").read_text(), json.loads((root / f"{name}.json").read_bytes())
    assert all(note in card for note in sidecar["loading"])
    assert all(licence in card for licence in sidecar["licences"])


def test_every_trained_weight_moved_and_the_base_did_not(run):
    fresh = Base(run.job.base, CPU, torch.float32)
    frozen = dict(fresh.unet.named_parameters())
    trained = {id(weight) for weight in run.model.trained().values()}
    left = {key: weight for key, weight in run.model.unet.named_parameters() if id(weight) not in trained}
    for key, weight in left.items():
        assert torch.equal(weight, frozen[key]), key
        assert weight.grad is None
    torch.manual_seed(run.job.config.seed)
    start = AdapterModel(fresh.unet, run.job.variant, run.job.widths, run.job.config.adapter).trained()
    still = [key for key, weight in run.model.trained().items() if torch.equal(weight, start[key])]
    assert not still, "these were not trained"


def test_the_file_holds_the_trained_weights_in_half_precision_and_reads_back_strictly(run):
    path = run.job.run.root / f"{released(run)}.safetensors"
    tensors = read_released(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert same(tensors, {key: weight.half() for key, weight in run.model.trained().items()})
    assert same(tensors, read_released(path.with_suffix(".bin")))
    again = AdapterModel(
        Base(run.job.base, CPU, torch.float32).unet, run.job.variant, run.job.widths, run.job.config.adapter
    )
    require_fit(path, tensors, again.trained(), run.name)
    again.load_trained(tensors)


def test_the_sidecar_tells_all_about_the_adapter(run):
    told = json.loads((run.job.run.root / f"{released(run)}.json").read_text())
    assert (told["variant"], told["base"], told["kind"]) == (run.name, run.base, run.kind)
    assert (told["num_tokens"], told["steps"], told["image_encoder"]) == (TOKENS[run.name], 2, "clip-vit-h")
    assert told["lora_rank"] == (RANK if run.name in WITH_LORA else 0)
    assert told["shortcut"] == (run.name == "faceid-plusv2")
    assert tuple(told["condition"]) == run.job.variant.reads
    assert told["loading"] == loading(run.job.variant, run.kind, "clip-vit-h", "segmented", [])
    assert told["preset"] == "tiny"
    assert told["recipe"]["optim"]["lr"] == 1e-4
    assert told["recipe"]["guidance"]["p_uncond_both"] == 0.05
    digest = run.job.dataset.digest
    assert told["dataset"] == {"digest": digest, "profiles": ["embedded"], "samples": 9, "lineage": [digest]}
    assert [weight["name"] for weight in told["weights"]].count(run.base) == 1
    assert {model["name"] for model in run.job.dataset.models} < {weight["name"] for weight in told["weights"]}
    assert set(told["licences"]) == {weight["licence"] for weight in told["weights"]}
    assert all(told["licences"])
    assert str(run.job.run.root.parent) not in json.dumps(told), "a path of this machine"


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", TOKENS)
def test_a_file_says_how_its_variant_is_loaded(name, kind):
    notes = loading(variant(name), kind, "clip-vit-h", "segmented", [])
    assert [
        any(word in note for note in notes)
        for word in ("peft", "image_projection_layers[0].shortcut = True", "alone, on the fill", "SDXL")
    ] == [
        name in WITH_LORA,
        name == "faceid-plusv2",
        bool({"hidden", "pooled"} & {*variant(name).reads}),
        kind == "sdxl" and name in ("full-face", "faceid-plus"),
    ]


def test_a_file_says_whose_id_vectors_it_wants_where_programs_would_take_others():
    def says(name, sha256, task="face_embedder"):
        models = [{"name": "auraface", "task": task, "sha256": sha256}]
        return any("auraface" in note for note in loading(variant(name), "sd15", "clip-vit-h", "plain", models))

    assert says("faceid", "a" * 64)
    assert not says("plus", "a" * 64), "it reads none"
    assert not says("faceid", PACK_FILES["w600k_r50"][1]), "buffalo_l's"
    assert not says("faceid", ""), "a stand-in, of which the trainer warns"
    assert not says("faceid", "a" * 64, task="detector")


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(plain_and_model):
    return plain_and_model[0]


def test_the_recogniser_of_the_id_loss_takes_part_and_so_does_its_licence(plain, kept, tmp_path):
    weights = tmp_path / "recogniser.pth"
    weights.write_bytes(b"weights")
    objective = ObjectiveSettings(id_loss=0.1, id_loss_weights=str(weights))
    job = replace(plain, config=plain.config.model_copy(update={"objective": objective}))
    sidecar = described(job, kept.session.model)["sidecar"]
    assert sidecar["weights"][-1]["task"] == "id_loss"
    assert "unknown (recogniser.pth)" in sidecar["licences"]
    assert "id_loss" not in {weight["task"] for weight in described(plain, kept.session.model)["sidecar"]["weights"]}


@pytest.mark.usefixtures("no_release")
def test_the_same_call_gives_the_same_weights_and_another_seed_others(plain, dataset, tmp_path):
    assert same(weights(train(dataset, tmp_path / "again")), weights(plain))
    assert not same(weights(train(dataset, tmp_path / "other", seed=1)), weights(plain))


# What the loader draws by its settings, and the objective by its own, is tested there with the same settings.
@pytest.mark.parametrize(
    "pair",
    [
        *("objective.face_weight=5", "guidance.p_uncond_text=0.9"),
        *(
            pytest.param(pair, marks=pytest.mark.long)
            for pair in (
                "objective.min_snr_gamma=1",
                "objective.noise_offset=0.5",
                "guidance.p_uncond_image=0.9",
                "data.crops={portrait=0, half=0, full=1}",
                "data.shuffle=1",
                "augment.flip=0",
                "augment.colour=1",
            )
        ),
    ],
)
@pytest.mark.usefixtures("no_release")
def test_what_a_batch_is_made_of_changes_the_loss(pair, plain, dataset, tmp_path):
    job = train(dataset, tmp_path / "out", pair, steps=1)
    assert metrics(job)[0]["loss"] != metrics(plain)[0]["loss"]


@pytest.mark.parametrize(
    "pair",
    [
        "optim.lr=1e-3",
        *(pytest.param(pair, marks=pytest.mark.long) for pair in ("optim.weight_decay=0.5", "optim.betas=[0.5, 0.9]")),
    ],
)
@pytest.mark.usefixtures("no_release")
def test_how_weights_move_changes_the_weights_and_not_the_first_loss(pair, plain, dataset, tmp_path):
    job = train(dataset, tmp_path / "out", pair)
    assert metrics(job)[0]["loss"] == metrics(plain)[0]["loss"]
    assert not same(weights(job), weights(plain))


@pytest.mark.long
@pytest.mark.usefixtures("no_release")
def test_plusv2_leaves_the_image_branch_alone_where_it_is_always_dropped(dataset, tmp_path, kept):
    """The gradient of a dropped branch is zero; moments and weight decay are no reason to move either."""
    pairs = ("adapter.p_drop_clip=1", "optim.weight_decay=0", "guidance.p_uncond_image=0", "guidance.p_uncond_both=0")
    job = train(dataset, tmp_path / "out", *pairs, name="faceid-plusv2")
    torch.manual_seed(job.config.seed)
    unet = Base(job.base, CPU, torch.float32).unet
    start = AdapterModel(unet, job.variant, job.widths, job.config.adapter).trained()
    for key, weight in weights(job).items():
        assert torch.equal(weight, start[key]) == ("perceiver_resampler" in key), key


@pytest.mark.usefixtures("no_release")
def test_the_gradient_is_clipped(plain, dataset, tmp_path):
    clipped = train(dataset, tmp_path / "clipped", "optim.max_grad_norm=1e-9")
    assert metrics(clipped)[0]["grad_norm"] == metrics(plain)[0]["grad_norm"], "the norm before clipping is told"
    # AdamW divides by the gradient's size, except where that is as small as its epsilon.
    moved, held = (weights(job)["image_proj.norm.bias"].abs().max() for job in (plain, clipped))
    assert held < 0.5 * moved
    free = train(dataset, tmp_path / "free", "optim.max_grad_norm=0", steps=1)
    assert "grad_norm" not in metrics(free)[0]


def test_the_average_is_exported_where_there_is_one(plain, dataset, tmp_path):
    job = train(dataset, tmp_path / "out", "optim.ema_decay=0.9")
    final, average = weights(job), weights(job, "average")
    exported = read_released(job.run.root / "ip-adapter-faceid_sd15.safetensors")
    assert same(exported, {key: weight.half() for key, weight in average.items()})
    assert distance(final, average) > 1e-5
    assert same(weights(plain), final), "an average must not change the training"
    (job.run.folder(2) / "average.safetensors").unlink()
    with pytest.raises(OutputError, match="lacks its averaged weights"):
        export_run(job.run.root, None, tmp_path / "exported")


@pytest.mark.usefixtures("no_release")
def test_gradient_checkpointing_computes_the_same(plain, dataset, tmp_path, monkeypatch):
    calls = []
    real = torch.utils.checkpoint.checkpoint

    def counted(*given, **options):
        calls.append(given)
        return real(*given, **options)

    counted.__func__ = counted
    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", counted)
    job = train(dataset, tmp_path / "out", "optim.gradient_checkpointing=true")
    assert calls, "nothing was checkpointed"
    assert metrics(job)[0]["grad_norm"] == pytest.approx(metrics(plain)[0]["grad_norm"], rel=1e-5)
    assert distance(weights(job), weights(plain)) < 1e-6


@pytest.mark.usefixtures("no_release")
def test_two_batches_of_one_are_a_batch_of_two(dataset, tmp_path, monkeypatch):
    def by_content(scheduler, latents, settings, generator):
        """Noise that follows from the sample alone, however samples are batched."""
        seeds = [int(1e4 * one.abs().sum().item()) for one in latents]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(n)) for n in seeds])
        steps = torch.tensor([seed % 1000 for seed in seeds])
        return objective.Noised(scheduler.add_noise(latents, noise, steps), noise, steps, noise)

    monkeypatch.setattr("pipeline.train.objective.noised", by_content)
    # Squares alone, so that batches of both sizes hold the same samples.
    whole = train(dataset, tmp_path / "whole", "data.buckets=false", "data.batch_size=2", steps=1)
    parts = train(dataset, tmp_path / "parts", "data.buckets=false", "data.batch_size=1", "optim.accumulate=2", steps=1)
    for first, second in zip(metrics(whole), metrics(parts), strict=True):
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    first, second = (torch.cat([weight.flatten() for weight in weights(job).values()]) for job in (whole, parts))
    # AdamW divides by the gradient's size: a weight whose gradient is rounding alone may go anywhere, but few are.
    farthest = 2 * OptimSettings().lr * math.sqrt(len(first))
    assert (first - second).norm() < 1e-3 * farthest


def test_a_variable_of_accelerate_s_changes_no_step(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    assert trainer.make_accelerator(OptimSettings(accumulate=2)).gradient_accumulation_steps == 2


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_a_launcher_that_spreads_weights_over_processes_is_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ConfigError, match="torchrun"):
        trainer.make_accelerator(OptimSettings())


@pytest.mark.usefixtures("no_release")
def test_the_learning_rate_warms_up_and_falls_as_a_cosine(dataset, tmp_path):
    pairs = ("optim.schedule=cosine", "optim.warmup_steps=2", "optim.lr=1e-3", "data.batch_size=1")
    told = [line["lr"] for line in metrics(train(dataset, tmp_path / "out", *pairs, steps=5))]
    # Of each step, the rate that it was made with: none at the very first, and none is left after the last.
    assert told == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 2.5e-4], abs=1e-7)


@pytest.mark.long
@pytest.mark.usefixtures("no_release")
def test_bf16_runs_without_a_gpu_and_trains_in_float32(plain, dataset, tmp_path, kept):
    job = train(dataset, tmp_path / "out", "optim.precision=bf16")
    assert kept.base.unet.conv_in.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in kept.session.trained.values()} == {torch.float32}
    first, second = metrics(job)[0]["loss"], metrics(plain)[0]["loss"]
    assert first != second
    assert first == pytest.approx(second, rel=0.05)
    assert 0 < distance(weights(job), weights(plain)) < 0.01


@pytest.mark.long
@pytest.mark.usefixtures("no_release")
def test_channels_last_computes_the_same(plain, dataset, tmp_path):
    job = train(dataset, tmp_path / "out", "optim.channels_last=true")
    assert metrics(job)[0]["loss"] == pytest.approx(metrics(plain)[0]["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory):
    """facexlib's ArcFace with random weights and a block of each width; with -m long a run has all 50 layers."""
    from facexlib.recognition.arcface_arch import Backbone, get_block

    blocks = [get_block(*widths, num_units=1) for widths in ((64, 64), (64, 128), (128, 256), (256, 512))]
    patch = pytest.MonkeyPatch()
    patch.setattr("facexlib.recognition.arcface_arch.get_blocks", lambda layers: blocks)
    with torch.device("meta"):
        shapes = Backbone(num_layers=50, drop_ratio=0.6, mode="ir_se").state_dict()
    generator = torch.Generator().manual_seed(0)
    made = {
        key: torch.zeros(like.shape, dtype=like.dtype)
        if not like.is_floating_point()
        else torch.rand(like.shape, generator=generator) * 0.2 + 0.9
        if like.ndim == 1
        else torch.randn(like.shape, generator=generator) / like[0].numel() ** 0.5
        for key, like in shapes.items()
    }
    path = tmp_path_factory.mktemp("weights") / "recognition_arcface_ir_se50.pth"
    torch.save(made, path)
    yield path
    patch.undo()
    path.unlink()


def test_the_id_loss_changes_the_gradients(plain, dataset, tmp_path, recogniser):
    pairs = ("objective.id_loss=10", "objective.id_loss_max_t=0.5", f"objective.id_loss_weights={recogniser}")
    job = train(dataset, tmp_path / "out", *pairs, steps=1)
    first, second = metrics(job)[0], metrics(plain)[0]
    assert first["loss"] > second["loss"]
    assert first["grad_norm"] != second["grad_norm"]
    told = json.loads((job.run.root / "ip-adapter-faceid_sd15.json").read_text())
    assert told["recipe"]["objective"]["id_loss_weights"] == recogniser.name


GRID = (
    "watch.validate_every=1",
    "watch.validate_faces=1",
    "watch.validate_steps=1",
    'watch.validate_prompts=["a face"]',
)


@pytest.mark.usefixtures("no_release")
def test_validation_draws_the_same_grids_each_time_and_disturbs_nothing(plain, dataset, tmp_path):
    jobs = [train(dataset, tmp_path / f"{steps}", *GRID, "optim.ema_decay=0.5", steps=steps) for steps in (2, 1)]
    first, second = ({p.name: p.read_bytes() for p in (job.run.root / "validation").iterdir()} for job in jobs)
    assert sorted(first) == ["step-00000001.png", "step-00000002.png"]
    assert second == {"step-00000001.png": first["step-00000001.png"]}
    assert first["step-00000001.png"] != first["step-00000002.png"], "the weights of a step are not in its grid"
    assert same(weights(jobs[0]), weights(plain))


# --- precomputed targets -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """The bundled sample with latents and texts of the tiny base."""
    from pipeline.__main__ import main

    out = tmp_path_factory.mktemp("encoded") / "out"
    asked = ["--with", "latents,text", "--set", "encode.base=tiny", "--set", "encode.resolution=64"]
    words = ["dataset", "--shards", "sample", "--out", str(out), "--executor", "local", *asked]
    with pytest.MonkeyPatch.context() as patch, remembered_models():
        patch.setattr(sys, "argv", ["faceshards", *words])
        with pytest.raises(SystemExit) as done:
            main()
    assert done.value.code == 0
    return out


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param((), id="plain", marks=pytest.mark.long),
        pytest.param(("watch.validate_every=2", "watch.validate_steps=1", "watch.validate_faces=1"), id="grids"),
    ],
)
@pytest.mark.usefixtures("no_release")
def test_precomputed_targets_train_without_the_encoders(pairs, encoded, tmp_path, kept, monkeypatch):
    told = []
    monkeypatch.setattr(Base, "encode_images", lambda *_: pytest.fail("an image was encoded"))
    real = Base.encode_text
    monkeypatch.setattr(Base, "encode_text", lambda base, captions: told.append(captions) or real(base, captions))
    job = train(encoded, tmp_path / "out", *pairs)
    assert told == [[""]], "only the empty caption is not in the shards"
    assert not {"vae", "_texts", "_encoder"} & vars(kept.base).keys(), "encoders are kept in memory"
    assert [line["step"] for line in metrics(job)] == [1, 2]


@pytest.mark.long
@pytest.mark.usefixtures("no_release")
def test_precomputed_text_is_what_captions_give(encoded, tmp_path):
    pairs = ("data.latents=images", "augment.flip=0", "data.batch_size=1")
    shards, captions = (
        train(encoded, tmp_path / text, *pairs, f"data.text={text}", steps=1) for text in ("shards", "captions")
    )
    first, second = ([line["loss"] for line in metrics(job)] for job in (shards, captions))
    assert first == pytest.approx(second, rel=1e-3)


@pytest.mark.long
@pytest.mark.usefixtures("no_release")
def test_the_shards_of_another_base_are_not_used(encoded, tmp_path, capsys, kept):
    train(encoded, tmp_path / "out", base="tiny-sdxl")
    said = capsys.readouterr().err
    assert "The precomputed latents of the shards are not used" in said
    assert "The precomputed text of the shards are not used" in said
    assert "vae" in vars(kept.base)
