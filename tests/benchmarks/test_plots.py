"""Points of a plot stand where their values are."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from plots import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Plot, Series, diagonal, level, quantile, reciprocal

SVG = "{http://www.w3.org/2000/svg}"


def _paths(plot: Plot, style: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(plot.svg())
    return [one for one in root.iter(f"{SVG}path") if one.get("class") == style and one.get("transform")]


def _places(plot: Plot, style: str) -> list[tuple[float, float]]:
    found = []
    for one in _paths(plot, style):
        x, y = re.findall(r"[\d.]+", one.get("transform") or "")
        found.append((float(x), float(y)))
    return [(x, y) for x, y in found if x <= WIDTH - RIGHT]


def test_marks_stand_on_logarithmic_axes() -> None:
    plot = Plot("title", "note", "x", "y", [Series("a", [(1, 1), (10, 100), (100, 10000)])], {})
    (x0, y0), (x1, y1), (x2, y2) = _places(plot, "seen")
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.01) and y1 == pytest.approx((y0 + y2) / 2, abs=0.01)
    assert LEFT <= x0 < x2 <= WIDTH - RIGHT and TOP <= y2 < y0 <= HEIGHT


def test_series_have_marks_of_their_own() -> None:
    series = [Series(name, [(i, i)]) for i, name in enumerate(("a", "b", "c", "d"), 1)]
    root = ElementTree.fromstring(Plot("title", "note", "x", "y", series, {}).svg())
    shapes = {one.get("d") for one in root.iter(f"{SVG}path") if one.get("transform")}
    assert len(shapes) == 4


def test_a_line_that_leaves_the_points_is_not_bent() -> None:
    """The axes hold its ends."""
    line = reciprocal(0.01, 1)
    plot = Plot("title", "note", "x", "y", [Series("a", [(1, 1), (0.1, 2)])], {"1 / density": line})
    assert plot._scales()[1].high >= 100
    assert plot._scales()[0].low <= 0.01


def test_texts_are_escaped() -> None:
    ElementTree.fromstring(Plot("a < b", "c & d", "x", "y", [Series("<e>", [(1, 1)])], {}).svg())


def test_lines_and_quantiles() -> None:
    assert diagonal([3, 1, 2]) == ((1, 1), (3, 3))
    assert level(1, [5, 2]) == ((2, 1), (5, 1))
    assert quantile(list(range(1, 101)), 0.95) == 95
