"""`plan --sample`: what is drawn, and what follows from it; planted rows, and real runs of the bundled sample."""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import fake_dataset as fake
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from servers import jpeg
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset import forecast as forecasting
from pipeline.dataset.estimate import count, total
from pipeline.dataset.forecast import Clock, Sampled, counted, extrapolated
from pipeline.dataset.job import Job
from pipeline.dataset.out.forgotten import Forgotten, load, save
from pipeline.dataset.out.ledger import funnel
from pipeline.dataset.out.output import Output, ShardWriter
from pipeline.dataset.rows import WITNESS_SCHEMA, Rows, split_seeds, tombstones
from pipeline.dataset.source.parts import Part
from pipeline.dataset.source.seeds import Draw, Seeds
from schemas.columns import SEED, schema
from schemas.errors import ExitCode, UserError, WeightsError
from schemas.names import sample_key, shard_name
from schemas.shard import SUFFIXES

DRAWN = 250
ROWS_PER_SHARD, BATCH = 400, 12
START_S, WAIT_S = 7.0, 2.0
QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Planted(Job):
    """Parts of which the fate of each row is known."""

    seeds: tuple[Seeds, ...]
    fate: dict[str, tuple[bool, int, float, int]]
    """Key -> kept, bytes fetched, seconds, bytes of the sample."""

    def shards(self) -> Iterator[Seeds]:
        return iter(self.seeds)

    def made(self, out: Path, shards: Iterable[Seeds]) -> Clock:
        """Publish shards, as a run would have done in the time that the clock shows."""
        output, clock = Output(out), Clock(begun=0.0, last=START_S)
        for folder in (output.shards, output.drops):
            folder.mkdir(parents=True)
        columns = schema((*SEED, "n_bytes", *SUFFIXES.values()))
        for seeds in shards:
            split = split_seeds(seeds.table)
            rows = [row | {"n_bytes": self.fate[row["key"]][1] or None} for row in split.alive.to_pylist()]
            kept = [row | {"json": bytes(self.fate[row["key"]][3])} for row in rows if self.fate[row["key"]][0]]
            fallen = pa.Table.from_pylist([row for row in rows if not self.fate[row["key"]][0]], schema=columns)
            reasons = ["not_found" if size is None else "no_face" for size in fallen["n_bytes"].to_pylist()]
            dead = tombstones(fallen, pa.array(reasons, pa.string()), "detect")
            with ShardWriter(output, seeds.name, self.plan) as writer:
                writer.add_tombstones(split.dead)
                writer.add(Rows(pa.Table.from_pylist(kept, schema=columns), dead, WITNESS_SCHEMA.empty_table()))
                writer.publish(seeds.table.num_rows)
            for start in range(0, len(rows), BATCH):
                batch, waited = rows[start : start + BATCH], 0.0 if start else WAIT_S
                clock.last += waited + sum(self.fate[row["key"]][2] for row in batch)
                clock.batches.append((clock.last, len(batch), waited))
        output.describe(self.plan, {})
        clock.ended = clock.last
        return clock


def planted(seed: int) -> Planted:
    """Twelve parts, each a world of its own in size, yield, lengths of files and pace."""
    dice, shards, fate = np.random.default_rng(seed), [], {}
    for number, size in enumerate(np.maximum(1, 5000 * dice.dirichlet(np.full(12, 0.6))).astype(int).tolist()):
        part = f"p{number}"
        passes, alive, good = dice.beta(1, 1), dice.uniform(0.2, 0.95), dice.beta(0.4, 2)
        file, sample, pace = np.exp(dice.normal(0, (0.7, 0.3, 0.5)))
        kept = (dice.random(size) < good) & (dice.random(size) < alive)
        whole = kept | (dice.random(size) < alive)
        n_bytes = (3e5 * file * np.exp(dice.normal(0, 1, size)) * whole).astype(int)
        seconds = pace * np.where(kept, 0.5, np.where(whole, 0.05, 0.003)) * np.exp(dice.normal(0, 0.5, size))
        lengths = (5e3 * sample * np.exp(dice.normal(0, 0.3, size))).astype(int)
        small = dice.random(size) > passes
        keys = [sample_key(part, row) for row in range(size)]
        fate |= dict(zip(keys, zip(*(x.tolist() for x in (kept, n_bytes, seconds, lengths)), strict=True), strict=True))
        urls = [f"http://h{host}.example/{row}.jpg" for row, host in enumerate(dice.integers(10**9, size=size))]
        known = {"key": keys, "part": [part] * size, "row": list(range(size)), "url": urls}
        known |= {"verdict": np.where(small, "small_image", None), "stage": np.where(small, "metadata", None)}
        fields = schema((*SEED, "verdict", "stage"))
        table = pa.table([pa.array(known.get(field.name, [None] * size), field.type) for field in fields], fields)
        cuts = [0, *(np.flatnonzero(~small)[ROWS_PER_SHARD - 1 :: ROWS_PER_SHARD] + 1).tolist(), size]
        shards += [
            Seeds(shard_name(part, shard), part, table.slice(start, end - start))
            for shard, (start, end) in enumerate(pairwise(cuts))
        ]
    return Planted(fake.plan(), (), tuple(shards), fate)


