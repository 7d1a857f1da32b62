"""What documents name is there: tests, benchmarks and files."""

import re
from pathlib import Path

import pytest

from schemas.columns import COLUMNS
from stages.pack import REPEATED

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PROOFS = [ROOT / "docs" / "SECURITY.md", ROOT / "docs" / "reliability.md"]
FILES = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
}


def named(page: Path) -> list[str]:
    """Names of tests, as a regular expression each: `…` stands for what was left out."""
    words = re.findall(r"`([a-z0-9_…]+)`", page.read_text())
    return [word.replace("…", r"\w*") for word in words if word.count("_") > 1 and word not in FILES]


@pytest.mark.parametrize("page", PROOFS, ids=lambda page: page.name)
def test_the_tests_that_prove_promises_exist(page):
    found = named(page)
    assert len(found) > 20
    assert [word for word in found if not any(re.search(word, name) for name in TESTS)] == []
    files = [word for word in re.findall(r"\btest_\w+", page.read_text()) if word not in FILES]
    assert [word for word in files if not any(name.startswith(word) for name in TESTS)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_benchmarks_lead_somewhere(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    if page.is_relative_to(ROOT / "docs"):  # else they would be dead on the site
        assert [link for link in links if not (page.parent / link).resolve().is_relative_to(ROOT / "docs")] == []
    if page.name != "LOG.md":  # it tells what was measured, by what was there on that day
        assert [path for path in re.findall(r"\bbenchmarks/\w+\.py", text) if not (ROOT / path).exists()] == []


def test_each_key_of_a_sample_s_json_is_explained_as_its_column_is():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs/shards.md").read_text(), re.MULTILINE))
    assert {name: rows.get(name) for name in REPEATED} == {name: COLUMNS[name].doc for name in REPEATED}
