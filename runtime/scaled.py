"""Floating-point tensors with exponents of their own: what a quotient of large exponentials is computed with.

A value is `mantissa * exp(shift)`. The shift is a constant to autograd: whatever is added to it is taken from the
mantissa, so that gradients are those of the value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from attnc.runtime.asking import perhaps_any, surely_all


@dataclass(frozen=True)
class ScaledTensor:
    """`mantissa * exp(shift)`; both have the same number of dimensions, and broadcast."""

    mantissa: Tensor
    shift: Tensor

    def plain(self) -> Tensor:
        """The value itself."""
        return self.mantissa * torch.exp(self.shift)


Quantity = Tensor | ScaledTensor

SPARE = 60.0
"""By how much the exponent of a 0 may lie above the others': its value is 0 all the same, its gradient is not."""


def plain(value: Quantity) -> Tensor:
    """The value as a tensor."""
    return value.plain() if isinstance(value, ScaledTensor) else value


def exp(x: Tensor) -> ScaledTensor:
    """e^x."""
    shift = torch.where(x.isfinite(), x, 0).detach()
    return ScaledTensor(torch.exp(x - shift), shift)


def softplus(value: Tensor, x: Tensor) -> Quantity:
    """Return `value`, the softplus of x, with an exponent where it is subnormal: there it is e^x.

    The reciprocal of a subnormal sum overflows, so that gradients of weights divided by their sum would be NaN.
    """
    subnormal = (x < math.log(torch.finfo(x.dtype).tiny)) & (value > 0)
    if not perhaps_any(subnormal):
        return value
    shift = torch.where(subnormal, x, 0).detach()
    return ScaledTensor(torch.where(subnormal, torch.exp(x - shift), value), shift)


def log(x: ScaledTensor) -> Tensor:
    """The logarithm; of 0, -inf, without a gradient."""
    zero = x.mantissa == 0
    return torch.where(zero, -torch.inf, torch.log(torch.where(zero, 1, x.mantissa)) + x.shift)


def negative(x: ScaledTensor) -> ScaledTensor:
    """-x."""
    return ScaledTensor(-x.mantissa, x.shift)


def multiplied(a: Quantity, b: Quantity) -> Quantity:
    """a · b."""
    if not isinstance(a, ScaledTensor):
        return a * b if not isinstance(b, ScaledTensor) else ScaledTensor(a * b.mantissa, b.shift)
    if not isinstance(b, ScaledTensor):
        return ScaledTensor(a.mantissa * b, a.shift)
    return ScaledTensor(a.mantissa * b.mantissa, a.shift + b.shift)


def chained(a: Quantity, b: Quantity) -> Quantity:
    """a · b, but 0 where a is, also if b is no number. Without gradients."""
    product, zero = multiplied(a, b), (a.mantissa if isinstance(a, ScaledTensor) else a) == 0
    if isinstance(product, ScaledTensor):
        return ScaledTensor(torch.where(zero, 0, product.mantissa), product.shift)
    return torch.where(zero, 0, product)


def divided(a: Quantity, b: Quantity, *, share: bool = False) -> Quantity:
    """a / b; of a `share`, 0 / 0 is 0, without gradients."""
    top, low = (x.mantissa if isinstance(x, ScaledTensor) else x for x in (a, b))
    if share:
        nothing = (low == 0) & (top == 0)
        quotient = torch.where(nothing, 0, top / torch.where(nothing, torch.ones_like(low), low))
    else:
        quotient = top / low
    shifts = [x.shift if i == 0 else -x.shift for i, x in enumerate((a, b)) if isinstance(x, ScaledTensor)]
    return ScaledTensor(quotient, shifts[0] if len(shifts) == 1 else shifts[0] + shifts[1]) if shifts else quotient


