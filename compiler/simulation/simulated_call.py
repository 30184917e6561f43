"""The call that is simulated: its distinct relations, how often each occurs, and its sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attnc.compiler.analysis.live_tiles import TileGrid, TooManyTilesError, find_live_tiles
from attnc.compiler.ir import Index, Pattern, fold
from attnc.compiler.ir.value_nodes import is_scored, passes
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.runs import TooManyClassesError, resolve
from attnc.compiler.planning.tile_work import Int64, Strips, strips
from attnc.compiler.simulation.gpu_clocks import Extra, HeadSizes
from attnc.compiler.simulation.mask_cost import extra_operations
from attnc.compiler.simulation.natural_tiles import Origins
from attnc.compiler.simulation.orders import TileFinder
from attnc.compiler.simulation.simulation import Baseline, Shape
from attnc.spec.program import Value

TILE = 128
"""The side of tiles for counts that do not depend on the tile."""


@dataclass(frozen=True, eq=False)
class SimulatedRelation:
    """A relation over n_q local rows and n_k local keys that occurs `times` times; query 0 has position `shift`.

    `units`: whether its keys are units of tokens, or no tokens at all.
    """

    relation: Index
    n_q: int
    n_k: int
    shift: int
    times: int
    origins: Origins
    units: bool = False

    @cached_property
    def finder(self) -> TileFinder:
        """The finder of the relation's live tiles."""
        return TileFinder(self.relation, self.n_q, self.n_k, self.origins)

    @cached_property
    def visible(self) -> int | None:
        """The visible pairs of one occurrence; None if the partial tiles are too many or too different to count."""
        finder, bricks = self.finder, self.finder.bricks
        try:
            if bricks is not None:
                return bricks.work(*bricks.best(TILE, TILE)[0]).visible
            return (finder.by_residues if finder.divisors else finder.natural)(TILE, TILE).visible
        except (TooManyTilesError, TooManyClassesError):
            return None

    @cached_property
    def is_causal(self) -> bool:
        """Whether no query sees a key after its own position."""
        if self.units:
            return False
        later = fold.less(fold.add(fold.place("q"), fold.const(self.shift)), fold.place("k"))
        try:
            tiles = find_live_tiles(fold.conjunction(self.relation, later), TileGrid(self.n_q, self.n_k, TILE, TILE))
            return not len(resolve(fold.conjunction(self.relation, later), tiles, self.origins).tiles.row)
        except (TooManyTilesError, TooManyClassesError):
            return False


