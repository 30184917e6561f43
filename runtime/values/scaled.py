"""Floating-point tensors with a separate exponent, in which quotients of large exponentials stay finite.

A value is `mantissa * exp(shift)`. The shift is a constant to autograd: the mantissa is divided by the exponential of
whatever is added to the shift, so that gradients are those of the value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from attnc.runtime.call.asking import perhaps_any, surely_all


@dataclass(frozen=True)
class ScaledTensor:
    """The value `mantissa * exp(shift)`; both tensors have the same number of dimensions, and broadcast."""

    mantissa: Tensor
    shift: Tensor

    def plain(self) -> Tensor:
        """Return the value as one tensor."""
        return self.mantissa * torch.exp(self.shift)


Quantity = Tensor | ScaledTensor

SPARE = 60.0
"""Maximum excess of a zero term's exponent over the others'; the term stays 0, but its gradient needs the exponent."""


def plain(value: Quantity) -> Tensor:
    """Return the value as a tensor."""
    return value.plain() if isinstance(value, ScaledTensor) else value


def exp(x: Tensor) -> ScaledTensor:
    """Return e^x as mantissa and shift."""
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
    """Return the logarithm; -inf for 0, without a gradient."""
    zero = x.mantissa == 0
    return torch.where(zero, -torch.inf, torch.log(torch.where(zero, 1, x.mantissa)) + x.shift)


def negative(x: ScaledTensor) -> ScaledTensor:
    """Return -x."""
    return ScaledTensor(-x.mantissa, x.shift)


def multiplied(a: Quantity, b: Quantity) -> Quantity:
    """Return a · b."""
    if not isinstance(a, ScaledTensor):
        return a * b if not isinstance(b, ScaledTensor) else ScaledTensor(a * b.mantissa, b.shift)
    if not isinstance(b, ScaledTensor):
        return ScaledTensor(a.mantissa * b, a.shift)
    return ScaledTensor(a.mantissa * b.mantissa, a.shift + b.shift)


def chained(a: Quantity, b: Quantity) -> Quantity:
    """Return a · b, and 0 wherever a is 0, even if b is not finite. Not differentiable."""
    product, zero = multiplied(a, b), (a.mantissa if isinstance(a, ScaledTensor) else a) == 0
    if isinstance(product, ScaledTensor):
        return ScaledTensor(torch.where(zero, 0, product.mantissa), product.shift)
    return torch.where(zero, 0, product)


def divided(a: Quantity, b: Quantity, *, safe: bool = False) -> Quantity:
    """Return a / b. If `safe`, 0 / 0 is 0 without a gradient."""
    numerator, denominator = (x.mantissa if isinstance(x, ScaledTensor) else x for x in (a, b))
    if safe:
        zero = (denominator == 0) & (numerator == 0)
        quotient = torch.where(zero, 0, numerator / torch.where(zero, torch.ones_like(denominator), denominator))
    else:
        quotient = numerator / denominator
    shifts = [x.shift if i == 0 else -x.shift for i, x in enumerate((a, b)) if isinstance(x, ScaledTensor)]
    return ScaledTensor(quotient, shifts[0] if len(shifts) == 1 else shifts[0] + shifts[1]) if shifts else quotient


def added(a: Quantity, b: Quantity) -> Quantity:
    """Return a + b."""
    if not isinstance(a, ScaledTensor) and not isinstance(b, ScaledTensor):
        return a + b
    parts = [
        x if isinstance(x, ScaledTensor) else ScaledTensor(x, torch.zeros_like(x, requires_grad=False)) for x in (a, b)
    ]
    shifts = [torch.where(p.mantissa.detach() == 0, -torch.inf, p.shift) for p in parts]
    max_shift = torch.maximum(*shifts)
    max_shift = torch.where(max_shift.isfinite(), max_shift, 0)
    first, second = (p.mantissa * torch.exp((p.shift - max_shift).clamp(max=SPARE)) for p in parts)
    return ScaledTensor(first + second, max_shift)


def chosen(condition: Tensor, then: Quantity, otherwise: Quantity) -> Quantity:
    """Return `then` where the condition holds, else `otherwise`; an overflow in the side not taken has no effect."""
    if not isinstance(then, ScaledTensor) and not isinstance(otherwise, ScaledTensor):
        return torch.where(condition, then, otherwise)
    (then_mantissa, then_shift), (else_mantissa, else_shift) = _parts(then), _parts(otherwise)
    return ScaledTensor(
        torch.where(condition, then_mantissa, else_mantissa), torch.where(condition, then_shift, else_shift)
    )


def _parts(value: Quantity) -> tuple[Tensor, Tensor]:
    if isinstance(value, ScaledTensor):
        return value.mantissa, value.shift
    return value, torch.zeros((1,) * value.ndim, dtype=value.dtype, device=value.device)


def contracted(factors: Sequence[Quantity], inside: Tensor, axis: int, extra: int) -> Quantity:
    """Return Σ over an axis of a product of factors where `inside` holds; the axis stays, of size 1.

    `inside` spans the whole axis. All factors have the same number of dimensions, the last `extra` of which are vector
    or matrix dimensions, and broadcast; the product is not materialised where a matrix product of two factors gives
    the sum. Terms with a zero factor do not raise the exponent; zeros inside vectors are not tested.
    """
    tensors = [f.mantissa if isinstance(f, ScaledTensor) else f for f in factors]
    shifts = [f.shift for f in factors if isinstance(f, ScaledTensor)]
    max_shift: Tensor | None = None
    if shifts:
        shift = shifts[0]
        for other in shifts[1:]:
            shift = shift + other
        candidates = torch.where(inside, shift, -torch.inf)
        for zero in [t.detach() == 0 for t in tensors]:
            is_number = not extra or all(size == 1 for size in zero.shape[-extra:])
            if is_number and zero.shape[axis] > 1 and perhaps_any(zero):
                candidates = torch.where(zero, -torch.inf, candidates)
        max_shift = candidates.amax(axis, keepdim=True)
        max_shift = torch.where(max_shift.isfinite(), max_shift, 0)
        tensors.append(torch.exp((shift - max_shift).clamp(max=SPARE)))
    result = _summed(_masked(tensors, inside), axis)
    return result if max_shift is None else ScaledTensor(result, max_shift)


def _masked(tensors: list[Tensor], inside: Tensor) -> list[Tensor]:
    """Return the factors, with the factor that broadcasting enlarges least set to zero outside of the mask."""
    if surely_all(inside) and any(_numel(t, inside) == t.numel() for t in tensors):
        return tensors
    sizes = [_numel(t, inside) - t.numel() for t in tensors]
    i = sizes.index(min(sizes))
    masked = torch.where(inside, tensors[i], torch.zeros((), dtype=tensors[i].dtype, device=inside.device))
    return [*tensors[:i], masked, *tensors[i + 1 :]]


def _summed(tensors: list[Tensor], axis: int) -> Tensor:
    """Return Σ over an axis of the product of tensors."""
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
    """Return the number of entries of the shape that two tensors broadcast to."""
    return prod(max(m, n) for m, n in zip(a.shape, b.shape, strict=True))
