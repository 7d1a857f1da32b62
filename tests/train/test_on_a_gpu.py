"""Whole runs on a pretended GPU: all tensors where they belong, and nothing that waits for it between logged steps."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from facexlib.recognition.arcface_arch import Backbone
from pretended_gpu import pretended_gpu
from train_made import VISION, write_shards

import pipeline.train.loop as trainer
from pipeline.shared.bases import find_base
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.base_model import Base
from pipeline.train.evaluate import evaluation
from pipeline.train.evaluate.call import Call as Wish
from pipeline.train.evaluate.call import prepared as granted
from pipeline.train.job import Call, prepared
from pipeline.train.loader.loader import ShardLoader
from pipeline.train.session import Session
from schemas.errors import ConfigError, ExitCode

pytestmark = pytest.mark.usefixtures("loaded_once")


def forget_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def shards_of(tmp_path_factory):
    """Shards of a base, made once; their pictures are none, since nobody looks at them."""
    folder = tmp_path_factory.mktemp("shards")

    @functools.cache
    def made(base):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("train_made._picture", lambda *_: b"")
            write_shards(folder / base, find_base(base), 64, 4, VISION[True], hidden="int8")
        return folder / base

    return made


@pytest.fixture
def on_gpu(shards_of, monkeypatch, tmp_path):
    """Train two batches of precomputed samples over and over; gives the job, and what the host waited for by step.

    Without steps, a run is begun and no more.
    """
    forget_accelerate()
    waits = {}

    class Pinning(ShardLoader):
        """As the loader of a real GPU has batches."""

        def __init__(self, *given, pin_memory, **named):
            assert pin_memory
            super().__init__(*given, **named)

        def __iter__(self):
            return (replace(batch.pin_memory()) for batch in super().__iter__())

    def run(name, base, *pairs, steps):
        sets = ("adapter.lora_rank=4", "watch.tensorboard=false", "watch.log_every=2", "data.verify=size", *pairs)
        options = {"steps": max(steps, 1)}
        job = prepared(Call((str(shards_of(base)),), name, base, tmp_path / "run", pairs=sets, options=options))
        with pretended_gpu(monkeypatch) as gpu:
            monkeypatch.setattr("pipeline.train.session.ShardLoader", Pinning)
            if not steps:
                accelerator = trainer.make_accelerator(job.config.optim)
                Session(job, accelerator, Base(job.base, accelerator.device, torch.bfloat16))
                return job, waits

            class Counting(Session):
                def count_step(self):
                    waits[self.step] = len(gpu.waits)
                    gpu.waits.clear()
                    return super().count_step()

            monkeypatch.setattr(trainer, "Session", Counting)
            assert trainer.train(job) == ExitCode.OK
        return job, waits

    return run


@pytest.mark.parametrize(
    ("name", "base"),
    [("faceid-plusv2", "tiny"), pytest.param("plus-face", "tiny-sdxl", marks=pytest.mark.long)],
)
def test_between_logged_steps_nothing_waits_for_the_gpu(name, base, on_gpu):
    _, waits = on_gpu(name, base, steps=3)
    # Of a step counted here belongs what was logged at the end of the one before: the loss and the gradient's norm.
    assert (waits[1], waits[2]) == (0, 2)


@pytest.mark.long
def test_a_step_that_fp16s_scaler_leaves_out_is_noticed(on_gpu, monkeypatch):
    scalers, steps = [], []

    def scaler(*_, **__):
        scalers.append(torch.amp.GradScaler("cuda", init_scale=2.0**60, backoff_factor=2.0**-48))
        return scalers[-1]

    monkeypatch.setattr("accelerate.accelerator.get_grad_scaler", scaler)
    real = Session.optimizer_step
    monkeypatch.setattr(Session, "optimizer_step", lambda session: steps.append(session.step) or real(session))
    job, _ = on_gpu("faceid", "tiny", "optim.precision=fp16", steps=2)
    skipped = (60 - math.log2(scalers[0].get_scale())) / 48
    assert skipped >= 1
    assert len(steps) == 2 + skipped
    assert job.run.steps() == [2]


@pytest.mark.parametrize(("samples", "is_long"), [(4, True), (5, False)])
def test_how_long_a_run_is_its_samples_say(samples, is_long, on_gpu, monkeypatch):
    compiled = []
    monkeypatch.setattr("pipeline.train.session._WORTH_COMPILING", samples)
    monkeypatch.setattr("pipeline.train.session.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(AdapterModel, "compile_predict", lambda _, batch_size: compiled.append(batch_size))
    on_gpu("ip-adapter", "tiny", "data.crops.full=0", "optim.accumulate=2", steps=0)
    assert bool(compiled) == is_long  # one step of two batches of two


@pytest.mark.parametrize(("pairs", "is_compiled"), [((), False), (("data.latents=images",), True)])
def test_precomputed_latents_have_many_shapes_whatever_buckets_are_set(pairs, is_compiled, on_gpu, monkeypatch):
    compiled = []
    monkeypatch.setattr("pipeline.train.session._WORTH_COMPILING", 1)
    monkeypatch.setattr("pipeline.train.session.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(AdapterModel, "compile_predict", lambda _, batch_size: compiled.append(batch_size))
    on_gpu("ip-adapter", "tiny", "data.buckets=false", *pairs, steps=0)
    assert bool(compiled) == is_compiled


@pytest.mark.parametrize("compilers", [True, False])
def test_by_itself_it_compiles_long_runs_where_that_works(compilers, on_gpu, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr("pipeline.train.session._WORTH_COMPILING", 1)
    monkeypatch.setattr("pipeline.train.session.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: name if compilers else None)
    monkeypatch.setattr(AdapterModel, "compile_predict", lambda _, batch_size: compiled.append(batch_size))
    monkeypatch.delenv("CC", raising=False)
    on_gpu("ip-adapter", "tiny", "data.crops.full=0", steps=0)
    assert compiled == [2] * compilers
    assert ("not compiled" in capsys.readouterr().err) != compilers
    if not compilers:
        with pytest.raises(ConfigError, match="install gcc"):
            on_gpu("ip-adapter", "tiny", "optim.compile=true", steps=0)


@pytest.mark.long
@pytest.mark.parametrize("base", ["tiny", "tiny-sdxl"])
def test_whatever_else_a_run_may_do_goes_on_a_gpu_too(base, dataset, tmp_path, monkeypatch):
    """Images, captions and every term of the objective; validation; averaged weights; resumed; evaluated."""
    recogniser = tmp_path / "ir_se50.pth"
    torch.save(Backbone(num_layers=50, drop_ratio=0.6, mode="ir_se").state_dict(), recogniser)
    sets = (
        *("adapter.lora_rank=4", "watch.tensorboard=false", "optim.ema_decay=0.9", "optim.accumulate=2"),
        *("watch.validate_every=1", "watch.validate_faces=1", "watch.validate_steps=1"),
        *("optim.gradient_checkpointing=true", "objective.min_snr_gamma=5", "objective.noise_offset=0.05"),
        *(
            "objective.id_loss=0.1",
            "objective.id_loss_max_t=1",
            f"objective.id_loss_weights={recogniser}",
        ),
    )
    monkeypatch.setattr(
        "pipeline.train.session.ShardLoader", lambda *of, pin_memory, **named: ShardLoader(*of, **named)
    )
    with pretended_gpu(monkeypatch):
        for steps in (1, 2):
            forget_accelerate()
            options = {"pairs": sets, "options": {"steps": steps}, "resume": steps > 1}
            call = Call((str(dataset),), "faceid-plusv2", base, tmp_path / "run", **options)
            assert trainer.train(prepared(call)) == ExitCode.OK
        forget_accelerate()
        pairs = ("watch.validate_steps=1",)
        wish = Wish(tmp_path / "run", (str(dataset),), faces=1, images=1, pairs=pairs)
        folder, _ = evaluation.evaluate(granted(wish))
    assert (folder / "evaluation.json").exists()
