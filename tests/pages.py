"""What every page of ours promises, in a browser of any width and colour scheme; for the fixture `visit`."""

from pathlib import Path
from typing import Any

import pytest

_UNNAMED = """() => [...document.querySelectorAll("button, input, select, a, img[src], svg, dialog")].filter((one) => {
  const label = one.labels?.[0]?.textContent || one.getAttribute("aria-label") || one.getAttribute("aria-labelledby");
  return !(label || one.alt || one.textContent.trim() || one.querySelector("img[alt]:not([alt=''])"));
}).map((one) => one.outerHTML.slice(0, 80))"""

FURTHER_WINDOWS = ((1400, "dark"), (390, "light"))
in_every_window = pytest.mark.parametrize(
    "window",
    [*((1400, "light"), (390, "dark")), *(pytest.param(window, marks=pytest.mark.long) for window in FURTHER_WINDOWS)],
)


def require_fit(visit: Any, path: Path, window: tuple[int, str]) -> Any:
    """The page fits its window, has its colours, and a name for everything that is used."""
    width, scheme = window
    page = visit(path, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    assert page.evaluate(_UNNAMED) == []
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(247, 247, 244)"
    assert light == (scheme == "light")
    return page
