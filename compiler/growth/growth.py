"""The growth of a pattern: visible pairs, live tiles and cost as formulas of the length, and how they come about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import TypeGuard

from attnc.compiler import fold
from attnc.compiler.analysis.live_tiles import TooManyTilesError
from attnc.compiler.growth.closed import Closed, find_closed
from attnc.compiler.growth.counts import UncountableError, count
from attnc.compiler.growth.fitted import LONGEST_SAMPLE, Fit, fit, sampled
from attnc.compiler.growth.formula import Formula
from attnc.compiler.growth.open_relation import open_relation
from attnc.compiler.growth.periodic import Lengths, RelationVariant
from attnc.compiler.growth.periods import find_reach
from attnc.compiler.growth.seen import seen
from attnc.compiler.ir import DataRead, HeadIndex, Index, Lookup, Pattern
from attnc.compiler.lowering.specialise import alone, other_sizes
from attnc.compiler.planning.runs import TooManyClassesError
from attnc.compiler.rewrite import walk
from attnc.compiler.simulation.orders import TileFinder
from attnc.spec.errors import EvaluationError

HEADS = 8
"""Heads that are taken together where a relation depends on the head and nothing says how many there are."""

SHORT = 256
"""Lengths up to which `require` is asked what it allows."""

MOST_SEEN = 8
"""Lines about what is seen."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How the work of a pattern grows with its length n, as many queries as keys.

    `law`: O(n·w), O(n log n), … `pairs` are the visible pairs and `tiles` the live tiles of `tile` × `tile` of one
    head, or of `heads` heads together where they differ; None where there is no formula. `derivation` says line by line
    where they come from. `fitted`: the law is no more than a fit to counts. `checked`: lengths at which the formulas
    that hold there were compared with exact counts; all were equal.
    """

    law: str
    pairs: Formula | None
    tiles: Formula | None
    tile: int
    heads: int
    derivation: tuple[str, ...]
    fitted: bool
    checked: tuple[int, ...]

    @property
    def cost(self) -> str | None:
        """Multiplications and additions of the forward pass: two products of d for each pair of a live tile."""
        if self.tiles is None:
            return None
        return f"{4 * self.tile**2:,}·d·({self.tiles.expression_text}) FLOP{self.tiles.meanings}"

    def __str__(self) -> str:
        whose = "" if self.heads == 1 else f" of {self.heads} heads"
        lines = [f"growth   {self.law}"]
        if self.pairs is not None:
            lines.append(f"visible pairs{whose}: {self.pairs}")
        if self.tiles is not None:
            lines.append(f"live tiles of {self.tile} × {self.tile}{whose}: {self.tiles}")
            lines.append(f"cost: {self.cost}")
        return "\n    ".join([*lines, *self.derivation])


def find_growth(
    pattern: Pattern,
    *,
    heads: int | None = None,
    tile: int = 128,
) -> Growth:
    """The growth of a pattern, each head with a kv head of its own.

    The number of heads is the one that the parameters say, or 8, unless it is given. Where relations depend on inputs,
    or parameters fix the length, there is no law, and the derivation says so; `fit_growth` may help.
    """
    number = heads or next((n for _, n in pattern.head_lists), HEADS)
    known = {"heads": number, "kv_heads": number, "group": 1}
    reason = _refusal(pattern, known)
    if reason is None:
        lengths = _lengths(pattern, number)
        if lengths.step:
            lanes, distinct = _lanes(pattern, known, number)
            return _grown(lanes, number if distinct > 1 else 1, lengths, tile, len(pattern.nodes))
        reason = f"`require` refuses all lengths up to {SHORT}"
    return _none(reason, tile)


def _none(reason: str, tile: int, lines: tuple[str, ...] = ()) -> Growth:
    return Growth(f"no law: {reason}", None, None, tile, 1, lines, False, ())


def fit_growth(relations: Callable[[int], tuple[Index, int]], extents: Iterable[int], *, tile: int = 128) -> Growth:
    """The growth of what has no length of its own, such as a grid.

    `relations` gives, for an extent, the specialised relation and how many tokens there are. The law is fitted to the
    counts at these extents, which are taken by bricks where the relation is one of a grid.
    """
    pairs: dict[int, int] = {}
    for extent in extents:
        relation, n = relations(extent)
        try:
            pairs[n] = _pairs(relation, n, tile)
        except UncountableError:
            break
    return _fitted(pairs, tile, 1, ())


def _pairs(relation: Index, n: int, tile: int) -> int:
    """Visible pairs among n tokens. Raises UncountableError."""
    bricks = TileFinder(relation, n, n, {}).bricks
    visible = None
    if bricks is not None:
        with suppress(TooManyTilesError, TooManyClassesError):
            visible = bricks.work(*bricks.best(tile, tile)[0]).visible
    return count(relation, n, tile).pairs if visible is None else visible


# --- what is counted -------------------------------------------------------------------------------------------------


def _refusal(pattern: Pattern, sizes: Mapping[str, int]) -> str | None:
    """Why nothing can be said, if so."""
    if pattern.selections:
        return f"what it sees is chosen by content, by `{pattern.selections[0].name}`"
    if pattern.documents is not None:
        return f"it depends on the input `{pattern.documents.name}`"
    if pattern.segments:
        return "its tokens are a grid, whose extents are no length"
    for node in pattern.nodes:
        if node.keys is not None or node.family is not None or node.stack is not None:
            return f"queries or keys of `{node.name}` are no tokens, or it stands for several"
        read = [n.tensor.name if isinstance(n, Lookup) else n.data.name for n in walk(node.visible) if _is_input(n)]
        if read:
            return f"it depends on the input `{read[0]}`"
        if any(isinstance(n, HeadIndex) and n.name == "batch" for n in walk(node.visible)):
            return "it depends on the batch entry"
        unknown = [name for name in other_sizes(node.visible) if name not in sizes]
        if unknown:
            return f"it depends on the size `{unknown[0]}`, which a call decides"
    return None


def _is_input(node: Index) -> TypeGuard[Lookup | DataRead]:
    return isinstance(node, Lookup | DataRead)


def _lengths(pattern: Pattern, heads: int) -> Lengths:
    """Return the lengths that `require` allows for these heads."""
    asked = [condition for condition, _ in pattern.requirements if not other_sizes(condition)]
    asked = [c for c in asked if not any(map(_is_input, walk(c)))]
    allowed = partial(_is_allowed, asked, heads)
    step = 0
    for n in range(1, SHORT + 1) if asked else (1,):
        if allowed(n):
            step = gcd(step, n)
    if not step and allowed(LONG):
        step = 1
    return Lengths(allowed, step)


LONG = 1 << 14


def _is_allowed(conditions: Sequence[Index], heads: int, n: int) -> bool:
    return all(alone(condition, n, 0, heads, 1) is fold.truth(True) for condition in conditions)


def _lanes(pattern: Pattern, sizes: Mapping[str, int], heads: int) -> tuple[list[RelationVariant], int]:
    """The relations of all heads and branches, equal ones together; of one head if heads are alike."""
    constants = {name: fold.const(value) for name, value in sizes.items()}
    by_head: dict[tuple[Index, ...], int] = {}
    for head in range(heads):
        key = tuple(open_relation(node.visible, constants, head, 1).visible for node in pattern.nodes)
        by_head[key] = by_head.get(key, 0) + 1
    times: dict[Index, int] = {}
    for key, number in by_head.items():
        for visible in key:
            times[visible] = times.get(visible, 0) + (number if len(by_head) > 1 else 1)
    return [RelationVariant(open_relation(visible, {}, 0, 1), number) for visible, number in times.items()], len(
        by_head
    )


# --- what is said ----------------------------------------------------------------------------------------------------


def _grown(lanes: list[RelationVariant], heads: int, lengths: Lengths, tile: int, branches: int) -> Growth:
    lines = _seen(lanes, heads * branches)
    if branches > 1:
        lines = (f"{branches} branches together", *lines)
    closed = _closed(lanes, heads * branches, lengths, tile)
    if closed is None:
        reach = max((find_reach(lane.relation) for lane in lanes), default=0)
        if reach > LONGEST_SAMPLE:
            return _none(f"sizes of up to {reach:,} tokens are compared, too long to be counted", tile, lines)
        return _fitted(sampled(lanes, lengths, tile), tile, heads, lines)
    derivation = (*lines, *closed.derivation)
    return Growth(closed.law, closed.pairs, closed.tiles, tile, heads, derivation, False, closed.checked)


def _closed(lanes: list[RelationVariant], heads: int, lengths: Lengths, tile: int) -> Closed | None:
    try:
        return find_closed(lanes, heads, lengths, tile)
    except (UncountableError, EvaluationError):
        return None


def _seen(lanes: list[RelationVariant], whole: int) -> tuple[str, ...]:
    lines: list[str] = []
    for lane in lanes:
        whose = "" if len(lanes) == 1 else f"{lane.times} of {whole}: "
        lines.extend(whose + line for line in seen(lane.relation))
    more = len(lines) - MOST_SEEN
    return tuple(lines if more <= 0 else [*lines[:MOST_SEEN], f"and {more} lines like these"])


def _fitted(pairs: Mapping[int, int], tile: int, heads: int, lines: tuple[str, ...]) -> Growth:
    found: Fit | None = fit(pairs)
    if found is None:
        return _none("too few lengths can be counted", tile, lines)
    said = (
        *lines,
        f"no formula is proved: least squares on the logarithms of the pairs counted at {_list(pairs)} tokens give "
        f"exponent {found.exponent:.3f}, with a residual of {found.residual:.2%}",
    )
    return Growth(f"{found}, fitted", None, None, tile, heads, said, True, tuple(pairs))


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(f"{n:,}" for n in numbers)
