"""The dependence of conditions on the place in a grid of tiles, so that equal boxes are analysed once.

`f(q + s, k + s) = f(q, k)` makes boxes on one diagonal alike; what reads one place only is alike along the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, lcm
from typing import Literal

from attnc.compiler.ir import (
    VALUES,
    Arith,
    Const,
    Coord,
    ExactSelect,
    Index,
    Linear,
    Position,
    Value,
    ValueReduce,
    Var,
    Vec,
)

Along = Literal["nothing", "rows", "columns", "diagonals", "both"]

MOST_STEPS = 16
"""Boxes are called alike along a diagonal if at most this many steps apart."""


@dataclass(frozen=True, slots=True)
class Dependence:
    """The differences between boxes. `step`: along diagonals, boxes this many apart are equal."""

    along: Along
    step: int = 1


def is_difference(value: Value | None) -> bool:
    """Whether a value's exact parts depend on `q - k` alone, so that it is the same along diagonals of pairs."""
    if value is None:
        return False
    dependences = Dependences()
    for node in value.below:
        if isinstance(node, VALUES):
            exact = [child for child in node.children() if not isinstance(child, VALUES)]
            growths = [dependences.growth(child) for child in exact]
            if isinstance(node, ValueReduce | Vec) or any(g is None or g.by or g.tokens > 1 for g in growths):
                return False
    return True


@dataclass(frozen=True, slots=True)
class Translation:
    """A node grows by `by` when both places grow by `tokens` (> 0), and so for their multiples."""

    by: int
    tokens: int

    def over(self, tokens: int) -> int:
        """How much it grows over a multiple of its tokens."""
        return self.by * (tokens // self.tokens)


class Dependences:
    """The dependences of a relation's conditions."""

    def __init__(self) -> None:
        self._places: dict[Index, frozenset[str]] = {}
        self._growths: dict[Index, Translation | None] = {}

    def of(self, node: Index, box: int | None) -> Dependence:
        """Return the dependence of a condition over square boxes of `box` tokens (None: the boxes are not square)."""
        read = self._read(node)
        if len(read) < 2:
            return Dependence("rows" if "q" in read else "columns" if "k" in read else "nothing")
        growth = self.growth(node)
        if box is None or growth is None or growth.by:
            return Dependence("both")
        step = growth.tokens // gcd(growth.tokens, box)
        return Dependence("diagonals", step) if step <= MOST_STEPS else Dependence("both")

    def _read(self, node: Index) -> frozenset[str]:
        if node not in self._places:
            own = {node.name} if isinstance(node, Position) else set()
            self._places[node] = frozenset(own).union(*map(self._read, node.children()))
        return self._places[node]

    def growth(self, node: Index) -> Translation | None:
        """How a node grows; None where that is not even. Truth values grow by 0 or not evenly."""
        if node not in self._growths:
            self._growths[node] = self._growth(node)
        return self._growths[node]

    def _growth(self, node: Index) -> Translation | None:
        match node:
            case Position():
                return Translation(1, 1)
            case Const() | Var():
                return _STILL
            case Linear():
                return _sum([(self.growth(term), factor) for term, factor in node.terms])
            case Coord():
                origin = _sum([(self.growth(node.position), 1), (self.growth(node.offset), -1)])
                value = _divided(origin, node.stride, "floordiv")
                return value if node.extent is None else _divided(value, node.extent, "mod")
            case Arith(op="floordiv" | "mod"):
                value = self.growth(node.operands[0])
                return _divided(value, node.operands[1], node.op) or self._of_operands(node)
            case Arith(op="min" | "max"):
                return _same([self.growth(operand) for operand in node.operands])
            case ExactSelect():
                sides = _same([self.growth(node.then), self.growth(node.otherwise)])
                condition = self.growth(node.condition)
                if sides is None or condition is None or condition.by:
                    return None
                return _sum([(sides, 1), (condition, 0)])
            case _:
                return self._of_operands(node)

    def _of_operands(self, node: Index) -> Translation | None:
        """A function of its operands does not change where they do not."""
        grown = [self.growth(child) for child in node.children()]
        return _sum([(g, 0) for g in grown]) if all(g is not None and g.by == 0 for g in grown) else None


_STILL = Translation(0, 1)


def _sum(terms: list[tuple[Translation | None, int]]) -> Translation | None:
    known = [(growth, factor) for growth, factor in terms if growth is not None]
    if len(known) < len(terms):
        return None
    tokens = lcm(*(growth.tokens for growth, _ in known))
    return Translation(sum(growth.over(tokens) * factor for growth, factor in known), tokens)


def _divided(value: Translation | None, divisor: Index, op: str) -> Translation | None:
    if value is None or not isinstance(divisor, Const) or divisor.value == 0:
        return None
    tokens = value.tokens * (abs(divisor.value) // gcd(value.by, divisor.value))
    return Translation(value.over(tokens) // divisor.value if op == "floordiv" else 0, tokens)


def _same(grown: list[Translation | None]) -> Translation | None:
    known = [growth for growth in grown if growth is not None]
    if len(known) < len(grown):
        return None
    tokens = lcm(*(growth.tokens for growth in known))
    by = {growth.over(tokens) for growth in known}
    return Translation(by.pop(), tokens) if len(by) == 1 else None
