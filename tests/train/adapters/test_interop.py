"""The programs that people load adapters with, on what we write: diffusers itself, and ComfyUI's rules of detection.

Weights are random and far from their initial values. Both sides compute with the same float16-rounded weights in
float32, on the tiny bases.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from tiny_adapters import (
    KINDS,
    TEXT,
    TOKENS,
    WITH_LORA,
    adapter,
    by_default,
    copy_of,
    numbers,
    set_scale,
    shapes_alone,
    tiny_base,
)
from torch.nn.functional import normalize

from pipeline.train.adapters.attention import named_attention
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.adapters.released import read_released, write_released
from pipeline.train.adapters.variants import VARIANTS, Widths, variant
from pipeline.train.settings import AdapterSettings

RANK, BATCH = 8, 2
CLASSES = {
    "ip-adapter": "ImageProjection",
    "plus": "IPAdapterPlusImageProjection",
    "plus-face": "IPAdapterPlusImageProjection",
    "full-face": "IPAdapterFullImageProjection",
    "faceid": "IPAdapterFaceIDImageProjection",
    "faceid-portrait": "IPAdapterFaceIDImageProjection",
    "faceid-plus": "IPAdapterFaceIDPlusImageProjection",
    "faceid-plusv2": "IPAdapterFaceIDPlusImageProjection",
}
OPTIONS = {
    "StableDiffusionPipeline": {"requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
STRICT = {"low_cpu_mem_usage": False}
"""Without the low-memory path, which does not notice layers too many."""
TOKENS_OFF, NOISE_OFF = 1e-4, 1e-3
"""Tokens: of the largest token value. Noise predictions: of the adapter's effect, the largest |with - without|."""


@pytest.fixture(scope="module")
def bases():
    """The tiny bases as stock pipelines, by kind."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield {kind: read_base(kind) for kind in KINDS}
    diffusers.utils.logging.set_verbosity(before)


def read_base(kind):
    made = diffusers.DiffusionPipeline.from_pretrained(tiny_base(kind).folder, local_files_only=True)
    made.unet.requires_grad_(False)
    return made


def pipeline_of(base, unet):
    """The same stock pipeline with another UNet."""
    made = type(base)(**{**base.components, "unet": unet}, **OPTIONS[type(base).__name__])
    made.set_progress_bar_config(disable=True)
    return made


def condition_of(name, *, faces=1, features=1280, length=257):
    """Two different conditions, as the shards would give them."""
    many = (faces,) if faces > 1 else ()
    every = {
        "arcface": normalize(numbers(1, BATCH, *many, 512), dim=-1),
        "pooled": numbers(2, BATCH, 1024),
        "hidden": numbers(3, BATCH, length, features),
    }
    return {role: every[role] for role in variant(name).reads}


def perturbed(model, seed=11):
    """Every weight of the adapter away from its initial value, so that no layer can pass for another."""
    for number, weight in enumerate(model.trained().values()):
        spread = 0.2 if weight.ndim == 1 else 0.5 * weight.detach().std().item() or 0.1
        weight.data += spread * numbers(seed + number, *weight.shape)
    return model


@dataclass(repr=False)
class Case:
    """One variant on one kind of base: our model with the float16-rounded weights of the files in `folder`."""

    name: str
    kind: str
    base: diffusers.DiffusionPipeline
    model: AdapterModel
    folder: Path
    file: str

    @property
    def inputs(self):
        """Latents, timesteps and text, the same for both sides."""
        return numbers(4, BATCH, 4, 8, 8), torch.tensor([17, 731]), numbers(5, BATCH, 77, TEXT)

    @property
    def added(self):
        if self.kind == "sd15":
            return {}
        sizes = torch.tensor([[64, 64, 0, 0, 64, 64], [96, 64, 8, 0, 64, 64.0]])
        return {"text_embeds": numbers(6, BATCH, 64), "time_ids": sizes}

    @property
    def bare(self):
        """The prediction without an adapter."""
        return self._of_the_base("bare", self._bare)

    @property
    def sampled_bare(self):
        """Latents after two guided steps without an adapter."""
        return self._of_the_base("sampled", lambda: sampled(self.base))

    def _of_the_base(self, name, compute):
        """Computed once for all adapters of a base, which `loaded` pipelines are copies of."""
        computed = vars(self.base).setdefault("_computed", {})
        if name not in computed:
            computed[name] = compute()
        return computed[name]

    @torch.no_grad()
    def _bare(self):
        latents, timesteps, text = self.inputs
        return self.base.unet(latents, timesteps, text, added_cond_kwargs=self.added or None).sample

    @torch.no_grad()
    def ours(self, condition):
        return self.model(*self.inputs, condition, self.added or None)

    def pipeline(self, suffix=".safetensors", **how):
        """A stock pipeline on a copy of the same UNet, with the adapter loaded by diffusers."""
        made = pipeline_of(self.base, copy_of(self.base.unet))
        made.load_ip_adapter(
            str(self.folder), subfolder="", weight_name=f"{self.file}{suffix}", image_encoder_folder=None, **how
        )
        return made

    @torch.no_grad()
    def theirs(self, made, condition):
        latents, timesteps, text = self.inputs
        added = {**self.added, "image_embeds": [given_to(made, self.name, condition)]}
        return made.unet(latents, timesteps, text, added_cond_kwargs=added).sample


def layer_of(made):
    """The image projection that diffusers chose."""
    (layer,) = made.unet.encoder_hid_proj.image_projection_layers
    return layer


def given_to(made, name, condition):
    """The condition as a caller hands it to a pipeline."""
    return handed_to(layer_of(made), name, condition)


def handed_to(layer, name, condition):
    """The condition as a caller hands it to diffusers: (B, faces, …), and CLIP features set on the layer."""
    reads = variant(name).reads
    if reads == ("arcface", "hidden"):
        layer.clip_embeds = condition["hidden"][:, None]
        layer.shortcut = name == "faceid-plusv2"
    first = condition[reads[0]]
    return first if reads[0] == "arcface" and first.ndim == 3 else first[:, None]


def make_case(bases, name, kind, folder, **widths):
    base = bases[kind]
    model = adapter(copy_of(base.unet), name, kind, RANK, **widths)
    file = variant(name).released_name(kind, "clip-vit-h")
    paths = [path for path, _ in named_attention(model.unet)]
    write_released(folder, file, perturbed(model).trained(), attention_paths=paths, kind=kind, sidecar={})
    model.load_trained(read_released(folder / f"{file}.safetensors"))
    return Case(name, kind, base, model.eval(), folder, file)


# Every variant's tokens are compared below, on both kinds; a UNet knows of a variant whether it has a LoRA.
@pytest.fixture(scope="module", params=by_default("ip-adapter-sd15", "faceid-plusv2-sdxl"))
def case(request, bases, tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make_case(bases, *request.param, tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def loaded(case):
    """The .safetensors in a stock pipeline, with diffusers' defaults."""
    return case.pipeline()


