"""Opening datasets: what is refused, and with which sentence."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_shards as fake
import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.train.loader import dataset as dataset_module
from pipeline.train.loader import reading as reading_module
from pipeline.train.loader.dataset import check_hashes, open_dataset
from pipeline.train.loader.faces import first_faces
from pipeline.train.loader.reading import features_of, plan_reading
from pipeline.train.settings import AdapterSettings, DataSettings, TrainConfig
from schemas.errors import CorruptShardError, SourceError
from schemas.shard import Manifest, dataset_digest

DINO = AdapterSettings(image_encoder="dinov2")
DATA = DataSettings()
BY_SIZE = DataSettings(verify="size")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return Path(fake.write(tmp_path / "out", {"b-00001": fake.counted(3, 2), "a-00000": fake.counted(0, 3)}))


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://loader"
    fsspec.filesystem("memory").rm("/loader", recursive=True)


def edited(path: Path, **changes: Any) -> None:
    told = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def test_what_a_dataset_tells(out: Path) -> None:
    dataset = open_dataset([str(out)], DATA)
    assert [(shard.name, shard.manifest.kept) for shard in dataset.shards] == [("a-00000", 3), ("b-00001", 2)]
    assert dataset.samples == 5
    assert dataset.profiles == ("embedded",)
    assert {model["name"]: model["licence"] for model in dataset.models} == {
        "lbp": "Apache-2.0",
        "patches": "Apache-2.0",
    }
    manifests = [Manifest.from_json(path.read_bytes()) for path in sorted(out.glob("shards/*.json"))]
    assert dataset.digest == dataset_digest(manifests)
    assert {"arcface.npy", "clip_hidden.npy", "half.jpg", "json"} <= dataset.suffixes
    assert not any(suffix.startswith("latents") for suffix in dataset.suffixes)
    np.testing.assert_array_equal(dataset.unconditional["clip_hidden"], fake.EMPTY["clip_hidden"])


def test_shards_without_any_caption_are_refused_unless_that_is_meant(tmp_path: Path) -> None:
    blank = [fake.sample(number, text=" ") for number in range(6)]
    out = fake.write(tmp_path / "out", {"a-00000": blank, "a-00001": blank})
    with pytest.raises(SourceError, match=r"None of the first 12 samples of .*/out has a caption: .*allow_no_captions"):
        open_dataset([out], DATA)
    assert open_dataset([out], DataSettings(allow_no_captions=True)).samples == 12
    one = fake.write(tmp_path / "one", {"a-00000": blank, "a-00001": [*blank, fake.sample(6)]})
    assert open_dataset([one], DATA).samples == 13


def test_the_shards_folder_is_as_good_as_out(out: Path) -> None:
    assert open_dataset([str(out / "shards")], DATA).digest == open_dataset([f"{out}/"], DATA).digest
    assert "dino" in open_dataset([str(out / "shards")], DATA).unconditional


def test_several_folders_may_have_shards_of_one_name(out: Path, tmp_path: Path) -> None:
    other = fake.write(tmp_path / "other", {"a-00000": fake.counted(10, 2)})
    both = open_dataset([str(out), other], DATA)
    assert both.samples == 7
    assert [shard.name for shard in both.shards] == ["a-00000", "b-00001", "a-00000"]
    assert both.digest not in both.lineage
    assert len(set(both.lineage)) == 2


def test_a_folder_that_is_named_twice_counts_once(out: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(out)
    names = [f"{out}/", f"{out.parent}/./out", f"{out}/shards", f"{tmp_path}/link", f"file://{out}"]
    alone, other = open_dataset([str(out)], DATA), fake.write(tmp_path / "other", {"a-00000": fake.counted(10, 2)})
    for name in names:
        twice = open_dataset([str(out), name], DATA)
        assert (twice.samples, twice.digest, twice.lineage) == (5, alone.digest, alone.lineage)
        assert open_dataset([str(out), other, name], DATA).samples == 7
    assert open_dataset([str(out), str(shutil.copytree(out, tmp_path / "copy"))], DATA).samples == 10


def test_a_url_that_is_named_twice_counts_once(memory: str) -> None:
    first, second = (fake.write(f"{memory}/{n}", {"a-00000": fake.counted(3 * n, 3)}) for n in (0, 1))
    assert open_dataset([first, f"{first}/", second], DATA).samples == 6


def test_a_dataset_in_memory(memory: str) -> None:
    dataset = open_dataset([fake.write(memory, {"a-00000": fake.counted(0, 3)})], DATA)
    assert dataset.samples == 3
    cached = open_dataset([f"simplecache::{memory}"], DATA)
    assert (cached.samples, cached.digest) == (3, dataset.digest)
    assert len(first_faces(cached, 2, ("arcface",), AdapterSettings())) == 2
    assert "clip_hidden" in dataset.unconditional
    assert [face.photo.key for face in first_faces(dataset, 2, ("arcface",), AdapterSettings())] == [
        "a-00000-000",
        "a-00000-001",
    ]


@pytest.mark.parametrize("data", [DATA, BY_SIZE])
def test_a_folder_without_anything_to_train_on(tmp_path: Path, data: DataSettings) -> None:
    with pytest.raises(SourceError, match="No dataset is given"):
        open_dataset([], data)
    with pytest.raises(SourceError, match="absent does not exist"):
        open_dataset([str(tmp_path / "absent")], data)
    with pytest.raises(SourceError, match=r"no finished shard.*give the OUT"):
        open_dataset([str(tmp_path)], data)
    a_file = tmp_path / "run" / "run.json"
    a_file.parent.mkdir()
    a_file.write_text("{}")
    with pytest.raises(SourceError, match=r"run\.json is no folder"):
        open_dataset([str(a_file)], data)
    with pytest.raises(SourceError, match=r"it is a training run.*--resume --out"):
        open_dataset([str(a_file.parent)], data)
    empty = fake.write(tmp_path / "empty", {"a-00000": []})
    with pytest.raises(SourceError, match="no sample was kept"):
        open_dataset([empty], data)
    with pytest.raises(SourceError, match="cannot be opened"):
        open_dataset(["nosuch://bucket/out"], data)
    with pytest.raises(SourceError, match="does not exist"):
        open_dataset(["memory://nothing-here"], data)


def test_shards_without_samples_are_left_out(out: Path) -> None:
    fake.write(out, {"c-00002": []})
    assert [shard.name for shard in open_dataset([str(out)], DATA).shards] == ["a-00000", "b-00001"]


def test_a_missing_tar(out: Path) -> None:
    (out / "shards/b-00001.tar").unlink()
    with pytest.raises(SourceError, match=r"b-00001\.tar is missing"):
        open_dataset([str(out)], BY_SIZE)


def test_a_shortened_tar(out: Path) -> None:
    tar = out / "shards/b-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(SourceError, match=r"b-00001\.tar has \d+ bytes, its manifest says \d+"):
        open_dataset([str(out)], BY_SIZE)


def test_a_flipped_bit_is_found_by_hash_unless_it_was_hashed_before(out: Path) -> None:
    dataset = open_dataset([str(out)], DATA)
    tar = out / "shards/b-00001.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    with pytest.raises(CorruptShardError, match=r"b-00001\.tar is not the file of its manifest"):
        check_hashes(dataset)
    check_hashes(dataset, hashed_before=dataset.digest)


def test_processes_share_the_hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {f"a-{number:05d}": fake.counted(number, 1) for number in range(5)}
    dataset = open_dataset([fake.write(tmp_path, shards)], DATA)
    hashed: list[list[str]] = [[], [], []]
    of_shard = dataset_module._sha256
    for rank in range(3):
        monkeypatch.setattr(dataset_module, "_sha256", lambda one: hashed[rank].append(one.name) or of_shard(one))  # noqa: B023
        check_hashes(dataset, rank, 3)
    assert [sorted(names) for names in hashed] == [["a-00000", "a-00003"], ["a-00001", "a-00004"], ["a-00002"]]


def test_a_damaged_manifest(out: Path) -> None:
    (out / "shards/a-00000.json").write_text("{}")
    with pytest.raises(SourceError, match=r"a-00000\.json is damaged"):
        open_dataset([str(out)], DATA)


@pytest.mark.parametrize("change", [{"kept": 0}, {"rows_in": 10**6}, {"shard": "c-00000"}])
def test_a_manifest_that_lies(out: Path, change: dict[str, Any]) -> None:
    edited(out / "shards/a-00000.json", **change)
    with pytest.raises(SourceError, match=r"a-00000\.json is damaged \(it was changed since it was written\)"):
        open_dataset([str(out)], DATA)


def test_a_manifest_that_is_written_otherwise(out: Path) -> None:
    path = out / "shards/a-00000.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(SourceError, match=r"a-00000\.json is damaged"):
        open_dataset([str(out)], DATA)


def finished(out: Path) -> None:
    """As the end of a run leaves it."""
    manifests = [Manifest.from_json(path.read_bytes()) for path in sorted(out.glob("shards/*.json"))]
    told = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps({**told, "dataset_digest": dataset_digest(manifests)}))


def test_a_shard_that_is_gone_is_missed_unless_the_user_says_otherwise(out: Path) -> None:
    finished(out)
    open_dataset([str(out)], DATA)
    for path in out.glob("shards/b-00001.*"):
        path.unlink()
    with pytest.raises(
        SourceError, match=r"are not those that .*dataset\.json was written for: copy the dataset again"
    ):
        open_dataset([str(out)], DATA)
    assert open_dataset([str(out)], BY_SIZE).shards


def test_a_manifest_that_does_not_name_its_tar(out: Path) -> None:
    edited(out / "shards/a-00000.json", files={})
    with pytest.raises(SourceError, match=r"names no a-00000\.tar"):
        open_dataset([str(out)], DATA)


@pytest.mark.parametrize("task", ["face_embedder", "image_embedder"])
def test_embedders_that_differ(out: Path, tmp_path: Path, task: str) -> None:
    models = [{**model, "sha256": "f" * 64} if model["task"] == task else model for model in fake.MODELS]
    other = fake.write(tmp_path / "other", {"a-00000": fake.counted(0, 1)}, models=models)
    with pytest.raises(SourceError, match=f"{task.replace('_', ' ')} of .*out is .* that of .*other"):
        open_dataset([str(out), other], DATA)


def test_other_models_may_differ(out: Path, tmp_path: Path) -> None:
    models = [*fake.MODELS, {"name": "x", "task": "detector", "sha256": "0", "licence": "MIT"}]
    other = fake.write(tmp_path / "other", {"a-00000": fake.counted(0, 1)}, models=models)
    models = open_dataset([str(out), other], DATA).models
    assert [model["licence"] for model in models if model["name"] == "x"] == ["MIT"]


def test_changed_features_of_an_empty_picture(out: Path) -> None:
    (out / "unconditional.safetensors").write_bytes(b"something else")
    with pytest.raises(SourceError, match=r"unconditional\.safetensors is not what dataset\.json describes"):
        open_dataset([str(out)], DATA)


def test_dataset_json_may_be_missing_but_not_damaged(out: Path) -> None:
    (out / "dataset.json").unlink()
    assert open_dataset([str(out)], DATA).unconditional == {}
    for damage in ("[]", "{", '{"files": {"x": 1}}'):
        (out / "dataset.json").write_text(damage)
        with pytest.raises(SourceError, match=r"dataset\.json is damaged"):
            open_dataset([str(out)], DATA)


def test_columns_that_a_variant_reads_must_be_there(out: Path) -> None:
    dataset = open_dataset([str(out)], DATA)
    features = features_of(dataset, ("arcface", "hidden"), AdapterSettings())
    assert features.files == ({"arcface": "arcface.npy", "hidden": "clip_hidden.npy"},)
    with pytest.raises(SourceError, match=r"no dino\.npy: .*models\.image_embedder=dinov2"):
        features_of(dataset, ("hidden",), DINO)
    for condition in ("plain", "both"):
        with pytest.raises(SourceError, match=rf"no clip_hidden_plain\.npy: .*segment\.condition={condition}"):
            features_of(dataset, ("hidden",), AdapterSettings(condition=condition))


def test_of_several_datasets_the_one_that_lacks_a_file_is_named(out: Path, tmp_path: Path) -> None:
    made = fake.sample(0)
    plain = {name.replace("clip_hidden.", "clip_hidden_plain."): data for name, data in made.items()}
    other = fake.write(tmp_path / "other", {"a-00000": [plain]}, plan_digest="f" * 64)
    dataset = open_dataset([str(out), other], DATA)
    with pytest.raises(SourceError, match=r"of \S*other have no clip_hidden\.npy: .*condition=segmented"):
        features_of(dataset, ("hidden",), AdapterSettings())


def test_hidden_features_need_those_of_an_empty_picture(tmp_path: Path) -> None:
    bare = open_dataset([fake.write(tmp_path / "bare", {"a-00000": fake.counted(0, 1)}, empty=None)], DATA)
    assert features_of(bare, ("arcface", "pooled"), AdapterSettings())
    with pytest.raises(SourceError, match=r"clip_hidden .*writes unconditional\.safetensors"):
        features_of(bare, ("hidden",), AdapterSettings())


def test_what_stands_for_no_face(tmp_path: Path) -> None:
    samples = [{**fake.sample(0), "dino.npy": fake.encode_npy(np.zeros(fake.HIDDEN, np.float16))}]
    dataset = open_dataset([fake.write(tmp_path / "out", {"a-00000": samples})], DATA)
    clip = features_of(dataset, ("arcface", "pooled", "hidden"), AdapterSettings()).unconditional
    assert not clip["arcface"].any()
    assert clip["arcface"].shape == (512,)
    assert not clip["pooled"].any()
    assert clip["pooled"].shape == (fake.POOLED,)
    np.testing.assert_array_equal(clip["hidden"], fake.EMPTY["clip_hidden"])
    dino = features_of(dataset, ("pooled", "hidden"), DINO).unconditional
    np.testing.assert_array_equal(dino["pooled"], fake.EMPTY["dino"][0])
    np.testing.assert_array_equal(dino["hidden"], fake.EMPTY["dino"])


def test_widths_come_from_the_shards(out: Path) -> None:
    dataset = open_dataset([str(out)], DATA)
    widths = {"features": fake.HIDDEN[1], "pooled": fake.POOLED}
    for reads in ((), ("pooled",), ("arcface", "pooled", "hidden")):
        read = {{"hidden": "features"}.get(role, role) for role in reads}
        expected = {name: width for name, width in widths.items() if name in read}
        assert features_of(dataset, reads, AdapterSettings()).widths == expected


def test_suffixes_are_those_of_all_plans(tmp_path: Path) -> None:
    mixed = [fake.sample(0, has=("full",)), fake.sample(1, has=("half", "full"))]
    one = fake.write(tmp_path / "one", {"a-00000": mixed}, plan_digest="1")
    two = fake.write(tmp_path / "two", {"a-00000": [fake.encoded(0)]}, plan_digest="2")
    both = open_dataset([one, two], DATA)
    assert "half.jpg" in both.suffixes
    assert not {"portrait.jpg", "text.npy", "latents.full.npy"} & both.suffixes
    assert {"portrait.jpg", "text.npy", "latents.full.npy"} <= open_dataset([two], DATA).suffixes


def test_the_first_faces(out: Path) -> None:
    dataset = open_dataset([str(out)], DATA)
    faces = first_faces(dataset, 4, ("arcface", "hidden"), AdapterSettings())
    assert faces[3].photo.face.shape == (224, 224, 3)
    assert int(faces[3].photo.face[0, -1, 0]) > 250, "RGB: red grows to the right"
    assert int(faces[3].photo.face[0, 0, 0]) < 5
    assert faces[3].condition["hidden"].dtype.is_floating_point
    assert faces[3].condition["hidden"].unique().tolist() == [3]
    assert faces[3].condition["arcface"].shape == (512,)
    assert len(first_faces(dataset, 99, ("arcface",), AdapterSettings())) == 5


def reading(tmp_path: Path, samples: Any, reads: tuple[str, ...] = ("arcface",), **data: Any) -> Any:
    dataset = open_dataset([fake.write(tmp_path / "out", {"a-00000": samples})], DATA)
    config = TrainConfig.model_validate({"augment": {"colour": 0.5}, "data": {"resolution": 64, **data}})
    return plan_reading(dataset, reads, config)


def test_images_of_id_only_variants_are_augmented(tmp_path: Path) -> None:
    read = reading(tmp_path, [fake.sample(0)])
    assert (read.latents, read.text, read.flip, read.colour) == (False, {}, 0.5, 0.5)
    assert read.notices == ()
    assert read.wanted == {"json", "arcface.npy", "portrait.jpg", "half.jpg", "full.jpg"}
    fewer = reading(tmp_path / "fewer", [fake.sample(0)], crops={"full": 0})
    assert fewer.wanted == read.wanted - {"full.jpg"}


def test_crops_that_the_first_samples_lack_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "LOOKED_AT", 2)
    samples = [fake.sample(number, has=("portrait", "full")) for number in range(3)]
    none, some = {"portrait": 0, "full": 0}, {"portrait": 0}
    (notice,) = reading(tmp_path / "none", samples, crops=none).notices
    assert notice.startswith("none of the first 2 samples has a crop of data.crops (half): where no other has one, ")
    assert reading(tmp_path / "some", samples, crops=some).notices == ()
    assert reading(tmp_path / "few", samples[1:], crops=none).notices == ()


def test_further_captions_that_no_sample_has_are_said(tmp_path: Path) -> None:
    assert "further captions" in reading(tmp_path / "none", [fake.sample(0)], alternatives=0.5).notices[0]
    some = [fake.sample(0), fake.sample(1, text_alternatives=["b"])]
    assert reading(tmp_path / "some", some, alternatives=0.5).notices == ()


@pytest.mark.parametrize(
    ("sources", "kinds", "notices"),
    [
        (["sample"], {"made": 0.5}, ["data.kinds.made takes a share of nothing"]),
        (["made:mj"], {"web": 0.5}, ["data.kinds.web takes a share of nothing"]),
        (["made:mj", "sample"], {"web": 0.5, "made": 0.5}, []),
        (["sample"], {"web": 0.5}, []),
        ([], {"made": 0.5}, []),
    ],
)
def test_a_share_of_a_kind_that_there_is_not_is_said(tmp_path: Path, sources: Any, kinds: Any, notices: Any) -> None:
    out = Path(fake.write(tmp_path, {"a-00000": [fake.sample(0)]}))
    (out / "dataset.json").write_text(json.dumps({"sources": sources}))
    config = TrainConfig.model_validate({"data": {"kinds": kinds}})
    read = plan_reading(open_dataset([str(out)], DATA), ("arcface",), config)
    assert [notice.partition(":")[0] for notice in read.notices] == notices


@pytest.mark.parametrize(("source", "kinds"), [("sample", {"web": 0}), ("made:mj", {"made": 0})])
def test_shares_that_leave_nothing_are_refused_before_all_is_read(tmp_path: Path, source: str, kinds: Any) -> None:
    out = Path(fake.write(tmp_path, {"a-00000": [fake.sample(0)]}))
    (out / "dataset.json").write_text(json.dumps({"sources": [source]}))
    config = TrainConfig.model_validate({"data": {"kinds": kinds}})
    with pytest.raises(SourceError, match=r"data\.kinds leaves nothing: no source of .* is marked as "):
        plan_reading(open_dataset([str(out)], DATA), ("arcface",), config)


def test_features_of_the_face_switch_augmentation_off(tmp_path: Path) -> None:
    read = reading(tmp_path, [fake.sample(0)], ("arcface", "hidden"))
    assert (read.flip, read.colour, read.mirrored) == (0, 0, {})
    assert "clip_hidden_mirror.npy" in read.notices[0]
    assert read.notices[1].startswith("augment.colour is off")


def test_mirrored_features_switch_the_flip_on(tmp_path: Path) -> None:
    read = reading(tmp_path, [{**fake.sample(0), **fake.mirrors(0)}], ("arcface", "pooled"))
    assert read.flip == 0.5
    assert read.mirrored == {"clip.npy": "clip_mirror.npy"}
    assert "clip_mirror.npy" in read.wanted


def test_latents_are_taken_where_they_are_and_switch_augmentation_off(tmp_path: Path) -> None:
    read = reading(tmp_path, [fake.encoded(0, mirror=True)], ("hidden",))
    assert read.latents
    assert list(read.text) == ["text.npy"]
    assert (read.flip, read.colour) == (0, 0)
    assert len(read.notices) == 2
    assert "full.jpg" not in read.wanted


def test_images_can_be_asked_for(tmp_path: Path) -> None:
    read = reading(tmp_path, [fake.encoded(0)], latents="images", text="captions")
    assert not read.latents
    assert read.text == {}


@pytest.mark.parametrize("what", ["latents", "text"])
def test_targets_that_are_asked_for_must_be_there(tmp_path: Path, what: str) -> None:
    with pytest.raises(SourceError, match=f"hold no {what}: make the dataset again --with {what}"):
        reading(tmp_path, [fake.sample(0)], **{what: "shards"})


def test_latents_of_another_resolution(tmp_path: Path) -> None:
    read = reading(tmp_path, [fake.encoded(0)], resolution=128)
    assert not read.latents
    assert "they are of resolution 64, data.resolution is 128" in read.notices[0]
    with pytest.raises(SourceError, match="resolution 64"):
        reading(tmp_path, [fake.encoded(0)], resolution=128, latents="shards")


def test_targets_of_another_base(tmp_path: Path) -> None:
    dataset = open_dataset([fake.write(tmp_path / "out", {"a-00000": [fake.encoded(0)]})], DATA)
    base = tmp_path / "base"
    (base / "vae").mkdir(parents=True)
    (base / "text_encoder").mkdir()
    (base / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    (base / "text_encoder/model.safetensors").write_bytes(b"weights")
    config = TrainConfig.model_validate({"data": {"resolution": 64}})
    read = plan_reading(dataset, ("arcface",), config, base)
    assert (read.latents, read.text) == (False, {})
    assert sum("encoded by tiny" in notice for notice in read.notices) == 2


def test_targets_that_do_not_agree(tmp_path: Path) -> None:
    read = reading(tmp_path, [fake.encoded(0), fake.encoded(1, vae_sha256="w")])
    assert not read.latents
    assert "not all shards" in read.notices[0]


@given(st.binary(max_size=40))
def test_whatever_a_manifest_holds_is_one_sentence(data: bytes) -> None:
    root = "memory://loader-fuzz"
    fake.put(f"{root}/shards/a-00000.json", data)
    with pytest.raises(SourceError, match=r"a-00000\.json is damaged"):
        open_dataset([root], BY_SIZE)


def test_a_tar_that_is_none_is_told_when_it_is_looked_into(tmp_path: Path) -> None:
    data = b"x" * 1024
    fake.put(f"{tmp_path}/shards/a-00000.tar", data)
    fake.put(f"{tmp_path}/shards/a-00000.json", fake.manifest("a-00000", data, 1).to_json().encode())
    with pytest.raises(CorruptShardError, match=r"a-00000\.tar: not a readable tar"):
        open_dataset([str(tmp_path)], DATA)


def test_what_counts_once_is_read_once_and_what_counts_twice_is_said(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, sizes = [], dataset_module.sizes
    monkeypatch.setattr(dataset_module, "sizes", lambda folder: read.append(folder) or sizes(folder))
    twice = open_dataset([str(out), f"{out}/shards"], DATA)
    assert (len(read), twice.samples) == (1, 5)
    assert twice.notices == (f"{out} and {out}/shards are one dataset, which counts once.",)
    assert plan_reading(twice, ("arcface",), TrainConfig()).notices[:1] == twice.notices

    grouped = fake.write(tmp_path / "grouped", {"g-00000": fake.counted(10, 2)})
    about = {"plan": {"settings": {"group": {"of": [twice.digest]}}}}
    (tmp_path / "grouped/dataset.json").write_text(json.dumps(about))
    other = fake.write(tmp_path / "other", {"a-00000": fake.counted(20, 2)})
    assert not open_dataset([str(out), other], DATA).notices
    (notice,) = open_dataset([str(out), other, grouped], DATA).notices
    assert notice.startswith(f"{out} and {grouped} hold the same photos, which count twice")
