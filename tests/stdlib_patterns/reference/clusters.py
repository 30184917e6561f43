"""Routing by strips, regions, clusters, hashes and centroids, written from the papers and their authors' programs.

q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv) → seen pairs, bool (B, Hq, Nq, Nk), and out (B, Hq, Nq, dv),
as in `reference.routing`: dense and differentiable, no gradient through a selection, the last query at the last key,
ties to the earlier position, 0 for a row without visible keys. Clusters, hashes, samples and centroids, which are
drawn or trained elsewhere, are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from reference.attention import positions, products, scale_of, weighted
from reference.routing import Result, best, blocks_of, by_query_head, means, probabilities, softmax_over


def leading(mass: Tensor, candidates: Tensor, p: float, least: int = 0, held: Tensor | float = 0.0) -> Tensor:
    """Select, along the last dimension, candidates by decreasing mass until `held` and the selected ones have p.

    At least `least` candidates are selected.
    """
    order = torch.sort(torch.where(candidates, mass, -math.inf), dim=-1, descending=True, stable=True).indices
    ranked = torch.where(candidates, mass, 0).gather(-1, order)
    before = functional.pad(ranked.cumsum(-1)[..., :-1], (1, 0))
    kept = (held + before < p) | (torch.arange(mass.shape[-1]) < least)
    return torch.zeros_like(candidates).scatter(-1, order, kept) & candidates


# --- blocks of a sequence ---------------------------------------------------------------------------------------------


def xattention_choice(q: Tensor, k: Tensor, *, block: int, stride: int, p: float) -> Tensor:
    """Return the blocks that each block of queries selects, bool (B, Hq, blocks, blocks): its own, the first, the best.

    A strip of `stride` tokens has one score: its keys are taken from the first on, its queries from the last back.
    """
    strips = [x.reshape(*x.shape[:2], -1, stride, x.shape[3]) for x in (q, k)]
    score = products(strips[0].flip(3).flatten(3), strips[1].flatten(3)).detach() * scale_of(q) / stride
    index = torch.arange(score.shape[-1])
    share = probabilities(score, (index <= index[:, None]).expand(score.shape))
    n, per = q.shape[2] // block, block // stride
    sums = share.reshape(*share.shape[:2], n, per, n, per).sum((3, 5))
    number = torch.arange(n)
    forced = ((number == number[:, None]) | (number == 0)).expand(sums.shape) & (number <= number[:, None])
    shares = sums / sums.sum(-1, keepdim=True)
    held = torch.where(forced, shares, 0).sum(-1, keepdim=True)
    others = ~forced & (number < number[:, None])
    return leading(shares, others, p, held=held) | forced


def xattention(q: Tensor, k: Tensor, v: Tensor, *, block: int, stride: int, p: float) -> Result:
    """Xu et al. 2025: the own and the first block, then the blocks of most antidiagonal weight until a share p is held.

    Nq = Nk, a multiple of `block`, which is a multiple of `stride`.
    """
    query, key = positions(q, k)
    chosen = xattention_choice(q, k, block=block, stride=stride, p=p)
    return softmax_over(q, k, v, chosen[:, :, query // block, key // block] & (key <= query))


# --- regions of a map -------------------------------------------------------------------------------------------------


def biformer_regions(height: int, width: int, regions: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Return each pixel's region in a map padded to whole regions, which pixels are real, and its rows and columns."""
    tall, wide = blocks_of(height, regions), blocks_of(width, regions)
    y, x = torch.meshgrid(torch.arange(tall * regions), torch.arange(wide * regions), indexing="ij")
    region = y // tall * regions + x // wide
    return region.flatten(), ((y < height) & (x < width)).flatten(), (tall * regions, wide * regions)


def biformer_choice(q: Tensor, k: Tensor, *, region: Tensor, regions: int, topk: int) -> Tensor:
    """Return the regions that each query region of a full map selects for all heads, (B, 1, regions², regions²)."""
    score = products(means(q, region, regions**2), means(k, region, regions**2)).sum(1, keepdim=True).detach()
    return best(score, torch.ones_like(score, dtype=torch.bool), topk)


def biformer(q: Tensor, k: Tensor, v: Tensor, *, height: int, width: int, regions: int, topk: int) -> Result:
    """Zhu et al. 2023: regions × regions regions of a map, padded right and below by zero tokens.

    The padding counts in the means; for queries, it divides all scores of a region by one number and changes no rank.
    The scale is that of the width of all heads. The returned pairs are pairs of real pixels.
    """
    region, real, (rows, columns) = biformer_regions(height, width, regions)
    padding = (0, 0, 0, columns - width, 0, rows - height)
    q, k, v = (functional.pad(x.reshape(*x.shape[:2], height, width, -1), padding).flatten(2, 3) for x in (q, k, v))
    chosen = biformer_choice(q, k, region=region, regions=regions, topk=topk)
    seen = chosen[:, :, region[:, None], region].expand(*q.shape[:3], -1)
    scale = (q.shape[1] * q.shape[3]) ** -0.5
    out, _ = weighted(scale * products(q, k), seen, v)
    return seen[:, :, real][..., real], out[:, :, real]


# --- clusters ---------------------------------------------------------------------------------------------------------


