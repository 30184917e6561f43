"""Decoding on the CPU: a few queries against a cache, reading only the keys that they see.

Stretches of tokens that are adjacent, or evenly spaced, are read in place; other keys, and keys that only some of the
queries see, are copied. The partial results of a row are merged by their LSE.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.ir import Attend, Pattern
from attnc.compiler.ir.value_nodes import is_plain, is_scored
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.build_plan import CallShape, Relations
from attnc.compiler.planning.documents import whole
from attnc.compiler.planning.row_keys import RowKeys, find_row_keys
from attnc.compiler.planning.seen_keys import Int64, Mask, SeenKeys, find_seen_keys, seen_by_rows
from attnc.runtime.call.caches import Cache
from attnc.runtime.call.tensor_checks import TensorSizes, call_shape
from attnc.runtime.executors.cpu import flash_kernel, hidden_values
from attnc.runtime.executors.cpu.block_scores import LARGE, Scores, with_extra
from attnc.runtime.executors.cpu.block_work import BlockOperands, BlockResults, InTorch, read_elsewhere
from attnc.runtime.executors.cpu.planned_call import operands_of
from attnc.runtime.executors.cpu.row_attention import isolated
from attnc.runtime.executors.cpu.row_blocks import RowBlock
from attnc.runtime.planning.plans import Planner, relations_of
from attnc.runtime.values.merging import merge

Pair = tuple[Tensor, Tensor]

ELEMENTS = 1 << 22
"""Maximum number of entries of a tensor over the pairs of some heads; a single head may exceed it."""

SPLIT = 2048
"""Minimum number of keys of a head to split among idle threads."""


@dataclass(frozen=True, eq=False)
class SharedKeys:
    """Batch entries and heads whose rows of a window see the same keys, numbered from the first key of the window."""

    batches: tuple[int, ...]
    heads: tuple[int, ...]
    window: Window
    seen: SeenKeys

    @property
    def rows(self) -> slice:
        """The rows of the window in the call."""
        return slice(self.window.row, self.window.row + self.window.n_q)


@dataclass(frozen=True, eq=False)
class Looked:
    """The visible keys of a call, and the kind of its attention; `relations` is None where scores read none."""

    relations: Relations | None
    parts: tuple[SharedKeys, ...]
    is_plain: bool
    is_scored: bool


def look(planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Looked:
    """Find the visible keys of a call; parts are cached. Raises what planning raises, and EvaluationError."""
    pattern = planner.pattern
    plain, is_softmax = planner.remembered("kind", lambda: _kind(pattern.attend))
    shape = call_shape(pattern, sizes, inputs)
    rows = _row_parts(planner, sizes)
    if rows is not None and plain and not pattern.requirements:
        return Looked(None, rows.of(shape), plain, is_softmax)
    relations = relations_of(pattern, shape)  # per call: it holds inputs that only scores read
    parts = planner.kept(("parts", sizes), shape, lambda: _parts(relations)) if rows is None else rows.of(shape)
    return Looked(relations, parts, plain, is_softmax)


def _kind(node: Attend) -> tuple[bool, bool]:
    return is_plain(node), is_scored(node)


class _RowParts:
    """The visible keys of rows by formulas of their positions; those of the last call are kept for the next layer."""

    def __init__(self, pattern: Pattern, keys: RowKeys) -> None:
        self._align = pattern.align
        self._keys = keys
        self._last: tuple[CallShape, tuple[SharedKeys, ...]] | None = None

    def of(self, shape: CallShape) -> tuple[SharedKeys, ...]:
        """Return the visible keys of a call, all of whose heads and batch entries see the same ones."""
        last = self._last
        if last is not None and _sees_alike(last[0], shape):
            return last[1]
        window = whole(shape.n_q, shape.n_k, self._align)
        window = window if shape.shift is None else replace(window, shift=shape.shift)
        seen = seen_by_rows(self._keys, (window.shift, window.shift + window.n_q), window.n_k)
        everyone = tuple(range(shape.batch)), tuple(range(shape.heads))
        parts = (SharedKeys(*everyone, window, seen),) if seen.count else ()
        self._last = shape, parts
        return parts


def _sees_alike(one: CallShape, other: CallShape) -> bool:
    sizes, other_sizes = ((x.n_q, x.n_k, x.batch, x.heads, x.shift) for x in (one, other))
    return sizes == other_sizes


def _row_parts(planner: Planner, sizes: TensorSizes) -> _RowParts | None:
    """Return the visible keys by formulas of positions; None for other patterns."""
    pattern, heads, group = planner.pattern, sizes.heads, max(sizes.heads // max(sizes.kv_heads, 1), 1)
    if pattern.documents is not None or not (sizes.n_q and heads):
        return None

    def make() -> _RowParts | None:
        keys = find_row_keys(pattern.attend.visible, heads, group)
        return None if keys is None else _RowParts(pattern, keys)

    return planner.remembered(("row keys", heads, group), make)


def _parts(relations: Relations) -> tuple[SharedKeys, ...]:
    """Find the visible keys by window; windows of equal ids restart positions at 0, which scores must not see."""
    shared_keys = []
    for batches, heads, locals_ in relations.groups(cut=is_plain(relations.pattern.attend)):
        for local in locals_:
            for window in local.windows:
                origins = relations.pattern.origins
                seen = find_seen_keys(local.relation, (0, window.n_q), window.n_k, origins)
                if seen.count:
                    shared_keys.append(SharedKeys(batches, heads, window, seen))
    return tuple(shared_keys)


def attend(q: Tensor, cache: Cache, looked: Looked, scale: float, inputs: Sequence[Tensor]) -> Pair:
    """Compute (out, lse) of queries (B, Hq, Nq, dk) of one attention; batch entries have equal token counts."""
    relations, parts = looked.relations, looked.parts
    if looked.is_plain:
        return _by_kernel(q, cache, parts, scale)
    assert relations is not None
    k, v = cache.placeholders(cache.lengths[0])
    vectors = q.unbind(0), k.unbind(0), v.unbind(0)
    scores = Scores(relations, operands_of(relations, scale, vectors, inputs)) if looked.is_scored else None
    if scores is None or scores.factor is None:
        return _in_torch(q, cache, relations, parts, scale, inputs)
    pair = _by_kernel(q, cache, parts, scores.factor, scores)
    return pair if scores.extra_logit is None else _with_extra(q, pair, scores, parts)


# --- softmax of multiples of `dot(q, k)` and a bias ------------------------------------------------------------------


def _by_kernel(
    q: Tensor, cache: Cache, parts: Sequence[SharedKeys], factor: float, scores: Scores | None = None
) -> Pair:
    out = q.new_zeros((*q.shape[:3], cache.v.shape[3]))
    lse = q.new_full(q.shape[:3], -math.inf, dtype=flash_kernel.lse_dtype(q.dtype))
    biased = scores is not None and scores.has_bias
    for part in _by_batch(parts) if biased else parts:
        batches, rows = torch.tensor(part.batches)[:, None], part.rows
        pieces_of_part = list(_pieces(cache, part))
        for heads, kv_heads in _packs(part.heads, q.shape[1], cache.kv_heads):
            part_queries = q[batches, torch.tensor(heads), rows]
            packed = part_queries.reshape(len(part_queries), kv_heads.stop - kv_heads.start, -1, q.shape[3])
            results_of_pieces = []
            for piece in pieces_of_part:
                bias = scores.bias(piece.block(part, heads)) if scores is not None and biased else None
                results_of_pieces.append(_attend_piece(packed, piece.of(kv_heads), bias, part.window.n_q, factor))
            merged = results_of_pieces[0] if len(results_of_pieces) == 1 else merge(*results_of_pieces)
            target = batches, torch.tensor(heads), rows
            out[target] = merged[0].reshape(*part_queries.shape[:3], -1).to(out.dtype)
            lse[target] = merged[1].reshape(part_queries.shape[:3])
    return out, lse


def _by_batch(parts: Sequence[SharedKeys]) -> Iterator[SharedKeys]:
    """Split parts by batch entry."""
    return (replace(part, batches=(batch,)) for part in parts for batch in part.batches)


def _packs(heads: Sequence[int], count: int, kv_heads: int) -> Iterator[tuple[list[int], slice]]:
    """Yield query heads with the kv heads they share, the same number of query heads for each kv head."""
    if len(heads) == count:
        yield list(heads), slice(0, kv_heads)
        return
    group = count // kv_heads
    for kv_head in sorted({head // group for head in heads}):
        yield [head for head in heads if head // group == kv_head], slice(kv_head, kv_head + 1)


@dataclass(frozen=True, eq=False)
class _Piece:
    """Keys and values (b, Hkv, n, d), their token numbers, and the mask (rows, n) of visible pairs, None for all."""

    k: Tensor
    v: Tensor
    tokens: Int64
    mask: Mask | None

    def of(self, kv_heads: slice) -> _Piece:
        """Return the piece restricted to some kv heads."""
        return replace(self, k=self.k[:, kv_heads], v=self.v[:, kv_heads])

    def block(self, part: SharedKeys, heads: Sequence[int]) -> RowBlock:
        """Return the piece as a block, for some heads of a part's only batch entry."""
        rows = np.arange(part.window.row, part.window.row + part.window.n_q)
        mask = np.ones((len(rows), len(self.tokens)), dtype=np.bool_) if self.mask is None else self.mask
        return RowBlock(part.batches[0], tuple(heads), part.window, rows, self.tokens, mask)


