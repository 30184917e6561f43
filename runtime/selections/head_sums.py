"""Sums over heads inside of a score, taken for all heads at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from attnc.compiler import fold, ir
from attnc.compiler.rewrite import substitute, substitute_value

if TYPE_CHECKING:
    from torch import Tensor

Heads = Literal["group", "all"]


def head_sums(root: ir.Value) -> Iterator[tuple[ir.ValueReduce, Heads]]:
    """The outermost aggregates of a value that run over the heads of a group, or over all."""
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


def of_one_head(node: ir.ValueReduce) -> tuple[ir.Index, ir.Value]:
    """The condition and the term of the head at hand."""
    own: dict[ir.Index, ir.Index] = {node.var: fold.head_index("head")}
    return substitute(node.condition, own), substitute_value(node.body, own)


def summed(node: ir.ValueReduce, over: Heads, terms: Tensor, group: int, heads: int, entries: int = 1) -> Tensor:
    """The aggregate of terms of all query heads (Hq, …), for each of `heads` that decide; both over `entries`."""
    summed_at_once = group if over == "group" else len(terms) // entries
    own = terms.reshape(-1, summed_at_once, *terms.shape[1:])
    fold_: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda x: x.sum(1),
        "max": lambda x: x.amax(1),
        "min": lambda x: x.amin(1),
    }
    found = fold_[node.op](own)
    if over == "group" and heads == terms.shape[0]:
        return found.repeat_interleave(group, 0)
    if over == "all" and entries > 1:
        return found.repeat_interleave(heads // entries, 0)
    return found


__all__ = ["Heads", "head_sums", "of_one_head", "summed"]
