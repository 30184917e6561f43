"""Candidates ranked by score, ties to the earlier candidate, and the candidates that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.analysis.keeping import most_kept

Keep = Callable[[Mapping[str, Tensor]], Tensor]
"""A function from the `rank`, `mass` and `score` of every candidate, in fp64, to a mask of kept candidates."""


def best(score: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` best candidates of each row.

    `score` is (…, rows, blocks), and `candidates` broadcasts to its shape.

    A row with fewer candidates keeps them all. On devices other than the CPU the host never waits.
    """
    blocks = score.shape[-1]
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if count >= blocks:
        return candidates.expand(score.shape).contiguous()
    if score.device.type != "cpu":
        return _packed_best(score, candidates, count)
    worst = score.masked_fill(score.isnan() | ~candidates, -torch.inf)
    top = torch.topk(worst, count + 1, -1).values
    least, next_ = top[..., -2:-1], top[..., -1:]
    selected = (worst >= least) & candidates
    tied = (least == next_)[..., 0]
    if bool(tied.any()):
        tied[tied.clone()] = selected[tied].sum(-1) > count
    if bool(tied.any()):
        rank, _ = ranked(score[tied], candidates.expand(score.shape)[tied], with_mass=False)
        selected[tied] = (rank < count) & candidates.expand(score.shape)[tied]
    return selected


def _packed_best(score: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` best candidates of each row, without making the host wait for the device."""
    blocks = score.shape[-1]
    if score.dtype != torch.float32:
        rank, _ = ranked(score, candidates, with_mass=False)
        return (rank < count) & candidates
    best_keys = torch.topk(_keys(score, candidates), count, -1, sorted=False).values
    best_blocks = torch.where(best_keys == _NEVER, blocks, (blocks - 1) - (best_keys & 0xFFFFFFFF))
    selected = torch.zeros((*score.shape[:-1], blocks + 1), dtype=torch.bool, device=score.device)
    return selected.scatter_(-1, best_blocks, True)[..., :-1]


_NEVER = torch.iinfo(torch.int64).min


def _keys(score: Tensor, candidates: Tensor) -> Tensor:
    """Return int64 keys ordered as the scores and, among equal scores, by block: 32 bits of each."""
    blocks = score.shape[-1]
    bits = (score.contiguous() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    ordered = torch.where(score.isnan(), -(1 << 31) + 1, ordered)
    later = torch.arange(blocks - 1, -1, -1, device=score.device)
    return torch.where(candidates, (ordered << 32) | later, _NEVER)


def ranked(score: Tensor, candidates: Tensor, *, with_mass: bool) -> tuple[Tensor, Tensor | None]:
    """Return each candidate's rank in its row, 0 for the best, and the sum of the scores ranked before it, in fp64."""
    worst = torch.where(score.isnan(), -torch.inf, score)
    order = torch.argsort(worst, dim=-1, descending=True, stable=True)
    last = score.isnan() | ~candidates  # NaN ranks after -inf, and a block that is no candidate after NaN
    last = last.to(torch.int8) + (~candidates).to(torch.int8)
    candidates_first = torch.argsort(last.expand(score.shape).gather(-1, order), dim=-1, stable=True)
    order = order.gather(-1, candidates_first)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(score.shape[-1], device=score.device).expand(order.shape))
    if not with_mass:
        return rank, None
    sorted_scores = torch.where(candidates, score, 0.0).gather(-1, order).double()
    sums = torch.cumsum(sorted_scores, -1)
    before = torch.cat([torch.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
    return rank, torch.empty_like(before).scatter_(-1, order, before)


def kept(score: Tensor, candidates: Tensor, keep: ir.Value, evaluate: Keep, *, pairs: bool) -> Tensor:
    """Return a mask of the kept candidates, (…, rows, blocks). `pairs`: all rows form one ranking."""
    shape = score.shape
    candidates = candidates.expand(shape)
    if pairs:
        score, candidates = score.flatten(-2), candidates.flatten(-2)
    count = most_kept(keep)
    if count is not None:
        return best(score, candidates, count).reshape(shape)
    read = {node.name for node in keep.below if isinstance(node, ir.Ranking)}
    values = {"score": score.double()}
    if read & {"rank", "mass"}:
        rank, mass = ranked(score, candidates, with_mass="mass" in read)
        values["rank"] = rank.double()
        if mass is not None:
            values["mass"] = mass
    values = {name: values[name].reshape(shape) for name in read}
    return evaluate(values) & candidates.reshape(shape)
