"""The growth of a pattern: visible pairs, live tiles and cost as formulas of the length, with their derivation.

A relation is put into words by its visible distances, or else by the condition itself. A relation without a derived
law gets a law that is fitted to counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.live_tiles import TooManyTilesError
from attnc.compiler.analysis.translation import Dependences
from attnc.compiler.growth.closed import Closed, find_closed
from attnc.compiler.growth.counts import UncountableError, count
from attnc.compiler.growth.formula import Formula, symbol, tidy, written
from attnc.compiler.growth.open_relation import OpenRelation, open_relation
from attnc.compiler.growth.periodic import Lengths, RelationVariant, total
from attnc.compiler.growth.periods import find_reach
from attnc.compiler.ir import Bool, DataRead, HeadIndex, Index, Lookup, Pattern, fold
from attnc.compiler.ir.print_ir import print_index
from attnc.compiler.ir.rewrite import substitute, walk
from attnc.compiler.lowering.specialise import alone, other_sizes
from attnc.compiler.planning.runs import TooManyClassesError
from attnc.compiler.simulation.orders import TileFinder
from attnc.spec.errors import EvaluationError

FAR = 1 << 14
"""Maximum distance, in tokens, that is evaluated."""

MOST_RUNS = 3

Int64 = NDArray[np.int64]


def seen(relation: OpenRelation) -> tuple[str, ...]:
    """Return a line of text for each alternative of a relation."""
    repeats = 0 < find_reach(relation) <= FAR and not relation.reads_length
    return tuple(_line(alternative, repeats) for alternative in _alternatives(relation.visible))


def _alternatives(relation: Index) -> Iterator[Index]:
    if isinstance(relation, Bool) and relation.op == "or":
        yield from relation.operands
        return
    if isinstance(relation, Bool):
        choices = [o for o in relation.operands if isinstance(o, Bool) and o.op == "or"]
        if len(choices) == 1:
            for alternative in choices[0].operands:
                yield fold.conjunction(*(alternative if o is choices[0] else o for o in relation.operands))
            return
    yield relation


def _line(relation: Index, repeats: bool) -> str:
    """Describe an alternative. `known`: distances repeat from `FAR` on at the latest."""
    growth = Dependences().growth(relation)
    if repeats and growth is not None and growth.tokens == 1 and not growth.by:
        try:
            return f"seen: {_distances(relation)}"
        except EvaluationError:
            pass
    relation_of_n = substitute(relation, {fold.extent("keys"): fold.extent("n")})
    return f"seen: pairs with {print_index(relation_of_n)}"


def _distances(relation: Index) -> str:
    """Describe the distances q - k of a relation that depends on the distance alone."""
    back = np.flatnonzero(exact_evaluation.mask(relation, (FAR, FAR + 1), (0, FAR + 1)).ravel()[::-1])
    ahead = np.flatnonzero(exact_evaluation.mask(relation, (0, 1), (1, FAR + 1)).ravel())
    if not len(back) + len(ahead):
        return "nothing"
    if not len(ahead):
        return f"distances {_listed(back)}"
    if not len(back):
        return f"distances {_listed(ahead + 1)}, ahead"
    return f"distances {_listed(back)}, and ahead {_listed(ahead + 1)}"


def _listed(distances: Int64) -> str:
    starts = np.flatnonzero(np.diff(distances, prepend=-2) > 1)
    stops = np.append(starts[1:], len(distances)) - 1
    runs = list(zip(distances[starts].tolist(), distances[stops].tolist(), strict=True))
    last = int(distances[-1])
    steps = set(np.diff(distances).tolist())
    if len(runs) == 1:
        low, high = runs[0]
        if high == FAR:
            return f"≥ {low:,}" if low else "of any length"
        return f"{low:,} … {high:,}, δ in n − δ pairs: {_sum(low, high, 1)}" if high > low else f"{low:,}"
    if len(steps) == 1:
        (step,) = steps
        low = runs[0][0]
        if last > FAR - step:
            return f"{low:,}, {low + step:,}, {low + 2 * step:,}, …"
        return f"{low:,}, {low + step:,}, … {last:,}, δ in n − δ pairs: {_sum(low, last, step)}"
    if len(runs) <= MOST_RUNS:
        return " and ".join(f"{a:,} … {b:,}" if b < FAR else f"≥ {a:,}" for a, b in runs)
    return f"{', '.join(f'{d:,}' for d in distances[:8].tolist())}, …; {len(distances):,} distances up to {FAR:,}"


def _sum(low: int, high: int, step: int) -> str:
    """The sum of n - δ over the distances δ, as text."""
    import sympy  # slow to import

    n, j = symbol("n"), symbol("j")
    return written(tidy(sympy.summation(n - low - step * j, (j, 0, (high - low) // step))))


LONGEST_SAMPLE = 1 << 14

LEAST = 3
"""Minimum number of lengths that a fit needs."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The fitted law `factor · n^exponent`; `residual`: the root mean square of log(count / fit)."""

    factor: float
    exponent: float
    residual: float

    def __str__(self) -> str:
        return f"about {self.factor:.3g}·n^{self.exponent:.2f}"


