"""Parts of the SVG pictures: colours, the opening lines, text, and cells as paths."""

from __future__ import annotations

import re
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from attnc.runtime.pictures.drawing import runs

MARGIN = 36
"""The pixels around a picture."""
SIDE = 320
"""The pixels of the longer side of a view."""

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


def opening(title: str, description: str, width: float, height: float) -> list[str]:
    """Return the first lines of a picture: its size, title and description, colours, and the page."""
    w, h = px(width), px(height)
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" role="img">',
        f"<title>{_clean(title)}</title>",
        f"<desc>{_clean(description)}</desc>",
        f"<style>{_STYLE}\n</style>",
        '<defs><pattern id="attnc-hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect class="partial" width="5" height="5"/>'
        '<path class="hatch" d="M0 0V5" stroke-width="2.4" stroke-opacity=".5"/></pattern></defs>',
        f'<rect class="page" x=".5" y=".5" width="{px(width - 1)}" height="{px(height - 1)}" rx="10"/>',
    ]


def boxes_path(cells: NDArray[np.bool_]) -> str:
    """Return the cells as rectangles: runs in a row, joined with equal runs in the rows below."""
    open_: dict[tuple[int, int], int] = {}
    boxes: list[tuple[int, int, int, int]] = []
    for y in range(len(cells) + 1):
        row_runs = set(runs(cells[y])) if y < len(cells) else set()
        for run in sorted(set(open_) - row_runs):
            start = open_.pop(run)
            boxes.append((start, run[0], run[1], y - start))
        for run in row_runs - set(open_):
            open_[run] = y
    return "".join(_boxes(sorted(boxes)))


def strokes_path(cells: NDArray[np.bool_]) -> str:
    """Return the cells as strokes of one row's width, relative to the last end: shortest where few rows are alike."""
    parts: list[str] = []
    for y, line in enumerate(cells):
        end = 0
        for i, (start, length) in enumerate(runs(line)):
            parts.append(f"m{start - end} 0h{length}" if i else f"M{start} {y}.5h{length}")
            end = start + length
    return "".join(parts)


def _boxes(boxes: list[tuple[int, int, int, int]]) -> list[str]:
    """Return boxes (y, x, width, height) as relative path commands, in as few characters as possible."""
    parts: list[str] = []
    last_x, last_y = 0, 0
    for y, x, width, height in boxes:
        parts.append(f"m{x - last_x} {y - last_y}h{width}v{height}h-{width}z")
        last_x, last_y = x, y
    return parts


_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def label(
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
    """Return a line of text; `beside`: softer words after it, with their font size."""
    extra = "" if anchor == "start" else f' text-anchor="{anchor}"'
    extra += "" if weight == 400 else f' font-weight="{weight}"'
    after = ""
    if beside is not None:
        after = f'<tspan class="soft" font-size="{beside[1]}" font-weight="400" dx="9">{_clean(beside[0])}</tspan>'
    return f'<text class="{style}" x="{px(x)}" y="{px(y)}" font-size="{size}"{extra}>{_clean(text)}{after}</text>'


def shortened(text: str, limit: int) -> str:
    """Return the text, cut off after `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _clean(text: str) -> str:
    return escape(printable(text))


def printable(text: str) -> str:
    """Return the text with characters that XML or UTF-8 cannot represent replaced."""
    return _FORBIDDEN.sub("\ufffd", text)


def px(value: float) -> str:
    """Return a coordinate to a thousandth of a pixel."""
    return f"{value:.3f}".rstrip("0").rstrip(".")
