"""Encode: what is written equals what the stock pipelines compute; nothing asked means nothing loaded."""

import json
import shutil
import sys
from pathlib import Path

import fake_dataset as fake
import numpy as np
import pyarrow as pa
import pytest
import torch
from sample_runs import contents, make

from pipeline.dataset.config import load_config
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.plan import make_plan
from pipeline.shared.bases import find_base
from pipeline.shared.tars import unpack
from schemas.buckets import Fit, buckets, nearest
from schemas.columns import schema
from schemas.errors import ConfigError, CorruptShardError, ExitCode, WeightsError
from schemas.record import check
from schemas.shard import decode_npy
from schemas.targets import Targets, text_sha256, vae_sha256
from stages.encode import Encode, cut, fit_crop
from stages.models.torch_backend import prepare
from stages.pixels.images import decode_jpeg

BASES = (pytest.param("tiny", marks=pytest.mark.long), "tiny-sdxl")
ROWS = [fake.record("a", row) for row in range(3)]
ROWS[1] |= {"text": None, "full": None}
ROWS[2] |= {"text": "word " * 200}


def config_of(base: str, *pairs: str, extras: str = "latents,text"):
    pairs = (f"encode.base={base}", "encode.resolution=64", *pairs)
    return load_config(None, list(pairs), shards="sample", extras=extras)


@pytest.fixture(scope="module", params=BASES)
def encoded(request) -> tuple[str, pa.Table]:
    return request.param, run(request.param, ROWS)


def run(base: str, rows: list[dict[str, object]], extras: str = "latents,text") -> pa.Table:
    plan = make_plan(config_of(base, extras=extras))
    return Encode(plan.config, plan.runtime)(pa.Table.from_pylist(rows, schema=schema(Encode.reads)))


def pipe(base: str):
    prepare("cpu")
    import diffusers

    cls = diffusers.StableDiffusionXLPipeline if "sdxl" in base else diffusers.StableDiffusionPipeline
    return cls.from_pretrained(find_base(base).folder, local_files_only=True)


def array(table: pa.Table, name: str, row: int) -> np.ndarray:
    return decode_npy(table[name][row].as_py())


def test_columns_are_as_declared(encoded):
    base, table = encoded
    check(table, Encode.writes, "encode")
    assert table["latents_portrait"].null_count == table["text_embeds"].null_count == table["targets"].null_count == 0
    assert (table["latents_half"].null_count, table["latents_full"].null_count) == (3, 1)
    assert table["text_pooled"].null_count == (0 if base == "tiny-sdxl" else 3)
    assert (array(table, "latents_portrait", 0).shape, array(table, "latents_full", 0).shape) == ((8, 8, 8), (8, 7, 9))
    assert array(table, "latents_full", 0).dtype == array(table, "text_embeds", 0).dtype == np.float16


