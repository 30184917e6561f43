"""How many places another selection chose, counted where truth tensors lie, so that the host reads none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from attnc.compiler import fold
from attnc.compiler.attentions import asked
from attnc.compiler.ir import ExactSelect, Index, Lookup, Ratio, Reduce, Selection, Tensor, Value, intern
from attnc.compiler.rewrite import replace_values
from attnc.compiler.value_nodes import apply, element, ratio


def with_counts(item: Selection, selections: Sequence[Selection]) -> tuple[Selection, Mapping[Tensor, Tensor]]:
    """The selection with `chosen.size` as elements of real inputs, and what is counted in each of these."""
    places = {other.given: fold.extent("keys") if other.items is None else other.items for other in selections}
    counts: dict[Tensor, Tensor] = {}

    def counted(root: Value) -> Value:
        return replace_values(root, {n: _apart(n, places, counts) for n in root.below if isinstance(n, Ratio)})

    own = replace(item, score=counted(item.score), keep=counted(item.keep)) if asked([item.score, item.keep]) else item
    return own, counts


def _apart(node: Ratio, places: Mapping[Tensor, Index], counts: dict[Tensor, Tensor]) -> Value:
    """A number whose counts are summands of their own, in floating point."""
    terms, constant = fold.parts(node.num)
    found = [(_count(term, places, counts), factor) for term, factor in terms]
    if not any(count for count, _ in found):
        return node
    rest = [(term, factor) for (term, factor), (count, _) in zip(terms, found, strict=True) if count is None]
    value = ratio(fold.linear(rest, constant), node.den)
    for count, factor in found:
        if count is not None:
            value = apply("add", value, apply("mul", ratio(fold.const(factor), node.den), count))
    return value


def _count(node: Index, places: Mapping[Tensor, Index], counts: dict[Tensor, Tensor]) -> Value | None:
    """The element that stands for a sum over all places of what was chosen; None for anything else."""
    match node:
        case Reduce(op="sum", body=ExactSelect(condition=Lookup() as read)) if read.tensor in places:
            whole = fold.reduce(
                "sum",
                node.var,
                fold.const(0),
                places[read.tensor],
                fold.truth(True),
                fold.choice(read, fold.const(1), fold.const(0)),
            )
            *before, last = read.indices
            if node is not whole or last is not node.var or any(fold.mentions(index, node.var) for index in before):
                return None
            tensor = intern(Tensor(f"{read.tensor.name}.size", "real", read.tensor.dims[:-1]))
            counts[tensor] = read.tensor
            return element(tensor, tuple(before))
        case _:
            return None
