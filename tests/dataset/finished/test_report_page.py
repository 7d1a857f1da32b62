"""The page of a report in a browser, as somebody uses it; and its counts, which are those of `replay`."""

import base64
import json
import random
import re

import judged_rows
import numpy as np
import pages
import pytest

from pipeline.dataset.finished.replay import OUTCOMES, other_thresholds, replay, thresholds
from pipeline.dataset.finished.report import write_report
from stages.settings import FilterSettings

LEAST = ("min_image_px", "min_face_px")
VERDICTS = {
    "min_image_px": "small_image",
    "max_pixels": "too_many_pixels",
    "max_second_score": "several_faces",
    "min_face_px": "small_face",
}
COUNTS = """(stops) => {
  for (const [name, stop] of Object.entries(stops)) {
    const slider = document.getElementById(`s-${name}`);
    slider.value = stop;
    slider.dispatchEvent(new Event("input"));
  }
  return [...document.querySelectorAll("#outcomes tr")].map(({cells}) => [cells[0].textContent, cells[2].textContent]);
}"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    rng = random.Random(0)
    made = judged_rows.write(tmp_path_factory.mktemp("judged"), [judged_rows.photo(rng) for _ in range(600)])
    write_report(made)
    return made


@pytest.fixture(scope="module")
def explorer(out):
    text = (out / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["explorer"]


def settings(explorer, seed, count):
    """Random stops of all sliders, the run's own often among them, and the thresholds there."""
    rng = random.Random(seed)
    for _ in range(count):
        stops = {}
        for name, values in explorer["stops"].items():
            own = values.index(explorer["limits"][name])
            stops[name] = rng.choice(
                [own, rng.randrange(len(values)), min(max(own + rng.randint(-3, 3), 0), len(values) - 1)]
            )
        yield stops, FilterSettings(**{name: explorer["stops"][name][stop] for name, stop in stops.items()})


def replayed(out, limits):
    counted = replay(out, limits, thresholds(out)[1])
    return {outcome: count for outcome in OUTCOMES if (count := counted.after(outcome))}


def test_cells_count_at_every_stop_what_replay_counts(out, explorer):
    data, rows = np.frombuffer(base64.b64decode(explorer["cells"]), np.uint8), explorer["rows"]
    *bins, outcomes = data[: 5 * rows].reshape(5, rows)
    counts = data[5 * rows :].view("<u4")
    assert rows < 600
    for stops, limits in settings(explorer, 0, 200):
        verdicts = outcomes.copy()
        if limits.min_face_px / explorer["factor"] >= explorer["seen_px"]:
            verdicts[verdicts == OUTCOMES.index("unsure")] = OUTCOMES.index("no_face")
        for name, column in reversed([*zip(explorer["names"], bins, strict=True)]):
            failed = stops[name] >= column if name in LEAST else stops[name] < column
            verdicts[failed] = OUTCOMES.index(VERDICTS[name])
        sums = np.bincount(verdicts, counts, minlength=len(OUTCOMES)).astype(int).tolist()
        assert {OUTCOMES[n]: count for n, count in enumerate(sums) if count} == replayed(out, limits)


def test_sliders_count_what_replay_counts(visit, out, explorer):
    page = visit(out / "report.html")
    for stops, limits in settings(explorer, 1, 25):
        shown = {name: int(count.replace(",", "")) for name, count in page.evaluate(COUNTS, stops)}
        assert {name: count for name, count in shown.items() if count} == replayed(out, limits)


@pages.in_every_window
def test_the_page_fits_its_window_and_everything_has_a_name(visit, dataset, window):
    pages.require_fit(visit, dataset / "report.html", window)


def test_a_slider_by_keyboard_changes_counts_photos_and_the_file(visit, dataset, tmp_path):
    page = visit(dataset / "report.html")
    assert "9 of 29 kept for certain" in page.inner_text("#kept-now")
    page.focus("#s-min_face_px")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    limit = float(page.inner_text("#o-min_face_px"))
    assert limit > 128
    assert "change sides" in page.inner_text("#border-title")
    assert "kept → small_face" in page.inner_text("#border")
    assert page.locator(".badge:visible").count() > 0
    with page.expect_download() as download:
        page.click("#save")
    path = tmp_path / "thresholds.toml"
    download.value.save_as(path)
    limits = other_thresholds(thresholds(dataset)[0], path, [])
    assert limits == FilterSettings(min_face_px=limit)
    kept = replay(dataset, limits, 0).after("kept")
    assert f"{kept} of 29 kept for certain" in page.inner_text("#kept-now")
    page.click("#reset")
    assert "9 of 29 kept for certain" in page.inner_text("#kept-now")
    assert page.inner_text("#command") == "python -m pipeline replay DIR"


def test_pictures_grow_on_a_click_and_arrows_go_on(visit, dataset):
    page = visit(dataset / "report.html", 390)
    page.locator("#kept-cards .zoom").first.click()
    first = page.inner_text("#about")
    assert first.startswith("photo of sample-000000000")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#about").startswith("face of sample-000000000")
    page.click("#before")
    assert page.inner_text("#about") == first
    page.keyboard.press("Escape")
    assert not page.is_visible("#viewer")


def test_drops_are_filtered_by_reason_and_samples_ordered_by_a_measurement(visit, dataset):
    page = visit(dataset / "report.html")
    page.locator("#chips [data-reason=small_face]").press("Enter")  # a click may miss what moves as pictures come in
    assert page.locator("section.reason:visible").count() == 1
    page.locator("#chips [data-reason='']").press("Enter")
    assert page.locator("section.reason:visible").count() > 5
    page.select_option("#order", "face_px")
    sizes = [float(size) for size in re.findall(r"face (\d+) px", page.inner_text("#kept-cards"))]
    assert len(sizes) == 9
    assert sizes == sorted(sizes, reverse=True)
