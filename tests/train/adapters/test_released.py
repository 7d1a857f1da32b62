"""Released files: names, containers, contents, and all that is refused when one is read as a starting point."""

import functools
import io
import json
import os
import pickle
import random
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_adapters import KINDS, WITH_LORA, adapter, by_default, copy_of, tiny_unet

from pipeline.train.adapters.attention import named_attention
from pipeline.train.adapters.released import read_released, require_fit, write_released
from pipeline.train.adapters.variants import VARIANTS, variant
from schemas.errors import FaceShardsError, SourceError

RANK = 4


@pytest.fixture(scope="module")
def unets():
    """The UNets of the tiny bases; to be copied, not changed."""
    return {kind: tiny_unet(kind) for kind in KINDS}


def model_of(unets, name, kind="sd15", *, seed=1, rank=RANK):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = adapter(copy_of(unets[kind]), name, kind, rank)
        for weight in model.trained().values():
            weight.data += 0.1 * torch.randn_like(weight)
    return model


@pytest.fixture(scope="module")
def known(unets):
    """A model for all tests that leave its weights as they are."""
    return functools.cache(functools.partial(model_of, unets))


def released(folder, model, name="x"):
    paths = [path for path, _ in named_attention(model.unet)]
    kind = model.widths.kind
    return write_released(folder, name, model.trained(), attention_paths=paths, kind=kind, sidecar={"variant": "it"})


# -------------------------------------------------------------------------------------------------- names, contents

NAMES = {
    ("ip-adapter", "sd15"): "ip-adapter_sd15",
    ("ip-adapter", "sdxl"): "ip-adapter_sdxl_vit-h",
    ("plus", "sd15"): "ip-adapter-plus_sd15",
    ("plus", "sdxl"): "ip-adapter-plus_sdxl_vit-h",
    ("plus-face", "sd15"): "ip-adapter-plus-face_sd15",
    ("plus-face", "sdxl"): "ip-adapter-plus-face_sdxl_vit-h",
    ("full-face", "sd15"): "ip-adapter-full-face_sd15",
    ("full-face", "sdxl"): "ip-adapter-full-face_sdxl_vit-h",
    ("faceid", "sd15"): "ip-adapter-faceid_sd15",
    ("faceid", "sdxl"): "ip-adapter-faceid_sdxl",
    ("faceid-portrait", "sd15"): "ip-adapter-faceid-portrait_sd15",
    ("faceid-portrait", "sdxl"): "ip-adapter-faceid-portrait_sdxl",
    ("faceid-plus", "sd15"): "ip-adapter-faceid-plus_sd15",
    ("faceid-plus", "sdxl"): "ip-adapter-faceid-plus_sdxl",
    ("faceid-plusv2", "sd15"): "ip-adapter-faceid-plusv2_sd15",
    ("faceid-plusv2", "sdxl"): "ip-adapter-faceid-plusv2_sdxl",
}


def test_names_are_the_published_ones():
    given = {(name, kind): variant(name).released_name(kind, "clip-vit-h") for name in VARIANTS for kind in KINDS}
    assert given == NAMES


@pytest.mark.parametrize("name", VARIANTS)
def test_name_tells_another_image_encoder_where_it_matters(name):
    clip, dino = (variant(name).released_name("sd15", encoder) for encoder in ("clip-vit-h", "dinov2"))
    assert ("dinov2" in dino) is (name not in ("faceid", "faceid-portrait"))
    assert dino.startswith(clip)
    assert ("plusv2" in dino) is (name == "faceid-plusv2")


# What differs is whether there is a LoRA, and its form on SDXL.
two_kinds_of_files = pytest.mark.parametrize("pair", by_default("ip-adapter-sd15", "faceid-plusv2-sdxl"))


