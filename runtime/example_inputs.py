"""Example values for the integer and boolean inputs of a pattern, for pictures and checks; each says what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.runtime.errors import ArgumentError
from attnc.spec.program import BoundProgram, Input

DOCUMENTS = 3


@dataclass(frozen=True, slots=True)
class Example:
    """A tensor and a phrase about it."""

    tensor: Tensor
    words: str


def head_count(bound: BoundProgram) -> int | None:
    """The number of heads that the parameters say, None where they do not."""
    values = (bound.values[p.name] for p in bound.program.parameters if p.per_head)
    return next((len(value) for value in values if isinstance(value, tuple)), None)


def example_inputs(
    bound: BoundProgram, n_q: int, n_k: int, given: Mapping[str, object], *, batch: int = 1, heads: int = 1
) -> dict[str, Example]:
    """An example for each input that is not given.

    Ids of documents: three of nearly equal length; other integers by token: thirds of the sequence; a lone integer: a
    quarter of the keys; booleans by token: every fourth. Raises ArgumentError for an input that has no such example.
    """
    sizes = {"batch": batch, "head": heads, "kv_head": heads, "query": n_q, "key": n_k, "token": n_k}
    return {i.name: _example(bound, i, sizes) for i in bound.program.inputs if i.name not in given}


def _example(bound: BoundProgram, wanted: Input, sizes: Mapping[str, int]) -> Example:
    shape = []
    for dim in wanted.type.dims:
        if not isinstance(dim, int) and dim not in sizes:
            raise _no_example(wanted)
        shape.append(dim if isinstance(dim, int) else sizes[str(dim)])
    along = [axis for axis, dim in enumerate(wanted.type.dims) if dim in ("token", "key", "query")]
    if len(along) > 1 or wanted.type.kind not in ("int", "bool"):
        raise _no_example(wanted)
    n = shape[along[0]] if along else sizes["key"]
    line, words = _line(bound, wanted, n) if along else _constant(wanted, n)
    view = [1] * len(shape)
    if along:
        view[along[0]] = n
    return Example(line.reshape(view).expand(shape).contiguous(), words)


def _line(bound: BoundProgram, wanted: Input, n: int) -> tuple[Tensor, str]:
    """Values along the tokens."""
    at = torch.arange(n)
    if wanted.type.kind == "bool":
        return at % 4 == 0, "true at every fourth token"
    count = max(1, min(DOCUMENTS, n))
    ids = at * count // max(n, 1)
    lengths = [f"{int((ids == i).sum()):,}" for i in range(count)]
    listed = " and ".join([", ".join(lengths[:-1]), lengths[-1]]) if count > 1 else lengths[0]
    what = "documents" if wanted is bound.program.documents else "equal stretches"
    return ids, f"{count} {what} of {listed} tokens"


def _constant(wanted: Input, n: int) -> tuple[Tensor, str]:
    if wanted.type.kind == "bool":
        return torch.ones(1, dtype=torch.bool), "true"
    return torch.full((1,), n // 4), str(n // 4)


def _no_example(wanted: Input) -> ArgumentError:
    name = wanted.name
    return ArgumentError(
        f"the input `{name}: {wanted.type}` is missing, and no example is made of such an input: give `{name}`, on the "
        f"command line as --input {name}=…"
    )
