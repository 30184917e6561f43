"""Draw pictures of patterns: `draw` collects the data, `to_svg` and `to_text` print it.

Visible pairs are counted exactly, on grids of any step, without an N×N object: a mask directly, a plan from its pieces,
of which those without a mask cost only their outline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.planning.cpu_plan import Mask, Plan, PlanPiece
from attnc.runtime.call.call_errors import ArgumentError, needing_torch
from attnc.runtime.call.example_inputs import Example, example_inputs, head_count
from attnc.runtime.pictures.drawing import EMPTY, FULL, PARTIAL, Drawing, extents
from attnc.runtime.pictures.picture_limits import check_drawn_length
from attnc.runtime.pictures.svg import to_svg
from attnc.runtime.pictures.terminal_text import to_text
from attnc.spec.meaning.parameter_values import shown
from attnc.spec.program import BoundProgram

if TYPE_CHECKING:
    from attnc.runtime.patterns.pattern_analysis import PatternAnalysis

__all__ = ["Drawing", "draw", "make_drawing", "to_svg", "to_text"]

SQUARES = 256
"""The maximum number of squares along a side of the element view."""
TILES = 1024
"""The maximum number of tiles along a side."""
MOST_CHOSEN = 1 << 24
"""The maximum number of pairs in a picture of a selection by content, or of several attentions."""
WIDTH = 16
"""The head dimension of the random vectors of a selection."""
_SMALL = 1 << 20
"""The maximum number of pairs at which the relation itself is counted; for more, the plan is counted."""


_NONE: Mapping[str, object] = {}


def draw(
    attention: PatternAnalysis,
    n_q: int,
    n_k: int | None = None,
    /,
    *,
    head: int = 0,
    **inputs: object,
) -> Drawing:
    """Return the picture of `make_drawing`, with the pattern's inputs as keywords."""
    return make_drawing(attention, n_q, n_q if n_k is None else n_k, inputs, head=head)


