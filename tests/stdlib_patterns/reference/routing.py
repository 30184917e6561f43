"""The library's routing patterns, written from their papers and their authors' programs, not from the `.attn` files.

q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv) → the visible pairs after selection and masking (with several
branches: in the selecting branch), bool (B, Hq, Nq, Nk), and out (B, Hq, Nq, dv), in the tensors' own dtype (pass
fp64), dense and differentiable. Selections carry no gradient. The last query is at the last key; ties go to the
earlier position; a row without visible keys is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import torch
from torch import Tensor

from reference.attention import positions, products, scale_of, shared, shares, weighted

Result = tuple[Tensor, Tensor]


# --- helpers for selections -------------------------------------------------------------------------------------------


def best(score: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Select the `count` candidates of the largest scores along the last dimension, or all if there are fewer."""
    order = torch.sort(torch.where(candidates, score, -math.inf), dim=-1, descending=True, stable=True).indices
    first = (torch.arange(score.shape[-1]) < count).expand(score.shape)
    return torch.zeros(score.shape, dtype=torch.bool).scatter(-1, order, first) & candidates


def means(x: Tensor, unit: Tensor, units: int) -> Tensor:
    """Return the mean vector of each unit, (B, H, units, d), 0 for an empty one; unit (N) is the unit of each token."""
    rows = [x[:, :, unit == i] for i in range(units)]
    return torch.stack([row.mean(2) if row.shape[2] else row.sum(2) for row in rows], 2)


