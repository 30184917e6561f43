"""The keys that a set of queries sees, found without looking at keys one by one.

A relation is taken apart by `or`. An alternative is a condition of the query, one of the key, and one of both:

    r(q) and c(k) and x(q, k)

What some of the queries R see of it is the part with c of what R with r sees of x. That is known wholesale where x is a
condition of the distance q - k (sums of runs, or a convolution), where it compares f(q) with g(k) (keys in the order
of g), and where a plan covers it by pieces that share masks; what is left is evaluated, for the queries asked about and
for keys not seen before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import fold
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.analysis.translation import Dependences
from attnc.compiler.ir import Bool, Compare, ExactSelect, Index, Not, Position, is_truth
from attnc.compiler.planning.cpu_plan import PlanPiece
from attnc.compiler.planning.rates import AMX
from attnc.compiler.planning.schedule import CoverProblem, choose
from attnc.compiler.receptive.piece_ranges import AT_ONCE, Look, look_by_piece
from attnc.compiler.receptive.token_sets import MarkedKeys, merged_runs, runs
from attnc.compiler.rewrite import walk
from attnc.compiler.tile_forms.arrays import spread
from attnc.spec.errors import EvaluationError
from attnc.spec.source import Span

Int64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

MOST = 64
"""Alternatives that a relation is taken apart into at most; past it, it stays whole."""

MOST_RUNS = 1 << 20
"""Sums of two runs that are listed; past it, a convolution finds them all."""


class Sight:
    """Who sees whom in one window: a specialised relation over local queries and keys, prepared when first asked."""

    def __init__(self, relation: Index, n_q: int, n_k: int, origins: Mapping[Index, Span]) -> None:
        self.relation = relation
        self.n_q = n_q
        self.n_k = n_k
        self._origins = origins

    def look(self, queries: Int64, seen: Mask) -> Int64:
        """The keys that one of the queries, which are in order, sees and that are not in `seen`; they are added to it.

        Raises EvaluationError where the relation has no value on a pair that is evaluated.
        """
        keys = MarkedKeys(seen)
        for view in self._views:
            some = queries if view.queries is None else queries[view.queries[queries]]
            if len(some):
                view.look(some, keys, view.keys)
        return keys.fresh()

    def shows(self, queries: Int64, keys: Int64) -> Mask:
        """The relation on some queries and keys: bool (queries, keys). Raises EvaluationError."""
        step = max(1, AT_ONCE // max(len(keys), 1))
        starts = range(0, max(len(queries), 1), step)
        return np.concatenate([self._evaluated(queries[i : i + step], keys) for i in starts])

    def _evaluated(self, queries: Int64, keys: Int64, relation: Index | None = None) -> Mask:
        alive = np.ones((len(queries), len(keys)), dtype=np.bool_)
        node = self.relation if relation is None else relation
        return exact_evaluation.mask_at(node, queries, keys, alive, self._origins, wide=self._is_wide)

    @cached_property
    def _is_wide(self) -> bool:
        return not fits_word(self.relation, (0, self.n_q), (0, self.n_k))

    @cached_property
    def _views(self) -> list[_Alternative]:
        found = alternatives(self.relation)
        try:
            return self._prepared(found)
        except EvaluationError:  # a part may be asked where another one guards it
            return self._prepared([(self.relation,)])

    def _prepared(self, found: Iterable[tuple[Index, ...]]) -> list[_Alternative]:
        parts: dict[tuple[Index, Index, str | _Sides], list[Index]] = {}
        dependences = Dependences()
        for conjuncts in found:
            by_reads: dict[str, list[Index]] = {"q": [], "k": [], "": []}
            for conjunct in conjuncts:
                by_reads[_read(conjunct)].append(conjunct)
            of_q, of_k, of_both = (fold.conjunction(*by_reads[name]) for name in ("q", "k", ""))
            way: str | _Sides = _sides(of_both) or "plan"
            way = "distance" if _is_of_distance(of_both, dependences) else way
            parts.setdefault((of_q, of_k, way), []).append(of_both)
        views = []
        for (of_q, of_k, way), relations in parts.items():
            queries, keys = self._on_queries(of_q), self._on_keys(of_k)
            views += [_Alternative(queries, keys, look) for look in self._looks(fold.disjunction(*relations), way)]
        return views

    def _looks(self, relation: Index, way: str | _Sides) -> list[Look]:
        if isinstance(way, _Sides):
            return [self._by_order(way)]
        return [self._by_distance(relation)] if way == "distance" else self._by_plan(relation)

    def _on_queries(self, condition: Index) -> Mask | None:
        if condition is fold.truth(True):
            return None
        return self._evaluated(np.arange(self.n_q), np.zeros(1, dtype=np.int64), condition)[:, 0]

    def _on_keys(self, condition: Index) -> Mask | None:
        if condition is fold.truth(True):
            return None
        seen: Mask = self._evaluated(np.zeros(1, dtype=np.int64), np.arange(self.n_k), condition)[0]
        return seen

    # --- by distance ---

    def _by_distance(self, relation: Index) -> Look:
        """Return the look-up of a relation that reads `q - k` alone."""
        zero = np.zeros(1, dtype=np.int64)
        ahead = self._evaluated(zero, np.arange(1, self.n_k), relation)[0]
        behind = self._evaluated(np.arange(self.n_q), zero, relation)[:, 0]
        visible = np.concatenate([ahead[::-1], behind])
        offsets = np.flatnonzero(visible[::-1]) - (self.n_q - 1)  # k - q
        if not len(offsets):
            return lambda queries, keys, where: None
        first, stop = runs(offsets)
        lengths = self.n_q, self.n_k

        def look(queries: Int64, keys: MarkedKeys, where: Mask | None) -> None:
            a, b = runs(queries)
            if len(a) * len(first) <= MOST_RUNS:
                low, high = (a[:, None] + first).ravel(), (b[:, None] + stop - 1).ravel()
                if where is not None:
                    low, high = _clipped(low, high, where)
                keys.add_runs(low, high, where)
            else:
                keys.add(_sums(queries, offsets, *lengths), where)

        return look

    # --- by order ---

    def _by_order(self, sides: _Sides) -> Look:
        """Return the look-up of a comparison `f(q) + g(k) >= 0` or `== 0`."""
        of_query = self._integers(sides.of_q, np.arange(self.n_q), np.zeros(1, dtype=np.int64))
        of_key = self._integers(sides.of_k, np.zeros(1, dtype=np.int64), np.arange(self.n_k))
        order = np.argsort(of_key, kind="stable")
        of_key = of_key[order]

        def look(queries: Int64, keys: MarkedKeys, where: Mask | None) -> None:
            if sides.op == "ge":
                keys.add(order[np.searchsorted(of_key, -of_query[queries].max()) :], where)
                return
            asked = np.unique(-of_query[queries])
            first, stop = np.searchsorted(of_key, asked), np.searchsorted(of_key, asked, side="right")
            keys.add(order[spread(first, stop)], where)

        return look

    def _integers(self, node: Index, queries: Int64, keys: Int64) -> Int64:
        alive = np.ones((len(queries), len(keys)), dtype=np.bool_)
        wide = not fits_word(node, (0, self.n_q), (0, self.n_k))
        return exact_evaluation.integers_at(node, queries, keys, alive, self._origins, wide=wide).ravel()

    # --- by plan ---

    def _by_plan(self, relation: Index) -> list[Look]:
        """Return the look-ups of any relation, from the pieces of a kernel's cover, evaluated where it has no masks."""
        problem = CoverProblem(relation, self.n_q, self.n_k, "float32", 64, 1, self._origins, AMX)
        cover = choose(problem).cover
        looks: list[Look] = [look_by_piece(piece, cover) for piece in cover.pieces if piece.mask != "exact"]
        unknown = [piece for piece in cover.pieces if piece.mask == "exact"]
        return [*looks, self._by_evaluation(unknown)] if unknown else looks

    def _by_evaluation(self, pieces: list[PlanPiece]) -> Look:
        """Return the look-up of pieces whose masks are evaluated with the whole relation, other parts included."""
        row = np.concatenate([piece.queries.starts() for piece in pieces])
        rows = np.concatenate([np.full(p.queries.count, p.queries.length) for p in pieces])
        key = np.concatenate([piece.keys.starts() for piece in pieces])
        columns = np.concatenate([np.full(p.keys.count, p.keys.length) for p in pieces])
        own = np.zeros(self.n_q, dtype=np.bool_)
        own[spread(*merged_runs(row, row + rows))] = True

        def look(queries: Int64, keys: MarkedKeys, where: Mask | None) -> None:
            del where  # the relation says it
            queries = queries[own[queries]]
            while len(queries):
                here = (row <= queries[0]) & (queries[0] < row + rows)
                low, high = int(key[here].min()), int((key + columns)[here].max())
                end = int((row + rows)[here].min())
                missing = low + np.flatnonzero(~keys.seen[low:high])
                if not len(missing):
                    queries = queries[queries >= end]
                    continue
                count = min(max(1, AT_ONCE // len(missing)), int(np.searchsorted(queries, end)))
                keys.add(missing[self._evaluated(queries[:count], missing).any(axis=0)])
                queries = queries[count:]

        return look


@dataclass(frozen=True, slots=True, eq=False)
class _Alternative:
    """An alternative of a relation: the queries and keys that it is about (None: all), and how it is looked at."""

    queries: Mask | None
    keys: Mask | None
    look: Look


def alternatives(relation: Index) -> list[tuple[Index, ...]]:
    """Lists of conditions: the relation holds where all of one list do. They may overlap."""
    found = _alternatives(relation)
    return [(relation,)] if found is None else found


def _alternatives(node: Index) -> list[tuple[Index, ...]] | None:
    match node:
        case Bool(op="or"):
            return _joined(map(_alternatives, node.operands))
        case Bool():
            return _multiplied([_alternatives(operand) for operand in node.operands])
        case Not(operand=Bool() as inner):
            turned = fold.disjunction if inner.op == "and" else fold.conjunction
            return _alternatives(turned(*map(fold.negation, inner.operands)))
        case ExactSelect() if is_truth(node):
            return _either(node.condition, node.then, node.otherwise)
        case Not(operand=ExactSelect() as inner):
            return _either(inner.condition, fold.negation(inner.then), fold.negation(inner.otherwise))
        case _:
            return [(node,)]


def _either(condition: Index, then: Index, otherwise: Index) -> list[tuple[Index, ...]] | None:
    sides = fold.conjunction(condition, then), fold.conjunction(fold.negation(condition), otherwise)
    return _joined(map(_alternatives, sides))


def _joined(found: Iterable[list[tuple[Index, ...]] | None]) -> list[tuple[Index, ...]] | None:
    result: list[tuple[Index, ...]] = []
    for some in found:
        if some is None or len(result) + len(some) > MOST:
            return None
        result += some
    return result


def _multiplied(found: list[list[tuple[Index, ...]] | None]) -> list[tuple[Index, ...]] | None:
    known = [some for some in found if some is not None]
    if len(known) < len(found) or np.prod([float(len(some)) for some in known]) > MOST:
        return None
    return [tuple(conjunct for part in parts for conjunct in part) for parts in product(*known)]


def _read(node: Index) -> str:
    """The only place that a condition reads, "" where it reads both or none."""
    read = _places(node)
    return min(read) if len(read) == 1 else ""


def _places(node: Index) -> frozenset[str]:
    return frozenset(n.name for n in walk(node) if isinstance(n, Position))


@dataclass(frozen=True, slots=True)
class _Sides:
    """A comparison of a part that reads the query with one that reads the key: their sum with 0."""

    op: str
    of_q: Index
    of_k: Index


def _sides(node: Index) -> _Sides | None:
    """None where a condition is no such comparison."""
    if not isinstance(node, Compare):
        return None
    terms, constant = fold.parts(node.value)
    by_reads: dict[frozenset[str], list[tuple[Index, int]]] = {}
    for term, factor in terms:
        by_reads.setdefault(_places(term), []).append((term, factor))
    if not by_reads.keys() <= {frozenset("q"), frozenset("k")}:
        return None
    of_q, of_k = (by_reads.get(frozenset(name), []) for name in "qk")
    return _Sides(node.op, fold.linear(of_q, constant), fold.linear(of_k, 0))


def _is_of_distance(node: Index, dependences: Dependences) -> bool:
    """Whether a condition stays the same when both places move by one."""
    growth = dependences.growth(node)
    return growth is not None and growth.by == 0 and growth.tokens == 1


def _clipped(low: Int64, high: Int64, where: Mask) -> tuple[Int64, Int64]:
    """Runs cut to where something is wanted at all."""
    begin = int(where.argmax())
    end = len(where) - int(where[::-1].argmax()) if where[begin] else begin
    return np.maximum(low, begin), np.minimum(high, end)


def _sums(queries: Int64, offsets: Int64, n_q: int, n_k: int) -> Int64:
    """The keys `q + offset`, by a convolution; its counts are at most n_q, far less than what float64 tells apart."""
    size = 1 << (2 * n_q + n_k - 3).bit_length()
    at_query, at_offset = np.zeros(size), np.zeros(size)
    at_query[queries] = 1
    at_offset[offsets + (n_q - 1)] = 1
    counts = np.fft.irfft(np.fft.rfft(at_query) * np.fft.rfft(at_offset), size)
    return np.flatnonzero(counts[n_q - 1 : n_q - 1 + n_k] > 0.5)
