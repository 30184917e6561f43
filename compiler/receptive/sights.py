"""The keys that a set of queries sees, found without evaluating every pair.

A relation is split at `or` into alternatives. Each alternative is a condition on the query, one on the key, and one on
both:

    r(q) and c(k) and x(q, k)

A set of queries R sees the keys that satisfy c and that the queries of R that satisfy r see by x. These keys follow at
once where x is a condition on the distance q - k (sums of runs, or a convolution), where x compares f(q) with g(k)
(keys sorted by g), and where a plan covers x by pieces that share masks. Everything else is evaluated, but only for the
queries of R and the keys not seen before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.arrays import spread
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.analysis.translation import Dependences
from attnc.compiler.ir import Bool, Compare, ExactSelect, Index, Not, Position, fold, is_truth
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.planning.cpu_plan import PlanPiece
from attnc.compiler.planning.rates import AMX
from attnc.compiler.planning.schedule import CoverProblem, choose
from attnc.compiler.receptive.piece_ranges import AT_ONCE, Look, MarkedKeys, look_by_piece, merged_runs, runs
from attnc.spec.errors import EvaluationError
from attnc.spec.source import Span

Int64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

MOST = 64
"""Maximum number of alternatives; a relation with more alternatives is not split."""

MOST_RUNS = 1 << 20
"""Maximum number of sums of two runs that are listed; beyond it, a convolution computes them."""


class Sight:
    """The look-ups of a window: a specialised relation over local queries and keys, prepared at the first use."""

    def __init__(self, relation: Index, n_q: int, n_k: int, origins: Mapping[Index, Span]) -> None:
        self.relation = relation
        self.n_q = n_q
        self.n_k = n_k
        self._origins = origins

    def look(self, queries: Int64, seen: Mask) -> Int64:
        """Return the keys that some of the ascending queries see and that `seen` lacks, and add them to `seen`.

        Raises EvaluationError where the relation has no value on a pair that is evaluated.
        """
        keys = MarkedKeys(seen)
        for view in self._views:
            selected = queries if view.queries is None else queries[view.queries[queries]]
            if len(selected):
                view.look(selected, keys, view.keys)
        return keys.fresh()

    def shows(self, queries: Int64, keys: Int64) -> Mask:
        """Evaluate the relation on queries and keys: bool (queries, keys). Raises EvaluationError."""
        step = max(1, AT_ONCE // max(len(keys), 1))
        starts = range(0, max(len(queries), 1), step)
        return np.concatenate([self._evaluated(queries[i : i + step], keys) for i in starts])

    def _evaluated(self, queries: Int64, keys: Int64, relation: Index | None = None) -> Mask:
        active = np.ones((len(queries), len(keys)), dtype=np.bool_)
        node = self.relation if relation is None else relation
        return exact_evaluation.mask_at(node, queries, keys, active, self._origins, wide=self._is_wide)

    @cached_property
    def _is_wide(self) -> bool:
        return not fits_word(self.relation, (0, self.n_q), (0, self.n_k))

    @cached_property
    def _views(self) -> list[_Alternative]:
        conjunct_lists = alternatives(self.relation)
        try:
            return self._prepared(conjunct_lists)
        except EvaluationError:  # a conjunct may be evaluated where another conjunct would guard it
            return self._prepared([(self.relation,)])

    def _prepared(self, conjunct_lists: Iterable[tuple[Index, ...]]) -> list[_Alternative]:
        parts: dict[tuple[Index, Index, str | _Sides], list[Index]] = {}
        dependences = Dependences()
        for conjuncts in conjunct_lists:
            by_reads: dict[str, list[Index]] = {"q": [], "k": [], "": []}
            for conjunct in conjuncts:
                by_reads[_only_position(conjunct)].append(conjunct)
            of_q, of_k, of_both = (fold.conjunction(*by_reads[name]) for name in ("q", "k", ""))
            method: str | _Sides = _sides(of_both) or "plan"
            method = "distance" if _is_of_distance(of_both, dependences) else method
            parts.setdefault((of_q, of_k, method), []).append(of_both)
        looks_of_alternatives = []
        for (of_q, of_k, method), relations in parts.items():
            queries, keys = self._on_queries(of_q), self._on_keys(of_k)
            looks_of_alternatives += [
                _Alternative(queries, keys, look) for look in self._looks(fold.disjunction(*relations), method)
            ]
        return looks_of_alternatives

    def _looks(self, relation: Index, method: str | _Sides) -> list[Look]:
        if isinstance(method, _Sides):
            return [self._by_order(method)]
        return [self._by_distance(relation)] if method == "distance" else self._by_plan(relation)

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
            keys_wanted = np.unique(-of_query[queries])
            first, stop = np.searchsorted(of_key, keys_wanted), np.searchsorted(of_key, keys_wanted, side="right")
            keys.add(order[spread(first, stop)], where)

        return look

    def _integers(self, node: Index, queries: Int64, keys: Int64) -> Int64:
        active = np.ones((len(queries), len(keys)), dtype=np.bool_)
        wide = not fits_word(node, (0, self.n_q), (0, self.n_k))
        return exact_evaluation.integers_at(node, queries, keys, active, self._origins, wide=wide).ravel()

    # --- by plan ---

    def _by_plan(self, relation: Index) -> list[Look]:
        """Return look-ups of any relation, from the pieces of a kernel's cover; pieces without masks are evaluated."""
        problem = CoverProblem(relation, self.n_q, self.n_k, "float32", 64, 1, self._origins, AMX)
        cover = choose(problem).cover
        looks: list[Look] = [look_by_piece(piece, cover) for piece in cover.pieces if piece.mask != "exact"]
        unmasked = [piece for piece in cover.pieces if piece.mask == "exact"]
        return [*looks, self._by_evaluation(unmasked)] if unmasked else looks

    def _by_evaluation(self, pieces: list[PlanPiece]) -> Look:
        """Return the look-up of pieces whose pairs are evaluated by the whole relation, other alternatives included."""
        row = np.concatenate([piece.queries.starts() for piece in pieces])
        rows = np.concatenate([np.full(p.queries.count, p.queries.length) for p in pieces])
        key = np.concatenate([piece.keys.starts() for piece in pieces])
        columns = np.concatenate([np.full(p.keys.count, p.keys.length) for p in pieces])
        in_pieces = np.zeros(self.n_q, dtype=np.bool_)
        in_pieces[spread(*merged_runs(row, row + rows))] = True

        def look(queries: Int64, keys: MarkedKeys, where: Mask | None) -> None:
            del where  # the whole relation contains this condition
            queries = queries[in_pieces[queries]]
            while len(queries):
                pieces_here = (row <= queries[0]) & (queries[0] < row + rows)
                low, high = int(key[pieces_here].min()), int((key + columns)[pieces_here].max())
                end = int((row + rows)[pieces_here].min())
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
    """An alternative of a relation: the queries and keys to which it applies (None: all), and its look-up."""

    queries: Mask | None
    keys: Mask | None
    look: Look


