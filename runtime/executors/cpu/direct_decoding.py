"""Decoding steps of one query whose keys a few formulas give: one kernel call for each range of keys, and a merge.

Everything else that decoding handles, such as inputs, pages or scores, and every call that is not plainly
correct, is left to the general path, which checks the arguments and names what is wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.compiler.ir.value_nodes import is_plain
from attnc.compiler.planning.row_keys import RowKeys, find_row_keys
from attnc.runtime.call.caches import INTEGERS
from attnc.runtime.executors.cpu import flash_kernel
from attnc.runtime.executors.cpu.cpu_decoding import attend_in_splits
from attnc.runtime.executors.cpu.direct import is_watched
from attnc.runtime.executors.cpu.hidden_values import is_finite
from attnc.runtime.executors.cpu.work_items import merge
from attnc.runtime.planning.plans import Planner, need_of

Pair = tuple[Tensor, Tensor]

_STRIDED = torch.strided


class DirectDecoding:
    """The decoding of a pattern's last row, for patterns that are one plain softmax over tokens without inputs."""

    def __init__(self, planner: Planner) -> None:
        self._pattern: Pattern | None = planner.pattern if _is_simple(planner.pattern) else None
        self._keys: dict[tuple[int, int], RowKeys | None] = {}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, kv_len: object, scale: float | None, *, ring: object, with_lse: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return (out, lse) of a step; None for a call that the general path must handle."""
        if self._pattern is None or type(ring) is not bool or not _fits(q, k, v):
            return None
        length = _length_of(kv_len, q.shape[0])
        if not 1 <= length <= (math.inf if ring else k.shape[2]):
            return None
        if scale is None:
            scale = q.shape[3] ** -0.5
        elif type(scale) is not float or not 0 < scale < math.inf:
            return None
        batch, heads, _, width = q.shape
        kv_heads = k.shape[1]
        ranges = self._ranges(heads, heads // kv_heads, length)
        if ranges and ring and length > k.shape[2]:
            ranges = self._in_ring(ranges, heads, heads // kv_heads, k.shape[2])
        if not ranges:
            return None
        packed = q.reshape(batch, kv_heads, heads // kv_heads, width)
        pairs = [attend_in_splits(packed, k[:, :, start:stop], v[:, :, start:stop], scale) for start, stop in ranges]
        out, lse = pairs[0] if len(pairs) == 1 else _merged(pairs)
        if not is_finite(out):
            return None
        return out.to(q.dtype).reshape(q.shape), lse.reshape(q.shape[:3]) if with_lse else None

    def _ranges(self, heads: int, group: int, kv_len: int) -> list[tuple[int, int]]:
        if (heads, group) not in self._keys:
            assert self._pattern is not None
            self._keys[heads, group] = find_row_keys(self._pattern.attend.visible, heads, group)
        keys = self._keys[heads, group]
        return [] if keys is None else keys.at(kv_len - 1, kv_len)

    def _in_ring(self, ranges: list[tuple[int, int]], heads: int, group: int, slots: int) -> list[tuple[int, int]]:
        """Return the slots of tokens in a ring; none where the ring is too short."""
        assert self._pattern is not None
        need = need_of(self._pattern, heads, group)
        if need is None or slots < need.first + need.last:
            return []
        period, parts = slots - need.first, []
        for start, stop in ranges:
            if start < need.first:
                parts.append((start, min(stop, need.first)))
            begin = max(start, need.first)
            if begin < stop:
                slot = need.first + (begin - need.first) % period
                parts.append((slot, min(slot + stop - begin, slots)))
                if slot + stop - begin > slots:
                    parts.append((need.first, slot + stop - begin - period))
        return parts


def direct_decoding(rows: Planner) -> DirectDecoding:
    """Return the direct decoding of a planner of last rows."""
    return rows.part(DirectDecoding)


def _is_simple(pattern: Pattern) -> bool:
    """Check whether a pattern is one plain softmax over tokens, without inputs, documents, branches or selections."""
    if pattern.tensors or pattern.requirements or pattern.stateful or pattern.combine is not None:
        return False
    if pattern.documents is not None or pattern.recur is not None or len(pattern.nodes) != 1:
        return False
    if pattern.segments or pattern.head_lists:  # the general path compares their sizes with the call's
        return False
    node = pattern.attend
    return node.keys is None and node.family is None and node.stack is None and is_plain(node)


def _length_of(kv_len: object, batch: int) -> int:
    """Return the number of tokens of every batch entry; 0 where entries differ, or the lengths are not integers."""
    if type(kv_len) is int:
        return kv_len
    if isinstance(kv_len, Tensor):
        if kv_len.dtype not in INTEGERS or not kv_len.is_cpu:
            return 0
        kv_len = kv_len.tolist() if kv_len.dim() else [kv_len.item()] * batch
    if not isinstance(kv_len, list | tuple) or len(kv_len) != batch:
        return 0
    first = kv_len[0]
    return first if all(type(length) is int and length == first for length in kv_len) else 0


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Check whether a call is one query over a cache of slots, all plain tensors that torch's kernel takes."""
    if not (
        type(q) is type(k) is type(v) is Tensor
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and q.layout is k.layout is v.layout is _STRIDED
        and q.dtype is k.dtype is v.dtype
        and q.dim() == k.dim() == 4
        and k.shape == v.shape
    ):
        return False
    batch, heads, queries, width = q.shape
    if queries != 1 or k.shape[0] != batch or k.shape[3] != width:
        return False
    if not (batch and heads and width and k.shape[1]) or heads % k.shape[1] or is_watched(q, k, v):
        return False
    return q.dtype.is_floating_point and flash_kernel.is_fit(k) and flash_kernel.is_fit(v)


def _merged(pairs: list[Pair]) -> Pair:
    """Merge partial results in the dtype of the LSE."""
    out, lse = pairs[0][0].to(pairs[0][1].dtype), pairs[0][1]
    for other_out, other_lse in pairs[1:]:
        merge(other_out, other_lse, out, lse)
    return out, lse
