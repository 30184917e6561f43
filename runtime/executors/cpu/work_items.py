"""The loop of the cpu executor over work items: kernel calls whose results are written, merged, or summed.

Rows in several items are merged by log-sum-exp. The backward runs the same items with the output and LSE of the whole
row, and sums their gradients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from attnc.runtime.executors.cpu import flash_kernel, hidden_values

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


class TokenView(Protocol):
    """Some tokens of a tensor (batch, heads, tokens[, d])."""

    def at(self, x: Tensor) -> Tensor:
        """Return the tokens: a view, or a copy."""

    def rows(self, x: Tensor) -> Tensor:
        """Return the tokens as the kernel takes them: (x, y, rows[, d])."""

    def like(self, rows: Tensor) -> Tensor:
        """Return the kernel's rows in the dimensions of `at`."""

    def put(self, x: Tensor, tokens: Tensor) -> None:
        """Store what `at` returned and the caller changed."""

    def add(self, x: Tensor, tokens: Tensor) -> None:
        """Add values in the dimensions of `at`."""


class TokenSlice(NamedTuple):
    """Consecutive tokens."""

    tokens: slice

    def at(self, x: Tensor) -> Tensor:
        """Return the tokens as a view."""
        return x[:, :, self.tokens]

    def rows(self, x: Tensor) -> Tensor:
        """Return the tokens as a view."""
        return x[:, :, self.tokens]

    def like(self, rows: Tensor) -> Tensor:
        """Return the kernel's rows."""
        return rows

    def put(self, x: Tensor, tokens: Tensor) -> None:
        """Do nothing: `at` is a view."""

    def add(self, x: Tensor, tokens: Tensor) -> None:
        """Add values to the tokens."""
        self.at(x).add_(tokens)


class KernelMask(NamedTuple):
    """A mask for the kernel: `additive` (rows, keys), None for all ones; `blind` (rows,) marks rows without a key.

    `causal`: row r sees no column beyond r, whatever else is hidden. Both tensors may have batch entries and heads in
    front.
    """

    additive: Tensor | None = None
    blind: Tensor | None = None
    nothing: bool = False
    causal: bool = False

    def hide_blind(self, o: Tensor, lse: Tensor) -> None:
        """Set the results of rows without keys to 0 and -inf."""
        if self.blind is not None:
            lse.masked_fill_(self.blind, -math.inf)
            o.masked_fill_(self.blind[..., None], 0)


EVERYTHING = KernelMask()
CAUSAL = KernelMask(causal=True)


def kernel_mask(hidden: Tensor, dtype: torch.dtype, causal: bool = False) -> KernelMask:
    """Return the mask that hides some pairs, bool (…, rows, keys), for queries of `dtype`."""
    if not hidden.any():
        return EVERYTHING
    blind = hidden.all(-1)
    if blind.all():
        return KernelMask(nothing=True)
    additive = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
    return KernelMask(additive, blind if blind.any() else None, causal=causal)