def cluster_means(x: Tensor, cluster: Tensor) -> tuple[Tensor, Tensor]:
    """Return means (B, H, clusters, d), 0 for an empty cluster, and sizes (B, H, clusters), for cluster (B, H, N)."""
    member = functional.one_hot(cluster.long()).transpose(-1, -2).to(x.dtype)
    size = member.sum(-1)
    return member @ x / size.clamp(min=1)[..., None], size


def svg2_choice(q: Tensor, k: Tensor, *, qc: Tensor, kc: Tensor, p: float, least: int) -> Tensor:
    """Return the key clusters that each query cluster selects, bool (B, Hq, clusters, clusters)."""
    (mean_q, _), (mean_k, size) = cluster_means(q, qc), cluster_means(k, kc)
    size = by_query_head(size, q.shape[1])[:, :, None]
    score = (scale_of(q) * products(mean_q, mean_k) + size.log()).detach()
    exists = (size > 0).expand(score.shape)
    return leading(probabilities(score, exists), exists, p, least)


def svg2(q: Tensor, k: Tensor, v: Tensor, *, qc: Tensor, kc: Tensor, p: float, least: int) -> Result:
    """Yang et al. 2025: clusters qc (B, Hq, Nq) select clusters kc (B, Hkv, Nk) by means and sizes; not causal."""
    chosen = svg2_choice(q, k, qc=qc, kc=kc, p=p, least=least)
    rows = chosen.gather(2, qc.long()[..., None].expand(-1, -1, -1, chosen.shape[-1]))
    column = by_query_head(kc.long(), q.shape[1])[:, :, None].expand(-1, -1, q.shape[2], -1)
    return softmax_over(q, k, v, rows.gather(3, column))


# --- hashes -----------------------------------------------------------------------------------------------------------


def sorted_blocks(hashes: Tensor, block: int) -> Tensor:
    """Return the block of each token, (B, H, N), after a stable sort of the tokens by their hashes."""
    return hashes.argsort(dim=-1, stable=True).argsort(dim=-1) // block


def hyper_attention(q: Tensor, k: Tensor, v: Tensor, *, hq: Tensor, hk: Tensor, sample: Tensor, block: int) -> Result:
    """Han et al. 2024, not causal: the own block in the order of hashes hq (B, Hq, Nq), hk (B, Hkv, Nk), and a sample.

    The keys of `sample` (B, Hkv, samples), in their original order, represent all keys outside of the own block: each
    sampled position counts Nk / samples times. The returned pairs are those of the blocks.
    """
    n_q, n_k, samples = q.shape[2], k.shape[2], sample.shape[2]
    query_block = sorted_blocks(hq, block * n_q // n_k)[..., None]
    key_block = sorted_blocks(hk, block)
    sample = sample.long()
    seen = query_block == by_query_head(key_block, q.shape[1])[:, :, None]
    sampled = query_block != by_query_head(key_block.gather(2, sample), q.shape[1])[:, :, None]
    sample_k, sample_v = (x.gather(2, sample[..., None].expand(-1, -1, -1, x.shape[3])) for x in (k, v))
    residual = scale_of(q) * products(q, sample_k) + math.log(n_k / samples)
    score = torch.cat([scale_of(q) * products(q, k), residual], -1)
    return seen, weighted(score, torch.cat([seen, sampled], -1), torch.cat([v, sample_v], 2))[0]


# --- centroids --------------------------------------------------------------------------------------------------------


def nearest(x: Tensor, mu: Tensor, size: int) -> Tensor:
    """Return the `size` tokens nearest in direction to each centroid (H, C, d), bool (B, H, C, N)."""
    score = (functional.normalize(x, dim=-1).detach() @ mu.detach().transpose(-1, -2)).transpose(-1, -2)
    return best(score, torch.ones_like(score, dtype=torch.bool), size)


def routing_transformer(
    q: Tensor, k: Tensor, v: Tensor, *, mu: Tensor, memory_k: Tensor, memory_v: Tensor, size: int
) -> Result:
    """Roy et al. 2021, causal: mean of the attentions in the clusters mu (Hq, C, dk) that selected the query; Hq = Hkv.

    Every cluster has memory_k (Hq, C, memory, dk) and memory_v (Hq, C, memory, dv), which all its queries see.
    """
    query, key = positions(q, k)
    rows, columns = nearest(q, mu, size), nearest(k, mu, size)
    pairs = rows[..., None] & columns[..., None, :] & (key <= query)
    total = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype)
    for c in range(mu.shape[1]):
        keys, values = (
            torch.cat([memory[:, c].expand(len(x), -1, -1, -1), x], 2) for memory, x in ((memory_k, k), (memory_v, v))
        )
        remembered = rows[:, :, c, :, None].expand(-1, -1, -1, memory_k.shape[2])
        total = (
            total + weighted(scale_of(q) * products(q, keys), torch.cat([remembered, pairs[:, :, c]], -1), values)[0]
        )
    return pairs.any(2), total / rows.sum(2).clamp(min=1)[..., None]


REFERENCES: dict[str, Callable[..., Result]] = {
    "biformer": biformer,
    "hyper_attention": hyper_attention,
    "routing_transformer": routing_transformer,
    "svg2": svg2,
    "xattention": xattention,
}
