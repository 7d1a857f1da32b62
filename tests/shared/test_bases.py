"""Bases by name and by path: found where they lie, made where they are tiny, refused in one sentence otherwise."""

import json
import resource
import shutil
from pathlib import Path

import pytest

from pipeline.shared.bases import find_base
from pipeline.shared.tiny import NOISE, write_tiny
from schemas.errors import SourceError, UserError, WeightsError

TINY = {"sd15": "tiny", "sdxl": "tiny-sdxl"}
REPOSITORY = "stable-diffusion-v1-5/stable-diffusion-v1-5"
FILES = {
    "sd15": (
        *("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"),
        *("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        *("text_encoder/model.safetensors", "tokenizer/tokenizer.json"),
    ),
    "sdxl": ("text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer_2/tokenizer.json"),
}


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No base anywhere but where the test puts it; the value is the Hugging Face cache."""
    from huggingface_hub import constants

    monkeypatch.delenv("FACESHARDS_MODELS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def copy(to: Path, kind: str = "sd15") -> Path:
    return Path(shutil.copytree(find_base(TINY[kind]).folder, to))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(name: object, error: type[UserError] = SourceError) -> str:
    """The message, which has to be one sentence on one line."""
    with pytest.raises(error) as caught:
        find_base(str(name))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?)."))
    return message


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ tiny bases


@pytest.mark.parametrize(
    ("name", "sdxl", "told"),
    [
        ("tiny", False, ("tiny", "sd15")),
        ("tiny", True, ("tiny-sdxl", "sdxl")),
        ("tiny-sdxl", False, ("tiny-sdxl", "sdxl")),
    ],
)
def test_tiny_is_described_and_reused(name, sdxl, told):
    first = find_base(name, sdxl=sdxl)
    assert (first.name, first.kind) == told
    assert first.text_width == 128
    assert first.licence == "Apache-2.0 (random weights)"
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    assert find_base(name, sdxl=sdxl) == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before


@pytest.mark.parametrize("kind", TINY)
def test_tiny_weights_are_the_same_each_time_and_disturb_no_random_numbers(kind, tmp_path):
    import torch

    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    write_tiny(tmp_path / "again", kind)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert content(tmp_path / "again") == content(find_base(TINY[kind]).folder)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler schedule
@pytest.mark.long
@pytest.mark.parametrize("kind", TINY)
def test_tiny_draws_with_the_stock_pipeline(kind):
    import diffusers
    import torch

    cls = diffusers.StableDiffusionPipeline if kind == "sd15" else diffusers.StableDiffusionXLPipeline
    pipe = cls.from_pretrained(find_base(TINY[kind]).folder, local_files_only=True, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    images = [
        pipe(
            prompt,
            height=64,
            width=48,
            num_inference_steps=2,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images
        for prompt in ("a photo", "a photo", "ein Bild, 猫 " * 40)
    ]
    assert images[0].shape == (1, 3, 64, 48)
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()


def test_who_comes_second_takes_what_the_first_one_made(tmp_path, monkeypatch):
    name = find_base("tiny").folder.name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = tmp_path / "faceshards" / "bases" / name

    def overtaken(folder: Path, kind: str) -> None:
        write_tiny(folder, kind)
        write_tiny(first, kind)
        (first / "first").write_text("")

    monkeypatch.setattr("pipeline.shared.tiny.write_tiny", overtaken)
    assert find_base("tiny").folder == first
    assert (first / "first").exists()
    assert list(first.parent.iterdir()) == [first]


def test_what_a_killed_process_left_is_not_taken_for_a_base(tmp_path, monkeypatch):
    whole = find_base("tiny").folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    half = tmp_path / "faceshards" / "bases" / ".tmp-killed" / whole.name
    half.mkdir(parents=True)
    (half / "model_index.json").write_text("{")
    assert content(find_base("tiny").folder) == content(whole)


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "XDG_CACHE_HOME" in refusal("tiny", WeightsError)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert "File too large" in refusal("tiny", WeightsError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---------------------------------------------------------------------------------------- real ones, by name


def test_an_absent_base_says_what_to_fetch_and_where_to_put_it(nowhere, monkeypatch, tmp_path):
    told = refusal("sd15", WeightsError)
    assert REPOSITORY in told
    assert "FACESHARDS_MODELS" in told
    assert "CreativeML OpenRAIL-M" in told
    assert "models fetch sd15" in told
    monkeypatch.setenv("FACESHARDS_MODELS", str(tmp_path / "models"))
    told = refusal("sdxl", WeightsError)
    assert "stabilityai/stable-diffusion-xl-base-1.0" in told
    assert str(tmp_path / "models" / "sdxl") in told
    assert not (tmp_path / "models").exists()


def test_a_base_of_the_hugging_face_cache_is_found(nowhere):
    repository = nowhere / f"models--{REPOSITORY.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    folder = copy(repository / "snapshots" / revision)
    found = find_base("sd15")
    assert (found.name, found.folder, found.licence) == ("sd15", folder, "CreativeML OpenRAIL-M")


def test_the_models_folder_comes_before_the_caches(nowhere, monkeypatch, tmp_path):
    test_a_base_of_the_hugging_face_cache_is_found(nowhere)
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        fetched = copy(tmp_path / "cache/faceshards/models/sd15")
        assert find_base("sd15").folder == fetched
    monkeypatch.setenv("FACESHARDS_MODELS", str(tmp_path / "models"))
    folder = copy(tmp_path / "models" / "sd15")
    assert find_base("sd15").folder == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FACESHARDS_MODELS", "~/models")
    assert find_base("sd15").folder == folder


def test_the_sha256_of_a_base_tells_other_weights_and_configs_apart(tmp_path):
    folder = copy(tmp_path / "mine")
    before = find_base(str(folder)).sha256
    assert before == find_base("tiny").sha256, "not where it lies, nor how it is called"
    for file in ("unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json", "vae/config.json"):
        (folder / file).write_bytes((folder / file).read_bytes() + b" ")
        after = find_base(str(folder)).sha256
        assert after != before, file
        before = after


# -------------------------------------------------------------------------------------------------- by path


@pytest.mark.parametrize("kind", TINY)
def test_a_path_tells_its_own_layout(kind, tmp_path, monkeypatch):
    folder = copy(tmp_path / "my model", kind)
    found = find_base(str(folder))
    assert (found.name, found.folder, found.kind, found.text_width) == ("my model", folder, kind, 128)
    assert found.licence == "unknown (my model)"
    monkeypatch.chdir(folder)
    assert find_base(".").name == "my model"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: creativeml-openrail-m\ntags:\n- art\n---\n# A model\n", "creativeml-openrail-m"),
        ("---\r\nlicense: 'mit'\r\n---\r\ntext", "mit"),
        ("---\nlicense: other\nlicense_name: flux-1-dev\n---\n", "flux-1-dev"),
        ("---\ntags: [x]\n---\nlicense: not-in-the-head\n", "unknown (base)"),
        ("license: no-head\n", "unknown (base)"),
        ("---\nlicense:\n---\n", "unknown (base)"),
        ("---\nbase:\n  license: of-something-else\n---\n", "unknown (base)"),
        ("", "unknown (base)"),
    ],
)
def test_the_licence_of_a_path_is_its_model_cards(card, licence, tmp_path):
    folder = copy(tmp_path / "base")
    (folder / "README.md").write_bytes(card.encode())
    assert find_base(str(folder)).licence == licence


def test_half_precision_files_alone_will_do(tmp_path):
    folder = copy(tmp_path / "base")
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert find_base(str(folder)).kind == "sd15"


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "near"),
    [("sd1.5", "sd15"), ("SD15", "sd15"), ("SDXL", "sdxl"), ("tiny_sdxl", "tiny-sdxl"), ("Tiny", "tiny")],
)
def test_a_name_that_is_nearly_known_is_guessed(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"did you mean {near}?" in refusal(name)


@pytest.mark.parametrize("name", ["/does/not/exist", "flux", "runwayml/stable-diffusion-v1-5"])
def test_other_names_list_the_known_ones(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = refusal(name)
    assert "did you mean" not in told
    assert all(known in told for known in (name, "tiny", "tiny-sdxl", "sd15", "sdxl"))


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, files in FILES.items() for file in files])
def test_each_missing_file_is_named(kind, file, tmp_path):
    folder = copy(tmp_path / "base", kind)
    (folder / file).unlink()
    told = refusal(folder, UserError)
    part, name = file.split("/")
    assert str(folder) in told
    assert part in told
    assert (name if name != "tokenizer.json" else "vocab.json") in told


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_do_not_count(part, tmp_path):
    folder = copy(tmp_path / "base")
    for path in (folder / part).glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    assert "pickled" in refusal(folder, WeightsError)


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe", b"[1]", b"null"])
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_an_unreadable_config_is_named(file, text, tmp_path):
    folder = copy(tmp_path / "base")
    (folder / file).write_bytes(text)
    assert file in refusal(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"in_channels": 9},  # inpainting
        {"cross_attention_dim": [64, 128]},
        {"cross_attention_dim": None},
        {"addition_embed_type": "text_image"},
    ],
)
def test_unets_of_other_layouts_are_refused(values, tmp_path):
    folder = copy(tmp_path / "base")
    change(folder / "unet" / "config.json", **values)
    assert next(iter(values)) in refusal(folder)


EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon", "sigma_data": 0.5, "rho": 7.0}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


@pytest.mark.parametrize("noise", [EDM, FLOW, {**NOISE, "_class_name": "Euler", "use_flow_sigmas": True}])
def test_schedules_of_other_processes_are_refused(noise, tmp_path):
    """Read as DDPM's, they would be linear betas from 1e-4 to 0.02, which such a base never saw."""
    folder = copy(tmp_path / "base", "sdxl")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(noise))
    assert str(noise["_class_name"]) in refusal(folder)


@pytest.mark.parametrize("values", [{"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}, {"shift_factor": 0.1}])
def test_vaes_that_shift_their_latents_are_refused(values, tmp_path):
    folder = copy(tmp_path / "base", "sdxl")
    change(folder / "vae" / "config.json", **values)
    assert next(iter(values)) in refusal(folder)
    change(folder / "vae" / "config.json", **dict.fromkeys(values))
    assert find_base(str(folder)).kind == "sdxl", "as diffusers writes it for all others"


def test_a_single_file_is_answered_by_how_to_make_a_folder_of_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "from_single_file" in refusal(tmp_path / "model.safetensors")
