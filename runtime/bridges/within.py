"""Decide whether a pattern shows only pairs of a relation, such as a model's own mask: by proof or trial, as `same`."""

from __future__ import annotations

from dataclasses import dataclass

from attnc.compiler.analysis.counted_isl import UndecidedError
from attnc.compiler.comparison.comparing import (
    ComparisonQuestion,
    Witness,
    compare,
    of_tokens,
)
from attnc.compiler.ir import Bool, DataRead, Index, Lookup, fold
from attnc.compiler.ir.rewrite import variables, walk
from attnc.compiler.lowering.specialise import other_sizes
from attnc.runtime.api.attention import Attention
from attnc.runtime.call.lengths import natural_length


@dataclass(frozen=True)
class Outside:
    """A pair that a pattern may show outside a relation; `witness` is None where this could not be decided.

    `why`: the reason why it could not be decided. `is_sure`: the pattern shows the pair whatever its inputs are.
    """

    witness: Witness | None
    why: str
    is_sure: bool = False


def outside(attend: Attention, relation: Index, heads: int, kv_heads: int) -> Outside | None:
    """Return a pair that the pattern may show outside a relation; None: no head shows one, at any length and input.

    Conditions on inputs and selections are assumed true, so that a pattern with such conditions in addition is inside
    as well.
    """
    pattern = attend.pattern
    if attend.is_recurrence or pattern.stateful:
        return Outside(None, "a state has no pairs of queries and keys")
    conditions = tuple(root for root, _ in pattern.requirements if not (other_sizes(root) or _is_open(root)))
    for node in pattern.nodes:
        token_relation = of_tokens(node)
        if token_relation is None:
            return Outside(None, f"the keys of `{node.name}` are not tokens")
        widened = _widened(token_relation)
        if other_sizes(widened):
            return Outside(None, f"its pairs depend on the size `{other_sizes(widened)[0]}`")
        question = ComparisonQuestion(
            (fold.conjunction(widened, relation), widened), conditions, heads, (heads // kv_heads,)
        )
        try:
            answer = compare(question, natural_length(attend.bound))
        except UndecidedError as error:
            return Outside(None, str(error))
        if answer.witness is not None:
            return Outside(answer.witness, "", is_sure=widened is token_relation)
    return None


def _widened(relation: Index) -> Index:
    """Return a relation that holds wherever the given one does, whatever the inputs are."""
    if isinstance(relation, Bool):
        join = fold.conjunction if relation.op == "and" else fold.disjunction
        return join(*map(_widened, relation.operands))
    return fold.truth(True) if _is_open(relation) else relation


def _is_open(relation: Index) -> bool:
    """Whether a relation depends on more than positions, heads and sizes."""
    return bool(variables(relation)) or any(isinstance(node, Lookup | DataRead) for node in walk(relation))
