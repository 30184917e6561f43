"""Merging of partial attention results over disjoint parts of the keys, by their LSE."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.process.vector_math import settle

settle()

Part = tuple[Tensor, Tensor]


def merge(*parts: Part) -> Part:
    """Return (out, lse) of one softmax over the keys of all parts, from (out, lse) of each; differentiable.

    `out` (…, N, dv), `lse` (…, N) natural logarithm, as a call with `return_lse` gives them. No key may be in two
    parts, and an extra logit (a sink) must be in one part only. Where a row sees nothing of a part, that part has out 0
    and lse -inf; where it sees nothing of any part, so has the result. The computation runs in the dtype of the LSEs;
    out has the dtype of the first part's out.

        lse = log Σ exp(lseᵢ)        out = Σ exp(lseᵢ - lse) · outᵢ

    Raises ArgumentError, ArgumentTypeError.
    """
    _check(parts)
    lses = torch.stack([lse for _, lse in parts])
    lse_max = lses.detach().amax(0)
    lse_max = torch.where(lse_max == -torch.inf, 0, lse_max)
    weights = torch.exp(lses - lse_max)
    total = weights.sum(0)
    sees_nothing = total == 0
    divisor = torch.where(sees_nothing, 1, total)
    out = sum(w[..., None] * o.to(w.dtype) for w, (o, _) in zip(weights / divisor, parts, strict=True))
    lse = torch.where(sees_nothing, -torch.inf, torch.log(divisor) + lse_max)
    assert isinstance(out, Tensor)
    return out.to(parts[0][0].dtype), lse


def _check(parts: tuple[Part, ...]) -> None:
    if not parts:
        raise ArgumentError("merge needs at least one part (out, lse)")
    for part in parts:
        pair: object = part
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(x, Tensor) for x in pair)):
            raise ArgumentTypeError("merge takes pairs (out, lse), as a call with return_lse=True gives them")
    out, lse = parts[0]
    for other, of_other in parts:
        if other.shape != out.shape or of_other.shape != lse.shape or other.shape[:-1] != of_other.shape:
            raise ArgumentError(
                f"the parts of merge differ: out {tuple(out.shape)} and {tuple(other.shape)}, lse {tuple(lse.shape)} "
                f"and {tuple(of_other.shape)}; all must have the same rows, and lse is out without its last dimension"
            )
