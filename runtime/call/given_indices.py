"""Checks of index inputs under `strict`: keys or blocks distinct within each list, unit numbers in range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import fold
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.ir.value_nodes import reads
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.call.tensor_checks import as_tensor


class _List(NamedTuple):
    """An input that holds lists of keys or blocks along `axis`; `place`: the expression compared with an entry.

    `place` is None where the expression depends on more than the key.
    """

    tensor: ir.Tensor
    axis: int
    place: ir.Index | None


def check_indices(pattern: ir.Pattern, inputs: Mapping[str, object], n_k: int) -> None:
    """Raise ArgumentError for indices that are out of range, and for duplicates in lists of keys or blocks.

    The check reads input data, for which the host waits; while a CUDA graph is captured nothing is checked.
    """
    for tensor in pattern.tensors:
        if tensor.made is not None and tensor.made.count:
            _check_range(pattern, tensor.made.of, inputs, (0, tensor.made.count - 1), "units are numbered")
    for list_input in dict.fromkeys(_lists(pattern)):
        name = list_input.tensor.name
        if list_input.place is not None:
            _check_range(pattern, name, inputs, _span(list_input.place, n_k), _numbered(list_input.place))
        _check_distinct(pattern, name, inputs, list_input.axis)


def _lists(pattern: ir.Pattern) -> Iterator[_List]:
    """Yield the inputs whose entries are keys or blocks: `any(kept[i] == k for i in n)`.

    Each query may have its own list: `any(kept[q

    block, i] == k

    block for i in n)`.
    """
    roots = [node.visible for node in pattern.nodes]
    roots += [root for item in pattern.selections for root in (item.candidates, item.always)]
    for node in (node for root in roots for node in walk(root)):
        if not (isinstance(node, ir.Reduce) and node.op == "any"):
            continue
        for equal in (part for part in walk(node.body) if isinstance(part, ir.Compare) and part.op == "eq"):
            terms, constant = fold.parts(equal.value)
            for entry, factor in terms:
                rest = fold.linear([(term, -n * factor) for term, n in terms if term is not entry], -constant * factor)
                if isinstance(entry, ir.Lookup) and abs(factor) == 1 and reads(rest) == {"k"}:
                    axes = [i for i, index in enumerate(entry.indices) if index is node.var]
                    others = [index for index in entry.indices if index is not node.var]
                    if len(axes) == 1 and not any("k" in reads(index) for index in others):
                        yield _List(entry.tensor, axes[0], rest if _is_of_keys(rest) else None)


def _span(place: ir.Index, n_k: int) -> tuple[int, int]:
    """Return the least and the largest number of a key."""
    numbers = exact_evaluation.integers(place, (0, 1), (0, n_k)) if n_k else None
    return (0, -1) if numbers is None else (int(numbers.min()), int(numbers.max()))


def _numbered(place: ir.Index) -> str:
    """Return the noun for the entries of this list."""
    if isinstance(place, ir.Arith) and place.op == "floordiv" and isinstance(place.operands[0], ir.Position):
        return "blocks are numbered"
    return "keys are numbered" if isinstance(place, ir.Position) else "keys compare only with"


def _is_of_keys(node: ir.Index) -> bool:
    """Check whether an expression depends on the key's position alone."""
    return all(isinstance(part, ir.Position | ir.Const | ir.Arith | ir.Linear) for part in node.below)


def _tensor(inputs: Mapping[str, object], name: str) -> Tensor | None:
    value = inputs.get(name)
    if value is None or (isinstance(value, Tensor) and value.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return as_tensor(value)


def _check_range(
    pattern: ir.Pattern, name: str, inputs: Mapping[str, object], span: tuple[int, int], what: str
) -> None:
    x = _tensor(inputs, name)
    if x is None or not x.numel():
        return
    x = x.long()
    outside = x[(x < span[0]) | (x > span[1])]
    if outside.numel():
        raise ArgumentError(
            f"strict: the input `{name}` of `{pattern.name}` holds {int(outside[0])}, and {what} {span[0]} to "
            f"{span[1]}; compile it without strict to ignore that"
        )


def _check_distinct(pattern: ir.Pattern, name: str, inputs: Mapping[str, object], axis: int) -> None:
    x = _tensor(inputs, name)
    if x is None or x.shape[axis] < 2:
        return
    entries = x.movedim(axis, -1).sort(-1).values
    same = entries[..., 1:] == entries[..., :-1]
    if bool(same.any()):
        raise ArgumentError(
            f"strict: the input `{name}` of `{pattern.name}` holds {int(entries[..., 1:][same][0])} twice in one list; "
            f"compile it without strict to ignore that"
        )


__all__ = ["check_indices"]
