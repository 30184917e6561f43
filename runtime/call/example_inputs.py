"""Example values for the inputs of a pattern, for pictures and checks; each has a phrase that describes it."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from attnc.runtime.call.call_errors import ArgumentError
from attnc.spec.meaning.parameter_values import constant_value
from attnc.spec.program import BoundProgram, Expr, Input

if TYPE_CHECKING:
    from torch import Tensor

DOCUMENTS = 3
SHOWN_TOGETHER = 8
"""Default of a size that only inputs show, where one input has several such sizes."""
OWN_SIZE = 3


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """An example of an input, with a phrase that describes it. Real numbers are drawn by torch on access."""

    words: str
    array: NDArray[Any]
    """The values of an integer or bool input; for a real input zeros of its shape, which no relation reads."""
    draw: Callable[[], Tensor] | None = None

    @property
    def tensor(self) -> Tensor:
        """The example as a tensor."""
        if self.draw is not None:
            return self.draw()
        import torch  # may be missing

        return torch.from_numpy(self.array)


def head_count(bound: BoundProgram) -> int | None:
    """Return the number of heads that the parameters show, None where they show none."""
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
    """Return an example for each input that is not in `given`, limited to `names`; `sizes` overrides the defaults.

    Document ids: three documents of nearly equal length; other integers by token: thirds of the sequence; a lone
    integer: a quarter of the keys; integers by query and key: their distance; booleans by token: every fourth; real
    numbers: random, within their refinement. A size that only an input shows is the number of keys, or 8 where some
    input has several such sizes. In a recurrence vectors of a head's width have length 1, so that states stay bounded,
    and a size that only an input shows is 3. Raises ArgumentError for an input without such an example.
    """
    sizes_by_name = {
        "batch": batch,
        "head": heads,
        "kv_head": heads,
        "query": n_q,
        "key": n_k,
        "token": n_k,
        **(sizes or {}),
    }
    sizes_by_name = {**_shown_together(bound, sizes_by_name), **sizes_by_name}
    missing = [i for i in bound.program.inputs if i.name not in given and (names is None or i.name in names)]
    return {i.name: _example(bound, i, sizes_by_name) for i in missing}


def _shown_together(bound: BoundProgram, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return small defaults for sizes that only inputs show, several in one input: their product counts."""
    names: set[str] = set()
    for item in bound.program.inputs:
        unknown_dims = {dim for dim in item.type.dims if isinstance(dim, str) and dim not in (*sizes, "dk", "dv")}
        names |= unknown_dims if len(unknown_dims) > 1 and item.type.is_floating else set()
    return dict.fromkeys(names, SHOWN_TOGETHER) if bound.program.recurrence is None else {}


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
        queries, keys = (np.arange(sizes[side], dtype=np.int64) for side in ("query", "key"))
        apart = np.abs(queries[:, None] - keys)
        return Example("the distance of query and key", np.broadcast_to(apart, shape).copy())
    if len(along) > 1 or wanted.type.kind not in ("int", "bool"):
        raise _no_example(wanted)
    n = shape[along[0]] if along else sizes["key"]
    line, words = _line(bound, wanted, n) if along else _constant(wanted, n)
    view = [1] * len(shape)
    if along:
        view[along[0]] = n
    return Example(words, np.broadcast_to(line.reshape(view), shape).copy())


def _constant_size(bound: BoundProgram, dim: object) -> int:
    value = constant_value(bound, cast("Expr", dim))
    assert isinstance(value, int)
    return value


def _real(wanted: Input, shape: list[int], *, of_length_1: bool) -> Example:
    """Return random numbers, equal each time; `of_length_1`: normalise vectors of a head's width."""
    refinement = wanted.type.refinement
    long = of_length_1 and refinement is None and wanted.type.dims[-1:] in (("dk",), ("dv",))

    def draw() -> Tensor:
        import torch  # may be missing

        normal = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        match refinement:
            case "unit":
                return normal.sigmoid()
            case "log_decay":
                return -normal.abs()
            case "positive":
                return normal.exp()
        return torch.nn.functional.normalize(normal, dim=-1) if long else normal

    ranges = {"unit": "random numbers between 0 and 1", "log_decay": "random numbers below 0"}
    ranges["positive"] = "random numbers above 0"
    words = "random vectors of length 1" if long else "random numbers"
    return Example(words if refinement is None else ranges[refinement], _zeros(shape), draw)


def _complex(shape: list[int]) -> Example:
    """Return random numbers within the unit circle, so that states stay bounded."""

    def draw() -> Tensor:
        import torch  # may be missing

        generator = torch.Generator().manual_seed(0)
        length, angle = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        return torch.polar(length.sqrt(), 2 * torch.pi * angle)

    return Example("random complex numbers of less than 1", _zeros(shape), draw)


def _zeros(shape: list[int]) -> NDArray[np.float64]:
    return np.broadcast_to(np.zeros((), dtype=np.float64), shape)


def _line(bound: BoundProgram, wanted: Input, n: int) -> tuple[NDArray[Any], str]:
    """Return values along the tokens, and their description."""
    at = np.arange(n, dtype=np.int64)
    if wanted.type.kind == "bool":
        return at % 4 == 0, "true at every fourth token"
    count = max(1, min(DOCUMENTS, n))
    ids = at * count // max(n, 1)
    lengths = [f"{int((ids == i).sum()):,}" for i in range(count)]
    listed = " and ".join([", ".join(lengths[:-1]), lengths[-1]]) if count > 1 else lengths[0]
    what = "documents" if wanted is bound.program.documents else "equal segments"
    return ids, f"{count} {what} of {listed} tokens"


def _constant(wanted: Input, n: int) -> tuple[NDArray[Any], str]:
    if wanted.type.kind == "bool":
        return np.ones(1, dtype=np.bool_), "true"
    return np.full((1,), n // 4, dtype=np.int64), str(n // 4)


def _no_example(wanted: Input) -> ArgumentError:
    name = wanted.name
    return ArgumentError(
        f"the input `{name}: {wanted.type}` is missing, and such an input has no example: give `{name}`, on the "
        f"command line as --input {name}=…"
    )