def blocks_of(n: int, block: int) -> int:
    return -(-n // block)


def by_query_head(x: Tensor, heads: int) -> Tensor:
    """Repeat (B, Hkv, …) for the query heads: (B, Hq, …)."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def probabilities(score: Tensor, visible: Tensor) -> Tensor:
    """Compute the softmax along the last dimension over visible entries; 0 in rows without any."""
    score = torch.where(visible, score, -math.inf)
    score = torch.where(visible.any(-1, keepdim=True), score, 0)
    return torch.where(visible, torch.softmax(score, -1), 0)


def softmax_over(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Result:
    """Compute attention of scale dk^-1/2 over the visible pairs."""
    seen = seen.expand(*q.shape[:3], k.shape[2])
    return seen, weighted(scale_of(q) * products(q, k), seen, v)[0]


# --- blocks of keys, for each query -----------------------------------------------------------------------------------


def moba(q: Tensor, k: Tensor, v: Tensor, *, block: int, topk: int) -> Result:
    """Lu et al. 2025: the top k of the past blocks by ⟨q, mean k⟩ and the own block, whose gate is infinite."""
    query, key = positions(q, k)
    number = torch.arange(blocks_of(k.shape[2], block))
    gate = products(q, means(k, key // block, len(number))).detach()
    past = query >= (number + 1) * block
    own_block = number == query // block
    chosen = best(torch.where(own_block, math.inf, gate), past | own_block, topk)
    return softmax_over(q, k, v, chosen[..., key // block] & (key <= query))


def landmark_retrieval(q: Tensor, k: Tensor, v: Tensor, *, block: int, topk: int) -> Result:
    """Mohtashami and Jaggi 2023 at inference: the past blocks of the best landmarks, then the grouped softmax.

    A query divides its weight among its own block's tokens and the selected landmarks, which pass it to their tokens.
    """
    query, key = positions(q, k)
    score, size = scale_of(q) * products(q, k), block + 1
    mark = key % size == block
    doors = key[mark]
    past = (doors // size < query // size).expand(*score.shape[:3], len(doors))
    chosen = best(score[..., doors].detach(), past, topk)
    own_block = (key // size == query // size) & ~mark & (key <= query)
    share = shares(score, own_block | torch.zeros_like(score, dtype=torch.bool).index_copy(-1, doors, chosen))
    seen, weight = own_block.expand(score.shape).clone(), torch.where(mark, 0, share)
    for i, door in enumerate(doors.tolist()):
        room = slice(door - block, door)
        seen[..., door - block : door + 1] |= chosen[..., i, None]
        inside = torch.softmax(score[..., room], -1) * share[..., door, None]
        weight = torch.cat([weight[..., : door - block], weight[..., room] + inside, weight[..., door:]], -1)
    return seen, weight @ shared(v, q)


def native_sparse_choice(q: Tensor, k: Tensor, *, block: int, topk: int) -> Tensor:
    """Return the blocks that each kv head's group selects, bool (B, Hkv, Nq, blocks)."""
    query, key = positions(q, k)
    number = torch.arange(blocks_of(k.shape[2], block))
    score = scale_of(q) * products(q, means(k, key // block, len(number))).detach()
    p = probabilities(score, ((number + 1) * block - 1 <= query).expand(score.shape))
    importance = torch.stack([group.sum(1) for group in p.chunk(k.shape[1], 1)], 1)
    current = query // block
    forced = (number == 0) | (number == current) | (number == current - 1)
    return best(torch.where(forced, math.inf, importance), (number <= current).expand(importance.shape), topk)


def native_sparse(q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor, block: int, topk: int, window: int) -> Result:
    """Yuan et al. 2025, pooled by the mean; `gate` (B, Nq, Hq, 3). The returned pairs are the selecting branch's."""
    query, key = positions(q, k)
    number = torch.arange(blocks_of(k.shape[2], block))
    pooled_k, pooled_v = (means(x, key // block, len(number)) for x in (k, v))
    score = scale_of(q) * products(q, pooled_k)
    coarse, _ = weighted(score, ((number + 1) * block - 1 <= query).expand(score.shape), pooled_v)
    chosen = native_sparse_choice(q, k, block=block, topk=topk)
    causal = key <= query
    seen, fine = softmax_over(q, k, v, by_query_head(chosen[..., key // block], q.shape[1]) & causal)
    _, near = softmax_over(q, k, v, causal & (query - key < window))
    gates = gate.transpose(1, 2)[..., None, :]
    return seen, gates[..., 0] * coarse + gates[..., 1] * fine + gates[..., 2] * near


def seer_decode(q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor, block: int, budget: int) -> Result:
    """Gao et al. 2025: the best blocks by a gate (B, Hkv, Nq, ≥ blocks) within a budget of tokens, and the last one."""
    query, key = positions(q, k)
    number = torch.arange(blocks_of(k.shape[2], block))
    gates = gate.detach()[..., : len(number)]
    last = number == query // block
    chosen = best(gates, (number <= query // block).expand(gates.shape), budget // block) | last
    return softmax_over(q, k, v, by_query_head(chosen[..., key // block], q.shape[1]) & (key <= query))


# --- blocks of keys, for each block of queries ------------------------------------------------------------------------


def seer(
    q: Tensor, k: Tensor, v: Tensor, *, gq: Tensor, gk: Tensor, block: int, threshold: float, dense_rows: int
) -> Result:
    """Gao et al. 2024: blocks to which the softmax of a gate, (B, Hq, ≥ blocks, size) each side, gives more."""
    query, key = positions(q, k)
    number = torch.arange(blocks_of(k.shape[2], block))
    n = len(number)
    score = gq.shape[-1] ** -0.5 * torch.einsum("bhag,bhcg->bhac", gq[:, :, :n], gk[:, :, :n]).detach()
    causal = number <= number[:, None]
    chosen = (probabilities(score, causal.expand(score.shape)) > threshold) & causal
    chosen |= (number >= n - dense_rows)[:, None] & causal
    return softmax_over(q, k, v, chosen[:, :, query // block, key // block] & (key <= query))


def minference_blocks(q: Tensor, k: Tensor, v: Tensor, *, block: int, topk: int) -> Result:
    """Jiang et al. 2024: mean query against mean key, blocks up to the query's own one."""
    query, key = positions(q, k)
    n = blocks_of(k.shape[2], block)
    number = torch.arange(n)
    score = products(means(q, query[:, 0] // block, n), means(k, key // block, n)).detach()
    chosen = best(score, (number <= number[:, None]).expand(score.shape), topk)
    return softmax_over(q, k, v, chosen[:, :, query // block, key // block] & (key <= query))


def sparse_d(q: Tensor, k: Tensor, v: Tensor, *, map: Tensor, block: int) -> Result:
    """Wang et al. 2025: a map (B, Hq, blocks, blocks) of blocks of `block` tokens; not causal."""
    query, key = positions(q, k)
    return softmax_over(q, k, v, map[:, :, query // block, key // block])


# --- blocks of a video ------------------------------------------------------------------------------------------------


def tiles_of(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> tuple[Tensor, int]:
    """Return the tile of each token of a grid (t, y, x), and the number of tiles; the last axis is the fastest."""
    counts = [blocks_of(n, size) for n, size in zip(grid, tile, strict=True)]
    t, y, x = torch.meshgrid(*[torch.arange(n) // size for n, size in zip(grid, tile, strict=True)], indexing="ij")
    return ((t * counts[1] + y) * counts[2] + x).flatten(), math.prod(counts)


def vmoba_chunks(frames: int, height: int, width: int, chunk: list[int], layer: int) -> tuple[Tensor, int]:
    """Wu et al. 2025: by layer in turn, groups of frames, spatial cells of all frames, and cells of some frames."""
    tile = [(chunk[0], height, width), (frames, chunk[1], chunk[2]), (chunk[0], chunk[1], chunk[2])][layer % 3]
    return tiles_of((frames, height, width), tile)


def vmoba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    frames: int,
    height: int,
    width: int,
    chunk: list[int],
    topk: int,
    layer: int,
) -> Result:
    """Each head selects topk · N of all pairs of a query and a chunk, every query's own chunk first among them."""
    unit, units = vmoba_chunks(frames, height, width, chunk, layer)
    gate = products(q, means(k, unit, units)).detach()
    own_chunk = torch.arange(units) == unit[:, None]
    pairs = torch.where(own_chunk, math.inf, gate).flatten(2)
    chosen = best(pairs, torch.ones_like(pairs, dtype=torch.bool), topk * len(unit)).view(gate.shape)
    return softmax_over(q, k, v, chosen[..., unit])


def reaching(others: dict[int, float], missing: float) -> Iterator[int]:
    """Yield the keys of the largest numbers until their sum reaches `missing`; at least one."""
    total = 0.0
    for i in sorted(others, key=lambda i: (-others[i], i)):
        yield i
        total += others[i]
        if total >= missing:
            return


def vmoba_threshold(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    frames: int,
    height: int,
    width: int,
    chunk: list[int],
    tau: float,
    layer: int,
) -> Result:
    """Each query selects its own chunk, and the best others until all their shares reach tau; at least one other.

    A share is the excess of a score over the least score, divided by the sum of the excesses; 0 if that sum is 0.
    """
    unit, units = vmoba_chunks(frames, height, width, chunk, layer)
    gate = products(q, means(k, unit, units)).detach()
    above = gate - gate.amin(-1, keepdim=True)
    total = above.sum(-1, keepdim=True)
    share = torch.where(total > 0, above / total, 0)
    chosen = torch.zeros(gate.shape, dtype=torch.bool)
    for b, head, row in torch.cartesian_prod(*[torch.arange(n) for n in gate.shape[:3]]).tolist():
        shares = dict(enumerate(share[b, head, row].tolist()))
        own_chunk = int(unit[row])
        missing = tau - shares.pop(own_chunk)
        chosen[b, head, row, [own_chunk, *reaching(shares, missing)]] = True
    return softmax_over(q, k, v, chosen[..., unit])


def vsa_choice(q: Tensor, k: Tensor, *, unit: Tensor, units: int, density: float) -> Tensor:
    """Return the tiles that each tile of queries selects, bool (B, Hq, tiles, tiles)."""
    score = products(means(q, unit, units), means(k, unit, units)).detach()
    count = max(1, math.ceil(Fraction(str(density)) * units))
    return best(score, torch.ones_like(score, dtype=torch.bool), count)


def vsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor,
    frames: int,
    height: int,
    width: int,
    tile: list[int],
    density: float,
) -> Result:
    """Zhang et al. 2025: attention of mean tiles, gated by (B, Hq, N, dv), and of the tokens of the best tiles."""
    unit, units = tiles_of((frames, height, width), (tile[0], tile[1], tile[2]))
    mean_q, mean_k, mean_v = (means(x, unit, units) for x in (q, k, v))
    everything = torch.ones(*q.shape[:2], units, units, dtype=torch.bool)
    _, coarse = softmax_over(mean_q, mean_k, mean_v, everything)
    chosen = vsa_choice(q, k, unit=unit, units=units, density=density)
    seen, fine = softmax_over(q, k, v, chosen[:, :, unit[:, None], unit])
    return seen, gate * coarse[:, :, unit] + fine


# --- single keys ------------------------------------------------------------------------------------------------------


def deepseek_sparse(q: Tensor, k: Tensor, v: Tensor, *, iq: Tensor, ik: Tensor, w: Tensor, topk: int) -> Result:
    """DeepSeek-V3.2: an indexer iq (B, Nq, J, size), ik (B, Nk, size), w (B, Nq, J) ranks the keys for all heads."""
    query, key = positions(q, k)
    agreement = torch.einsum("bqjd,bkd->bqjk", iq, ik).relu()
    score = (w[..., None] * agreement).sum(2).detach()
    return softmax_over(q, k, v, best(score, (key <= query).expand(score.shape), topk)[:, None])


def dynamic_mask(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor, keys_kept: int) -> Result:
    """Shi et al. 2025: the keys of the highest bias (B, Hkv, Nk), which is also added to the score."""
    query, key = positions(q, k)
    ranking = bias.detach()[:, :, None].expand(-1, -1, q.shape[2], -1)
    seen = by_query_head(best(ranking, (key <= query).expand(ranking.shape), keys_kept), q.shape[1])
    score = scale_of(q) * products(q, k) + by_query_head(bias, q.shape[1])[:, :, None]
    return seen, weighted(score, seen, v)[0]


def minference_vertical_slash(
    q: Tensor, k: Tensor, v: Tensor, *, columns: int, slashes: int, block: int, probe: int
) -> Result:
    """Jiang et al. 2024: columns and diagonals of the most weight in the attention of the last queries.

    For the block of queries from a on, an offset o selects the keys from a - o to a - o + block.
    """
    query, key = positions(q, k)
    n = k.shape[2]
    rows = query[-probe:]
    seen_last = key <= rows
    last = probabilities(scale_of(q) * products(q[:, :, -probe:], k), seen_last.expand(*q.shape[:2], -1, -1)).detach()
    column = last.sum(2)
    diagonal = torch.zeros_like(column)
    for r, row in enumerate(rows[:, 0].tolist()):
        for key_position in range(row + 1):
            diagonal[:, :, row - key_position] += last[:, :, r, key_position]
    column[..., :30] = math.inf
    diagonal[..., :100] = math.inf
    everything = torch.ones_like(column, dtype=torch.bool)
    vertical = best(column, everything, max(columns, 30))
    slash = best(diagonal, everything, max(slashes, 50))
    seen = vertical[:, :, None].repeat(1, 1, q.shape[2], 1)
    for i, row in enumerate(query[:, 0].tolist()):
        start = row // block * block
        for offset in range(n):
            stretch = slice(max(start - offset, 0), max(start - offset + block, 0))
            seen[:, :, i, stretch] |= slash[:, :, offset, None]
    return softmax_over(q, k, v, seen & (key <= query))


def anchor(q: Tensor, k: Tensor, v: Tensor, *, block: int, group: int, theta: float) -> Result:
    """Zhang et al. 2025: keys that a block's mean query scores within theta of the mean of its queries' largest scores.

    The maxima are taken over the first block and the own group, which are always visible. Queries after the last whole
    group see all keys.
    """
    query, key = positions(q, k)
    score = (scale_of(q) * products(q, k)).detach()
    size = block * group
    causal = key <= query
    near = causal & ((key < block) | (key // size == query // size))
    largest = torch.where(near, score, -math.inf).amax(-1)
    seen = near.expand(score.shape).clone()
    whole = q.shape[2] // size * size
    for g in range(0, whole, size):
        for start in range(g, g + size, block):
            rows_of_block = slice(start, start + block)
            columns = score[:, :, rows_of_block].mean(2) + theta >= largest[:, :, rows_of_block].mean(2, keepdim=True)
            columns &= (key >= block) & (key < g)
            seen[:, :, g : g + size] |= columns[:, :, None]
    seen[:, :, whole:] = causal[whole:]
    return softmax_over(q, k, v, seen)


def token_sparse(q: Tensor, k: Tensor, v: Tensor, *, window: int, pool: int, tau: float) -> Result:
    """Jo et al. 2026: heads keep the tokens that the last queries attend to, both as queries and as keys.

    One token more is dropped than the number of the lightest shares, averaged over heads, whose sum is below tau.
    """
    query, key = positions(q, k)
    n = k.shape[2]
    causal = (key <= query).expand(*q.shape[:2], -1, -1)
    weight = probabilities(scale_of(q) * products(q, k), causal).detach()[:, :, n - window :].sum(2)
    reach = pool // 2
    heat = torch.stack([weight[..., max(i - reach, 0) : i + reach + 1].mean(-1) for i in range(n)], -1)
    share = (heat / heat.sum(-1, keepdim=True)).mean(1)
    early = key < n - window
    seen = torch.zeros_like(causal)
    for b in range(q.shape[0]):
        light = share[b, : n - window].sort().values.cumsum(0) < tau
        dropped = int(light.sum()) + 1
        kept = best(heat[b], early.expand(heat[b].shape), n - window - dropped) | ~early
        seen[b] = causal[b] & kept[:, :, None] & kept[:, None]
    return softmax_over(q, k, v, seen)


def recycled(q: Tensor, k: Tensor, v: Tensor, *, cached: Tensor, since: Tensor) -> Result:
    """Xu et al. 2024: the keys at the positions `cached` (B, Hkv, n), and the keys from `since` (B) on."""
    query, key = positions(q, k)
    visible = (cached[..., None] == key).any(2) | (key >= since[:, None, None])
    return softmax_over(q, k, v, by_query_head(visible, q.shape[1])[:, :, None] & (key <= query))


# --- a softmax with a state -------------------------------------------------------------------------------------------


def hybrid_forcing_frames(n: int, now: int, *, frame: int, sinks: int, local: int) -> tuple[Tensor, Tensor]:
    """Return the keys in the softmax and the evicted keys, among n keys with the frames before `now` present."""
    key_frame = torch.arange(n) // frame
    recent = (key_frame >= now - (local - sinks)) & (key_frame < now)
    kept = recent | ((key_frame < sinks) & (key_frame < now))
    return kept, ~kept & (key_frame < now)


def hybrid_forcing_choice(q: Tensor, k: Tensor, *, ratio: float, block: int) -> Tensor:
    """Return the blocks of keys that each block of queries selects, bool (B, H, blocks, blocks)."""
    rows, columns = (torch.arange(x.shape[2]) // block for x in (q, k))
    n_rows, n_columns = (blocks_of(x.shape[2], block) for x in (q, k))
    centred = k - k.mean(2, keepdim=True)
    score = products(means(q, rows, n_rows), means(centred, columns, n_columns)).detach()
    return best(score, torch.ones_like(score, dtype=torch.bool), int(Fraction(str(ratio)) * n_columns))


def hybrid_forcing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rq: Tensor,
    rk: Tensor,
    mix: Tensor,
    frame: int,
    sinks: int,
    local: int,
    ratio: float,
    block: int,
    scale: float | None = None,
) -> Result:
    """Frames are generated in chunks of three. The softmax of a chunk covers the sink frames and the most recent ones.

    The recent frames include the chunk's own. Each block of queries selects the best blocks of these keys. The frames
    between are evicted into means of rk vᵀ and relu(k); rq (B, H, Nq, dk), rk (B, H, Nk, dk), mix (H, dv).
    """
    query, key = positions(q, k)
    scale = scale_of(q) if scale is None else scale
    seen = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    far = torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[3]).clone()
    chunk = query[:, 0] // (3 * frame)
    for c in sorted(set(chunk.tolist())):
        rows = (chunk == c).nonzero()[:, 0]
        kept, evicted = hybrid_forcing_frames(k.shape[2], 3 * (c + 1), frame=frame, sinks=sinks, local=local)
        chosen = hybrid_forcing_choice(q[:, :, rows], k[:, :, kept], ratio=ratio, block=block)
        row, column = torch.arange(len(rows)) // block, torch.arange(int(kept.sum())) // block
        seen[:, :, rows[:, None], key[kept]] = chosen[:, :, row[:, None], column]
        if evicted.any():
            state = torch.einsum("bhnd,bhne->bhde", rk[:, :, evicted], v[:, :, evicted]) / evicted.sum()
            normaliser = k[:, :, evicted].relu().mean(2, keepdim=True)
            share = (q[:, :, rows].relu() * normaliser).sum(-1, keepdim=True) + 1e-6
            far[:, :, rows] = rq[:, :, rows] @ state / share
    near, _ = weighted(scale * products(q, k), seen, v)
    return seen, near + mix[:, None] * far


REFERENCES: dict[str, Callable[..., Result]] = {
    "anchor": anchor,
    "deepseek_sparse": deepseek_sparse,
    "dynamic_mask": dynamic_mask,
    "hybrid_forcing": hybrid_forcing,
    "landmark_retrieval": landmark_retrieval,
    "minference_blocks": minference_blocks,
    "minference_vertical_slash": minference_vertical_slash,
    "moba": moba,
    "native_sparse": native_sparse,
    "recycled": recycled,
    "seer": seer,
    "seer_decode": seer_decode,
    "sparse_d": sparse_d,
    "token_sparse": token_sparse,
    "vmoba": vmoba,
    "vmoba_threshold": vmoba_threshold,
    "vsa": vsa,
}
