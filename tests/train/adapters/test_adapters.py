"""The adapters against the published tables at full size (on the meta device), and against plain arithmetic."""

import functools
import json
import math

import diffusers
import pytest
import torch
from tiny_adapters import (
    KINDS,
    WITH_LORA,
    adapter,
    by_default,
    copy_of,
    numbers,
    published_unet,
    set_scale,
    shapes_alone,
    tiny_unet,
)
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.functional import gelu, layer_norm, linear, normalize

from pipeline.train.adapters.attention import AdapterAttention, Lora, install, named_attention
from pipeline.train.adapters.released import lora_tensors
from pipeline.train.adapters.variants import VARIANTS, IdMlp, Perceiver, Resampler, Widths, variant
from pipeline.train.settings import AdapterSettings
from schemas.errors import ConfigError

TEXT = {"sd15": 768, "sdxl": 2048}


# --------------------------------------------------------------------------------- full size: keys, shapes, bytes


@pytest.fixture(scope="module")
def full():
    """The real UNets without weights."""
    return {kind: published_unet(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def trained_of(full):
    """What is trained of a variant at full size."""

    @functools.cache
    def trained(name, kind, **widths):
        with shapes_alone():
            return adapter(full[kind], name, kind, AdapterSettings().lora_rank, **widths).trained()

    return trained


CROSS_WIDTHS = {
    "sd15": [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280],
    "sdxl": [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10,
}


def resampler_shapes(dim, features, out):
    shapes = {
        "proj_in.weight": (dim, features),
        "proj_in.bias": (dim,),
        "proj_out.weight": (out, dim),
        "proj_out.bias": (out,),
        "norm_out.weight": (out,),
        "norm_out.bias": (out,),
    }
    for i in range(4):
        norms = (f"layers.{i}.0.norm1", f"layers.{i}.0.norm2", f"layers.{i}.1.0")
        shapes |= {f"{norm}.{part}": (dim,) for norm in norms for part in ("weight", "bias")}
        shapes |= {
            f"layers.{i}.0.to_q.weight": (dim, dim),
            f"layers.{i}.0.to_kv.weight": (2 * dim, dim),
            f"layers.{i}.0.to_out.weight": (dim, dim),
            f"layers.{i}.1.1.weight": (4 * dim, dim),
            f"layers.{i}.1.3.weight": (dim, 4 * dim),
        }
    return shapes


def id_shapes(tokens, out):
    hidden = {"proj.0.weight": (1024, 512), "proj.0.bias": (1024,)}
    last = {"proj.2.weight": (tokens * out, 1024), "proj.2.bias": (tokens * out,)}
    return {**hidden, **last, "norm.weight": (out,), "norm.bias": (out,)}


def image_proj_shapes(name, kind):
    """The published tables, written out."""
    out, dim = TEXT[kind], {"sd15": 768, "sdxl": 1280}[kind]
    if name == "ip-adapter":
        return {
            "proj.weight": (4 * out, 1024),
            "proj.bias": (4 * out,),
            "norm.weight": (out,),
            "norm.bias": (out,),
        }
    if name in ("plus", "plus-face"):
        return {"latents": (1, 16, dim), **resampler_shapes(dim, 1280, out)}
    if name == "full-face":
        first, second = {"weight": (1280, 1280), "bias": (1280,)}, {"weight": (out, 1280), "bias": (out,)}
        layers = {"proj.0": first, "proj.2": second, "proj.3": {"weight": (out,), "bias": (out,)}}
        return {f"{layer}.{part}": shape for layer, parts in layers.items() for part, shape in parts.items()}
    if name in ("faceid", "faceid-portrait"):
        return id_shapes({"faceid": 4, "faceid-portrait": 16}[name], out)
    perceiver = {f"perceiver_resampler.{key}": shape for key, shape in resampler_shapes(out, 1280, out).items()}
    return {**id_shapes(4, out), **perceiver}


def ip_adapter_shapes(name, kind):
    shapes, text = {}, TEXT[kind]
    for cross, width in enumerate(CROSS_WIDTHS[kind]):
        n = 2 * cross + 1
        shapes |= {f"{n}.to_k_ip.weight": (width, text), f"{n}.to_v_ip.weight": (width, text)}
        if name not in WITH_LORA:
            continue
        for processor, context in ((n - 1, width), (n, text)):  # self-attention stands before its cross-attention
            for lora, wide in {"to_q": width, "to_k": context, "to_v": context, "to_out": width}.items():
                shapes[f"{processor}.{lora}_lora.down.weight"] = (128, wide)
                shapes[f"{processor}.{lora}_lora.up.weight"] = (width, 128)
    return shapes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_keys_and_shapes_are_the_published_ones(trained_of, name, kind):
    expected = {f"image_proj.{key}": shape for key, shape in image_proj_shapes(name, kind).items()}
    expected |= {f"ip_adapter.{key}": shape for key, shape in ip_adapter_shapes(name, kind).items()}
    assert {key: tuple(value.shape) for key, value in trained_of(name, kind).items()} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_processors_stand_in_their_published_order(full, kind):
    paths = [path for path, _ in named_attention(full[kind])]
    assert [path.rpartition(".")[2] for path in paths] == ["attn1", "attn2"] * (len(paths) // 2)
    assert len(paths) == {"sd15": 32, "sdxl": 140}[kind]
    parts = [path.partition(".")[0] for path in paths]
    assert parts == sorted(parts, key=["down_blocks", "up_blocks", "mid_block"].index)
    cross = [attn.to_q.out_features for path, attn in named_attention(full[kind]) if path.endswith("attn2")]
    assert cross == CROSS_WIDTHS[kind]


def file_size(tensors):
    """Bytes of a .safetensors of these: wider types first, then by name; the header is padded to eights."""
    types = {torch.int64: ("I64", 8), torch.float16: ("F16", 2)}
    header, offset = {}, 0
    for key in sorted(tensors, key=lambda key: (-types[tensors[key].dtype][1], key)):
        name, width = types[tensors[key].dtype]
        end = offset + tensors[key].numel() * width
        header[key] = {"dtype": name, "shape": list(tensors[key].shape), "data_offsets": [offset, end]}
        offset = end
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + math.ceil(text / 8) * 8 + offset


def halved(tensors):
    """As they are written: float16."""
    return {key: value.detach().to(torch.float16) for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("name", "kind", "widths", "size"),
    [
        ("ip-adapter", "sd15", {}, 44_642_768),
        ("ip-adapter", "sd15", {"pooled": 1280}, 46_215_640),
        ("plus", "sd15", {}, 98_183_288),
        ("plus-face", "sd15", {}, 98_183_288),
        ("full-face", "sd15", {}, 43_592_352),
        ("ip-adapter", "sdxl", {}, 698_391_064),
        ("ip-adapter", "sdxl", {"pooled": 1280}, 702_585_376),
        ("plus", "sdxl", {}, 847_517_512),
        ("plus-face", "sdxl", {}, 847_517_512),
    ],
)
def test_size_of_the_released_file_is_reproduced_to_the_byte(trained_of, name, kind, widths, size):
    assert file_size(halved(trained_of(name, kind, **widths))) == size


@pytest.mark.parametrize(("kind", "size"), [("sd15", 51_059_544), ("sdxl", 371_842_896)])
@pytest.mark.parametrize("name", WITH_LORA)
def test_size_of_the_released_lora_is_reproduced_to_the_byte(full, trained_of, name, kind, size):
    paths = [path for path, _ in named_attention(full[kind])]
    lora = lora_tensors(halved(trained_of(name, kind)), paths, kind)
    assert file_size(lora) == size
    assert not {key for key in lora if not key.startswith("lora_unet_")}
    first = "lora_unet_down_blocks_0_attentions_0" if kind == "sd15" else "lora_unet_down_blocks_1_attentions_0"
    for layer in ("to_q", "to_k", "to_v", "to_out_0"):
        assert f"{first}_transformer_blocks_0_attn1_{layer}.lora_down.weight" in lora
        assert f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_{layer}.lora_up.weight" in lora


# ---------------------------------------------------------------------------------------------------- tiny models


@pytest.fixture(scope="module")
def tiny():
    """The UNets of the tiny bases; to be copied, not changed."""
    return {kind: tiny_unet(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def base_of(tiny):
    """What the tiny UNets predict without an adapter."""
    return {kind: bare(tiny[kind], kind) for kind in KINDS}


def adapted(unet, name, kind="sd15", *, rank=8, moved=False):
    """A fresh model; `moved` weights are away from their initial values, so that nothing is zero by luck."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = adapter(copy_of(unet), name, kind, rank).eval()
        for weight in model.trained().values() if moved else ():
            weight.data += (0.05 if weight.ndim > 1 else 0.2) * torch.randn_like(weight)
    return model


CONDITION = {
    "arcface": normalize(numbers(1, 2, 512), dim=-1),
    "pooled": numbers(2, 2, 1024),
    "hidden": numbers(3, 2, 257, 1280),
}
INPUTS = {"noisy_latents": numbers(4, 2, 4, 8, 8), "timesteps": torch.tensor([17, 731]), "text": numbers(5, 2, 77, 128)}
ADDED = {
    "sd15": None,
    "sdxl": {"text_embeds": numbers(6, 2, 64), "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64.0]] * 2)},
}


@torch.no_grad()
def bare(unet, kind):
    latents, timesteps, text = INPUTS.values()
    return unet(latents, timesteps, text, added_cond_kwargs=ADDED[kind]).sample


def predicted(model):
    return model(**INPUTS, condition=CONDITION, added=ADDED[model.widths.kind])


@pytest.mark.parametrize("pair", by_default("ip-adapter-sd15", "faceid-plusv2-sdxl"))
def test_zero_scale_and_lora_off_is_exactly_the_base(tiny, base_of, pair):
    name, kind = pair
    model, base = adapted(tiny[kind], name, kind, moved=True), base_of[kind]
    with torch.no_grad():
        assert (predicted(model) - base).abs().max() > 0.01
        set_scale(model, 0, 0)
        assert torch.equal(predicted(model), base)
        set_scale(model, 0, 1)
        assert torch.equal(predicted(model), base) is (name not in WITH_LORA)
        set_scale(model, 1, 0)
        assert not torch.equal(predicted(model), base)


@pytest.mark.parametrize("pair", by_default("full-face-sd15", "faceid-portrait-sd15", "faceid-plusv2-sdxl"))
def test_gradient_reaches_exactly_what_is_trained(tiny, pair):
    name, kind = pair
    model = adapted(tiny[kind], name, kind, moved=True)
    if name == "faceid-plusv2":
        model.image_proj.p_drop = 0.0
    predicted(model.train()).square().mean().backward()
    trained = {id(weight) for weight in model.trained().values()}
    for key, weight in model.trained().items():
        assert weight.dtype == torch.float32, key
        assert weight.grad is not None, key
        assert weight.grad.any(), key
    frozen = [weight for weight in model.parameters() if id(weight) not in trained]
    assert len(frozen) == len(list(tiny[kind].parameters()))
    assert not any(weight.requires_grad or weight.grad is not None for weight in frozen)


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind"), [("faceid-plus", "sd15"), ("faceid-plus", "sdxl"), ("full-face", "sdxl")])
def test_gradient_checkpointing_changes_no_gradient(tiny, name, kind):
    plain, saving = (adapted(tiny[kind], name, kind, moved=True).train() for _ in range(2))
    saving.unet.enable_gradient_checkpointing()
    for model in (plain, saving):
        predicted(model).square().mean().backward()
    expected = plain.trained()
    for key, weight in saving.trained().items():
        torch.testing.assert_close(weight.grad, expected[key].grad, rtol=1e-4, atol=1e-7)


def test_adapter_trains_in_float32_over_a_bfloat16_base_under_autocast(tiny):
    unet = copy_of(tiny["sd15"]).to(torch.bfloat16)
    model = adapted(unet, "faceid-plusv2", moved=True).train()
    model.image_proj.p_drop = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        noise = predicted(model)
    noise.float().square().mean().backward()
    exact = predicted(adapted(tiny["sd15"], "faceid-plusv2", moved=True))
    assert (noise - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(weight.grad.dtype == torch.float32 and weight.grad.any() for weight in model.trained().values())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.filterwarnings("ignore:Dynamo detected:UserWarning")
@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_compiled_it_is_one_graph_that_computes_the_same(tiny, kind, monkeypatch):
    # Traced, not generated, which takes minutes on a CPU; a second graph would be an error.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True, backend="eager"))
    plain, compiled = (adapted(copy_of(tiny[kind]), "faceid-plusv2", kind, moved=True).train() for _ in range(2))
    compiled.compile_predict(2)
    outputs = []
    for model in (plain, compiled):
        model.image_proj.p_drop = 0.0
        outputs.append(predicted(model))
        outputs[-1].square().mean().backward()
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    gradients = {key: weight.grad for key, weight in plain.trained().items()}
    for key, weight in compiled.trained().items():
        torch.testing.assert_close(weight.grad, gradients[key], rtol=1e-3, atol=1e-6)
    norm = compiled.unet.down_blocks[0].resnets[0].norm1
    x = torch.rand(1, norm.num_channels, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    (gradient,) = torch.autograd.grad(norm(x).square().sum(), x)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.filterwarnings("ignore:Dynamo detected:UserWarning")
@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_compiled_nothing_is_copied_for_a_convolution_nor_put_together_for_geglu(tiny, kind, monkeypatch):
    convolutions, backward = [], []

    def look(module, _inputs):
        for node in module.graph.nodes:
            if str(node.target).startswith("aten.convolution"):
                images = node.args[:2] if "backward" in str(node.target) else node.args[:1]
                convolutions.extend((node.name, image.meta["val"]) for image in images)
        return make_boxed_func(module.forward)

    def look_back(module, inputs):
        backward.extend(str(node.target) for node in module.graph.nodes)
        return look(module, inputs)

    backend = aot_autograd(fw_compiler=look, bw_compiler=look_back)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = adapted(copy_of(tiny[kind]), "ip-adapter", kind).train()
    model.compile_predict(2)
    predicted(model).square().mean().backward()
    assert sum("backward" in name for name, _ in convolutions) > 20
    assert not [name for name, image in convolutions if not image.is_contiguous(memory_format=torch.channels_last)]
    assert "aten.cat.default" not in backward


def test_what_is_left_of_an_epoch_is_not_compiled_for(tiny, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        torch, "compile", lambda run, **_: lambda noisy, *of: sizes.append(len(noisy)) or run(noisy, *of)
    )
    model = adapted(copy_of(tiny["sd15"]), "ip-adapter")
    model.compile_predict(2)
    for count in (2, 1, 2):
        inputs = (
            numbers(0, count, 4, 8, 8),
            torch.zeros(count, dtype=torch.long),
            numbers(1, count, 77, model.widths.text),
        )
        assert len(model(*inputs, {"pooled": numbers(2, count, model.widths.pooled)})) == count
    assert sizes == [2, 2]


def test_under_autocast_the_frozen_unet_computes_in_its_own_precision(tiny):
    model = adapted(copy_of(tiny["sd15"]).to(torch.bfloat16), "faceid-plusv2", moved=True)
    seen = set()
    for module in model.unet.modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.register_forward_hook(lambda _, inputs, output: seen.update((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        predicted(model)
    assert seen == {torch.bfloat16}


def test_every_variant_is_registered_under_its_own_name():
    for name in VARIANTS:
        assert variant(name).name == name
        assert set(variant(name).reads) <= set(CONDITION)
        assert variant(name).lora is (name in WITH_LORA)
        assert variant(name).shortcut is (name == "faceid-plusv2")


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'faceid-v2' is not known.*faceid-portrait, faceid-plus, faceid-plusv2"):
        variant("faceid-v2")


# ------------------------------------------------------------------------------------------------- initial values


@pytest.mark.parametrize("kind", KINDS)
def test_image_keys_and_values_start_as_copies_of_the_texts(tiny, kind):
    model = adapted(tiny[kind], "ip-adapter", kind)
    for number, (path, attn) in enumerate(named_attention(model.unet)):
        mine = model.ip_adapter[number]
        assert hasattr(mine, "to_k_ip") is path.endswith("attn2")
        assert not any("lora" in key for key, _ in mine.named_parameters())
        if path.endswith("attn2"):
            assert torch.equal(mine.to_k_ip.weight, attn.to_k.weight)
            assert torch.equal(mine.to_v_ip.weight, attn.to_v.weight)
            assert mine.to_k_ip.weight.data_ptr() != attn.to_k.weight.data_ptr(), "the base would be trained along"


def test_lora_starts_without_effect(tiny):
    model = adapted(tiny["sd15"], "faceid", rank=128)
    with torch.no_grad():
        with_lora = predicted(model)
        set_scale(model, 1, 0)
        assert torch.equal(predicted(model), with_lora)
    loras = [module for module in model.ip_adapter.modules() if isinstance(module, Lora)]
    assert len(loras) == 4 * len(model.ip_adapter)
    down = torch.cat([lora.down.weight.flatten() for lora in loras])
    assert not any(lora.up.weight.any() for lora in loras)
    assert down.mean().abs() < 1e-4
    assert down.std().item() == pytest.approx(1 / 128, rel=0.01)


def test_latents_start_as_published():
    with torch.random.fork_rng():
        torch.manual_seed(6)
        latents = Resampler(320, 8, 16).latents
    assert latents.shape == (1, 16, 320)
    assert latents.std().item() == pytest.approx(320**-0.5, rel=0.03)


# -------------------------------------------------------------------------------- arithmetic written out once more


def attended(query, key, value, heads):
    """Softmax attention of (B, N, width), one head after another, in float64."""
    split = [x.double().chunk(heads, dim=-1) for x in (query, key, value)]
    weights = [(q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) for q, k in zip(*split[:2], strict=True)]
    return torch.cat([w @ v for w, v in zip(weights, split[2], strict=True)], dim=-1)


def written_out(attn, mine, x, text=None, image=None):
    """One attention layer with its adapter, from the weights."""

    def project(layer, lora, given):
        pair = getattr(mine, lora, None)
        plain = linear(given.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
        if pair is None:
            return plain
        return plain + mine.lora_scale * given.double() @ pair.down.weight.double().mT @ pair.up.weight.double().mT

    context = x if text is None else text
    query = project(attn.to_q, "to_q_lora", x)
    key, value = project(attn.to_k, "to_k_lora", context), project(attn.to_v, "to_v_lora", context)
    out = attended(query, key, value, attn.heads)
    if image is not None:
        key, value = (linear(image.double(), layer.weight.double()) for layer in (mine.to_k_ip, mine.to_v_ip))
        out = out + mine.scale * attended(query, key, value, attn.heads)
    return project(attn.to_out[0], "to_out_lora", out)


def attention(context, rank):
    with torch.random.fork_rng():
        torch.manual_seed(8)
        attn = diffusers.models.attention_processor.Attention(32, context, heads=4, dim_head=8)
        mine = AdapterAttention(attn, cross=context is not None, lora_rank=rank)
        for weight in mine.parameters():
            weight.data += 0.3 * torch.randn_like(weight)
    attn.set_processor(mine)
    return attn, mine


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("scale", "lora_scale"), [(1.0, 1.0), (0.7, 0.4)])
@pytest.mark.parametrize("context", [None, 24])
@torch.no_grad()
def test_fused_attention_is_plain_softmax(rank, scale, lora_scale, context):
    attn, mine = attention(context, rank)
    mine.scale, mine.lora_scale = scale, lora_scale
    x, text, image = numbers(30, 2, 9, 32), numbers(31, 2, 7, 24), numbers(32, 2, 5, 24)
    given = {} if context is None else {"text": text, "image": image}
    ours = attn(x, encoder_hidden_states=given.get("text"), ip_hidden_states=image)  # self-attention ignores it
    torch.testing.assert_close(ours.double(), written_out(attn, mine, x, **given), rtol=1e-5, atol=1e-5)


def test_attention_that_stable_diffusion_does_not_have_is_refused():
    x = numbers(33, 2, 9, 32)
    attn, mine = attention(None, 0)
    with pytest.raises(ValueError, match="masks or norms"):
        attn(x, attention_mask=torch.zeros(2, 1, 9))
    normed = diffusers.models.attention_processor.Attention(32, heads=4, dim_head=8, norm_num_groups=4)
    normed.set_processor(mine)
    with pytest.raises(ValueError, match="masks or norms"):
        normed(x)


def resampled(weights, latents, features):
    """The published Resampler from its state dict: scale split over q and k, softmax in float32."""

    def norm(name, x):
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attend(i, x, latents):
        x, latents = norm(f"layers.{i}.0.norm1", x), norm(f"layers.{i}.0.norm2", latents)
        q = latents @ weights[f"layers.{i}.0.to_q.weight"].mT
        k, v = (torch.cat([x, latents], 1) @ weights[f"layers.{i}.0.to_kv.weight"].mT).chunk(2, -1)
        heads = []
        for q1, k1, v1 in zip(q.split(64, -1), k.split(64, -1), v.split(64, -1), strict=True):
            heads.append(((q1 * 64**-0.25) @ (k1 * 64**-0.25).mT).float().softmax(-1) @ v1)
        return torch.cat(heads, -1) @ weights[f"layers.{i}.0.to_out.weight"].mT

    x = linear(features, weights["proj_in.weight"], weights["proj_in.bias"])
    for i in range(4):
        latents = latents + attend(i, x, latents)
        hidden = norm(f"layers.{i}.1.0", latents) @ weights[f"layers.{i}.1.1.weight"].mT
        latents = latents + gelu(hidden) @ weights[f"layers.{i}.1.3.weight"].mT
    return norm("norm_out", linear(latents, weights["proj_out.weight"], weights["proj_out.bias"]))


def moved(make, *given, **named):
    """A network of known weights, away from their initial values."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        module = make(*given, **named)
    for number, weight in enumerate(module.parameters()):
        weight.data += (0.05 if weight.ndim > 1 else 0.2) * numbers(40 + number, *weight.shape)
    return module.eval()


@pytest.mark.parametrize(("dim", "out"), [(128, 128), (192, 320)])
@torch.no_grad()
def test_resampler_is_the_published_one(dim, out):
    made, features = moved(Resampler, dim, 48, out), numbers(34, 3, 37, 48)
    weights = made.state_dict()
    expected = resampled(weights, weights["latents"].expand(3, -1, -1), features)
    assert (made(features) - expected).abs().max() <= 1e-5
    perceiver, latents = moved(Perceiver, dim, 48, out), numbers(35, 3, 4, dim)
    assert (perceiver(latents, features) - resampled(perceiver.state_dict(), latents, features)).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------- portrait and plusv2


@pytest.mark.parametrize("faces", [1, 2, 5])
@torch.no_grad()
def test_portrait_of_several_faces_is_their_tokens_side_by_side(faces):
    made, arcface = moved(IdMlp, Widths("sd15", 128), 16), normalize(numbers(36, 3, faces, 512), dim=-1)
    assert made(arcface).shape == (3, 16 * faces, 128)
    singly = torch.cat([made(arcface[:, face]) for face in range(faces)], dim=1)
    torch.testing.assert_close(made(arcface), singly, rtol=1e-4, atol=1e-5)


def shortcut_net(name="faceid-plusv2", **settings):
    return moved(variant(name).image_proj, Widths("sd15", 128, features=16), AdapterSettings(**settings)).train()


def few_features(batch=64):
    return normalize(numbers(50, batch, 512), dim=-1), numbers(51, batch, 3, 16)


def test_plusv2_drops_nothing_while_evaluating():
    made, (arcface, hidden) = shortcut_net(p_drop_clip=1.0).eval(), few_features()
    ids = made.id_tokens(arcface)
    torch.testing.assert_close(made(arcface, hidden), ids + made.perceiver_resampler(ids, hidden))


def test_plusv2_with_every_branch_dropped_trains_the_ids_alone():
    made, (arcface, hidden) = shortcut_net(p_drop_clip=1.0), few_features()
    tokens = made(arcface, hidden)
    assert torch.equal(tokens, made.id_tokens(arcface))
    tokens.square().mean().backward()
    for key, weight in made.named_parameters():
        # zero rather than none: processes that train together wait for each gradient
        assert weight.grad is not None, key
        assert bool(weight.grad.any()) is not key.startswith("perceiver_resampler."), key


@pytest.mark.parametrize(
    "p_drop", [pytest.param(0.1, marks=pytest.mark.long), 0.5, pytest.param(0.8, marks=pytest.mark.long)]
)
@torch.no_grad()
def test_plusv2_drops_its_share_sample_by_sample(p_drop):
    made, (arcface, hidden) = shortcut_net(p_drop_clip=p_drop), few_features()
    ids = made.id_tokens(arcface)
    kept = ids + made.perceiver_resampler(ids, hidden)
    dropped, draws = 0, 10
    with torch.random.fork_rng():
        torch.manual_seed(10)
        for _ in range(draws):
            tokens = made(arcface, hidden)
            off = (tokens == ids).all(dim=(1, 2))
            torch.testing.assert_close(tokens[~off], kept[~off], rtol=1e-4, atol=1e-5)
            assert 0 < off.sum() < len(off), "one draw per sample, not per batch"
            dropped += int(off.sum())
    samples = draws * len(arcface)
    assert abs(dropped - p_drop * samples) < 4 * (samples * p_drop * (1 - p_drop)) ** 0.5


def test_plusv2_drops_half_by_default():
    made = shortcut_net()
    assert (made.p_drop, made.rescale) == (0.5, False)


@torch.no_grad()
def test_plusv2_rescales_the_kept_branch_only_if_asked():
    made, (arcface, hidden) = shortcut_net(p_drop_clip=0.75, rescale_clip=True), few_features()
    ids = made.id_tokens(arcface)
    branch = made.perceiver_resampler(ids, hidden)
    with torch.random.fork_rng():
        torch.manual_seed(12)
        tokens = made(arcface, hidden)
    off = (tokens == ids).all(dim=(1, 2))
    assert 0 < off.sum() < len(off)
    torch.testing.assert_close(tokens[~off], (ids + 4 * branch)[~off], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.eval()(arcface, hidden), ids + branch)


@torch.no_grad()
def test_plusv2_is_faceid_plus_and_the_ids():
    plus, v2, features = shortcut_net("faceid-plus"), shortcut_net().eval(), few_features()
    plus.load_state_dict(v2.state_dict())  # strict: nothing in the weights tells the two apart
    assert torch.equal(v2(*features), v2.id_tokens(features[0]) + plus(*features))


def test_install_gives_every_layer_its_own_processor(tiny):
    unet = copy_of(tiny["sd15"])
    processors = install(unet, lora_rank=2)
    assert [id(processor) for processor in unet.attn_processors.values()] == [id(module) for module in processors]
    assert len({id(module) for module in processors}) == len(processors)
