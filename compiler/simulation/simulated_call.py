"""The call that is simulated: its distinct relations, how often each occurs, and the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attnc.compiler import fold
from attnc.compiler.analysis.live_tiles import TileGrid, TooManyTilesError, find_live_tiles
from attnc.compiler.ir import Index, Pattern
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.runs import TooManyClassesError, resolve
from attnc.compiler.simulation.gpu_clocks import Extra, HeadSizes
from attnc.compiler.simulation.mask_cost import extra_of_node
from attnc.compiler.simulation.natural_tiles import Origins
from attnc.compiler.simulation.orders import TileFinder
from attnc.compiler.simulation.simulation import Baseline, Shape
from attnc.compiler.simulation.strips import Int64, Strips, strips
from attnc.compiler.value_nodes import is_scored, passes
from attnc.spec.program import Value

TILE = 128
"""Where any tile will do."""


@dataclass(frozen=True, eq=False)
class SimulatedRelation:
    """A relation over n_q local rows and n_k local keys, `times` times; query 0 stands at position `shift`.

    `units`: its keys are units of tokens, or no tokens at all.
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
        """Its tiles."""
        return TileFinder(self.relation, self.n_q, self.n_k, self.origins)

    @cached_property
    def visible(self) -> int | None:
        """Visible pairs of one, None where they are too many kinds to count."""
        finder, bricks = self.finder, self.finder.bricks
        try:
            if bricks is not None:
                return bricks.work(*bricks.best(TILE, TILE)[0]).visible
            return (finder.by_residues if finder.divisors else finder.natural)(TILE, TILE).visible
        except (TooManyTilesError, TooManyClassesError):
            return None

    @cached_property
    def is_causal(self) -> bool:
        """Whether no query sees a key behind its own position."""
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
    """A call: its name and parameters for the report, its parts, and what an element costs beside softmax."""

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
        """Visible pairs, None where they were not counted."""
        counts = [None if part.visible is None else part.visible * part.times for part in self.parts]
        return None if None in counts else sum(n for n in counts if n is not None)

    @property
    def heads(self) -> HeadSizes:
        """Sizes of a head."""
        return HeadSizes(self.shape.dk, self.shape.dv, self.shape.dtype)

    @cached_property
    def is_causal(self) -> bool:
        """Whether the relation lies inside the causal one, so that dense causal attention is the fair rival."""
        return all(part.is_causal for part in self.parts)

    def dense_strips(self, baseline: Baseline, q_tile: int, k_tile: int, *, by_columns: bool = False) -> Strips:
        """The tiles of dense attention in natural order, of all attention matrices."""
        shape = self.shape
        if baseline == "full":
            rows, columns = -(-shape.n_q // q_tile), -(-shape.n_k // k_tile)
            many, each = (columns, rows) if by_columns else (rows, columns)
            found = strips(np.array([each]), np.array([0]), np.array([many]))
        else:
            found = _triangle(shape.n_q, shape.n_k, self.shift, q_tile, k_tile, by_columns)
        return found.repeated(shape.lanes)

    def dense_pairs(self, baseline: Baseline) -> int:
        """Pairs of dense attention, of all attention matrices."""
        shape = self.shape
        if baseline == "full":
            return shape.pairs
        seen = np.clip(np.arange(shape.n_q, dtype=np.int64) + self.shift + 1, 0, shape.n_k)
        return int(seen.sum()) * shape.lanes


def _triangle(n_q: int, n_k: int, shift: int, q_tile: int, k_tile: int, by_columns: bool) -> Strips:
    """The live tiles of `k <= q + shift`."""
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
    at = np.arange(columns)
    seen: Int64 = rows - np.searchsorted(live, at, side="right")
    whole: Int64 = rows - np.searchsorted(full, at, side="right")
    return strips(whole, seen - whole)


def problem_of(attends: Sequence[Relations], name: str, params: Mapping[str, Value], n_k: int) -> SimulatedCall:
    """The problem of a call, which may be several attentions one after another; it has n_k tokens of keys.

    Raises EvaluationError.
    """
    parts: list[SimulatedRelation] = []
    notes: dict[str, None] = {}
    extras, counts = [], []
    for relations in attends:
        own = _parts(relations)
        node = relations.pattern.attend
        parts += own
        extras.append(extra_of_node(node, [part.relation for part in own]))
        counts.append(1 if is_scored(node) else passes(node))
        notes.update(dict.fromkeys(_notes(relations.pattern, counts[-1])))
    if len(attends) > 1:
        notes[f"{len(attends)} attentions, simulated as one kernel that walks the tiles of all"] = None
    first = attends[0]
    extra = Extra(max(e.mask for e in extras), max(e.score for e in extras), max(e.exps for e in extras))
    of = first.shape
    shape = Shape(of.batch, of.heads, of.kv_heads, of.n_q, n_k, of.dk, of.dv, of.dtype)
    shift = n_k - of.n_q if first.pattern.align == "end" else 0
    return SimulatedCall(name, params, shape, shift, tuple(parts), extra, max(counts), tuple(notes))


def _parts(relations: Relations) -> list[SimulatedRelation]:
    """The distinct relations, each with how often it stands."""
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
    many = f"{count} passes over the keys of a row, each simulated as" if count > 1 else "simulated as"
    return (f"its weights are more than a softmax of scores over tokens: {many} the forward of a softmax",)
