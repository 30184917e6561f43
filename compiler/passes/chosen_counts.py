"""Counts of selected items, taken on the device that holds the truth tensors, so that the host need not read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from attnc.compiler.ir import ExactSelect, Index, Lookup, Ratio, Reduce, Selection, Tensor, Value, fold, intern
from attnc.compiler.ir.rewrite import aggregate, mentions, replace_values
from attnc.compiler.ir.value_nodes import apply, element, ratio
from attnc.compiler.passes.attentions import content_masks


def with_counts(item: Selection, selections: Sequence[Selection]) -> tuple[Selection, Mapping[Tensor, Tensor]]:
    """Replace every `chosen.size` in a selection by a read of a real input; also return the tensor that each counts."""
    places = {other.given: fold.extent("keys") if other.items is None else other.items for other in selections}
    counts: dict[Tensor, Tensor] = {}

    def counted(root: Value) -> Value:
        return replace_values(
            root, {n: _separate_counts(n, places, counts) for n in root.below if isinstance(n, Ratio)}
        )

    counted_item = (
        replace(item, score=counted(item.score), keep=counted(item.keep))
        if content_masks([item.score, item.keep])
        else item
    )
    return counted_item, counts


def _separate_counts(node: Ratio, places: Mapping[Tensor, Index], counts: dict[Tensor, Tensor]) -> Value:
    """Write a number as a floating-point sum with a separate summand for each count."""
    terms, constant = fold.parts(node.num)
    counted_terms = [(_count(term, places, counts), factor) for term, factor in terms]
    if not any(count for count, _ in counted_terms):
        return node
    rest = [(term, factor) for (term, factor), (count, _) in zip(terms, counted_terms, strict=True) if count is None]
    value = ratio(fold.linear(rest, constant), node.den)
    for count, factor in counted_terms:
        if count is not None:
            value = apply("add", value, apply("mul", ratio(fold.const(factor), node.den), count))
    return value


def _count(node: Index, places: Mapping[Tensor, Index], counts: dict[Tensor, Tensor]) -> Value | None:
    """Return the read that stands for the number of items that a selection selected; None for other nodes."""
    match node:
        case Reduce(op="sum", body=ExactSelect(condition=Lookup() as read)) if read.tensor in places:
            count_of_all = aggregate(
                "sum",
                node.var,
                fold.const(0),
                places[read.tensor],
                fold.truth(True),
                fold.choice(read, fold.const(1), fold.const(0)),
            )
            *row, last = read.indices
            if node is not count_of_all or last is not node.var or any(mentions(index, node.var) for index in row):
                return None
            tensor = intern(Tensor(f"{read.tensor.name}.size", "real", read.tensor.dims[:-1]))
            counts[tensor] = read.tensor
            return element(tensor, tuple(row))
        case _:
            return None