def _pieces(cache: Cache, part: SharedKeys) -> Iterator[_Piece]:
    seen, key = part.seen, part.window.key
    if seen.slices is not None:
        slices = [
            slice(token_slice.start + key, token_slice.stop + key, token_slice.step) for token_slice in seen.slices
        ]
        views = [cache.view(part.batches, token_slice) for token_slice in slices]
        if all(x is not None and all(map(flash_kernel.is_fit, x)) for x in views):
            tokens = (np.arange(token_slice.start, token_slice.stop, token_slice.step) for token_slice in slices)
            yield from (
                _Piece(*x, positions, None) for x, positions in zip(views, tokens, strict=True) if x is not None
            )
            if len(seen.keys):
                yield _Piece(*cache.gathered(part.batches, seen.keys + key), seen.keys + key, seen.mask)
            return
    keys, mask = seen.every
    yield _Piece(*cache.gathered(part.batches, keys + key), keys + key, None if mask.all() else mask)


def _attend_piece(q: Tensor, piece: _Piece, bias: Tensor | None, rows: int, factor: float) -> Pair:
    """Compute (out, lse) of packed queries (b, Hkv, heads · rows, d); `bias` (heads or 1, rows, keys), -inf: hidden."""
    width, dv = max(piece.k.shape[3], piece.v.shape[3]), piece.v.shape[3]
    q, k, v = (flash_kernel.padded(x, width) for x in (q, piece.k, piece.v))
    if bias is None and piece.mask is None:
        out, lse = attend_in_splits(q, k, v, factor)
        return out[..., :dv], lse
    if bias is None:
        seen = torch.from_numpy(piece.mask)
        bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -math.inf)[None]
    row_max = bias.amax(-1)
    blind = row_max == -math.inf
    shift = torch.where(blind | (row_max.abs() <= LARGE), 0, row_max)
    heads = q.shape[1] * q.shape[2] // rows
    added = (bias - shift[..., None]).expand(heads, *bias.shape[1:]).reshape(1, *q.shape[1:3], -1)
    blind, shift = (x.expand(heads, rows).reshape(q.shape[1:3]) for x in (blind, shift))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Pair:
        out, lse = flash_kernel.attend(q, k, v, added, False, factor)
        return out[..., :dv].masked_fill(blind[..., None], 0), (lse + shift).masked_fill(blind, -math.inf)

    out, lse = hidden_values.forward(run, q, k, v, added)
    return out, lse


