"""A quick bound on the magnitude of the numbers in an expression, without analysing boxes."""

from __future__ import annotations

from attnc.compiler.ir.integer_operations import INTEGER_OPERATIONS
from attnc.compiler.ir.nodes import (
    Arith,
    Const,
    Coord,
    ExactSelect,
    Extent,
    Index,
    Linear,
    Position,
    Reduce,
    TableRead,
    is_truth,
)

LIMIT = 1 << 60


def is_small(root: Index, places: int) -> bool:
    """Whether every number in an expression provably has magnitude below 2^60, for at most `places` queries and keys.

    False means only that this quick check cannot prove it.
    """
    variables: dict[Index, int] = {}
    for node in reversed(root.below):  # outer aggregates first: ends of inner ones may read their variables
        if isinstance(node, Reduce):
            ends = [_bound(end, places, variables) for end in (node.low, node.high)]
            if None in ends:
                return False
            variables[node.var] = max(variables.get(node.var, 0), *(end for end in ends if end is not None))
    return _bound(root, places, variables) is not None


def _bound(root: Index, places: int, variables: dict[Index, int]) -> int | None:
    """Bound the magnitude of an expression, given bounds of variables; None where a number may reach 2^60."""
    sizes = dict(variables)
    for node in root.below:
        if is_truth(node) or node in variables:
            continue
        size = _size(node, sizes, places)
        if size is None or size >= LIMIT:
            return None
        sizes[node] = size
    return sizes.get(root, 0)


def _size(node: Index, sizes: dict[Index, int], places: int) -> int | None:
    """Bound the magnitude of an integer by the bounds of its operands; None for kinds of node that are not handled."""
    match node:
        case Const():
            return abs(node.value)
        case Position() | Extent(name="queries" | "keys"):
            return places
        case TableRead():
            return max(map(abs, node.values), default=0)
        case Linear():
            return sum(abs(factor) * sizes[term] for term, factor in node.terms) + abs(node.constant)
        case Coord():
            return sizes[node.position] + sizes[node.offset] + 1
        case Reduce(op="sum"):
            return (sizes[node.low] + sizes[node.high]) * sizes[node.body]
        case Reduce():
            return sizes[node.body]
        case ExactSelect():
            return max(sizes[node.then], sizes[node.otherwise])
        case Arith(op=op) if op != "pow":  # boxes bound powers, whose exponents are seldom constants
            return INTEGER_OPERATIONS[op].size(*(sizes[operand] for operand in node.operands))
        case _:
            return None
