"""Linear forms of the terms of a relation, as positions and the length move in large steps.

Let M be a common multiple of all divisors, F another number, and q = M·a + r, k = M·b + s, n = M·F·m + t. For given
remainders r, s, t every term of a relation is, case by case, `A·a + B·b + N·m + constant`. Forms are supported if
conditions compare only a, b, a - b or m with a constant and an integer multiple of m. The size of the constants tells
from where on a relation continues unchanged: `compiler.comparison.equality` and `compiler.growth.periods` prove it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from itertools import combinations, product
from math import gcd, lcm

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
    TableRead,
    Truth,
    is_truth,
)
from attnc.compiler.ir.integer_operations import INTEGER_OPERATIONS
from attnc.compiler.ir.rewrite import walk

MOST_FORMS = 64
"""Maximum number of cases of a term."""


class UnknownFormError(Exception):
    """Raised for a term or comparison that has no supported form."""


class StretchError(Exception):
    """Raised where the step of the length must be `by` times as large for a fraction of it to be an integer."""

    def __init__(self, by: int) -> None:
        super().__init__(by)
        self.by = by


def common_divisor(root: Index, most: int) -> int | None:
    """A step of positions that keeps quotients integers and remainders constant; None where it exceeds `most`."""
    needed: dict[Index, int] = {}
    fixed: set[Index] = set()
    """Nodes whose values do not change when positions move by the step."""
    for node in walk(root):
        inner = lcm(*(needed[child] for child in node.children())) if node.children() else 1
        divisor = _node_divisor(node, fixed)
        if divisor is None or inner * divisor > most:
            return None
        needed[node] = inner * divisor
        stops = (isinstance(node, Arith) and node.op == "mod") or (isinstance(node, Coord) and node.extent is not None)
        if stops or (not isinstance(node, Position | Extent) and all(child in fixed for child in node.children())):
            fixed.add(node)
    return needed[root]


def _node_divisor(node: Index, fixed: Container[Index]) -> int | None:
    """Return the divisor of a node's moving part; None where the divisor is not a positive constant."""
    match node:
        case Arith(op="floordiv" | "mod", operands=(value, divisor)):
            if not isinstance(divisor, Const) or divisor.value <= 0:
                return None
            return 1 if value in fixed else divisor.value
        case Coord(stride=stride, extent=extent):
            if not isinstance(stride, Const) or not (extent is None or isinstance(extent, Const)):
                return None
            return stride.value * (1 if extent is None else extent.value)
        case _:
            return 1


def largest_constant(root: Index, divisor: int, stretch: int = 0) -> int:
    """Return the largest constant with which a, b, a - b or m is compared, over all remainders.

    `stretch` is F; with 0 the relation must not read the length. Raises UnknownFormError, and StretchError where a, b
    or a - b is compared with a fraction of m that is not an integer.
    """
    return _TermForms(divisor, stretch).largest(root)


@dataclass(frozen=True, slots=True)
class _LinearForm:
    """The form `a · A + b · B + m · N + constant`, with |constant| ≤ `bound`."""

    a: int
    b: int
    n: int
    bound: int

    def plus(self, other: _LinearForm, factor: int = 1) -> _LinearForm:
        return _LinearForm(
            self.a + factor * other.a,
            self.b + factor * other.b,
            self.n + factor * other.n,
            self.bound + abs(factor) * other.bound,
        )

    @property
    def is_constant(self) -> bool:
        return not (self.a or self.b or self.n)


class _TermForms:
    """The forms that each term of a relation takes in its cases."""

    def __init__(self, divisor: int, stretch: int) -> None:
        self._divisor = divisor
        self._stretch = stretch
        self._known: dict[Index, frozenset[_LinearForm]] = {}
        self._largest = 0

    def largest(self, root: Index) -> int:
        for node in walk(root):
            match node:
                case Compare():
                    for form in self._known[node.value]:
                        self._compare(form)
                case Truth() | Bool() | Not():
                    pass
                case ExactSelect() if is_truth(node):
                    pass
                case _:
                    self._known[node] = frozenset(self._forms(node))
                    if len(self._known[node]) > MOST_FORMS:
                        raise UnknownFormError
        return self._largest

    def _compare(self, form: _LinearForm) -> None:
        if form.is_constant:
            return
        if form.a and form.b and form.a != -form.b:
            raise UnknownFormError
        factor = abs(form.a or form.b or form.n)
        if form.n % factor:
            raise StretchError(factor // gcd(form.n, factor))
        self._largest = max(self._largest, form.bound // factor + 1)

    def _forms(self, node: Index) -> Iterable[_LinearForm]:  # noqa: C901  one case a node kind
        match node:
            case Const(value=value):
                return [_LinearForm(0, 0, 0, abs(value))]
            case Position(name=name):
                return [_LinearForm(self._divisor * (name == "q"), self._divisor * (name == "k"), 0, self._divisor - 1)]
            case Extent(name="keys") if self._stretch:
                step = self._divisor * self._stretch
                return [_LinearForm(0, 0, step, step - 1)]
            case Linear(terms=terms, constant=constant):
                result = [_LinearForm(0, 0, 0, abs(constant))]
                for term, factor in terms:
                    result = [form.plus(other, factor) for form in result for other in self._known[term]]
                    if len(result) > MOST_FORMS:
                        raise UnknownFormError
                return result
            case ExactSelect(then=then, otherwise=otherwise):
                return self._known[then] | self._known[otherwise]
            case Coord(position=position, offset=offset, stride=Const(value=stride), extent=extent):
                moved = [p.plus(o, -1) for p in self._known[position] for o in self._known[offset]]
                quotients = [_divided(form, stride) for form in moved]
                return quotients if extent is None else [_rest(form, _size(extent)) for form in quotients]
            case TableRead(values=values, index=index):
                if all(form.is_constant for form in self._known[index]):
                    return [_LinearForm(0, 0, 0, max(map(abs, values), default=0))]
                raise UnknownFormError
            case Arith():
                return self._arithmetic(node)
            case _:
                raise UnknownFormError

    def _arithmetic(self, node: Arith) -> Iterable[_LinearForm]:
        operands = [self._known[operand] for operand in node.operands]
        match node.op:
            case "floordiv":
                return [_divided(form, _size(node.operands[1])) for form in operands[0]]
            case "mod":
                return [_rest(form, _size(node.operands[1])) for form in operands[0]]
            case "abs":
                for form in operands[0]:
                    self._compare(form)
                return [*operands[0], *(_LinearForm(-form.a, -form.b, -form.n, form.bound) for form in operands[0])]
            case "min" | "max":
                for forms, others in combinations(operands, 2):
                    for form, other in product(forms, others):
                        self._compare(form.plus(other, -1))
                return frozenset().union(*operands)
        bound = INTEGER_OPERATIONS[node.op].size(*(max(form.bound for form in forms) for forms in operands))
        if bound is None or not all(form.is_constant for forms in operands for form in forms):
            raise UnknownFormError
        return [_LinearForm(0, 0, 0, bound)]


def _size(node: Index) -> int:
    assert isinstance(node, Const)
    return node.value


def _divided(form: _LinearForm, divisor: int) -> _LinearForm:
    if form.a % divisor or form.b % divisor or form.n % divisor:
        raise UnknownFormError
    return _LinearForm(form.a // divisor, form.b // divisor, form.n // divisor, form.bound // divisor + 1)


def _rest(form: _LinearForm, divisor: int) -> _LinearForm:
    if form.a % divisor or form.b % divisor or form.n % divisor:
        raise UnknownFormError
    return _LinearForm(0, 0, 0, divisor - 1)
