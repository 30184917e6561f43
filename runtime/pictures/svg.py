"""A drawing as one stand-alone SVG: no script, no font to fetch, readable on light and dark pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from attnc.runtime.pictures.drawing import EMPTY, FULL, PARTIAL, Drawing, extents, merge_tiles, percent, runs

_SIDE = 320
"""Pixels of the longer side of a view."""
_THIN = 28
"""Pixels of the shorter side at least."""
_MARGIN, _AXIS, _STRIP, _GAP = 36, 46, 64, 44
_TOP = 166
_LEVELS = 10
_MOST_TILES = 64
"""Tiles drawn along a side; more are merged."""
_LONGEST = 112
"""Characters of the relation shown."""

_STYLE = """
text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif; }
.code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; }
.page { fill: #ffffff; stroke: #d1d9e0; }
.ink { fill: #1f2328; }
.soft { fill: #59636e; }
.field { fill: #edf0f3; }
.seen, .full { fill: #0b5cad; }
.pen { stroke: #0b5cad; fill: none; }
.partial { fill: #f2b84b; }
.hatch { stroke: #9a6200; }
.bar { fill: #8fa3b5; }
.line { stroke: #59636e; }
.mesh { stroke: #ffffff; }
.rule { stroke: #d1d9e0; }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; stroke: #30363d; }
.ink { fill: #f0f6fc; }
.soft { fill: #9aa4af; }
.field { fill: #202833; }
.seen, .full { fill: #58a6ff; }
.pen { stroke: #58a6ff; fill: none; }
.partial { fill: #d9a13b; }
.hatch { stroke: #5c3d00; }
.bar { fill: #63758a; }
.line { stroke: #9aa4af; }
.mesh { stroke: #0d1117; }
.rule { stroke: #30363d; }
}"""


@dataclass(frozen=True, slots=True)
class _View:
    """Where a matrix stands: its corner, and pixels a query and a key."""

    left: float
    top: float
    q: float
    k: float
    n_q: int
    n_k: int

    @property
    def width(self) -> float:
        return self.n_k * self.k

    @property
    def height(self) -> float:
        return self.n_q * self.q

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height


def to_svg(drawing: Drawing) -> str:
    """The SVG text; equal drawings give equal texts."""
    element = _view(drawing, _MARGIN + _AXIS)
    tiles = _view(drawing, element.right + _STRIP + _GAP + _AXIS)
    width = max(tiles.left + _SIDE, tiles.right) + _MARGIN
    facts = element.bottom + 76
    notes = [note for note in (drawing.align_text, *drawing.notes) if note]
    height = facts + 42 + 18 * len(notes)
    parts = [
        *_opening(drawing, width, height),
        *_heading(drawing),
        *_element_view(drawing, element),
        *_row_strip(drawing, element),
        *_tile_view(drawing, tiles),
        *_facts(drawing, facts, tiles),
        *(_text(_MARGIN, facts + 40 + 18 * i, note, "soft", 12) for i, note in enumerate(notes)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _view(drawing: Drawing, left: float) -> _View:
    longest = max(drawing.n_q, drawing.n_k, 1)
    # Whole pixels a pair where there is room for them: then squares are squares on every screen.
    scale = float(_SIDE // longest) if longest <= _SIDE // 3 else _SIDE / longest
    q = max(scale, _THIN / max(drawing.n_q, 1))
    k = max(scale, _THIN / max(drawing.n_k, 1))
    return _View(left, _TOP, q, k, drawing.n_q, drawing.n_k)


def _opening(drawing: Drawing, width: float, height: float) -> list[str]:
    w, h = _px(width), _px(height)
    density = f"{drawing.pairs_text} visible ({percent(drawing.density)})"
    said = f"{drawing.size_text}; {density}; keys per row {drawing.rows_text}"
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" role="img">',
        f"<title>{_clean(drawing.title)}</title>",
        f"<desc>{_clean(said)}</desc>",
        f"<style>{_STYLE}\n</style>",
        '<defs><pattern id="attnc-hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect class="partial" width="5" height="5"/>'
        '<path class="hatch" d="M0 0V5" stroke-width="2.4" stroke-opacity=".5"/></pattern></defs>',
        f'<rect class="page" x=".5" y=".5" width="{_px(width - 1)}" height="{_px(height - 1)}" rx="10"/>',
    ]


def _heading(drawing: Drawing) -> list[str]:
    sizes = f"{drawing.size_text}{'  ·  ' + drawing.subtitle if drawing.subtitle else ''}"
    return [
        _text(_MARGIN, 46, drawing.title, "ink", 22, weight=650),
        _text(_MARGIN, 69, sizes, "soft", 13),
        _text(_MARGIN, 91, _shortened(drawing.relation, _LONGEST), "code ink", 13) if drawing.relation else "",
    ]


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


# --- the views -------------------------------------------------------------------------------------------------------


def _element_view(drawing: Drawing, view: _View) -> list[str]:
    share = drawing.share
    levels = np.ceil(share * _LEVELS).astype(np.int64)
    scale = (
        f"translate({_px(view.left)} {_px(view.top)}) scale({_px(view.k * drawing.cell)} {_px(view.q * drawing.cell)})"
    )
    # Edge squares are drawn whole and cut off here.
    clip = f'<clipPath id="attnc-edge"><rect width="{_px(view.width)}" height="{_px(view.height)}" '
    clip += f'x="{_px(view.left)}" y="{_px(view.top)}"/></clipPath>'
    parts = [*_frame(view, "Element view", drawing.square_text), clip, '<g clip-path="url(#attnc-edge)">']
    for level in np.unique(levels[levels > 0]).tolist():
        opacity = "" if level == _LEVELS else f' opacity="{_px(max(level / _LEVELS, 0.2))}"'
        boxes, strokes = _path(levels == level), _strokes(levels == level)
        kind, path = ("seen", boxes) if len(boxes) <= max(len(strokes), 30_000) else ("pen", strokes)
        parts.append(f'<path class="{kind}"{opacity} shape-rendering="crispEdges" transform="{scale}" d="{path}"/>')
    return [*parts, *_mesh(view), "</g>"]


def _path(cells: NDArray[np.bool_]) -> str:
    """The cells as rectangles: runs in a row, joined with equal runs in the rows below."""
    open_: dict[tuple[int, int], int] = {}
    boxes: list[tuple[int, int, int, int]] = []
    for y in range(len(cells) + 1):
        here = set(runs(cells[y])) if y < len(cells) else set()
        for run in sorted(set(open_) - here):
            start = open_.pop(run)
            boxes.append((start, run[0], run[1], y - start))
        for run in here - set(open_):
            open_[run] = y
    return "".join(_boxes(sorted(boxes)))


def _strokes(cells: NDArray[np.bool_]) -> str:
    """The cells as strokes one row wide, begun where the last one ended: shortest where few rows are alike."""
    parts: list[str] = []
    for y, line in enumerate(cells):
        at = 0
        for i, (start, length) in enumerate(runs(line)):
            parts.append(f"m{start - at} 0h{length}" if i else f"M{start} {y}.5h{length}")
            at = start + length
    return "".join(parts)


def _boxes(boxes: list[tuple[int, int, int, int]]) -> list[str]:
    """Boxes as (y, x, width, height), each begun where the last one began, in as few characters as that takes."""
    parts: list[str] = []
    at_x, at_y = 0, 0
    for y, x, width, height in boxes:
        parts.append(f"m{x - at_x} {y - at_y}h{width}v{height}h-{width}z")
        at_x, at_y = x, y
    return parts


def _mesh(view: _View) -> list[str]:
    """Lines between the squares, where squares are large enough for them."""
    if min(view.q, view.k) < 4.5:
        return []
    across = "".join(f"M0 {_px(i * view.q)}h{_px(view.width)}" for i in range(1, view.n_q))
    down = "".join(f"M{_px(i * view.k)} 0v{_px(view.height)}" for i in range(1, view.n_k))
    width = ".6" if min(view.q, view.k) < 8 else "1"
    at = f"translate({_px(view.left)} {_px(view.top)})"
    return [f'<path class="mesh" stroke-width="{width}" fill="none" transform="{at}" d="{across}{down}"/>']


def _tile_view(drawing: Drawing, view: _View) -> list[str]:
    factor = 1
    while -(-max(drawing.tiles.shape) // factor) > _MOST_TILES:
        factor *= 2
    states = merge_tiles(drawing.tiles, factor)
    each = f"each tile: {drawing.q_tile:,} × {drawing.k_tile:,} pairs"
    said = each if factor == 1 else f"each square: {factor} × {factor} tiles of {drawing.q_tile:,} × {drawing.k_tile:,}"
    heights = extents(drawing.n_q, drawing.q_tile * factor) * view.q
    widths = extents(drawing.n_k, drawing.k_tile * factor) * view.k
    parts = _frame(view, "Tile view", said, field=False)
    for state, paint in ((EMPTY, 'class="field"'), (PARTIAL, 'fill="url(#attnc-hatch)"'), (FULL, 'class="full"')):
        path = _tile_path(states == state, view, heights, widths)
        if path:
            parts.append(f'<path {paint} d="{path}"/>')
    return [*parts, *_legend(drawing, view)]


def _tile_path(
    chosen: NDArray[np.bool_], view: _View, heights: NDArray[np.floating[Any]], widths: NDArray[np.floating[Any]]
) -> str:
    tops, lefts = np.cumsum(heights) - heights + view.top, np.cumsum(widths) - widths + view.left
    gap = 1.0 if min(heights.max(initial=0), widths.max(initial=0)) >= 8 else 0.25
    return "".join(
        f"M{_px(lefts[c] + gap)} {_px(tops[r] + gap)}h{_px(w)}v{_px(h)}h-{_px(w)}z"
        for r, c in np.argwhere(chosen).tolist()
        for w, h in [(max(widths[c] - 2 * gap, 0.5), max(heights[r] - 2 * gap, 0.5))]
    )


def _legend(drawing: Drawing, view: _View) -> list[str]:
    y, parts = view.bottom + 15, []
    kinds = (
        ("full", FULL, 'class="full"'),
        ("partial", PARTIAL, 'fill="url(#attnc-hatch)"'),
        ("empty", EMPTY, 'class="field"'),
    )
    x = view.left
    for name, state, paint in kinds:
        label = f"{name} {drawing.count_tiles(state):,}"
        parts.append(f'<rect {paint} x="{_px(x)}" y="{_px(y)}" width="12" height="12" rx="2"/>')
        parts.append(_text(x + 18, y + 10.5, label, "ink", 12))
        x += 34 + 6.5 * len(label)
    return parts


def _frame(view: _View, name: str, said: str, field: bool = True) -> list[str]:
    """Heading, axes with ticks, and the empty field of a view."""
    parts = [
        _text(view.left, _TOP - 43, name, "ink", 14, weight=600, beside=(said, 12)),
        _text(view.left - 8, _TOP - 24, "keys →", "soft", 11, anchor="end"),
        f'<text class="soft" font-size="11" text-anchor="end" transform="translate({_px(view.left - 36)} '
        f'{_px(view.top)}) rotate(-90)">← queries</text>',
    ]
    if field:
        parts.append(
            f'<rect class="field" x="{_px(view.left)}" y="{_px(view.top)}" '
            f'width="{_px(view.width)}" height="{_px(view.height)}"/>'
        )
    marks = []
    for tick in ticks(view.n_k):
        x = view.left + (tick + 0.5) * view.k
        marks.append(f"M{_px(x)} {_px(view.top - 2)}v-4")
        parts.append(_text(x, view.top - 10, f"{tick:,}", "soft", 11, anchor="middle"))
    for tick in ticks(view.n_q):
        y = view.top + (tick + 0.5) * view.q
        marks.append(f"M{_px(view.left - 2)} {_px(y)}h-4")
        parts.append(_text(view.left - 9, y + 4, f"{tick:,}", "soft", 11, anchor="end"))
    return [*parts, f'<path class="line" d="{"".join(marks)}"/>']


def ticks(n: int) -> list[int]:
    """Positions to label on an axis of n tokens: a step that divides n, if one does, and at most six stretches."""
    steps = sorted({m * 10**e for m in (1, 2, 5) for e in range(10)} | {1 << e for e in range(32)})
    few = [s for s in steps if n <= 6 * s]
    even = [s for s in few if n % s == 0 and s < n]
    step = even[0] if even and n // even[0] >= 2 else few[0]
    return list(range(0, n, step))


def _row_strip(drawing: Drawing, view: _View) -> list[str]:
    """Bars beside the element view: the keys that each query sees."""
    left, room = view.right + 12, _STRIP - 18
    size = drawing.cell
    starts = np.arange(0, drawing.n_q, size)
    most = max(drawing.most, 1)
    means = np.add.reduceat(drawing.row_counts, starts) / extents(drawing.n_q, size) if drawing.n_q else np.zeros(0)
    path = f"M{_px(left)} {_px(view.top)}" + "".join(
        f"H{_px(left + room * mean / most)}V{_px(view.top + min((i + 1) * size, drawing.n_q) * view.q)}"
        for i, mean in enumerate(means.tolist())
    )
    bottom = view.bottom + 16
    return [
        _text(left, view.top - 22, "keys", "soft", 11),
        _text(left, view.top - 10, "per row", "soft", 11),
        f'<path class="bar" d="{path}H{_px(left)}z"/>',
        f'<path class="line" d="M{_px(left)} {_px(view.top)}V{_px(view.bottom)}" stroke-width="1"/>',
        _text(left, bottom, "0", "soft", 11),
        _text(left + room, bottom, f"{most:,}", "soft", 11, anchor="middle"),
        *_element_legend(drawing, view),
    ]


def _element_legend(drawing: Drawing, view: _View) -> list[str]:
    y = view.bottom + 15
    if drawing.cell == 1:
        return [
            f'<rect class="seen" x="{_px(view.left)}" y="{_px(y)}" width="12" height="12" rx="2"/>',
            _text(view.left + 18, y + 10.5, "visible", "ink", 12),
            f'<rect class="field" x="{_px(view.left + 78)}" y="{_px(y)}" width="12" height="12" rx="2"/>',
            _text(view.left + 96, y + 10.5, "hidden", "ink", 12),
        ]
    parts = [_text(view.left, y + 10.5, "0 %", "ink", 12)]
    for level in range(_LEVELS + 1):
        x = _px(view.left + 30 + 12 * level)
        parts.append(f'<rect class="field" x="{x}" y="{_px(y)}" width="12" height="12"/>')
        if level:
            opacity = _px(max(level / _LEVELS, 0.2))
            parts.append(f'<rect class="seen" fill-opacity="{opacity}" x="{x}" y="{_px(y)}" width="12" height="12"/>')
    return [*parts, _text(view.left + 38 + 12 * (_LEVELS + 1), y + 10.5, "100 % visible", "ink", 12)]


def _facts(drawing: Drawing, y: float, tiles: _View) -> list[str]:
    """The numbers, large, each with its meaning beside it."""
    total = drawing.tiles.size
    right = max(tiles.left + _SIDE, tiles.right)
    facts = [
        (percent(drawing.density), f"visible: {drawing.pairs_text}"),
        (drawing.rows_text, "keys per row"),
        (percent(drawing.live / max(total, 1)), f"tiles live: {drawing.live:,} of {total:,}"),
    ]
    widths = [12 * len(number) + 9 + 6.4 * len(meaning) for number, meaning in facts]
    room = right - _MARGIN
    scale = min(1.0, (room - 48) / sum(widths))
    gap = (room - scale * sum(widths)) / (len(facts) - 1)
    parts = [f'<path class="rule" d="M{_MARGIN} {_px(y - 26)}H{_px(right)}"/>']
    x = float(_MARGIN)
    for (number, meaning), wide in zip(facts, widths, strict=True):
        beside = (meaning, int(12 * scale))
        parts.append(_text(x, y + 8, number, "ink", int(20 * scale), weight=650, beside=beside))
        x += scale * wide + gap
    return parts


# --- text ------------------------------------------------------------------------------------------------------------

_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def _text(
    x: float,
    y: float,
    text: str,
    style: str,
    size: int,
    *,
    anchor: str = "start",
    weight: int = 400,
    beside: tuple[str, int] | None = None,
) -> str:
    """A line of text; `beside`: words after it, softer, with their size."""
    extra = "" if anchor == "start" else f' text-anchor="{anchor}"'
    extra += "" if weight == 400 else f' font-weight="{weight}"'
    after = ""
    if beside is not None:
        after = f'<tspan class="soft" font-size="{beside[1]}" font-weight="400" dx="9">{_clean(beside[0])}</tspan>'
    return f'<text class="{style}" x="{_px(x)}" y="{_px(y)}" font-size="{size}"{extra}>{_clean(text)}{after}</text>'


def _clean(text: str) -> str:
    return escape(printable(text))


def printable(text: str) -> str:
    """The text without characters that XML and UTF-8 have no room for."""
    return _FORBIDDEN.sub("\ufffd", text)


def _px(value: float) -> str:
    """A coordinate, to a thousandth of a pixel."""
    return f"{value:.3f}".rstrip("0").rstrip(".")
