"""Sums over heads inside a score, reduced for all heads at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from attnc.compiler import ir
from attnc.compiler.ir import fold
from attnc.compiler.ir.rewrite import substitute, substitute_value

if TYPE_CHECKING:
    from torch import Tensor

Heads = Literal["group", "all"]


def head_sums(root: ir.Value) -> Iterator[tuple[ir.ValueReduce, Heads]]:
    """Yield the outermost aggregates of a value that run over the heads of a group, or over all heads."""
    seen = set[object]()
    pending: list[object] = [root]
    while pending:
        node = pending.pop()
        if node in seen or not isinstance(node, ir.Node):
            continue
        seen.add(node)
        if isinstance(node, ir.ValueReduce):
            over = _over(node)
            if over is not None:
                yield node, over
            continue
        pending.extend(node.children())


def _over(node: ir.ValueReduce) -> Heads | None:
    group = fold.extent("group")
    first = fold.mul(fold.floordiv(fold.head_index("head"), group), group)
    if node.low is first and node.high is fold.add(first, group):
        return "group"
    if isinstance(node.low, ir.Const) and node.low.value == 0 and node.high is fold.extent("heads"):
        return "all"
    return None


def bind_current_head(node: ir.ValueReduce) -> tuple[ir.Index, ir.Value]:
    """Return the condition and the term of an aggregate over heads, for the current head."""
    head_of_variable: dict[ir.Index, ir.Index] = {node.var: fold.head_index("head")}
    return substitute(node.condition, head_of_variable), substitute_value(node.body, head_of_variable)


def summed(node: ir.ValueReduce, over: Heads, terms: Tensor, group: int, heads: int, entries: int = 1) -> Tensor:
    """Reduce the terms of all query heads (Hq, …) for each of `heads` deciding heads; both counts include `entries`."""
    summed_at_once = group if over == "group" else len(terms) // entries
    grouped_terms = terms.reshape(-1, summed_at_once, *terms.shape[1:])
    fold_: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda x: x.sum(1),
        "max": lambda x: x.amax(1),
        "min": lambda x: x.amin(1),
    }
    reduced = fold_[node.op](grouped_terms)
    if over == "group" and heads == terms.shape[0]:
        return reduced.repeat_interleave(group, 0)
    if over == "all" and entries > 1:
        return reduced.repeat_interleave(heads // entries, 0)
    return reduced


__all__ = ["Heads", "bind_current_head", "head_sums", "summed"]
