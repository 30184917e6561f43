"""Whether two relations show the same pairs: proved for every length where that can be, or tried."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from time import monotonic

from attnc.compiler import fold, presburger
from attnc.compiler.counted_isl import SECONDS, UndecidedError, is_available
from attnc.compiler.equality import MOST, Difference, deciding_length, difference_at, first_difference, reads_length
from attnc.compiler.ir import Attend, Extent, HeadIndex, Index, RoundToInt
from attnc.compiler.lowering.specialise import alone, of_any_length
from attnc.compiler.rewrite import substitute, walk
from attnc.spec.errors import EvaluationError

LENGTHS = 160
"""Where nothing is proved, all lengths up to this are tried."""

SHORT = 2048
"""And this one, where the relations do not depend on it."""


@dataclass(frozen=True)
class ComparisonAnswer:
    """`witness`, if the relations differ; else `how` far they are equal.

    `up_to`: None where that is proved, else the number of tokens up to which pairs were looked at.
    """

    witness: Witness | None
    how: str
    up_to: int | None = None


@dataclass(frozen=True)
class Witness:
    """A pair that one pattern alone shows, in a head, `group` of which share a kv head."""

    pair: Difference
    head: int
    group: int


@dataclass(frozen=True)
class ComparisonQuestion:
    """Two relations of so many heads, `groups` of which may share a kv head, where all conditions hold."""

    relations: tuple[Index, Index]
    conditions: tuple[Index, ...]
    heads: int
    groups: tuple[int, ...]

    @property
    def whose(self) -> str:
        """Of which heads an answer is."""
        shared = f", {' or '.join(map(str, self.groups))} to a kv head" if len(self.groups) > 1 else ""
        return "" if self.heads == 1 else f", for {self.heads} heads{shared}"

    @property
    def each(self) -> tuple[tuple[int, int], ...]:
        """Every head, with how many of them share a kv head."""
        return tuple((head, group) for group, head in product(self.groups, range(self.heads)))

    @property
    def reads_length(self) -> bool:
        """Whether a relation depends on the number of tokens."""
        whole = any(isinstance(node, RoundToInt) for relation in self.relations for node in walk(relation))
        return whole or any(map(reads_length, self.relations))

    def is_allowed(self, n: int, group: int) -> bool:
        """Whether the conditions hold for `n` tokens and `group` heads to a kv head."""
        return all(alone(condition, n, 0, self.heads, group) is fold.truth(True) for condition in self.conditions)

    def allowed(self, n: int) -> tuple[tuple[int, int], ...]:
        """The entries of `each` for which the conditions hold among `n` tokens."""
        groups = [group for group in self.groups if self.is_allowed(n, group)]
        return tuple((head, group) for head, group in self.each if group in groups)


def compare(
    question: ComparisonQuestion, length: int | None = None, lengths: Sequence[int] | None = None
) -> ComparisonAnswer:
    """Compare the relations of a question.

    `length`: the only number of tokens that the patterns allow. `lengths`: the only ones to try, some of those that the
    patterns allow.

    Raises UndecidedError where `require` refuses all lengths that would be tried.
    """
    first, second = question.relations
    if first is second:
        return ComparisonAnswer(None, f"for every length: both have one normal form{question.whose}")
    if length is not None:
        return ComparisonAnswer(
            _differing(question, [length]), f"for {length:,} tokens, all pairs looked at{question.whose}"
        )
    if lengths is not None:
        return _by_grids(question, lengths)
    answer = _by_small_lengths(question)
    if answer is not None:
        return answer
    try:
        return _by_arithmetic(question)
    except UndecidedError as error:
        return _by_trying(question, str(error))


def _by_small_lengths(question: ComparisonQuestion) -> ComparisonAnswer | None:
    """By the pairs of the length that decides about all; None where there is none, or `require` does not allow it."""
    if question.reads_length:
        return None
    decides = [deciding_length(_alone(question, 1, *which)) for which in question.each]
    longest = max(n or MOST + 1 for n in decides)
    if longest > MOST:
        return None
    found = _differing(question, [longest])
    if found is not None and not question.is_allowed(longest, found.group):
        return None
    return ComparisonAnswer(found, f"for every length: the pairs of {longest:,} tokens decide{question.whose}")


def _by_arithmetic(question: ComparisonQuestion) -> ComparisonAnswer:
    """By proof with isl. Raises UndecidedError where there is none, or islpy is missing."""
    if not is_available():
        raise UndecidedError("`pip install 'attnc[proofs]'` may prove it for every length")
    until = monotonic() + SECONDS
    witnesses: list[Witness] = []
    undecided: UndecidedError | None = None
    asked = set()
    for head, group in question.each:
        nodes = tuple(
            of_any_length(node, head, question.heads, group) for node in (*question.relations, *question.conditions)
        )
        if nodes in asked:
            continue
        asked.add(nodes)
        try:
            point = presburger.first_point(nodes[0], nodes[1], nodes[2:], until - monotonic())
            witnesses += [] if point is None else [_confirmed(question, point, head, group)]
        except UndecidedError as error:
            undecided = error
    if witnesses:
        return ComparisonAnswer(min(witnesses, key=lambda witness: witness.pair.length), "")
    if undecided is not None:
        raise undecided
    allowed = " that `require` allows" if any(map(reads_length, question.conditions)) else ""
    return ComparisonAnswer(None, f"for every length{allowed}: Presburger arithmetic (isl) proves it{question.whose}")


def _confirmed(question: ComparisonQuestion, point: presburger.TokenPair, head: int, group: int) -> Witness:
    """What isl found, as the relations themselves have it. Raises UndecidedError where they have no value there."""
    try:
        pair = difference_at(*_alone(question, point.length, head, group), point.length, point.q, point.k)
    except EvaluationError:
        raise UndecidedError(f"{point.length:,} tokens make numbers too large") from None
    assert pair is not None, f"isl names {point}, on which the relations agree"
    return Witness(pair, head, group)


def _by_trying(question: ComparisonQuestion, why: str) -> ComparisonAnswer:
    """By lengths that are tried, for want of a proof."""
    rest = f"longer ones are not proved ({why}){question.whose}"
    most = LENGTHS if question.reads_length else SHORT
    lengths = [n for n in range(1, most + 1) if question.allowed(n)]
    if not lengths:
        among = "" if question.heads == 1 else f" for {question.heads} heads"
        raise UndecidedError(f"`require` refuses all lengths up to {most:,}{among}")
    of_all = "all lengths" if len(lengths) == most else f"the {len(lengths)} lengths that `require` allows"
    # Relations that do not read the length have in the longest all pairs of the others.
    found = _allowed_difference(question, lengths if question.reads_length else lengths[-1:])
    return ComparisonAnswer(found, f"for {of_all} up to {most:,}; {rest}", most)


def _by_grids(question: ComparisonQuestion, lengths: Sequence[int]) -> ComparisonAnswer:
    """Look at all pairs of some grids of tokens, one axis of which is as long as the call says."""
    tried = [n for n in lengths if question.allowed(n)]
    if not tried:
        raise UndecidedError(f"`require` refuses all of {', '.join(map(str, lengths))} tokens")
    found = _allowed_difference(question, tried)
    listed = ", ".join(map(str, tried))
    return ComparisonAnswer(found, f"for {listed} tokens; other lengths are not looked at{question.whose}", tried[-1])


def _allowed_difference(question: ComparisonQuestion, lengths: Iterable[int]) -> Witness | None:
    for n in lengths:
        found = _first(question, n, question.allowed(n))
        if found is not None:
            return found
    return None


def _alone(question: ComparisonQuestion, n: int, head: int, group: int) -> tuple[Index, Index]:
    one, other = (alone(relation, n, head, question.heads, group) for relation in question.relations)
    return one, other


def _differing(question: ComparisonQuestion, lengths: list[int]) -> Witness | None:
    return next((found for found in (_first(question, n, question.each) for n in lengths) if found is not None), None)


def _first(question: ComparisonQuestion, n: int, which: Iterable[tuple[int, int]]) -> Witness | None:
    """The first difference among `n` tokens, in some heads with their groups."""
    for head, group in which:
        found = first_difference(*_alone(question, n, head, group), n)
        if found is not None:
            return Witness(found, head, group)
    return None


def of_tokens(node: Attend) -> Index | None:
    """Return the relation over tokens, a unit standing for its tokens; None where keys are no tokens."""
    if node.keys is None:
        return node.visible
    if node.key_of is None:
        return None
    return substitute(node.visible, {fold.place("k"): node.key_of})


def reads_groups(relation: Index) -> bool:
    """Whether it depends on how many heads share a kv head."""
    return reads_counts(relation) or any(
        isinstance(node, HeadIndex) and node.name == "kv_head" for node in walk(relation)
    )


def reads_counts(relation: Index) -> bool:
    """Whether a relation depends on how many heads there are."""
    return any(isinstance(node, Extent) and node.name in ("heads", "kv_heads", "group") for node in walk(relation))