@two_kinds_of_files
def test_both_containers_hold_the_weights_in_float16_and_nothing_else(known, tmp_path, pair):
    name, kind = pair
    model = known(name, kind)
    files = released(tmp_path, model)
    ends = [".safetensors", ".bin", *["_lora.safetensors"] * (name in WITH_LORA), ".json"]
    assert [path.name for path in files] == [f"x{end}" for end in ends]
    assert sorted(tmp_path.iterdir()) == sorted(files), "no stray files"
    expected = {key: weight.detach().half() for key, weight in model.trained().items()}
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata() is None
    flat, nested = load_file(files[0]), torch.load(files[1], weights_only=True)
    assert list(nested) == ["image_proj", "ip_adapter"]
    assert flat.keys() == expected.keys()
    for key, weight in expected.items():
        part, _, rest = key.partition(".")
        assert flat[key].dtype == nested[part][rest].dtype == torch.float16
        assert torch.equal(flat[key], weight), key
        assert torch.equal(nested[part][rest], weight), key
    assert sum(map(len, nested.values())) == len(expected)
    assert json.loads(files[-1].read_bytes()) == {"variant": "it"}


def test_the_same_weights_give_the_same_bytes(known, tmp_path):
    model = known("faceid", "sd15")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        released(folder, model)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    with zipfile.ZipFile(first / "x.bin") as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {"archive"}, "no temporary name in the file"


@pytest.mark.parametrize("kind", KINDS)
def test_lora_file_holds_the_same_matrices_under_the_layers_paths(known, tmp_path, kind):
    model = known("faceid-plusv2", kind)
    lora = load_file(released(tmp_path, model)[2])
    modules = {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out_0"}
    expected = {}
    for (path, _), processor in zip(named_attention(model.unet), model.ip_adapter, strict=True):
        for mine, theirs in modules.items():
            stem = f"lora_unet_{path.replace('.', '_')}_{theirs}"
            expected[f"{stem}.lora_down.weight"] = getattr(processor, mine).down.weight.detach().half()
            expected[f"{stem}.lora_up.weight"] = getattr(processor, mine).up.weight.detach().half()
            if kind == "sdxl":
                expected[f"{stem}.alpha"] = torch.tensor(RANK, dtype=torch.int64)
    assert lora.keys() == expected.keys()
    for key, tensor in expected.items():
        assert lora[key].dtype == tensor.dtype, key
        assert torch.equal(lora[key], tensor), key


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70_000.0])
def test_weights_that_float16_cannot_hold_are_not_written(unets, tmp_path, value):
    model = model_of(unets, "ip-adapter")
    model.image_proj.norm.bias.data[3] = value
    with pytest.raises(FaceShardsError, match=r"image_proj\.norm\.bias .* not finite in float16"):
        released(tmp_path, model)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- read again


def start_from(path, model):
    """What `--init-from` does."""
    tensors = read_released(path)
    require_fit(path, tensors, model.trained(), model.variant.name)
    model.load_trained(tensors)


@two_kinds_of_files
def test_both_containers_are_a_starting_point(unets, known, tmp_path, pair):
    name, kind = pair
    model, other = known(name, kind), model_of(unets, name, kind, seed=2)
    mine = other.trained()
    for path in released(tmp_path, model)[:2]:
        for weight in mine.values():
            weight.data.fill_(9)
        start_from(path, other)
        assert {key: id(weight) for key, weight in mine.items()} == {k: id(w) for k, w in other.trained().items()}
        for key, weight in model.trained().items():
            assert torch.equal(mine[key], weight.detach().half().float()), key
            assert (mine[key].dtype, mine[key].requires_grad) == (torch.float32, True), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_are_read_too(unets, tmp_path, dtype):
    model, other = model_of(unets, "plus"), model_of(unets, "plus", seed=2)
    save_file({key: weight.detach().to(dtype) for key, weight in model.trained().items()}, tmp_path / "x.safetensors")
    start_from(tmp_path / "x.safetensors", other)
    for key, weight in model.trained().items():
        assert torch.equal(other.trained()[key], weight.detach().to(dtype).float()), key


