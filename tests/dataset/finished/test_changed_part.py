"""A part that was changed after some of its shards were made."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app

pytestmark = pytest.mark.usefixtures("pageless")


@pytest.mark.parametrize(("at", "shard"), [(0, "part-00000"), (3, "part-00002")])
def test_a_part_that_gives_other_rows_than_before_mixes_no_shards(tmp_path, at, shard):
    urls = [f"http://127.0.0.1/{number}.jpg" for number in range(6)]  # refused without a packet
    part, out = tmp_path / "part.parquet", tmp_path / "out"
    words = ["dataset", "--shards", str(part), "--out", str(out), "--profile", "embedded", "--executor", "local"]
    words += ["--set", "source.rows_per_shard=2"]
    pq.write_table(pa.table({"URL": urls}), part)
    assert CliRunner().invoke(app, words).exit_code == 0
    before = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    urls.insert(at, urls[at].replace("http", "https"))  # one more duplicate: all borders behind it move
    pq.write_table(pa.table({"URL": urls}), part)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 3
    assert f"{shard} was made of 2 rows of its part, which gives it 3 now" in done.output
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == before


@pytest.mark.parametrize(("first", "then"), [("made:", ""), ("", "made:")])
def test_a_part_that_was_made_by_a_model_mixes_with_none_of_the_web(tmp_path, first, then):
    part, out = tmp_path / "part.parquet", tmp_path / "out"
    pq.write_table(pa.table({"URL": ["http://127.0.0.1/0.jpg"]}), part)
    words = ["dataset", "--out", str(out), "--profile", "embedded", "--executor", "local", "--shards"]
    assert CliRunner().invoke(app, [*words, f"{first}{part}"]).exit_code == 0
    done = CliRunner().invoke(app, [*words, f"{then}{part}"])
    kinds = [kind.strip(":") or "web" for kind in (first, then)]
    assert done.exit_code == 3
    output = " ".join(done.output.split())
    assert f"was made of {kinds[0]}, its part gives it {kinds[1]} in that row now" in output
    assert "Unless a reason asks for another command, the same one goes on from there." in output
