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


TOPS = "[...document.querySelectorAll('#kept-cards > *')].map((one) => one.offsetTop)"


def drawn_photos(count):
    rng = random.Random(0)
    return [judged_rows.photo(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    made = judged_rows.write(tmp_path_factory.mktemp("judged"), drawn_photos(150))
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
    photos = [*drawn_photos(150), *[judged_rows.truth(fake.record("a", row)) for row in range(3)]]
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


@pytest.mark.long
def test_sliders_with_fewer_stops_count_as_exactly(visit, tmp_path, monkeypatch):
    out = judged_rows.write(tmp_path / "out", drawn_photos(300))
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


@pytest.mark.long
@pytest.mark.parametrize("window", pages.FURTHER_WINDOWS)
def test_the_page_fits_other_windows_too(visit, dataset, window):
    pages.require_fit(visit, dataset / "report.html", window)


def require_viewer(page):
    """Pictures grow on a click, and arrows go on."""
    page.locator("#kept-cards .zoom").first.click()
    first = page.inner_text("#about")
    assert first.startswith("photo of sample-000000000")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#about").startswith("face of sample-000000000")
    page.click("#before")
    assert page.inner_text("#about") == first
    page.keyboard.press("Escape")
    assert not page.is_visible("#viewer")


def test_on_a_wide_screen_sliders_chips_and_order_are_used_and_all_has_a_name(visit, dataset, tmp_path):
    page = pages.require_fit(visit, dataset / "report.html", (1400, "light"))
    examples = page.evaluate(TOPS)
    assert (len(examples), len({*examples}) > 1) == (9, True)

    require_viewer(page)

    # a slider by keyboard changes counts, photos and the file
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

    # drops are filtered by reason, and samples ordered by a measurement
    page.locator("#chips [data-reason=small_face]").click()
    assert page.locator("section.reason:visible").count() == 1
    page.locator("#chips [data-reason='']").click()
    assert page.locator("section.reason:visible").count() > 5
    page.select_option("#order", "face_px")
    sizes = [float(size) for size in re.findall(r"face (\d+) px", page.inner_text("#kept-cards"))]
    assert len(sizes) == 9
    assert sizes == sorted(sizes, reverse=True)

    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.long
def test_on_a_phone_examples_stand_side_by_side_and_links_lead_to_their_section(visit, dataset):
    page = pages.require_fit(visit, dataset / "report.html", (390, "dark"))
    examples = page.evaluate(TOPS)
    assert (len(examples), len({*examples})) == (9, 1)
    page.click("a[href='#drops']")  # whatever pictures come before it
    page.wait_for_function(
        "() => Math.abs(document.getElementById('drops').getBoundingClientRect().top) < 100", timeout=5000
    )
    require_viewer(page)


@pytest.mark.long
def test_without_javascript_nothing_is_shown_that_does_nothing(browser, tmp_path):
    write_report(fake.write(tmp_path, {"a-00000": fake.mixed("a")}))
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert "need JavaScript" in page.inner_text("body")
    assert [one for one in ("input", "select", ".mark", "#chips") if page.locator(f"{one}:visible").count()] == []
    context.close()
