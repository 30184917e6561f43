"""Branches side by side as one stand-alone SVG, in the style of the other pictures."""

from __future__ import annotations

import numpy as np

from attnc.runtime.pictures.branch_views import BranchesDrawing, BranchView
from attnc.runtime.pictures.svg_parts import MARGIN, SIDE, boxes_path, label, opening, px, shortened

ACROSS = 3
"""Views in a row."""
_GAP, _TOP, _LINE = 40, 118, 17
_LEVELS = 10
_LONGEST = 52
"""Characters of a line under a view."""
_FAINTEST = 0.15
"""Opacity of what is visible at all, or left."""


def branches_svg(drawing: BranchesDrawing) -> str:
    """The SVG text; equal drawings give equal texts."""
    rows = [drawing.views[i : i + ACROSS] for i in range(0, len(drawing.views), ACROSS)]
    across = max(map(len, rows), default=1)
    width = 2 * MARGIN + across * SIDE + (across - 1) * _GAP
    heights = [SIDE + 60 + _LINE * max(len(view.words) for view in row) for row in rows]
    notes = _TOP + sum(heights)
    height = notes + 24 + 18 * len(drawing.notes)
    said = "; ".join([drawing.size_text, *(f"{view.name}: {view.words[0]}" for view in drawing.views if view.words)])
    sizes = f"{drawing.size_text}{'  ·  ' + drawing.subtitle if drawing.subtitle else ''}"
    parts = [
        *opening(drawing.title, said, width, height),
        label(MARGIN, 42, drawing.title, "ink", 20, weight=650),
        label(MARGIN, 64, shortened(sizes, int((width - 2 * MARGIN) / 6.8)), "soft", 13),
    ]
    top = float(_TOP)
    for i, (row, high) in enumerate(zip(rows, heights, strict=True)):
        for j, view in enumerate(row):
            parts += _view(view, f"attnc-branch-{i}-{j}", MARGIN + j * (SIDE + _GAP), top)
        top += high
    parts += [label(MARGIN, notes + 18 * i, note, "soft", 12) for i, note in enumerate(drawing.notes)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _view(view: BranchView, name: str, left: float, top: float) -> list[str]:
    kind = "visible pairs" if view.visible is not None else "what is left of a token (column) at each query (row)"
    parts = [
        label(left, top - 10, view.name, "ink", 14, weight=600, beside=(kind, 12)),
        f'<rect class="field" x="{px(left)}" y="{px(top)}" width="{SIDE}" height="{SIDE}"/>',
    ]
    if view.shares is None:
        parts.append(label(left + 12, top + 24, "not drawn", "soft", 12))
    else:
        parts += _matrix(view.shares, name, left, top)
    return [*parts, *_words(view, left, top + SIDE + 22)]


def _matrix(shares: np.ndarray[tuple[int, ...], np.dtype[np.float64]], name: str, left: float, top: float) -> list[str]:
    rows, columns = shares.shape
    levels = np.ceil(shares * _LEVELS).astype(np.int64)
    at = f"translate({px(left)} {px(top)}) scale({SIDE / columns:.6g} {SIDE / rows:.6g})"
    parts = [f'<clipPath id="{name}"><rect x="{px(left)}" y="{px(top)}" width="{SIDE}" height="{SIDE}"/></clipPath>']
    parts.append(f'<g clip-path="url(#{name})">')
    for level in np.unique(levels[levels > 0]).tolist():
        opacity = "" if level >= _LEVELS else f' opacity="{px(max(level / _LEVELS, _FAINTEST))}"'
        path = boxes_path(levels == level)
        parts.append(f'<path class="seen"{opacity} shape-rendering="crispEdges" transform="{at}" d="{path}"/>')
    return [*parts, "</g>"]


def _words(view: BranchView, left: float, top: float) -> list[str]:
    style = "ink" if view.visible is not None else "code ink"
    return [
        f'<g xml:space="preserve">{label(left, top + _LINE * i, shortened(line, _LONGEST), style, 11)}</g>'
        for i, line in enumerate(view.words)
    ]