def added(a: Quantity, b: Quantity) -> Quantity:
    """a + b."""
    if not isinstance(a, ScaledTensor) and not isinstance(b, ScaledTensor):
        return a + b
    parts = [
        x if isinstance(x, ScaledTensor) else ScaledTensor(x, torch.zeros_like(x, requires_grad=False)) for x in (a, b)
    ]
    shifts = [torch.where(p.mantissa.detach() == 0, -torch.inf, p.shift) for p in parts]
    most = torch.maximum(*shifts)
    most = torch.where(most.isfinite(), most, 0)
    first, second = (p.mantissa * torch.exp((p.shift - most).clamp(max=SPARE)) for p in parts)
    return ScaledTensor(first + second, most)


def chosen(condition: Tensor, then: Quantity, otherwise: Quantity) -> Quantity:
    """One of two values; what the other would be, however large, is gone."""
    if not isinstance(then, ScaledTensor) and not isinstance(otherwise, ScaledTensor):
        return torch.where(condition, then, otherwise)
    (top, up), (low, down) = _parts(then), _parts(otherwise)
    return ScaledTensor(torch.where(condition, top, low), torch.where(condition, up, down))


def _parts(value: Quantity) -> tuple[Tensor, Tensor]:
    if isinstance(value, ScaledTensor):
        return value.mantissa, value.shift
    return value, torch.zeros((1,) * value.ndim, dtype=value.dtype, device=value.device)


def contracted(factors: Sequence[Quantity], inside: Tensor, axis: int, extra: int) -> Quantity:
    """Σ over an axis of a product of factors where `inside`, which has all of the axis; the axis stays, of size 1.

    Factors have one number of dimensions, `extra` of them those of vectors, and broadcast; the product is not written
    out where two of them have it. Terms that a zero makes nothing have no say in the exponent; zeros in vectors do not
    count.
    """
    tensors = [f.mantissa if isinstance(f, ScaledTensor) else f for f in factors]
    shifts = [f.shift for f in factors if isinstance(f, ScaledTensor)]
    most: Tensor | None = None
    if shifts:
        shift = shifts[0]
        for other in shifts[1:]:
            shift = shift + other
        seen = torch.where(inside, shift, -torch.inf)
        for zero in [t.detach() == 0 for t in tensors]:
            alike = not extra or all(size == 1 for size in zero.shape[-extra:])
            if alike and zero.shape[axis] > 1 and perhaps_any(zero):
                seen = torch.where(zero, -torch.inf, seen)
        most = seen.amax(axis, keepdim=True)
        most = torch.where(most.isfinite(), most, 0)
        tensors.append(torch.exp((shift - most).clamp(max=SPARE)))
    result = _summed(_masked(tensors, inside), axis)
    return result if most is None else ScaledTensor(result, most)


def _masked(tensors: list[Tensor], inside: Tensor) -> list[Tensor]:
    """The factors, one of them 0 where nothing is inside: the one that grows least by it."""
    if surely_all(inside) and any(_numel(t, inside) == t.numel() for t in tensors):
        return tensors
    sizes = [_numel(t, inside) - t.numel() for t in tensors]
    i = sizes.index(min(sizes))
    masked = torch.where(inside, tensors[i], torch.zeros((), dtype=tensors[i].dtype, device=inside.device))
    return [*tensors[:i], masked, *tensors[i + 1 :]]


def _summed(tensors: list[Tensor], axis: int) -> Tensor:
    """Σ over an axis of a product."""
    tensors = sorted(tensors, key=Tensor.numel)
    while len(tensors) > 2:
        first, second, *rest = tensors
        tensors = sorted([first * second, *rest], key=Tensor.numel)
    if len(tensors) == 1:
        (only,) = tensors
        return only.sum(axis, keepdim=True)
    a, b = tensors
    axis %= a.ndim
    if a.shape[axis] != b.shape[axis] or _numel(a, b) <= max(a.numel(), b.numel()):
        return (a * b).sum(axis, keepdim=True)
    names = [chr(ord("a") + i) for i in range(a.ndim)]
    out = "".join(name for i, name in enumerate(names) if i != axis)
    return torch.einsum(f"{''.join(names)},{''.join(names)}->{out}", a, b).unsqueeze(axis)


def _numel(a: Tensor, b: Tensor) -> int:
    """Entries of what two tensors broadcast to."""
    return prod(max(m, n) for m, n in zip(a.shape, b.shape, strict=True))
