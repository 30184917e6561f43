"""The serial part of chunk forms: states from chunk to chunk, and their adjoints from the last chunk to the first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Corrector(NamedTuple):
    """The tensors (n, L, ·) by which a chunk's correction reads the state S and writes to it.

    solved = inverse (n, L, L) · (right (n, L, C) + reader (n, L, R) · S), and writer (n, L, R)ᵀ · solved is added to S.
    """

    inverse: Tensor
    right: Tensor
    reader: Tensor
    writer: Tensor

    def solve(self, states: Tensor) -> Tensor:
        """Compute `solved` (n, L, C) from the states before the chunks (n, R, C)."""
        return self.inverse @ torch.baddbmm(self.right, self.reader, states)


def advance(states: Tensor, keep: Tensor, writes: Tensor | None, corrector: Corrector | None) -> Tensor | None:
    """Fill `states` (G, chunks + 1, R, C) from its first entry; return the corrector's solutions (n, L, C), or None.

    n = G · chunks. `keep` (n, R or 1, C or 1): the factor by which a chunk decays the state. `writes` (n, R, C): what
    the chunk adds independently of the state.
    """
    groups, chunks = states.shape[0], states.shape[1] - 1
    keep, correctors = _by_chunk(keep, groups), _correctors(corrector, groups)
    writes = None if writes is None else _by_chunk(writes, groups)
    solved = []
    for chunk in range(chunks):
        state, added = states[:, chunk], None if writes is None else writes[:, chunk]
        if correctors:
            chunk_corrector = correctors[chunk]
            solved.append(chunk_corrector.solve(state))
            added = _add_product(added, chunk_corrector.writer.mT, solved[-1])
        assert added is not None
        torch.addcmul(added, keep[:, chunk], state, out=states[:, chunk + 1])
    return torch.stack(solved, 1).flatten(0, 1) if solved else None


def retreat(
    last: Tensor, keep: Tensor, reads: Tensor, corrector: Corrector | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute adjoints: of the states at chunk ends (n, R, C), of the state before the first chunk, and of `right`.

    `last` (G, R, C): the adjoint of the state after the last chunk. `reads` (n, R, C): what each chunk's outputs add
    to the adjoint of the state before it. `corrector`: the forward pass's, but `right` holds the outputs' contribution
    to the adjoint of `solved`.
    """
    groups = last.shape[0]
    keep, reads, correctors = _by_chunk(keep, groups), _by_chunk(reads, groups), _correctors(corrector, groups)
    ends = torch.empty_like(reads)
    rights = []
    for chunk in reversed(range(ends.shape[1])):
        ends[:, chunk] = last
        added = reads[:, chunk]
        if correctors:
            chunk_corrector = correctors[chunk]
            rights.append(
                chunk_corrector.inverse.mT @ torch.baddbmm(chunk_corrector.right, chunk_corrector.writer, last)
            )
            added = torch.baddbmm(added, chunk_corrector.reader.mT, rights[-1])
        last = torch.addcmul(added, keep[:, chunk], last)
    return ends.flatten(0, 1), last, torch.stack(rights[::-1], 1).flatten(0, 1) if rights else None


def _by_chunk(x: Tensor, groups: int) -> Tensor:
    """View (n, ·, ·) as (G, chunks, ·, ·)."""
    return x.view(groups, x.shape[0] // groups, *x.shape[1:])


def _correctors(corrector: Corrector | None, groups: int) -> list[Corrector]:
    """Return a corrector for each chunk; empty without a corrector."""
    if corrector is None:
        return []
    return [Corrector(*tensors) for tensors in zip(*(_by_chunk(x, groups).unbind(1) for x in corrector), strict=True)]


def _add_product(added: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Compute added + left @ right; None counts as zero."""
    return left @ right if added is None else torch.baddbmm(added, left, right)