def _split(q: Tensor, k: Tensor) -> int:
    """Return the number of splits of the keys, if threads outnumber heads; keys of several heads are not split."""
    if k.shape[1] > 1 or k.shape[2] < SPLIT:
        return 1
    return max(1, min(-(-torch.get_num_threads() // max(q.shape[0], 1)), k.shape[2] // (SPLIT // 2)))


def attend_in_splits(q: Tensor, k: Tensor, v: Tensor, factor: float) -> Pair:
    """Compute (out, lse) without a mask; keys of one head are split among idle threads, each split as a head."""
    split = _split(q, k)
    if split == 1:
        return flash_kernel.attend(q, k, v, None, False, factor)
    length = k.shape[2] // split
    even_length = length * split
    k_splits, v_splits = (x[:, 0, :even_length].view(-1, split, length, x.shape[3]) for x in (k, v))
    out, lse = flash_kernel.attend(q.expand(-1, split, -1, -1).contiguous(), k_splits, v_splits, None, False, factor)
    pieces = [(out[:, i : i + 1], lse[:, i : i + 1]) for i in range(split)]
    if even_length < k.shape[2]:
        pieces.append(flash_kernel.attend(q, k[:, :, even_length:], v[:, :, even_length:], None, False, factor))
    return merge(*pieces)


def _with_extra(q: Tensor, pair: Pair, scores: Scores, parts: Sequence[SharedKeys]) -> Pair:
    """Scale (out, lse) in place by the weight that extra logits take of each row with a visible key."""
    out, lse = pair
    for part in _by_batch(parts):
        keys, mask = part.seen.every
        rows = np.arange(part.window.row, part.window.row + part.window.n_q)
        block = RowBlock(part.batches[0], part.heads, part.window, rows, keys + part.window.key, mask)
        results = with_extra(scores, block, q[block.at], BlockResults(out[block.at], lse[block.at]))
        out[block.at], lse[block.at] = results.out, cast("Tensor", results.lse)
    return out, lse


# --- custom scores, weights, values and keys --------------------------------------------------------------------------


def _in_torch(
    q: Tensor, cache: Cache, relations: Relations, parts: Sequence[SharedKeys], scale: float, inputs: Sequence[Tensor]
) -> Pair:
    node, dtype = relations.pattern.attend, flash_kernel.lse_dtype(q.dtype)
    work = InTorch(relations, scale, dtype)
    whole = {"q": q.to(dtype), **_everywhere(cache, relations, dtype)}
    reads_tokens = node.keys is None
    group = max(q.shape[1] // max(cache.kv_heads, 1), 1)
    out: Tensor | None = None
    lse = q.new_full(q.shape[:3], -math.inf, dtype=dtype)
    for part in parts:
        keys, mask = part.seen.every
        step = max(1, ELEMENTS // max(part.window.n_q * len(keys), 1))
        gathered = cache.gathered(part.batches, keys + part.window.key) if reads_tokens else None
        for i, batch in enumerate(part.batches):
            for start in range(0, len(part.heads), step):
                heads = part.heads[start : start + step]
                head_index = torch.tensor(heads)
                vectors = {"q": whole["q"][batch][head_index, part.rows][:, :, None]}
                if gathered is not None:
                    vectors |= {
                        n: x[i, head_index // group].to(dtype)[:, None] for n, x in zip("kv", gathered, strict=True)
                    }
                rows = np.arange(part.window.row, part.window.row + part.window.n_q)
                first_key = part.window.key if reads_tokens else 0
                block = RowBlock(batch, heads, part.window, rows, keys + first_key, mask)
                leaves = BlockOperands(vectors, {name: x[batch] for name, x in whole.items()}, inputs)
                for row_block, result in isolated(block, leaves, work):
                    if out is None:
                        out = q.new_zeros((*q.shape[:3], *result.out.shape[2:]), dtype=dtype)
                    out[row_block.at] = result.out
                    lse[row_block.at] = math.nan if result.lse is None else result.lse
    if out is None:
        out = q.new_zeros((*q.shape[:3], cache.v.shape[3]), dtype=dtype)
    return out, lse


def _everywhere(cache: Cache, relations: Relations, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return all keys and values (B, Hkv, tokens, d) if read at other positions; else placeholders without memory."""
    length = cache.lengths[0]
    if {"k", "v"} & {*read_elsewhere(relations.pattern.attend)}:
        k, v = cache.whole(range(len(cache.lengths)), length)
        return {"k": k.to(dtype), "v": v.to(dtype)}
    k, v = cache.placeholders(length)
    return {"k": k, "v": v}
