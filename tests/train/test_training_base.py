"""A frozen base: its encoders agree with the stock pipelines', load when needed, and can be freed again."""

import gc
import json
import os
import pickle
import shutil
import weakref
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.shared.bases import BaseSource, find_base
from pipeline.train.base_model import Base
from schemas.errors import WeightsError

CPU = torch.device("cpu")
KINDS = {"tiny": "sd15", "tiny-sdxl": "sdxl"}
CAPTIONS = ["a face", "", "many words about nothing " * 40]


def load(name, dtype=torch.float32):
    return Base(find_base(name), CPU, dtype)


@pytest.fixture(scope="module", params=KINDS)
def base(request):
    return load(request.param)


@pytest.fixture(scope="module")
def stock(base):
    """The same folder as diffusers itself loads it."""
    made = diffusers.DiffusionPipeline.from_pretrained(base.source.folder, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def pixels(batch=2, side=64):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_encoders_load_when_they_are_needed_first_and_nothing_is_trained():
    base = load("tiny")
    assert not {"vae", "_texts", "_encoder"} & vars(base).keys()
    base.encode_text(["a face"])
    assert "vae" not in vars(base), "text needs no VAE"
    base.encode_images(pixels())
    parts = [base.unet, base.vae, *(part for part in base._texts.values() if hasattr(part, "parameters"))]
    assert len(parts) == 3
    assert not any(weight.requires_grad for part in parts for weight in part.parameters())


@pytest.mark.parametrize("name", [pytest.param("tiny", marks=pytest.mark.long), "tiny-sdxl"])
def test_released_encoders_are_gone_and_come_back_the_same(name):
    base = load(name)
    text, latents = base.encode_text(CAPTIONS), base.encode_images(pixels())
    gone = [weakref.ref(base.vae), weakref.ref(base._texts["text_encoder"])]
    base.release_encoders()
    gc.collect()
    assert [ref() for ref in gone] == [None, None], "still held in memory"
    assert torch.equal(base.encode_text(CAPTIONS).embeds, text.embeds)
    assert torch.equal(base.encode_images(pixels()), latents)


def test_latents_without_a_generator_are_the_posterior_s_mean(base, stock):
    with torch.no_grad():
        expected = stock.vae.encode(pixels()).latent_dist.mean * stock.vae.config.scaling_factor
    found = base.encode_images(pixels())
    assert found.shape == (2, 4, 8, 8)
    assert torch.allclose(found, expected, atol=1e-6)


def test_latents_are_sampled_from_the_posterior_by_the_generator_alone(base, stock):
    with torch.no_grad():
        posterior = stock.vae.encode(pixels()).latent_dist
    drawn = torch.randn(posterior.mean.shape, generator=seeded(5))
    expected = (posterior.mean + posterior.std * drawn) * stock.vae.config.scaling_factor
    before = torch.get_rng_state()
    found = base.encode_images(pixels(), seeded(5))
    assert torch.equal(torch.get_rng_state(), before), "drew from torch's own generator"
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(base.encode_images(pixels(), seeded(6)), found, atol=1e-3)
    one = seeded(5)
    assert not torch.equal(base.encode_images(pixels(), one), base.encode_images(pixels(), one)), "noise is repeated"


def test_text_is_what_the_stock_pipeline_feeds_its_unet(base, stock):
    found = base.encode_text(CAPTIONS)
    for number, caption in enumerate(CAPTIONS):
        with torch.no_grad():
            told = stock.encode_prompt(caption, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False)
        assert torch.allclose(found.embeds[number], told[0][0], atol=1e-5)
        if base.kind == "sdxl":
            assert torch.allclose(found.pooled[number], told[2][0], atol=1e-5)
    assert found.embeds.shape == (3, 77, 128)
    assert (found.pooled is None) == (base.kind == "sd15")
    assert not torch.allclose(found.embeds[0], found.embeds[1], atol=1e-3)


def test_images_are_decoded_as_the_stock_pipeline_does(base, stock):
    latents = torch.randn(1, 4, 8, 8, generator=seeded(1))
    with torch.no_grad():
        expected = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample
    assert torch.allclose(base.decode_pixels(latents), expected, atol=1e-5)
    image = base.decode(latents)
    assert (image.shape, image.dtype) == ((1, 64, 64, 3), np.uint8)
    shown = ((expected[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(image[0].astype(float) - shown).max() <= 1


@pytest.mark.parametrize("name", [pytest.param("tiny", marks=pytest.mark.long), "tiny-sdxl"])
def test_half_precision_is_for_all_but_sdxl_s_vae(name):
    base = load(name, torch.bfloat16)
    assert base.unet.dtype == base._texts["text_encoder"].dtype == torch.bfloat16
    assert base.vae.dtype == (torch.float32 if name == "tiny-sdxl" else torch.bfloat16)
    assert base.encode_images(pixels(), seeded(0)).dtype == torch.float32
    assert base.encode_text(["a face"]).embeds.dtype == torch.bfloat16


def test_a_vae_of_sdxl_that_does_not_overflow_is_in_half_precision_too(tmp_path):
    folder = Path(shutil.copytree(find_base("tiny-sdxl").folder, tmp_path / "base"))
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps({**config, "force_upcast": False}))
    assert Base(find_base(str(folder)), CPU, torch.bfloat16).vae.dtype == torch.bfloat16


def test_a_folder_with_fp16_files_alone_loads_in_the_precision_asked_for(tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(find_base("tiny").folder, folder)
    made = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for part in (made.unet, made.vae, made.text_encoder):
        part.half()
    shutil.rmtree(folder)
    made.save_pretrained(folder, safe_serialization=True, variant="fp16")
    assert {path.name.split(".", 1)[1] for path in folder.rglob("*.safetensors")} == {"fp16.safetensors"}
    base = Base(find_base(str(folder)), CPU, torch.float32)
    assert base.unet.dtype == base.vae.dtype == torch.float32
    expected = load("tiny")
    assert torch.allclose(base.encode_text(["a"]).embeds, expected.encode_text(["a"]).embeds, atol=2e-2)
    weights = dict(base.unet.named_parameters())
    for key, weight in expected.unet.named_parameters():
        assert torch.equal(weights[key], weight.half().float())


def damage(folder, file, content):
    """A copy of a tiny base with one file cut, replaced or gone."""
    shutil.copytree(find_base("tiny").folder, folder)
    path = folder / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1000] if content == "cut" else content)
    return BaseSource("broken", folder, "sd15", "none", 128)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "cut"),
        ("unet/diffusion_pytorch_model.safetensors", b""),
        ("unet/diffusion_pytorch_model.safetensors", None),
        ("unet/config.json", b"{"),
        ("unet/config.json", b'{"cross_attention_dim": 256}'),
        ("scheduler/scheduler_config.json", None),
    ],
)
def test_a_damaged_folder_is_one_sentence_that_names_it(tmp_path, file, content):
    source = damage(tmp_path / "base", file, content)
    with pytest.raises(WeightsError) as error:
        Base(source, CPU, torch.float32)
    assert str(source.folder / file.split("/")[0]) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("file", ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_damaged_encoder_is_one_sentence_when_it_is_needed(tmp_path, file):
    base = Base(damage(tmp_path / "base", file, "cut"), CPU, torch.float32)
    with pytest.raises(WeightsError, match=file.split("/")[0]) as error:
        base.encode_images(pixels()) if "vae" in file else base.encode_text(["a"])
    assert "\n" not in str(error.value)


WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def renamed(folder, part, name):
    """A copy of a tiny base, the weights of one part under other names; None leaves a weight out."""
    shutil.copytree(find_base("tiny").folder, folder)
    path = folder / part / WEIGHTS[part]
    named = {name(key): value for key, value in load_file(path).items()}
    save_file({key: value for key, value in named.items() if key}, path, {"format": "pt"})
    return Base(BaseSource("mine", folder, "sd15", "none", 128), CPU, torch.float32)


@pytest.mark.parametrize("name", [lambda key: f"model.{key}", lambda key: None if "final" in key else key])
def test_a_text_encoder_that_lacks_weights_does_not_get_random_ones(tmp_path, name):
    base = renamed(tmp_path / "base", "text_encoder", name)
    with pytest.raises(WeightsError, match=r"lack \d+ weights, such as"):
        base.encode_text(["a"])


def test_a_vae_and_a_unet_that_lack_weights_are_refused(tmp_path):
    base = renamed(tmp_path / "vae", "vae", lambda key: None if key == "quant_conv.weight" else key)
    with pytest.raises(WeightsError, match=r"lack 1 weights, such as quant_conv\.weight"):
        base.encode_images(pixels())
    with pytest.raises(WeightsError, match=r"lack 1 weights, such as conv_in\.bias.*: fetch the base again"):
        renamed(tmp_path / "unet", "unet", lambda key: None if key == "conv_in.bias" else key)


OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_attention(key):
    """As the published VAE of Stable Diffusion 1.5 names its attention."""
    for new, old in OLD_ATTENTION.items():
        key = key.replace(f"attentions.0.{new}", f"attentions.0.{old}")
    return key


def test_names_of_older_files_load_the_same(tmp_path):
    expected = load("tiny")
    base = renamed(tmp_path / "vae", "vae", old_attention)
    assert torch.equal(base.encode_images(pixels()), expected.encode_images(pixels()))
    base = renamed(tmp_path / "text", "text_encoder", lambda key: f"text_model.{key.removeprefix('text_model.')}")
    assert torch.equal(base.encode_text(["a"]).embeds, expected.encode_text(["a"]).embeds)


@pytest.mark.long
def test_fp16_files_in_several_pieces_load(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(find_base("tiny").folder, folder)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
    shutil.rmtree(folder / "unet")
    unet.half().save_pretrained(folder / "unet", variant="fp16", max_shard_size="500KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    found = Base(find_base(str(folder)), CPU, torch.float32).unet.state_dict()
    assert all(torch.equal(found[key], weight.float()) for key, weight in unet.state_dict().items())


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def use_all(source):
    base = Base(source, CPU, torch.float32)
    base.encode_text(["a"])
    base.encode_images(pixels())


def test_pickled_weights_are_never_opened(tmp_path):
    trap = pickle.dumps({"state": Trap(str(tmp_path / "sprung"))})
    for part, name in WEIGHTS.items():
        source = damage(tmp_path / part, f"{part}/{name}", None)
        for pickled in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
            (source.folder / part / pickled).write_bytes(trap)
        with pytest.raises(WeightsError):
            use_all(source)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_a_damaged_tiny_base_may_be_deleted(tmp_path):
    source = damage(tmp_path / "base", "unet/config.json", b"{")
    source = BaseSource("tiny", source.folder, "sd15", "none", 128)
    with pytest.raises(WeightsError, match=f"delete {source.folder}"):
        Base(source, CPU, torch.float32)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_schedule_is_the_folders_own(tmp_path, prediction):
    folder = tmp_path / "base"
    shutil.copytree(find_base("tiny").folder, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": prediction}))
    base = Base(find_base(str(folder)), CPU, torch.float32)
    assert type(base.scheduler).__name__ == "DDPMScheduler"
    assert base.scheduler.config.prediction_type == prediction
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert torch.allclose(base.scheduler.betas, betas, atol=1e-7)
    sampling = base.sampler().scheduler.config
    assert (sampling.prediction_type, sampling.clip_sample) == (prediction, False)
    assert (sampling.set_alpha_to_one, sampling.steps_offset) == (False, 1)