@pytest.mark.parametrize("trials", [1, pytest.param(20, marks=pytest.mark.long)])
def test_the_ranges_hold_on_skewed_parts(tmp_path, monkeypatch, trials):
    monkeypatch.setattr("os.fsync", lambda number: None)
    hits = dict.fromkeys(("kept", "bytes_fetched", "bytes_on_disk", "wall_hours"), 0)
    factors = []
    for seed in range(trials):
        job, draw = planted(seed), Draw(DRAWN, seed)
        counts = counted(job, Output(tmp_path / "none"), QUIET, draw)
        part, whole = tmp_path / f"part{seed}", tmp_path / f"whole{seed}"
        clock = job.made(part, Sampled.of(job, draw.rows()).shards())
        result = extrapolated(job, part, counts, draw, clock, is_whole=False)
        clock = job.made(whole, job.shards())
        keys = [key for seeds in job.shards() for key in split_seeds(seeds.table).alive["key"].to_pylist()]
        truth = {
            "kept": funnel(whole).kept,
            "bytes_fetched": sum(job.fate[key][1] for key in keys),
            "bytes_on_disk": sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()),
            "wall_hours": clock.ended / 3600,
        }
        for name in truth:
            of = result[name]
            hits[name] += of.low <= truth[name] <= of.high
        factors.append(result["kept"].high / result["kept"].low)
    assert min(hits.values()) >= 0.9 * trials, hits
    assert np.median(factors) < 3  # no range holds by being wide


def test_what_lies_in_tars_is_not_fetched(tmp_path):
    job, draw = planted(1), Draw(50, 1)
    names = dict.fromkeys(seeds.part for seeds in job.shards())
    job = replace(job, parts=tuple(Part(name, f"{name}.tar", None, "tar") for name in names))
    counts = counted(job, Output(tmp_path / "none"), QUIET, draw)
    clock = job.made(tmp_path / "out", Sampled.of(job, draw.rows()).shards())
    result = extrapolated(job, tmp_path / "out", counts, draw, clock, is_whole=False)
    assert result["bytes_fetched"].high == 0 < result["kept"].high


def test_every_row_has_the_same_chance_and_parts_their_share():
    job = planted(5)
    sizes = {}
    for seeds in job.shards():
        sizes[seeds.part] = sizes.get(seeds.part, 0) + seeds.candidates
    for size in (4, 100, 10**6):  # fewer than parts, and more than rows
        drawn = []
        for seed in range(4):
            draw = Draw(size, seed)
            for seeds in job.shards():
                draw.add(seeds)
            drawn.append(draw.rows()["key"].to_pylist())
            assert len(drawn[-1]) == len(set(drawn[-1])) == min(size, sum(sizes.values()))
            shares = {part: sum(key.startswith(f"{part}-") for key in drawn[-1]) for part in sizes}
            fair = {part: min(1, size / sum(sizes.values())) * number for part, number in sizes.items()}
            assert all(abs(shares[part] - fair[part]) < 1 for part in sizes)
        assert draw.rows()["key"].to_pylist() == drawn[-1]
        assert drawn[0] != drawn[1]
    assert len({part for keys in drawn for part in keys}) == sum(sizes.values())


def test_what_was_run_whole_is_no_estimate():
    amounts = np.array([0.0, 3.0, 5.0, 0.0])
    assert (count(2, 4, 4).low, count(2, 4, 4).high) == (2, 2)
    known = total(amounts, 4, 1.0)
    assert known.low == known.estimate == known.high == pytest.approx(8.0)
    assert count(0, 100, 10_000).low == 0
    assert count(0, 100, 10_000).high == pytest.approx(
        10_000 * (1 - 0.1**0.01 / 6**0.01), rel=0.02
    )  # (1 - p)^100 = 1/60
    assert total(np.zeros(100), 10_000, 7.0).high == 7 * count(0, 100, 10_000).high


