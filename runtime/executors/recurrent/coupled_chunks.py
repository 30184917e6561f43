"""Coupled states over a stretch of chunks: all chunks at once, except for passing states from chunk to chunk.

For each sequence, with states S_j (R, C), readers q and r, and impulses u eᵀ:

    e = v + reads by r of the states before the token or between its steps;   out = reads by q of the same

Within a chunk a read sums pairs, (x · u) times their weight, and the decayed states before the chunk. Impulses that
read each other form a unit triangular system, solved by substitution.

States mix by any real factors, and no quotient is computed. A token is a matrix (m + Q, m + P): the m states after it
and its Q readers, as linear combinations of the m states before it and its P impulses. A block of tokens is described
by the weights of its impulses and of the states before it in its readers and in the states after it. Two blocks are
joined by products of such matrices, so a chunk of L tokens takes log₂ L joins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad


class PairWeights(NamedTuple):
    """Pair weights of n blocks of L tokens; impulses and readers are ordered by token.

    `pairs` (n, L · Q, L · P): weights of impulses in readers. `edges` (n, L · Q, m): weights of the states before the
    block in readers. `ends` (n, m, L · P) and `through` (n, m, m): weights of impulses and of the states before the
    block in the states after it.
    """

    pairs: Tensor
    edges: Tensor
    ends: Tensor
    through: Tensor


class _Blocks(NamedTuple):
    """The `edges`, `ends` and `through` of blocks, without the pairs within them."""

    edges: Tensor
    ends: Tensor
    through: Tensor


def weights(mixes: Tensor, states: int, length: int, most: float | None = None) -> tuple[PairWeights, int]:
    """Return pair weights of blocks, and their length: `length`, a power of two, or less to keep weights below `most`.

    `mixes`: (tokens, m + Q, m + P), with m = `states`; the number of tokens is a multiple of `length`.
    """
    after, read = mixes[:, :states], mixes[:, states:]
    blocks = _Blocks(read[..., :states], after[..., states:], after[..., :states])
    pairs = [read[..., states:]]
    size = 1
    while size < length:
        larger, across = _joined(blocks)
        if most is not None and any(_exceeds(x, most) for x in (*larger, across)):
            break
        pairs.append(across)
        blocks, size = larger, 2 * size
    assembled = cast("Tensor", _Assembled.apply(size, *pairs))  # type: ignore[no-untyped-call]
    return PairWeights(assembled.flatten(3, 4).flatten(1, 2), *blocks), size


def _joined(blocks: _Blocks) -> tuple[_Blocks, Tensor]:
    """Join pairs of blocks; also return the weights of the first block's impulses in the second block's readers."""
    (before, after), (early, late), (left, right) = ((x[::2], x[1::2]) for x in blocks)
    joined = _Blocks(torch.cat([before, after @ left], 1), torch.cat([right @ early, late], 2), right @ left)
    return joined, after @ early


class _Assembled(torch.autograd.Function):
    """Assemble pairs (n, L, Q, L, P) from those within tokens and those between sibling blocks of 1, 2, 4, … tokens."""

    @staticmethod
    def forward(ctx: Any, length: int, *pairs: Tensor) -> Tensor:
        tokens, readers, impulses = pairs[0].shape
        result = pairs[0].new_zeros(tokens // length, length, readers, length, impulses)
        for view, weights_part in zip(_views(result, len(pairs)), pairs, strict=True):
            view.copy_(weights_part.view(view.shape))
        ctx.shapes = [weights_part.shape for weights_part in pairs]
        return result

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor | None, ...]:
        views = _views(d_result.contiguous(), len(ctx.shapes))
        return (None, *(view.reshape(shape) for view, shape in zip(views, ctx.shapes, strict=True)))


def _views(pairs: Tensor, parts: int) -> Iterator[Tensor]:
    """Yield views of the pairs within tokens, and of those between blocks of s tokens, (n, L / 2s, s, Q, s, P)."""
    count, length, readers, _, impulses = pairs.shape
    yield pairs.diagonal(dim1=1, dim2=3).movedim(3, 1)
    for size in (1 << level for level in range(parts - 1)):
        blocks = length // (2 * size)
        halves = pairs.view(count, blocks, 2, size, readers, blocks, 2, size, impulses)[:, :, 1, :, :, :, 0]
        yield halves.diagonal(dim1=1, dim2=4).movedim(5, 1)


def _exceeds(x: Tensor, limit: float) -> bool:
    """Check whether a weight's magnitude is above `limit`; NaN is not."""
    return bool(x.numel()) and bool((x.detach().abs() > limit).any())


LENGTH = 64
"""Maximum number of tokens of a chunk."""

GROWTH, CORRECTED = 2.0**40, 2.0**10
"""Maximum weights in a chunk, without and with corrections (which may cancel large weights); else it is shorter."""


