"""Comparison of the visible pairs of two relations: a proof for every length where possible, else a search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from time import monotonic

from attnc.compiler.analysis.counted_isl import SECONDS, UndecidedError, is_available
from attnc.compiler.comparison import presburger
from attnc.compiler.comparison.equality import (
    MOST,
    Difference,
    deciding_length,
    difference_at,
    first_difference,
    reads_length,
)
from attnc.compiler.ir import Attend, Extent, HeadIndex, Index, RoundToInt, fold
from attnc.compiler.ir.rewrite import substitute, walk
from attnc.compiler.lowering.specialise import alone, of_any_length
from attnc.spec.errors import EvaluationError

LENGTHS = 160
"""Maximum length of the search where nothing is proved: all lengths up to this number."""

SHORT = 2048
"""Length of the search where the relations do not depend on the length."""


@dataclass(frozen=True)
class ComparisonAnswer:
    """Result of a comparison: a `witness` if the relations differ, else `how` far they are equal.

    `up_to`: None for a proof, else the number of tokens up to which pairs were compared.
    """

    witness: Witness | None
    how: str
    up_to: int | None = None


@dataclass(frozen=True)
class Witness:
    """A pair that is visible in one pattern only, in `head`, with `group` query heads per kv head."""

    pair: Difference
    head: int
    group: int


@dataclass(frozen=True)
class ComparisonQuestion:
    """Two relations over `heads` heads, compared where all conditions hold.

    `groups`: the numbers of query heads per kv head to compare.
    """

    relations: tuple[Index, Index]
    conditions: tuple[Index, ...]
    heads: int
    groups: tuple[int, ...]

    @property
    def whose(self) -> str:
        """The heads that an answer covers, as the end of a sentence."""
        shared = f", {' or '.join(map(str, self.groups))} to a kv head" if len(self.groups) > 1 else ""
        return "" if self.heads == 1 else f", for {self.heads} heads{shared}"

    @property
    def each(self) -> tuple[tuple[int, int], ...]:
        """Every pair of a head and a number of query heads per kv head."""
        return tuple((head, group) for group, head in product(self.groups, range(self.heads)))

    @property
    def reads_length(self) -> bool:
        """Whether a relation depends on the number of tokens."""
        whole = any(isinstance(node, RoundToInt) for relation in self.relations for node in walk(relation))
        return whole or any(map(reads_length, self.relations))

    def is_allowed(self, n: int, group: int) -> bool:
        """Check whether the conditions hold for `n` tokens and `group` query heads per kv head."""
        return all(alone(condition, n, 0, self.heads, group) is fold.truth(True) for condition in self.conditions)

    def allowed(self, n: int) -> tuple[tuple[int, int], ...]:
        """Return the entries of `each` for which the conditions hold for `n` tokens."""
        groups = [group for group in self.groups if self.is_allowed(n, group)]
        return tuple((head, group) for head, group in self.each if group in groups)


def compare(
    question: ComparisonQuestion, length: int | None = None, lengths: Sequence[int] | None = None
) -> ComparisonAnswer:
    """Compare the relations of a question.

    `length`: the only number of tokens that the patterns allow. `lengths`: the numbers of tokens to search, some of
    those that the patterns allow.

    Raises UndecidedError where `require` refuses all lengths of the search.
    """
    first, second = question.relations
    if first is second:
        return ComparisonAnswer(None, f"for every length: both have one normal form{question.whose}")
    if length is not None:
        return ComparisonAnswer(
            _differing(question, [length]), f"for {length:,} tokens, all pairs compared{question.whose}"
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
    """Compare the pairs of the length that decides all; None without such a length, or where `require` refuses it."""
    if question.reads_length:
        return None
    decides = [deciding_length(_alone(question, 1, *head_and_group)) for head_and_group in question.each]
    longest = max(n or MOST + 1 for n in decides)
    if longest > MOST:
        return None
    witness = _differing(question, [longest])
    if witness is not None and not question.is_allowed(longest, witness.group):
        return None
    return ComparisonAnswer(witness, f"for every length: the pairs of {longest:,} tokens decide{question.whose}")


def _by_arithmetic(question: ComparisonQuestion) -> ComparisonAnswer:
    """Prove equality with isl. Raises UndecidedError where no proof is found, or islpy is missing."""
    if not is_available():
        raise UndecidedError("`pip install 'attnc[proofs]'` may prove it for every length")
    until = monotonic() + SECONDS
    witnesses: list[Witness] = []
    undecided: UndecidedError | None = None
    compared = set()
    for head, group in question.each:
        nodes = tuple(
            of_any_length(node, head, question.heads, group) for node in (*question.relations, *question.conditions)
        )
        if nodes in compared:
            continue
        compared.add(nodes)
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
    """Return isl's witness, evaluated by the relations. Raises UndecidedError where they have no value for it."""
    try:
        pair = difference_at(*_alone(question, point.length, head, group), point.length, point.q, point.k)
    except EvaluationError:
        raise UndecidedError(f"{point.length:,} tokens make numbers that are too large") from None
    assert pair is not None, f"isl names {point}, on which the relations agree"
    return Witness(pair, head, group)


