"""Partial attention joined: parts of the keys, each by itself, merged by their LSE."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.runtime.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.vector_math import settle

settle()

Part = tuple[Tensor, Tensor]


def merge(*parts: Part) -> Part:
    """(out, lse) of one softmax over the keys of all parts, from (out, lse) of each; differentiable.

    `out` (…, N, dv), `lse` (…, N) natural logarithm, as a call with `return_lse` gives them. No key may be in two
    parts, and an extra logit (a sink) must be in one part only. A part of which a row sees nothing has out 0 and lse
    -inf; so has the result where that is so of all. Computed in the dtype of the LSEs; out in that of the first part's.

        lse = log Σ exp(lseᵢ)        out = Σ exp(lseᵢ - lse) · outᵢ

    Raises ArgumentError, ArgumentTypeError.
    """
    _check(parts)
    lses = torch.stack([lse for _, lse in parts])
    most = lses.detach().amax(0)
    most = torch.where(most == -torch.inf, 0, most)
    weights = torch.exp(lses - most)
    whole = weights.sum(0)
    blind = whole == 0
    divisor = torch.where(blind, 1, whole)
    out = sum(w[..., None] * o.to(w.dtype) for w, (o, _) in zip(weights / divisor, parts, strict=True))
    lse = torch.where(blind, -torch.inf, torch.log(divisor) + most)
    assert isinstance(out, Tensor)
    return out.to(parts[0][0].dtype), lse


def _check(parts: tuple[Part, ...]) -> None:
    if not parts:
        raise ArgumentError("merge needs at least one part: give (out, lse) of each")
    for part in parts:
        given: object = part
        if not (isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(x, Tensor) for x in given)):
            raise ArgumentTypeError("merge takes pairs (out, lse), as a call with return_lse=True gives them")
    out, lse = parts[0]
    for other, of_other in parts:
        if other.shape != out.shape or of_other.shape != lse.shape or other.shape[:-1] != of_other.shape:
            raise ArgumentError(
                f"the parts of merge differ: out {tuple(out.shape)} and {tuple(other.shape)}, lse {tuple(lse.shape)} "
                f"and {tuple(of_other.shape)}; all are of the same rows, and lse is out without its last dimension"
            )
