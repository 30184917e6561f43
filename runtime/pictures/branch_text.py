"""Branches side by side as text for a terminal."""

from __future__ import annotations

from attnc.runtime.pictures.branch_views import BranchesDrawing, BranchView
from attnc.runtime.pictures.drawing import coarsening, means
from attnc.runtime.pictures.terminal_text import Block, shaded
from attnc.runtime.process.ascii_text import plain

BETWEEN = 3
NARROWEST = 8
"""The minimum number of characters in a line of a view."""


def branches_text(drawing: BranchesDrawing, width: int = 80, *, unicode: bool = True) -> str:
    """Return the views in rows that fit `width` columns, then the words of each; no newline at the end."""
    lines = [drawing.title, " · ".join(part for part in (drawing.size_text, drawing.subtitle) if part)]
    shown = [view for view in drawing.views if view.shares is not None]
    room = max((width - BETWEEN * (len(shown) - 1)) // max(len(shown), 1), min(width, 24), NARROWEST)
    blocks = [_view(view, room, unicode) for view in shown]
    while blocks:
        row = [blocks.pop(0)]
        while blocks and sum(map(_block_width, [*row, blocks[0]])) + BETWEEN * len(row) <= width:
            row.append(blocks.pop(0))
        lines += ["", *_beside(row)]
    for view in drawing.views:
        lines += ["", view.name, *(f"    {line}" for line in view.words)]
    lines += [*([""] if drawing.notes else []), *(f"note      {note}" for note in drawing.notes)]
    text = "\n".join(line.rstrip() for line in lines)
    return text if unicode else plain(text)


def _view(view: BranchView, room: int, unicode: bool) -> Block:
    assert view.shares is not None
    factor = coarsening(view.shares.shape[1], room)
    shares = means(view.shares, factor)
    caption = "visible share" if view.visible is not None else "share left"
    head = [f"{view.name}: {caption}", f"{view.cell * factor:,} key{'' if view.cell * factor == 1 else 's'} per column"]
    return [(len(line), line) for line in [*(line[:room] for line in head), *shaded(shares, 2, unicode)]]


def _block_width(block: Block) -> int:
    return max(n for n, _ in block)


def _beside(blocks: list[Block]) -> list[str]:
    height = max(map(len, blocks))
    columns = []
    for block in blocks:
        block_width = _block_width(block)
        columns.append([line.ljust(block_width) for _, line in block] + [" " * block_width] * (height - len(block)))
    return [(" " * BETWEEN).join(parts) for parts in zip(*columns, strict=True)]
