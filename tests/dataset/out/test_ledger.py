import io
import json
import shutil
import threading
from pathlib import Path

import fake_dataset as fake
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.dataset.out import ledger as ledger_module
from pipeline.dataset.out.ledger import counts, funnel, funnel_table, read_manifests, shard_names, summary
from pipeline.shared.files import RemotePath, to_path
from schemas.columns import LEDGER_SCHEMA
from schemas.errors import ContractError, CorruptShardError, OutputError
from stages import STAGES


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    last = [fake.dead("b", 0, "size", "small_image")]
    shards = {"a-00000": fake.mixed("a"), "a-00001": fake.mixed("a", 6), "b-00000": last}
    return fake.write(tmp_path_factory.mktemp("published"), shards)


@pytest.fixture
def out(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "out"))


def edit(out, shard, change):
    """Rewrite a ledger after `change` of its rows."""
    path = out / "shards" / f"{shard}.parquet"
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA), path)


def test_the_funnel_is_counted_from_the_ledgers_in_the_pipelines_order(out):
    counted = funnel(out)
    assert (counted.shards, counted.rows_in, counted.kept) == (3, 13, 4)
    assert [row.stage for row in counted.rows] == list(STAGES)
    assert {row.stage: (row.rows_in, row.dropped, row.rows_left) for row in counted.rows if row.dropped} == {
        "metadata": (13, {"unsafe": 2}, 11),
        "download": (11, {"not_found": 2}, 9),
        "size": (9, {"small_image": 1}, 8),
        "filter": (8, {"small_face": 2}, 6),
        "segment": (6, {"empty_mask": 2}, 4),
    }
    for before, after in zip(counted.rows, counted.rows[1:], strict=False):
        assert before.rows_left == after.rows_in


def test_only_shards_with_a_manifest_count(out):
    (out / "shards" / "a-00001.json").unlink()
    (out / "shards" / ".tmp-a-00002.json").write_text("half")
    assert shard_names(out) == ["a-00000", "b-00000"]
    assert funnel(out).rows_in == 7


@pytest.mark.parametrize("verdict", ["kept", "no_face"])
def test_a_ledger_that_contradicts_its_manifest_is_named(out, verdict):
    edit(out, "a-00001", lambda rows: rows[3].update(verdict=verdict))
    with pytest.raises(CorruptShardError, match=r"a-00001.*small_face"):
        funnel(out)


def test_equal_sums_do_not_hide_swapped_reasons(out):
    edit(out, "a-00000", lambda rows: (rows[1].update(verdict="not_found"), rows[2].update(verdict="watermark")))
    with pytest.raises(CorruptShardError, match=r"a-00000.*unsafe, watermark"):
        funnel(out)


def test_an_unknown_stage_is_named(out):
    edit(out, "b-00000", lambda rows: rows[0].update(stage="sieze"))
    with pytest.raises(CorruptShardError, match=r"b-00000.*'sieze'"):
        funnel(out)


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"not a parquet file" * 9])
def test_an_unreadable_ledger_is_named(out, damage):
    (out / "shards" / "a-00000.parquet").write_bytes(damage)
    with pytest.raises(CorruptShardError, match=r"a-00000\.parquet"):
        funnel(out)


@pytest.mark.parametrize(
    "change", [{"kept": "2"}, {"dropped": [1]}, {"files": {"x": 1}}, {"rows_in": True}, {"models": {}}]
)
def test_a_manifest_with_other_types_is_named(out, change):
    path = out / "shards" / "a-00000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorruptShardError, match=r"a-00000\.json"):
        read_manifests(out)


def test_the_manifest_of_another_shard_is_named(out):
    (out / "shards" / "a-00000.json").write_bytes((out / "shards" / "b-00000.json").read_bytes())
    with pytest.raises(CorruptShardError, match=r"a-00000\.json: it is the manifest of b-00000"):
        read_manifests(out)


def test_a_folder_without_shards_is_the_users_mistake(tmp_path):
    with pytest.raises(OutputError, match="holds no dataset"):
        funnel(tmp_path)


def test_an_empty_dataset_has_an_empty_funnel(tmp_path):
    counted = funnel(fake.write(tmp_path, {}))
    assert (counted.rows_in, counted.kept, counted.share(0)) == (0, 0, 0.0)


def test_counts_hold_every_reason_and_refuse_unknown_verdicts():
    verdicts = pa.chunked_array([["kept", "no_face"], ["kept"]], pa.string())
    assert counts(verdicts, ["no_face", "unsafe"]) == (2, {"no_face": 1, "unsafe": 0})
    with pytest.raises(ContractError, match="no_face"):
        counts(verdicts, ["unsafe"])
    with pytest.raises(ContractError, match="None"):
        counts(pa.chunked_array([[None]], pa.string()), ["unsafe"])


def test_the_summary_adds_up_manifests(out):
    told = summary(read_manifests(out))
    assert (told["shards"], told["rows_in"], told["kept"]) == (["a-00000", "a-00001", "b-00000"], 13, 4)
    assert told["dropped"]["unsafe"] == 2
    assert told["dropped"]["timeout"] == 0


def test_the_table_reads_in_a_log(out):
    stream = io.StringIO()
    Console(file=stream, width=60, force_terminal=False).print(funnel_table(funnel(out)))
    text = stream.getvalue()
    assert text.isascii()
    assert "|   - small_face  |       2 |  15.4 |" in text
    assert "| kept            |       4 |  30.8 |" in text


def test_manifests_of_a_store_are_asked_for_several_at_a_time(published, monkeypatch):
    """One after the other, 10,000 of them took status five minutes, at 30 ms each."""
    store, together = to_path(f"memory:/{published}"), threading.Barrier(3)
    fsspec.filesystem("memory").put(f"{published}/", f"{published}/", recursive=True)
    read = RemotePath.read_bytes

    def waiting(self):
        together.wait(10)  # for the other two
        return read(self)

    monkeypatch.setattr(RemotePath, "read_bytes", waiting)
    assert read_manifests(store) == read_manifests(published)


def test_a_report_reads_each_ledger_once_for_all_that_it_counts_and_says_how_far_it_is(out, monkeypatch):
    read, parquet = [], ledger_module.parquet
    monkeypatch.setattr(ledger_module, "parquet", lambda path: read.append(path.name) or parquet(path))
    stream, tables = io.StringIO(), []
    counted = funnel(out, ["url"], tables.append, Console(file=stream, force_terminal=False))
    assert sorted(read) == ["a-00000.parquet", "a-00001.parquet", "b-00000.parquet"]
    assert [table.num_rows for table in tables] == [counted.rows_in], "small ledgers are counted together"
    assert {"url", "stage", "verdict"} <= {*tables[0].column_names}
    assert "3 of 3 ledgers" in stream.getvalue()


def test_stages_that_are_off_are_no_lines_of_the_table(out):
    counted = funnel(out)
    assert {row.stage for row in counted.rows if not row.works} == {"screen", "encode", "caption"}
    stream = io.StringIO()
    Console(file=stream, width=60).print(funnel_table(counted))
    assert not {"screen", "encode", "caption"} & {*stream.getvalue().replace("|", " ").split()}
    (out / "dataset.json").unlink()
    assert all(row.works for row in funnel(out).rows), "nobody knows"