def fit(values: Mapping[int, int]) -> Fit | None:
    """Fit a law to numbers at several lengths, by least squares on logarithms; None for too few lengths."""
    points = {n: value for n, value in values.items() if value > 0}
    if len(points) < LEAST:
        return None
    x, y = np.log(list(points)), np.log(list(points.values()))
    slope, constant = np.polyfit(x, y, 1)
    residual = float(np.sqrt(np.mean((y - slope * x - constant) ** 2)))
    return Fit(float(np.exp(constant)), float(slope), residual)


def sampled(variants: list[RelationVariant], lengths: Lengths, tile: int) -> dict[int, int]:
    """Count the visible pairs at powers of two, up to the longest length that can be counted."""
    result = {}
    for exponent in range(9, LONGEST_SAMPLE.bit_length()):
        n = (1 << exponent) // lengths.step * lengths.step
        if n and lengths.allowed(n):
            try:
                result[n] = total(variants, n, tile).pairs
            except UncountableError:
                break
    return result


HEADS = 8
"""The number of heads to assume where a relation depends on the head and no parameter gives their number."""

SHORT = 256
"""Maximum length in tokens at which `require` is evaluated to find the allowed lengths."""

MOST_SEEN = 8
"""Maximum number of lines about visible distances."""


@dataclass(frozen=True, slots=True)
class Growth:
    """The growth of a pattern's work with its length n, for n queries and n keys.

    `law`: O(n·w), O(n log n), … `pairs`: the visible pairs, and `tiles`: the live tiles of `tile` × `tile` tokens, both
    of one head, or of `heads` heads together where heads differ; None without a formula. `derivation` derives them line
    by line. `fitted`: the law is only a fit to counts. `checked`: the lengths at which the formulas were compared with
    exact counts; all were equal.
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
        """The floating-point operations of the forward pass: two products over d for each pair of a live tile."""
        if self.tiles is None:
            return None
        return f"{4 * self.tile**2:,}·d·({self.tiles.expression_text}) FLOP{self.tiles.meanings}"

    def __str__(self) -> str:
        of_heads = "" if self.heads == 1 else f" of {self.heads} heads"
        lines = [f"growth   {self.law}"]
        if self.pairs is not None:
            lines.append(f"visible pairs{of_heads}: {self.pairs}")
        if self.tiles is not None:
            lines.append(f"live tiles of {self.tile} × {self.tile}{of_heads}: {self.tiles}")
            lines.append(f"cost: {self.cost}")
        return "\n    ".join([*lines, *self.derivation])


def find_growth(
    pattern: Pattern,
    *,
    heads: int | None = None,
    tile: int = 128,
) -> Growth:
    """Find the growth of a pattern whose heads each have their own kv head.

    `heads` defaults to the number that the parameters give, or else 8. Where relations depend on inputs, or parameters
    fix the length, there is no law, and `law` says why; `fit_growth` may help.
    """
    head_count = heads or next((n for _, n in pattern.head_lists), HEADS)
    sizes = {"heads": head_count, "kv_heads": head_count, "group": 1}
    reason = _refusal(pattern, sizes)
    if reason is None:
        lengths = _lengths(pattern, head_count)
        if lengths.step:
            variants, distinct = _variants(pattern, sizes, head_count)
            return _grown(variants, head_count if distinct > 1 else 1, lengths, tile, len(pattern.nodes))
        reason = f"`require` refuses all lengths up to {SHORT}"
    return _none(reason, tile)


def _none(reason: str, tile: int, lines: tuple[str, ...] = ()) -> Growth:
    return Growth(f"no law: {reason}", None, None, tile, 1, lines, False, ())


def fit_growth(relations: Callable[[int], tuple[Index, int]], extents: Iterable[int], *, tile: int = 128) -> Growth:
    """Fit the growth of a pattern that has no single length, such as one over a grid.

    `relations` returns the specialised relation and the number of tokens for an extent. The law is fitted to the counts
    at `extents`; relations over a grid are counted by bricks.
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
    """Count the visible pairs of n tokens. Raises UncountableError."""
    bricks = TileFinder(relation, n, n, {}).bricks
    visible = None
    if bricks is not None:
        with suppress(TooManyTilesError, TooManyClassesError):
            visible = bricks.work(*bricks.best(tile, tile)[0]).visible
    return count(relation, n, tile).pairs if visible is None else visible


