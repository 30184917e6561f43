"""A few queries against a cache on the CPU: only the keys that they see are read.

Stretches of tokens that are adjacent, or stand at even steps, are read where they lie; others, and those that only some
of the queries see, are copied.
The parts of a row are merged by their LSE.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.ir import Attend, Vec
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.seen_keys import Int64, Mask, SeenKeys, find_seen_keys
from attnc.compiler.value_nodes import extra_of, is_own, is_plain, is_scored, values_of
from attnc.runtime.caches import Cache
from attnc.runtime.cpu import flash_kernel, hidden_values
from attnc.runtime.cpu.plan_tiles import PlanTile
from attnc.runtime.cpu.planned_call import operands_of
from attnc.runtime.cpu.row_attention import BlockOperands, results
from attnc.runtime.cpu.row_blocks import RowBlock
from attnc.runtime.cpu.scored_forward import LARGE
from attnc.runtime.cpu.tile_scores import Scores
from attnc.runtime.merging import merge
from attnc.runtime.plans import Planner, relations_of
from attnc.runtime.tensor_checks import TensorSizes, call_shape

Pair = tuple[Tensor, Tensor]

ELEMENTS = 1 << 22
"""Entries of the largest tensor over the pairs of some heads, as far as one head allows it."""

SPLIT = 2048
"""Keys of one head from which on threads without a head of their own share them."""


@dataclass(frozen=True, eq=False)
class SharedKeys:
    """Batch entries and heads whose rows of a window see the same keys, which are numbered from its first."""

    batches: tuple[int, ...]
    heads: tuple[int, ...]
    window: Window
    seen: SeenKeys

    @property
    def rows(self) -> slice:
        """Its rows of the call."""
        return slice(self.window.row, self.window.row + self.window.n_q)


@dataclass(frozen=True, eq=False)
class Looked:
    """Who sees what in a call, and what its attention is like."""

    relations: Relations
    parts: tuple[SharedKeys, ...]
    is_plain: bool
    is_scored: bool


def look(planner: Planner, sizes: TensorSizes, given: Mapping[str, object]) -> Looked:
    """Who sees what in a call; parts are kept for calls like it. Raises what planning raises, and EvaluationError."""
    shape = call_shape(planner.pattern, sizes, given)
    relations = relations_of(planner.pattern, shape)  # of this call: it has inputs that only scores read
    parts = planner.kept(("parts", sizes), shape, lambda: _parts(relations))
    plain, is_softmax = planner.remembered("kind", lambda: _kind(planner.pattern.attend))
    return Looked(relations, parts, plain, is_softmax)


def _kind(node: Attend) -> tuple[bool, bool]:
    return is_plain(node), is_scored(node)


def _parts(relations: Relations) -> tuple[SharedKeys, ...]:
    """Who sees what, by window; windows of equal ids number places from their own first, which scores must not see."""
    found = []
    for batches, heads, locals_ in relations.groups(cut=is_plain(relations.pattern.attend)):
        for local in locals_:
            for window in local.windows:
                origins = relations.pattern.origins
                seen = find_seen_keys(local.relation, (0, window.n_q), window.n_k, origins)
                if seen.count:
                    found.append(SharedKeys(batches, heads, window, seen))
    return tuple(found)


def attend(q: Tensor, cache: Cache, looked: Looked, scale: float, inputs: Sequence[Tensor]) -> Pair:
    """(out, lse) of queries (B, Hq, Nq, dk) of one attention; batch entries of the cache have as many tokens each."""
    relations, parts = looked.relations, looked.parts
    if looked.is_plain:
        return _by_kernel(q, cache, parts, scale)
    k, v = cache.placeholders(cache.lengths[0])
    vectors = q.unbind(0), k.unbind(0), v.unbind(0)
    scores = Scores(relations, operands_of(relations, scale, vectors, inputs)) if looked.is_scored else None
    if scores is None or scores.factor is None:
        return _in_torch(q, cache, relations, parts, scale, inputs)
    pair = _by_kernel(q, cache, parts, scores.factor, scores)
    return pair if extra_of(scores.node) is None else _with_extra(q, pair, scores, _counted(q, parts))


# --- softmax of multiples of `dot(q, k)` and a bias ------------------------------------------------------------------


def _by_kernel(
    q: Tensor, cache: Cache, parts: Sequence[SharedKeys], factor: float, scores: Scores | None = None
) -> Pair:
    out = q.new_zeros((*q.shape[:3], cache.v.shape[3]))
    lse = q.new_full(q.shape[:3], -math.inf, dtype=flash_kernel.lse_dtype(q.dtype))
    biased = scores is not None and scores.has_bias
    for part in _by_batch(parts) if biased else parts:
        batches, rows = torch.tensor(part.batches)[:, None], part.rows
        found = list(_pieces(cache, part))
        for heads, kv_heads in _packs(part.heads, q.shape[1], cache.kv_heads):
            own = q[batches, torch.tensor(heads), rows]
            packed = own.reshape(len(own), kv_heads.stop - kv_heads.start, -1, q.shape[3])
            pieces = []
            for piece in found:
                bias = scores.bias(piece.tile(part, heads)) if scores is not None and biased else None
                pieces.append(_of_piece(packed, piece.of(kv_heads), bias, part.window.n_q, factor))
            merged = pieces[0] if len(pieces) == 1 else merge(*pieces)
            at = batches, torch.tensor(heads), rows
            out[at] = merged[0].reshape(*own.shape[:3], -1).to(out.dtype)
            lse[at] = merged[1].reshape(own.shape[:3])
    return out, lse


def _by_batch(parts: Sequence[SharedKeys]) -> Iterator[SharedKeys]:
    """The same, each of one batch entry."""
    return (replace(part, batches=(batch,)) for part in parts for batch in part.batches)


def _packs(heads: Sequence[int], count: int, kv_heads: int) -> Iterator[tuple[list[int], slice]]:
    """Heads of queries with the heads of keys that they share, as many of the former to each of the latter."""
    if len(heads) == count:
        yield list(heads), slice(0, kv_heads)
        return
    group = count // kv_heads
    for one in sorted({head // group for head in heads}):
        yield [head for head in heads if head // group == one], slice(one, one + 1)


@dataclass(frozen=True, eq=False)
class _Piece:
    """Keys and values (b, Hkv, n, d), which tokens they are, and who sees them: (rows, n), None for all."""

    k: Tensor
    v: Tensor
    tokens: Int64
    mask: Mask | None

    def of(self, kv_heads: slice) -> _Piece:
        """That of some heads."""
        return replace(self, k=self.k[:, kv_heads], v=self.v[:, kv_heads])

    def tile(self, part: SharedKeys, heads: Sequence[int]) -> PlanTile:
        """It for some heads of the only batch entry of a part."""
        rows = np.arange(part.window.row, part.window.row + part.window.n_q)
        mask = np.ones((len(rows), len(self.tokens)), dtype=np.bool_) if self.mask is None else self.mask
        return PlanTile(part.batches[0], tuple(heads), rows, self.tokens, mask)


def _pieces(cache: Cache, part: SharedKeys) -> Iterator[_Piece]:
    seen, key = part.seen, part.window.key
    if seen.slices is not None:
        here = [slice(one.start + key, one.stop + key, one.step) for one in seen.slices]
        found = [cache.view(part.batches, one) for one in here]
        if all(x is not None and all(map(flash_kernel.is_fit, x)) for x in found):
            tokens = (np.arange(one.start, one.stop, one.step) for one in here)
            yield from (_Piece(*x, own, None) for x, own in zip(found, tokens, strict=True) if x is not None)
            if len(seen.keys):
                yield _Piece(*cache.gathered(part.batches, seen.keys + key), seen.keys + key, seen.mask)
            return
    keys, mask = seen.every
    yield _Piece(*cache.gathered(part.batches, keys + key), keys + key, None if mask.all() else mask)


def _of_piece(q: Tensor, piece: _Piece, bias: Tensor | None, rows: int, factor: float) -> Pair:
    """(out, lse) of packed queries (b, Hkv, heads · rows, d); `bias` (heads or 1, rows, keys), -inf for the unseen."""
    width, dv = max(piece.k.shape[3], piece.v.shape[3]), piece.v.shape[3]
    q, k, v = (flash_kernel.padded(x, width) for x in (q, piece.k, piece.v))
    if bias is None and piece.mask is None:
        split = _split(q, k)
        found, lse = (
            flash_kernel.attend(q, k, v, None, False, factor) if split == 1 else _shared(q, k, v, split, factor)
        )
        return found[..., :dv], lse
    if bias is None:
        seen = torch.from_numpy(piece.mask)
        bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -math.inf)[None]
    most = bias.amax(-1)
    blind = most == -math.inf
    shift = torch.where(blind | (most.abs() <= LARGE), 0, most)
    heads = q.shape[1] * q.shape[2] // rows
    added = (bias - shift[..., None]).expand(heads, *bias.shape[1:]).reshape(1, *q.shape[1:3], -1)
    blind, shift = (x.expand(heads, rows).reshape(q.shape[1:3]) for x in (blind, shift))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Pair:
        found, lse = flash_kernel.attend(q, k, v, added, False, factor)
        return found[..., :dv].masked_fill(blind[..., None], 0), (lse + shift).masked_fill(blind, -math.inf)

    found, lse = hidden_values.forward(run, q, k, v, added)
    return found, lse


def _split(q: Tensor, k: Tensor) -> int:
    """Parts of the keys, where there are more threads than heads; keys of several heads are not split."""
    if k.shape[1] > 1 or k.shape[2] < SPLIT:
        return 1
    return max(1, min(-(-torch.get_num_threads() // max(q.shape[0], 1)), k.shape[2] // (SPLIT // 2)))


def _shared(q: Tensor, k: Tensor, v: Tensor, split: int, factor: float) -> Pair:
    """Keys of one head in parts, each as a head of its own."""
    length = k.shape[2] // split
    whole = length * split
    own_k, own_v = (x[:, 0, :whole].view(-1, split, length, x.shape[3]) for x in (k, v))
    out, lse = flash_kernel.attend(q.expand(-1, split, -1, -1).contiguous(), own_k, own_v, None, False, factor)
    pieces = [(out[:, i : i + 1], lse[:, i : i + 1]) for i in range(split)]
    if whole < k.shape[2]:
        pieces.append(flash_kernel.attend(q, k[:, :, whole:], v[:, :, whole:], None, False, factor))
    return merge(*pieces)


def _counted(q: Tensor, parts: Sequence[SharedKeys]) -> Tensor:
    """The rows (B, Hq, Nq) that see something, perhaps with scores of -inf alone."""
    counted = torch.zeros(q.shape[:3], dtype=torch.bool)
    for part in parts:
        some = part.seen.every[1].any(-1)
        counted[torch.tensor(part.batches)[:, None], torch.tensor(part.heads), part.rows] |= torch.from_numpy(some)
    return counted


def _with_extra(q: Tensor, pair: Pair, scores: Scores, counted: Tensor) -> Pair:
    """Scale (out, lse) in place by the share that extra logits take of each row with a visible key."""
    out, lse = pair
    for batch in range(q.shape[0]):
        for rows, logit in scores.extra(batch, q[batch].to(lse.dtype)):
            own = lse[batch, :, rows]
            more = torch.logaddexp(own, logit)
            blind = ~counted[batch, :, rows] | (more == -math.inf)
            more = torch.where(blind, -math.inf, more)
            out[batch, :, rows] *= torch.exp(torch.where(blind, 0, own - more))[..., None]
            lse[batch, :, rows] = more
    return out, lse


# --- scores, weights, values and keys of its own ---------------------------------------------------------------------


def _in_torch(
    q: Tensor, cache: Cache, relations: Relations, parts: Sequence[SharedKeys], scale: float, inputs: Sequence[Tensor]
) -> Pair:
    node, dtype = relations.pattern.attend, flash_kernel.lse_dtype(q.dtype)
    whole = {"q": q.to(dtype), **_everywhere(cache, relations, dtype)}
    own_keys = node.keys is None
    group = max(q.shape[1] // max(cache.kv_heads, 1), 1)
    out: Tensor | None = None
    lse = q.new_full(q.shape[:3], -math.inf, dtype=dtype)
    for part in parts:
        keys, mask = part.seen.every
        step = max(1, ELEMENTS // max(part.window.n_q * len(keys), 1))
        gathered = cache.gathered(part.batches, keys + part.window.key) if own_keys else None
        for i, batch in enumerate(part.batches):
            for start in range(0, len(part.heads), step):
                heads = part.heads[start : start + step]
                at = torch.tensor(heads)
                own = {"q": whole["q"][batch][at, part.rows][:, :, None]}
                if gathered is not None:
                    own |= {n: x[i, at // group].to(dtype)[:, None] for n, x in zip("kv", gathered, strict=True)}
                rows = np.arange(part.window.row, part.window.row + part.window.n_q)
                first_key = part.window.key if own_keys else 0
                block = RowBlock(batch, heads, part.window, rows, keys + first_key, mask)
                leaves = BlockOperands(own, {name: x[batch] for name, x in whole.items()}, inputs)
                for some, found, own_lse in results(block, leaves, relations, scale):
                    if out is None:
                        out = q.new_zeros((*q.shape[:3], *found.shape[2:]), dtype=dtype)
                    here = batch, at[:, None], torch.from_numpy(some.rows)
                    out[here] = found
                    lse[here] = math.nan if own_lse is None else own_lse.expand(len(heads), len(some.rows))
    if out is None:
        out = q.new_zeros((*q.shape[:3], cache.v.shape[3]), dtype=dtype)
    return out, lse


def _everywhere(cache: Cache, relations: Relations, dtype: torch.dtype) -> dict[str, Tensor]:
    """All keys and values (B, Hkv, tokens, d) where they are read elsewhere than at their places; else no memory."""
    node, length = relations.pattern.attend, cache.lengths[0]
    read = {below for root in values_of(node) for below in root.below if isinstance(below, Vec)}
    elsewhere = any(x.tensor != "q" and (node.keys is not None or not is_own(x)) for x in read)
    batches = range(len(cache.lengths))
    if elsewhere:
        k, v = cache.whole(batches, length)
        return {"k": k.to(dtype), "v": v.to(dtype)}
    k, v = cache.placeholders(length)
    return {"k": k, "v": v}
