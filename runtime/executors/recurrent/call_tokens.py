"""The tensors of a recurrence call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnc.compiler.ir import Index, Value
from attnc.compiler.lowering.specialise import CallSizes, Slices
from attnc.spec.source import Span


@dataclass(frozen=True)
class CallTokens:
    """The tensors of one call: q (B, H, T, dk); k and v with kv heads, or with one head per head of q once `computed`.

    `inputs`: the floating-point inputs by name. `before`: the number of tokens before the call, for each batch entry or
    one number for all. `constants`: precomputed values that are the same for all tokens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: Mapping[str, Tensor]
    sizes: CallSizes
    slices: Slices
    scale: float
    group: int
    origins: Mapping[Index, Span]
    before: tuple[int, ...] = (0,)
    constants: Mapping[Value, Tensor] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, int, int]:
        """The sizes (batch, heads, tokens)."""
        b, h, t, _ = self.q.shape
        return b, h, t

    @property
    def real(self) -> list[Tensor]:
        """The differentiable tensors: q, k, v, the floating-point inputs and the constants."""
        return [self.q, self.k, self.v, *self.inputs.values(), *self.constants.values()]

    def having(self, real: Sequence[Tensor]) -> CallTokens:
        """Return the call with its tensors replaced; `real` has the order of the property `real`."""
        q, k, v, *others = real
        inputs = dict(zip(self.inputs, others, strict=False))
        constants = dict(zip(self.constants, others[len(inputs) :], strict=True))
        return replace(self, q=q, k=k, v=v, inputs=inputs, constants=constants)

    def computed(self) -> CallTokens:
        """Return the call in fp32, or in fp64 for fp64 queries, with keys and values repeated for grouped heads."""
        dtype = computed_in(self.q.dtype)
        dtypes = [dtype.to_complex() if x.is_complex() else dtype for x in self.real]
        q, k, v, *others = (x.to(target) for x, target in zip(self.real, dtypes, strict=True))
        if self.group > 1:
            k, v = k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        return self.having([q, k, v, *others])


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values are computed for queries of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


__all__ = ["CallTokens", "computed_in"]
