"""The cache of the cpu executor between calls of one plan: kernel calls bound to strides, and masks as tensors.

Everything in it is derived from the plan and may be dropped at any time. The cache of all plans in the process is
bounded in bytes (`SETTINGS`); masks are keyed by their contents, so plans for other lengths share them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from itertools import count
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.planning.cpu_plan import GridMask, Plan, is_triangular, stretch
from attnc.compiler.planning.cpu_plan import Mask as Relation
from attnc.runtime.executors.cpu.strided_calls import (
    Add,
    ExactWindow,
    KernelCall,
    Mask,
    StridedView,
    StripBlock,
    adds_of,
    calls_of,
)
from attnc.runtime.executors.cpu.work_items import CAUSAL, EVERYTHING, KernelMask, Step, WorkItem, kernel_mask
from attnc.runtime.process.recent import Recent
from attnc.runtime.settings import SETTINGS


class BoundAdd(NamedTuple):
    """An `Add` and its view of each sum."""

    part: Add
    views: tuple[StridedView, ...]

    def add(self, totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Add the gradients of keys and values, which may be wider than `totals`."""
        for total, view, part in zip(totals, self.views, parts, strict=True):
            piece = part.reshape(self.part.size)[self.part.at][..., : total.shape[-1]]
            if self.part.over:
                piece = piece.sum(self.part.over, dtype=total.dtype)
            view.add(total, piece.reshape(view.size))


class Bound(NamedTuple):
    """A call as a work item on the tensors it was bound to."""

    call: KernelCall
    item: WorkItem


class BoundPlan:
    """A plan, ready to run.

    `covers`: every row of every head is in a piece. `merges`: some rows are in several pieces. `adds`: some keys may be
    in several calls or stretches, so their gradients are sums. `only`: the single call, if it takes q, k and v whole
    and uncopied.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._calls = calls_of(plan, merged=False)
        rows = sum(c.queries.rows for c in self._calls if c.fresh)
        self.covers = rows == plan.batch * plan.heads * plan.n_q
        self.merges = not all(c.fresh for c in self._calls)
        self.adds = len(self._calls) != 1 or adds_of(self._calls[0].keys)[0].block != self._calls[0].keys
        self.only = self._calls[0] if len(self._calls) == 1 and _takes_all(self._calls[0], plan) else None
        self._number = next(_NUMBERS)
        self._contents: dict[int, Hashable] = {}

    @property
    def calls(self) -> int:
        """The number of kernel calls."""
        return len(self._calls)

    def bound(
        self, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], sums: tuple[Tensor, ...] = ()
    ) -> tuple[Bound, ...]:
        """Bind the calls to tensors (B, Hq, Nq[, d]) and (B, Hkv, Nk, d) by their strides; `sums` receive adds."""
        key = (self._number, *[(t.stride(), t.shape[-1]) for t in (*queries, *keys, *sums)])
        return _LAYOUTS.get(key, lambda: self._bind(queries, keys, sums))

    def _bind(
        self, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], sums: tuple[Tensor, ...]
    ) -> tuple[Bound, ...]:
        plan = self.plan
        _check_shapes(plan, queries, keys + sums)
        merged = plan.batch > 1 and all(
            t.stride(0) == t.stride(1) * heads
            for tensors, heads in ((queries, plan.heads), (keys + sums, plan.kv_heads))
            for t in tensors
        )
        return tuple(
            Bound(
                call,
                WorkItem(
                    tuple(_view(call.queries, t) for t in queries),
                    tuple(_view(call.keys, t) for t in keys),
                    call.fresh,
                    tuple(BoundAdd(a, tuple(_view(a.block, t) for t in sums)) for a in adds_of(call.keys) if sums),
                ),
            )
            for call in (calls_of(plan, merged=True) if merged else self._calls)
        )

    def steps(self, bound: tuple[Bound, ...], dtype: torch.dtype) -> Iterator[Step]:
        """Yield work items with their masks; masks too large for the cache live while consecutive items share them."""
        last: Mask | None = None
        visible = EVERYTHING
        for bound_call in bound:
            if bound_call.call.mask != last:
                last, visible = bound_call.call.mask, self.visible(bound_call.call, dtype)
            yield bound_call.item, visible

    def visible(self, call: KernelCall, dtype: torch.dtype) -> KernelMask:
        """Return the mask of `call` for queries of `dtype`."""
        mask = call.mask
        if isinstance(mask, ExactWindow):
            return visible_of(self.plan.exact_mask(*mask), dtype)
        if isinstance(mask, str):
            return CAUSAL if mask == "causal" else EVERYTHING
        relation = self.plan.masks[mask]
        if not self._is_kept(mask):
            return visible_of(relation.whole(), dtype)
        contents = self._contents.get(mask)
        if contents is None:
            self._contents[mask] = contents = _contents(relation)
        return _MASKS.get((contents, dtype), lambda: visible_of(relation.whole(), dtype))

    def kept(self, dtype: torch.dtype) -> KernelMask | None:
        """Return the mask of the only call, if there is one and its mask is cached between calls."""
        if self.only is None or not self._is_kept(self.only.mask):
            return None
        return self.visible(self.only, dtype)

    def _is_kept(self, mask: Mask) -> bool:
        return isinstance(mask, str) or (
            isinstance(mask, int) and prod(self.plan.masks[mask].shape) <= SETTINGS.mask_elements
        )


def _takes_all(call: KernelCall, plan: Plan) -> bool:
    """Check whether a call takes q, k and v whole, for one batch entry with several heads, with a shared mask."""
    if plan.batch != 1 or min(plan.heads, plan.n_q) < 2 or isinstance(call.mask, ExactWindow):
        return False
    sides = ((call.queries, plan.heads, plan.n_q), (call.keys, plan.kv_heads, plan.n_k))
    return all(
        block.strip == stretch(0, n) and (block.y.size, block.head) == (heads, 0) and (block.y.head == 1 or heads == 1)
        for block, heads, n in sides
    )


def _view(block: StripBlock, tensor: Tensor) -> StridedView:
    view = block.view(tensor.stride(), tensor.shape[3] if tensor.ndim == 4 else None)
    whole = (view.size, view.stride, view.offset) == (tensor.shape, tensor.stride(), 0)
    return view._replace(whole=whole)


def _check_shapes(plan: Plan, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> None:
    """Check tensor shapes: a view outside a tensor silently reads other memory."""
    for tensors, shape in ((queries, (plan.heads, plan.n_q)), (keys, (plan.kv_heads, plan.n_k))):
        for t in tensors:
            assert t.shape[:3] == (plan.batch, *shape), f"a tensor {tuple(t.shape)} under a plan for {shape}"


def visible_of(relation: Relation, dtype: torch.dtype) -> KernelMask:
    """Return `relation` (rows, keys) as an additive mask of `dtype`."""
    with torch.inference_mode(False):  # cached, and used in either mode
        return kernel_mask(torch.from_numpy(~relation), dtype, is_triangular(relation))


def _contents(relation: GridMask) -> Hashable:
    """Return a key of the mask's contents, equal for equal masks of different plans."""
    return tuple((f.shape, hashlib.sha256(np.packbits(f).data).digest()) for f in relation.factors)


