"""Verdicts on whether two patterns are equal: first their visible pairs, then the values computed from them.

Pairs are compared by `comparing`. Scores, weights, values, branches, states and selections are equal where their normal
forms are equal. Where normal forms differ, the reference computes drawn calls of both patterns: different results prove
that the patterns differ, equal results prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.counted_isl import UndecidedError
from attnc.compiler.comparison.comparing import (
    LENGTHS,
    ComparisonAnswer,
    ComparisonQuestion,
    Witness,
    compare,
    of_tokens,
    reads_counts,
    reads_groups,
)
from attnc.compiler.comparison.equality import PARTS, Difference, normal_forms, reads_length
from attnc.compiler.ir import DataRead, Index, Lookup, fold
from attnc.compiler.ir.rewrite import variables, walk
from attnc.compiler.lowering.specialise import alone, other_sizes, reads_head
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError, needing_torch
from attnc.runtime.call.example_inputs import head_count
from attnc.runtime.call.lengths import fixed_and_row
from attnc.runtime.patterns.pattern_analysis import PatternAnalysis

if TYPE_CHECKING:
    from attnc.runtime.verifying.drawn_calls import CallDifference

HEADS = 8
"""Number of heads where neither the parameters nor the caller give one."""

DRAWN = (24, 32, 48, 60, 64, 96, 128, 16, 8, 4, 2, 1)
"""Candidate numbers of tokens for a drawn call; the first that both patterns allow is used."""

MOST_DRAWN = 1024
"""Maximum number of tokens of a drawn call: the reference is dense."""

GRIDS = 4
"""Maximum number of grids that are compared where the call decides the length of one axis."""

BORDERS = 64
"""Maximum number of tokens in the search for a pair that a document border hides."""

ONE_FORM = "for every length: both have one normal form"


@dataclass(frozen=True)
class Sameness:
    """Verdict on two patterns; `equal` and `relation_equal` are None where undecided.

    `how`: how far the visible pairs are proved equal. `undecided`: why `equal` is None. `heads`: the number of heads of
    both patterns. `compared`: the parts that were compared, the relation first; `differs_in`: the parts whose normal
    forms differ. `witness`: a pair that is visible in one pattern only, among documents with a border before token
    `border`; `row`: a query whose results differ in a drawn call. `up_to`: the number of tokens up to which no
    difference was found, where `equal` is None.
    """

    equal: bool | None
    relation_equal: bool | None
    heads: int
    compared: tuple[str, ...]
    how: str = ""
    undecided: str = ""
    differs_in: tuple[str, ...] = ()
    witness: Witness | None = None
    border: int | None = None
    row: CallDifference | None = None
    up_to: int | None = None


_ALL = "compare everything that the patterns compute, not the relation alone"


def decide(
    one: PatternAnalysis, other: PatternAnalysis, *, relation_only: bool = False, heads: int | None = None
) -> Sameness:
    """Compare two patterns; `relation_only`: only their visible pairs; `heads`: the number of heads of both.

    Raises UnsupportedError where the patterns cannot be compared, and the errors of calls of these patterns.
    """
    judge = _Judge(one, other, heads)
    return judge.of_relations() if relation_only else judge.of_everything()


class _Judge:
    """Comparison of two patterns, with the facts known about both."""

    def __init__(self, one: PatternAnalysis, other: PatternAnalysis, heads: int | None) -> None:
        self.patterns = one, other
        self.heads = _heads(one, other, heads)
        self._is_given = heads is not None or any(head_count(p.bound) is not None for p in self.patterns)
        self._forms = [normal_forms(p.pattern) for p in self.patterns]

    # --- verdicts ---

    def of_relations(self) -> Sameness:
        """Return the verdict on visible pairs alone; patterns with states are refused, because states have no pairs."""
        for pattern in self.patterns:
            if pattern.is_recurrence or pattern.pattern.stateful:
                raise UnsupportedError(f"{_why_not(pattern)}; {_ALL}")
        if self._documents_differ:
            return self._by_borders() or self._undecided_documents()
        answer = self._answer
        if answer is None:
            return self._by_masks() or self._undecided_relation()
        if answer.witness is not None:
            return self._pair(answer.witness)
        equal = True if answer.up_to is None else None
        return Sameness(equal, equal, self._relation_heads, ("relation",), answer.how, up_to=answer.up_to)

    def of_everything(self) -> Sameness:
        """Return the verdict on everything that the patterns compute."""
        if self._documents_differ:
            return self._by_borders() or self._by_calls(None)
        answer = self._answer
        if answer is None:
            self._refuse_sizes()
            return self._by_masks() or self._by_calls(None)
        if answer.witness is not None:
            return self._pair(answer.witness)
        if self._differing or not self._nodes_are_equal:
            return self._by_calls(answer)
        equal = True if answer.up_to is None else None
        return Sameness(equal, equal, self._relation_heads, ("relation", *PARTS), answer.how, up_to=answer.up_to)

    def _pair(self, witness: Witness, heads: int | None = None, border: int | None = None) -> Sameness:
        number_of_heads = self._relation_heads if heads is None else heads
        return Sameness(False, False, number_of_heads, ("relation",), witness=witness, border=border)

    # --- relations ---

    @cached_property
    def _answer(self) -> ComparisonAnswer | None:
        """The comparison of the visible pairs; None where they depend on more than positions and heads."""
        if all(self._same(part) for part in ("relation", "branches", "states", "selections")) and self._why is not None:
            return ComparisonAnswer(None, ONE_FORM)
        return None if self._relations is None else self._compared(*self._relations)

    @cached_property
    def _relations(self) -> tuple[Index, Index] | None:
        """The relations of both patterns; None where they cannot be compared for all lengths."""
        first, second = (_relation(p) for p in self.patterns)
        return None if self._why is not None or first is None or second is None else (first, second)

    def _compared(self, first: Index, second: Index) -> ComparisonAnswer:
        question = self._question(first, second)
        if first is second:
            return compare(question)
        _check_heads(question)
        length, lengths = self._lengths
        try:
            return compare(question, length, lengths)
        except UndecidedError as error:
            raise UnsupportedError(f"not decided: {error}") from error

    def _question(self, first: Index, second: Index) -> ComparisonQuestion:
        required = [condition for p in self.patterns for condition, _ in p.pattern.requirements]
        conditions = tuple(
            condition for condition in required if not (other_sizes(condition) or _reads_inputs(condition))
        )
        read = any(reads_head(root) or reads_counts(root) for root in (first, second, *conditions))
        heads = self.heads if read or self._is_given else 1
        reads_group = any(map(reads_groups, (first, second, *conditions)))
        return ComparisonQuestion((first, second), conditions, heads, _groups(heads) if reads_group else (1,))

    @property
    def _relation_heads(self) -> int:
        """The number of heads of the relations."""
        relations = [_relation(p) for p in self.patterns]
        first, second = (fold.truth(True) if relation is None else relation for relation in relations)
        return self._question(first, second).heads

    @cached_property
    def _nodes_are_equal(self) -> bool:
        """Whether the visible pairs of each branch are proved equal, or tested as far as those of the whole pattern."""
        one, other = (p.pattern.nodes for p in self.patterns)
        if self._same("relation") or len(one) == len(other) == 1:
            return True
        if len(one) != len(other):
            return False
        pairs = [(of_tokens(a), of_tokens(b)) for a, b in zip(one, other, strict=True)]
        answers = (self._compared(a, b) if a is not None and b is not None else None for a, b in pairs)
        return all(answer is not None and answer.witness is None and answer.up_to is None for answer in answers)

    @cached_property
    def _why(self) -> str | None:
        """Why the visible pairs cannot be compared for all lengths, as a sentence; None where they can."""
        return next((why for why in map(_why_not, self.patterns) if why is not None), None)

    def _by_masks(self) -> Sameness | None:
        """Return a verdict with a pair that one pattern alone shows for drawn inputs; None if there is none."""
        if any(p.pattern.selections or not p.has_mask for p in self.patterns):
            return None
        with needing_torch(f"comparing {self._names} by the masks of drawn inputs"):
            from attnc.runtime.verifying.drawn_calls import compare_masks  # needs torch, which may be missing
        one, other = (p._compiled for p in self.patterns)
        with _drawing():
            comparison = compare_masks(one, other, self._drawn_lengths, self.heads, _groups(self.heads))
        return None if comparison is None or comparison[1] is None else self._pair(comparison[1], self.heads)

    def _refuse_sizes(self) -> None:
        for pattern in self.patterns:
            sizes = [size for node in pattern.pattern.nodes for size in other_sizes(node.visible)]
            if sizes:
                raise UnsupportedError(
                    f"`{pattern.name}` reads the size `{sizes[0]}`, which is decided by a call: it cannot be compared"
                )

    def _undecided_relation(self) -> Sameness:
        self._refuse_sizes()
        if any(p.pattern.selections or not p.has_mask for p in self.patterns):
            raise UnsupportedError(f"{self._why}; {_ALL}")
        tokens = next(iter(self._drawn_lengths), None)
        return Sameness(None, None, self.heads, ("relation",), undecided=f"{self._why}", up_to=tokens)

    # --- documents ---

    @property
    def _documents_differ(self) -> bool:
        one, other = (p.pattern.documents is not None for p in self.patterns)
        return one != other

    def _by_borders(self) -> Sameness | None:
        """Return a verdict with a pair that a document border hides in one pattern only; None if none is found."""
        if self._relations is None or self._lengths != (None, None):
            return None
        question = self._question(*self._relations)
        cut = [p.pattern.documents is not None for p in self.patterns]
        for n in range(2, BORDERS + 1):
            for head, group in question.allowed(n):
                for border in sorted({1, n // 2}):
                    a, b = (
                        _mask(relation, n, border if is_cut else 0, head, question.heads, group)
                        for relation, is_cut in zip(self._relations, cut, strict=True)
                    )
                    places = np.argwhere(a != b)
                    if len(places):
                        q, k = (int(x) for x in places[0])
                        pair = Difference(q, k, n, bool(a[q, k]))
                        return self._pair(Witness(pair, head, group), question.heads, border)
        return None

    def _undecided_documents(self) -> Sameness:
        have, have_not = sorted(self.patterns, key=lambda p: p.pattern.documents is None)
        why = f"`{have.name}` has documents and `{have_not.name}` has none, but no pair was found that differs"
        return Sameness(None, None, self.heads, ("relation",), undecided=why, up_to=BORDERS)

    # --- calls ---

    def _same(self, part: str) -> bool:
        return self._forms[0][part] == self._forms[1][part]

    @property
    def _differing(self) -> tuple[str, ...]:
        """The parts whose normal forms differ; scores, weights and values only for equal numbers of branches."""
        same_count = len({len(p.pattern.nodes) for p in self.patterns}) == 1
        parts = PARTS if same_count else [part for part in PARTS if part not in ("scores", "weights", "values")]
        parts_that_differ = [part for part in parts if not self._same(part)]
        if self._documents_differ:
            parts_that_differ.append("documents")
        return tuple(parts_that_differ)

    def _by_calls(self, answer: ComparisonAnswer | None) -> Sameness:
        """Return the verdict of drawn calls; `answer`: the comparison of visible pairs, which found no difference."""
        differing = self._differing or (("relation",) if answer is None else ("branches",))
        how, proved = ("", None) if answer is None else (answer.how, True if answer.up_to is None else None)
        compared = ("relation", *PARTS)
        lengths = self._drawn_lengths
        drawn_length, row = (self._drawn_calls(lengths) if lengths else None) or (None, None)
        if row is not None:
            return Sameness(False, proved, self.heads, compared, how, differs_in=differing, row=row)
        why = "no call is small enough to draw" if not lengths else "`require` refuses all drawn calls"
        if drawn_length is not None:
            why = f"results are equal in drawn calls of {drawn_length:,} tokens, which proves nothing about others"
        if answer is None and self._why is not None:
            why = f"{self._why}; {why}"
        return Sameness(None, proved, self.heads, compared, how, why, differing, up_to=drawn_length)

    def _drawn_calls(self, lengths: Sequence[int]) -> tuple[int, CallDifference | None] | None:
        with needing_torch(f"comparing {self._names} by the results of drawn calls"):
            from attnc.runtime.verifying.drawn_calls import compare_calls  # needs torch, which may be missing
        one, other = (p._compiled for p in self.patterns)
        with _drawing():
            return compare_calls(one, other, lengths, self.heads, _groups(self.heads))

    @property
    def _names(self) -> str:
        return " and ".join(f"`{p.name}`" for p in self.patterns)

    @property
    def _drawn_lengths(self) -> Sequence[int]:
        length, lengths = self._lengths
        candidates = DRAWN if (length, lengths) == (None, None) else [length] if length is not None else lengths or ()
        return [n for n in candidates if n <= MOST_DRAWN]

    @cached_property
    def _lengths(self) -> tuple[int | None, Sequence[int] | None]:
        """The only number of tokens, or some numbers that the grids of both patterns allow; None: any."""
        forms = {fixed_and_row(p.bound) for p in self.patterns if p.bound.program.segments}
        if not forms:
            return None, None
        fixed = sorted({tokens for tokens, row in forms if not row})
        if len(fixed) > 1:
            raise UnsupportedError(f"the patterns have different lengths: {' and '.join(map(str, fixed))} tokens")
        tried = fixed or range(1, LENGTHS * max(row for _, row in forms) + 1)
        grids = [form for form in forms if form[1]]
        allowed = [n for n in tried if all(n > tokens and (n - tokens) % row == 0 for tokens, row in grids)]
        if not allowed:
            raise UnsupportedError("no number of tokens fills the grids of both patterns")
        return (allowed[0], None) if fixed else (None, allowed[:GRIDS])


@contextmanager
def _drawing() -> Iterator[None]:
    """Raise UnsupportedError where an input has no example to draw: `same` takes no inputs."""
    try:
        yield
    except ArgumentError as error:
        reason, _, _ = str(error).partition(": give `")
        raise UnsupportedError(f"not decided, because no call can be drawn: {reason}") from error


def _groups(heads: int) -> tuple[int, ...]:
    """Return the numbers of query heads per kv head to try: one, and the fewest that are legal."""
    shared = next((g for g in range(2, heads + 1) if heads % g == 0), 1)
    return (1, shared) if shared > 1 else (1,)


def _heads(one: PatternAnalysis, other: PatternAnalysis, requested: int | None) -> int:
    counts = {n for n in (head_count(p.bound) for p in (one, other)) if n is not None}
    if len(counts) > 1:
        raise UnsupportedError(f"the patterns have per-head lists for {' and '.join(map(str, sorted(counts)))} heads")
    if requested is not None and counts and counts != {requested}:
        raise UnsupportedError(f"heads is {requested}: the patterns have per-head lists for {counts.pop()} heads")
    return requested if requested is not None else counts.pop() if counts else HEADS


def _check_heads(question: ComparisonQuestion) -> None:
    """Raise UnsupportedError where `require` refuses this number of heads whatever the length."""
    by_heads = tuple(condition for condition in question.conditions if not reads_length(condition))
    if not replace(question, conditions=by_heads).allowed(1):
        raise UnsupportedError(
            f"`require` refuses {question.heads} heads: pass another number of heads, on the command line as --heads N"
        )


def _relation(pattern: PatternAnalysis) -> Index | None:
    """Return the pairs of tokens that are visible in at least one branch; None where keys are not tokens."""
    relations = [of_tokens(node) for node in pattern.pattern.nodes]
    over_tokens = [relation for relation in relations if relation is not None]
    return fold.disjunction(*over_tokens) if over_tokens and len(over_tokens) == len(relations) else None


def _why_not(attention: PatternAnalysis) -> str | None:
    """Return why the visible pairs of a pattern are not known before a call, as a sentence; None where they are."""
    name, pattern = f"`{attention.name}`", attention.pattern
    if attention.is_recurrence:
        return f"{name} is a recurrence, which has no pairs"
    if pattern.stateful:
        return f"{name} has a branch with a state, `{pattern.stateful[0].name}`, which has no pairs"
    if pattern.selections:
        return f"{name} selects keys by content (`{pattern.selections[0].name}`): its pairs differ from call to call"
    if pattern.chooses:
        return f"{name} sorts tokens by content: its pairs differ from call to call"
    if _relation(attention) is None:
        return f"{name} has keys that are not tokens"
    if any(node.family is not None and variables(node.visible) for node in pattern.nodes):
        return f"{name} has a family of branches, whose pairs are not compared"
    if any(_reads_inputs(node.visible) for node in pattern.nodes):
        return f"{name} reads inputs: whether its pairs equal those of another pattern depends on them"
    sizes = [size for node in pattern.nodes for size in other_sizes(node.visible)]
    return f"{name} reads the size `{sizes[0]}`, which is decided by a call" if sizes else None


def _reads_inputs(condition: Index) -> bool:
    return any(isinstance(node, Lookup | DataRead) for node in walk(condition))


def _mask(relation: Index, n: int, border: int, head: int, heads: int, group: int) -> NDArray[np.bool_]:
    """Return the mask of a relation over `n` tokens, split into two documents before token `border` unless it is 0."""
    mask = np.zeros((n, n), dtype=np.bool_)
    for start, stop in ((0, border), (border, n)):
        count = stop - start
        if count:
            document = alone(relation, count, head, heads, group)
            mask[start:stop, start:stop] = exact_evaluation.mask(document, (0, count), (0, count))
    return mask