class ItemAdd(Protocol):
    """The sums that the gradients of an item's keys are added to."""

    def add(self, totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Add the gradients of keys and values, which may be wider than `totals`."""


class WorkItem(NamedTuple):
    """A kernel call on some rows and keys; `fresh`: no item before has one of its rows.

    `queries`: its rows in q, out and LSE and, for a backward, in the gradients of out and of q. `keys`: its keys in k
    and v. `adds`: how their gradients are summed, by default in place of the keys. `parts` as in
    `flash_kernel.attend_in_parts`.
    """

    queries: tuple[TokenView, ...]
    keys: tuple[TokenView, ...]
    fresh: bool = False
    adds: Sequence[ItemAdd] | None = None
    parts: int = 1


Step = tuple[WorkItem, KernelMask]
"""A work item, and the mask of its pairs."""


def run_forward(step: Step, operands: Triple, out: Tensor, lse: Tensor | None, scale: float) -> None:
    """Write, or merge, an item's rows into `out` and `lse`; `lse` is None if all items write and nobody needs it."""
    item, visible = step
    q_view, out_view, lse_view, *_ = item.queries
    if visible.nothing:
        if item.fresh:
            out_view.at(out).zero_()
            if lse is not None:
                lse_view.at(lse).fill_(-math.inf)
        return
    q, k, v = q_view.rows(operands[0]), item.keys[0].rows(operands[1]), item.keys[1].rows(operands[2])
    o, part = flash_kernel.attend_in_parts(q, k, v, visible.additive, visible.causal, scale, item.parts)
    visible.hide_blind(o, part)
    if o.shape[-1] != out.shape[-1]:
        o = o[..., : out.shape[-1]]
    o, out_rows = out_view.like(o), out_view.at(out)
    if lse is None:
        out_rows.copy_(o)
        return
    part, lse_rows = lse_view.like(part), lse_view.at(lse)
    if item.fresh:
        out_rows.copy_(o)
        lse_rows.copy_(part)
    else:
        merge(o, part, out_rows, lse_rows)
    out_view.put(out, out_rows)
    lse_view.put(lse, lse_rows)


def merge(o: Tensor, part: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge partial results: update `out` and `lse` with the keys behind `o` and `part`."""
    weight = torch.sigmoid(part - lse).nan_to_num_(0)  # −inf − −inf: neither side has a key, and both outputs are 0
    out.lerp_(o.to(out.dtype), weight.unsqueeze(-1))
    torch.logaddexp(lse, part, out=lse)


def run_backward(
    step: Step, operands: tuple[Tensor, ...], lse: Tensor, grads: tuple[Tensor, Tensor, Tensor], scale: float
) -> None:
    """Add an item's gradients to `grads`; `operands` are grad_out, q, k, v and out."""
    item, visible = step
    if visible.nothing:
        return
    grad_out, q, k, v, out = operands
    q_view, out_view, lse_view, grad_out_view, grad_q_view = item.queries
    part_q, *parts = flash_kernel.backward_in_parts(
        grad_out_view.rows(grad_out),
        q_view.rows(q),
        item.keys[0].rows(k),
        item.keys[1].rows(v),
        out_view.rows(out),
        lse_view.rows(lse),
        visible.additive,
        visible.causal,
        scale,
        item.parts,
    )
    part_q = grad_q_view.like(part_q[..., : grads[0].shape[-1]])
    if item.fresh:
        grad_q_view.at(grads[0]).copy_(part_q)
    else:
        grad_q_view.add(grads[0], part_q)
    if item.adds is None:
        for total, view, part in zip(grads[1:], item.keys, parts, strict=True):
            view.add(total, part[..., : total.shape[-1]])
        return
    for add in item.adds:
        add.add(grads[1:], parts)


class BackwardOperands(NamedTuple):
    """The operands of a backward as the kernel takes them: all of one width, without gradients of rows without keys."""

    grad_out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


def backward_operands(grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> BackwardOperands:
    """Return the operands of a backward, not yet padded, from q, k, v, out and lse."""
    q, k, v, out, lse = kept
    lse, grad_out, grad_lse = flash_kernel.without_blind_rows(lse, grad_out, grad_lse)
    if grad_lse is not None:
        grad_out, q, k, v, out = flash_kernel.with_lse_gradient(grad_lse, grad_out, q, k, v, out)
    return BackwardOperands(grad_out, q, k, v, out, lse)


@dataclass(frozen=True, eq=False)
class ItemGroup:
    """Work items on some batch entries and heads.

    `queries`, `keys`: the tokens that the items number, None for all. `by_rows`: items gather single rows, so the data
    of a row must lie together.
    """

    batches: slice
    heads: slice
    kv_heads: slice
    items: Iterable[Step]
    queries: Tensor | None = None
    keys: Tensor | None = None
    by_rows: bool = False

    def of_rows(self, x: Tensor) -> Tensor:
        """Return the group's rows of q, out, LSE or gradients (B, Hq, Nq, …): a view, or a copy."""
        x = x[self.batches, self.heads]
        if self.by_rows:
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return x if self.queries is None else x.index_select(2, self.queries)

    def of_keys(self, x: Tensor) -> Tensor:
        """Return the group's keys of k, v or gradients (B, Hkv, Nk, …): a view, or a copy."""
        x = x[self.batches, self.kv_heads]
        return x if self.keys is None else x.index_select(2, self.keys)

    def put_rows(self, x: Tensor, rows: Tensor) -> None:
        """Store what `of_rows` returned and the items changed."""
        _put(x[self.batches, self.heads], rows, self.queries)

    def put_keys(self, x: Tensor, keys: Tensor) -> None:
        """Store what `of_keys` returned and the items changed."""
        _put(x[self.batches, self.kv_heads], keys, self.keys)


def _put(x: Tensor, tokens: Tensor, at: Tensor | None) -> None:
    if at is not None:
        x.index_copy_(2, at, tokens)
    elif x.data_ptr() != tokens.data_ptr():
        x.copy_(tokens)


class GroupedWork(ABC):
    """An attention as groups of work items, and its gradient; neither is recorded by autograd.

    Hidden keys reach no row, and rows reach no key that they do not see.
    """

    scale: float

    @abstractmethod
    def groups(self, q: Tensor, k: Tensor, inputs: Sequence[Tensor], *, backward: bool) -> Iterator[ItemGroup]:
        """Yield the groups of a call, for a forward or a backward; queries of a group are in no other group."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """Compute (out, lse) of q (B, Hq, Nq, dk) over k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv)."""
        out, lse = hidden_values.forward(partial(self._run, inputs), q, k, v)
        return out, lse

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """Compute (dq, dk, dv); `kept`: q, k, v, out, lse and the inputs."""
        q, k, v, out, lse, *inputs = kept
        run, gradients = partial(self._run, inputs), partial(self._gradients, inputs)
        dq, dk, dv = hidden_values.backward(run, gradients, grad_out, grad_lse, (q, k, v), (out, lse))
        return dq, dk, dv

    def _run(self, inputs: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Pair:
        width, sums = max(q.shape[-1], v.shape[-1]), flash_kernel.lse_dtype(q.dtype)
        out = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=sums)
        lse = torch.full(q.shape[:3], -math.inf, dtype=sums)
        padded_q, padded_k, padded_v = (flash_kernel.padded(x, width) for x in (q, k, v))
        for group in self.groups(q, k, inputs, backward=False):
            queries = padded_q[group.batches, group.heads]
            queries = queries if group.queries is None else queries.index_select(2, group.queries)
            operands = queries, group.of_keys(padded_k), group.of_keys(padded_v)
            total, log = group.of_rows(out), group.of_rows(lse)
            for step in group.items:
                run_forward(step, operands, total, log, self.scale)
            group.put_rows(out, total)
            group.put_rows(lse, log)
        return out.to(q.dtype), lse

    def _gradients(
        self,
        inputs: Sequence[Tensor],
        grad_out: Tensor,
        grad_lse: Tensor | None,
        vectors: Triple,
        results: Sequence[Tensor],
    ) -> Triple:
        dtype, sums = vectors[0].dtype, flash_kernel.lse_dtype(vectors[0].dtype)
        *operands, lse = backward_operands(grad_out, grad_lse, (*vectors, *results))
        width = max(x.shape[-1] for x in operands)
        grad_out, q, k, v, out = (flash_kernel.padded(x, width) for x in operands)
        grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=sums) for x in vectors)
        for group in self.groups(vectors[0], vectors[1], inputs, backward=True):
            do, queries, o, log, to_rows = (group.of_rows(x) for x in (grad_out, q, out, lse, grad_q))
            keys, values, to_keys, to_values = (group.of_keys(x) for x in (k, v, grad_k, grad_v))
            for step in group.items:
                run_backward(step, (do, queries, keys, values, o), log, (to_rows, to_keys, to_values), self.scale)
            group.put_rows(grad_q, to_rows)
            group.put_keys(grad_k, to_keys)
            group.put_keys(grad_v, to_values)
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)