def alternatives(relation: Index) -> list[tuple[Index, ...]]:
    """Split a relation into lists of conditions; it holds where all conditions of a list hold. Lists may overlap."""
    conjunct_lists = _alternatives(relation)
    return [(relation,)] if conjunct_lists is None else conjunct_lists


def _alternatives(node: Index) -> list[tuple[Index, ...]] | None:
    match node:
        case Bool(op="or"):
            return _joined(map(_alternatives, node.operands))
        case Bool():
            return _multiplied([_alternatives(operand) for operand in node.operands])
        case Not(operand=Bool() as inner):
            dual = fold.disjunction if inner.op == "and" else fold.conjunction
            return _alternatives(dual(*map(fold.negation, inner.operands)))
        case ExactSelect() if is_truth(node):
            return _either(node.condition, node.then, node.otherwise)
        case Not(operand=ExactSelect() as inner):
            return _either(inner.condition, fold.negation(inner.then), fold.negation(inner.otherwise))
        case _:
            return [(node,)]


def _either(condition: Index, then: Index, otherwise: Index) -> list[tuple[Index, ...]] | None:
    sides = fold.conjunction(condition, then), fold.conjunction(fold.negation(condition), otherwise)
    return _joined(map(_alternatives, sides))


def _joined(operands: Iterable[list[tuple[Index, ...]] | None]) -> list[tuple[Index, ...]] | None:
    result: list[tuple[Index, ...]] = []
    for conjunct_lists in operands:
        if conjunct_lists is None or len(result) + len(conjunct_lists) > MOST:
            return None
        result += conjunct_lists
    return result


def _multiplied(operands: list[list[tuple[Index, ...]] | None]) -> list[tuple[Index, ...]] | None:
    factors = [conjunct_lists for conjunct_lists in operands if conjunct_lists is not None]
    if len(factors) < len(operands) or np.prod([float(len(conjunct_lists)) for conjunct_lists in factors]) > MOST:
        return None
    return [tuple(conjunct for part in parts for conjunct in part) for parts in product(*factors)]


def _only_position(node: Index) -> str:
    """The position that a condition reads, "q" or "k"; "" where it reads both or none."""
    names = _positions_read(node)
    return min(names) if len(names) == 1 else ""


def _positions_read(node: Index) -> frozenset[str]:
    return frozenset(n.name for n in walk(node) if isinstance(n, Position))


@dataclass(frozen=True, slots=True)
class _Sides:
    """The comparison with 0 of a sum of a part that reads only the query and a part that reads only the key."""

    op: str
    of_q: Index
    of_k: Index


def _sides(node: Index) -> _Sides | None:
    """Return the sides of a comparison; None where the condition has another form."""
    if not isinstance(node, Compare):
        return None
    terms, constant = fold.parts(node.value)
    by_reads: dict[frozenset[str], list[tuple[Index, int]]] = {}
    for term, factor in terms:
        by_reads.setdefault(_positions_read(term), []).append((term, factor))
    if not by_reads.keys() <= {frozenset("q"), frozenset("k")}:
        return None
    of_q, of_k = (by_reads.get(frozenset(name), []) for name in "qk")
    return _Sides(node.op, fold.linear(of_q, constant), fold.linear(of_k, 0))


def _is_of_distance(node: Index, dependences: Dependences) -> bool:
    """Whether a condition stays the same when the query and the key both move by one."""
    growth = dependences.growth(node)
    return growth is not None and growth.by == 0 and growth.tokens == 1


def _clipped(low: Int64, high: Int64, where: Mask) -> tuple[Int64, Int64]:
    """Cut runs to the range between the first and the last true entry of `where`."""
    begin = int(where.argmax())
    end = len(where) - int(where[::-1].argmax()) if where[begin] else begin
    return np.maximum(low, begin), np.minimum(high, end)


def _sums(queries: Int64, offsets: Int64, n_q: int, n_k: int) -> Int64:
    """The keys `q + offset`, by a convolution; counts are at most n_q, well within the precision of float64."""
    size = 1 << (2 * n_q + n_k - 3).bit_length()
    at_query, at_offset = np.zeros(size), np.zeros(size)
    at_query[queries] = 1
    at_offset[offsets + (n_q - 1)] = 1
    counts = np.fft.irfft(np.fft.rfft(at_query) * np.fft.rfft(at_offset), size)
    return np.flatnonzero(counts[n_q - 1 : n_q - 1 + n_k] > 0.5)