def off(ours, theirs, scale):
    return ((ours - theirs).abs().max() / scale).item()


@torch.no_grad()
def assert_same_tokens(case, made, condition):
    ours = case.model.tokens(condition)
    theirs = made.unet.encoder_hid_proj([given_to(made, case.name, condition)])[0]
    assert ours.shape == theirs.flatten(1, 2).shape
    assert off(ours, theirs.flatten(1, 2), ours.abs().max()) <= TOKENS_OFF
    return theirs


def assert_same_noise(case, made, condition):
    theirs = case.theirs(made, condition)
    effect = (theirs - case.bare).abs().max()
    assert effect > 0.01, "an adapter without effect would prove nothing"
    assert off(case.ours(condition), theirs, effect) <= NOISE_OFF


def test_diffusers_chooses_the_layer_and_computes_our_tokens_and_noise(case, loaded):
    assert type(layer_of(loaded)).__name__ == CLASSES[case.name]
    condition = condition_of(case.name)
    assert assert_same_tokens(case, loaded, condition).shape == (BATCH, 1, TOKENS[case.name], TEXT)
    assert_same_noise(case, loaded, condition)


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_diffusers_chooses_the_layer_of_every_variant_and_computes_our_tokens(bases, name, kind):
    """Of the file's image_proj alone, which diffusers recognises by its keys."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        ours = variant(name).image_proj(Widths(kind, TEXT), AdapterSettings()).eval()
    for number, weight in enumerate(ours.parameters()):
        weight.data = (weight + 0.1 * numbers(11 + number, *weight.shape)).half().float()
    tensors = {key: tensor.half() for key, tensor in ours.state_dict().items()}
    layer = bases[kind].unet._convert_ip_adapter_image_proj_to_diffusers(tensors, **STRICT).float()
    assert type(layer).__name__ == CLASSES[name]
    condition = condition_of(name, length=257 if name == "full-face" else 33)
    embeds = handed_to(layer, name, condition)
    tokens, theirs = ours(*condition.values()), MultiIPAdapterImageProjection([layer])([embeds])[0].flatten(1, 2)
    assert tokens.shape == theirs.shape == (BATCH, TOKENS[name], TEXT)
    assert off(tokens, theirs, tokens.abs().max()) <= TOKENS_OFF


# What a file holds and how strong it is differs by the LoRA: one that has it and one base are enough.
with_lora = pytest.mark.parametrize("case", by_default("faceid-plusv2-sdxl"), indirect=True)


@with_lora
def test_containers_and_ways_of_loading_agree(case, loaded):
    condition = condition_of(case.name)
    assert torch.equal(case.theirs(case.pipeline(".bin", **STRICT), condition), case.theirs(loaded, condition))


@pytest.mark.parametrize("scale", [0.0, 0.6])
def test_scale_means_the_same(case, loaded, scale):
    """Of the image tokens; the LoRA keeps its strength."""
    condition = condition_of(case.name)
    effect = (case.theirs(loaded, condition) - case.bare).abs().max()
    loaded.set_ip_adapter_scale(scale)
    set_scale(case.model, scale)
    theirs, ours = case.theirs(loaded, condition), case.ours(condition)
    loaded.set_ip_adapter_scale(1.0)
    set_scale(case.model)
    assert off(ours, theirs, effect) <= NOISE_OFF
    assert torch.equal(theirs, case.bare) is (scale == 0 and case.name not in WITH_LORA)


def test_scale_zero_and_lora_off_is_the_untouched_base(case):
    set_scale(case.model, 0, 0)
    ours = case.ours(condition_of(case.name))
    set_scale(case.model)
    assert torch.equal(ours, case.bare)


def sampled(made, **how):
    """Latents after two guided steps."""
    asked = {"prompt": "a face", "negative_prompt": "blurry", "height": 64, "width": 64, "guidance_scale": 5.0}
    return made(**asked, latents=numbers(24, 1, 4, 8, 8), num_inference_steps=2, output_type="latent", **how).images


@with_lora
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler scheduler
def test_two_guided_steps_of_the_stock_pipeline_agree(case, loaded):
    """Once with diffusers' own adapter, once with our UNet handed to the same pipeline."""
    condition = condition_of(case.name)  # its first row plays the unconditional one
    theirs = sampled(loaded, ip_adapter_image_embeds=[given_to(loaded, case.name, condition)])
    with torch.no_grad():
        tokens = case.model.tokens(condition)
    ours = sampled(pipeline_of(case.base, case.model.unet), cross_attention_kwargs={"ip_hidden_states": tokens})
    effect = (theirs - case.sampled_bare).abs().max()
    assert torch.isfinite(theirs).all()
    assert effect > 0.1
    assert off(ours, theirs, effect) <= NOISE_OFF


