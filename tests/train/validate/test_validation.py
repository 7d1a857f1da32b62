"""Validation on the tiny bases with real shards: images follow face, prompt and adapter, and nothing else changes."""

from types import SimpleNamespace

import cv2
import fake_shards as fake
import numpy as np
import pytest
import torch
from tiny_adapters import set_scale

from pipeline.train.adapters.model import AdapterModel
from pipeline.train.base_model import Base
from pipeline.train.job import Call, prepared
from pipeline.train.validate.validation import Sampler, Validator
from schemas.errors import WeightsError

CPU = torch.device("cpu")
PROMPTS = ["a face", "a red house"]
SETTINGS = (
    "watch.validate_every=1",
    "watch.validate_faces=2",
    "watch.validate_steps=1",
    f"watch.validate_prompts={PROMPTS!r}",
    "adapter.lora_rank=4",
)


def job_of(dataset, out, variant="faceid", base="tiny", more=()):
    job = prepared(Call((str(dataset),), variant, base, out, pairs=(*SETTINGS, *more)))
    job.run.root.mkdir(parents=True, exist_ok=True)
    return job


def model_of(job, base):
    torch.manual_seed(0)
    model = AdapterModel(base.unet, job.variant, job.widths, job.config.adapter)
    with torch.no_grad():  # as if it had learned something
        for name, weight in model.trained().items():
            if "to_v_ip" in name or name.endswith("up.weight"):
                weight += torch.randn(weight.shape)
    return model.train()


@pytest.fixture(scope="module")
def job(dataset, tmp_path_factory):
    return job_of(dataset, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def base(job):
    return Base(job.base, CPU, torch.float32)


@pytest.fixture(scope="module")
def model(job, base):
    return model_of(job, base)


@pytest.fixture(scope="module")
def validator(job, base):
    return Validator(job, base)


def sample(validator, model, face=0, column=0, **changes):
    config = validator._job.config
    watch = config.watch.model_copy(update=changes)
    sampler = Sampler(
        validator._base, model, validator._job.features.unconditional, config.model_copy(update={"watch": watch})
    )
    with torch.no_grad():
        return sampler(validator._faces[face], PROMPTS[column], config.seed + column)


def test_a_grid_is_written_and_is_the_same_when_written_again(validator, model, job):
    assert validator.run(model, 7) == {}
    path = job.run.root / "validation" / "step-00000007.png"
    first = path.read_bytes()
    validator.run(model, 7)
    assert path.read_bytes() == first
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    sheet = cv2.imread(str(path))
    side = 3 * job.config.data.resolution
    assert sheet.shape[1] > 3 * side
    assert sheet.shape[0] > 2 * side


def test_images_have_the_resolution_of_the_run_and_depend_on_face_prompt_and_scale(validator, model, job):
    image = sample(validator, model)
    side = job.config.data.resolution
    assert image.shape == (side, side, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, sample(validator, model))
    assert not np.array_equal(image, sample(validator, model, face=1))
    assert not np.array_equal(image, sample(validator, model, column=1))
    set_scale(model, 0.0, 0.0)
    try:
        untouched = sample(validator, model)
        assert not np.array_equal(image, untouched)
        assert np.array_equal(untouched, sample(validator, model, face=1))
    finally:
        set_scale(model)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_an_image_is_what_the_model_s_own_predictions_lead_to(validator, model, base, guidance):
    """A DDIM loop by hand, through `forward` as in training: halves of the guidance must not be mixed up."""
    model.eval()
    condition = {role: value[None] for role, value in validator._faces[0].condition.items()}
    unconditional = validator._job.features.unconditional
    nothing = {role: torch.from_numpy(value)[None] for role, value in unconditional.items()}
    schedule = base.sampler().scheduler
    schedule.set_timesteps(2)
    side = validator._job.config.data.resolution // 8
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(validator._job.config.seed))
    prompt, empty = base.encode_text([PROMPTS[0]]).embeds, base.encode_text([""]).embeds
    with torch.no_grad():
        for time in schedule.timesteps:
            with_face = model(latents, time[None], prompt, condition)
            without = model(latents, time[None], empty, nothing)
            noise_pred = without + guidance * (with_face - without)
            latents = schedule.step(noise_pred, time, latents).prev_sample
    expected = base.decode(latents)[0].astype(int)
    image = sample(validator, model, guidance_scale=guidance, validate_steps=2).astype(int)
    assert expected.std() > 1
    assert np.abs(image - expected).max() <= 1


