"""Reports on a screen of 420 pixels, as far as a page says it without a browser: what wraps, what has a fixed width."""

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
    """The style sheet beyond the rules for narrow screens, and these."""
    sheet = asset("page.css")
    start = sheet.index("@media (max-width: 560px)")
    end = sheet.index("@media print")
    return sheet[:start] + sheet[end:], sheet[start:end]


def test_what_is_wider_than_the_screen_is_hidden_or_loses_its_width() -> None:
    """Every rule with a width above 420 px has a rule for narrow screens that takes it back, or scrolls nothing."""
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


def test_the_ladder_is_there_in_words_in_full(three_devices: Element) -> None:
    (words,) = [one for one in three_devices.all("dl") if one.attributes.get("class") == "narrow"]
    simulation = compile_attention("sliding_window", window=64).simulate(512)
    assert [one.text for one in words.all("dd")] == [rung.lost_to for rung in simulation.rungs]


def test_every_device_is_there_in_full(three_devices: Element) -> None:
    (section,) = [one for one in three_devices.all("section") if one.attributes["id"] == "compared"]
    text = section.text
    attend = compile_attention("sliding_window", window=64)
    for number, device in enumerate(DEVICES, 1):
        one = attend.simulate(512, device=device)
        assert f"{number}: sliding_window(window = 64, sinks = 0) on {one.title}" in text
        for rung in one.rungs:
            assert rung.lost_to in text
        for choice in one.choices:
            assert str(choice) in text


def test_a_long_relation_stays_inside(tmp_path: Path) -> None:
    """In the picture it is cut at the picture's edge; above it stands all of it, in a line that wraps."""
    path = tmp_path / "long.attn"
    path.write_text(f"pattern long()\n    align start\n    visible {LONG}\n", encoding="utf-8")
    found = report_of(tmp_path / "a.html", str(path), "--len", "128")
    (line,) = [one for one in found.all("p") if one.attributes.get("class") == "code"]
    assert line.text == f"visible {LONG}"
    for n_q, n_k in ((100, 100), (100, 8), (512, 512)):
        root = ElementTree.fromstring(to_svg(draw(compile_attention(path), n_q, n_k)))
        (cut,) = [one for one in root if one.get("class") == "code ink"]
        assert float(cut.get("x", 0)) + 7.5 * len(cut.text or "") <= float(root.get("width", 0))


def test_the_page_leaves_the_fonts_of_pictures_alone() -> None:
    """A rule for `.code` without its element would hold in pictures too, whose lines are measured in their own size."""
    names = re.findall(r"^([^\n@{]+?) \{[^}]*font-size[^}]*\}", asset("page.css"), re.MULTILINE)
    assert names and not [name for name in names if re.search(r"(^|, )\.(code|ink|soft)\b", name)]


def test_texts_of_any_length_are_no_part_of_a_chart(tmp_path: Path) -> None:
    found = report_of(tmp_path / "a.html", "neighborhood_2d", "--grid", "16,16", "-p", "window=[5,5]")
    for name in ("tiles-title", "tiles-counts"):
        (one,) = [one for one in found.walk() if one.attributes.get("data-text") == name]
        assert one.tag == "p"


def test_growth_in_sentences(three_devices: Element) -> None:
    (line,) = [one for one in three_devices.all("p") if one.text.startswith("Growth: ")]
    text = line.text.removeprefix("Growth: ")
    assert text.startswith("The visible pairs grow as O(n·w) with w = 64. The visible pairs of n tokens number 64·n")
    assert text.endswith(".") and ". After n tokens one more adds 64 pairs." in text


@pytest.mark.parametrize("spec", ["hybrid_window_linear", "gla"])
def test_patterns_with_states_have_a_page(spec: str, tmp_path: Path) -> None:
    found = report_of(tmp_path / "a.html", spec, "--len", "1k")
    assert [one.attributes["id"] for one in found.all("section")] == [
        *("branches", "derivation", "ladder", "schedule", "notes")
    ]
    text = found.text
    simulation = compile_attention(spec).simulate(1024)
    assert all(rung.lost_to in text for rung in simulation.rungs)
    for line in compile_attention(spec).derivation().splitlines():
        assert line.strip().removeprefix("branch ") in text
    assert not found.all("script")
