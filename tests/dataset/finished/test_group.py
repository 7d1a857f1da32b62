import json
import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest.mock import patch

import cv2
import fake_dataset
import numpy as np
import planted_persons
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from sample_runs import make, without

from pipeline.dataset.finished.forget import forget
from pipeline.dataset.finished.group import grouping
from pipeline.dataset.finished.group import persons as linkage
from pipeline.dataset.finished.group.grouping import Wish, group
from pipeline.dataset.finished.group.near_copies import Looks, details, hashes, without_copies
from pipeline.dataset.finished.group.persons import SIMILARITY, mutual_neighbours, persons
from pipeline.dataset.finished.report import write_report
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.out.ledger import funnel, read_manifests
from pipeline.dataset.out.output import fingerprint
from pipeline.shared.files import RemotePath
from pipeline.shared.tars import unpack
from schemas.errors import CorruptShardError, ExitCode, OutputError
from schemas.shard import UNCONDITIONAL, encode_npy
from stages.pixels.images import encode_jpeg

ROWS = "abacdbaa"
"""The person of each row of the source; row 7 is a copy of row 0."""


@cache
def picture(seed: int, width: int, height: int, quality: int = 90, tint: tuple[int, ...] = (1, 1, 1)) -> bytes:
    noise = (np.random.default_rng(seed).integers(0, 255, (9, 9, 3)) * tint).astype(np.uint8)
    rows, columns = np.arange(height) * 9 // height, np.arange(width) * 9 // width
    return encode_jpeg(noise[rows][:, columns], quality)


def record(part: str, row: int, seed: int, person: str, **changes):
    """A photo whose cosine with others of its person is about 0.7; copies have one seed."""
    own, of_person = (np.random.default_rng(one).normal(size=512) for one in (seed, 1000 + ord(person)))
    own, of_person = own / np.linalg.norm(own), of_person / np.linalg.norm(of_person)
    vector = np.sqrt(0.7) * of_person + np.sqrt(0.3) * own + 1e-3 * row
    quality = 90 - 5 * row
    crops = {"portrait": (300, 300), "full": (640, 512), "face": (224, 224)}
    pictures = {name: picture(seed, *size, quality) for name, size in crops.items()}
    vector = (vector / np.linalg.norm(vector)).astype(np.float32)
    return fake_dataset.record(part, row, arcface=encode_npy(vector), **{**pictures, **changes})


def source(out: Path, rows: str = ROWS) -> Path:
    """Two shards; of the first photo and its copy the copy's face is larger."""
    records = [
        record("part", n, n % 7, person, face_px=300.0 + n, text=f"{person}{n}") for n, person in enumerate(rows)
    ]
    half = len(rows) // 2
    return fake_dataset.write(out, {"part-00000": records[:half], "part-00001": records[half:]})


def grouped(out, *folders, report=False, **wish):
    with nullcontext() if report else patch.object(grouping, "write_report", funnel):
        group(folders, out, Wish(**{"samples_per_shard": 3, **wish}), Console(quiet=True))
    return [
        (json.loads(sample.files["json"]), name)
        for name in (manifest.shard for manifest in read_manifests(out))
        for sample in unpack(out / "shards" / f"{name}.tar")
    ]