@dataclass(frozen=True)
class CoupledForm:
    """The numbers of states, impulses and results; `corrections`: for every correction the impulse it belongs to."""

    states: int
    impulses: int
    outs: int
    corrections: tuple[int, ...]

    @property
    def readers(self) -> int:
        """The number of readers of a token."""
        return self.outs + len(self.corrections)


class Vectors(NamedTuple):
    """The vectors of every token, (B, H, T, ·): u and v of impulses, and the readers', results before corrections."""

    left: Sequence[Tensor]
    value: Sequence[Tensor]
    read: Sequence[Tensor]


class CoupledReach(NamedTuple):
    """The weights that may be nonzero within a chunk.

    `of_outs`, `of_corrections`: the states before the chunk that results and corrections read. `solved`: whether
    corrections read impulses of the chunk. `written`: the states that the chunk's impulses reach.
    """

    of_outs: list[int]
    of_corrections: list[int]
    solved: bool
    written: list[int]


def chunk_length(tokens: int) -> int:
    """Return the number of tokens of a chunk, a power of two."""
    return min(LENGTH, 1 << max(tokens - 1, 0).bit_length())


def weights_of(form: CoupledForm, mixes: Tensor, length: int | None = None) -> tuple[PairWeights, int]:
    """Return pair weights for `mixes` (B, H, T, m + Q, m + P) and the chunk length; None: as long as weights allow."""
    if length is not None:
        return weights(_mixes(form, mixes, length), form.states, length)
    length = chunk_length(mixes.shape[2])
    return weights(_mixes(form, mixes, length), form.states, length, CORRECTED if form.corrections else GROWTH)


def reach_of(form: CoupledForm, may: Tensor, length: int) -> CoupledReach:
    """Return the weights that may be nonzero; `may` is 1 where mixes may be, (B or 1, H or 1, T, m + Q, m + P)."""
    reached, _ = weights_of(form, may.double(), length)
    edges = (_by_reader(form, reached.edges) != 0).any(0).any(0)
    pairs = _by_reader(form, reached.pairs)[:, :, form.outs :]
    outs, corrections = (part.any(0).nonzero()[:, 0].tolist() for part in (edges[: form.outs], edges[form.outs :]))
    written = (reached.ends != 0).any(2).any(0).nonzero()[:, 0].tolist()
    return CoupledReach(outs, corrections, bool((pairs != 0).any()), written)


def _mixes(form: CoupledForm, mixes: Tensor, length: int) -> Tensor:
    """Return the mixes of the tokens of all chunks, (tokens, …); padding leaves the states unchanged."""
    missing = -mixes.shape[2] % length
    if missing:
        padding = torch.eye(mixes.shape[-2], mixes.shape[-1], dtype=mixes.dtype, device=mixes.device)
        padding[form.states :] = 0
        padding[:, form.states :] = 0
        mixes = torch.cat([mixes, padding.expand(*mixes.shape[:2], missing, -1, -1)], 2)
    return mixes.reshape(-1, *mixes.shape[3:])


def stretch(
    form: CoupledForm, reach: CoupledReach, pair_weights: PairWeights, state: Tensor, vectors: Vectors
) -> tuple[list[Tensor], Tensor]:
    """Compute (the results, (B, H, T, C) each; the states after the tokens (B, H, m, R, C)) from the states before."""
    batch, heads, tokens = vectors.left[0].shape[:3]
    length = pair_weights.ends.shape[2] // form.impulses
    chunks = _Chunks(form, reach, pair_weights, *(_rows(x, length) for x in vectors))
    states, impulses, last = chunks.walk(state.flatten(0, 1))
    outs = [x.reshape(batch, heads, -1, x.shape[-1])[:, :, :tokens] for x in chunks.results(states, impulses)]
    return outs, last.reshape(batch, heads, *last.shape[1:])


