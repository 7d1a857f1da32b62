"""The trainer's page: curves that stay short, what is said of how a run went, and the page in a browser."""

import json
import os
import re

import cv2
import numpy as np
import pages
import pytest
from accelerate.state import AcceleratorState, GradientState

import pipeline.train.loop as trainer
from pipeline.train.job import Call, prepared
from pipeline.train.run_folder import RunFolder
from pipeline.train.run_page.curves import charts, read_metrics, thinned
from pipeline.train.run_page.run_page import write_page
from schemas.errors import OutputError


def test_a_million_steps_are_few_points_that_hide_no_outlier_and_keep_the_mean():
    steps = np.arange(1.0, 1_000_001)
    values = np.sin(steps / 1e5)
    values[123_456], values[777_777], values[500_000:510_000] = 50, -50, np.nan
    curve = thinned(steps, values)
    assert 200 < len(curve.mean) <= 240
    assert (curve.high.max(), curve.low.min()) == (50, -50)
    assert np.average(curve.mean, weights=curve.lines) == pytest.approx(np.nanmean(values))
    assert (curve.first[1:] > curve.last[:-1]).all()
    assert (curve.first[0], curve.last[-1]) == (1, 1_000_000)
    few = thinned(steps[:7], values[:7])
    assert few.mean.tolist() == few.low.tolist() == values[:7].tolist()


def test_steps_whose_loss_was_not_finite_are_marked_and_a_divergence_gets_a_logarithmic_axis(tmp_path):
    lines = [{"step": n, "lr": 1e-4, "loss": 0.1 * 10 ** max(0, n - 50)} for n in range(1, 56)]
    lines += [{"step": n, "lr": 1e-4, "loss": None} for n in range(56, 81)] + [{"step": 80, "id_similarity": 0.25}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 81, "lo')
    loss, similarity, lr = charts(read_metrics(tmp_path / "metrics.jsonl"), 80)
    assert [words for _, words in loss.ticks] == ["10,000", "1,000", "100", "10", "1", "0.1"]
    assert loss.lost[0][0] == 700
    assert len(loss.spans) == 55
    assert loss.spans[-1][2] == "step 55: 10,000"
    assert similarity.lost == lr.lost == []
    assert lr.about == "0.0001 throughout"
    assert [words for _, words in similarity.ticks][-1] == "0"
    (tmp_path / "metrics.jsonl").write_text(text + "no line\n")
    with pytest.raises(OutputError, match=r"metrics\.jsonl cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_what_two_real_photos_come_to_is_a_line_in_the_curve_of_similarity(tmp_path):
    validated = {"id_similarity": 0.3, "copy_paste_id": 0.5, "id_same_person": 0.6, "id_strangers": -0.1}
    text = "".join(json.dumps({"step": n, "lr": 1, "loss": 1.0, **validated}) + "\n" for n in (1, 2))
    (tmp_path / "metrics.jsonl").write_text(text)
    drawn = {chart.name: chart for chart in charts(read_metrics(tmp_path / "metrics.jsonl"), 2)}
    assert list(drawn) == ["loss", "id_similarity", "copy_paste_id", "lr"]
    (same, words), (strangers, _) = drawn["id_similarity"].levels
    assert words == "two real photos of a person 0.6"
    assert 0 <= same < strangers <= 100, "from the top"
    assert drawn["loss"].levels == []


def trained(dataset, out, steps, resume=False):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    watch = [f"watch.{name}" for name in ("save_every=1", "validate_every=1", "validate_steps=1", "validate_faces=1")]
    pairs = ["adapter.lora_rank=4", *watch]
    call = Call((str(dataset),), "faceid", "tiny", out, pairs=pairs, resume=resume, options={"steps": steps})
    assert trainer.train(prepared(call)) == 0
    return out


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A step, and one more in another turn."""
    out = tmp_path_factory.mktemp("page") / "run"
    return trained(dataset, trained(dataset, out, 1), 2, resume=True)


def copy_of(run, folder, *events):
    """The description of a run with another history."""
    folder.mkdir()
    (folder / "run.json").write_bytes((run / "run.json").read_bytes())
    lines = [json.dumps(dict(zip(("time", "kind", "step", "words"), event, strict=True))) for event in events]
    (folder / "history.jsonl").write_text("".join(f"{line}\n" for line in lines) + '{"torn')
    return RunFolder(folder)


@pytest.mark.parametrize(
    "window",
    [
        (390, "dark"),
        *(pytest.param(window, marks=pytest.mark.long) for window in ((1400, "light"), (1400, "dark"), (390, "light"))),
    ],
)
def test_the_page_fits_its_window_and_everything_has_a_name(visit, run, window):
    pages.require_fit(visit, run / "report.html", window)


def test_the_slider_goes_through_the_steps_and_marks_them_in_the_curves(visit, run):
    page = visit(run / "report.html")
    text = page.inner_text("body")
    assert "faceid on tiny: step 2 of 2" in text
    assert "Finished" in text
    assert re.search(r"resumed at step 1\s.*finished at step 2", text, re.DOTALL)
    assert {"ip-adapter-faceid_sd15.safetensors", "ip-adapter-faceid_sd15.bin"} <= {*text.split()}
    assert page.locator(".chart").first.locator(".mark.resumed").count() == 1
    assert page.inner_text("#chosen") == "2"
    page.focus("#step")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#chosen") == "1"
    assert page.locator(".sheet:visible img").get_attribute("alt") == "Faces by prompts, step 1"
    assert page.locator(".mark.chosen").first.evaluate("(mark) => mark.style.left") == "50%"
    page.locator(".sheet:visible .zoom").press("Enter")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#about") == "Faces by prompts, step 2 (2 of 2)"


@pytest.mark.parametrize(
    ("kind", "words", "shown"),
    [
        ("start", "", "had not ended when the page was written"),
        ("stopped", "", "was stopped at step 30. The same command with"),
        ("failed", "the training diverged", "ended at step 30: the training diverged."),
    ],
)
def test_a_run_that_did_not_finish_says_so(run, tmp_path, kind, words, shown):
    folder = copy_of(run, tmp_path / "other", (1.0, "start", 0, ""), (2.0, kind, 30, words))
    assert shown in re.sub(r"\s+", " ", write_page(folder).read_text())


def test_a_short_run_is_timed_in_seconds_and_told_of_grids_that_it_has_steps_for(run, tmp_path):
    run = copy_of(run, tmp_path / "short", (0, "start", 0, ""))
    (run.root / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0, "seconds": 8.2}\n')
    text = write_page(run).read_text()
    assert "<dt>time</dt><dd>8 s</dd>" in text
    assert "watch.validate_every=1</code>" in text


def test_many_large_grids_make_no_endless_page(run, tmp_path):
    folder = copy_of(run, tmp_path / "many")
    (folder.root / "validation").mkdir()
    noise = cv2.imencode(".png", np.random.default_rng(0).integers(0, 256, (600, 1000, 3), np.uint8))[1].tobytes()
    (tmp_path / "noise").write_bytes(noise)
    for step in range(100, 6100, 100):
        os.link(tmp_path / "noise", folder.root / "validation" / f"step-{step:08d}.png")
    torn = folder.root / "validation" / "step-00000300.png"
    torn.unlink()
    torn.write_bytes(b"torn")
    path = write_page(folder)
    steps = [int(step) for step in re.findall(r'step (\d+)"', path.read_text().replace(",", ""))]
    assert steps == [100, *range(500, 6100, 400), 6000]
    assert path.stat().st_size < 10_000_000
