"""An attention bound to its inputs, so that calls pass only q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor

from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.api.attention import Attention
from attnc.runtime.call.call_errors import ArgumentError


@dataclass(frozen=True)
class GivenAttention:
    """A pattern with its inputs: called like an `Attention`, but without inputs.

    `lengths`: the numbers of queries and keys that the inputs are for; None where any lengths fit the inputs.
    """

    attention: Attention
    inputs: Mapping[str, Any] = field(repr=False)
    lengths: tuple[int, int] | None = None

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute attention with the inputs. Raises as `Attention.__call__`, and ArgumentError for other lengths."""
        self._check_lengths(q.shape[2], k.shape[2])
        options: dict[str, Any] = {"scale": scale, "return_lse": return_lse, **self.inputs}
        result: Tensor | tuple[Tensor, Tensor] = self.attention(q, k, v, **options)
        return result

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Compute the call densely. Raises as `Attention.reference`, and ArgumentError for other lengths."""
        self._check_lengths(q.shape[2], k.shape[2])
        result: Tensor = self.attention.reference(q, k, v, scale=scale, dtype=dtype, **self.inputs)
        return result

    def mask(self, n_q: int, n_k: int | None = None, *, head: int = 0, heads: int | None = None) -> Tensor:
        """Return the mask for the inputs. Raises as `Attention.mask`, and ArgumentError for other lengths."""
        self._check_lengths(n_q, n_q if n_k is None else n_k)
        return self.attention.mask(n_q, n_k, head=head, heads=heads, **self.inputs)

    def plan(self, n_q: int, n_k: int | None = None, *, heads: int = 1, head_dim: int = 64) -> Plan:
        """Return the plan for the inputs. Raises as `Attention.plan`, and ArgumentError for other lengths."""
        self._check_lengths(n_q, n_q if n_k is None else n_k)
        return self.attention.plan(n_q, n_k, heads=heads, head_dim=head_dim, **self.inputs)

    def _check_lengths(self, n_q: int, n_k: int) -> None:
        if self.lengths is not None and (n_q, n_k) != self.lengths:
            expected = f"{self.lengths[0]} queries and {self.lengths[1]} keys"
            raise ArgumentError(
                f"the call has {n_q} queries and {n_k} keys, and the mask is for {expected}: make a new mask"
            )
