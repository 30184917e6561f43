"""Rectified SpaAttn, written from its authors' program."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from reference.attention import products, scale_of
from reference.routing import Result, blocks_of, by_query_head, means, softmax_over


def critical_blocks(p: Tensor, *, neighbour: Tensor, drop: float, share: float, first: int) -> Tensor:
    """Return the best of pooled weights p (B, H, rows, cols) until they pass a share, and the blocks always kept."""
    n = p.shape[-1]
    ranked, order = torch.sort(p, dim=-1, descending=True, stable=True)
    enough = torch.clamp(
        (ranked.cumsum(-1) <= share).sum(-1, keepdim=True) + 1, min=math.floor((1 - Fraction(str(drop))) * n)
    )
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, torch.arange(n) < enough)
    kept |= neighbour[: p.shape[-2], :n]
    kept[..., :first, :first] = True
    return kept


def gainful_blocks(q: Tensor, k: Tensor, block: int) -> Tensor:
    """Return the block pairs (B, H, rows, cols) whose mean score exceeds the estimated error of pooling."""

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        pieces = torch.split(x, block, 2)
        mean = torch.stack([piece.mean(2) for piece in pieces], 2)
        spread = torch.stack([(piece - piece.mean(2, keepdim=True)).abs().mean(2) for piece in pieces], 2)
        return mean, spread

    (mean_q, spread_q), (mean_k, spread_k) = parts(q), parts(k)
    error = products(spread_q, mean_k).abs() + products(mean_q, spread_k).abs()
    return products(mean_q, mean_k).abs() > error


def rectified(
    q: Tensor, k: Tensor, v: Tensor, *, neighbour: Tensor, block: int, drop: float, p: float, first: int = 0
) -> Result:
    """Add gainful blocks' mean values, by pooled weight, to the output of the critical blocks, by the other weight."""
    row, column = torch.arange(q.shape[2]) // block, torch.arange(k.shape[2]) // block
    rows, columns = blocks_of(q.shape[2], block), blocks_of(k.shape[2], block)
    weight = torch.softmax(scale_of(q) * products(means(q, row, rows), means(k, column, columns)), -1)
    critical = critical_blocks(weight.detach(), neighbour=neighbour, drop=drop, share=p, first=first)
    pooled = gainful_blocks(q.detach(), k.detach(), block) & ~critical
    seen, fine = softmax_over(q, k, v, critical[:, :, row][..., column])
    coarse = (weight * pooled) @ by_query_head(means(v, column, columns), q.shape[1])
    left = (weight * ~pooled).sum(-1, keepdim=True)
    return seen, left[:, :, row] * fine + coarse[:, :, row]
