"""Products of values of tokens, (…, axes): over one axis of each, complex numbers among them."""

from __future__ import annotations

import torch
from torch import Tensor

Side = tuple[int, int]
"""How many axes a value has, and over which of them it is summed."""


def contracted(left: Tensor, right: Tensor, a_side: Side, b_side: Side, *, real: bool = False) -> Tensor:
    """The sum over an axis of each; `real`: its real part alone.

    Complex numbers are taken as pairs of reals where that saves products.
    """
    names = iter("abcdefgh")
    a = [next(names) for _ in range(a_side[0])]
    b = [next(names) for _ in range(b_side[0])]
    b[b_side[1]] = a[a_side[1]]
    shared = a[a_side[1]]
    sides, out = ["".join(a), "".join(b)], "".join(x for x in a + b if x != shared)
    parts = [left, right]
    pairs = [side for side in (0, 1) if parts[side].is_complex()]
    if not pairs or (len(pairs) == 2 and not real):
        return torch.einsum(f"...{sides[0]},...{sides[1]}->...{out}", left, right)
    if len(pairs) == 2:  # Re (x y) = Re x Re y - Im x Im y
        parts[0] = parts[0].conj().resolve_conj()
    for side in pairs:
        parts[side], sides[side] = torch.view_as_real(parts[side]), f"{sides[side]}z"
    both = len(pairs) == 2
    result = torch.einsum(f"...{sides[0]},...{sides[1]}->...{out}{'' if both else 'z'}", *parts)
    if both:
        return result
    whole = torch.view_as_complex(result.contiguous())
    return whole.real if real else whole


def dotted(a: Tensor, b: Tensor) -> Tensor:
    """By one product with a vector that all tokens share, where one side is that."""
    for one, many in ((a, b), (b, a)):
        if one.shape[2] == 1 and one.shape[0] == 1 and many.shape[2] > 1 and one.dtype == many.dtype:
            return (many @ one.transpose(2, 3))[..., 0]
    return (a * b).sum(-1)


__all__ = ["contracted", "dotted"]