def _by_reader(form: CoupledForm, x: Tensor) -> Tensor:
    """View (n, L · Q, ·) as (n, L, Q, ·)."""
    return x.reshape(len(x), x.shape[1] // max(form.readers, 1), form.readers, x.shape[2])


def _by_chunk(x: Tensor, sequences: int) -> tuple[Tensor, ...]:
    """Split the chunks of sequences, (n, …), into one tensor (sequences, …) per chunk."""
    return x.reshape(sequences, len(x) // sequences, *x.shape[1:]).unbind(1)


def _rows(vectors: Sequence[Tensor], length: int) -> list[Tensor]:
    """Return vectors (B, H, T, ·) as padded chunks, (n, L, ·)."""
    padded = (pad(x, (0, 0, 0, -x.shape[2] % length)) if x.shape[2] % length else x for x in vectors)
    return [x.reshape(-1, length, x.shape[-1]) for x in padded]


class _Chunks:
    """The n chunks of a stretch, ordered by sequence; the impulses of a token are consecutive."""

    def __init__(
        self,
        form: CoupledForm,
        reach: CoupledReach,
        pair_weights: PairWeights,
        left: list[Tensor],
        value: list[Tensor],
        read: list[Tensor],
    ) -> None:
        self._form, self._reach, self._read = form, reach, read
        self._left, self._value = (x[0] if len(x) == 1 else torch.stack(x, 2).flatten(1, 2) for x in (left, value))
        self._through, self._ends = pair_weights.through, pair_weights.ends
        self._pairs, self._edges = (_by_reader(form, x).unbind(2) for x in (pair_weights.pairs, pair_weights.edges))

    def walk(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute states before chunks (n, m, R, C), impulses e (n, L · P, C), final states (sequences, m, R, C)."""
        reached = self._reach.of_corrections
        values, state_reads = self._solved(
            self._value, self._correction_state_weights() if reached else self._value[..., :0]
        )
        before, impulses_by_chunk = [], []
        parts = (_by_chunk(x, len(state)) for x in (values, state_reads, self._write_weights(), self._through))
        for chunk_values, reading, writing, through in zip(*parts, strict=True):
            before.append(state)
            impulses = chunk_values + reading @ self._state_rows(state, reached) if reached else chunk_values
            impulses_by_chunk.append(impulses)
            state = self._after(through, state, writing @ impulses)
        return torch.stack(before, 1).flatten(0, 1), torch.stack(impulses_by_chunk, 1).flatten(0, 1), state

    def _solved(self, values: Tensor, state_reads: Tensor) -> tuple[Tensor, Tensor]:
        """Return the impulses and their reads of the states before the chunk, solved where impulses read each other."""
        if not self._reach.solved:
            return values, state_reads
        right_sides = torch.cat([values, state_reads], 2)
        right_sides = torch.linalg.solve_triangular(-self._triangle(), right_sides, upper=False, unitriangular=True)
        return right_sides[..., : values.shape[2]], right_sides[..., values.shape[2] :]

    def results(self, states: Tensor, impulses: Tensor) -> list[Tensor]:
        """Return the results of tokens, (n, L, C) each."""
        reached, result = self._reach.of_outs, list[Tensor]()
        for reader in range(self._form.outs):
            out = self._impulse_weights(reader) @ impulses
            if reached:
                out = out + self._edge_weights(reader, reached) @ self._state_rows(states, reached)
            result.append(out)
        return result

    def _state_rows(self, states: Tensor, indices: list[int]) -> Tensor:
        """Return the rows of the states `indices` concatenated, (…, states · R, C)."""
        return (states if len(indices) == self._form.states else states[:, indices]).flatten(1, 2)

    def _after(self, through: Tensor, state: Tensor, writes: Tensor) -> Tensor:
        """Return the states after a chunk, from the states before it and what its impulses write."""
        mixed = (through @ state.flatten(2)).reshape(state.shape)
        written = self._reach.written
        writes = writes.reshape(len(state), len(written), *state.shape[2:])
        if len(written) == self._form.states:
            return mixed + writes
        return mixed.index_add(1, torch.tensor(written, dtype=torch.int64, device=mixed.device), writes)

    def _write_weights(self) -> Tensor:
        """Return the weights of impulses in the states at the end of the chunk, (n, states · R, L · P)."""
        ends = self._ends[:, self._reach.written]
        return (ends[:, :, None] * self._left.mT[:, None]).flatten(1, 2)

    def _impulse_weights(self, reader: int) -> Tensor:
        """Return the weights of impulses in a reader, (n, L, L · P)."""
        return self._pairs[reader] * (self._read[reader] @ self._left.mT)

    def _edge_weights(self, reader: int, indices: list[int]) -> Tensor:
        """Return the weights of the states before the chunk in a reader, (n, L, states · R)."""
        edges = self._edges[reader][..., indices]
        return (edges[..., None] * self._read[reader][:, :, None]).flatten(2)

    def _correction_state_weights(self) -> Tensor:
        """Return the weights of the states before the chunk in impulses, (n, L · P, states · R)."""
        return self._by_impulse(lambda reader: self._edge_weights(reader, self._reach.of_corrections))

    def _triangle(self) -> Tensor:
        """Return the weights of earlier impulses in impulses, (n, L · P, L · P)."""
        return self._by_impulse(self._impulse_weights)

    def _by_impulse(self, weights_of_reader: Callable[[int], Tensor]) -> Tensor:
        """Sum `weights_of_reader` over the corrections of each impulse, (n, L · P, ·)."""
        terms = [list[Tensor]() for _ in range(self._form.impulses)]
        for reader, impulse in enumerate(self._form.corrections, self._form.outs):
            terms[impulse].append(weights_of_reader(reader))
        like = next(x[0] for x in terms if x)
        sums = [sum(x[1:], x[0]) if x else torch.zeros_like(like) for x in terms]
        return sums[0] if len(sums) == 1 else torch.stack(sums, 2).flatten(1, 2)
