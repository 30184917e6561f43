"""Pictures: counts are exact however they were computed, and the drawn text and SVG are fixed."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from attnc import ArgumentError, compile_attention
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.api.attention import Attention
from attnc.runtime.pictures.draw import count_mask, count_plan, draw, make_drawing, to_svg, to_text
from attnc.runtime.pictures.drawing import EMPTY, FULL, PARTIAL, Drawing, extents, merge_tiles, percent, runs
from attnc.runtime.pictures.svg import ticks

GOLDEN = Path(__file__).parent


def window() -> Attention:
    return compile_attention("sliding_window", window=6, sinks=1)


def drawing_of(mask: NDArray[np.bool_], cell: int = 1, tile: int = 4) -> Drawing:
    n_q, n_k = mask.shape
    rows, pairs, in_tiles = count_mask(mask, ((1, n_k), (cell, cell), (tile, tile)))
    area = np.outer(extents(n_q, tile), extents(n_k, tile))
    tiles = np.where(in_tiles == area, FULL, np.where(in_tiles == 0, EMPTY, PARTIAL)).astype(np.int8)
    return Drawing("drawn", "", "", n_q, n_k, cell, pairs, tile, tile, tiles, rows[:, 0])


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(1, 1), (3, 5), (8, 8), (1, 100), (100, 1), (64, 64)])
def test_a_mask_is_counted_cell_by_cell(steps: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random((37, 29)) < 0.4
    (counts,) = count_mask(mask, [steps])
    for row in range(counts.shape[0]):
        for column in range(counts.shape[1]):
            q, k = row * steps[0], column * steps[1]
            assert counts[row, column] == mask[q : q + steps[0], k : k + steps[1]].sum()


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("full", {}),
        ("causal", {}),
        ("sliding_window", {"window": 40, "sinks": 3}),
        ("sliding_window", {"window": 300}),
        ("blocked", {"block": 48}),
    ],
)
@pytest.mark.parametrize("size", [(500, 500), (130, 700)])
def test_counts_from_a_plan_equal_counts_from_its_mask(
    name: str, params: dict[str, int], size: tuple[int, int]
) -> None:
    attention = compile_attention(name, **params)  # type: ignore[arg-type]
    plan: Plan = attention.plan(*size)
    steps = [(1, size[1]), (7, 7), (128, 64)]
    wanted = count_mask(attention.mask(*size).numpy(), steps)
    for counted, exact in zip(count_plan(plan, 0, 0, steps), wanted, strict=True):
        assert np.array_equal(counted, exact)


def test_long_drawings_are_exact_and_small() -> None:
    drawing = draw(compile_attention("sliding_window", window=4096), 65536)
    assert drawing.visible == 4096 * 65536 - 4096 * 4095 // 2
    assert (drawing.fewest, drawing.most) == (1, 4096)
    assert drawing.pairs.size <= 256**2
    assert int(drawing.pairs.sum()) == drawing.visible
    assert 0 < drawing.density < 1
    assert len(to_svg(drawing)) < 200_000


# --- the data --------------------------------------------------------------------------------------------------------


def test_counts_of_a_window() -> None:
    drawing = draw(window(), 24)
    assert (drawing.visible, drawing.total) == (147, 576)
    assert drawing.row_counts[:8].tolist() == [1, 2, 3, 4, 5, 6, 7, 7]
    assert drawing.count_tiles(FULL) + drawing.count_tiles(PARTIAL) == drawing.live
    assert drawing.tiles.shape == (6, 6)


def test_missing_inputs_get_an_example_and_a_note() -> None:
    drawing = draw(compile_attention("document"), 12)
    assert drawing.notes == ("doc, an example: 3 documents of 4, 4 and 4 tokens",)
    assert drawing.visible == 3 * 10
    assert draw(compile_attention("prefix_lm"), 16).notes == ("prefix, an example: 4",)


def test_queries_without_keys_are_reported() -> None:
    blind = compile_attention("pattern late\n    visible k + 3 <= q\n")
    assert "3 of 8 queries see no key: their output is 0" in draw(blind, 8).notes


def test_a_parameter_past_the_length_is_reported() -> None:
    assert "window = 4,096 is more than the 24 tokens drawn" in draw(compile_attention("sliding_window"), 24).notes


def test_heads_differ() -> None:
    text = "pattern by_head(window: int[head])\n    visible 0 <= q - k < window\n"
    attention = compile_attention(text, window=[2, 5])
    assert [draw(attention, 8, head=h).most for h in (0, 1)] == [2, 5]
    assert "head 1" in draw(attention, 8, head=1).subtitle


@pytest.mark.parametrize(("n_q", "n_k", "tile"), [(0, 4, None), (4, 0, None), (4, 4, 0), (4096, 4096, 1)])
def test_sizes_that_cannot_be_drawn(n_q: int, n_k: int, tile: int | None) -> None:
    with pytest.raises(ArgumentError):
        make_drawing(window(), n_q, n_k, tile=tile)


def test_percentages_are_exact_at_0_and_100() -> None:
    assert [percent(x) for x in (0.0, 0.5, 1.0)] == ["0 %", "50.00 %", "100 %"]
    assert percent(1e-6) == "0.000100 %"
    assert percent(1 - 1e-9) != "100.00 %"


def test_merged_tiles() -> None:
    tiles = np.array([[2, 2, 0], [2, 2, 0], [1, 0, 2]], dtype=np.int8)
    assert merge_tiles(tiles, 2).tolist() == [[FULL, EMPTY], [PARTIAL, FULL]]


def test_runs() -> None:
    assert runs(np.array([True, True, False, True])) == [(0, 2), (3, 1)]
    assert runs(np.zeros(0, dtype=np.bool_)) == []


@pytest.mark.parametrize("n", [1, 2, 7, 24, 64, 97, 100, 4096, 1_000_000])
def test_ticks_are_few_and_start_at_zero(n: int) -> None:
    positions_of_ticks = ticks(n)
    assert positions_of_ticks[0] == 0 and positions_of_ticks[-1] < n and len(positions_of_ticks) <= 7
    assert len(positions_of_ticks) >= min(n, 3)


# --- SVG -------------------------------------------------------------------------------------------------------------


def words(svg: str) -> str:
    return " ".join("".join(e.itertext()) for e in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"))


def test_svg_is_self_contained_and_labelled() -> None:
    svg = to_svg(draw(window(), 24))
    text = words(svg)
    for label in (
        "sliding_window",
        "window = 6",
        "visible 0 <= q - k < window",
        "Element view",
        "each square: one query–key pair",
        "Tile view",
        "each tile: 4 × 4 pairs",
        "keys →",
        "← queries",
        "per row",
        "full 0",
        "partial 18",
        "empty 18",
        "25.52 %",
        "147 of 576 pairs",
        "1 – 7",
        "align end",
    ):
        assert label in text, label
    for foreign in ("<script", "href", "@import", "url(http", "@font-face"):
        assert foreign not in svg
    assert "prefers-color-scheme: dark" in svg


def test_svg_is_deterministic() -> None:
    assert to_svg(draw(window(), 24)) == to_svg(draw(window(), 24))
    assert window().picture(24) == to_svg(draw(window(), 24))


def test_svg_draws_every_pair_once() -> None:
    """Filling in the paths again gives the mask."""
    mask = np.random.default_rng(1).random((9, 13)) < 0.5
    root = ET.fromstring(to_svg(drawing_of(mask)))
    (path,) = [e for e in root.iter("{http://www.w3.org/2000/svg}path") if e.get("class") == "seen"]
    again = np.zeros_like(mask)
    x = y = 0
    for box in (path.get("d") or "").split("z")[:-1]:
        move, wide, rest = box[1:].replace("v", "h").split("h")[:3]
        dx, dy = map(int, move.split())
        x, y = x + dx, y + dy
        cells = again[y : y + int(rest), x : x + int(wide)]
        assert not cells.any()
        cells[:] = True
    assert np.array_equal(again, mask)


@pytest.mark.parametrize("kind", ["every other", "window", "noise"])
def test_svg_stays_small(kind: str) -> None:
    q, k = np.ogrid[:256, :256]
    masks = {
        "every other": (q >= k) & ((q - k) % 2 == 0),
        "window": (q >= k) & (q - k < 60),
        "noise": np.random.default_rng(0).random((256, 256)) < 0.3,
    }
    assert len(to_svg(drawing_of(masks[kind], tile=32))) < 200_000


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 700), (257, 257)])
def test_svg_of_any_shape_parses(size: tuple[int, int]) -> None:
    ET.fromstring(to_svg(make_drawing(compile_attention("full"), *size)))


def test_svg_escapes() -> None:
    drawing = drawing_of(np.ones((2, 2), dtype=np.bool_))
    odd = Drawing(**{**{f: getattr(drawing, f) for f in drawing.__slots__}, "notes": ("<b>&\x00\x1b[31m",)})
    assert "<b>&" in words(to_svg(odd))


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("golden", "width", "unicode"), [("narrow", 60, True), ("wide", 120, True), ("ascii", 100, False)]
)
def test_text_of_a_window(golden: str, width: int, unicode: bool) -> None:
    text = to_text(draw(window(), 24), width, unicode=unicode) + "\n"
    assert text == (GOLDEN / f"sliding_window_24_{golden}.txt").read_text(encoding="utf-8")


def test_ascii_is_ascii() -> None:
    assert to_text(draw(compile_attention("document"), 300), unicode=False).isascii()


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("n", [1, 5, 64, 1000])
def test_text_keeps_to_the_width(width: int, n: int) -> None:
    lines = to_text(draw(compile_attention("causal"), n), width).splitlines()
    views = lines[4 : next(i for i, line in enumerate(lines) if line.startswith("density"))]
    bodies = [line for line in views if not any(word in line for word in ("view", "queries", "full"))]
    assert max(map(len, bodies)) <= width


def test_color_only_adds_color() -> None:
    import re

    drawing = draw(window(), 24)
    assert re.sub(r"\x1b\[[0-9;]*m", "", to_text(drawing, 80, True)).split() == to_text(drawing, 80, False).split()
    assert "\x1b" not in to_text(drawing, 80, False)


def test_rounding_is_reported() -> None:
    attend = compile_attention("radial", frames=2, per_frame=8, block=4)
    drawing = make_drawing(attend, 16, 16, {})
    assert drawing.relation.startswith("visible q in text or k in text or first_frame_sink")
    assert drawing.relation.endswith("; round, per a = q // block, b = k // block")
