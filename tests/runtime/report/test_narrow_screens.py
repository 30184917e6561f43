"""Reports on a screen of 420 pixels, checked without a browser: texts that wrap, and widths that style rules fix."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from attnc import compile_attention
from attnc.runtime.cli import main
from attnc.runtime.pictures.draw import draw
from attnc.runtime.pictures.svg import to_svg
from attnc.runtime.report.page import asset
from pages import Element, read_page

DEVICES = ("h100", "a100", "b200")
LONG = " or ".join(f"q - k == {n}" for n in range(20))


def report_of(path: Path, *arguments: str) -> Element:
    assert main(["simulate", *arguments, "-o", str(path)]) == 0
    return read_page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def three_devices(tmp_path_factory: pytest.TempPathFactory) -> Element:
    path = tmp_path_factory.mktemp("report") / "a.html"
    return report_of(path, "sliding_window", "-p", "window=64", "--len", "512", "--device", ",".join(DEVICES))


def narrow_rules() -> tuple[str, str]:
    """Return the style sheet without the rules for narrow screens, and these rules."""
    sheet = asset("page.css")
    start = sheet.index("@media (max-width: 560px)")
    end = sheet.index("@media print")
    return sheet[:start] + sheet[end:], sheet[start:end]


def test_rules_wider_than_the_screen_are_overridden() -> None:
    """Each rule with a width above 420 px has a rule for narrow screens that hides the element or drops the width."""
    wide, narrow = narrow_rules()
    rules = dict(re.findall(r"^([^\n{]+?) \{([^}]*)\}", wide, re.MULTILINE))
    fixed = [name for name, text in rules.items() if re.search(r"(?<!max-)\bwidth: [5-9]\d\d|width: \d{4}", text)]
    fixed += [name for name, text in rules.items() if re.search(r"min-width: \d{3,}px", text)]
    fixed = [name for name in dict.fromkeys(fixed) if not name.startswith((".slider", "main"))]
    assert fixed == ["#ladder svg", "#schedule table", "#compared table"]
    assert "#ladder .wide > svg, #compared .wide { display: none; }" in narrow
    assert "#schedule table { min-width: 0; }" in narrow
    assert ".narrow { display: block; }" in narrow and ".narrow { display: none;" in wide
    for name in ("p", "li, dd, td, h2, h3, summary, footer", "h1"):
        assert "overflow-wrap: anywhere" in rules[name]


def test_narrow_screens_list_every_rung_in_words(three_devices: Element) -> None:
    (words,) = [element for element in three_devices.all("dl") if element.attributes.get("class") == "narrow"]
    simulation = compile_attention("sliding_window", window=64).simulate(512)
    assert [element.text for element in words.all("dd")] == [rung.lost_to for rung in simulation.rungs]


def test_narrow_screens_list_every_device(three_devices: Element) -> None:
    (section,) = [
        simulation for simulation in three_devices.all("section") if simulation.attributes["id"] == "compared"
    ]
    text = section.text
    attend = compile_attention("sliding_window", window=64)
    for number, device in enumerate(DEVICES, 1):
        simulation = attend.simulate(512, device=device)
        assert f"{number}: sliding_window(window = 64, sinks = 0) on {simulation.title}" in text
        for rung in simulation.rungs:
            assert rung.lost_to in text
        for choice in simulation.choices:
            assert str(choice) in text


def test_a_long_relation_wraps(tmp_path: Path) -> None:
    """The picture cuts the relation at its edge; above the picture the whole relation stands in a line that wraps."""
    path = tmp_path / "long.attn"
    path.write_text(f"pattern long()\n    align start\n    visible {LONG}\n", encoding="utf-8")
    page = report_of(tmp_path / "a.html", str(path), "--len", "128")
    (line,) = [element for element in page.all("p") if element.attributes.get("class") == "code"]
    assert line.text == f"visible {LONG}"
    for n_q, n_k in ((100, 100), (100, 8), (512, 512)):
        root = ElementTree.fromstring(to_svg(draw(compile_attention(path), n_q, n_k)))
        (cut,) = [element for element in root if element.get("class") == "code ink"]
        assert float(cut.get("x", 0)) + 7.5 * len(cut.text or "") <= float(root.get("width", 0))


def test_the_style_sheet_sets_no_fonts_of_pictures() -> None:
    """A rule for `.code` without an element name would apply in pictures, whose lines assume another font size."""
    names = re.findall(r"^([^\n@{]+?) \{[^}]*font-size[^}]*\}", asset("page.css"), re.MULTILINE)
    assert names and not [name for name in names if re.search(r"(^|, )\.(code|ink|soft)\b", name)]


def test_long_texts_stand_outside_charts(tmp_path: Path) -> None:
    page = report_of(tmp_path / "a.html", "neighborhood_2d", "--grid", "16,16", "-p", "window=[5,5]")
    for name in ("tiles-title", "tiles-counts"):
        (element,) = [element for element in page.walk() if element.attributes.get("data-text") == name]
        assert element.tag == "p"


def test_growth_is_written_in_sentences(three_devices: Element) -> None:
    (line,) = [element for element in three_devices.all("p") if element.text.startswith("Growth: ")]
    text = line.text.removeprefix("Growth: ")
    assert text.startswith("The visible pairs grow as O(n·w) with w = 64. The visible pairs of n tokens number 64·n")
    assert text.endswith(".") and ". After n tokens, the next token adds 64 pairs." in text


@pytest.mark.parametrize("spec", ["hybrid_window_linear", "gla"])
def test_patterns_with_states_have_a_page(spec: str, tmp_path: Path) -> None:
    page = report_of(tmp_path / "a.html", spec, "--len", "1k")
    assert [element.attributes["id"] for element in page.all("section")] == [
        *("branches", "derivation", "ladder", "schedule", "notes")
    ]
    text = page.text
    simulation = compile_attention(spec).simulate(1024)
    assert all(rung.lost_to in text for rung in simulation.rungs)
    for line in compile_attention(spec).derivation().splitlines():
        assert line.strip().removeprefix("branch ") in text
    assert not page.all("script")
