"""A drawing as a self-contained SVG: no script, no font to fetch, readable on light and dark pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.runtime.pictures.drawing import EMPTY, FULL, PARTIAL, Drawing, coarsening, extents, merge_tiles, percent
from attnc.runtime.pictures.svg_parts import MARGIN, SIDE, boxes_path, label, opening, px, shortened, strokes_path

_THIN = 28
"""The minimum number of pixels of the shorter side."""
_AXIS, _STRIP, _GAP = 46, 64, 44
_TOP = 166
_LEVELS = 10
_MOST_TILES = 64
"""The maximum number of tiles drawn along a side; more tiles are merged."""
_LONGEST = 112
"""The maximum number of characters shown of the relation."""
_LETTER = 7.5
"""The width in pixels of a letter of the relation."""


@dataclass(frozen=True, slots=True)
class _MatrixFrame:
    """The position of a matrix: its corner, and the pixels per query and per key."""

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
    """Return the SVG text; equal drawings give equal texts."""
    element = _view(drawing, MARGIN + _AXIS)
    tiles = _view(drawing, element.right + _STRIP + _GAP + _AXIS)
    width = max(tiles.left + SIDE, tiles.right) + MARGIN
    facts_top = element.bottom + 76
    notes = [note for note in (drawing.align_text, *drawing.notes) if note]
    height = facts_top + 42 + 18 * len(notes)
    density = f"{drawing.pairs_text} visible ({percent(drawing.density)})"
    description = f"{drawing.size_text}; {density}; keys per row {drawing.rows_text}"
    parts = [
        *opening(drawing.title, description, width, height),
        *_heading(drawing, int((width - 2 * MARGIN) / _LETTER)),
        *_element_view(drawing, element),
        *_row_strip(drawing, element),
        *_tile_view(drawing, tiles),
        *_facts(drawing, facts_top, tiles),
        *(label(MARGIN, facts_top + 40 + 18 * i, note, "soft", 12) for i, note in enumerate(notes)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _view(drawing: Drawing, left: float) -> _MatrixFrame:
    longest = max(drawing.n_q, drawing.n_k, 1)
    # Whole pixels per pair where there is room, so that squares are square on every screen.
    scale = float(SIDE // longest) if longest <= SIDE // 3 else SIDE / longest
    q = max(scale, _THIN / max(drawing.n_q, 1))
    k = max(scale, _THIN / max(drawing.n_k, 1))
    return _MatrixFrame(left, _TOP, q, k, drawing.n_q, drawing.n_k)


def _heading(drawing: Drawing, room: int) -> list[str]:
    """Return the title, the sizes, and as much of the relation as `room` letters hold."""
    sizes = f"{drawing.size_text}{'  ·  ' + drawing.subtitle if drawing.subtitle else ''}"
    return [
        label(MARGIN, 46, drawing.title, "ink", 22, weight=650),
        label(MARGIN, 69, sizes, "soft", 13),
        label(MARGIN, 91, shortened(drawing.relation, min(room, _LONGEST)), "code ink", 13) if drawing.relation else "",
    ]


# --- the views -------------------------------------------------------------------------------------------------------


def _element_view(drawing: Drawing, view: _MatrixFrame) -> list[str]:
    share = drawing.share
    levels = np.ceil(share * _LEVELS).astype(np.int64)
    scale = f"translate({px(view.left)} {px(view.top)}) scale({px(view.k * drawing.cell)} {px(view.q * drawing.cell)})"
    # Squares at the edges are drawn whole and clipped.
    clip = f'<clipPath id="attnc-edge"><rect width="{px(view.width)}" height="{px(view.height)}" '
    clip += f'x="{px(view.left)}" y="{px(view.top)}"/></clipPath>'
    parts = [*_frame(view, "Element view", drawing.square_text), clip, '<g clip-path="url(#attnc-edge)">']
    for level in np.unique(levels[levels > 0]).tolist():
        opacity = "" if level == _LEVELS else f' opacity="{px(max(level / _LEVELS, 0.2))}"'
        boxes, strokes = boxes_path(levels == level), strokes_path(levels == level)
        style, path = ("seen", boxes) if len(boxes) <= max(len(strokes), 30_000) else ("pen", strokes)
        parts.append(f'<path class="{style}"{opacity} shape-rendering="crispEdges" transform="{scale}" d="{path}"/>')
    return [*parts, *_mesh(view), "</g>"]


def _mesh(view: _MatrixFrame) -> list[str]:
    """Return lines between the squares, if the squares are large enough."""
    if min(view.q, view.k) < 4.5:
        return []
    across = "".join(f"M0 {px(i * view.q)}h{px(view.width)}" for i in range(1, view.n_q))
    down = "".join(f"M{px(i * view.k)} 0v{px(view.height)}" for i in range(1, view.n_k))
    width = ".6" if min(view.q, view.k) < 8 else "1"
    transform = f"translate({px(view.left)} {px(view.top)})"
    return [f'<path class="mesh" stroke-width="{width}" fill="none" transform="{transform}" d="{across}{down}"/>']


def _tile_view(drawing: Drawing, view: _MatrixFrame) -> list[str]:
    factor = coarsening(max(drawing.tiles.shape), _MOST_TILES)
    states = merge_tiles(drawing.tiles, factor)
    tile_text = f"each tile: {drawing.q_tile:,} × {drawing.k_tile:,} pairs"
    caption = (
        tile_text
        if factor == 1
        else f"each square: {factor} × {factor} tiles of {drawing.q_tile:,} × {drawing.k_tile:,}"
    )
    heights = extents(drawing.n_q, drawing.q_tile * factor) * view.q
    widths = extents(drawing.n_k, drawing.k_tile * factor) * view.k
    parts = _frame(view, "Tile view", caption, field=False)
    for state, paint in ((EMPTY, 'class="field"'), (PARTIAL, 'fill="url(#attnc-hatch)"'), (FULL, 'class="full"')):
        path = _tile_path(states == state, view, heights, widths)
        if path:
            parts.append(f'<path {paint} d="{path}"/>')
    return [*parts, *_legend(drawing, view)]


def _tile_path(
    cells: NDArray[np.bool_], view: _MatrixFrame, heights: NDArray[np.floating[Any]], widths: NDArray[np.floating[Any]]
) -> str:
    tops, lefts = np.cumsum(heights) - heights + view.top, np.cumsum(widths) - widths + view.left
    gap = 1.0 if min(heights.max(initial=0), widths.max(initial=0)) >= 8 else 0.25
    return "".join(
        f"M{px(lefts[c] + gap)} {px(tops[r] + gap)}h{px(w)}v{px(h)}h-{px(w)}z"
        for r, c in np.argwhere(cells).tolist()
        for w, h in [(max(widths[c] - 2 * gap, 0.5), max(heights[r] - 2 * gap, 0.5))]
    )


def _legend(drawing: Drawing, view: _MatrixFrame) -> list[str]:
    y, parts = view.bottom + 15, []
    kinds = (
        ("full", FULL, 'class="full"'),
        ("partial", PARTIAL, 'fill="url(#attnc-hatch)"'),
        ("empty", EMPTY, 'class="field"'),
    )
    x = view.left
    for name, state, paint in kinds:
        text = f"{name} {drawing.count_tiles(state):,}"
        parts.append(f'<rect {paint} x="{px(x)}" y="{px(y)}" width="12" height="12" rx="2"/>')
        parts.append(label(x + 18, y + 10.5, text, "ink", 12))
        x += 34 + 6.5 * len(text)
    return parts


def _frame(view: _MatrixFrame, name: str, caption: str, field: bool = True) -> list[str]:
    """Return the heading, axes with ticks, and empty field of a view."""
    parts = [
        label(view.left, _TOP - 43, name, "ink", 14, weight=600, beside=(caption, 12)),
        label(view.left - 8, _TOP - 24, "keys →", "soft", 11, anchor="end"),
        f'<text class="soft" font-size="11" text-anchor="end" transform="translate({px(view.left - 36)} '
        f'{px(view.top)}) rotate(-90)">← queries</text>',
    ]
    if field:
        parts.append(
            f'<rect class="field" x="{px(view.left)}" y="{px(view.top)}" '
            f'width="{px(view.width)}" height="{px(view.height)}"/>'
        )
    marks = []
    for tick in ticks(view.n_k):
        x = view.left + (tick + 0.5) * view.k
        marks.append(f"M{px(x)} {px(view.top - 2)}v-4")
        parts.append(label(x, view.top - 10, f"{tick:,}", "soft", 11, anchor="middle"))
    for tick in ticks(view.n_q):
        y = view.top + (tick + 0.5) * view.q
        marks.append(f"M{px(view.left - 2)} {px(y)}h-4")
        parts.append(label(view.left - 9, y + 4, f"{tick:,}", "soft", 11, anchor="end"))
    return [*parts, f'<path class="line" d="{"".join(marks)}"/>']


def ticks(n: int) -> list[int]:
    """Return positions to label on an axis of n tokens: the step divides n if possible, with at most six stretches."""
    steps = sorted({m * 10**e for m in (1, 2, 5) for e in range(10)} | {1 << e for e in range(32)})
    coarse = [s for s in steps if n <= 6 * s]
    dividing = [s for s in coarse if n % s == 0 and s < n]
    step = dividing[0] if dividing and n // dividing[0] >= 2 else coarse[0]
    return list(range(0, n, step))


def _row_strip(drawing: Drawing, view: _MatrixFrame) -> list[str]:
    """Return bars next to the element view: the number of keys that each query sees."""
    left, room = view.right + 12, _STRIP - 18
    size = drawing.cell
    starts = np.arange(0, drawing.n_q, size)
    largest = max(drawing.most, 1)
    means = np.add.reduceat(drawing.row_counts, starts) / extents(drawing.n_q, size) if drawing.n_q else np.zeros(0)
    path = f"M{px(left)} {px(view.top)}" + "".join(
        f"H{px(left + room * mean / largest)}V{px(view.top + min((i + 1) * size, drawing.n_q) * view.q)}"
        for i, mean in enumerate(means.tolist())
    )
    bottom = view.bottom + 16
    return [
        label(left, view.top - 22, "keys", "soft", 11),
        label(left, view.top - 10, "per row", "soft", 11),
        f'<path class="bar" d="{path}H{px(left)}z"/>',
        f'<path class="line" d="M{px(left)} {px(view.top)}V{px(view.bottom)}" stroke-width="1"/>',
        label(left, bottom, "0", "soft", 11),
        label(left + room, bottom, f"{largest:,}", "soft", 11, anchor="middle"),
        *_element_legend(drawing, view),
    ]


def _element_legend(drawing: Drawing, view: _MatrixFrame) -> list[str]:
    y = view.bottom + 15
    if drawing.cell == 1:
        return [
            f'<rect class="seen" x="{px(view.left)}" y="{px(y)}" width="12" height="12" rx="2"/>',
            label(view.left + 18, y + 10.5, "visible", "ink", 12),
            f'<rect class="field" x="{px(view.left + 78)}" y="{px(y)}" width="12" height="12" rx="2"/>',
            label(view.left + 96, y + 10.5, "hidden", "ink", 12),
        ]
    parts = [label(view.left, y + 10.5, "0 %", "ink", 12)]
    for level in range(_LEVELS + 1):
        x = px(view.left + 30 + 12 * level)
        parts.append(f'<rect class="field" x="{x}" y="{px(y)}" width="12" height="12"/>')
        if level:
            opacity = px(max(level / _LEVELS, 0.2))
            parts.append(f'<rect class="seen" fill-opacity="{opacity}" x="{x}" y="{px(y)}" width="12" height="12"/>')
    return [*parts, label(view.left + 38 + 12 * (_LEVELS + 1), y + 10.5, "100 % visible", "ink", 12)]


def _facts(drawing: Drawing, y: float, tiles: _MatrixFrame) -> list[str]:
    """Return the numbers in large type, each with its meaning next to it."""
    total = drawing.tiles.size
    right = max(tiles.left + SIDE, tiles.right)
    facts = [
        (percent(drawing.density), f"visible: {drawing.pairs_text}"),
        (drawing.rows_text, "keys per row"),
        (percent(drawing.live / max(total, 1)), f"tiles live: {drawing.live:,} of {total:,}"),
    ]
    widths = [12 * len(number) + 9 + 6.4 * len(meaning) for number, meaning in facts]
    room = right - MARGIN
    scale = min(1.0, (room - 48) / sum(widths))
    gap = (room - scale * sum(widths)) / (len(facts) - 1)
    parts = [f'<path class="rule" d="M{MARGIN} {px(y - 26)}H{px(right)}"/>']
    x = float(MARGIN)
    for (number, meaning), fact_width in zip(facts, widths, strict=True):
        beside = (meaning, int(12 * scale))
        parts.append(label(x, y + 8, number, "ink", int(20 * scale), weight=650, beside=beside))
        x += scale * fact_width + gap
    return parts
