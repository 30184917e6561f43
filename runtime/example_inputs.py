"""Example values for the inputs of a pattern, for pictures and checks; each says what it is."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from attnc.runtime.errors import ArgumentError
from attnc.spec.meaning.evaluate import constant_value
from attnc.spec.program import BoundProgram, Expr, Input

DOCUMENTS = 3
SHOWN_TOGETHER = 8
"""A size of an input that has several of its own."""
OWN_SIZE = 3


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
    bound: BoundProgram,
    n_q: int,
    n_k: int,
    given: Mapping[str, object],
    *,
    batch: int = 1,
    heads: int = 1,
    sizes: Mapping[str, int] | None = None,
    names: Container[str] | None = None,
) -> dict[str, Example]:
    """An example for each input that is not given, of those of these `names`. `sizes` says others than the defaults.

    Ids of documents: three of nearly equal length; other integers by token: thirds of the sequence; a lone integer: a
    quarter of the keys; integers by query and key: their distance; booleans by token: every fourth; real numbers:
    random, within their refinement; a size that only an input shows: as many as there are keys, or 8 where some input
    shows it with another such one. In a recurrence vectors of a head's width have length 1, so that states stay
    bounded, and a size that only an input shows is 3. Raises ArgumentError for an input that has no such example.
    """
    known = {"batch": batch, "head": heads, "kv_head": heads, "query": n_q, "key": n_k, "token": n_k, **(sizes or {})}
    known = {**_shown_together(bound, known), **known}
    wanted = [i for i in bound.program.inputs if i.name not in given and (names is None or i.name in names)]
    return {i.name: _example(bound, i, known) for i in wanted}


def _shown_together(bound: BoundProgram, known: Mapping[str, int]) -> dict[str, int]:
    """Sizes that only inputs show, several in one: small ones, as their product counts."""
    found: set[str] = set()
    for item in bound.program.inputs:
        own = {dim for dim in item.type.dims if isinstance(dim, str) and dim not in (*known, "dk", "dv")}
        found |= own if len(own) > 1 and item.type.is_floating else set()
    return dict.fromkeys(found, SHOWN_TOGETHER) if bound.program.recurrence is None else {}


def _example(bound: BoundProgram, wanted: Input, sizes: Mapping[str, int]) -> Example:
    shape = []
    for dim in wanted.type.dims:
        if wanted.type.is_floating and isinstance(dim, str):
            shape.append(sizes.get(dim, max(sizes["key"], 1) if bound.program.recurrence is None else OWN_SIZE))
            continue
        if isinstance(dim, str) and dim not in sizes:
            raise _no_example(wanted)
        shape.append(
            dim if isinstance(dim, int) else sizes[dim] if isinstance(dim, str) else _constant_size(bound, dim)
        )
    if wanted.type.kind == "complex":
        return _complex(shape)
    if wanted.type.kind == "real":
        return _real(wanted, shape, of_length_1=bound.program.recurrence is not None)
    along = [axis for axis, dim in enumerate(wanted.type.dims) if dim in ("token", "key", "query")]
    if wanted.type.kind == "int" and wanted.type.dims[-2:] == ("query", "key"):
        apart = (torch.arange(sizes["query"])[:, None] - torch.arange(sizes["key"])[None]).abs()
        return Example(apart.expand(shape).contiguous(), "the distance of query and key")
    if len(along) > 1 or wanted.type.kind not in ("int", "bool"):
        raise _no_example(wanted)
    n = shape[along[0]] if along else sizes["key"]
    line, words = _line(bound, wanted, n) if along else _constant(wanted, n)
    view = [1] * len(shape)
    if along:
        view[along[0]] = n
    return Example(line.reshape(view).expand(shape).contiguous(), words)


def _constant_size(bound: BoundProgram, dim: object) -> int:
    value = constant_value(bound, cast("Expr", dim))
    assert isinstance(value, int)
    return value


def _real(wanted: Input, shape: list[int], *, of_length_1: bool) -> Example:
    """Random numbers, the same each time; `of_length_1`: vectors of a head's width, where they have one."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    match wanted.type.refinement:
        case "unit":
            return Example(normal.sigmoid(), "random numbers between 0 and 1")
        case "log_decay":
            return Example(-normal.abs(), "random numbers below 0")
        case "positive":
            return Example(normal.exp(), "random numbers above 0")
    if of_length_1 and wanted.type.dims[-1:] in (("dk",), ("dv",)):
        return Example(torch.nn.functional.normalize(normal, dim=-1), "random vectors of length 1")
    return Example(normal, "random numbers")


def _complex(shape: list[int]) -> Example:
    """Random numbers within the unit circle, so that states stay bounded."""
    draw = torch.Generator().manual_seed(0)
    length, angle = (torch.rand(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return Example(torch.polar(length.sqrt(), 2 * torch.pi * angle), "random complex numbers of less than 1")


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
