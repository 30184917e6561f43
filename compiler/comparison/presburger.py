"""Equality of two relations at every length, by Presburger arithmetic.

Presburger arithmetic decides sums, quotients and remainders by constants, minima and comparisons. A condition becomes
two sets of points (n, q, k), where n is the number of tokens: the points where it holds, and the points where it does
not. A point where it has no value, because a table is read out of range, is in neither set. Two relations are equal if
no point is visible in one and hidden in the other; otherwise the first such point is found, by length, query and key.

Sets are represented by isl (`compiler.analysis.counted_isl`), which may not be installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from math import prod
from time import monotonic

from attnc.compiler.analysis.counted_isl import (
    SECONDS,
    CountedIsl,
    Pieces,
    Sets,
    UndecidedError,
)
from attnc.compiler.ir import (
    Arith,
    Bool,
    Compare,
    Const,
    Coord,
    ExactSelect,
    Extent,
    Index,
    Linear,
    Not,
    Position,
    Reduce,
    RoundToInt,
    TableRead,
    Truth,
    UnitCondition,
    fold,
    is_truth,
)
from attnc.compiler.ir.integer_operations import INTEGER_OPERATIONS
from attnc.compiler.ir.rewrite import rebuild, walk

CASES = 256
"""Maximum number of argument values for which a function is written as a list of cases."""

QUOTIENTS = 16
"""Maximum number of quotients by a length to distinguish, on each side of 0."""


@dataclass(frozen=True)
class TokenPair:
    """A query and a key among `length` tokens."""

    length: int
    q: int
    k: int


def first_point(one: Index, other: Index, conditions: Iterable[Index], seconds: float = SECONDS) -> TokenPair | None:
    """Find the first pair, by length, query and key, on which two relations differ; None where they are equal.

    The relations may read no size except `keys`, the number of tokens (`of_any_length`). Only lengths at which all
    `conditions` hold are compared. If time runs out, or a relation may be undefined at some pair, the result is some
    pair on which they differ, not necessarily the first. Requires islpy.

    Raises UndecidedError where the question is not decided within about `seconds`.
    """
    isl = CountedIsl(monotonic() + seconds)
    translation = _Translation(isl)
    for condition in conditions:
        translation.require(condition)
    if isl.step(translation.all.is_empty):
        raise UndecidedError("`require` refuses every length")
    (shown, hidden), (other_shown, other_hidden) = (translation.truth(relation) for relation in (one, other))
    point = isl.first(isl.made(lambda: shown.intersect(other_hidden).union(hidden.intersect(other_shown))))
    if point is not None:
        return TokenPair(*point)
    if translation.may_fail:
        for yes, no in ((shown, hidden), (other_shown, other_hidden)):
            if not isl.step(partial(translation.all.is_subset, isl.made(partial(yes.union, no)))):
                raise UndecidedError("divisors or table indices may be out of range")
    return None


class _Translation:
    """Translates expressions and conditions to isl, over the points (n, q, k) of all pairs at all lengths."""

    def __init__(self, isl: CountedIsl) -> None:
        self._calls = isl
        self._isl = isl.isl
        self.all: Sets = isl.isl.Set.read_from_str(isl.context, "{ [n, q, k] : 0 <= q < n and 0 <= k < n }")
        self.may_fail = False
        """Whether some expression may be undefined."""
        self._integers: dict[Index, Pieces] = {}
        self._truths: dict[Index, tuple[Sets, Sets]] = {}

    def require(self, condition: Index) -> None:
        """Restrict all further translations to lengths at which a condition holds."""
        self.all = self.truth(condition)[0]
        self._integers.clear()
        self._truths.clear()

    def truth(self, root: Index) -> tuple[Sets, Sets]:
        """Return the points where a condition holds, and the points where it does not."""
        for node in walk(root):
            if is_truth(node):
                if node not in self._truths:
                    self._truths[node] = self._calls.step(partial(self._sides, node))
            elif node not in self._integers:
                self._integers[node] = self._calls.made(partial(self._integer, node))
        return self._truths[root]

    # --- conditions ---

    def _sides(self, node: Index) -> tuple[Sets, Sets]:
        yes, no = self._truth(node)
        return self._calls.small(yes), self._calls.small(no)

    def _truth(self, node: Index) -> tuple[Sets, Sets]:
        match node:
            case Truth(value=value):
                empty = self._isl.Set.empty(self.all.get_space())
                return (self.all, empty) if value else (empty, self.all)
            case Compare(op="ge", value=value):
                return self._integers[value].nonneg_set(), self._integers[value].neg().pos_set()
            case Compare(value=value):
                return self._integers[value].zero_set(), self._integers[value].non_zero_set()
            case Not(operand=operand):
                yes, no = self._truths[operand]
                return no, yes
            case Bool(op="and", operands=operands):
                return self._conjunction([self._truths[operand] for operand in operands])
            case Bool(operands=operands):
                yes, no = self._conjunction([self._truths[operand][::-1] for operand in operands])
                return no, yes
            case ExactSelect(condition=condition, then=then, otherwise=otherwise):
                (yes, no), first, second = (self._truths[n] for n in (condition, then, otherwise))
                return (
                    yes.intersect(first[0]).union(no.intersect(second[0])),
                    yes.intersect(first[1]).union(no.intersect(second[1])),
                )
            case _:
                raise _beyond(node)

    def _conjunction(self, parts: list[tuple[Sets, Sets]]) -> tuple[Sets, Sets]:
        """Join conditions by `and`; a later condition is evaluated only where all earlier conditions hold."""
        yes, no = parts[0]
        for later_yes, later_no in parts[1:]:
            yes, no = self._calls.small(yes.intersect(later_yes)), self._calls.small(no.union(yes.intersect(later_no)))
        return yes, no

    # --- integers ---

    def _constant(self, value: int) -> Pieces:
        return self._isl.PwAff.val_on_domain(self.all, self._calls.value(value))

    def _place(self, position: int) -> Pieces:
        space = self._isl.LocalSpace.from_space(self.all.get_space())
        aff = self._isl.Aff.var_on_domain(space, self._isl.dim_type.set, position)
        return self._isl.PwAff.from_aff(aff).intersect_domain(self.all)

    def _times(self, value: Pieces, factor: int) -> Pieces:
        return value.scale_val(self._calls.value(factor))

    def _integer(self, node: Index) -> Pieces:
        match node:
            case Const(value=value):
                return self._constant(value)
            case Position(name=name):
                return self._place(1 if name == "q" else 2)
            case Extent(name="keys"):
                return self._place(0)
            case Linear(terms=terms, constant=constant):
                parts = [self._times(self._integers[term], factor) for term, factor in terms]
                return reduce(lambda a, b: self._calls.small(a.add(b)), parts, self._constant(constant))
            case ExactSelect(condition=condition, then=then, otherwise=otherwise):
                yes, no = self._truths[condition]
                first = self._integers[then].intersect_domain(yes)
                return first.union_add(self._integers[otherwise].intersect_domain(no))
            case Coord(position=position, offset=offset, stride=stride, extent=extent):
                moved = self._integers[position].sub(self._integers[offset])
                quotient = self._divided(moved, stride)[0]
                return quotient if extent is None else self._divided(quotient, extent)[1]
            case TableRead():
                return self._listed(node, (node.index,))
            case Arith():
                return self._arithmetic(node)
            case _:
                raise _beyond(node)

    def _arithmetic(self, node: Arith) -> Pieces:
        operands = [self._integers[operand] for operand in node.operands]
        match node.op:
            case "floordiv":
                return self._divided(operands[0], node.operands[1])[0]
            case "mod":
                return self._divided(operands[0], node.operands[1])[1]
            case "abs":
                return operands[0].max(operands[0].neg())
            case "min":
                return reduce(lambda a, b: self._calls.small(a.min(b)), operands)
            case "max":
                return reduce(lambda a, b: self._calls.small(a.max(b)), operands)
            case "mul":
                return self._product(node)
            case _:
                return self._listed(node, node.operands)

    def _product(self, node: Arith) -> Pieces:
        """Translate a product; supported where one factor has few values."""
        for factor, other in (node.operands, node.operands[::-1]):
            first, second = self._integers[factor], self._integers[other]
            if first.is_cst() or second.is_cst():
                return first.mul(second)
            if all(end.is_int() for end in (first.min_val(), first.max_val())):
                return self._listed(factor, (factor,)).mul(second)
        raise _beyond(node)

    def _divided(self, value: Pieces, divisor: Index) -> tuple[Pieces, Pieces]:
        """Return the quotient and the remainder."""
        if not isinstance(divisor, Const):
            return self._divided_by_length(value, self._integers[divisor])
        if divisor.value == 0:
            raise UndecidedError("a division by zero")
        sign = 1 if divisor.value > 0 else -1
        size = self._calls.value(abs(divisor.value))
        quotient = self._times(value, sign).scale_down_val(size).floor()
        return quotient, value.sub(self._times(quotient, divisor.value))

    def _divided_by_length(self, value: Pieces, divisor: Pieces) -> tuple[Pieces, Pieces]:
        """Divide by an expression, where it is at least 1 and the quotient is small."""
        self.may_fail = True
        positive = divisor.pos_set()
        value, divisor = value.intersect_domain(positive), divisor.intersect_domain(positive)
        quotient = rest = None
        for step in (1, -1):
            number, beyond = (0, value.nonneg_set()) if step > 0 else (-1, value.neg().pos_set())
            while abs(number) <= QUOTIENTS and not beyond.is_empty():
                above = self._calls.small(value.sub(self._times(divisor, number)))
                points = beyond.intersect(above.nonneg_set()).intersect(divisor.sub(above).pos_set())
                beyond = self._calls.small(beyond.subtract(points))
                case, remainder = self._constant(number).intersect_domain(points), above.intersect_domain(points)
                quotient = case if quotient is None else self._calls.small(quotient.union_add(case))
                rest = remainder if rest is None else self._calls.small(rest.union_add(remainder))
                number += step
        if quotient is None:
            raise UndecidedError("a division by zero")
        return quotient, rest

    def _listed(self, node: Index, arguments: tuple[Index, ...]) -> Pieces:
        """Write a function whose arguments have few values as a list of cases; an integer is listed by its value."""
        self.may_fail = True
        ranges = [self._range(node, argument) for argument in arguments]
        if prod(map(len, ranges)) > CASES:
            raise _beyond(node)
        listed = None
        for values in product(*ranges):
            result = fold.const(*values) if arguments == (node,) else rebuild(node, tuple(map(fold.const, values)))
            if not isinstance(result, Const):
                continue
            points = self.all
            for argument, value in zip(arguments, values, strict=True):
                points = points.intersect(self._integers[argument].sub(self._constant(value)).zero_set())
            piece = self._constant(result.value).intersect_domain(points)
            listed = piece if listed is None else self._calls.small(listed.union_add(piece))
        if listed is None:
            raise _beyond(node)
        return listed

    def _range(self, node: Index, argument: Index) -> range:
        """The values of a function's argument to list: all that it may have, or those within a table."""
        if isinstance(node, TableRead):
            return range(len(node.values))
        ends = [self._integers[argument].min_val(), self._integers[argument].max_val()]
        if not all(end.is_int() for end in ends):
            raise _beyond(node)
        return range(self._calls.number(ends[0]), self._calls.number(ends[1]) + 1)


_KINDS: Mapping[type, str] = {
    TableRead: "a long table",
    Reduce: "an aggregate",
    UnitCondition: "a rounding",
    RoundToInt: "a rounded function",
}
"""The words for expressions that are not operations."""


def _beyond(node: Index) -> UndecidedError:
    noun = "a function of many numbers"
    noun = INTEGER_OPERATIONS[node.op].noun if isinstance(node, Arith) else _KINDS.get(type(node), noun)
    return UndecidedError(f"{noun} is beyond Presburger arithmetic")