def test_a_plusv2_file_starts_faceid_plus(unets, tmp_path):
    """Nothing but the name tells the two apart."""
    released(tmp_path, model_of(unets, "faceid-plusv2"))
    start_from(tmp_path / "x.bin", model_of(unets, "faceid-plus", seed=2))


def refusal(path, model):
    """The sentence that a file is refused with; the model stays as it was."""
    before = {key: weight.detach().clone() for key, weight in model.trained().items()}
    with pytest.raises(SourceError) as refused:
        start_from(path, model)
    assert all(torch.equal(weight, before[key]) for key, weight in model.trained().items())
    told = str(refused.value)
    assert told.startswith(str(path))
    assert told.endswith(".")
    assert "\n" not in told
    return told.removeprefix(str(path)).strip()


@pytest.mark.parametrize(
    ("file", "wanted", "why"),
    [
        ("faceid", "faceid-plus", "it lacks image_proj.perceiver_resampler."),
        ("faceid", "faceid-plusv2", "it lacks image_proj.perceiver_resampler."),
        ("faceid-plusv2", "faceid", "it has the unknown image_proj.perceiver_resampler."),
        ("faceid-portrait", "faceid", "it lacks ip_adapter.0.to_k_lora.down.weight"),
        ("faceid", "faceid-portrait", "it has the unknown ip_adapter.0.to_k_lora.down.weight"),
        ("plus", "full-face", "it lacks image_proj.proj.0.bias"),
        ("ip-adapter", "plus", "it lacks image_proj.latents"),
    ],
)
def test_another_variants_file_is_refused(known, tmp_path, file, wanted, why):
    released(tmp_path, known(file, "sd15"))
    told = refusal(tmp_path / "x.safetensors", known(wanted, "sd15"))
    assert told.startswith(f"is no {wanted} adapter for this base: ")
    assert why in told


def test_another_bases_file_is_refused(known, tmp_path):
    released(tmp_path, known("ip-adapter", "sdxl"))
    told = refusal(tmp_path / "x.bin", known("ip-adapter", "sd15"))
    assert "it has the unknown ip_adapter.15.to_k_ip.weight" in told, "the SDXL-like base has one layer more"


def test_another_lora_rank_is_refused(known, tmp_path):
    released(tmp_path, known("faceid", "sd15"))
    told = refusal(tmp_path / "x.safetensors", known("faceid", "sd15", rank=2 * RANK))
    assert f"to_q_lora.down.weight is [{RANK}, 32], not [{2 * RANK}, 32]" in told


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def without(part):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


def changed(key, change):
    return lambda tensors: {**tensors, key: change(tensors[key])}


def split_keys_and_values(tensors):
    halves = {}
    for key in [key for key in tensors if "to_kv" in key]:
        for name, half in zip(("to_k", "to_v"), tensors[key].chunk(2), strict=True):
            halves[key.replace("to_kv", name)] = half.clone()
    return {**without("to_kv")(tensors), **halves}


