"""A map of tiles as text for a terminal."""

from __future__ import annotations

from attnc.runtime.pictures.drawing import EMPTY, FULL, PARTIAL, merge_tiles
from attnc.runtime.pictures.text import TILES, TILES_ACROSS
from attnc.runtime.pictures.tile_map import TileMap, TileView
from attnc.runtime.plain import plain


def tile_map_text(found: TileMap, *, unicode: bool = True) -> str:
    """Each order of the tokens, one above the other, with its numbers; no line end at the end."""
    lines = [found.title, " · ".join(part for part in (found.size_text, found.subtitle) if part)]
    for view in found.views:
        lines += ["", *_view(view, unicode)]
    glyphs = TILES[unicode]
    lines += [
        "",
        "  ".join(f"{glyphs[s]} {name}" for s, name in ((FULL, "full"), (PARTIAL, "partial"), (EMPTY, "empty"))),
    ]
    lines += [f"note      {note}" for note in found.notes]
    text = "\n".join(lines)
    return text if unicode else plain(text)


def _view(view: TileView, unicode: bool) -> list[str]:
    factor = 1
    while -(-max(view.states.shape) // factor) > TILES_ACROSS:
        factor *= 2
    each = f"tiles of {view.tile:,} × {view.tile:,} pairs"
    said = each if factor == 1 else f"each square {factor} × {factor} {each}"
    rows = merge_tiles(view.states, factor).tolist()
    glyphs = TILES[unicode]
    return [f"{view.order}: {said}", *("".join(glyphs[state] for state in row) for row in rows), view.tiles_text]