@dataclass(frozen=True, eq=False)
class SimulatedCall:
    """A call to simulate.

    `pattern`, `params`: its name and parameters for the report. `parts`: its distinct relations. `extra`: the cost of a
    score element besides softmax. `passes`: passes over the keys of a row.
    """

    pattern: str
    params: Mapping[str, Value]
    shape: Shape
    shift: int
    parts: tuple[SimulatedRelation, ...]
    extra: Extra
    passes: int
    notes: tuple[str, ...]

    @property
    def visible(self) -> int | None:
        """The visible pairs of all attention matrices, None where they were not counted."""
        counts = [None if part.visible is None else part.visible * part.times for part in self.parts]
        return None if None in counts else sum(n for n in counts if n is not None)

    @property
    def heads(self) -> HeadSizes:
        """The dimensions and dtype of a head."""
        return HeadSizes(self.shape.dk, self.shape.dv, self.shape.dtype)

    @cached_property
    def is_causal(self) -> bool:
        """Whether the relation lies inside the causal one, so that dense causal attention is the fair rival."""
        return all(part.is_causal for part in self.parts)

    def dense_strips(self, baseline: Baseline, q_tile: int, k_tile: int, *, by_columns: bool = False) -> Strips:
        """Return the tiles of dense attention in natural order over all attention matrices."""
        shape = self.shape
        if baseline == "full":
            rows, columns = -(-shape.n_q // q_tile), -(-shape.n_k // k_tile)
            strip_count, tile_count = (columns, rows) if by_columns else (rows, columns)
            dense = strips(np.array([tile_count]), np.array([0]), np.array([strip_count]))
        else:
            dense = _triangle(shape.n_q, shape.n_k, self.shift, q_tile, k_tile, by_columns)
        return dense.repeated(shape.lanes)

    def dense_pairs(self, baseline: Baseline) -> int:
        """Return the pairs of dense attention over all attention matrices."""
        shape = self.shape
        if baseline == "full":
            return shape.pairs
        seen_keys = np.clip(np.arange(shape.n_q, dtype=np.int64) + self.shift + 1, 0, shape.n_k)
        return int(seen_keys.sum()) * shape.lanes


def _triangle(n_q: int, n_k: int, shift: int, q_tile: int, k_tile: int, by_columns: bool) -> Strips:
    """Return the live tiles of `k <= q + shift`."""
    row = np.arange(-(-n_q // q_tile), dtype=np.int64)
    first = row * q_tile + shift
    last = np.minimum((row + 1) * q_tile, n_q) - 1 + shift
    columns = -(-n_k // k_tile)
    live = np.clip(last // k_tile + 1, 0, columns)
    full = np.clip((first + 1) // k_tile, 0, live)
    full = np.where(first + 1 >= n_k, live, full)
    if not by_columns:
        return strips(full, live - full)
    rows = len(row)
    column = np.arange(columns)
    live_by_column: Int64 = rows - np.searchsorted(live, column, side="right")
    full_by_column: Int64 = rows - np.searchsorted(full, column, side="right")
    return strips(full_by_column, live_by_column - full_by_column)


def problem_of(attends: Sequence[Relations], name: str, params: Mapping[str, Value], n_k: int) -> SimulatedCall:
    """Return the simulated call of one attention, or of several that run one after another, over n_k tokens of keys.

    Raises EvaluationError.
    """
    parts: list[SimulatedRelation] = []
    notes: dict[str, None] = {}
    extras, counts = [], []
    for relations in attends:
        call_parts = _parts(relations)
        node = relations.pattern.attend
        parts += call_parts
        extras.append(extra_operations(node, [part.relation for part in call_parts]))
        counts.append(1 if is_scored(node) else passes(node))
        notes.update(dict.fromkeys(_notes(relations.pattern, counts[-1])))
    if len(attends) > 1:
        notes[f"{len(attends)} attentions, simulated as one kernel that walks all of their tiles"] = None
    first = attends[0]
    extra = Extra(max(e.mask for e in extras), max(e.score for e in extras), max(e.exps for e in extras))
    call = first.shape
    shape = Shape(call.batch, call.heads, call.kv_heads, call.n_q, n_k, call.dk, call.dv, call.dtype)
    shift = n_k - call.n_q if first.pattern.align == "end" else 0
    return SimulatedCall(name, params, shape, shift, tuple(parts), extra, max(counts), tuple(notes))


def _parts(relations: Relations) -> list[SimulatedRelation]:
    """Return the distinct relations of a call, each with its number of occurrences."""
    counted: dict[tuple[Index, int, int, int], int] = {}
    for batches, heads, windows in relations.groups():
        lanes = len(batches) * len(heads)
        for local in windows:
            for numbers in local.windows.by_size():
                first = next(iter(local.windows.take(numbers[:1])))
                key = local.relation, first.n_q, first.n_k, first.shift
                counted[key] = counted.get(key, 0) + lanes * len(numbers)
    units = relations.pattern.attend.keys is not None
    origins = relations.pattern.origins
    return [SimulatedRelation(*key, times, origins, units) for key, times in counted.items() if key[1] and key[2]]


def _notes(pattern: Pattern, count: int) -> tuple[str, ...]:
    if is_scored(pattern.attend):
        return ()
    how = f"{count} passes over the keys of a row, each simulated as" if count > 1 else "simulated as"
    return (f"the weights are not a softmax of scores over tokens: {how} the forward of a softmax",)
