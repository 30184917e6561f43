"""A quick bound on the magnitude of the numbers in an expression, without analysing boxes."""

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
    """Whether every number in an expression provably has magnitude below 2^60, for positions below `places`.

    False means only that this quick check cannot prove it.
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
    """Bound the magnitude of an integer by the bounds of its operands; None for kinds of node that are not handled."""
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
