"""A map of tiles as one stand-alone SVG, in the style of the other pictures."""

from __future__ import annotations

import numpy as np

from attnc.runtime.pictures.svg import ticks
from attnc.runtime.pictures.svg_parts import MARGIN, SIDE, boxes_path, label, opening, px
from attnc.runtime.pictures.tile_map import TileMap, TileView

_AXIS, _GAP, _TOP = 46, 40, 138
_LEVELS = 4
"""Shades of a square by the share of its tiles that are live."""
_THIN = 28
"""Pixels of the shorter side at least."""


def tile_map_svg(found: TileMap) -> str:
    """The SVG text; equal maps give equal texts."""
    longest = max(found.n_q, found.n_k, 1)
    wide, high = (max(SIDE * n / longest, _THIN) for n in (found.n_k, found.n_q))
    lefts = [MARGIN + _AXIS + i * (SIDE + _AXIS + _GAP) for i in range(len(found.views))]
    width = max(lefts[-1] + max(wide, SIDE) + MARGIN, 560)
    under = _TOP + high + 62
    height = under + 18 * len(found.notes)
    said = "; ".join([found.size_text, *(f"{view.order}: {view.tiles_text}" for view in found.views)])
    parts = [
        *opening(found.title, said, width, height),
        label(MARGIN, 42, found.title, "ink", 20, weight=650),
        label(MARGIN, 64, f"{found.size_text}{'  ·  ' + found.subtitle if found.subtitle else ''}", "soft", 13),
    ]
    for view, left in zip(found.views, lefts, strict=True):
        parts += _view(found, view, left, wide, high)
    parts += [label(MARGIN, under + 18 * i, note, "soft", 12) for i, note in enumerate(found.notes)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _view(found: TileMap, view: TileView, left: float, wide: float, high: float) -> list[str]:
    live, full = view.shares()
    order = "tokens as they stand" if view.order.kind == "natural" else str(view.order)
    parts = [
        label(left, _TOP - 46, order[0].upper() + order[1:], "ink", 14, weight=600),
        label(left, _TOP - 28, _square(view), "soft", 12),
        f'<rect class="field" x="{px(left)}" y="{_TOP}" width="{px(wide)}" height="{px(high)}"/>',
    ]
    rows, columns = (side / view.factor for side in view.states.shape)
    at = f"translate({px(left)} {_TOP}) scale({wide / columns:.5g} {high / rows:.5g})"
    levels = np.ceil(live * _LEVELS).astype(np.int64)
    for name, chosen in (("full", full >= live), ("partial", full < live)):
        for level in range(1, _LEVELS + 1):
            path = boxes_path((levels == level) & chosen)
            if path:
                opacity = "" if level == _LEVELS else f' opacity="{px(level / _LEVELS)}"'
                parts.append(
                    f'<path class="{name}"{opacity} shape-rendering="crispEdges" transform="{at}" d="{path}"/>'
                )
    return [*parts, *_marks(found, left, wide, high), label(left, _TOP + high + 20, view.tiles_text, "ink", 12)]


def _square(view: TileView) -> str:
    """What a square is, and its colours."""
    each = f"{view.tile:,} × {view.tile:,} pairs"
    if view.factor == 1:
        return f"each square: a tile of {each}; blue full, yellow partial"
    return f"each square: {view.factor} × {view.factor} tiles of {each}; paler where few are live"


def _marks(found: TileMap, left: float, wide: float, high: float) -> list[str]:
    """Positions on both axes."""
    parts = []
    for tick in ticks(found.n_k)[1:]:
        x = left + tick * wide / found.n_k
        parts.append(label(x, _TOP - 8, f"{tick:,}", "soft", 11, anchor="middle"))
    for tick in ticks(found.n_q)[1:]:
        y = _TOP + tick * high / found.n_q
        parts.append(label(left - 6, y + 4, f"{tick:,}", "soft", 11, anchor="end"))
    return parts
