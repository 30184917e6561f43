"""Branches side by side as a self-contained SVG, in the style of the other pictures."""

from __future__ import annotations

from textwrap import wrap

import numpy as np

from attnc.runtime.pictures.branch_views import BranchesDrawing, BranchView
from attnc.runtime.pictures.svg_parts import MARGIN, SIDE, boxes_path, label, opening, px

ACROSS = 3
"""The number of views in a row."""
_GAP, _TOP, _LINE = 40, 134, 17
_LEVELS = 10
_WORDS = 11
"""The font size of the lines under a view."""
_CODE, _PROSE = 0.61, 0.55
"""The character width of the widest fonts that the pictures name, as a share of the font size; used to wrap lines."""
_FAINTEST = 0.15
"""The minimum opacity of a cell with a share above 0."""


def branches_svg(drawing: BranchesDrawing) -> str:
    """Return the SVG text; equal drawings give equal texts."""
    rows = [drawing.views[i : i + ACROSS] for i in range(0, len(drawing.views), ACROSS)]
    across = max(map(len, rows), default=1)
    inner = across * SIDE + (across - 1) * _GAP
    width = 2 * MARGIN + inner
    sizes = _lines(f"{drawing.size_text}{'  ·  ' + drawing.subtitle if drawing.subtitle else ''}", inner, 13)
    top = float(_TOP + 18 * (len(sizes) - 1))
    heights = [SIDE + 76 + _LINE * max(len(_words(view)) for view in row) for row in rows]
    below = top - 16 + sum(heights)
    notes = [line for note in drawing.notes for line in _lines(note, inner, 12)]
    height = below + 24 + 18 * len(notes)
    description = "; ".join(
        [drawing.size_text, *(f"{view.name}: {view.words[0]}" for view in drawing.views if view.words)]
    )
    parts = [
        *opening(drawing.title, description, width, height),
        label(MARGIN, 42, drawing.title, "ink", 20, weight=650),
        *(label(MARGIN, 64 + 18 * i, line, "soft", 13) for i, line in enumerate(sizes)),
    ]
    for i, (row, row_height) in enumerate(zip(rows, heights, strict=True)):
        for j, view in enumerate(row):
            parts += _view(view, f"attnc-branch-{i}-{j}", MARGIN + j * (SIDE + _GAP), top)
        top += row_height
    parts += [label(MARGIN, below + 18 * i, line, "soft", 12) for i, line in enumerate(notes)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _lines(text: str, width: float, size: int, em: float = _PROSE) -> list[str]:
    """Wrap a text into lines of `width` pixels; the lines after the first are indented as a continuation."""
    indent = " " * (len(text) - len(text.lstrip()))
    longest = int(width / (size * em))
    return wrap(text, longest, subsequent_indent=f"{indent}  ", break_on_hyphens=False) or [""]


def _view(view: BranchView, name: str, left: float, top: float) -> list[str]:
    caption = (
        "visible pairs" if view.visible is not None else "share of a token (column) that is left at each query (row)"
    )
    parts = [
        label(left, top - 27, view.name, "ink", 14, weight=600),
        label(left, top - 10, caption, "soft", 12),
        f'<rect class="field" x="{px(left)}" y="{px(top)}" width="{SIDE}" height="{SIDE}"/>',
    ]
    if view.shares is None:
        parts.append(label(left + 12, top + 24, "not drawn", "soft", 12))
    else:
        parts += _matrix(view.shares, name, left, top)
    style = "ink" if view.visible is not None else "code ink"
    return [*parts, *(_word(line, left, top + SIDE + 22 + _LINE * i, style) for i, line in enumerate(_words(view)))]


def _matrix(shares: np.ndarray[tuple[int, ...], np.dtype[np.float64]], name: str, left: float, top: float) -> list[str]:
    rows, columns = shares.shape
    levels = np.ceil(shares * _LEVELS).astype(np.int64)
    transform = f"translate({px(left)} {px(top)}) scale({SIDE / columns:.6g} {SIDE / rows:.6g})"
    parts = [f'<clipPath id="{name}"><rect x="{px(left)}" y="{px(top)}" width="{SIDE}" height="{SIDE}"/></clipPath>']
    parts.append(f'<g clip-path="url(#{name})">')
    for level in np.unique(levels[levels > 0]).tolist():
        opacity = "" if level >= _LEVELS else f' opacity="{px(max(level / _LEVELS, _FAINTEST))}"'
        path = boxes_path(levels == level)
        parts.append(f'<path class="seen"{opacity} shape-rendering="crispEdges" transform="{transform}" d="{path}"/>')
    return [*parts, "</g>"]


def _words(view: BranchView) -> list[str]:
    """Return the lines under a view."""
    return [part for line in view.words for part in _lines(line, SIDE, _WORDS, _CODE)]


def _word(line: str, left: float, y: float, style: str) -> str:
    """Return a line under a view; viewers collapse leading spaces, so the indent is part of the position."""
    indent = len(line) - len(line.lstrip())
    return label(left + indent * _CODE * _WORDS, y, line.lstrip(), style, _WORDS)
