"""States that read each other, over a stretch of chunks: all chunks at once, but for their way from one to the next.

Of each sequence, with states S_j (R, C), readers `o` and impulses `u eᵀ`:

    e = v + r-reads of the states before the token, or between its lines;   out = q-reads of them

Within a chunk the reads are pairs, (x · u) by their weight (`pair_weights`), and what is left of the states before the
chunk; the impulses that read each other are a unit triangle, solved by substitution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnc.runtime.recurrent.pair_weights import PairWeights, weights

LENGTH = 64
"""Tokens of a chunk, where weights do not grow."""

GROWTH, CORRECTED = 2.0**40, 2.0**10
"""Weights above which chunks are shorter: without corrections, and with them, which may take off what grew."""


@dataclass(frozen=True)
class CoupledForm:
    """How many states, impulses and results there are; of every correction the impulse that it is a part of."""

    states: int
    impulses: int
    outs: int
    corrections: tuple[int, ...]

    @property
    def readers(self) -> int:
        """The number of readers of a token."""
        return self.outs + len(self.corrections)


class Vectors(NamedTuple):
    """The vectors of every token, (B, H, T, ·): u and v of impulses, then those of readers, results first."""

    left: Sequence[Tensor]
    value: Sequence[Tensor]
    read: Sequence[Tensor]


class CoupledReach(NamedTuple):
    """Entries that may be nonzero: states by readers of results and by corrections, pairs of corrections, states that
    impulses of the chunk reach."""

    of_outs: list[int]
    of_corrections: list[int]
    solved: bool
    written: list[int]


def chunk_length(tokens: int) -> int:
    """A power of two."""
    return min(LENGTH, 1 << max(tokens - 1, 0).bit_length())


def weights_of(form: CoupledForm, mixes: Tensor, length: int | None = None) -> tuple[PairWeights, int]:
    """Return the pair weights of chunks of (B, H, T, m + Q, m + P), and the length; None: as long as weights allow."""
    if length is not None:
        return weights(_mixes(form, mixes, length), form.states, length)
    length = chunk_length(mixes.shape[2])
    return weights(_mixes(form, mixes, length), form.states, length, CORRECTED if form.corrections else GROWTH)


def reach_of(form: CoupledForm, may: Tensor, length: int) -> CoupledReach:
    """From mixes that are 1 where they may be other than 0, (B or 1, H or 1, T, m + Q, m + P)."""
    found, _ = weights_of(form, may.double(), length)
    edges = (_by_reader(form, found.edges) != 0).any(0).any(0)
    pairs = _by_reader(form, found.pairs)[:, :, form.outs :]
    outs, corrections = (part.any(0).nonzero()[:, 0].tolist() for part in (edges[: form.outs], edges[form.outs :]))
    written = (found.ends != 0).any(2).any(0).nonzero()[:, 0].tolist()
    return CoupledReach(outs, corrections, bool((pairs != 0).any()), written)


def _mixes(form: CoupledForm, mixes: Tensor, length: int) -> Tensor:
    """Return the mixes of every token of chunks, (tokens, …); padding leaves the states unchanged."""
    missing = -mixes.shape[2] % length
    if missing:
        passing = torch.eye(mixes.shape[-2], mixes.shape[-1], dtype=mixes.dtype, device=mixes.device)
        passing[form.states :] = 0
        passing[:, form.states :] = 0
        mixes = torch.cat([mixes, passing.expand(*mixes.shape[:2], missing, -1, -1)], 2)
    return mixes.reshape(-1, *mixes.shape[3:])


def stretch(
    form: CoupledForm, reach: CoupledReach, found: PairWeights, state: Tensor, vectors: Vectors
) -> tuple[list[Tensor], Tensor]:
    """(results (B, H, T, C) each, the states after the tokens (B, H, m, R, C)), from those before them."""
    batch, heads, tokens = vectors.left[0].shape[:3]
    length = found.ends.shape[2] // form.impulses
    chunks = _Chunks(form, reach, found, *(_rows(x, length) for x in vectors))
    states, impulses, last = chunks.walk(state.flatten(0, 1))
    outs = [x.reshape(batch, heads, -1, x.shape[-1])[:, :, :tokens] for x in chunks.results(states, impulses)]
    return outs, last.reshape(batch, heads, *last.shape[1:])


def _by_reader(form: CoupledForm, x: Tensor) -> Tensor:
    """(n, L · Q, ·) as (n, L, Q, ·)."""
    return x.reshape(len(x), x.shape[1] // max(form.readers, 1), form.readers, x.shape[2])


def _by_chunk(x: Tensor, sequences: int) -> tuple[Tensor, ...]:
    """The chunks of sequences, (n, …), as (sequences, …) of each chunk."""
    return x.reshape(sequences, len(x) // sequences, *x.shape[1:]).unbind(1)


def _rows(vectors: Sequence[Tensor], length: int) -> list[Tensor]:
    """By chunks, (n, L, ·)."""
    padded = (pad(x, (0, 0, 0, -x.shape[2] % length)) if x.shape[2] % length else x for x in vectors)
    return [x.reshape(-1, length, x.shape[-1]) for x in padded]


class _Chunks:
    """The n chunks of a stretch, those of a sequence one after another; likewise the impulses of each token."""

    def __init__(
        self,
        form: CoupledForm,
        reach: CoupledReach,
        found: PairWeights,
        left: list[Tensor],
        value: list[Tensor],
        read: list[Tensor],
    ) -> None:
        self._form, self._reach, self._read = form, reach, read
        self._left, self._value = (x[0] if len(x) == 1 else torch.stack(x, 2).flatten(1, 2) for x in (left, value))
        self._through, self._ends = found.through, found.ends
        self._pairs, self._edges = (_by_reader(form, x).unbind(2) for x in (found.pairs, found.edges))

    def walk(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states before chunks (n, m, R, C), impulses e (n, L · P, C), the states after the last (…, m, R, C)."""
        reached = self._reach.of_corrections
        known, taken = self._solved(self._value, self._correcting() if reached else self._value[..., :0])
        before, found = [], []
        parts = (_by_chunk(x, len(state)) for x in (known, taken, self._writing(), self._through))
        for own, taking, writing, through in zip(*parts, strict=True):
            before.append(state)
            impulses = own + taking @ self._of(state, reached) if reached else own
            found.append(impulses)
            state = self._after(through, state, writing @ impulses)
        return torch.stack(before, 1).flatten(0, 1), torch.stack(found, 1).flatten(0, 1), state

    def _solved(self, known: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        """Return the impulses, and their reads of the states before the chunk, where impulses read one another."""
        if not self._reach.solved:
            return known, taken
        both = torch.cat([known, taken], 2)
        both = torch.linalg.solve_triangular(-self._triangle(), both, upper=False, unitriangular=True)
        return both[..., : known.shape[2]], both[..., known.shape[2] :]

    def results(self, states: Tensor, impulses: Tensor) -> list[Tensor]:
        """Return the reads of tokens, (n, L, C) each."""
        reached, result = self._reach.of_outs, list[Tensor]()
        for reader in range(self._form.outs):
            out = self._within(reader) @ impulses
            if reached:
                out = out + self._of_edges(reader, reached) @ self._of(states, reached)
            result.append(out)
        return result

    def _of(self, states: Tensor, places: list[int]) -> Tensor:
        """The rows of some states one after another."""
        return (states if len(places) == self._form.states else states[:, places]).flatten(1, 2)

    def _after(self, through: Tensor, state: Tensor, given: Tensor) -> Tensor:
        mixed = (through @ state.flatten(2)).reshape(state.shape)
        written = self._reach.written
        given = given.reshape(len(state), len(written), *state.shape[2:])
        if len(written) == self._form.states:
            return mixed + given
        return mixed.index_add(1, torch.tensor(written, dtype=torch.int64, device=mixed.device), given)

    def _writing(self) -> Tensor:
        """The factors of impulses in the states at the end of the chunk, (n, states · R, L · P)."""
        ends = self._ends[:, self._reach.written]
        return (ends[:, :, None] * self._left.mT[:, None]).flatten(1, 2)

    def _within(self, reader: int) -> Tensor:
        """Return a reader's weights of impulses, (n, L, L · P)."""
        return self._pairs[reader] * (self._read[reader] @ self._left.mT)

    def _of_edges(self, reader: int, places: list[int]) -> Tensor:
        """Return a reader's weights of the states before the chunk, (n, L, states · R)."""
        edges = self._edges[reader][..., places]
        return (edges[..., None] * self._read[reader][:, :, None]).flatten(2)

    def _correcting(self) -> Tensor:
        """The weights of the states before the chunk in impulses."""
        return self._by_impulse(lambda reader: self._of_edges(reader, self._reach.of_corrections))

    def _triangle(self) -> Tensor:
        """The weights of earlier impulses in impulses."""
        return self._by_impulse(self._within)

    def _by_impulse(self, of: Callable[[int], Tensor]) -> Tensor:
        """(n, L · P, ·): the sum over the corrections of each impulse."""
        own = [list[Tensor]() for _ in range(self._form.impulses)]
        for reader, impulse in enumerate(self._form.corrections, self._form.outs):
            own[impulse].append(of(reader))
        like = next(x[0] for x in own if x)
        found = [sum(x[1:], x[0]) if x else torch.zeros_like(like) for x in own]
        return found[0] if len(found) == 1 else torch.stack(found, 2).flatten(1, 2)


__all__ = ["CoupledForm", "CoupledReach", "Vectors", "chunk_length", "reach_of", "stretch", "weights_of"]
