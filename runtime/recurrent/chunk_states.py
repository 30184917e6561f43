"""The only serial part: states from chunk to chunk, and their adjoints from the last chunk to the first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Corrector(NamedTuple):
    """How a chunk's correction reads the state and writes to it, (n, L, ·).

    solved = inverse (n, L, L) (right (n, L, C) + reader (n, L, R) S), and S gets writer (n, L, R)ᵀ solved.
    """

    inverse: Tensor
    right: Tensor
    reader: Tensor
    writer: Tensor

    def solve(self, states: Tensor) -> Tensor:
        """`solved` (n, L, C) of the states before the chunks (n, R, C)."""
        return self.inverse @ torch.baddbmm(self.right, self.reader, states)


def advance(states: Tensor, keep: Tensor, writes: Tensor | None, corrector: Corrector | None) -> Tensor | None:
    """Fill `states` (G, chunks + 1, R, C) from its first entry; (n, L, C) that the corrector solved, n = G · chunks.

    `keep` (n, R or 1, C or 1) is what is left of a state after a chunk, `writes` (n, R, C) what the chunk adds whatever
    the state is.
    """
    groups, chunks = states.shape[0], states.shape[1] - 1
    keep, correctors = _by_chunk(keep, groups), _correctors(corrector, groups)
    writes = None if writes is None else _by_chunk(writes, groups)
    solved = []
    for at in range(chunks):
        state, added = states[:, at], None if writes is None else writes[:, at]
        if correctors:
            here = correctors[at]
            solved.append(here.solve(state))
            added = _plus(added, here.writer.mT, solved[-1])
        assert added is not None
        torch.addcmul(added, keep[:, at], state, out=states[:, at + 1])
    return torch.stack(solved, 1).flatten(0, 1) if solved else None


def retreat(
    last: Tensor, keep: Tensor, reads: Tensor, corrector: Corrector | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Adjoints: of the states at the chunks' ends (n, R, C), of the state before the first, of the correctors' `right`.

    `last` (G, R, C) is the adjoint of the state after the last chunk, `reads` (n, R, C) what each chunk's outputs add
    to the adjoint of the state before it. The corrector is the forward pass's, with the outputs' share of the adjoint
    of `solved` for its `right`.
    """
    groups = last.shape[0]
    keep, reads, correctors = _by_chunk(keep, groups), _by_chunk(reads, groups), _correctors(corrector, groups)
    ends = torch.empty_like(reads)
    rights = []
    for at in reversed(range(ends.shape[1])):
        ends[:, at] = last
        added = reads[:, at]
        if correctors:
            here = correctors[at]
            rights.append(here.inverse.mT @ torch.baddbmm(here.right, here.writer, last))
            added = torch.baddbmm(added, here.reader.mT, rights[-1])
        last = torch.addcmul(added, keep[:, at], last)
    return ends.flatten(0, 1), last, torch.stack(rights[::-1], 1).flatten(0, 1) if rights else None


def _by_chunk(x: Tensor, groups: int) -> Tensor:
    """(n, ·, ·) → (G, chunks, ·, ·)."""
    return x.view(groups, x.shape[0] // groups, *x.shape[1:])


def _correctors(corrector: Corrector | None, groups: int) -> list[Corrector]:
    """One for each chunk, none without one."""
    if corrector is None:
        return []
    return [Corrector(*each) for each in zip(*(_by_chunk(x, groups).unbind(1) for x in corrector), strict=True)]


def _plus(added: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left @ right if added is None else torch.baddbmm(added, left, right)