# --- relations -------------------------------------------------------------------------------------------------------


def _refusal(pattern: Pattern, sizes: Mapping[str, int]) -> str | None:
    """The reason why a pattern has no law; completes the message "no law: …"."""
    if pattern.selections:
        return f"its visible keys are selected by content, by `{pattern.selections[0].name}`"
    if pattern.documents is not None:
        return f"it depends on the input `{pattern.documents.name}`"
    if pattern.segments:
        return "its tokens form a grid, which has no single length"
    for node in pattern.nodes:
        if node.keys is not None or node.family is not None or node.stack is not None:
            return f"queries or keys of `{node.name}` are not tokens, or `{node.name}` is a family"
        inputs_read = [
            n.tensor.name if isinstance(n, Lookup) else n.data.name for n in walk(node.visible) if _is_input(n)
        ]
        if inputs_read:
            return f"it depends on the input `{inputs_read[0]}`"
        if any(isinstance(n, HeadIndex) and n.name == "batch" for n in walk(node.visible)):
            return "it depends on the batch entry"
        unknown = [name for name in other_sizes(node.visible) if name not in sizes]
        if unknown:
            return f"it depends on the size `{unknown[0]}`, which is known only in a call"
    return None


def _is_input(node: Index) -> TypeGuard[Lookup | DataRead]:
    return isinstance(node, Lookup | DataRead)


def _lengths(pattern: Pattern, heads: int) -> Lengths:
    """Return the lengths that `require` allows for these heads."""
    conditions = [condition for condition, _ in pattern.requirements if not other_sizes(condition)]
    conditions = [c for c in conditions if not any(map(_is_input, walk(c)))]
    allowed = partial(_is_allowed, conditions, heads)
    step = 0
    for n in range(1, SHORT + 1) if conditions else (1,):
        if allowed(n):
            step = gcd(step, n)
    if not step and allowed(LONG):
        step = 1
    return Lengths(allowed, step)


LONG = 1 << 14


def _is_allowed(conditions: Sequence[Index], heads: int, n: int) -> bool:
    return all(alone(condition, n, 0, heads, 1) is fold.truth(True) for condition in conditions)


def _variants(pattern: Pattern, sizes: Mapping[str, int], heads: int) -> tuple[list[RelationVariant], int]:
    """The relations of all heads and branches, equal relations merged, and the number of heads that differ."""
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


# --- results ---------------------------------------------------------------------------------------------------------


def _grown(variants: list[RelationVariant], heads: int, lengths: Lengths, tile: int, branches: int) -> Growth:
    lines = _seen(variants, heads * branches)
    if branches > 1:
        lines = (f"{branches} branches together", *lines)
    closed = _closed(variants, heads * branches, lengths, tile)
    if closed is None:
        reach = max((find_reach(variant.relation) for variant in variants), default=0)
        if reach > LONGEST_SAMPLE:
            return _none(
                f"the relation compares sizes of up to {reach:,} tokens, which is too long to count", tile, lines
            )
        return _fitted(sampled(variants, lengths, tile), tile, heads, lines)
    derivation = (*lines, *closed.derivation)
    return Growth(closed.law, closed.pairs, closed.tiles, tile, heads, derivation, False, closed.checked)


def _closed(variants: list[RelationVariant], heads: int, lengths: Lengths, tile: int) -> Closed | None:
    try:
        return find_closed(variants, heads, lengths, tile)
    except (UncountableError, EvaluationError):
        return None


def _seen(variants: list[RelationVariant], total: int) -> tuple[str, ...]:
    lines: list[str] = []
    for variant in variants:
        prefix = "" if len(variants) == 1 else f"{variant.times} of {total}: "
        lines.extend(prefix + line for line in seen(variant.relation))
    hidden = len(lines) - MOST_SEEN
    return tuple(lines if hidden <= 0 else [*lines[:MOST_SEEN], f"and {hidden} more lines"])


def _fitted(pairs: Mapping[int, int], tile: int, heads: int, lines: tuple[str, ...]) -> Growth:
    law: Fit | None = fit(pairs)
    if law is None:
        return _none("too few lengths can be counted", tile, lines)
    derivation = (
        *lines,
        f"no formula is proved: a least-squares fit to the logarithms of the pairs at {_list(pairs)} tokens has "
        f"exponent {law.exponent:.3f}, with a residual of {law.residual:.2%}",
    )
    return Growth(f"{law}, fitted", None, None, tile, heads, derivation, True, tuple(pairs))


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(f"{n:,}" for n in numbers)
