"""A map of tiles as a self-contained SVG, in the style of the other pictures."""

from __future__ import annotations

import numpy as np

from attnc.runtime.pictures.svg import ticks
from attnc.runtime.pictures.svg_parts import MARGIN, SIDE, boxes_path, label, opening, px, shortened
from attnc.runtime.pictures.tile_map import TileMap, TileView

_AXIS, _GAP, _TOP = 46, 80, 138
_LEVELS = 4
"""The number of shades of a square, by the share of its tiles that are live."""
_THIN = 28
"""The minimum number of pixels of the shorter side."""
_LEAST = 14
"""The minimum number of pixels between labels."""
_CAPTION = 40
"""The number of pixels by which captions may be wider than a view."""
_LETTER = 6.8
"""The width in pixels of a letter of the line under the title."""


def tile_map_svg(tile_map: TileMap) -> str:
    """Return the SVG text; equal maps give equal texts."""
    longest = max(tile_map.n_q, tile_map.n_k, 1)
    view_width, view_height = (max(SIDE * n / longest, _THIN) for n in (tile_map.n_k, tile_map.n_q))
    lefts = [MARGIN + _AXIS + i * (SIDE + _AXIS + _GAP) for i in range(len(tile_map.views))]
    width = lefts[-1] + SIDE + _CAPTION + MARGIN
    notes_top = _TOP + view_height + 78
    height = notes_top + 18 * len(tile_map.notes)
    sizes = f"{tile_map.size_text}{'  ·  ' + tile_map.subtitle if tile_map.subtitle else ''}"
    description = "; ".join([tile_map.size_text, *(f"{view.order}: {view.tiles_text}" for view in tile_map.views)])
    parts = [
        *opening(tile_map.title, description, width, height),
        label(MARGIN, 42, tile_map.title, "ink", 20, weight=650),
        label(MARGIN, 64, shortened(sizes, int((width - 2 * MARGIN) / _LETTER)), "soft", 13),
        *_legend(lefts[0], _TOP + view_height + 34),
    ]
    for i, (view, left) in enumerate(zip(tile_map.views, lefts, strict=True)):
        parts += _view(tile_map, view, f"attnc-view-{i}", left, view_width, view_height)
    parts += [label(MARGIN, notes_top + 18 * i, note, "soft", 12) for i, note in enumerate(tile_map.notes)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _view(
    tile_map: TileMap, view: TileView, name: str, left: float, view_width: float, view_height: float
) -> list[str]:
    live, full = view.shares()
    order = "tokens in natural order" if view.order.kind == "natural" else str(view.order)
    parts = [
        label(left, _TOP - 46, order[0].upper() + order[1:], "ink", 14, weight=600),
        label(left, _TOP - 28, _square(view), "soft", 12),
        f'<rect class="field" x="{px(left)}" y="{_TOP}" width="{px(view_width)}" height="{px(view_height)}"/>',
    ]
    # Squares at the edges are drawn whole and clipped.
    parts.append(
        f'<clipPath id="{name}"><rect x="{px(left)}" y="{_TOP}" width="{px(view_width)}" '
        f'height="{px(view_height)}"/></clipPath>'
    )
    rows, columns = (side / view.factor for side in view.states.shape)
    transform = f"translate({px(left)} {_TOP}) scale({view_width / columns:.5g} {view_height / rows:.5g})"
    levels = np.ceil(live * _LEVELS).astype(np.int64)
    parts.append(f'<g clip-path="url(#{name})">')
    for kind, cells in (("full", full >= live), ("partial", full < live)):
        for level in range(1, _LEVELS + 1):
            path = boxes_path((levels == level) & cells)
            if path:
                paint = f'class="{kind}"' + ("" if level == _LEVELS else f' opacity="{px(level / _LEVELS)}"')
                parts.append(f'<path {paint} shape-rendering="crispEdges" transform="{transform}" d="{path}"/>')
    caption = label(left, _TOP + view_height + 20, view.tiles_text, "ink", 12)
    return [*parts, "</g>", *_marks(tile_map, left, view_width, view_height), caption]


def _square(view: TileView) -> str:
    """Return the caption for a square."""
    if view.factor == 1:
        return f"each square: a tile of {view.tile:,} × {view.tile:,} pairs"
    return (
        f"each square: {view.factor} × {view.factor} tiles of {view.tile:,} × {view.tile:,}, paler where few are live"
    )


def _legend(left: float, top: float) -> list[str]:
    parts = []
    for i, kind in enumerate(("full", "partial")):
        x = left + 60 * i
        parts.append(f'<rect class="{kind}" x="{px(x)}" y="{px(top)}" width="12" height="12" rx="2"/>')
        parts.append(label(x + 18, top + 10.5, kind, "ink", 12))
    return parts


def _marks(tile_map: TileMap, left: float, view_width: float, view_height: float) -> list[str]:
    """Return labels of positions on both axes."""
    parts = []
    for tick in ticks(tile_map.n_k)[1:]:
        x = left + tick * view_width / tile_map.n_k
        parts.append(label(x, _TOP - 8, f"{tick:,}", "soft", 11, anchor="middle"))
    rows = ticks(tile_map.n_q)[1:]
    for tick in rows if view_height >= _LEAST * (len(rows) + 1) else ():
        y = _TOP + tick * view_height / tile_map.n_q
        parts.append(label(left - 6, y + 4, f"{tick:,}", "soft", 11, anchor="end"))
    return parts
