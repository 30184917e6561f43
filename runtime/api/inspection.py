"""Inspection of a compiled pattern before anything runs: masks, selections, plans, kernel texts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.api.compiled import CompiledAttention
from attnc.runtime.call.arguments import CallArguments, read_call
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.call.call_shapes import dtype_name
from attnc.runtime.call.device_targets import named_target
from attnc.runtime.call.lengths import natural_length
from attnc.runtime.call.tensor_checks import FLOATS, TensorSizes, check_are_tensors, check_counts, finite
from attnc.runtime.executors.executor_protocol import SourceRequest
from attnc.runtime.executors.registry import executor_named, executor_of_plans
from attnc.runtime.pictures.picture_limits import check_mask_size


class Inspection:
    """Masks, plans and texts of one form of a compiled pattern."""

    def __init__(self, compiled: CompiledAttention) -> None:
        self._compiled = compiled

    def mask(
        self,
        lengths: tuple[int, int | None],
        heads: tuple[int, int | None, int | None],
        vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
        inputs: Mapping[str, object],
    ) -> Tensor:
        """Return the visible pairs as `Attention.mask` does; `heads`: the head, the numbers of heads and kv heads."""
        compiled, (n_q, n_k), (head, n_heads, n_kv_heads) = self._compiled, lengths, heads
        compiled._refuse_states("mask")
        check_mask_size(n_q, n_q if n_k is None else n_k)
        if compiled.pattern.selections:
            return self._mask_of_chosen(n_q, n_q if n_k is None else n_k, head, vectors, inputs)
        sizes = compiled._sizes(n_q, n_k, n_heads, n_kv_heads, inputs, at_least=head + 1)
        _check_head(head, sizes)
        batched = any("batch" in tensor.dims for tensor in compiled.pattern.tensors)
        entries = range(sizes.batch if batched else 1)
        masks = [torch.from_numpy(compiled._visible(sizes, inputs, batch, head)) for batch in entries]
        return torch.stack(masks) if batched else masks[0]

    def _mask_of_chosen(
        self,
        n_q: int,
        n_k: int,
        head: int,
        vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
        inputs: Mapping[str, object],
    ) -> Tensor:
        """Return the visible pairs of a call, (batch, Nq, Nk)."""
        name, (q, k, v) = self._compiled.name, vectors
        if q is None or k is None:
            selection = self._compiled.pattern.selections[0].name
            raise ArgumentError(f"mask: the selection `{selection}` of `{name}` depends on content; pass `q` and `k`")
        if (q.shape[2], k.shape[2]) != (n_q, n_k):
            raise ArgumentError(f"mask: q has {q.shape[2]} and k {k.shape[2]} tokens, not {n_q} and {n_k}")
        call, chosen = self._chosen(q, k, k if v is None else v, None, inputs)
        _check_head(head, call.sizes)
        attentions = self._compiled.parts.attentions
        assert attentions is not None
        all_inputs = {**call.inputs, **chosen}
        return torch.stack([attentions.mask(call.sizes, all_inputs, b, head) for b in range(call.sizes.batch)])

    def chosen(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """Return the result of each selection in a call, as `Attention.chosen` does."""
        return self._chosen(q, k, v, scale, inputs)[1]

    def _chosen(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]
    ) -> tuple[CallArguments, dict[str, Tensor]]:
        """Return a call, and the results of its selections."""
        name, pattern, attentions = self._compiled.name, self._compiled.pattern, self._compiled.parts.attentions
        if not pattern.selections:
            raise ArgumentError(f"`{name}` has no selection: nothing is chosen by content")
        if pattern.documents is not None or "cu_seqlens" in inputs:
            raise UnsupportedError(
                f"selections of `{name}` within documents are not supported: pass each document separately"
            )
        assert attentions is not None
        check_are_tensors(q, k, v)
        call = read_call(pattern, q, k, v, None if scale is None else finite(scale), inputs)
        with torch.no_grad():
            return call, attentions.chosen(call, executor_named("cpu"))

    def plan(self, sizes: TensorSizes, device: torch.device | str | None, inputs: Mapping[str, object]) -> Plan:
        """Return the plan of a call on a device. Raises as `Attention.plan`."""
        executor = executor_of_plans(self._compiled.requested, device)
        return executor.plan(self._compiled.planner, sizes, inputs)

    def source(
        self, target: str | None, head_dim: int, dtype: torch.dtype, inputs: Mapping[str, object]
    ) -> dict[str, str]:
        """Return the Triton text of every kernel, as `Attention.source` does."""
        compiled = self._compiled
        check_counts(1, head_dim=head_dim)
        check_dtype(dtype)
        tokens = natural_length(compiled.bound, head_dim) or head_dim
        sizes = compiled._sizes(tokens, None, None, None, inputs, head_dim=head_dim, dtype=dtype_name(dtype))
        request = SourceRequest(compiled.bound, named_target(target), sizes, dtype, inputs)
        return executor_named("triton").source(compiled.planner, request)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ArgumentTypeError for a dtype that is not a floating one."""
    if dtype not in FLOATS:
        raise ArgumentTypeError(f"dtype is {dtype}: it must be a floating dtype")


def _check_head(head: int, sizes: TensorSizes) -> None:
    if not 0 <= head < sizes.heads:
        raise ArgumentError(f"head is {head}: there are {sizes.heads} heads")
