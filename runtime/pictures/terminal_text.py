"""Pictures as text for a terminal, in half blocks or in plain ASCII."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attnc.runtime.pictures.branch_views import BranchesDrawing, BranchView
from attnc.runtime.pictures.drawing import (
    EMPTY,
    FULL,
    PARTIAL,
    Drawing,
    coarsening,
    extents,
    means,
    merge_tiles,
    percent,
)
from attnc.runtime.pictures.svg import ticks
from attnc.runtime.process.ascii_text import plain

if TYPE_CHECKING:
    from attnc.runtime.pictures.tile_map import TileMap, TileView

_SHADES = {True: " ░▒▓█", False: " .:+#"}
_HALVES = " ▀▄█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
TILES = {True: {EMPTY: "··", PARTIAL: "▒▒", FULL: "██"}, False: {EMPTY: "..", PARTIAL: "++", FULL: "##"}}
_BAR = 8
_BETWEEN = 3
_TALLEST = 48
"""The maximum number of lines of the element view; larger drawings are made coarser."""
TILES_ACROSS = 32
_COLORS = {
    "seen": "\x1b[34m",
    FULL: "\x1b[34m",
    PARTIAL: "\x1b[33m",
    EMPTY: "\x1b[2m",
    "soft": "\x1b[2m",
    "strong": "\x1b[1m",
}
_PLAIN = "\x1b[0m"

Paint = Callable[[object, str], str]


def to_text(drawing: Drawing, width: int = 80, color: bool = False, *, unicode: bool = True) -> str:
    """Return both views, side by side if `width` columns allow it, else one above the other; no newline at the end."""
    paint = _in_color if color else _in_plain
    element = _element_view(drawing, width, unicode, paint)
    tiles = _tile_view(drawing, width, unicode, paint)
    notes = [note for note in (drawing.align_text, *drawing.notes) if note]
    lines = [
        paint("strong", drawing.title),
        " · ".join(part for part in (drawing.size_text, drawing.subtitle) if part),
        *([drawing.relation] if drawing.relation else []),
        "",
        *_beside(element, tiles, width),
        "",
        f"density   {percent(drawing.density)} visible: {drawing.pairs_text}",
        f"rows      {drawing.rows_text} keys per row, first rows {_first_rows(drawing)}",
        f"tiles     {drawing.live:,} of {drawing.tiles.size:,} live: {drawing.count_tiles(FULL):,} full, "
        f"{drawing.count_tiles(PARTIAL):,} partial, {drawing.count_tiles(EMPTY):,} empty",
        *(f"note      {note}" for note in notes),
    ]
    text = "\n".join(line.rstrip() for line in lines)
    return text if unicode else plain(text)


def _first_rows(drawing: Drawing) -> str:
    first = ", ".join(f"{count:,}" for count in drawing.row_counts[:8].tolist())
    return f"{first}, …" if drawing.n_q > 8 else first


def _in_plain(style: object, text: str) -> str:
    return text


def _in_color(style: object, text: str) -> str:
    return f"{_COLORS[style]}{text}{_PLAIN}"


# --- blocks of lines: (cells that they take, the line) ---------------------------------------------------------------

Block = list[tuple[int, str]]


def _beside(left: Block, right: Block, width: int) -> list[str]:
    room = max(n for n, _ in left)
    if room + _BETWEEN + max(n for n, _ in right) > width:
        return [*(line for _, line in left), "", *(line for _, line in right)]
    height = max(len(left), len(right))
    padded = [*left, *[(0, "")] * (height - len(left))]
    right_lines = [*(line for _, line in right), *[""] * (height - len(right))]
    return [
        f"{line}{' ' * (room + _BETWEEN - n)}{right_line}"
        for (n, line), right_line in zip(padded, right_lines, strict=True)
    ]


def _element_view(drawing: Drawing, width: int, unicode: bool, paint: Paint) -> Block:
    margin = _margin(drawing)
    room = max(width - margin - 2 - _BAR, 8)
    rows, columns = drawing.pairs.shape
    factor = max(coarsening(columns, room), coarsening(rows, 2 * _TALLEST))
    cell = drawing.cell * factor
    share = drawing.coarser(factor)
    exact = cell == 1
    tall = 1 if exact and not unicode else 2
    caption = "each square: one query–key pair"
    if not exact:
        caption = (
            f"each character: {cell * tall:,} queries × {cell:,} keys, {_SHADES[unicode].strip()} by the share visible"
        )
    body = _half_blocks(share > 0) if exact and unicode else shaded(share, tall, unicode)
    bars = _bars(drawing, cell * tall, len(body), unicode)
    labels = _row_labels(drawing.n_q, cell * tall, margin)
    lines = _head(drawing, "Element view", caption, cell, 1, share.shape[1], paint)
    gap, title = " " * max(share.shape[1] - lines[1][0] + margin + 1, 1), "keys per row"
    lines[1] = (lines[1][0] + len(gap) + len(title), f"{lines[1][1]}{gap}{paint('soft', title)}")
    for label, row, bar in zip(labels, body, bars, strict=True):
        text = f"{paint('soft', label)} {paint('seen', row)} {paint('soft', bar)}"
        lines.append((len(label) + len(row) + len(bar) + 2, text))
    return lines


def _margin(drawing: Drawing) -> int:
    return max(len(f"{drawing.n_q:,}"), len("queries ↓"))


def _head(drawing: Drawing, name: str, caption: str, cell: int, cell_width: int, columns: int, paint: Paint) -> Block:
    """Return two lines: the caption of the view, and the key axis."""
    margin = _margin(drawing)
    axis = _key_axis(drawing.n_k, cell, cell_width, columns)
    corner = "queries ↓".rjust(margin)
    return [
        (margin + 1 + len(name) + 2 + len(caption), f"{' ' * (margin + 1)}{paint('strong', name)}  {caption}"),
        (margin + 1 + len(axis), paint("soft", f"{corner} {axis}")),
    ]


def _key_axis(n: int, cell: int, cell_width: int, columns: int) -> str:
    """Return labels over their columns, then the name of the axis."""
    line = ""
    for tick in ticks(n):
        column = tick // cell * cell_width
        if not line or column > len(line):
            line = f"{line.ljust(column)}{tick:,}"
    return f"{line} keys →" if len(line) + 7 <= max(columns * cell_width, len(line) + 7) else line


def _row_labels(n: int, step: int, margin: int) -> list[str]:
    labels = [""] * -(-n // step)
    for tick in ticks(n):
        if not labels[tick // step]:
            labels[tick // step] = f"{tick:,}"
    return [label.rjust(margin) for label in labels]


def _half_blocks(cells: NDArray[np.bool_]) -> list[str]:
    """Return the cells with two rows per line."""
    if len(cells) % 2:
        cells = np.vstack([cells, np.zeros((1, cells.shape[1]), dtype=np.bool_)])
    codes = cells[::2] + 2 * cells[1::2]
    return ["".join(_HALVES[code] for code in row) for row in codes.tolist()]


def shaded(share: NDArray[np.float64], tall: int, unicode: bool) -> list[str]:
    """Return lines of `tall` rows each, darker for larger shares; a share above 0 never looks empty."""
    starts = np.arange(0, len(share), tall)
    mean = np.add.reduceat(share, starts, axis=0) / extents(len(share), tall)[:, None]
    shades = _SHADES[unicode]
    return ["".join(shades[level] for level in row) for row in np.ceil(mean * (len(shades) - 1)).astype(int).tolist()]


def _bars(drawing: Drawing, step: int, lines: int, unicode: bool) -> list[str]:
    """Return a bar for each line: the mean number of keys per row."""
    starts = np.arange(0, drawing.n_q, step)
    means = np.add.reduceat(drawing.row_counts, starts) / extents(drawing.n_q, step)
    assert len(means) == lines
    return [_bar(mean / max(drawing.most, 1), unicode) for mean in means.tolist()]


def _bar(share: float, unicode: bool) -> str:
    if not unicode:
        return ("=" * max(round(share * _BAR), 1 if share else 0)).ljust(_BAR)
    eighths = max(round(share * 8 * _BAR), 1 if share else 0)
    bar = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    return bar.ljust(_BAR)


def _tile_view(drawing: Drawing, width: int, unicode: bool, paint: Paint) -> Block:
    margin = _margin(drawing)
    factor = coarsening(max(drawing.tiles.shape), max(min((width - margin - 1) // 2, TILES_ACROSS), 4))
    states = merge_tiles(drawing.tiles, factor)
    glyphs = TILES[unicode]
    tile_text = f"{drawing.q_tile:,} × {drawing.k_tile:,} pairs"
    caption = f"each tile: {tile_text}" if factor == 1 else f"each square: {factor} × {factor} tiles of {tile_text}"
    lines = _head(drawing, "Tile view", caption, drawing.k_tile * factor, 2, states.shape[1], paint)
    labels = _row_labels(drawing.n_q, drawing.q_tile * factor, margin)
    for label, row in zip(labels, states.tolist(), strict=True):
        lines.append((len(label) + 1 + 2 * len(row), f"{paint('soft', label)} {_states(row, glyphs, paint)}"))
    legend = [(FULL, "full"), (PARTIAL, "partial"), (EMPTY, "empty")]
    text = "  ".join(f"{paint(state, glyphs[state])} {word}" for state, word in legend)
    plain = "  ".join(f"{glyphs[state]} {word}" for state, word in legend)
    return [*lines, (0, ""), (margin + 1 + len(plain), f"{' ' * (margin + 1)}{text}")]


def _states(row: Sequence[int], glyphs: dict[int, str], paint: Paint) -> str:
    """Return glyphs, painted run by run."""
    parts, start = [], 0
    for i in range(1, len(row) + 1):
        if i == len(row) or row[i] != row[start]:
            parts.append(paint(row[start], glyphs[row[start]] * (i - start)))
            start = i
    return "".join(parts)


# --- maps of tiles ---------------------------------------------------------------------------------------------------


SHADES = {True: ("░░", "▒▒", "▓▓"), False: ("--", "++", "**")}
"""Squares with up to a third, up to two thirds, and up to all of their tiles live."""


def tile_map_text(tile_map: TileMap, *, unicode: bool = True) -> str:
    """Return each order of the tokens, one above the other, with its numbers; no newline at the end."""
    lines = [tile_map.title, " · ".join(part for part in (tile_map.size_text, tile_map.subtitle) if part)]
    for view in tile_map.views:
        lines += ["", *_map_lines(view, unicode)]
    lines += ["", _map_legend(any(_map_factor(view) > 1 for view in tile_map.views), unicode)]
    lines += [f"note      {note}" for note in tile_map.notes]
    text = "\n".join(lines)
    return text if unicode else plain(text)


def _map_lines(view: TileView, unicode: bool) -> list[str]:
    factor = _map_factor(view)
    tile_text = f"tiles of {view.tile:,} × {view.tile:,} pairs"
    caption = tile_text if factor == 1 else f"each square {factor} × {factor} {tile_text}"
    order = "tokens in natural order" if view.order.kind == "natural" else str(view.order)
    return [f"{order}: {caption}", *_map_rows(view, factor, unicode), view.tiles_text]


def _map_factor(view: TileView) -> int:
    """Return the number of tiles along a side of a character pair, a power of two."""
    return coarsening(max(view.states.shape), TILES_ACROSS)


def _map_rows(view: TileView, factor: int, unicode: bool) -> list[str]:
    """Return the squares; a square of several tiles is darker if more of them are live, as in the SVG."""
    glyphs = TILES[unicode]
    if factor == 1:
        return ["".join(glyphs[state] for state in row) for row in view.states.tolist()]
    live, full = view.shares(factor)
    shades = (glyphs[EMPTY], *SHADES[unicode], glyphs[FULL])
    levels = np.where(full == 1, len(SHADES[unicode]) + 1, np.ceil(live * len(SHADES[unicode]))).astype(int)
    return ["".join(shades[level] for level in row) for row in levels.tolist()]


def _map_legend(merged: bool, unicode: bool) -> str:
    glyphs = TILES[unicode]
    if not merged:
        return "  ".join(f"{glyphs[s]} {name}" for s, name in ((FULL, "full"), (PARTIAL, "partial"), (EMPTY, "empty")))
    thirds = zip(SHADES[unicode], ("up to a third", "up to two thirds", "up to all"), strict=True)
    shades = ", ".join(f"{glyph} {words}" for glyph, words in thirds)
    return f"{glyphs[FULL]} all tiles full; of the tiles are live: {shades}; {glyphs[EMPTY]} none"


# --- branches side by side -------------------------------------------------------------------------------------------


BETWEEN = 3
NARROWEST = 8
"""The minimum number of characters in a line of a view."""


def branches_text(drawing: BranchesDrawing, width: int = 80, *, unicode: bool = True) -> str:
    """Return the views in rows that fit `width` columns, then the words of each; no newline at the end."""
    lines = [drawing.title, " · ".join(part for part in (drawing.size_text, drawing.subtitle) if part)]
    shown = [view for view in drawing.views if view.shares is not None]
    room = max((width - BETWEEN * (len(shown) - 1)) // max(len(shown), 1), min(width, 24), NARROWEST)
    blocks = [_branch_block(view, room, unicode) for view in shown]
    while blocks:
        row = [blocks.pop(0)]
        while blocks and sum(map(_block_width, [*row, blocks[0]])) + BETWEEN * len(row) <= width:
            row.append(blocks.pop(0))
        lines += ["", *_in_a_row(row)]
    for view in drawing.views:
        lines += ["", view.name, *(f"    {line}" for line in view.words)]
    lines += [*([""] if drawing.notes else []), *(f"note      {note}" for note in drawing.notes)]
    text = "\n".join(line.rstrip() for line in lines)
    return text if unicode else plain(text)


def _branch_block(view: BranchView, room: int, unicode: bool) -> Block:
    assert view.shares is not None
    factor = coarsening(view.shares.shape[1], room)
    shares = means(view.shares, factor)
    caption = "visible share" if view.visible is not None else "share left"
    head = [f"{view.name}: {caption}", f"{view.cell * factor:,} key{'' if view.cell * factor == 1 else 's'} per column"]
    return [(len(line), line) for line in [*(line[:room] for line in head), *shaded(shares, 2, unicode)]]


def _block_width(block: Block) -> int:
    return max(n for n, _ in block)


def _in_a_row(blocks: list[Block]) -> list[str]:
    height = max(map(len, blocks))
    columns = []
    for block in blocks:
        block_width = _block_width(block)
        columns.append([line.ljust(block_width) for _, line in block] + [" " * block_width] * (height - len(block)))
    return [(" " * BETWEEN).join(parts) for parts in zip(*columns, strict=True)]