def test_latents_are_mean_and_log_variance_of_what_a_vae_samples_scaled(encoded):
    base, table = encoded
    vae = pipe(base).vae
    targets = Targets.from_object(json.loads(table["targets"][0].as_py()))
    assert set(targets.latents) == {"portrait", "full"}
    for crop, fit in targets.latents.items():
        pixels = torch.from_numpy(cut(decode_jpeg(ROWS[0][crop]), fit) / 127.5 - 1).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            posterior, scale = vae.encode(pixels).latent_dist, vae.config.scaling_factor
        found = array(table, f"latents_{crop}", 0)
        assert found.shape == (8, fit.size[1] // 8, fit.size[0] // 8)
        np.testing.assert_allclose(found[:4], posterior.mean[0].numpy() * scale, rtol=2e-3, atol=1e-3)
        deviation = np.exp(found[4:].astype(np.float32) / 2)
        np.testing.assert_allclose(deviation, posterior.std[0].numpy() * scale, rtol=1e-2)


def test_text_is_what_the_stock_pipeline_feeds_the_unet(encoded):
    base, table = encoded
    stock = pipe(base)
    for row, record in enumerate(ROWS):
        with torch.no_grad():
            told = stock.encode_prompt(
                record["text"] or "", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        np.testing.assert_allclose(array(table, "text_embeds", row), told[0][0].numpy(), rtol=2e-3, atol=1e-3)
        if base == "tiny-sdxl":
            np.testing.assert_allclose(array(table, "text_pooled", row), told[2][0].numpy(), rtol=2e-3, atol=1e-3)
    assert (array(table, "text_embeds", 0) != array(table, "text_embeds", 2)).any()


def test_bytes_do_not_depend_on_batches(encoded):
    base, table = encoded
    assert pa.concat_tables([run(base, [row]) for row in ROWS]).equals(table)


def test_targets_name_the_encoders_by_their_hashes(encoded):
    base, table = encoded
    targets = Targets.from_object(json.loads(table["targets"][1].as_py()))
    folder = find_base(base).folder
    kind = "sdxl" if base == "tiny-sdxl" else "sd15"
    assert (targets.kind, targets.resolution, set(targets.latents)) == (kind, 64, {"portrait"})
    assert (targets.vae_sha256, targets.text_sha256) == (vae_sha256(folder), text_sha256(folder))
    assert len(targets.text_sha256.split("+")) == (2 if kind == "sdxl" else 1)


def test_each_half_can_be_asked_for_alone():
    latents, text = run("tiny", ROWS[:1], "latents"), run("tiny", ROWS[:1], "text")
    assert [name for name in latents.column_names if latents[name].null_count == 0] == [
        *("latents_portrait", "latents_full", "targets")
    ]
    assert [name for name in text.column_names if text[name].null_count == 0] == ["text_embeds", "targets"]
    assert json.loads(text["targets"][0].as_py())["latents"] == {}


def test_nothing_asked_is_nothing_loaded_and_nothing_written(monkeypatch):
    for name in ("torch", "diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # whoever imports it now fails
    plan = make_plan(load_config(None, ["encode.base=nowhere"], shards="sample"))
    stage = Encode(plan.config, plan.runtime)
    table = stage(pa.table({name: pa.nulls(2) for name in stage.reads}))
    assert (table.num_rows, [table[name].null_count for name in stage.writes]) == (2, [2] * 6)
    assert "encode" not in [*plan.identity["stages"], *plan.identity["settings"]]


# --- cutting


def record_with(face: tuple[float, float, float, float], width: int, height: int) -> dict[str, object]:
    return {"bbox": list(face), "crops": json.dumps({"full": {"box": [0, 0, 2 * width, 2 * height]}})}


@pytest.mark.parametrize(("width", "height"), [(1024, 512), (512, 1300), (700, 600), (512, 512), (2048, 600)])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.5, 1.0])
def test_the_face_stays_in_the_cut_where_it_can(width, height, where):
    side = 150
    x0, y0 = where * (width - side), where * (height - side)
    photo_box = tuple(2 * value for value in (x0, y0, x0 + side, y0 + side))  # the photo is twice as large as the crop
    sizes = buckets(512)
    image = np.zeros((height, width, 3), np.uint8)
    image[round(y0) : round(y0 + side), round(x0) : round(x0 + side)] = 255
    fit = fit_crop("full", image, record_with(photo_box, width, height), sizes)
    assert fit.size == nearest(width, height, sizes)
    pixels = cut(image, fit)
    assert pixels.shape == (fit.size[1], fit.size[0], 3)
    scale = fit.resized[0] / width * fit.resized[1] / height
    assert (pixels > 127).sum() / 3 == pytest.approx(side**2 * scale, rel=0.03)


def test_squares_are_cut_to_the_square_whatever_lies_in_them():
    image = np.zeros((600, 600, 3), np.uint8)
    record = {"bbox": fake.BBOX, "crops": json.dumps(fake.CROPS)}
    assert fit_crop("portrait", image, record, buckets(512)) == ((512, 512), (0, 0), (512, 512))


# --- targets


TARGETS = Targets("tiny", "sd15", "aa", "bb", 64, {"full": Fit((80, 64), (4, 0), (72, 56))})


def test_targets_come_back_equal():
    assert Targets.from_object(json.loads(TARGETS.to_json())) == TARGETS


@pytest.mark.parametrize(
    "change",
    [
        {"base": 1},
        {"resolution": "64"},
        {"latents": []},
        {"latents": {"full": {}}},
        {"latents": {"full": {"resized": [80, 64], "offset": [9, 0], "size": [72, 56]}}},
        {"latents": {"full": {"resized": [80, 64], "offset": [-1, 0], "size": [72, 56]}}},
        {"latents": {"full": {"resized": [80.0, 64], "offset": [0, 0], "size": [72, 56]}}},
        {"latents": {"full": {"resized": [80, 64, 1], "offset": [0, 0], "size": [72, 56]}}},
    ],
)
def test_other_targets_are_a_corrupt_shard(change):
    with pytest.raises(CorruptShardError):
        Targets.from_object({**json.loads(TARGETS.to_json()), **change})
    for nothing in (None, 3, "x", []):
        with pytest.raises(CorruptShardError):
            Targets.from_object(nothing)


# --- the plan


def test_the_plan_names_the_encoders_with_licence_and_hash():
    plan = make_plan(config_of("tiny-sdxl"))
    cards = [model for model in plan.model_list if model["task"] == "encoder"]
    assert [card["name"] for card in cards] == [
        f"tiny-sdxl/{part}" for part in ("vae", "text_encoder", "text_encoder_2")
    ]
    assert all(len(card["sha256"]) == 64 and card["licence"] for card in cards)
    alone = make_plan(config_of("tiny", extras="text"))
    assert [model["name"] for model in alone.model_list if model["task"] == "encoder"] == ["tiny/text_encoder"]


def test_the_digest_follows_the_encoders_and_not_the_place_where_they_lie(tmp_path):
    digests = {make_plan(config_of("tiny", extras=extras)).digest for extras in ("", "latents", "text", "mirror")}
    assert len(digests) == 4
    there = [Path(shutil.copytree(find_base("tiny").folder, tmp_path / name / "base")) for name in ("a", "b", "c")]
    weights = there[2] / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    first, second, other = (make_plan(config_of(str(folder))).digest for folder in there)
    assert first == second
    assert other != first
    assert make_plan(config_of(str(there[0]), "encode.resolution=72")).digest != first


def test_absent_encoders_are_told_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("FACESHARDS_MODELS", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    with pytest.raises(WeightsError, match="sd15"):
        make_plan(config_of("sd15"))
    folder = Path(shutil.copytree(find_base("tiny").folder, tmp_path / "base"))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="diffusion_pytorch_model"):
        make_plan(config_of(str(folder)))


def test_weights_in_half_precision_alone_do(tmp_path, encoded):
    """Named as `save_pretrained(variant="fp16")` does; the trainer takes such a base too."""
    base, table = encoded
    folder = Path(shutil.copytree(find_base(base).folder, tmp_path / "base"))
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    halves, full = run(str(folder), ROWS), find_base(base).folder
    for name in set(Encode.writes) - {"targets"}:
        assert halves[name].equals(table[name]), name
    assert (vae_sha256(folder), text_sha256(folder)) == (vae_sha256(full), text_sha256(full))
    (other,) = (folder / "vae").glob("*.safetensors")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(other.read_bytes()[:-1] + b"x")
    assert vae_sha256(folder) != vae_sha256(full)  # of what is read, where there are both


def test_damaged_weights_are_one_sentence(tmp_path):
    folder = Path(shutil.copytree(find_base("tiny").folder, tmp_path / "base"))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"junk")
    plan = make_plan(config_of(str(folder)))
    with pytest.raises(WeightsError, match="AutoencoderKL"):
        Encode(plan.config, plan.runtime)


