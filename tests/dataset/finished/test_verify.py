import hashlib
import io
import json
import shutil
import tarfile
import threading
from pathlib import Path

import fake_dataset as fake
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import save as save_features
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.finished import verify as verification
from pipeline.dataset.finished.forget import forget
from pipeline.dataset.finished.group.grouping import Wish, group
from pipeline.dataset.finished.hub.card import write_card
from pipeline.dataset.finished.replay import replay
from pipeline.dataset.finished.report import write_report
from pipeline.dataset.finished.status import status
from pipeline.dataset.finished.verify import foreign_files, verify
from pipeline.dataset.out.forgotten import Forgotten, load
from pipeline.dataset.out.forgotten import save as save_forgotten
from pipeline.dataset.out.ledger import Funnel, funnel, read_manifests
from pipeline.dataset.out.output import Output, fingerprint
from schemas.columns import LATER, LEDGER_SCHEMA
from schemas.digest import sha256_of_json
from schemas.errors import CorruptShardError, OutputError
from schemas.int8 import encode_int8, quantise
from schemas.shard import UNCONDITIONAL, Manifest, dataset_text, encode_npy
from stages.settings import FilterSettings

SHARD, FIRST = "a-00000", "a-000000000"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return fake.write(tmp_path_factory.mktemp("published"), {SHARD: fake.mixed("a"), "a-00001": fake.mixed("a", 6)})


@pytest.fixture
def out(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "out"))


def seal(out, **changes):
    """Make manifest and dataset.json fit the files again: what a faulty writer would publish."""
    path = out / "shards" / f"{SHARD}.json"
    fields = json.loads(path.read_text()) | changes
    for name in fields["files"]:
        data = (path.parent / name).read_bytes()
        fields["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(Manifest(**fields).to_json())
    dataset = json.loads((out / "dataset.json").read_text())
    unfinished = {name: dataset[name] for name in ("schema_version", "profile", "plan_digest", "plan")}
    (out / "dataset.json").write_text(json.dumps(unfinished, indent=2, sort_keys=True) + "\n")


def edit_tar(out, change):
    """Rewrite the tar after `change` of its files: a dict of name -> content, in order."""
    path = out / "shards" / f"{SHARD}.tar"
    with tarfile.open(path) as tar:
        files = {info.name: tar.extractfile(info).read() for info in tar}
    files = change(files) or files
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    seal(out)


def edit_ledger(out, change, **manifest):
    path = out / "shards" / f"{SHARD}.parquet"
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA), path)
    seal(out, **manifest)


def problems_of(out):
    return [(problem.file, problem.key, problem.message) for problem in verify(out)]


def test_what_the_publisher_writes_verifies(out):
    assert verify(out) == []


def test_it_says_how_far_it_is_and_looks_at_several_shards_together(out, monkeypatch):
    screen, meeting = io.StringIO(), threading.Barrier(2)
    monkeypatch.setattr("pipeline.shared.terminal.LINE_EVERY_S", -1)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(verification, "manifest_problems", lambda *_: [str(meeting.wait(60))])
    problems = verify(out, Console(file=screen, width=100))
    assert [problem.file for problem in problems] == [f"{SHARD}.json", "a-00001.json"]
    assert screen.getvalue().startswith("1 of 2 shards, problems: 1")
    assert screen.getvalue().count("\n") == 1, "its end is said by the command"


def test_the_edits_of_this_file_are_themselves_harmless(out):
    edit_tar(out, lambda files: None)
    edit_ledger(out, lambda rows: None)
    assert problems_of(out) == []


def test_clip_features_verify_too(tmp_path):
    clip = {"clip": encode_npy(np.ones(1024, np.float16)), "clip_hidden": encode_npy(np.ones((257, 1280), np.float16))}
    out = fake.write(tmp_path, {SHARD: [fake.record("a", 0, dino=None, **clip)]})
    assert problems_of(out) == []


def in_int8(*shape: int) -> bytes:
    return encode_int8(quantise(np.ones(shape, np.float16)))


