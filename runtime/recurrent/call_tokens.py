"""The tensors of a recurrence call, token by token."""

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
    """One call: q (B, H, T, dk), k and v as they are given, or, once `computed`, one for each head of q.

    `inputs`: those that are not integers, by name. `before`: how many tokens came before these, of each batch entry or
    of all. `constants`: values that are known already, each of all tokens alike.
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
        """Batch, heads, tokens."""
        b, h, t, _ = self.q.shape
        return b, h, t

    @property
    def real(self) -> list[Tensor]:
        """q, k, v, the inputs that are not integers, and the constants."""
        return [self.q, self.k, self.v, *self.inputs.values(), *self.constants.values()]

    def having(self, real: Sequence[Tensor]) -> CallTokens:
        """Return the call with other tensors, in the order of `real`."""
        q, k, v, *rest = real
        inputs = dict(zip(self.inputs, rest, strict=False))
        constants = dict(zip(self.constants, rest[len(inputs) :], strict=True))
        return replace(self, q=q, k=k, v=v, inputs=inputs, constants=constants)

    def computed(self) -> CallTokens:
        """Return the call in fp32, or in fp64 for fp64 queries, with keys and values repeated for grouped heads."""
        dtype = computed_in(self.q.dtype)
        kinds = [dtype.to_complex() if x.is_complex() else dtype for x in self.real]
        q, k, v, *rest = (x.to(kind) for x, kind in zip(self.real, kinds, strict=True))
        if self.group > 1:
            k, v = k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        return self.having([q, k, v, *rest])


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of values, for queries of another."""
    return torch.float64 if dtype == torch.float64 else torch.float32


__all__ = ["CallTokens", "computed_in"]
