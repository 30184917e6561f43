"""Members of a family that become separate selections: which do, aggregates over them, and units within units."""

from __future__ import annotations

from collections.abc import Sequence

from attnc.compiler import ir
from attnc.compiler.ir import Index, fold, value_nodes
from attnc.compiler.lowering import rational as exact
from attnc.compiler.lowering.lower_units import LinearUnit, UnitMembers
from attnc.compiler.lowering.lowered_operations import Lowered, as_index, as_number, as_value, counted
from attnc.compiler.lowering.rational import Number
from attnc.spec import program as checked
from attnc.spec.checks.measure import expressions_of_selection, selections_read

Term = tuple[Index, Lowered]
"""A condition, and the term's value where the condition holds."""


def selections_read_through(name: str, selections: Sequence[checked.SelectionClauses]) -> set[str]:
    """The names of all selections that a selection reads, directly or through other selections."""
    by_name = {item.name: item for item in selections}
    result, new = set[str](), {name}
    while new:
        names = selections_read([expr for selection in new for expr in expressions_of_selection(by_name[selection])])
        new = names - result
        result |= names
    return result


def member_name(name: str, member: int, ranges: Sequence[range]) -> str:
    """Return the name of a family's member, `right[1, 2]`; `ranges`: one for each binder, the last changes fastest."""
    numbers: list[int] = []
    for numbers_of_binder in reversed(ranges):
        member, number = divmod(member, len(numbers_of_binder))
        numbers.insert(0, numbers_of_binder[number])
    return f"{name}[{', '.join(map(str, numbers or [member]))}]"


def joined(op: str, terms: Sequence[Term]) -> Lowered | None:
    """Return the aggregate of terms for sum, count, any and all; None for any other operator."""
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
    """Whether each unit of `members` lies in a unit of `other`; both must be stretches that begin at token 0."""
    if not (isinstance(members.form, LinearUnit) and isinstance(other.form, LinearUnit)) or members.rows != other.rows:
        return False
    return members.form.shift == other.form.shift == 0 and other.form.size % members.form.size == 0


def size_of(members: UnitMembers) -> int:
    """The number of tokens of a unit that is a stretch."""
    assert isinstance(members.form, LinearUnit)
    return members.form.size