def make_drawing(
    attention: PatternAnalysis,
    n_q: int,
    n_k: int,
    inputs: Mapping[str, object] = _NONE,
    *,
    head: int = 0,
    tile: int | None = None,
) -> Drawing:
    """Return the picture of a head, of the first batch entry; counts are exact at any length.

    Inputs that are not given get example values, which the notes name. `tile` is the side of a tile; by default about
    an eighth of the length, at most 128. Raises the errors of a call with these sizes, and ArgumentError for a picture
    of more than 1 GiB.
    """
    tile = tile_side(n_q, n_k, tile)
    bound = attention.bound
    case = drawn_case(attention, n_q, n_k, inputs, head)
    cell = _power_of_two(-(-max(n_q, n_k) // SQUARES))
    rows, pairs, in_tiles = count_pairs(attention, n_q, n_k, case, ((1, n_k), (cell, cell), (tile, tile)))
    blind = int((rows == 0).sum())
    notes = (
        *case.notes,
        *_length_notes(bound, max(n_q, n_k)),
        *((f"{blind:,} of {n_q:,} queries see no key: their output is 0",) if blind else ()),
    )
    return Drawing(
        title=bound.program.name,
        subtitle=subtitle_of(bound, case),
        relation=_relation(bound),
        n_q=n_q,
        n_k=n_k,
        cell=cell,
        pairs=pairs,
        q_tile=tile,
        k_tile=tile,
        tiles=states_of(in_tiles, np.outer(extents(n_q, tile), extents(n_k, tile))),
        row_counts=rows[:, 0],
        align=bound.program.align,
        notes=notes,
    )


@dataclass(frozen=True, slots=True, eq=False)
class DrawnHead:
    """A head of a pattern with its inputs: those given, and example values of the others, which the notes name."""

    head: int
    heads: int
    inputs: Mapping[str, Any]
    notes: tuple[str, ...]


def drawn_case(
    attention: PatternAnalysis,
    n_q: int,
    n_k: int,
    inputs: Mapping[str, object],
    head: int,
    *,
    all_inputs: bool = False,
    width: int = WIDTH,
) -> DrawnHead:
    """Return the inputs of a picture: those that the relation reads, or all; with a selection, random vectors too.

    `width`: the head dimension of the vectors.

    Raises ArgumentError.
    """
    bound = attention.bound
    heads = max(head_count(bound) or 1, head + 1)
    chooses = bool(attention.pattern.selections)
    names = None if chooses or all_inputs else attention.relation_inputs
    sizes = {"dk": width, "dv": width}
    examples = example_inputs(bound, n_q, n_k, inputs, heads=heads, sizes=sizes, names=names)
    if chooses:
        with needing_torch(f"a picture of what `{bound.program.name}` selects by content"):
            tensors = _as_tensors(inputs, examples)
            values = {**tensors, **_vectors(heads, n_q, n_k, width)}
    elif all_inputs:
        values = _as_tensors(inputs, examples)
    else:
        values = {**inputs, **attention._arrays_of(examples)}
    notes = (
        *(f"{name}, an example: {example.words}" for name, example in examples.items()),
        *(("selected by the content of random vectors",) if chooses else ()),
    )
    return DrawnHead(head, heads, values, notes)


def _as_tensors(inputs: Mapping[str, object], examples: Mapping[str, Example]) -> dict[str, object]:
    """Return the given inputs and the examples of the others, as tensors."""
    from attnc.runtime.call.tensor_checks import as_tensor  # needs torch, which may be missing

    tensors = {name: as_tensor(x) for name, x in inputs.items()}
    return {**tensors, **{name: example.tensor for name, example in examples.items()}}


def states_of(pairs: Counts, area: Counts) -> NDArray[np.int8]:
    """Return the state of each tile, full, empty or partial, from its visible pairs and all its pairs."""
    return np.where(pairs == area, FULL, np.where(pairs == 0, EMPTY, PARTIAL)).astype(np.int8)


def _vectors(heads: int, n_q: int, n_k: int, width: int) -> dict[str, object]:
    """Return random queries and keys, the same in every run, for selections by content."""
    import torch  # may be missing

    if n_q * n_k > MOST_CHOSEN:
        raise ArgumentError(
            f"{n_q} × {n_k} pairs: selections are drawn pair by pair, up to {MOST_CHOSEN}; use fewer tokens"
        )
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": n_q, "k": n_k}
    return {
        name: torch.randn((1, heads, n, width), generator=generator, dtype=torch.float64) for name, n in sizes.items()
    }


def tile_side(n_q: int, n_k: int, tile: int | None) -> int:
    """Return the side of the tiles: the requested one, or one that suits the length. Raises ArgumentError."""
    for name, value in (("n_q", n_q), ("n_k", n_k), ("tile", 1 if tile is None else tile)):
        if value < 1:
            raise ArgumentError(f"{name} is {value!r}: a picture needs a whole number, at least 1")
    longest = max(n_q, n_k)
    check_drawn_length(longest)
    if tile is None:
        eighth = _power_of_two(longest // 8 + 1) // 2
        return max(min(eighth, 128), 4, _power_of_two(-(-longest // TILES)))
    if -(-longest // tile) > TILES:
        raise ArgumentError(
            f"tile is {tile}: a picture of {longest} tokens needs tiles of at least {-(-longest // TILES)}"
        )
    return tile


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def count_pairs(attention: PatternAnalysis, n_q: int, n_k: int, case: DrawnHead, steps: Steps) -> list[Counts]:
    """Return, for each grid, the visible pairs in every cell, of the first batch entry.

    Of several attentions, a pair counts if any attention sees it, and they are counted pair by pair. Raises
    ArgumentError if there are too many pairs for that.
    """
    pattern = attention.pattern
    several = len(pattern.nodes) > 1 or any(node.family is not None for node in pattern.nodes)
    if several and n_q * n_k > MOST_CHOSEN:
        raise ArgumentError(
            f"{n_q} × {n_k} pairs: `{attention.name}` has several attentions, which are drawn pair by pair, "
            f"up to {MOST_CHOSEN}; use fewer tokens"
        )
    if n_q * n_k <= _SMALL or several or pattern.selections:
        return count_mask(attention._drawn_mask(n_q, n_k, case.head, case.inputs), steps)
    plan = attention._drawn_plan(n_q, n_k, case.heads, case.inputs)
    return count_plan(plan, 0, case.head, steps)


# --- words -----------------------------------------------------------------------------------------------------------


def subtitle_of(bound: BoundProgram, case: DrawnHead) -> str:
    """Return the parameters, and the head and the batch entry where there are several."""
    parts = [f"{name} = {shown(value)}" for name, value in bound.values.items()]
    if case.heads > 1:
        parts.append(f"head {case.head}")
    if any("batch" in i.type.dims and len(case.inputs.get(i.name, ())) > 1 for i in bound.program.inputs):
        parts.append("batch entry 0")
    return " · ".join(parts)


def _relation(bound: BoundProgram) -> str:
    """Return the `visible` lines as in the source, on one line."""
    lines = (re.sub(r"#[^\n]*", "", node.span.text) for node in bound.program.visible)
    text = " and ".join(f"({line})" if len(bound.program.visible) > 1 else line for line in lines)
    documents = f"documents {bound.program.documents.name}; " if bound.program.documents else ""
    visible = f"visible {' '.join(text.split())}" if text else "everything is visible"
    return f"{documents}{visible}{_rounding_text(bound)}"


def _rounding_text(bound: BoundProgram) -> str:
    """Return the rounding condition, empty if there is none."""
    item = bound.program.round
    return f"; round, per {item.q.span.text}, {item.k.span.text}" if item else ""


def _length_notes(bound: BoundProgram, longest: int) -> list[str]:
    """Return a note for each parameter that exceeds the length, so that it has no visible effect."""
    return [
        f"{name} = {value:,} is more than the {longest:,} tokens drawn"
        for name, value in bound.values.items()
        if isinstance(value, int) and not isinstance(value, bool) and value > longest
    ]


# --- counting --------------------------------------------------------------------------------------------------------


Counts = NDArray[np.int64]
Steps = Sequence[tuple[int, int]]
"""Grids, each as the (queries, keys) of a cell."""

_BLOCK = 1 << 22
"""The maximum number of elements in memory at once."""


def count_mask(mask: Mask, steps: Steps) -> list[Counts]:
    """Return, for each grid, the visible pairs in every cell of a mask (queries, keys)."""
    n_q, n_k = mask.shape
    tally = _Tally(n_q, n_k, steps)
    tally.add_mask(0, 0, mask)
    return tally.grids


def count_plan(plan: Plan, batch: int, head: int, steps: Steps) -> list[Counts]:
    """Return, for each grid, the visible pairs in every cell of a head's matrix."""
    tally = _Tally(plan.n_q, plan.n_k, steps)
    for group in plan.groups:
        if batch in group.batches and head in group.heads:
            for piece in group.pieces:
                _add_piece(tally, plan, piece, batch, head)
    return tally.grids


def _add_piece(tally: _Tally, plan: Plan, piece: PlanPiece, batch: int, head: int) -> None:
    rows, columns = piece.queries.length, piece.keys.length
    plain = piece.queries.is_plain and piece.keys.is_plain
    for q, k in zip(piece.queries.starts().tolist(), piece.keys.starts().tolist(), strict=True):
        if not plain:
            _add_scattered(tally, plan, piece, q, k)
            continue
        match piece.mask:
            case "full":
                tally.add_full(q, k, rows, columns)
            case "causal":
                tally.add_causal(q, k, rows)
            case "exact":
                height = max(1, _BLOCK // max(columns, 1))
                for low in range(q, q + rows, height):
                    high = min(low + height, q + rows)
                    tally.add_mask(low, k, plan.exact_mask(batch, head, low, high, k, k + columns))
            case int() as index:
                tally.add_mask(q, k, plan.masks[index].whole())


def _add_scattered(tally: _Tally, plan: Plan, piece: PlanPiece, q: int, k: int) -> None:
    rows, columns = q + piece.queries.inside(), k + piece.keys.inside()
    height = max(1, _BLOCK // max(len(columns), 1))
    for low in range(0, len(rows), height):
        part = rows[low : low + height]
        match piece.mask:
            case int() as index:
                mask = plan.masks[index].whole()[low : low + height]
            case "causal":
                mask = np.tri(len(part), len(columns), low, dtype=np.bool_)
            case _:
                mask = np.ones((len(part), len(columns)), dtype=np.bool_)
        tally.add_scattered(part, columns, mask)


class _Tally:
    """Cell counts that accumulate, one array per grid."""

    def __init__(self, n_q: int, n_k: int, steps: Steps) -> None:
        self.steps = steps
        self.grids = [np.zeros((-(-n_q // a), -(-n_k // b)), dtype=np.int64) for a, b in steps]

    def add_mask(self, q: int, k: int, mask: Mask) -> None:
        """Add a rectangle of pairs with its corner at (q, k)."""
        if mask.size == 0:
            return
        for grid, (q_step, k_step) in zip(self.grids, self.steps, strict=True):
            by_column = np.add.reduceat(mask, _cuts(k, mask.shape[1], k_step), axis=1, dtype=np.int64)
            _add(grid, q // q_step, k // k_step, _by_row(by_column, q, q_step))

    def add_scattered(self, rows: Counts, columns: Counts, mask: Mask) -> None:
        """Add pairs of tokens that are in ascending order but not consecutive."""
        for grid, (q_step, k_step) in zip(self.grids, self.steps, strict=True):
            q_cells, q_cuts = _cells(rows, q_step)
            k_cells, k_cuts = _cells(columns, k_step)
            counts = np.add.reduceat(mask, k_cuts, axis=1, dtype=np.int64)
            grid[np.ix_(q_cells, k_cells)] += np.add.reduceat(counts, q_cuts, axis=0, dtype=np.int64)

    def add_full(self, q: int, k: int, rows: int, columns: int) -> None:
        """Add a rectangle in which all pairs are visible."""
        if rows * columns == 0:
            return
        for grid, (q_step, k_step) in zip(self.grids, self.steps, strict=True):
            heights, widths = _overlaps(q, rows, q_step), _overlaps(k, columns, k_step)
            _add(grid, q // q_step, k // k_step, np.outer(heights, widths))

    def add_causal(self, q: int, k: int, n: int) -> None:
        """Add a square in which row r sees the columns up to r."""
        for grid, (q_step, k_step) in zip(self.grids, self.steps, strict=True):
            widths = _overlaps(k, n, k_step)
            before = np.cumsum(widths) - widths
            height = max(1, _BLOCK // len(widths))
            for low in range(0, n, height):
                row = np.arange(low, min(low + height, n))
                visible = np.clip(row[:, None] + 1 - before, 0, widths)
                _add(grid, (q + low) // q_step, k // k_step, _by_row(visible, q + low, q_step))


def _add(grid: Counts, row: int, column: int, counts: Counts) -> None:
    grid[row : row + counts.shape[0], column : column + counts.shape[1]] += counts


def _by_row(counts: Counts, q: int, step: int) -> Counts:
    return np.add.reduceat(counts, _cuts(q, len(counts), step), axis=0, dtype=np.int64)


def _cells(tokens: Counts, step: int) -> tuple[Counts, Counts]:
    """Return the cells that contain tokens, and the index of the first token in each."""
    cells = tokens // step
    cuts = np.flatnonzero(np.append(True, cells[1:] != cells[:-1]))
    return cells[cuts], cuts


def _cuts(start: int, length: int, step: int) -> NDArray[np.int64]:
    """Return the starts of the cells in a stretch, relative to the start of the stretch."""
    first = (start // step + 1) * step
    return np.append(0, np.arange(first, start + length, step, dtype=np.int64) - start)


def _overlaps(start: int, length: int, step: int) -> Counts:
    """Return the length of the overlap of a stretch with each cell that it meets."""
    return np.diff(np.append(_cuts(start, length, step), length))