def counted_from_zero(tensors):
    """Cross-attention layers numbered 0, 1, 2, … as if there were no others."""

    def number(key):
        part, first, *rest = key.split(".")
        return ".".join([part, str(int(first) // 2), *rest]) if part == "ip_adapter" else key

    return {number(key): tensor for key, tensor in tensors.items()}


def deeper(tensors):
    more = {k.replace("layers.3.", "layers.4."): t.clone() for k, t in tensors.items() if "layers.3." in k}
    return {**tensors, **more}


def poisoned(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[5] = float("nan")
    return tensor


K_IP = "ip_adapter.1.to_k_ip.weight"
WRONG = {
    "names of the module path": ("plus", renamed("ip_adapter.1.", "ip_adapter.down_blocks.0.attn2.processor.")),
    "numbers 0, 1, 2": ("plus", counted_from_zero),
    "names of diffusers": ("plus", renamed("layers.0.0.to_q", "layers.0.attn.to_q")),
    "a wrapper's prefix": ("plus", renamed("image_proj.", "module.image_proj.")),
    "the training state's prefix": ("plus", renamed("ip_adapter.", "adapter_modules.")),
    "keys and values apart": ("plus", split_keys_and_values),
    "three layers": ("plus", without("layers.3.")),
    "five layers": ("plus", deeper),
    "a position embedding": ("plus", lambda t: {**t, "image_proj.pos_emb.weight": torch.zeros(257, 128).half()}),
    "no latents": ("plus", without("latents")),
    "no LayerNorm": ("faceid", without("image_proj.norm")),
    "no LoRA": ("faceid", without("_lora")),
    "LoRA with a matrix missing": ("faceid", without("3.to_v_lora.up")),
    "LoRA on cross-attention alone": ("faceid", lambda t: {k: v for k, v in t.items() if not is_self_lora(k)}),
    "LoRA as peft spells it": ("faceid", renamed("lora.down", "lora_A")),
    "no image tokens' keys": ("ip-adapter", without("to_k_ip")),
    "a transposed matrix": ("ip-adapter", changed(K_IP, lambda w: w.mT.contiguous())),
    "NaN": ("ip-adapter", changed(K_IP, poisoned)),
    "infinity": ("ip-adapter", changed(K_IP, lambda w: w * float("inf"))),
    "integers": ("ip-adapter", changed(K_IP, lambda w: w.to(torch.int8))),
    "an optimiser beside it": ("ip-adapter", lambda t: {**t, "optimizer.step": torch.zeros(1)}),
    "nothing at all": ("ip-adapter", lambda _: {}),
}


def is_self_lora(key):
    part, number, *_ = key.split(".")
    return part == "ip_adapter" and int(number) % 2 == 0


def nest(tensors):
    """As a `.bin`; what stands beside the two parts goes to the top."""
    parts = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts


# What is read of either container is compared by the same lines.
@pytest.mark.parametrize("suffix", [".safetensors", pytest.param(".bin", marks=pytest.mark.long)])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_in_one_sentence(known, tmp_path, case, suffix):
    name, change = WRONG[case]
    model, path = known(name, "sd15", rank=128), tmp_path / f"wrong{suffix}"
    tensors = change({key: weight.detach().half() for key, weight in model.trained().items()})
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(nest(tensors), path)
    told = refusal(path, model)
    assert told.startswith((f"is no {name} adapter for this base: ", "cannot be read as an adapter: "))


def test_the_right_file_of_that_test_is_taken(unets, known, tmp_path):
    for name in ("plus", "faceid", "ip-adapter"):
        model = known(name, "sd15", rank=128)
        torch.save(nest({key: weight.detach().half() for key, weight in model.trained().items()}), tmp_path / "x.bin")
        start_from(tmp_path / "x.bin", model_of(unets, name, rank=128, seed=2))


# -------------------------------------------------------------------------------------------------- hostile and torn


class Harmful:
    """Runs a command where it is unpickled without care."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickled_command_is_never_run(known, tmp_path):
    model, mark = known("ip-adapter", "sd15"), tmp_path / "ran"
    nested = nest({key: weight.detach() for key, weight in model.trained().items()})
    payload = Harmful(f"touch {mark}")
    pickle.loads(pickle.dumps(payload))
    assert mark.exists(), "it does what it says, where it is let"
    mark.unlink()
    for content in (payload, {**nested, "image_proj": payload}, {**nested, "extra": payload}):
        torch.save(content, tmp_path / "x.bin")
        assert "pickled objects" in refusal(tmp_path / "x.bin", model)
        (tmp_path / "x.bin").write_bytes(pickle.dumps(content, protocol=2))
        assert "cannot be read as an adapter" in refusal(tmp_path / "x.bin", model)
    assert not mark.exists()


ODD = {
    "a list": lambda nested: list(nested.values()),
    "flat keys": lambda nested: {f"image_proj.{key}": tensor for key, tensor in nested["image_proj"].items()},
    "one part": lambda nested: {"image_proj": nested["image_proj"]},
    "three parts": lambda nested: {**nested, "optimizer": {}},
    "a tensor for a part": lambda nested: {**nested, "image_proj": torch.zeros(3)},
    "numpy": lambda nested: {**nested, "image_proj": {"norm.bias": np.zeros(128)}},
    "a number among the tensors": lambda nested: {**nested, "image_proj": {**nested["image_proj"], "step": 5}},
    "sparse": lambda nested: {**nested, "image_proj": {"norm.bias": torch.zeros(128).to_sparse()}},
    "no data": lambda nested: {**nested, "image_proj": {"norm.bias": torch.zeros(128, device="meta")}},
}


@pytest.mark.parametrize("case", ODD)
def test_a_bin_of_another_layout_is_refused(known, tmp_path, case):
    model = known("ip-adapter", "sd15")
    nested = nest({key: weight.detach().half() for key, weight in model.trained().items()})
    torch.save(ODD[case](nested), tmp_path / "x.bin")
    assert refusal(tmp_path / "x.bin", model).startswith("cannot be read as an adapter: ")


def test_a_file_that_is_not_there_is_told(known, tmp_path):
    for name in ("x.safetensors", "x.bin"):
        told = refusal(tmp_path / name, known("ip-adapter", "sd15"))
        assert told == "does not exist; give the .safetensors or .bin file of a released adapter."


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_folders_and_things_that_are_no_adapter_are_told(known, tmp_path, name):
    model, path = known("ip-adapter", "sd15"), tmp_path / name
    for content in (b"", b"\0" * 64, b"<!DOCTYPE html>\n<html>", b"\xff\xd8\xff\xe0" + b"x" * 500):
        path.write_bytes(content)
        assert refusal(path, model).startswith("cannot be read as an adapter: ")
    path.unlink()
    path.mkdir()
    assert refusal(path, model).startswith("cannot be read as an adapter: ")


def pickled_anew(raw, draw):
    """The zip with bytes of its pickle changed, and its checksums right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            data = bytearray(old.read(entry))
            if entry.filename.endswith("data.pkl"):
                changed_bytes(data, draw)
            new.writestr(entry.filename, bytes(data))
    return bytearray(out.getvalue())


def changed_bytes(data, draw):
    for _ in range(draw.choice((1, 2, 8))):
        data[draw.randrange(len(data))] = draw.randrange(256)


def damaged(raw, draw):
    data = bytearray(raw)
    how = draw.random()
    if how < 0.2:
        return data[: draw.randrange(len(data))]
    if how < 0.6 and raw.startswith(b"PK"):
        return pickled_anew(raw, draw)
    changed_bytes(data, draw)
    return data


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_whatever_is_damaged_is_read_or_refused_and_never_a_traceback(tmp_path, seed):
    tensors = {"image_proj.a": torch.ones(4, 3), "image_proj.b": torch.zeros(3), "ip_adapter.1.c": torch.ones(2, 2)}
    write_released(tmp_path, "x", tensors, attention_paths=[], kind="sd15", sidecar={})
    old = tmp_path / "old.bin"
    torch.save(nest(tensors), old, _use_new_zipfile_serialization=False)
    draw, refused, tries = random.Random(seed), 0, 300
    sources = [(path.suffix, path.read_bytes()) for path in (tmp_path / "x.safetensors", tmp_path / "x.bin", old)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wonders about odd pickle protocols
        for _ in range(tries):
            suffix, raw = draw.choice(sources)
            path = tmp_path / f"damaged{suffix}"
            path.write_bytes(damaged(raw, draw))
            try:
                require_fit(path, read_released(path), tensors, "x")
            except SourceError:
                refused += 1
    assert refused > tries / 2
