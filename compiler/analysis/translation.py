"""What a condition depends on along a grid of tiles: so that boxes on which it is the same are analysed once.

`f(q + s, k + s) = f(q, k)` makes boxes on one diagonal alike; what reads one place only is alike along the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnc.compiler.ir import (
    Arith,
    Bool,
    Choice,
    Const,
    Coord,
    Index,
    Linear,
    Not,
    Place,
    Var,
)

Along = Literal["nothing", "rows", "columns", "diagonals", "both"]

MOST_STEPS = 16
"""Translations by at most this many boxes are looked at."""


@dataclass(frozen=True, slots=True)
class Dependence:
    """What boxes differ by. `step`: along diagonals, boxes this many apart are alike."""

    along: Along
    step: int = 1


def places(node: Index, known: dict[Index, frozenset[str]]) -> frozenset[str]:
    """The places that a node reads."""
    if node not in known:
        own = {node.name} if isinstance(node, Place) else set()
        known[node] = frozenset(own).union(*(places(child, known) for child in node.children()))
    return known[node]


def dependence(node: Index, box: int | None, known: dict[Index, frozenset[str]]) -> Dependence:
    """What a condition depends on, over square boxes of `box` tokens (None: they are not square)."""
    read = places(node, known)
    if len(read) < 2:
        return Dependence("rows" if "q" in read else "columns" if "k" in read else "nothing")
    step = 1
    while box is not None and step <= MOST_STEPS:
        if growth(node, step * box, {}) == 0:
            return Dependence("diagonals", step)
        step *= 2
    return Dependence("both")


def growth(node: Index, tokens: int, known: dict[Index, int | None]) -> int | None:
    """By how much a node grows when both places do by `tokens`; None where that is not one number. Truths: 0 or None."""
    if node not in known:
        known[node] = _growth(node, tokens, known)
    return known[node]


def _growth(node: Index, tokens: int, known: dict[Index, int | None]) -> int | None:
    match node:
        case Place():
            return tokens
        case Const() | Var():
            return 0
        case Linear():
            grown = [(growth(term, tokens, known), factor) for term, factor in node.terms]
            return sum(g * f for g, f in grown if g is not None) if all(g is not None for g, _ in grown) else None
        case Coord():
            return _of_coordinate(node, tokens, known)
        case Arith(op="floordiv" | "mod"):
            value = growth(node.operands[0], tokens, known)
            return _divided(value, node.operands[1], node.op) if value else _of_others(node, tokens, known)
        case Arith(op="min" | "max"):
            return _same([growth(operand, tokens, known) for operand in node.operands])
        case Choice():
            if growth(node.condition, tokens, known) != 0:
                return None
            return _same([growth(node.then, tokens, known), growth(node.otherwise, tokens, known)])
        case _:
            return _of_others(node, tokens, known)


def _of_others(node: Index, tokens: int, known: dict[Index, int | None]) -> int | None:
    """A function of its operands does not change where they do not."""
    return 0 if all(growth(child, tokens, known) == 0 for child in node.children()) else None


def _of_coordinate(node: Coord, tokens: int, known: dict[Index, int | None]) -> int | None:
    position, offset = growth(node.position, tokens, known), growth(node.offset, tokens, known)
    if position is None or offset is None:
        return None
    value = _divided(position - offset, node.stride, "floordiv")
    return value if node.extent is None or value is None else _divided(value, node.extent, "mod")


def _divided(value: int, divisor: Index, op: str) -> int | None:
    if not isinstance(divisor, Const) or divisor.value == 0 or value % divisor.value:
        return None
    return value // divisor.value if op == "floordiv" else 0


def _same(values: list[int | None]) -> int | None:
    return values[0] if all(value == values[0] for value in values) else None


def operands_of(node: Index) -> tuple[Index, ...] | None:
    """The conditions that a junction or negation is made of; None for any other node."""
    if isinstance(node, Bool):
        return node.operands
    return (node.operand,) if isinstance(node, Not) else None
