"""Whether a pattern shows only pairs of a relation, such as a model's own mask: proved or tried as in `same`."""

from __future__ import annotations

from dataclasses import dataclass

from attnc.compiler import fold
from attnc.compiler.counted_isl import UndecidedError
from attnc.compiler.ir import Bool, DataRead, Index, Lookup
from attnc.compiler.lowering.specialise import other_sizes
from attnc.compiler.rewrite import variables, walk
from attnc.runtime.attention import Attention
from attnc.runtime.comparing import ComparisonQuestion, Witness, compare, of_tokens
from attnc.runtime.lengths import natural_length


@dataclass(frozen=True)
class Outside:
    """A pair that a pattern may show and the relation does not; `witness` is None where nothing could be decided.

    `is_sure`: the pattern shows it whatever its inputs are.
    """

    witness: Witness | None
    why: str
    is_sure: bool = False


def outside(attend: Attention, relation: Index, heads: int, kv_heads: int) -> Outside | None:
    """Return a pair that the pattern may show outside a relation; None: no head shows one, at any length and input.

    What inputs and selections decide is taken to hold, so that a pattern that asks them besides is inside as well.
    """
    pattern = attend.pattern
    if attend.is_recurrence or pattern.stateful:
        return Outside(None, "a state has no pairs of queries and keys")
    conditions = tuple(root for root, _ in pattern.requirements if not (other_sizes(root) or _is_open(root)))
    for node in pattern.nodes:
        own = of_tokens(node)
        if own is None:
            return Outside(None, f"keys of `{node.name}` are no tokens")
        wide = _widened(own)
        if other_sizes(wide):
            return Outside(None, f"its pairs depend on the size `{other_sizes(wide)[0]}`")
        question = ComparisonQuestion((fold.conjunction(wide, relation), wide), conditions, heads, (heads // kv_heads,))
        try:
            answer = compare(question, natural_length(attend.bound))
        except UndecidedError as error:
            return Outside(None, str(error))
        if answer.witness is not None:
            return Outside(answer.witness, "", is_sure=wide is own)
    return None


def _widened(relation: Index) -> Index:
    """A relation that holds wherever this one does, whatever the inputs are."""
    if isinstance(relation, Bool):
        join = fold.conjunction if relation.op == "and" else fold.disjunction
        return join(*map(_widened, relation.operands))
    return fold.truth(True) if _is_open(relation) else relation


def _is_open(relation: Index) -> bool:
    """Whether it depends on more than positions, heads and sizes."""
    return bool(variables(relation)) or any(isinstance(node, Lookup | DataRead) for node in walk(relation))
