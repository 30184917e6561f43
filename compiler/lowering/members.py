"""Members of a family that are selections by themselves: which are, aggregates over them, and units in units."""

from __future__ import annotations

from collections.abc import Sequence

from attnc.compiler import fold, ir, value_nodes
from attnc.compiler.ir import Index
from attnc.compiler.lowering import rational as exact
from attnc.compiler.lowering.lower_units import LinearUnit, UnitMembers
from attnc.compiler.lowering.lowered_operations import Lowered, as_index, as_number, as_value, counted
from attnc.compiler.lowering.rational import Number
from attnc.spec import program as checked
from attnc.spec.checks.measure import expressions_of_selection, selections_read

Term = tuple[Index, Lowered]
"""A condition, and what stands for it where it holds."""


def asked_through(name: str, selections: Sequence[checked.SelectionClauses]) -> set[str]:
    """The names of the selections that one asks, that those ask, and so on."""
    by_name = {item.name: item for item in selections}
    result, left = set[str](), {name}
    while left:
        asked = selections_read([expr for one in left for expr in expressions_of_selection(by_name[one])])
        left = asked - result
        result |= asked
    return result


def member_name(name: str, member: int, ranges: Sequence[range]) -> str:
    """Return the name of a family's member, `right[1, 2]`; `ranges` of several binders, the last the fastest."""
    numbers: list[int] = []
    for own in reversed(ranges):
        member, number = divmod(member, len(own))
        numbers.insert(0, own[number])
    return f"{name}[{', '.join(map(str, numbers or [member]))}]"


def joined(op: str, terms: Sequence[Term]) -> Lowered | None:
    """An aggregate of these terms; None for one that is not known here: sum, count, any and all are."""
    match op:
        case "any":
            return fold.disjunction(*(fold.conjunction(truth, as_index(body)) for truth, body in terms))
        case "all":
            return fold.conjunction(*(fold.disjunction(fold.negation(t), as_index(body)) for t, body in terms))
        case "sum" | "count":
            is_floating = any(value_nodes.is_value(body) or isinstance(body, float) for _, body in terms)
            return _floating_sum(terms) if is_floating else _exact_sum(terms)
        case _:
            return None


def _exact_sum(terms: Sequence[Term]) -> Number:
    total: Number = fold.const(0)
    for truth, body in terms:
        total = exact.add(total, exact.choice(truth, as_number(counted(body)), fold.const(0)))
    return total


def _floating_sum(terms: Sequence[Term]) -> ir.Value:
    total = value_nodes.number(0.0)
    for truth, body in terms:
        total = value_nodes.apply("add", total, value_nodes.select(truth, as_value(body), value_nodes.number(0.0)))
    return total


def divides(members: UnitMembers, other: UnitMembers) -> bool:
    """Whether each unit of the first kind lies in one of the second, both stretches that begin at token 0."""
    if not (isinstance(members.form, LinearUnit) and isinstance(other.form, LinearUnit)) or members.rows != other.rows:
        return False
    return members.form.shift == other.form.shift == 0 and other.form.size % members.form.size == 0


def size_of(members: UnitMembers) -> int:
    """The tokens of a unit that is a stretch."""
    assert isinstance(members.form, LinearUnit)
    return members.form.size
