"""The page of a report in a browser, as somebody uses it; and its counts, which are those of `replay`."""

import json
import random
import re
from collections import Counter

import fake_dataset as fake
import judged_rows
import pages
import pyarrow as pa
import pytest

from pipeline.dataset.finished import report_explorer
from pipeline.dataset.finished.replay import (
    COLUMNS,
    OUTCOMES,
    THRESHOLDS,
    UNJUDGED,
    evidence,
    ledgers,
    other_thresholds,
    replay,
    thresholds,
)
from pipeline.dataset.finished.report import write_report
from stages.settings import FilterSettings

COUNTS = """(settings) => settings.map((stops) => {
  const sliders = Object.keys(stops).map((name) => document.getElementById(`s-${name}`));
  Object.values(stops).forEach((stop, n) => { sliders[n].value = stop; });
  sliders[0].dispatchEvent(new Event("input"));
  const shown = [...document.querySelectorAll("#outcomes tr")].map(({cells}) => [cells[0], cells[2]].map((cell) => cell.textContent));
  return Object.fromEntries(shown.map(([name, count]) => [name, Number(count.replaceAll(",", ""))]).filter(([, count]) => count));
})"""  # noqa: E501


def drawn_photos():
    rng = random.Random(0)
    return [judged_rows.photo(rng) for _ in range(300)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    made = judged_rows.write(tmp_path_factory.mktemp("judged"), drawn_photos())
    write_report(made)
    return made


def explorer_of(out):
    text = (out / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["explorer"]


def settings(out, seed, count):
    """Random stops of all sliders, the run's own often among them, and the thresholds there."""
    rng, known = random.Random(seed), explorer_of(out)["thresholds"]
    for _ in range(count):
        stops = {}
        for one in known:
            own, last = one["stops"].index(one["limit"]), len(one["stops"]) - 1
            near, anywhere = min(max(own + rng.randint(-3, 3), 0), last), rng.randint(0, last)
            stops[one["name"]] = rng.choice(
                [own, own, near, anywhere] if one["off"] is None else [*[own] * 5, anywhere]
            )
        yield stops, FilterSettings(**{one["name"]: one["stops"][stops[one["name"]]] for one in known})


def counted(out, factor):
    """What thresholds make of the rows of all ledgers."""
    rows = evidence(pa.concat_tables(ledgers(out, COLUMNS)))
    return lambda limits: Counter(OUTCOMES[number] for number in rows.judged(limits, factor))


@pytest.fixture
def visit(visit):
    """Opens a report, whose sliders count a moment later."""

    def opened(*where):
        page = visit(*where)
        page.wait_for_function("document.getElementById('kept-now').textContent")
        return page

    return opened


def test_sliders_count_what_replay_and_a_rerun_count(visit, out):
    photos = [*drawn_photos(), *[judged_rows.truth(fake.record("a", row)) for row in range(3)]]
    replayed, chosen = counted(out, judged_rows.FACTOR), [*settings(out, 0, 140)]
    shown = visit(out / "report.html").evaluate(COUNTS, [stops for stops, _ in chosen])
    reasons = set()
    for (_, limits), counts in zip(chosen, shown, strict=True):
        assert counts == replayed(limits)
        rerun = Counter(judged_rows.run(photo, limits)["verdict"] for photo in photos)
        judged = Counter({outcome: count for outcome, count in counts.items() if outcome not in UNJUDGED})
        assert judged <= rerun
        assert (rerun - judged).total() == sum(counts.get(outcome, 0) for outcome in UNJUDGED)
        reasons |= set(counts)
    assert reasons >= {"kept", *UNJUDGED, *THRESHOLDS.values()}
    limits = chosen[-1][1]
    assert replay(out, limits, thresholds(out)[1])[1]["kept"] == replayed(limits)["kept"]


def test_sliders_with_fewer_stops_count_as_exactly(visit, tmp_path, monkeypatch):
    out = judged_rows.write(tmp_path / "out", drawn_photos())
    monkeypatch.setattr(report_explorer, "_MOST_CELLS", 150)
    write_report(out)
    explorer = explorer_of(out)
    assert 50 < explorer["rows"] <= 150
    for one in explorer["thresholds"]:
        assert one["limit"] in one["stops"]
        assert one["off"] in (None, *one["stops"])
        assert len(one["stops"]) >= (16 if one["off"] is None else 1)
    replayed, chosen = counted(out, judged_rows.FACTOR), [*settings(out, 1, 20)]
    shown = visit(out / "report.html").evaluate(COUNTS, [stops for stops, _ in chosen])
    assert shown == [replayed(limits) for _, limits in chosen]


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
    kept = replay(dataset, limits, 0)[1]["kept"]
    assert f"{kept} of 29 kept for certain" in page.inner_text("#kept-now")
    page.click("#reset")
    assert "9 of 29 kept for certain" in page.inner_text("#kept-now")
    assert page.inner_text("#command") == "python -m pipeline replay DIR"


@pytest.mark.parametrize(("width", "is_phone"), [(390, True), (1400, False)])
def test_on_a_phone_examples_stand_side_by_side(visit, dataset, width, is_phone):
    page = visit(dataset / "report.html", width)
    tops = page.evaluate("[...document.querySelectorAll('#kept-cards > *')].map((one) => one.offsetTop)")
    assert len(tops) == 9
    assert (len({*tops}) == 1) == is_phone


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


def test_a_link_leads_to_its_section_whatever_pictures_come_before_it(visit, dataset):
    page = visit(dataset / "report.html", 390)
    page.click("a[href='#drops']")
    page.wait_for_function(
        "() => Math.abs(document.getElementById('drops').getBoundingClientRect().top) < 100", timeout=5000
    )


def test_drops_are_filtered_by_reason_and_samples_ordered_by_a_measurement(visit, dataset):
    page = visit(dataset / "report.html")
    page.locator("#chips [data-reason=small_face]").click()
    assert page.locator("section.reason:visible").count() == 1
    page.locator("#chips [data-reason='']").click()
    assert page.locator("section.reason:visible").count() > 5
    page.select_option("#order", "face_px")
    sizes = [float(size) for size in re.findall(r"face (\d+) px", page.inner_text("#kept-cards"))]
    assert len(sizes) == 9
    assert sizes == sorted(sizes, reverse=True)


def test_without_javascript_nothing_is_shown_that_does_nothing_and_paper_is_white(browser, visit, tmp_path):
    write_report(fake.write(tmp_path, {"a-00000": fake.mixed("a")}))
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert "need JavaScript" in page.inner_text("body")
    assert [one for one in ("input", "select", ".mark", "#chips") if page.locator(f"{one}:visible").count()] == []
    context.close()
    page = visit(tmp_path / "report.html")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
