"""The dependence of conditions on the position in a grid of tiles, so that equal boxes are analysed once.

`f(q + s, k + s) = f(q, k)` makes boxes on a diagonal equal; a condition on q alone makes boxes along a row equal, and a
condition on k alone boxes along a column.
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
"""Maximum number of boxes between equal boxes on a diagonal."""


@dataclass(frozen=True, slots=True)
class Dependence:
    """The sides of a box on which a condition depends. `step`: the distance between equal boxes on a diagonal."""

    along: Along
    step: int = 1


def is_difference(value: Value | None) -> bool:
    """Whether a value's exact parts depend on `q - k` alone, so that the value is constant along diagonals of pairs."""
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
    """The growth of a node: by `by` when q and k both grow by `tokens` > 0, and proportionally for multiples."""

    by: int
    tokens: int

    def over(self, tokens: int) -> int:
        """Return the growth over a multiple of `self.tokens`."""
        return self.by * (tokens // self.tokens)


class Dependences:
    """Finds the dependences of a relation's conditions."""

    def __init__(self) -> None:
        self._places: dict[Index, frozenset[str]] = {}
        self._growths: dict[Index, Translation | None] = {}

    def of(self, node: Index, box: int | None) -> Dependence:
        """Return the dependence of a condition over square boxes of `box` tokens (None: the boxes are not square)."""
        positions = self._read(node)
        if len(positions) < 2:
            return Dependence("rows" if "q" in positions else "columns" if "k" in positions else "nothing")
        growth = self.growth(node)
        if box is None or growth is None or growth.by:
            return Dependence("both")
        step = growth.tokens // gcd(growth.tokens, box)
        return Dependence("diagonals", step) if step <= MOST_STEPS else Dependence("both")

    def _read(self, node: Index) -> frozenset[str]:
        if node not in self._places:
            positions = {node.name} if isinstance(node, Position) else set()
            self._places[node] = frozenset(positions).union(*map(self._read, node.children()))
        return self._places[node]

    def growth(self, node: Index) -> Translation | None:
        """Return how evenly a node grows; None for uneven growth. Truth values grow by 0 or unevenly."""
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
                return _divided(value, node.operands[1], node.op) or self._function_growth(node)
            case Arith(op="min" | "max"):
                return _same([self.growth(operand) for operand in node.operands])
            case ExactSelect():
                sides = _same([self.growth(node.then), self.growth(node.otherwise)])
                condition = self.growth(node.condition)
                if sides is None or condition is None or condition.by:
                    return None
                return _sum([(sides, 1), (condition, 0)])
            case _:
                return self._function_growth(node)

    def _function_growth(self, node: Index) -> Translation | None:
        """The growth of a function of operands: 0 where no operand grows, else None."""
        grown = [self.growth(child) for child in node.children()]
        return _sum([(g, 0) for g in grown]) if all(g is not None and g.by == 0 for g in grown) else None


_STILL = Translation(0, 1)


def _sum(terms: list[tuple[Translation | None, int]]) -> Translation | None:
    growths = [(growth, factor) for growth, factor in terms if growth is not None]
    if len(growths) < len(terms):
        return None
    tokens = lcm(*(growth.tokens for growth, _ in growths))
    return Translation(sum(growth.over(tokens) * factor for growth, factor in growths), tokens)


def _divided(value: Translation | None, divisor: Index, op: str) -> Translation | None:
    if value is None or not isinstance(divisor, Const) or divisor.value == 0:
        return None
    tokens = value.tokens * (abs(divisor.value) // gcd(value.by, divisor.value))
    return Translation(value.over(tokens) // divisor.value if op == "floordiv" else 0, tokens)


def _same(grown: list[Translation | None]) -> Translation | None:
    growths = [growth for growth in grown if growth is not None]
    if len(growths) < len(grown):
        return None
    tokens = lcm(*(growth.tokens for growth in growths))
    by = {growth.over(tokens) for growth in growths}
    return Translation(by.pop(), tokens) if len(by) == 1 else None
