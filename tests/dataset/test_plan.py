import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipeline.dataset.config import load_config
from pipeline.dataset.needed_weights import known_models, needed
from pipeline.dataset.plan import make_plan, prove
from pipeline.models_command import fetch_models
from pipeline.plan_command import _show_steps
from pipeline.shared.bases import BASES, find_base
from schemas.columns import LEDGER
from schemas.digest import sha256_of_file
from schemas.errors import ConfigError, PlanError, WeightsError
from schemas.names import fitting_name
from schemas.shard import SUFFIXES
from stages import STAGES
from stages.align import Align
from stages.filter import QUALITIES
from stages.models import REGISTRIES
from stages.models.detectors.scrfd import Scrfd
from stages.models.heads import MEASURES
from stages.runtime import Runtime


def plan_of(*sets: str):
    return make_plan(load_config(None, list(sets), shards="sample"))


def test_the_steps_are_the_registry_in_its_order():
    assert [step.stage().name for step in plan_of().steps] == list(STAGES)


def test_plan_shows_the_stages_that_work(capsys):
    for sets, shown in (((), False), (("encode.latents=true", "encode.base=tiny"), True)):
        _show_steps(SimpleNamespace(plan=plan_of(*sets)))
        words = capsys.readouterr().out.split()
        assert ("encode" in words) is shown
        assert "caption" not in words
        assert "pack" in words


def test_a_step_that_reads_what_comes_later_is_refused():
    with pytest.raises(PlanError, match="filter reads 'n_faces'"):
        prove(step.stage() for name, step in STAGES.items() if name != "detect")


def test_a_column_that_no_stage_writes_is_refused():
    with pytest.raises(PlanError, match="reads 'photo'"):
        prove(step.stage() for name, step in STAGES.items() if name != "embed_image")

    class Odd(Align):
        reads, writes = (), ("nonsense",)

    with pytest.raises(PlanError, match="does not define"):
        prove([Odd, *(step.stage() for step in STAGES.values())])


@pytest.mark.parametrize(
    ("sets", "most"),
    [
        ([], 74),
        (["segment.condition=plain"], 68),
        (["encode.mirror=true"], 67),
        (["pack.hidden=int8"], 66),
        (["pack.hidden=int8", "models.image_embedder=dinov2"], 73),
        (["pack.hidden=int8", "segment.condition=both", "encode.mirror=true"], 53),
        (["pack.hidden=int8", "segment.condition=both", "encode.mirror=true", "pack.embeddings=false"], 74),
    ],
)
def test_names_of_parts_are_as_long_as_the_files_of_the_samples_let_them(sets, most):
    suffixes = make_plan(load_config(None, sets, shards="sample"), dry_run=True).suffixes
    assert fitting_name("a" * most, suffixes) == "a" * most
    assert most == 74 or len(fitting_name("a" * (most + 1), suffixes)) == 53


def test_pixels_are_kept_only_as_long_as_a_later_step_reads_them():
    plan = plan_of()
    readers = [index for index, step in enumerate(plan.steps) if "image" in step.stage().reads]
    for index, step in enumerate(plan.steps):
        assert ("image" in plan.keeps[step]) == (index < readers[-1])
        assert {*LEDGER, *SUFFIXES.values()} <= plan.keeps[step]


def test_the_digest_follows_what_decides_the_bytes_and_nothing_else():
    digest = plan_of().digest
    for same in ("executor.workers=7", "download.timeout_s=3", "download.engine=img2dataset", "source.root=/x"):
        assert plan_of(same).digest == digest
    for other in ("filter.min_face_px=64", "crop.jpeg_quality=90", "source.rows_per_shard=7", "models.det_thresh=0.6"):
        assert plan_of(other).digest != digest


def test_thresholds_of_quality_belong_to_the_plan_only_where_they_are_on():
    usual = plan_of()
    assert set(usual.identity["settings"]["filter"]) == {
        "min_image_px",
        "max_pixels",
        "min_face_px",
        "max_second_score",
    }
    for quality in QUALITIES:
        assert plan_of(f"filter.{quality.key}={quality.off}").digest == usual.digest
        if quality.measure in ("fiqa", *MEASURES.values()):
            with pytest.raises(
                PlanError, match=f"filter.{quality.key} is set, but nothing measures `{quality.measure}`"
            ):
                plan_of(f"filter.{quality.key}=0.5")
            continue
        on = plan_of(f"filter.{quality.key}=0.5").identity
        assert on == usual.identity | {"settings": on["settings"]}
        assert on["settings"]["filter"] == usual.identity["settings"]["filter"] | {quality.key: 0.5}


def test_the_form_of_hidden_states_belongs_to_the_plan_where_it_is_not_the_usual_one():
    usual, int8 = plan_of(), plan_of("pack.hidden=int8")
    assert "pack" not in usual.identity["settings"]
    assert plan_of("pack.hidden=fp16").digest == usual.digest
    assert int8.identity["settings"]["pack"] == {"hidden": "int8"}
    nothing = plan_of("pack.embeddings=false")
    assert plan_of("pack.embeddings=false", "pack.hidden=int8").digest == nothing.digest
    with pytest.raises(ConfigError, match=r"pack\.hidden"):
        plan_of("pack.hidden=int4")