def _bytes_of_mask(visible: KernelMask) -> int:
    return sum(x.untyped_storage().nbytes() for x in (visible.additive, visible.blind) if x is not None)


_BYTES_OF_VIEW = 448
"""Bytes of a `StridedView` with tuples, numbers and container overhead (`tests/runtime/planning/test_memory.py`)."""

_BYTES_OF_CALL = 1024
"""Bytes of a `KernelCall` with its blocks and strips."""


def _bytes_of_layout(calls: tuple[Bound, ...]) -> int:
    adds = [add for bound in calls for add in bound.item.adds or () if isinstance(add, BoundAdd)]
    views = sum(len(b.item.queries) + len(b.item.keys) for b in calls) + sum(len(add.views) for add in adds)
    return _BYTES_OF_VIEW * views + _BYTES_OF_CALL * len(adds)


def _bytes_of_program(program: BoundPlan) -> int:
    return program.plan.nbytes + _BYTES_OF_CALL * program.calls


_NUMBERS = count()
"""Serial numbers of programs, so that cache entries of a freed program are never used for another program."""

_MASKS: Recent[KernelMask] = Recent(SETTINGS.masks, SETTINGS.mask_bytes, _bytes_of_mask)
_LAYOUTS: Recent[tuple[Bound, ...]] = Recent(SETTINGS.layouts, SETTINGS.layout_bytes, _bytes_of_layout)
_PROGRAMS: Recent[BoundPlan] = Recent(SETTINGS.plans, SETTINGS.plan_bytes, _bytes_of_program)


def program_of(plan: Plan) -> BoundPlan:
    """Return the program of `plan`, built on first use. Plans are keyed by identity and kept alive."""
    return _PROGRAMS.get(id(plan), lambda: BoundPlan(plan))