def test_training_goes_on_as_if_nothing_had_been(validator, model):
    model.train().unet.eval()  # modes may differ within the model
    modes = [module.training for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.trained().items()}
    state = torch.get_rng_state()
    validator.run(model, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert any(modes)
    assert not all(modes)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.trained().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_modes_come_back_when_sampling_fails(validator, model, monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Sampler, "__call__", fail)
    model.train()
    with pytest.raises(RuntimeError, match="out of memory"):
        validator.run(model, 1)
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.long
def test_encoders_that_were_released_come_back(validator, model, base):
    before = sample(validator, model)
    base.release_encoders()
    assert np.array_equal(before, sample(validator, model))


def test_where_validation_is_off_nothing_is_loaded(job, base):
    off = job.config.watch.model_copy(update={"validate_every": 0, "judge": "/nowhere"})
    config = job.config.model_copy(update={"watch": off})
    assert not Validator(type("TrainJob", (), {**vars(job), "config": config})(), base)._faces


def test_a_missing_judge_is_refused_before_anything_is_sampled(dataset, tmp_path, base):
    job = job_of(dataset, tmp_path, more=("watch.judge=/nowhere/pack",))
    with pytest.raises(WeightsError, match=r"watch\.judge"):
        Validator(job, base)
    assert not (tmp_path / "validation").exists()


def test_what_a_judge_sees_are_numbers(dataset, tmp_path, base, model, monkeypatch):
    """With a judge that sees no face, as there is none in what a random base draws."""
    judge = SimpleNamespace(look=lambda image: None, embed=lambda crop: np.ones(512), weights=[])
    monkeypatch.setattr("pipeline.train.validate.distances.IdJudge", lambda *_: judge)
    job = job_of(dataset, tmp_path, more=("watch.judge=pack", "watch.validate_faces=1"))
    assert Validator(job, base).run(model, 3) == {"faces_found": 0.0}
    assert (tmp_path / "validation" / "step-00000003.png").exists()


@pytest.mark.long
@pytest.mark.real_data
def test_a_judge_adds_numbers(dataset, tmp_path, base, model, data):
    job = job_of(dataset, tmp_path, more=(f"watch.judge={data / 'models' / 'real'}", "watch.validate_faces=1"))
    # A random base draws no faces.
    assert Validator(job, base).run(model, 3) == {"faces_found": 0.0}
    assert (tmp_path / "validation" / "step-00000003.png").exists()


def test_where_persons_are_known_a_copy_shows_as_one(tmp_path, base, model, monkeypatch):
    people = [3, 3, 5, 7, 7]  # 5 has no other photo, and comes last
    shards = [fake.sample(number, has=("portrait",), person=one) for number, one in enumerate(people)]
    for number, files in enumerate(shards):
        noise = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
        files["portrait.jpg"] = cv2.imencode(".jpg", cv2.resize(noise, fake.PORTRAIT))[1].tobytes()
    dataset = fake.write(tmp_path / "data", {"a-00000": shards})
    job = job_of(dataset, tmp_path / "run", more=("watch.validate_faces=3",))
    validator = Validator(job, base)
    assert [int(face.photo.key[-3:]) for face in validator._faces] == [0, 3, 2]
    assert [len(face.others) for face in validator._faces] == [1, 1, 0]
    monkeypatch.setattr(Sampler, "__call__", lambda _, face, *_noise: cv2.resize(face.photo.crop, (64, 64)))
    assert validator.run(model, 1) == {"copy_paste_pixels": pytest.approx(1, abs=0.05)}
    monkeypatch.setattr(Sampler, "__call__", lambda _, face, *_noise: [*face.others, face.photo][0].crop)
    assert validator.run(model, 2) == {"copy_paste_pixels": pytest.approx(-1)}


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        ("faceid-plusv2", "tiny-sdxl"),
        *(pytest.param(*pair, marks=pytest.mark.long) for pair in (("plus", "tiny"), ("ip-adapter", "tiny-sdxl"))),
    ],
)
def test_other_variants_and_sdxl_are_sampled(dataset, tmp_path, variant, kind):
    job = job_of(dataset, tmp_path, variant, kind, ("watch.validate_faces=1",))
    base = Base(job.base, CPU, torch.float32)
    assert Validator(job, base).run(model_of(job, base), 0) == {}
    assert (tmp_path / "validation" / "step-00000000.png").exists()


@pytest.mark.long
def test_a_base_in_half_precision_is_sampled_with_float32_weights_of_the_adapter(dataset, tmp_path):
    job = job_of(dataset, tmp_path)
    base = Base(job.base, CPU, torch.bfloat16)
    model = model_of(job, base)
    assert {weight.dtype for weight in model.trained().values()} == {torch.float32}
    assert sample(Validator(job, base), model).std() > 0