def _by_trying(question: ComparisonQuestion, why: str) -> ComparisonAnswer:
    """Search lengths one by one, where no proof is found."""
    rest = f"longer ones are not proved ({why}){question.whose}"
    longest = LENGTHS if question.reads_length else SHORT
    lengths = [n for n in range(1, longest + 1) if question.allowed(n)]
    if not lengths:
        for_heads = "" if question.heads == 1 else f" for {question.heads} heads"
        raise UndecidedError(f"`require` refuses all lengths up to {longest:,}{for_heads}")
    searched = "all lengths" if len(lengths) == longest else f"the {len(lengths)} lengths that `require` allows"
    # Relations that do not read the length have in the longest all pairs of the others.
    witness = _allowed_difference(question, lengths if question.reads_length else lengths[-1:])
    return ComparisonAnswer(witness, f"for {searched} up to {longest:,}; {rest}", longest)


def _by_grids(question: ComparisonQuestion, lengths: Sequence[int]) -> ComparisonAnswer:
    """Compare all pairs of some grids of tokens, one axis of which has its length decided by a call."""
    tried = [n for n in lengths if question.allowed(n)]
    if not tried:
        raise UndecidedError(f"`require` refuses all of {', '.join(map(str, lengths))} tokens")
    witness = _allowed_difference(question, tried)
    listed = ", ".join(map(str, tried))
    return ComparisonAnswer(witness, f"for {listed} tokens; other lengths are not compared{question.whose}", tried[-1])


def _allowed_difference(question: ComparisonQuestion, lengths: Iterable[int]) -> Witness | None:
    for n in lengths:
        witness = _first(question, n, question.allowed(n))
        if witness is not None:
            return witness
    return None


def _alone(question: ComparisonQuestion, n: int, head: int, group: int) -> tuple[Index, Index]:
    one, other = (alone(relation, n, head, question.heads, group) for relation in question.relations)
    return one, other


def _differing(question: ComparisonQuestion, lengths: list[int]) -> Witness | None:
    return next(
        (witness for witness in (_first(question, n, question.each) for n in lengths) if witness is not None), None
    )


def _first(question: ComparisonQuestion, n: int, heads_and_groups: Iterable[tuple[int, int]]) -> Witness | None:
    """Return the first difference for `n` tokens, over heads with their groups."""
    for head, group in heads_and_groups:
        difference = first_difference(*_alone(question, n, head, group), n)
        if difference is not None:
            return Witness(difference, head, group)
    return None


def of_tokens(node: Attend) -> Index | None:
    """Return the relation over tokens, a unit standing for its tokens; None where keys are not tokens."""
    if node.keys is None:
        return node.visible
    if node.key_of is None:
        return None
    return substitute(node.visible, {fold.place("k"): node.key_of})


def reads_groups(relation: Index) -> bool:
    """Check whether a relation depends on the number of query heads per kv head."""
    return reads_counts(relation) or any(
        isinstance(node, HeadIndex) and node.name == "kv_head" for node in walk(relation)
    )


def reads_counts(relation: Index) -> bool:
    """Check whether a relation depends on the number of heads."""
    return any(isinstance(node, Extent) and node.name in ("heads", "kv_heads", "group") for node in walk(relation))