def test_the_closer_look_belongs_to_the_plan_where_the_detector_can():
    haar = "models.detector=haar"
    assert plan_of(haar, "models.second_look=[0,0]").digest == plan_of(haar).digest
    with pytest.raises(ConfigError, match=r"second_look"):
        plan_of("models.second_look=[0.4,1.5]")


@pytest.mark.real_data
def test_the_plan_names_the_rule_of_the_closer_look_and_without_it_is_as_before_there_was_one(data):
    pack = f"models.pack={data / 'models' / 'real'}", "models.accept_noncommercial=true", "models.detector=scrfd"
    usual, without = plan_of(*pack), plan_of(*pack, "models.second_look=[0,0]")
    rule = usual.identity["settings"]["models"].pop("second_look")
    assert rule == {"scores": [0.4, 0.7], "rule": Scrfd.closer_look}
    assert usual.identity == without.identity


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"did you mean 'scrfd'.*yunet"):
        plan_of("models.detector=scrfdd")
    for task in ("detector", "segmenter", "face_embedder", "image_embedder"):
        with pytest.raises(ConfigError, match=f"models.{task} = '' is not known"):
            plan_of(f"models.{task}=''")


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    """A machine without weights and bases; the value is the folder where they belong."""
    from huggingface_hub import constants

    monkeypatch.setenv("FACESHARDS_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "models"


FULL = ("encode.latents=true", "encode.text=true", "models.screen=buffalo_sc")
"""With the default profile it needs five weights, and the licences of three."""


def test_all_missing_weights_and_licences_are_named_at_once(nothing):
    config = load_config(None, FULL)
    with pytest.raises(WeightsError) as caught:
        make_plan(config)
    message, details = str(caught.value), caught.value.details
    assert "\n" not in message
    names = ("buffalo_l", "buffalo_sc", "bisenet", "clip-vit-h", "sd15")
    assert f"models fetch {' '.join(names)}`" in message
    assert "accept_noncommercial=true" in message
    assert "bisenet (code MIT; weights trained on CelebAMask-HQ" in message
    for weight in map(known_models(config.models).get, names):
        for file, path in weight.paths(weight.under(nothing)).items():
            assert str(path) in details
            assert file.sha256 in details
            assert f"{file.bytes:,} bytes" in details or not file.bytes
        for file in [weight.archive] if weight.archive else weight.files:
            assert weight.url(file) in details
    assert not nothing.exists()


def test_the_permissive_profile_lets_nothing_in_that_forbids_commercial_use(nothing):
    """Whatever backend, pack or parser is named beside it, and though the licences of others were accepted."""
    accepted = "models.accept_noncommercial=true"
    choices = [[f"models.{task}={name}"] for task, names in REGISTRIES.items() for name in names if name != "scrfd"]
    choices += [[f"models.pack={name}", "models.detector=scrfd"] for name in ("buffalo_l", "antelopev2")]
    choices += [["models.segmenter=facexlib", "models.parser=parsenet"], ["models.screen=buffalo_sc"]]
    choices += [["encode.latents=true"], ["encode.latents=true", "encode.base=sdxl"]]
    verdicts = {True: 0, False: 0}
    for sets in ([], *choices):
        config = load_config(None, [*sets, accepted], profile="permissive")
        plan = make_plan(config, dry_run=True)
        is_free = all(card.commercial for card in plan.cards)
        assert ("models.licences allows" in plan.refusal) != is_free, (sets, plan.refusal)
        assert is_free == all(weight.commercial for weight in needed(config))
        verdicts[is_free] += 1
    assert min(verdicts.values()) >= 4
    with pytest.raises(WeightsError, match=r"leaves out: buffalo_l"):
        fetch_models(["buffalo_l", "yunet"], profile="permissive")
    default = make_plan(load_config(None, [], profile="permissive"), dry_run=True)
    names = {"yunet", "grabcut", "auraface/auraface_glintr100.onnx", "clip-vit-h"}
    assert {model["name"] for model in default.model_list} == names


def test_a_dry_run_needs_no_weights_and_has_the_digest_of_the_run(nothing, monkeypatch):
    folder = find_base("tiny").folder
    hub = BASES["sd15"]
    hashes = {file: (1, sha256_of_file(folder / file)) for file in hub.weights}
    monkeypatch.setitem(BASES, "sd15", replace(hub, weights=hashes))
    config = load_config(None, ["encode.latents=true", "encode.text=true"], shards="sample")
    before = make_plan(config, dry_run=True)
    assert [(state.weight.name, state.state) for state in before.lacks] == [("sd15", "missing")]
    assert before.refusal
    shutil.copytree(folder, nothing / "sd15")
    after = make_plan(config, dry_run=True)
    assert not after.lacks
    assert not after.refusal
    assert after.digest == before.digest == make_plan(config).digest
    (nothing / "sd15/vae/config.json").unlink()
    (state,) = make_plan(config, dry_run=True).lacks
    assert "vae/config.json" in state.state


@pytest.mark.real_data
def test_the_digest_of_a_missing_weight_is_that_of_the_weight(nothing, data, monkeypatch):
    config = load_config(None, ["models.detector=yunet"], shards="sample")
    missing = make_plan(config, dry_run=True)
    monkeypatch.setenv("FACESHARDS_MODELS", str(data / "models/extra"))
    assert [state.weight.name for state in missing.lacks] == ["yunet"]
    assert make_plan(config).digest == missing.digest


@pytest.mark.real_data
def test_noncommercial_weights_need_a_yes_and_stand_in_the_manifest(data):
    pack = f"models.pack={data / 'models' / 'real'}"
    with pytest.raises(WeightsError, match="accept_noncommercial"):
        plan_of("models.detector=scrfd", pack)
    plan = plan_of("models.detector=scrfd", pack, "models.accept_noncommercial=true")
    detector = next(model for model in plan.model_list if model["task"] == "detector")
    assert "non-commercial" in detector["licence"]
    assert detector["sha256"].startswith("041f73f4")


def test_the_pool_without_and_with_gpus():
    def pool_of(*sets):
        plan = plan_of(*sets)
        pool = plan.pool
        names = [step.stage().name for step in pool.steps]
        assert names[0] == "screen"
        assert "encode" in names
        return pool.workers, pool.cpus, pool.gpus, pool.threads, plan.batch_rows

    assert pool_of("executor.workers=3") == (3, 1, 0, 1, 8)
    assert pool_of("executor.workers=16", "executor.gpus=1") == (1, 16, 1, 32, 32)
    assert pool_of("executor.workers=16", "executor.gpus=2") == (2, 8, 1, 16, 32)
    assert pool_of("executor.workers=1", "executor.gpus=2", "executor.batch_rows=5") == (2, 1, 1, 2, 5)


def test_gpus_decide_the_device_of_models_and_so_the_digest():
    plain, gpus = plan_of(), plan_of("executor.gpus=1")
    assert (plain.runtime.device, gpus.runtime.device) == ("cpu", "cuda")
    assert plain.digest != gpus.digest


def test_photos_are_decoded_by_a_gpu_only_where_there_is_one():
    on_cpu, on_gpu = plan_of("executor.gpus=1"), plan_of("executor.gpus=1", "models.decoding=gpu")
    assert "decoding" not in on_cpu.identity["settings"]["models"]
    assert on_gpu.identity["settings"]["models"]["decoding"] == "gpu"
    with pytest.raises(PlanError, match=r"models\.decoding is gpu, but executor\.gpus is 0"):
        plan_of("models.decoding=gpu")


def test_what_a_run_alone_knows_is_no_setting_and_not_in_the_digest():
    for key in ("download.sample_port=1", "download.refusals=x", "models.device=cuda", "encode.source.name=x"):
        with pytest.raises(ConfigError, match="Unknown config key"):
            plan_of(key)
    config = load_config(None, [], shards="sample")
    assert make_plan(config, Runtime(refusals="/proc/1/fd/3", sample_port=80)).digest == make_plan(config).digest


def test_every_reason_has_a_place_in_the_funnel():
    reasons = plan_of().reasons
    assert len(set(reasons)) == len(reasons)
    assert {"not_found", "no_face", "several_faces", "small_image"} <= set(reasons)


@pytest.mark.real_data
def test_what_runs_on_torch_belongs_to_the_plan_and_what_runs_as_before_changes_nothing(data):
    def planned(*sets):
        pack = f"models.pack={data / 'models' / 'real'}"
        names = ("models.detector=scrfd", "models.face_embedder=arcface", "models.accept_noncommercial=true")
        return plan_of(pack, *names, *sets)

    def of_models(*sets):
        return planned(*sets).identity["settings"]["models"]

    def runtimes(*sets):
        return {model["task"]: model.get("runtime") for model in planned(*sets).model_list if "/" in model["name"]}

    plain = of_models()
    assert not {"runtime", "on_torch"} & set(plain)
    assert of_models("models.runtime.detector=onnxruntime") == plain
    assert of_models("models.runtime.detector=torch") == {**plain, "on_torch": ["detector"]}
    assert of_models("executor.gpus=1")["on_torch"] == ["detector", "face_embedder"]
    assert of_models("models.compile=true") == plain, "only GPUs compile"
    assert of_models("executor.gpus=1", "models.compile=true")["compile"] is True
    assert "on_torch" not in plan_of("executor.gpus=1").identity["settings"]["models"], "no pack is used"
    assert runtimes() == {"detector": None, "face_embedder": None}
    other, on_torch = f"models.screen={data / 'models' / 'extra'}", "models.runtime.detector=torch"
    assert runtimes(other, on_torch) == {"detector": "torch", "screen": "torch", "face_embedder": None}
    on_onnx = "models.runtime.face_embedder=onnxruntime"
    assert runtimes("executor.gpus=1", on_onnx) == {"detector": "torch", "face_embedder": "onnxruntime"}
    with pytest.raises(ConfigError, match=r"models\.runtime"):
        plan_of("models.runtime.detector=tensorrt")