def test_hidden_states_in_int8_verify_too(tmp_path):
    clip = {"clip": encode_npy(np.ones(1024, np.float16)), "clip_hidden_int8": in_int8(257, 1280)}
    rows = [fake.record("a", 0, dino=None, **clip, clip_hidden_mirror_int8=in_int8(257, 1280))]
    rows += [fake.record("a", row, dino=None, dino_int8=in_int8(257, 70 + row)) for row in (1, 2)]
    out = fake.write(tmp_path, {SHARD: rows})
    assert problems_of(out) == []


BAD_INT8 = {
    "shape": (in_int8(256, 2), "dino.safetensors is not a safetensors file of int8 (257, -1) and its scale"),
    "no file": (b"junk", "dino.safetensors: not a safetensors file of int8 and scale: "),
    "another tensor": (save_features({"dino": np.ones((257, 2), np.float16)}), "dino.safetensors: not a safetensors"),
    "not finite": (
        encode_int8(quantise(np.full((257, 2), np.inf, np.float16))),
        "dino.safetensors holds numbers that are not finite",
    ),
    "metadata": (
        save_features(quantise(np.ones((257, 2), np.float16))._asdict(), metadata={"a": "b"}),
        "dino.safetensors is not a safetensors file of int8 (257, -1) and its scale",
    ),
}


@pytest.mark.parametrize("name", BAD_INT8)
def test_hidden_states_in_int8_that_are_something_else(tmp_path, name):
    data, message = BAD_INT8[name]
    out = fake.write(tmp_path, {SHARD: [fake.record("a", 0, dino=None, dino_int8=data)]})
    ((_, key, found),) = problems_of(out)
    assert key == FIRST
    assert found.startswith(message)


def test_hidden_states_in_both_forms_and_mirrored_ones_of_another_width(tmp_path):
    other = fake.record("a", 1, dino=None, dino_int8=in_int8(257, 2), dino_mirror_int8=in_int8(257, 3))
    out = fake.write(tmp_path, {SHARD: [fake.record("a", 0, dino_int8=in_int8(257, 2)), other]})
    assert [message for *_, message in problems_of(out)] == [
        "dino.npy: there in int8 too",
        "dino_mirror.safetensors has not the shape of dino.safetensors",
    ]


