"""The bundled part: every row ends as `expected` says, by the real stages and models of the embedded profile."""

import http.client
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sample_runs import FRESH, remembered_models

from pipeline.dataset.execute.runner import Loaded, apply_all
from pipeline.dataset.rows import Rows
from pipeline.dataset.source.sample import FILES, sample_server, write_sample
from schemas.columns import COLUMNS, KEPT, SEED_SCHEMA
from stages import STAGES
from stages.pixels.images import decode_jpeg
from stages.runtime import Runtime
from stages.settings import Settings

EMBEDDED = {"detector": "haar", "segmenter": "grabcut", "face_embedder": "lbp", "image_embedder": "patches"}
STEPS = tuple(name for name in STAGES if name != "pack")
SEEDED_FROM = {"url": "URL", "text": "TEXT", "meta_width": "WIDTH", "meta_height": "HEIGHT"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with remembered_models():
        return write_sample(tmp_path_factory.mktemp("sample")).parent


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    with sample_server(folder) as number:
        yield number


@pytest.fixture(scope="module")
def table(folder: Path) -> pa.Table:
    return pq.read_table(folder / "sample.parquet")


@pytest.fixture(scope="module")
def outcome(port: int, table: pa.Table) -> Rows:
    settings = Settings.model_validate({"download": {"retries": 0}, "models": EMBEDDED})
    runtime = Runtime(sample_port=port)
    steps = [Loaded(STAGES[name].stage()(settings, runtime), frozenset(COLUMNS)) for name in STEPS]
    with remembered_models():
        return apply_all(steps, Rows.living(_seeds(table)))


def _seeds(table: pa.Table) -> pa.Table:
    given = {seed: table[column] for seed, column in SEEDED_FROM.items()}
    given |= {name: table[name] for name in ("punsafe", "pwatermark")} | {"nsfw": table["NSFW"]}
    given |= {"key": pa.array([str(row) for row in range(len(table))]), "row": pa.array(range(len(table)))}
    given |= {"caption_chars": pc.utf8_length(given["text"])}
    given |= {"part": pa.array(["sample"] * len(table))}
    nulls = pa.nulls(len(table))
    return pa.table({name: given.get(name, nulls) for name in SEED_SCHEMA.names}).cast(SEED_SCHEMA)


def test_every_row_ends_as_expected(outcome: Rows, table: pa.Table) -> None:
    verdicts = dict.fromkeys(outcome.alive["key"].to_pylist(), KEPT)
    verdicts |= dict(zip(outcome.dead["key"].to_pylist(), outcome.dead["verdict"].to_pylist(), strict=True))
    names = [url.rpartition("/")[2] for url in table["URL"].to_pylist()]
    found = {(name, str(row)): verdicts[str(row)] for row, name in enumerate(names)}
    assert found == {(name, str(row)): table["expected"][row].as_py() for row, name in enumerate(names)}


def test_keepers_have_one_certain_face_and_all_features(outcome: Rows) -> None:
    kept = outcome.alive
    assert kept.num_rows >= 6
    assert set(kept["n_faces"].to_pylist()) == {1}
    assert min(kept["det_score"].to_pylist()) > 0.65
    assert max(kept["second_score"].to_pylist()) < 0.35
    for name in ("face", "mask", "full", "arcface", "clip", "clip_hidden"):
        assert kept[name].null_count == 0, name
    assert sum(portrait is not None for portrait in kept["portrait"].to_pylist()) >= 4
    assert sum(half is not None for half in kept["half"].to_pylist()) >= 3


def test_masks_show_the_face_but_not_everything(outcome: Rows) -> None:
    shares = outcome.alive["mask_share"].to_pylist()
    assert min(shares) > 0.3
    assert max(shares) < 0.9


def test_the_turned_photo_is_upright(outcome: Rows) -> None:
    names = [url.rpartition("/")[2] for url in outcome.alive["url"].to_pylist()]
    turned, plain = (
        outcome.alive.slice(names.index(name), 1).to_pylist()[0] for name in ("on-its-side.jpg", "astronaut.jpg")
    )
    assert (turned["width"], turned["height"]) == (turned["meta_width"], turned["meta_height"]) == (1056, 1229)
    assert abs(turned["roll_deg"]) < 15
    faces = [decode_jpeg(record["face"]).astype(float) for record in (turned, plain)]
    assert np.abs(faces[0] - faces[1]).mean() < 12  # the same photo at another size


def test_metadata_has_the_columns_of_laion_and_says_what_was_enlarged(table: pa.Table) -> None:
    laion = {"URL", "TEXT", "WIDTH", "HEIGHT", "NSFW", "similarity", "punsafe", "pwatermark"}
    assert set(table.column_names) == laion | {"expected", "note"}
    assert 24 <= table.num_rows <= 30
    for row in table.to_pylist():
        assert row["TEXT"]
        assert row["expected"] != KEPT or "enlarged" in row["note"]


def test_the_same_bytes_every_time(folder: Path, tmp_path: Path) -> None:
    with patch.dict(FILES, FRESH):
        write_sample(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/astronaut.jpg", 200),
        ("/gone.jpg", 404),
        ("/failing.jpg", 500),
        ("/../sample.py", 404),
        ("/sample.parquet", 404),
    ],
)
def test_the_server_answers(port: int, path: str, status: int) -> None:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    link.request("GET", path)
    assert link.getresponse().status == status
    link.close()


def test_the_server_says_nothing_when_a_client_hangs_up(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        link = socket.create_connection(("127.0.0.1", port))
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.sendall(b"GET /vignette.png HTTP/1.1\r\nHost: x\r\n\r\n")
        link.recv(100)
        link.close()
    link2 = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    link2.request("GET", "/small.jpg")
    link2.getresponse().read()
    link2.close()
    assert capfd.readouterr().err == ""


def test_the_server_gives_its_port_back(folder: Path) -> None:
    with sample_server(folder) as port:
        pass
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection("127.0.0.1", port, timeout=5).request("GET", "/")