@pytest.mark.parametrize(
    ("extras", "pair", "named"),
    [
        ("latent", "", "latents"),
        ("latents", "encode.resolution=1024", "crop.size"),
        ("text", "encode.resolution=63", "encode.resolution"),
        ("mirror", "encode.bas=x", "encode.base"),
    ],
)
def test_a_wrong_wish_is_one_sentence(extras, pair, named):
    with pytest.raises(ConfigError, match=named):
        load_config(None, [pair] if pair else [], shards="sample", extras=extras)


def test_words_switch_on_and_leave_the_rest():
    told = load_config(None, ["encode.base=tiny"], shards="sample", extras=" latents, mirror,").encode
    assert (told.latents, told.text, told.mirror, told.base) == (True, False, True, "tiny")
    assert load_config(None, ["encode.text=true"], shards="sample").encode.text


# --- whole runs


def made_in(out: Path, *pairs: str, executor: str = "local") -> Path:
    sets = ("encode.base=tiny-sdxl", "encode.resolution=64", "source.rows_per_shard=12", *pairs)
    assert make(out, *sets, executor=executor, extras="latents,text,mirror")[0] is ExitCode.OK
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return made_in(tmp_path_factory.mktemp("made"))


@pytest.mark.long
def test_a_run_writes_all_that_was_asked_for_and_it_verifies(made):
    assert verify(made) == []
    manifest = json.loads((made / "shards" / "sample-00000.json").read_text())
    assert "tiny-sdxl/vae" in {model["name"] for model in manifest["models"]}
    always = {"clip_mirror.npy", "clip_hidden_mirror.npy", "text.npy", "text_pooled.npy"}
    for sample in unpack(made / "shards" / "sample-00000.tar"):
        crops = {suffix.removesuffix(".jpg") for suffix in sample.files if suffix.endswith(".jpg")} - {"face"}
        assert set(sample.files) >= {*always, *(f"latents.{crop}.npy" for crop in crops)}
        assert sample.files["clip_mirror.npy"] != sample.files["clip.npy"]
        assert set(json.loads(sample.files["json"])["targets"]["latents"]) == crops


@pytest.mark.long
def test_ray_makes_the_same_bytes(made, tmp_path):
    made_in(tmp_path, "executor.workers=1", "executor.batch_rows=3", executor="ray")
    assert contents(tmp_path) == contents(made)