def test_a_shard_that_kept_nothing_verifies(tmp_path):
    assert problems_of(fake.write(tmp_path, {SHARD: [fake.dead("a", 0, "size", "small_image")]})) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A dataset with every file that a run writes."""
    out = fake.write(tmp_path_factory.mktemp("whole"), {SHARD: fake.mixed("a"), "a-00001": fake.mixed("a", 6)})
    save_forgotten(out, Forgotten("salt").adding(urls=["http://nowhere.example/a.jpg"], domains=["gone.example"]))
    features = save_features({"dino": np.ones((257, 2), np.float16)})
    (out / UNCONDITIONAL).write_bytes(features)
    dataset = json.loads((out / "dataset.json").read_text())
    dataset["files"] = {UNCONDITIONAL: fingerprint(out / UNCONDITIONAL)}
    (out / "dataset.json").write_text(json.dumps(dataset, indent=2, sort_keys=True) + "\n")
    assert verify(out) == []
    return out


EVERY_FILE = [*(f"shards/{SHARD}.{suffix}" for suffix in ("tar", "parquet", "json"))]
EVERY_FILE += ["dataset.json", "forgotten.json", UNCONDITIONAL]


@pytest.mark.parametrize("name", EVERY_FILE)
def test_every_flipped_bit_is_reported_with_its_file(whole, name):
    path = whole / name
    content = path.read_bytes()

    @settings(max_examples=4, deadline=None)
    @given(place=st.integers(0, len(content) - 1), bit=st.integers(0, 7))
    def flipped(place, bit):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        found = verify(whole)
        # a hash that differs from a file's own may be damaged at either end: both are named
        assert any(path.name in (problem.file, *problem.message.split()) for problem in found)
        if name.endswith(".tar"):
            assert {problem.file for problem in found} == {path.name}

    try:
        flipped()
    finally:
        path.write_bytes(content)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_torn_and_overwritten_tars_are_never_a_traceback(whole, tmp_path_factory, data):
    out = Path(shutil.copytree(whole, tmp_path_factory.mktemp("torn") / "out"))
    path = out / "shards" / f"{SHARD}.tar"
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.integers(1, 5000))
    filler = data.draw(st.sampled_from([b"", b"\0" * length, b"\xff" * length, content[:length]]))
    path.write_bytes(content[:start] + filler + content[start + length :])
    problems = verify(out)
    changed = path.read_bytes() != content
    assert bool(problems) is changed
    assert {problem.file for problem in problems} <= {path.name}


def test_dataset_json_without_an_entry_or_with_another(whole, tmp_path):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    path = out / "dataset.json"
    dataset = json.loads(path.read_text())
    for name in ("shards", "rows_in", "dataset_digest"):
        path.write_text(json.dumps({k: v for k, v in dataset.items() if k != name}, indent=2, sort_keys=True) + "\n")
        assert ("dataset.json", None, f"it lacks {name}") in problems_of(out)
    path.write_text(json.dumps({**dataset, "more": 1}, indent=2, sort_keys=True) + "\n")
    assert problems_of(out) == [("dataset.json", None, "it has the unknown entries more")]
    dataset["plan"]["settings"]["filter"]["min_face_px"] = 1.0
    path.write_text(json.dumps(dataset, indent=2, sort_keys=True) + "\n")
    assert problems_of(out) == [("dataset.json", None, "its plan is not the one of its plan_digest")]


def test_a_sample_whose_files_fit_together_but_are_not_those_that_were_written(out):
    """Finite numbers of the right shape: nothing but the hash in the ledger tells."""
    edit_tar(out, lambda files: files.update({f"{FIRST}.dino.npy": encode_npy(np.full((257, 2), 2, np.float16))}))
    assert problems_of(out) == [
        (f"{SHARD}.tar", FIRST, "its files are not those that the ledger's sample_sha256 stands for")
    ]


BLANK = {name: None for name in LEDGER_SCHEMA.names if name not in ("key", "part", "row")}


def forgotten(rows):
    rows[1].update(BLANK, verdict="forgotten", stage="metadata")


def test_a_forgotten_row_may_lack_everything(out):
    edit_ledger(out, forgotten, dropped=recounted(out, unsafe=-1, forgotten=1))
    assert problems_of(out) == []


def test_a_forgotten_row_of_which_something_is_known(out):
    def change(rows):
        forgotten(rows)
        rows[1]["url"] = "http://photos.example/a/1.jpg"

    edit_ledger(out, change, dropped=recounted(out, unsafe=-1, forgotten=1))
    assert problems_of(out) == [(f"{SHARD}.parquet", None, "rows that must not be used still tell url")]


def recounted(out, **changes):
    dropped = json.loads((out / "shards" / f"{SHARD}.json").read_text())["dropped"]
    return {reason: count + changes.get(reason, 0) for reason, count in dropped.items()}


def test_a_row_that_was_to_be_forgotten_and_is_still_there(out):
    save_forgotten(out, Forgotten("salt").adding(urls=["https://PHOTOS.example/a/2.jpg"]))
    ((file, key, message),) = problems_of(out)
    assert (file, key) == (f"{SHARD}.parquet", "a-000000002")
    assert "was to be forgotten" in message


def test_a_row_that_was_to_be_forgotten_by_the_name_of_its_file(tmp_path):
    out = fake.write(tmp_path, {SHARD: [fake.record("a", 0, source_file="photos/x.jpg", url=None)]})
    save_forgotten(out, Forgotten("salt").adding(files=["photos/x.jpg"]))
    assert [(key, "was to be forgotten" in message) for _, key, message in problems_of(out)] == [("a-000000000", True)]


def without_embeddings(out):
    """Make it a dataset whose plan leaves embeddings out."""
    path = out / "dataset.json"
    dataset = json.loads(path.read_text())
    dataset["plan"]["settings"]["pack"] = {"embeddings": False}
    dataset["plan_digest"] = sha256_of_json(dataset["plan"])
    path.write_text(json.dumps(dataset, indent=2, sort_keys=True) + "\n")
    return dataset["plan_digest"]


def test_embeddings_that_the_plan_leaves_out_are_a_problem(tmp_path):
    out = fake.write(tmp_path, {SHARD: [fake.record("a", 0)]}, finish=False)
    seal(out, plan_digest=without_embeddings(out))
    ((file, key, message),) = problems_of(out)
    assert (file, key) == (f"{SHARD}.tar", FIRST)
    assert message == "embeddings, which its plan leaves out: arcface.npy, dino.npy"


def test_a_dataset_without_embeddings_verifies(tmp_path):
    out = fake.write(tmp_path, {SHARD: [fake.record("a", 0, arcface=None, dino=None)]}, finish=False)
    assert {message[:19] for _, _, message in problems_of(out)} == {"missing files: arcf", "no image features: "}
    seal(out, plan_digest=without_embeddings(out))
    (out / "dataset.json").write_text((out / "dataset.json").read_text())
    assert problems_of(out) == []


@settings(max_examples=6, deadline=None)
@given(name=st.sampled_from(["json", "face.jpg", "mask.png", "arcface.npy", "dino.npy"]), data=st.data())
def test_no_damage_inside_a_sample_is_a_traceback(published, tmp_path_factory, name, data):
    out = Path(shutil.copytree(published, tmp_path_factory.mktemp("damaged") / "out"))

    def damage(files):
        content = bytearray(files[f"{FIRST}.{name}"])
        for place in data.draw(st.lists(st.integers(0, min(len(content), 300) - 1), min_size=1, max_size=4)):
            content[place] = data.draw(st.integers(0, 255))
        files[f"{FIRST}.{name}"] = bytes(content[: data.draw(st.integers(0, len(content)))])

    edit_tar(out, damage)
    assert {problem.file for problem in verify(out)} <= {f"{SHARD}.tar"}


@settings(max_examples=6, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 511), st.integers(1, 255)), min_size=1, max_size=3))
def test_no_damage_of_a_tar_header_is_a_traceback(published, tmp_path_factory, flips):
    out = Path(shutil.copytree(published, tmp_path_factory.mktemp("damaged") / "out"))
    path = out / "shards" / f"{SHARD}.tar"
    damaged = bytearray(path.read_bytes())
    header = damaged[:512]
    for place, mask in flips:
        header[place] ^= mask
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    path.write_bytes(header + damaged[512:])
    seal(out)
    assert {problem.file for problem in verify(out)} <= {f"{SHARD}.tar"}


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_file_that_is_gone_or_short(out, suffix, damage):
    damage(out / "shards" / f"{SHARD}.{suffix}")
    assert f"{SHARD}.{suffix}" in {problem.file for problem in verify(out)}


def test_files_without_a_manifest_are_strays(out):
    (out / "shards" / "a-00001.json").unlink()
    (out / "shards" / ".tmp-a-00002.tar.7").write_bytes(b"half")
    strays = {file for file, _, message in problems_of(out) if "no finished shard" in message}
    assert strays == {"a-00001.parquet", "a-00001.tar"}
    assert foreign_files(out) == []


def test_files_of_others_are_no_problem_and_named(out):
    (out / "shards" / "index.json").write_text("{}")
    (out / "shards" / "a-00000.tar.idx").write_bytes(b"energon")
    (out / "shards" / ".nv-meta").mkdir()
    (out / "notes.txt").write_text("mine")
    assert problems_of(out) == []
    assert foreign_files(out) == ["notes.txt", "shards/.nv-meta", "shards/a-00000.tar.idx", "shards/index.json"]
    done = CliRunner().invoke(app, ["verify", str(out)])
    assert done.exit_code == 0
    assert done.stdout.count("index.json") == 1
    assert "left alone: notes.txt, shards/.nv-meta" in done.stdout


def test_a_lost_shard_is_missed_by_dataset_json(out):
    for path in (out / "shards").glob("a-00001.*"):
        path.unlink()
    ((file, _, message),) = problems_of(out)
    assert file == "dataset.json"
    assert "shards, rows_in, kept, dropped" in message


@pytest.mark.parametrize("text", [None, "", "{}", "[1]", '{"plan": 3}', "[" * 100_000])
def test_dataset_json_that_is_gone_or_broken(out, text):
    path = out / "dataset.json"
    path.unlink() if text is None else path.write_text(text)
    assert {file for file, _, _ in problems_of(out)} == {"dataset.json"}


@pytest.mark.parametrize("field", ["profile", "plan_digest", "models"])
def test_a_shard_of_another_plan(out, field):
    seal(out, **{field: [] if field == "models" else "other"})
    assert problems_of(out) == [(f"{SHARD}.json", None, f"{field} is not that of dataset.json")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": 3}, "6 rows in, but 3 kept"),
        ({"shard": "a-00009"}, "manifest of a-00009"),
        ({"dropped": {"because": 4}}, "unknown reasons ['because']"),
        ({"rows_in": 7}, "7 rows in"),
    ],
)
def test_a_manifest_that_lies(out, changes, message):
    seal(out, **changes)
    assert any(file == f"{SHARD}.json" and message in text for file, _, text in problems_of(out))


def test_a_folder_without_a_dataset_is_the_users_mistake(tmp_path):
    with pytest.raises(OutputError, match="holds no dataset"):
        verify(tmp_path)


def put(index, **values):
    return lambda rows: rows[index].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(1, verdict="watermark"), "counts the verdicts differently"),
        (put(1, verdict="because"), "no stage declares the verdicts ['because']"),
        (put(1, stage="sieze"), "unknown stages ['sieze']"),
        (put(0, stage="filter"), "did not pass the last stage"),
        (put(0, bbox=None), "1 kept rows have no bbox"),
        (put(2, key=FIRST), "is not that of a row of a"),
        (put(2, part="b"), "is not that of a row of a"),
        (put(2, key="a-000000001", row=1), "out of order or occurs twice"),
        (lambda rows: rows.insert(1, rows.pop(2)), "out of order"),
        (lambda rows: rows.pop(1), "5 rows; the manifest says 6"),
    ],
)  # fmt: skip
def test_a_ledger_that_lies(out, change, message):
    edit_ledger(out, change)
    assert any(file == f"{SHARD}.parquet" and message in text for file, _, text in problems_of(out)), problems_of(out)


@pytest.mark.parametrize(
    "lacking",
    [
        ["caption_chars", "screen_score", "crops_made"],
        [name for name in LATER if name not in json.loads(fake.record("a", 0)["json"])],
    ],
    ids=["some", "all that json does not repeat"],
)
def test_ledgers_of_earlier_releases_are_read_as_ever(out, lacking):
    path = out / "shards" / f"{SHARD}.parquet"
    old = pq.read_table(path).drop_columns(lacking)
    boxes = pa.array(old["bbox"].to_pylist(), pa.list_(pa.float32(), 4))
    pq.write_table(old.set_column(old.column_names.index("bbox"), "bbox", boxes), path)
    seal(out)
    assert problems_of(out) == []
    assert Output(out).is_done(SHARD, fake.plan())
    assert (status(out)["rows"], write_report(out).kept) == (12, 4)
    assert "are counted in 2 of 12 rows" in (out / "report.html").read_text(encoding="utf-8")
    assert replay(out, FilterSettings(), 0)[1]["kept"] == 4
    assert forget(out, urls=("http://photos.example/a/0.jpg",)).kept == {SHARD: 1}
    assert problems_of(out) == []
    assert pq.read_schema(path) == LEDGER_SCHEMA


@pytest.mark.parametrize(
    ("name", "value"), [("bbox", [1.0, 2.0, 3.0]), ("kps", [[1.0, 2.0]] * 4), ("kps", [[1.0]] * 5)]
)
def test_boxes_and_points_of_another_size_are_no_ledger(name, value, out):
    edit_ledger(out, put(0, **{name: value}))
    ((file, _, message),) = problems_of(out)
    assert file == f"{SHARD}.parquet"
    assert message.startswith(f"not a ledger: {name} holds lists of other sizes")
    with pytest.raises(CorruptShardError, match=f"{name} holds lists of other sizes"):
        write_report(out)


def test_pyarrow_before_26_can_read_what_ledgers_hold():
    assert not [field.name for field in LEDGER_SCHEMA if "fixed_size" in str(field.type)]


def test_crops_that_are_not_those_of_the_ledger(out):
    edit_ledger(out, put(0, crops_made=["portrait", "half"]))
    assert problems_of(out) == [(f"{SHARD}.tar", FIRST, "its crops are not those of the ledger's crops_made")]


def test_a_ledger_of_other_columns(out):
    path = out / "shards" / f"{SHARD}.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["kps"]), path)
    seal(out)
    assert problems_of(out) == [(path.name, None, "its columns or types are not those of a ledger")]


def test_a_tar_whose_samples_are_others_than_the_ledgers(out):
    edit_tar(out, lambda files: {name.replace("a-000000004", "a-000000007"): data for name, data in files.items()})
    assert (f"{SHARD}.tar", "a-000000004", "the ledger keeps it, but the tar has no such sample") in problems_of(out)
    assert (f"{SHARD}.tar", "a-000000007", "the ledger does not keep it") in problems_of(out)


def test_samples_out_of_order(out):
    edit_tar(out, lambda files: dict(sorted(files.items(), key=lambda item: -int(item[0][2:11]))))
    assert problems_of(out) == [(f"{SHARD}.tar", None, "its keys are not sorted, or a key occurs twice")]


def test_a_tar_that_is_none(out):
    (out / "shards" / f"{SHARD}.tar").write_bytes(b"no tar" * 200)
    seal(out)
    assert "not a readable tar" in problems_of(out)[0][2]


def test_a_sample_that_breaks_the_contract_is_named(out):
    edit_tar(out, lambda files: files.update({f"{FIRST}.face.jpg": b"junk"}))
    assert (f"{SHARD}.tar", FIRST, "face.jpg is not a JPEG") in problems_of(out)
    assert {(file, key) for file, key, _ in problems_of(out)} == {(f"{SHARD}.tar", FIRST)}


@pytest.mark.parametrize("sections", [{"filter": []}, {"filter": {"min_face_px": "\ud800"}}, [], None])
def test_a_plan_that_is_none_is_damage_for_every_reader(whole, tmp_path, sections):
    out = Path(shutil.copytree(whole, tmp_path / "copy"))
    dataset = json.loads((out / "dataset.json").read_text())
    dataset["plan"]["settings"] = sections
    (out / "dataset.json").write_text(json.dumps(dataset, indent=2, sort_keys=True) + "\n")
    assert {file for file, _, _ in problems_of(out)} == {"dataset.json"}
    with pytest.raises(CorruptShardError, match=r"dataset\.json"):
        write_card(out, funnel(out))


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"sources": [1]}, "sources is not what a run writes"),
        ({"planned": {"p": "x"}}, "planned is not what a run writes"),
        ({"files": [1]}, "files is not an object of objects"),
        ({"plan_digest": 5}, "plan_digest is not what a run writes"),
        ({"plan": 5}, "plan is not what a run writes"),
        ({"plan": None}, "plan is not what a run writes"),
        ({"plan": {"models": [{"name": "x"}]}}, "plan is not what a run writes"),
        ({"plan": {"settings": {"pack": {"layout": "x"}}}}, "plan is not what a run writes"),
        ({"plan": {"settings": {"group": {}}}}, "plan is not what a run writes"),
    ],
)
def test_a_dataset_json_that_was_edited_by_hand_is_one_sentence(changed, name, tmp_path):
    out = fake.write(tmp_path / "out", {"p-00000": fake.mixed("p")})
    path = out / "dataset.json"
    path.write_bytes(dataset_text({**json.loads(path.read_bytes()), **changed}))
    manifests = tuple(read_manifests(out))
    for read in (
        status,
        write_report,
        lambda one: write_card(one, Funnel(manifests, 0, ())),
        lambda one: Output(one).refuse_other_plan(fake.plan()),
        lambda one: group([one], tmp_path / "grouped", Wish(), Console(quiet=True)),
    ):
        with pytest.raises((CorruptShardError, OutputError), match=rf"dataset\.json.* {name}"):
            read(out)
    assert ("dataset.json", None) in [one[:2] for one in problems_of(out)]


def test_a_folder_called_forgotten_json_is_one_sentence(tmp_path):
    (tmp_path / "forgotten.json").mkdir()
    with pytest.raises(CorruptShardError, match="it is a folder"):
        load(tmp_path)
