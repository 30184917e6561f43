"""Products of token values (…, axes) over one axis of each, real or complex."""

from __future__ import annotations

import torch
from torch import Tensor

Side = tuple[int, int]
"""A value's number of axes, and the axis to sum over."""


def contracted(left: Tensor, right: Tensor, a_side: Side, b_side: Side, *, real: bool = False) -> Tensor:
    """Sum the product of two values over an axis of each; `real`: compute only the real part.

    Complex numbers are computed as pairs of real numbers where that saves products.
    """
    names = iter("abcdefgh")
    left_axes = [next(names) for _ in range(a_side[0])]
    right_axes = [next(names) for _ in range(b_side[0])]
    right_axes[b_side[1]] = left_axes[a_side[1]]
    shared = left_axes[a_side[1]]
    specs = ["".join(left_axes), "".join(right_axes)]
    out = "".join(x for x in left_axes + right_axes if x != shared)
    parts = [left, right]
    complex_sides = [side for side in (0, 1) if parts[side].is_complex()]
    if not complex_sides or (len(complex_sides) == 2 and not real):
        return torch.einsum(f"...{specs[0]},...{specs[1]}->...{out}", left, right)
    if len(complex_sides) == 2:  # Re (x y) = Re x Re y - Im x Im y
        parts[0] = parts[0].conj().resolve_conj()
    for side in complex_sides:
        parts[side], specs[side] = torch.view_as_real(parts[side]), f"{specs[side]}z"
    both_complex = len(complex_sides) == 2
    result = torch.einsum(f"...{specs[0]},...{specs[1]}->...{out}{'' if both_complex else 'z'}", *parts)
    if both_complex:
        return result
    complex_result = torch.view_as_complex(result.contiguous())
    return complex_result.real if real else complex_result


def dotted(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ a b over the last axis; one matrix product if one side is a vector that all tokens share."""
    for shared, varying in ((a, b), (b, a)):
        if shared.shape[2] == 1 and shared.shape[0] == 1 and varying.shape[2] > 1 and shared.dtype == varying.dtype:
            return (varying @ shared.transpose(2, 3))[..., 0]
    return (a * b).sum(-1)
