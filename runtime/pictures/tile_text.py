"""A map of tiles as text for a terminal."""

from __future__ import annotations

import numpy as np

from attnc.runtime.pictures.drawing import EMPTY, FULL, PARTIAL, coarsening
from attnc.runtime.pictures.terminal_text import TILES, TILES_ACROSS
from attnc.runtime.pictures.tile_map import TileMap, TileView
from attnc.runtime.process.ascii_text import plain

SHADES = {True: ("░░", "▒▒", "▓▓"), False: ("--", "++", "**")}
"""Squares with up to a third, up to two thirds, and up to all of their tiles live."""


def tile_map_text(tile_map: TileMap, *, unicode: bool = True) -> str:
    """Return each order of the tokens, one above the other, with its numbers; no newline at the end."""
    lines = [tile_map.title, " · ".join(part for part in (tile_map.size_text, tile_map.subtitle) if part)]
    for view in tile_map.views:
        lines += ["", *_view(view, unicode)]
    lines += ["", _legend(any(_factor(view) > 1 for view in tile_map.views), unicode)]
    lines += [f"note      {note}" for note in tile_map.notes]
    text = "\n".join(lines)
    return text if unicode else plain(text)


def _view(view: TileView, unicode: bool) -> list[str]:
    factor = _factor(view)
    tile_text = f"tiles of {view.tile:,} × {view.tile:,} pairs"
    caption = tile_text if factor == 1 else f"each square {factor} × {factor} {tile_text}"
    order = "tokens in natural order" if view.order.kind == "natural" else str(view.order)
    return [f"{order}: {caption}", *_rows(view, factor, unicode), view.tiles_text]


def _factor(view: TileView) -> int:
    """Return the number of tiles along a side of a character pair, a power of two."""
    return coarsening(max(view.states.shape), TILES_ACROSS)


def _rows(view: TileView, factor: int, unicode: bool) -> list[str]:
    """Return the squares; a square of several tiles is darker if more of them are live, as in the SVG."""
    glyphs = TILES[unicode]
    if factor == 1:
        return ["".join(glyphs[state] for state in row) for row in view.states.tolist()]
    live, full = view.shares(factor)
    shades = (glyphs[EMPTY], *SHADES[unicode], glyphs[FULL])
    levels = np.where(full == 1, len(SHADES[unicode]) + 1, np.ceil(live * len(SHADES[unicode]))).astype(int)
    return ["".join(shades[level] for level in row) for row in levels.tolist()]


def _legend(merged: bool, unicode: bool) -> str:
    glyphs = TILES[unicode]
    if not merged:
        return "  ".join(f"{glyphs[s]} {name}" for s, name in ((FULL, "full"), (PARTIAL, "partial"), (EMPTY, "empty")))
    thirds = zip(SHADES[unicode], ("up to a third", "up to two thirds", "up to all"), strict=True)
    shades = ", ".join(f"{glyph} {words}" for glyph, words in thirds)
    return f"{glyphs[FULL]} all tiles full; of the tiles are live: {shades}; {glyphs[EMPTY]} none"