def forecast_of(*words: str) -> dict:
    """What `plan --json` says of the bundled sample."""
    result = CliRunner().invoke(app, ["plan", "--json", "--set", "download.retries=0", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_plan_says_what_the_metadata_drops(tmp_path):
    urls = [f"http://photos.example/{n}.jpg" for n in range(3)]
    pq.write_table(pa.table({"url": urls, "width": [99, 99, 9999], "height": [99] * 3}), tmp_path / "small.parquet")
    words = ("--shards", str(tmp_path / "small.parquet"), "--profile", "embedded", "--out", str(tmp_path / "out"))
    text = CliRunner().invoke(app, ["plan", *words], catch_exceptions=False).output
    assert "rows: 3, of which 0 pass the metadata filter (dropped: small_image 3)" in text
    assert "Verdict: ready, but no row passes the metadata filter." in text
    assert forecast_of(*words)["dropped"] == {"small_image": 3}


def test_a_sample_is_run_for_real_and_leaves_nothing(tmp_path, monkeypatch, whole, remembered):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    words = ("--out", str(tmp_path / "out"), "--sample", "12", "--cost-per-hour", "2")
    plan = forecast_of(*words)
    assert (plan["rows"], plan["candidates"], plan["is_ready"], plan["prior_not_measured"]) == (29, 22, True, None)
    result = plan["forecast"]
    assert (result["run"], result["is_exact"]) == (12, False)
    assert result["kept"]["low"] <= funnel(whole).kept <= result["kept"]["high"]
    assert 0 < result["wall_hours"]["low"] < result["wall_hours"]["high"]
    assert result["cost"]["estimate"] == pytest.approx(2 * result["wall_hours"]["estimate"])
    assert result["core_hours"] == result["wall_hours"]
    assert {loss["cause"] for loss in result["thresholds"]} >= {
        "filter.min_face_px = 128",
        "filter.min_image_px = 1024",
    }
    assert not list(tmp_path.iterdir())


def test_a_sample_of_several_parts(tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "grey.jpg").write_bytes(jpeg(300))
    words = ("--shards", f"{tmp_path}/a,{tmp_path}/b", "--profile", "embedded", "--executor", "local")
    plan = forecast_of(*words, "--out", str(tmp_path / "out"), "--sample", "1", "--set", "filter.min_image_px=64")
    assert (plan["parts"], plan["forecast"]["run"], plan["forecast"]["kept_of_run"]) == (2, 1, 0)


def test_a_sample_of_all_rows_is_exact(tmp_path, monkeypatch, whole, remembered):
    def made_before(job, folder, *args, **words):
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        return ExitCode.OK

    monkeypatch.setattr(forecasting, "make_dataset", made_before)
    result = forecast_of("--out", str(tmp_path / "out"), "--sample", "1000")["forecast"]
    assert (result["is_exact"], result["run"]) == (True, 22)
    assert result["kept"] == {"estimate": 9, "low": 9, "high": 9}
    causes = {loss["cause"]: loss["rows"] for loss in result["thresholds"]}
    assert causes["filter.min_face_px = 128"] == 1  # tiny-face.jpg
    assert causes["filter.min_image_px = 1024"] == 2  # small.jpg by its metadata, boasting.jpg by its header


def test_of_rows_that_must_all_be_forgotten_nothing_is_forecast(tmp_path, whole, remembered):
    out = shutil.copytree(whole, tmp_path / "out")
    save(out, Forgotten().adding(domains=["sample.localhost"]))
    result = forecast_of("--out", str(out), "--sample", "1000")["forecast"]
    assert (result["run"], result["kept"]["high"], result["bytes_fetched"]["high"]) == (0, 0, 0)
    said = CliRunner().invoke(app, ["plan", "--out", str(out), "--sample", "1000"]).output
    assert "Run for real: all of these, and 0 were kept" in said
    assert "assumes 2.2 MB an image" not in said


def test_an_interrupted_sample_says_so_and_knows_what_out_forgets(tmp_path, monkeypatch):
    out = fake.write(tmp_path / "out", {"a-00000": fake.mixed("a")})
    save(out, Forgotten().adding(domains=["photos.example"]))
    seen = []

    def interrupted(job, folder, *args, **words):
        seen.append((folder, load(folder)))
        raise KeyboardInterrupt

    monkeypatch.setattr(forecasting, "make_dataset", interrupted)
    result = CliRunner().invoke(app, ["plan", "--out", str(out), "--sample", "3"])
    assert result.exit_code == ExitCode.INTERRUPTED
    assert "Interrupted. Nothing was written to OUT." in result.output
    ((folder, forgotten),) = seen
    assert forgotten == load(out)
    assert not folder.exists()


def test_a_sample_needs_the_weights_and_a_plan_says_what_is_a_guess(tmp_path, monkeypatch):
    part = tmp_path / "part.csv"
    part.write_text("URL\nhttp://h.example/a.jpg\n")
    monkeypatch.setenv("FACESHARDS_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["plan", "--shards", str(part), "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, [*words, "--sample", "3"])
    assert isinstance(refused.exception, WeightsError)
    planned = CliRunner().invoke(app, words)
    assert "Prior, not measured" in planned.output
    assert CliRunner().invoke(app, [*words, "--sample", "0"]).exit_code == ExitCode.USER_ERROR
    assert isinstance(CliRunner().invoke(app, [*words, "--cost-per-hour", "2"]).exception, UserError)
