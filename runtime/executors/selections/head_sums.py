"""Sums over heads inside a score, reduced for all heads at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from attnc.compiler import ir
from attnc.compiler.ir import fold
from attnc.compiler.ir.rewrite import substitute, substitute_value
from attnc.compiler.ir.value_nodes import reads

if TYPE_CHECKING:
    from torch import Tensor

Heads = Literal["group", "all"]


@dataclass(frozen=True)
class HeadSum:
    """An aggregate over the heads of a group, or over all heads."""

    node: ir.ValueReduce
    over: Heads

    @cached_property
    def condition(self) -> ir.Index:
        """The condition, for the current head."""
        return substitute(self.node.condition, {self.node.var: fold.head_index("head")})

    @cached_property
    def term(self) -> ir.Value:
        """The term, for the current head."""
        return substitute_value(self.node.body, {self.node.var: fold.head_index("head")})

    @cached_property
    def free_of_rows(self) -> tuple[ir.Value, ...]:
        """The outermost aggregates of the term that depend on no row."""
        return tuple(free_of_rows(self.term))


def head_sums(root: ir.Value) -> Iterator[HeadSum]:
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
                yield HeadSum(node, over)
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


def free_of_rows(root: ir.Value) -> Iterator[ir.Value]:
    """Yield the outermost aggregates in a value that depend on no row."""
    seen = set[object]()
    pending: list[object] = [root]
    while pending:
        node = pending.pop()
        if node in seen or not isinstance(node, ir.VALUES):
            continue
        seen.add(node)
        free = "q" not in reads(node) and not any(isinstance(b, ir.Ranking | ir.VisibleReduce) for b in node.below)
        if free and any(isinstance(subexpression, ir.ValueReduce) for subexpression in node.below):
            yield node
        elif not isinstance(node, ir.ValueReduce | ir.VisibleReduce):
            pending.extend(node.children())


def summed(head_sum: HeadSum, terms: Tensor, group: int, heads: int, entries: int = 1) -> Tensor:
    """Reduce the terms of all query heads (Hq, …) for each of `heads` deciding heads; both counts include `entries`."""
    over = head_sum.over
    summed_at_once = group if over == "group" else len(terms) // entries
    grouped_terms = terms.reshape(-1, summed_at_once, *terms.shape[1:])
    fold_: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda x: x.sum(1),
        "max": lambda x: x.amax(1),
        "min": lambda x: x.amin(1),
    }
    reduced = fold_[head_sum.node.op](grouped_terms)
    if over == "group" and heads == terms.shape[0]:
        return reduced.repeat_interleave(group, 0)
    if over == "all" and entries > 1:
        return reduced.repeat_interleave(heads // entries, 0)
    return reduced


__all__ = ["HeadSum", "Heads", "free_of_rows", "head_sums", "summed"]
