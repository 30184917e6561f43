"""The cost of a relation on a partial tile, in operations per score element, as kernels evaluate it.

An expression that reads one side only is a vector and costs nothing here; one that reads both is evaluated per pair.
"""

from __future__ import annotations

from attnc.compiler.ir import (
    VALUES,
    Apply,
    Arith,
    Attend,
    Bool,
    Compare,
    Const,
    Coord,
    DataRead,
    Index,
    Linear,
    Node,
    Position,
    Reduce,
    TableRead,
    Truth,
    Value,
)
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.ir.value_nodes import is_default
from attnc.compiler.simulation.gpu_clocks import BITMASK, Extra
from attnc.spec.number_functions import NUMBER_FUNCTIONS

DIVISION, LOOKUP = 4.0, 4.0
"""Operations of an integer division, and of a lookup in a table."""


def mask_operations(relation: Index) -> float:
    """Return the operations of a pair, including the choice between its score and -inf."""
    if isinstance(relation, Truth):
        return 1.0
    sides: dict[Index, frozenset[str]] = {}
    total = 1.0
    for node in walk(relation):  # children first
        own_side = frozenset({node.name}) if isinstance(node, Position) else frozenset()
        sides[node] = own_side.union(*(sides[child] for child in node.children()))
        if len(sides[node]) == 2:
            total += _operations(node, sides)
    return min(total, BITMASK)


def _operations(node: Index, sides: dict[Index, frozenset[str]]) -> float:
    """Return the operations of a node that reads both sides; `sides`: the positions that each node reads."""
    match node:
        case Compare(value=Linear() as sum_):
            return 1.0 + max(sum(len(sides[term]) == 2 for term, _ in sum_.terms) - 1, 0)
        case Linear():
            return 0.0 if all(len(sides[term]) < 2 for term, _ in node.terms) else float(len(node.terms) - 1)
        case Bool():
            return float(len(node.operands) - 1)
        case Arith() | Coord():
            return _arithmetic(node)
        case TableRead() | DataRead():
            return LOOKUP
        case Reduce():
            return BITMASK
        case _:
            return 1.0


def _arithmetic(node: Arith | Coord) -> float:
    match node:
        case Arith(op="floordiv" | "mod", operands=(_, Const(value=divisor))) if divisor & (divisor - 1) == 0:
            return 1.0
        case Arith(op="floordiv" | "mod") | Coord():
            return DIVISION
        case _:
            return float(max(len(node.operands) - 1, 1))


def extra_operations(node: Attend, relations: list[Index]) -> Extra:
    """Return the operations on an element besides the softmax of `scale * dot(q, k)`, for the costliest relation."""
    mask = max((mask_operations(relation) for relation in relations), default=0.0)
    if is_default(node.score):
        return Extra(mask)
    operations = [below for below in _values(node.score) if isinstance(below, Apply)]
    exps = sum(_is_transcendental(below.op) for below in operations)
    return Extra(mask, float(len(operations)), float(exps))


def _values(value: Value) -> list[Node]:
    return [node for node in value.below if isinstance(node, VALUES)]


def _is_transcendental(op: str) -> bool:
    function = NUMBER_FUNCTIONS.get(op)
    return function is not None and function.is_transcendental