def ledger(out: Path) -> list[dict]:
    return [row for path in sorted((out / "shards").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("group")
    grouped(folder / "out", source(folder / "source"), report=True)
    return folder


def contents(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


def test_photos_of_a_person_lie_side_by_side_and_the_rest_is_as_of_any_dataset(made, tmp_path):
    out = made / "out"
    assert verify(out) == []
    samples = grouped(tmp_path / "again", made / "source", made / "out/../source")
    assert [sample["text"] for sample, _ in samples] == ["a2", "a6", "a7", "b1", "b5", "c3", "d4"]
    of_person = {}
    for sample, shard in samples:
        of_person.setdefault(sample["text"][0], set()).add((sample["person"], shard))
    assert all(len(known) == 1 for known in of_person.values()), "one number and one shard each"
    assert len(set.union(*of_person.values())) == 4
    assert samples[0][0]["origin"] == "part-000000002"
    assert contents(out) == contents(tmp_path / "again"), "same input, however often it is named, same bytes"
    assert sum(manifest.rows_in for manifest in read_manifests(out)) == len(ROWS)
    assert "(mean cosine of at least 0.48), lie side by side" in (out / "README.md").read_text()


def test_features_of_no_face_that_are_not_those_of_dataset_json_are_not_copied(tmp_path):
    folder = source(tmp_path / "source")
    path, described = folder / UNCONDITIONAL, folder / "dataset.json"
    path.write_bytes(b"features")
    described.write_text(json.dumps({**json.loads(described.read_text()), "files": {path.name: fingerprint(path)}}))
    grouped(tmp_path / "whole", folder)
    assert (tmp_path / "whole" / UNCONDITIONAL).read_bytes() == b"features"
    for damage in (lambda: path.write_bytes(b"featureZ"), lambda: path.unlink() or path.mkdir()):
        damage()
        with pytest.raises(OutputError, match=r"unconditional\.safetensors is not what dataset\.json says of it"):
            grouped(tmp_path / "out", folder)
        assert not (tmp_path / "out").exists()


def test_drops_near_copy(made):
    (row,) = [row for row in ledger(made / "out") if row["verdict"] == "near_copy"]
    assert row["url"].endswith("/0.jpg"), "of copies the one with the largest face stays"
    assert row["person"] in {other["person"] for other in ledger(made / "out") if other["verdict"] == "kept"}


def test_drops_single_photo(made, tmp_path):
    samples = grouped(tmp_path, made / "source", singles=False)
    assert [sample["text"] for sample, _ in samples] == ["a2", "a6", "a7", "b1", "b5"]
    assert [row["url"][-5:] for row in ledger(tmp_path) if row["verdict"] == "single_photo"] == ["3.jpg", "4.jpg"]
    assert verify(tmp_path) == []


def test_the_report_shows_sizes_of_groups_and_faces_to_judge_them_by(made):
    """One person has three photos, one two, two have one; farthest and closest come in the order of their cosines."""
    out = made / "out"
    page = (out / "report.html").read_text()
    section = page[page.index('id="persons"') : page.index('id="kept"')]
    cells = re.findall(r"<td>(.*?)</td><td class=\"n\">(\d+)</td><td class=\"n\">(\d+)</td>", section)
    assert cells == [("1", "2", "2"), ("2", "1", "2"), ("3 to 5", "1", "3")]
    assert "Of 5 photos of persons with several, half have a mean cosine of 0.7" in section
    assert "0 (0.0 %) are nearer to another" in section
    groups, farthest, strangers = (re.findall(r"<figure>.*?</figure>", one, re.S) for one in section.split("<h3>")[1:])
    assert (
        sorted(figure.count("<img") for figure in groups)
        == sorted(figure.count("<img") for figure in farthest)
        == [2, 3]
    )
    assert [figure.count("<img") for figure in strangers] == [2] * len(strangers)
    cosines = [float(re.search(r"cosine (-?[\d.]+)", figure)[1]) for figure in strangers]
    assert cosines == sorted(cosines, reverse=True)
    assert max(cosines) < 0.3
    write_report(out, pictures=False, target=made / "bare.html")
    assert "<img src" not in (made / "bare.html").read_text()
    write_report(made / "source", target=made / "bare.html")
    assert 'id="persons"' not in (made / "bare.html").read_text()


def test_numbers_of_persons_say_nothing_about_other_datasets(made, tmp_path):
    other = source(tmp_path / "source", f"{ROWS[:-1]}b")
    ours = {sample["text"][0]: sample["person"] for sample, _ in grouped(tmp_path / "out", other)}
    theirs = {row["text"][0]: row["person"] for row, _ in grouped(made / "out", made / "source")}
    assert ours != theirs


def test_a_run_that_was_killed_goes_on_and_remembers_what_is_to_be_forgotten(made, tmp_path):
    out = tmp_path / "out"
    grouped(out, made / "source")
    whole = contents(out)
    forget(out, urls=("http://photos.example/part/1.jpg", "http://photos.example/part/2.jpg"))
    assert verify(out) == []
    for name in ("json", "tar"):
        (out / "shards" / f"persons-00000.{name}").unlink()  # that of row 2
    texts = [sample["text"] for sample, _ in grouped(out, made / "source")]
    assert texts == ["a6", "a7", "b5", "c3", "d4"]
    assert verify(out) == []
    blanked = [row for row in ledger(out) if row["verdict"] == "forgotten"]
    assert [(row["url"], row["person"]) for row in blanked] == [(None, None)] * 2
    untouched = set(whole) - {name for name in whole if name.startswith(("persons-00000", "persons-00001"))}
    assert all(contents(out)[name] == whole[name] for name in untouched)


def test_what_a_source_is_to_forget_is_not_read_from_it(made, tmp_path):
    folder = source(tmp_path / "source")
    forget(folder, urls=("http://photos.example/part/5.jpg",))
    assert "b5" not in [sample["text"] for sample, _ in grouped(tmp_path / "out", folder)]
    assert len(ledger(tmp_path / "out")) == len(ROWS) - 1


def test_a_file_of_a_grouped_dataset_is_forgotten_without_the_part_that_it_was_of(tmp_path):
    own = {"url": None, "source_file": "a/1.jpg", "sha256": "0" * 64}
    records = [record("pictures", row, row, "a", **(own if row == 1 else {})) for row in range(3)]
    grouped(tmp_path / "out", fake_dataset.write(tmp_path / "source", {"pictures-00000": records}))
    sentence = "a dataset of `group` knows no PART of before: give the source_file alone, or --sha256"
    with pytest.raises(OutputError, match=sentence):
        forget(tmp_path / "out", files=["pictures/a/1.jpg"])
    with pytest.raises(OutputError) as plain:
        forget(tmp_path / "source", files=["no/1.jpg"])
    assert "no PART of before" not in str(plain.value)
    for words in ({"files": ["a/1.jpg"]}, {"files": ["persons/a/1.jpg"]}, {"contents": ["0" * 64]}):
        assert sum(forget(tmp_path / "out", dry_run=True, **words).kept.values()) == 1


def test_datasets_elsewhere_are_grouped_to_elsewhere(made):
    """Over fsspec's file system in memory; several datasets become one."""
    remote = RemotePath("memory://grouped-sources")
    for path in (made / "source").rglob("*"):
        if path.is_file():
            (remote / str(path.relative_to(made / "source"))).write_bytes(path.read_bytes())
    out = RemotePath("memory://grouped")
    samples = grouped(out, remote, made / "source")
    assert [sample["text"] for sample, _ in samples] == ["a2", "a6", "a7", "b1", "b5", "c3", "d4"]
    assert verify(out) == []


def test_a_dataset_of_an_earlier_release_is_named_by_its_parts(made, tmp_path):
    """Else one of AI-made images beside it would be all that the trainer knows of, and shares by kind wrong."""
    other = fake_dataset.write(tmp_path / "other", {"zzz-00000": [record("zzz", 0, 50, "e")]})
    described = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(described | {"sources": ["made:zzz"]}))
    grouped(tmp_path / "out", made / "source", other)
    assert json.loads((tmp_path / "out/dataset.json").read_text())["sources"] == ["made:zzz", "part"]


def test_other_wishes_in_the_same_out_are_refused(made):
    with pytest.raises(OutputError, match=r"group\.singles was True, is now False.*--replan"):
        grouped(made / "out", made / "source", singles=False)


def test_other_neighbours_are_another_plan(made, tmp_path, monkeypatch):
    """As another machine might find them, on which a run is gone on with."""
    monkeypatch.setattr(grouping, "persons", lambda vectors, pairs, least: np.arange(len(vectors)))
    with pytest.raises(OutputError, match=r"group\.layout was"):
        grouped(without(made / "out", tmp_path, "persons-00001"), made / "source")


def test_what_is_done_is_not_read_again(made, monkeypatch):
    monkeypatch.delattr(grouping, "read_photos")
    before = contents(made / "out")
    grouped(made / "out", made / "source")
    assert contents(made / "out") == before


def test_what_cannot_be_grouped_is_said_in_a_sentence(made, tmp_path):
    with pytest.raises(OutputError, match="holds no dataset"):
        grouped(tmp_path / "out", tmp_path)
    with pytest.raises(OutputError, match="give another --out"):
        grouped(made / "out/../source", made / "source")
    empty = fake_dataset.write(tmp_path / "empty", {"part-00000": [fake_dataset.dead("part", 0, "metadata", "unsafe")]})
    with pytest.raises(OutputError, match="nothing to group"):
        grouped(tmp_path / "out", empty)
    with pytest.raises(OutputError, match="out was made by `group`: beside others, give the datasets that it was made"):
        grouped(tmp_path / "out", made / "source", made / "out")
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_an_out_that_will_not_do_is_refused_before_hours_of_reading(made, tmp_path, monkeypatch):
    monkeypatch.delattr(grouping, "read_photos")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written: "):
        grouped(tmp_path / "file", made / "source")
    with pytest.raises(OutputError, match="another plan"):
        grouped(source(tmp_path / "source"), made / "source")


def test_a_sample_that_rotted_is_not_signed_as_whole(made, tmp_path):
    folder = source(tmp_path / "source")
    tar = folder / "shards/part-00000.tar"
    data = tar.read_bytes()
    at = data.rindex(b'"mask_share": 0.5')
    tar.write_bytes(data[:at] + data[at:].replace(b"0.5", b"0.6", 1))
    with pytest.raises(CorruptShardError, match="part-000000003 are not those"):
        grouped(tmp_path / "out", folder)


def test_copies_are_those_of_the_best_photo_however_they_were_found_out():
    """Mirrored, cut so that only the face is the same, of one hash; a look-alike in another photo is none."""
    blocks = np.random.default_rng(0).integers(0, 255, (2, 9, 9)).astype(np.uint8)
    image, other_image = blocks.repeat(25, 1).repeat(25, 2)
    photo, mirrored = hashes(image)
    assert hashes(np.ascontiguousarray(image[:, ::-1]))[0] == mirrored
    cut = cv2.warpAffine(
        image, np.array([[1.03, 0.03, 3], [-0.03, 1.03, -9]]), image.shape, borderMode=cv2.BORDER_REFLECT
    )
    face, flipped, moved, other_face = map(details, (image, image[:, ::-1], 40 + cut // 2, other_image))
    other = ~photo
    looks = [
        ((photo, mirrored), face),
        ((photo ^ np.uint64(0b11), mirrored), other_face),
        ((photo ^ np.uint64(0b11), mirrored), face),
        ((mirrored, photo), other_face),
        ((other ^ np.uint64(0xFF00), other), moved),
        ((other ^ np.uint64(0xFF0000), other), flipped),
        ((other ^ np.uint64(0xFF000000), other), other_face),
    ]
    vectors = planted_persons.unit(np.ones((7, 512), np.float32) + np.eye(7, 512, dtype=np.float32))
    worth = np.array([9, 5, 1, 1, 1, 1, 9], np.float32)
    hashed, faces = (np.array(column) for column in zip(*looks, strict=True))
    copy_of, pairs = without_copies(vectors, Looks(hashed, faces, np.zeros((7, 0), np.float32)), worth, SIMILARITY)
    assert copy_of.tolist() == [0, 0, 0, 0, 0, 0, 6]
    assert list(zip(pairs.one, pairs.other, strict=True)) == [(0, 6)]


def test_a_model_of_copies_knows_what_was_edited_beyond_hashes(made, tmp_path, monkeypatch):
    """Where it describes photos of one person alike they are copies; it is a part of the plan, and refused as such."""

    class Red:
        device, stamp = "cpu", {"name": "red", "task": "copies", "sha256": "0" * 64, "licence": "MIT"}

        def __init__(self, path):
            """Read nothing."""

        def __call__(self, photo):
            red, green, _ = photo.mean((0, 1)).tolist()
            return np.eye(512, dtype=np.float32)[0 if red > 2 * green else 1 + int(photo.sum()) % 509]

    monkeypatch.setattr(grouping, "Sscd", Red)
    red = {n: {"full": picture(n, 640, 512, tint=(1, 0, 0))} for n in (2, 3, 6)}
    people = enumerate("abacdba")
    records = [record("part", n, n, person, text=f"{person}{n}", **red.get(n, {})) for n, person in people]
    folder = fake_dataset.write(tmp_path / "source", {"part-00000": records})
    assert len(grouped(tmp_path / "plain", folder)) == 7
    samples = grouped(tmp_path / "out", folder, sscd=Path("red.pt"))
    assert [sample["text"] for sample, _ in samples] == ["a0", "a2", "b1", "b5", "c3", "d4"], "another person is none"
    assert [model["name"] for model in read_manifests(tmp_path / "out")[0].models][-1] == "red"
    assert verify(tmp_path / "out") == []
    with pytest.raises(OutputError, match=r"group\.sscd was"):
        grouped(tmp_path / "out", folder)


def test_planted_persons_are_found_and_look_alikes_make_no_chain():
    """In small what `python benchmarks group` measures."""
    given = planted_persons.planted(1500)
    copy_of, pairs = without_copies(given.vectors, given.looks, np.zeros(len(given.person), np.float32), SIMILARITY)
    stays = copy_of == np.arange(len(copy_of))
    assert (~stays).sum() == given.copies
    assert (given.person[copy_of] == given.person).all()
    got = persons(given.vectors, pairs, SIMILARITY)[stays]
    precision, recall = planted_persons.quality(given.vectors[stays], given.person[stays], got)
    assert precision >= 0.995
    assert recall >= 0.95


@pytest.mark.parametrize(
    ("cosines", "is_of_the_person"), [((0.55, 0.3), True), ((0.47, 0.45), False), ((0.55, 0.2), False)]
)
def test_a_poor_photo_is_of_the_person_of_whom_it_has_a_pair(cosines, is_of_the_person):
    """Average linkage alone parts what has 0.55 with one photo of the person and 0.3 with another."""
    one, other = cosines
    vectors = np.linalg.cholesky(np.array([[1, 0.7, one], [0.7, 1, other], [one, other, 1]])).astype(np.float32)
    pairs, _ = mutual_neighbours(vectors, np.arange(3), SIMILARITY)
    assert persons(vectors, pairs, SIMILARITY).tolist() == [0, 0, 0 if is_of_the_person else 2]


@pytest.mark.parametrize("most", [4000, 20])
def test_a_chain_of_look_alikes_is_no_person(most, monkeypatch):
    """Each has a cosine of 0.7 with the next, of 0.49 with the one behind it, and so on; `most` parts it beforehand."""
    monkeypatch.setattr(linkage, "_MOST", most)
    rng = np.random.default_rng(0)
    chain = [planted_persons.unit(rng.normal(size=512))]
    for _ in range(199):
        chain.append(planted_persons.unit(0.7 * chain[-1] + 0.51**0.5 * planted_persons.unit(rng.normal(size=512))))
    vectors = np.array(chain, np.float32)
    pairs, _ = mutual_neighbours(vectors, np.arange(200), SIMILARITY)
    assert len(pairs.one) >= 199, "all hang together"
    assert np.unique(persons(vectors, pairs, SIMILARITY), return_counts=True)[1].max() <= 4


def inner(photo: np.ndarray, share: float) -> np.ndarray:
    margin = int(share * min(photo.shape[:2]))
    return photo[margin:-margin, margin:-margin]


def turned(photo: np.ndarray, degrees: float) -> np.ndarray:
    height, width = photo.shape[:2]
    return cv2.warpAffine(photo, cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1), (width, height))


def written_over(photo: np.ndarray) -> np.ndarray:
    photo, (height, width) = photo.copy(), photo.shape[:2]
    for line in (0.1, 0.35, 0.6, 0.95):
        at = (width // 20, int(line * height))
        cv2.putText(photo, "STOCK PHOTO", at, 0, width / 400, (255, 255, 255), width // 300, cv2.LINE_AA)
    return photo


EDITS = (
    lambda photo: photo[:, ::-1],
    lambda photo: inner(photo, 0.1)[:, ::-1],
    lambda photo: cv2.copyMakeBorder(photo, 200, 400, 200, 200, cv2.BORDER_CONSTANT, value=(255, 255, 255)),
    written_over,
    lambda photo: turned(inner(photo, 0.05), 10),
    lambda photo: cv2.cvtColor(cv2.cvtColor(photo, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR) // 2 + 60,
    lambda photo: cv2.convertScaleAbs(inner(photo, 0.12), alpha=1.2, beta=-20),
)
"""What becomes of photos in the web."""


@pytest.mark.long
@pytest.mark.real_data
def test_labelled_photos_are_grouped_as_labelled(data, labels, tmp_path):
    """With a real recogniser, through the whole pipeline: all true pairs of a cosine of at least 0.5, and no other."""
    person = {row["file"]: row["identity_group"] for row in labels if row["identity_group"]}
    edits = iter(EDITS)
    (tmp_path / "photos").mkdir()
    for name in person:
        (tmp_path / "photos" / name).write_bytes((data / "photos" / name).read_bytes())
        photo = cv2.imread(str(data / "photos" / name))
        if photo.shape[0] > 1000 and (edit := next(edits, None)):
            edited = cv2.resize(edit(photo), None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
            cv2.imwrite(str(tmp_path / "photos" / f"copy-{name}"), edited)
    sets = [f"models.pack={data / 'models' / 'real'}", "models.accept_noncommercial=true"]
    sets += [
        "models.screen=off",
        "models.segmenter=grabcut",
        "models.image_embedder=patches",
        "filter.min_image_px=100",
    ]
    code, _ = make(tmp_path / "source", *sets, "filter.min_face_px=40", shards=str(tmp_path / "photos"))
    assert code is ExitCode.OK
    samples = grouped(tmp_path / "out", tmp_path / "source")
    assert verify(tmp_path / "out") == []
    files = {sample["source_file"]: sample["person"] for sample, _ in samples}
    copies = [row["source_file"] for row in ledger(tmp_path / "out") if row["verdict"] == "near_copy"]
    assert len(copies) == len(EDITS)
    assert all(name.startswith("copy-") for name in copies), "the larger face stays"
    pairs = [(one, other) for one in files for other in files if one < other]
    assert sum(person[one] == person[other] for one, other in pairs) == 3
    assert all((files[one] == files[other]) == (person[one] == person[other]) for one, other in pairs)
