"""Cases of patterns with a dense reference of their output, for any shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnc import Attention, compile_attention
from cases.case import Case, Parts, Shape, Tensors, described, drawn, leaf, nothing, out_alone, with_lse

Dense = Callable[..., Any]
Mask = Callable[[Tensors], Tensor]


def square(n: int, **rest: int) -> Shape:
    """Return a shape with equal numbers of queries and keys."""
    return Shape(n, n, **{"dk": 4, "dv": 4, **rest})


LINES = (square(1), square(2), square(23), square(40, heads=3, kv_heads=3, batch=1))
FEWER = (Shape(1, 19, dk=4, dv=4), Shape(17, 30, batch=1, dk=4, dv=4))
WIDE = square(9, dk=3, dv=7)


@dataclass(frozen=True)
class System:
    """A pattern with parameters, its dense reference, its inputs for a shape, and shapes of its calls.

    `dense`: (q, k, v, scale = …, inputs) → out, or (out, lse) if `has_lse`. `mask`: a call's operands → visible pairs.
    `half`: whether torch can compute the formula in bf16 and fp16; else it is computed in fp32 and rounded.
    `aligned`: whether a call may have fewer queries than keys.
    """

    name: str
    dense: Dense
    shapes: Sequence[Shape]
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Shape], dict[str, Tensor]] = nothing
    mask: Mask | None = None
    has_lse: bool = False
    half: bool = True
    aligned: bool = True

    def __repr__(self) -> str:
        return described(self.name, self.params)

    def compiled(self, **options: Any) -> Attention:
        return compile_attention(self.name, **self.params, **options)

    def operands(self, shape: Shape, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Return q, k, v and the inputs; floating-point tensors require gradients."""
        return {name: leaf(x, dtype) for name, x in (drawn(shape) | self.inputs(shape)).items()}

    def cases(self) -> Iterator[Case]:
        """Yield a case for each shape."""

        def output(operands: Tensors) -> Parts:
            result = self.dense(**operands)
            return tuple(result) if self.has_lse else (result,)

        call = with_lse if self.has_lse else out_alone
        for shape in self.shapes:
            yield Case(self.name, shape, self.params, self.inputs, self.mask, output, call)


def scaled(reference: Callable[..., Tensor], **fixed: Any) -> Dense:
    """Wrap a reference that takes the scale."""

    def dense(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **inputs: Tensor) -> Tensor:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return reference(q, k, v, scale=factor, **fixed, **inputs)

    return dense


def unscaled(reference: Callable[..., Any], **fixed: Any) -> Dense:
    """Wrap a reference whose scores are unscaled or fix the scale to dk^-1/2."""

    def dense(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **inputs: Tensor) -> Any:
        return reference(q, k, v, **fixed, **inputs)

    return dense


def rows(mask: Callable[[int], Any]) -> Mask:
    """Return the last rows of the square mask (keys, keys), one for each query."""

    def found(operands: Tensors) -> Tensor:
        n_q, n_k = operands["q"].shape[2], operands["k"].shape[2]
        return torch.from_numpy(mask(n_k)[n_k - n_q :])[None, None]

    return found
