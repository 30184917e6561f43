"""Quick bounds on the magnitudes of the numbers in an expression, without analysing boxes."""

from __future__ import annotations

from collections.abc import Mapping

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
            ends = [Magnitudes(places, variables).of(end) for end in (node.low, node.high)]
            if None in ends:
                return False
            variables[node.var] = max(variables.get(node.var, 0), *(end for end in ends if end is not None))
    return Magnitudes(places, variables).of(root) is not None


class Magnitudes:
    """Bounds below `limit` on the magnitudes of all numbers in an expression, for at most `places` queries and keys.

    `variables`: bounds of nodes that are known.
    """

    def __init__(self, places: int, variables: Mapping[Index, int], limit: int = LIMIT) -> None:
        self._places = places
        self._sizes = dict(variables)
        self._limit = limit

    def of(self, root: Index) -> int | None:
        """Return the bound of an expression, 0 for a condition; None where a number may reach the limit."""
        for node in root.below:
            if node in self._sizes or is_truth(node):
                continue
            size = self.leaf(node)
            size = self._compound(node) if size is None else size
            if size is None or size >= self._limit:
                return None
            self._sizes[node] = size
        return self._sizes.get(root, 0)

    def leaf(self, node: Index) -> int | None:
        """Return the bound of a number that is not computed from others; None for all other nodes."""
        match node:
            case Const():
                return abs(node.value)
            case Position() | Extent(name="queries" | "keys"):
                return self._places
            case _:
                return None

    def operation(self, node: Arith, operands: list[int]) -> int | None:
        """Return the bound of an operation by those of its operands; None for no bound."""
        if node.op == "pow":  # boxes bound powers
            return None
        return INTEGER_OPERATIONS[node.op].size(*operands)

    def _compound(self, node: Index) -> int | None:
        sizes = self._sizes
        match node:
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
            case Arith(op="floordiv", operands=(dividend, Const(value=divisor))) if divisor > 0:
                return sizes[dividend] // divisor + 1
            case Arith():
                return self.operation(node, [sizes[operand] for operand in node.operands])
            case _:
                return None
