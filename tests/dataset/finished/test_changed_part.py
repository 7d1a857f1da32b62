"""A part that was changed after some of its shards were made."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app


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