def test_lora_file_and_adapter_without_lora_make_the_adapter(case, tmp_path):
    lora = case.folder / f"{case.file}_lora.safetensors"
    assert lora.is_file() is (case.name in WITH_LORA)
    if case.name not in WITH_LORA:
        return
    whole = read_released(case.folder / f"{case.file}.bin")
    tensors = {key: value for key, value in whole.items() if "_lora" not in key}
    write_released(tmp_path, "bare", tensors, attention_paths=[], kind=case.kind, sidecar={})
    made = replace(case, folder=tmp_path, file="bare").pipeline()
    condition = condition_of(case.name)
    without = case.theirs(made, condition)
    made.load_lora_weights(str(case.folder), weight_name=lora.name)
    theirs = case.theirs(made, condition)
    effect = (theirs - without).abs().max()
    assert effect > 0.01
    assert off(case.ours(condition), theirs, effect) <= NOISE_OFF


def test_every_lora_pair_lands_in_its_layer_with_strength_one(case, loaded):
    if case.name not in WITH_LORA:
        assert not hasattr(loaded.unet, "peft_config")
        return
    for (path, _), mine in zip(named_attention(case.base.unet), case.model.ip_adapter, strict=True):
        attn = loaded.unet.get_submodule(path)
        for lora, layer in {"to_q": attn.to_q, "to_k": attn.to_k, "to_v": attn.to_v, "to_out": attn.to_out[0]}.items():
            pair = getattr(mine, f"{lora}_lora")
            assert layer.scaling == {"faceid_0": 1.0}, path
            assert torch.equal(layer.lora_A["faceid_0"].weight, pair.down.weight), path
            assert torch.equal(layer.lora_B["faceid_0"].weight, pair.up.weight), path


# ----------------------------------------------------------------------------------------------- single families


@pytest.fixture(params=["sd15", pytest.param("sdxl", marks=pytest.mark.long)])
def make(request, bases, tmp_path):
    """Makes a case of the named variant, on each kind of base."""

    def made(name, **widths):
        with torch.random.fork_rng():
            torch.manual_seed(4)
            return make_case(bases, name, request.param, tmp_path, **widths)

    return made


