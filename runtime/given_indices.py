"""Indices that a caller gives, under `strict`: lists of keys without duplicates, numbers of units below their bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from attnc.compiler import fold, ir
from attnc.compiler.rewrite import walk
from attnc.compiler.values import reads
from attnc.runtime.call import as_tensor
from attnc.runtime.errors import ArgumentError


def check_indices(pattern: ir.Pattern, inputs: Mapping[str, object], n_k: int) -> None:
    """Raise ArgumentError for indices that are out of range, and for duplicates in lists of keys.

    It looks at what inputs hold, for which the host waits; while a CUDA graph is captured nothing is looked at.
    """
    for tensor in pattern.tensors:
        if tensor.made is not None and tensor.made.count:
            _check_range(pattern, tensor.made.of, inputs, tensor.made.count, "units")
    for name in sorted({tensor.name for tensor in _lists_of_keys(pattern)}):
        _check_range(pattern, name, inputs, n_k, "keys")
        _check_distinct(pattern, name, inputs)


def _lists_of_keys(pattern: ir.Pattern) -> Iterator[ir.Tensor]:
    """The inputs of which an entry is a key: `any(kept[i] == k for i in n)`."""
    roots = [node.visible for node in pattern.nodes]
    roots += [root for item in pattern.selections for root in (item.candidates, item.always)]
    for node in (below for root in roots for below in walk(root)):
        if not (isinstance(node, ir.Reduce) and node.op == "any"):
            continue
        for equal in (below for below in walk(node.body) if isinstance(below, ir.Sign) and below.op == "eq"):
            terms = dict(fold.parts(equal.value)[0])
            keys = [term for term in terms if isinstance(term, ir.Place) and term.name == "k"]
            entries = [term for term in terms if isinstance(term, ir.Lookup) and term.indices[-1:] == (node.var,)]
            if len(terms) == 2 and keys and entries and not reads(entries[0]) - {"head", "batch"}:
                yield entries[0].tensor


def _tensor(inputs: Mapping[str, object], name: str) -> Tensor | None:
    value = inputs.get(name)
    if value is None or (isinstance(value, Tensor) and value.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return as_tensor(value)


def _check_range(pattern: ir.Pattern, name: str, inputs: Mapping[str, object], count: int, what: str) -> None:
    x = _tensor(inputs, name)
    if x is None or not x.numel():
        return
    x = x.long()
    outside = x[(x < 0) | (x >= count)]
    if outside.numel():
        raise ArgumentError(
            f"strict: the input `{name}` of `{pattern.name}` holds {int(outside[0])}, and {what} are numbered 0 to "
            f"{count - 1}; compile it without strict to ignore that"
        )


def _check_distinct(pattern: ir.Pattern, name: str, inputs: Mapping[str, object]) -> None:
    x = _tensor(inputs, name)
    if x is None or x.shape[-1] < 2:
        return
    found = x.sort(-1).values
    same = found[..., 1:] == found[..., :-1]
    if bool(same.any()):
        raise ArgumentError(
            f"strict: the input `{name}` of `{pattern.name}` holds {int(found[..., 1:][same][0])} twice in one list; "
            f"compile it without strict to ignore that"
        )


__all__ = ["check_indices"]
