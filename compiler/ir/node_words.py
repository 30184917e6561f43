"""The words for nodes of the IR in messages."""

from __future__ import annotations

from collections.abc import Mapping

from attnc.compiler import ir

_PLURALS: Mapping[type[ir.Node], str] = {
    ir.Contract: "products of matrices",
    ir.Diagonal: "`diag`",
    ir.Dot: "products of vectors",
    ir.ExactSelect: "conditional values",
    ir.Extent: "open extents",
    ir.Eye: "`eye`",
    ir.FloatSelect: "conditional values",
    ir.Outer: "`outer`",
    ir.Pick: "entries of vectors",
    ir.Ranking: "ranks of candidates",
    ir.Reduce: "aggregates",
    ir.RoundToInt: "rounded functions",
    ir.Solve: "`solve`",
    ir.StateAt: "states",
    ir.TableRead: "long tables",
    ir.UnitCondition: "rounding to blocks",
    ir.ValueReduce: "sums",
    ir.Vec: "vectors",
    ir.VectorPart: "`part`",
    ir.VisibleReduce: "sums over visible keys",
}


def plural(node: ir.Node) -> str:
    """Return the word for a node's kind, a plural noun or a function's name, such as "sums over visible keys"."""
    return _PLURALS.get(type(node), f"nodes `{type(node).__name__}`")
