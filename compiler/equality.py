"""Whether two relations are equal: for every length where that can be proved, else for all lengths up to one.

The proof. Let M be a number that all divisors divide, q = M·a + r and k = M·b + s. For given remainders every term is
then a multiple of a, of b or of a - b, and a constant; a condition compares one of them with a constant of at most C.
Where a gap between 0, a and b is more than C + 1, it can be made that without a condition noticing. So a pair on which
two relations differ, if there is one, has one like it with a and b at most 2·(C + 1), and those are all looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations, product
from math import lcm, prod

import numpy as np

from attnc.compiler.analysis import exact
from attnc.compiler.ir import (
    Arith,
    Bool,
    Choice,
    Const,
    Coord,
    Extent,
    Index,
    Linear,
    Not,
    Place,
    Sign,
    TableRead,
    Truth,
    is_truth,
)
from attnc.compiler.rewrite import walk

MOST = 8192
"""Tokens up to which all pairs are looked at for a proof."""

ROWS_AT_ONCE = 1 << 22
"""Pairs that are looked at together."""

Relation = Callable[[int], Index]
"""The relation of a head among so many tokens, over local places."""


@dataclass(frozen=True)
class Difference:
    """A pair that one relation shows and the other does not, among `length` tokens; `first`: the first one does."""

    q: int
    k: int
    length: int
    first: bool


def deciding_length(relations: Iterable[Index]) -> int | None:
    """Tokens whose pairs decide whether relations are equal for every length; None where none is known.

    The relations are specialised and must not depend on the number of tokens.
    """
    roots = list(relations)
    divisor = 1
    for root in roots:
        found = _divisor(root)
        if found is None:
            return None
        divisor = lcm(divisor, found)
    try:
        largest = max(_Forms(divisor).largest(root) for root in roots)
    except _UnknownFormError:
        return None
    return divisor * (2 * (largest + 1) + 1)


def first_difference(one: Index, other: Index, n: int) -> Difference | None:
    """The first pair of n tokens on which two relations differ, by query and then key."""
    rows = max(1, ROWS_AT_ONCE // max(n, 1))
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        a, b = (exact.mask(relation, (start, stop), (0, n)) for relation in (one, other))
        places = np.argwhere(a != b)
        if len(places):
            q, k = (int(x) for x in places[0])
            return Difference(start + q, k, n, bool(a[q, k]))
    return None


def reads_length(relation: Index) -> bool:
    """Whether a relation depends on the number of tokens."""
    return any(isinstance(node, Extent) and node.name in ("queries", "keys") for node in walk(relation))


# --- what the proof needs --------------------------------------------------------------------------------------------


class _UnknownFormError(Exception):
    """A term that is no multiple of a, b or a - b and a constant."""


def _divisor(root: Index) -> int | None:
    """A number so that quotients stay whole, and remainders constant, when places move by it."""
    needed: dict[Index, int] = {}
    for node in walk(root):
        inner = lcm(*(needed[child] for child in node.children())) if node.children() else 1
        match node:
            case Arith(op="floordiv" | "mod", operands=(_, divisor)):
                if not isinstance(divisor, Const) or divisor.value <= 0:
                    return None
                inner *= divisor.value
            case Coord(stride=stride, extent=extent):
                if not isinstance(stride, Const) or not (extent is None or isinstance(extent, Const)):
                    return None
                inner *= stride.value * (1 if extent is None else extent.value)
            case _:
                pass
        if inner > MOST:
            return None
        needed[node] = inner
    return needed[root]


@dataclass(frozen=True)
class _Form:
    """`a · A + b · B + constant`, the constant at most `bound` in size."""

    a: int
    b: int
    bound: int

    def plus(self, other: _Form, factor: int = 1) -> _Form:
        return _Form(self.a + factor * other.a, self.b + factor * other.b, self.bound + abs(factor) * other.bound)

    @property
    def is_constant(self) -> bool:
        return not (self.a or self.b)


class _Forms:
    """The forms that the terms of a relation may have, each in some of its cases; places move by `divisor`."""

    def __init__(self, divisor: int) -> None:
        self._divisor = divisor
        self._known: dict[Index, frozenset[_Form]] = {}
        self._largest = 0

    def largest(self, root: Index) -> int:
        """The largest constant that a, b or a - b is compared with."""
        for node in walk(root):
            match node:
                case Sign():
                    for form in self._known[node.value]:
                        self._compare(form)
                case Truth() | Bool() | Not():
                    pass
                case Choice() if is_truth(node):
                    pass
                case _:
                    self._known[node] = frozenset(self._forms(node))
                    if len(self._known[node]) > 64:
                        raise _UnknownFormError
        return self._largest

    def _compare(self, form: _Form) -> None:
        if form.is_constant:
            return
        if form.a and form.b and form.a != -form.b:
            raise _UnknownFormError
        self._largest = max(self._largest, form.bound // abs(form.a or form.b) + 1)

    def _forms(self, node: Index) -> Iterable[_Form]:  # noqa: C901  one case a node kind
        match node:
            case Const(value=value):
                return [_Form(0, 0, abs(value))]
            case Place(name=name):
                return [_Form(self._divisor * (name == "q"), self._divisor * (name == "k"), self._divisor - 1)]
            case Linear(terms=terms, constant=constant):
                found = [_Form(0, 0, abs(constant))]
                for term, factor in terms:
                    found = [form.plus(other, factor) for form in found for other in self._known[term]]
                    if len(found) > 64:
                        raise _UnknownFormError
                return found
            case Choice(then=then, otherwise=otherwise):
                return self._known[then] | self._known[otherwise]
            case Coord(position=position, offset=offset, stride=Const(value=stride), extent=extent):
                moved = [p.plus(o, -1) for p in self._known[position] for o in self._known[offset]]
                quotients = [_divided(form, stride) for form in moved]
                return quotients if extent is None else [_rest(form, _size(extent)) for form in quotients]
            case TableRead(values=values, index=index):
                if all(form.is_constant for form in self._known[index]):
                    return [_Form(0, 0, max(map(abs, values), default=0))]
                raise _UnknownFormError
            case Arith():
                return self._arithmetic(node)
            case _:
                raise _UnknownFormError

    def _arithmetic(self, node: Arith) -> Iterable[_Form]:
        operands = [self._known[operand] for operand in node.operands]
        match node.op:
            case "floordiv":
                return [_divided(form, _size(node.operands[1])) for form in operands[0]]
            case "mod":
                return [_rest(form, _size(node.operands[1])) for form in operands[0]]
            case "abs":
                for form in operands[0]:
                    self._compare(form)
                return [*operands[0], *(_Form(-form.a, -form.b, form.bound) for form in operands[0])]
            case "min" | "max":
                for forms, others in combinations(operands, 2):
                    for form, other in product(forms, others):
                        self._compare(form.plus(other, -1))
                return frozenset().union(*operands)
            case op if op in ("mul", "bitlen", "isqrt") and all(f.is_constant for forms in operands for f in forms):
                most = prod(max(form.bound for form in forms) for forms in operands)
                return [_Form(0, 0, most + 1)]
            case _:
                raise _UnknownFormError


def _size(node: Index) -> int:
    assert isinstance(node, Const)
    return node.value


def _divided(form: _Form, divisor: int) -> _Form:
    if form.a % divisor or form.b % divisor:
        raise _UnknownFormError
    return _Form(form.a // divisor, form.b // divisor, form.bound // divisor + 1)


def _rest(form: _Form, divisor: int) -> _Form:
    if form.a % divisor or form.b % divisor:
        raise _UnknownFormError
    return _Form(0, 0, divisor - 1)