def test_portrait_with_five_faces(make):
    case = make("faceid-portrait")
    made = case.pipeline()
    condition = condition_of(case.name, faces=5)
    assert assert_same_tokens(case, made, condition).shape == (BATCH, 5, 16, TEXT)
    assert case.model.tokens(condition).shape == (BATCH, 80, TEXT)
    assert_same_noise(case, made, condition)


def test_a_forgotten_shortcut_is_another_adapter(make):
    """The mistake that no check of keys and shapes can catch."""
    case = make("faceid-plusv2")
    made, condition = case.pipeline(), condition_of(case.name)
    embeds = given_to(made, case.name, condition)
    layer_of(made).shortcut = False
    with torch.no_grad():
        tokens = made.unet.encoder_hid_proj([embeds])[0][:, 0]
        assert off(tokens, case.model.tokens(condition), tokens.abs().max()) > 0.1
        without_ids = case.model.tokens(condition) - case.model.image_proj.id_tokens(condition["arcface"])
        assert off(tokens, without_ids, tokens.abs().max()) <= TOKENS_OFF


@pytest.mark.parametrize(
    ("name", "features", "length"),
    [
        pytest.param("plus", 1024, 257, marks=pytest.mark.long),
        pytest.param("plus", 1024, 261, marks=pytest.mark.long),
        pytest.param("plus-face", 384, 257, marks=pytest.mark.long),
        pytest.param("full-face", 1024, 257, marks=pytest.mark.long),
        ("full-face", 1024, 261),
        pytest.param("faceid-plusv2", 1024, 257, marks=pytest.mark.long),
    ],
)
def test_dino_features(make, name, features, length):
    case = make(name, features=features)
    made = case.pipeline(**STRICT)
    condition = condition_of(name, features=features, length=length)
    assert type(layer_of(made)).__name__ == CLASSES[name]
    assert assert_same_tokens(case, made, condition).shape[2] == (length if name == "full-face" else TOKENS[name])
    assert_same_noise(case, made, condition)


@pytest.mark.long
def test_pooled_features_of_another_width(make):
    case = make("ip-adapter", pooled=384)
    made, condition = case.pipeline(), {"pooled": numbers(9, BATCH, 384)}
    assert_same_tokens(case, made, condition)
    assert_same_noise(case, made, condition)


# ------------------------------------------------------------------------------------------------------- ComfyUI


def detected(file, image_proj, ip_adapter):
    """What ComfyUI_IPAdapter_plus takes a file for: its rules in our words."""
    full = "proj.3.weight" in image_proj
    plus = full or "latents" in image_proj or "perceiver_resampler.proj_in.weight" in image_proj
    has_lora = "0.to_q_lora.down.weight" in ip_adapter
    portrait = "proj.2.weight" in image_proj and not full and not has_lora
    faceid = portrait or has_lora
    sixteen = (plus and not faceid) or portrait
    return {
        "tokens": 257 if full else 16 if sixteen else 4,
        "sdxl": ip_adapter["1.to_k_ip.weight"].shape[1] == 2048,
        "type": "full" if full else "portrait" if portrait else "faceid" * faceid + "plus" * plus,
        "v2": "plusv2" in file,
        "unnorm": "unnorm" in file,
    }


COMFY = {
    "ip-adapter": "",
    "plus": "plus",
    "plus-face": "plus",
    "full-face": "full",
    "faceid": "faceid",
    "faceid-portrait": "portrait",
    "faceid-plus": "faceidplus",
    "faceid-plusv2": "faceidplus",
}


@pytest.fixture(scope="module")
def wide(bases):
    """UNets of full text width on the meta device, by kind: only keys and shapes matter."""
    widths = {"sd15": 768, "sdxl": 2048}
    with shapes_alone():
        return {
            kind: diffusers.UNet2DConditionModel.from_config(
                {**bases[kind].unet.config, "cross_attention_dim": widths[kind]}
            )
            for kind in KINDS
        }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_comfyui_takes_each_file_for_what_it_is(wide, name, kind):
    with shapes_alone():
        model = adapter(wide[kind], name, kind, 4)
    parts = {part: getattr(model, part).state_dict() for part in ("image_proj", "ip_adapter")}
    rest = {"sdxl": kind == "sdxl", "v2": name == "faceid-plusv2", "unnorm": False}
    for encoder in ("clip-vit-h", "dinov2"):
        told = detected(variant(name).released_name(kind, encoder), **parts)
        assert told == {"tokens": TOKENS[name], "type": COMFY[name], **rest}


def test_comfyui_would_take_faceid_without_lora_for_a_portrait():
    """The reason why files of the FaceID family always hold a LoRA."""
    image_proj = dict.fromkeys(("proj.0.weight", "proj.2.weight", "norm.weight"))
    assert detected("x", image_proj, {"1.to_k_ip.weight": torch.empty(4, 768)})["type"] == "portrait"
