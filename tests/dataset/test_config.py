from pathlib import Path

import pytest

from pipeline.dataset.config import PROFILES, Config, load_config
from pipeline.dataset.execute.metrics import write_metrics
from pipeline.shared.configfile import keys
from schemas.errors import ConfigError


def test_profiles_name_the_models_and_may_be_overridden():
    assert load_config(None, [], shards="sample").models.detector == "haar"
    config = load_config(None, ["models.segmenter=grabcut"], shards="x.parquet")
    assert (config.profile, config.models.detector, config.models.segmenter) == ("insightface", "scrfd", "grabcut")


def test_set_beats_the_file_and_both_beat_the_profile(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[filter]\nmin_face_px = 99\nmin_image_px = 700\n[models]\ndetector = "yunet"\n')
    config = load_config(path, ["filter.min_face_px=64"], shards="sample")
    assert (config.filter.min_face_px, config.filter.min_image_px, config.models.detector) == (64, 700, "yunet")


def test_a_file_of_windows_editor_begins_with_a_mark(tmp_path):
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xef\xbb\xbf[filter]\r\nmin_face_px = 99\r\n")
    assert load_config(path, [], shards="sample").filter.min_face_px == 99


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("filter.min_face_pix=1", "filter.min_face_px"),
        ("fliter.min_face_px=1", "filter"),
        ("min_face_px=1", "filter.min_face_px"),
        ("segment.colour=1", "Unknown config key 'segment.colour': segment has keep, fill, "),
        ("zzzz=1", "Unknown config key 'zzzz': `config` lists those that there are."),
        ("crop.face_share.protrait=0.4", "crop.face_share.portrait"),
        ("filter.min_image_px=many", "filter.min_image_px"),
        ("models.det_size=100", "models.det_size"),
        ("filter", "key=value"),
        ("filter=3", "'filter' is a section and takes no value: give one of its keys, such as filter."),
        ("profile=fast", "embedded"),
        ("source.columns.txt=x", "'source.columns.txt': did you mean source.columns.text?"),
        ("FILTER.MIN_FACE_PX=1", "did you mean 'filter.min_face_px'?"),
        ("download.removed=list.txt", 'has the value \'list.txt\': give a list, such as ["a", "b"].'),
        ("source.columns=TEXT", "give its keys, such as source.columns.NAME=…."),
        ("crop.size=2000", "crop.max_size"),
        ("filter.min_face_px=true", "'filter.min_face_px' has the value True: give a number."),
        ("filter.min_image_px=false", "'filter.min_image_px' has the value False: give a number."),
        ("crop.tolerance=inf", "'crop.tolerance' has the value inf: input should be a finite number."),
        ("download.max_bytes=1e11", "'download.max_bytes' has the value 100000000000.0: input should be less than"),
        ("download.timeout_s=nan", "'download.timeout_s' has the value nan: input should be "),
        ("executor.shard_timeout_s=1e12", "'executor.shard_timeout_s' has the value 1000000000000.0: "),
        ("segment.fill=[0, 0, 256]", "'segment.fill.2' has the value 256: input should be less than or equal to 255."),
        ("segment.keep=[1, 19]", "'segment.keep.1' has the value 19: input should be less than or equal to 18."),
        ("crop.max_long_side=100000", "'crop.max_long_side' has the value 100000: input should be less than"),
        (f"filter.min_image_px={10**30}", "'filter.min_image_px' has the value 1"),
        (f"filter.min_image_px={'9' * 5000}", "filter.min_image_px"),
        ("profile=['embedded']", "profile = ['embedded'] is not known; choose one of: embedded"),
        ("profile.name='embedded'", "is not known; choose one of: embedded"),
        ("filter={min_brightness=200, max_brightness=100}", "min_brightness is above filter.max_brightness: no face"),
        ("segment.keep=[]", "segment.keep is empty: no face would be kept"),
        ("models.second_look=[true, 0.5]", "'models.second_look' has the value [True, 0.5]: give a number."),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence_that_names_the_right_one(pair, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [pair], shards="sample")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_may_be_text_or_whole_and_switches_words():
    given = [
        "filter.min_face_px=64",
        'filter.min_image_px="700"',
        "crop.face_share.half=1",
        "report.drops_per_reason= 3",
    ]
    config = load_config(None, [*given, "download.respect_robots=no", "pack.embeddings=0"], shards="sample")
    assert (config.filter.min_face_px, config.filter.min_image_px, config.crop.face_share.half) == (64, 700, 1)
    assert not config.download.respect_robots
    assert not config.pack.embeddings


def test_an_unreadable_or_broken_file_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.toml", [])
    broken = tmp_path / "broken.toml"
    broken.write_text("a = [")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(broken, [])
    for text in (f"[filter]\nmin_image_px = {'9' * 5000}", f"a = {'[' * 3000}{']' * 3000}"):
        broken.write_text(text)
        with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML: .*\.$"):
            load_config(broken, [])
    broken.write_bytes("# größer\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"is no text in UTF-8: save it as such\.$"):
        load_config(broken, [])


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Shells leave `--config=~/my.toml` and `--set watch.metrics=~/run.prom` as they are."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.toml").write_text("filter.min_face_px = 200")
    assert load_config(Path("~/my.toml"), []).filter.min_face_px == 200
    write_metrics("~/run.prom", {"rows": 3})
    assert "faceshards_rows 3.0" in (tmp_path / "run.prom").read_text()


def test_every_key_explains_itself():
    assert [name for name, meaning in keys(Config) if not meaning] == []
    assert "download.timeout_s" in dict(keys(Config))


def test_the_sample_is_the_sample_with_spaces_around_it_too():
    assert load_config(None, [], shards=" sample").profile == "embedded"
    assert load_config(None, [], shards="sample,").profile == "embedded"


def test_the_executor_is_local_for_the_sample_and_ray_otherwise():
    assert load_config(None, [], shards="sample").executor.name == "local"
    assert load_config(None, [], shards=" sample ").executor.name == "local"
    assert load_config(None, [], shards="a.parquet").executor.name == "ray"
    assert load_config(None, [], shards="a.parquet", executor="local").executor.name == "local"


def test_the_executor_given_on_the_command_line_must_be_known():
    with pytest.raises(ConfigError, match=r"executor\.name"):
        load_config(None, [], executor="spark")


def test_an_address_of_ray_means_ray_and_is_not_ignored(tmp_path):
    executor = load_config(None, [], shards="sample", ray_address="[::1]:6379").executor
    assert (executor.name, executor.ray_address) == ("ray", "[::1]:6379")
    with pytest.raises(ConfigError, match=r"^--executor local joins no cluster: leave out --ray-address, or "):
        load_config(None, [], executor="local", ray_address="auto")
    cluster = tmp_path / "cluster.toml"
    cluster.write_text('[executor]\nray_address = "auto"\n')
    assert load_config(cluster, [], executor="local").executor.name == "local", (
        "a try of a cluster's config on this machine"
    )


def test_profiles_only_set_what_the_config_knows():
    for name in PROFILES:
        assert load_config(None, [], profile=name).profile == name


def test_one_word_names_what_computes_all_tasks_and_a_task_may_be_named_alone():
    assert (
        load_config(None, ["models.runtime=torch"]).models
        == load_config(None, ["models.runtime.detector=torch", "models.runtime.face_embedder=torch"]).models
    )
    with pytest.raises(ConfigError, match="'onnxruntime' or 'torch'"):
        load_config(None, ["models.runtime=tensorrt"])
