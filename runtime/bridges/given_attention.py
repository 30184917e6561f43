"""An attention with the inputs that every call of it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor

from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.attention import Attention
from attnc.runtime.call_errors import ArgumentError


@dataclass(frozen=True)
class GivenAttention:
    """A pattern and its inputs: called like an `Attention`, without them.

    `lengths`: queries and keys, where the inputs are of these alone; None: any that fit the inputs.
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
        """`Attention.__call__` with the inputs. Raises as that, and ArgumentError for other lengths."""
        self._check_lengths(q.shape[2], k.shape[2])
        given: dict[str, Any] = {"scale": scale, "return_lse": return_lse, **self.inputs}
        result: Tensor | tuple[Tensor, Tensor] = self.attention(q, k, v, **given)
        return result

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Compute the call densely. Raises as `Attention.reference`, and ArgumentError for other lengths."""
        self._check_lengths(q.shape[2], k.shape[2])
        result: Tensor = self.attention.reference(q, k, v, scale=scale, dtype=dtype, **self.inputs)
        return result

    def mask(self, n_q: int, n_k: int | None = None, *, head: int = 0, heads: int | None = None) -> Tensor:
        """`Attention.mask` with the inputs. Raises as that, and ArgumentError for other lengths."""
        self._check_lengths(n_q, n_q if n_k is None else n_k)
        return self.attention.mask(n_q, n_k, head=head, heads=heads, **self.inputs)

    def plan(self, n_q: int, n_k: int | None = None, *, heads: int = 1, head_dim: int = 64) -> Plan:
        """`Attention.plan` with the inputs. Raises as that, and ArgumentError for other lengths."""
        self._check_lengths(n_q, n_q if n_k is None else n_k)
        return self.attention.plan(n_q, n_k, heads=heads, head_dim=head_dim, **self.inputs)

    def _check_lengths(self, n_q: int, n_k: int) -> None:
        if self.lengths is not None and (n_q, n_k) != self.lengths:
            wanted = f"{self.lengths[0]} queries and {self.lengths[1]} keys"
            raise ArgumentError(f"there are {n_q} queries and {n_k} keys: the mask is for {wanted}; make one for these")
