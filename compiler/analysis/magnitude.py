"""A quick bound on how large the numbers of an expression get, without looking at boxes."""

from __future__ import annotations

from attnc.compiler.ir import (
    Arith,
    Bool,
    Compare,
    Const,
    Coord,
    ExactSelect,
    Index,
    Linear,
    Not,
    Position,
    Truth,
    is_truth,
)
from attnc.compiler.rewrite import walk

LIMIT = 1 << 60
_LOGIC = (Truth, Compare, Bool, Not)


def is_small(root: Index, places: int) -> bool:
    """Whether every number in an expression is surely below 2^60 in size, for places below `places`.

    False says only that this quick look does not show it.
    """
    sizes: dict[Index, int] = {}
    for node in walk(root):
        if isinstance(node, _LOGIC) or (isinstance(node, ExactSelect) and is_truth(node)):
            continue
        size = _size(node, sizes, places)
        if size is None or size >= LIMIT:
            return False
        sizes[node] = size
    return True


def _size(node: Index, sizes: dict[Index, int], places: int) -> int | None:
    """The largest absolute value that an integer may have; None for kinds that are not looked at."""
    match node:
        case Const():
            return abs(node.value)
        case Position():
            return places
        case Linear():
            return sum(abs(factor) * sizes[term] for term, factor in node.terms) + abs(node.constant)
        case Coord():
            return sizes[node.position] + sizes[node.offset] + 1
        case ExactSelect():
            return max(sizes[node.then], sizes[node.otherwise])
        case Arith(op="min" | "max" | "abs" | "floordiv" | "mod" | "bitlen"):
            return max(sizes[operand] for operand in node.operands) + 1
        case Arith(op="mul"):
            return sizes[node.operands[0]] * sizes[node.operands[1]]
        case _:
            return None
