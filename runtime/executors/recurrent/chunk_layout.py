"""The layout of a call's tokens in chunks: copy a stretch of chunks into rows, and rows back to tokens.

A chunk has `length` rows, a power of two. The micro-steps of as many whole tokens as fit fill its rows; the rest is
padding with zeros (log decays too), which leaves the state unchanged. Tensors with one row per token (queries, outputs)
use the first or the last row of their token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnc.compiler.recurrences.recurrence_class import RecurrenceClass
from attnc.compiler.simulation.recurrent import cpu_chunks

STRETCH = cpu_chunks.STRETCH
"""Number of rows, over all heads, that are computed at once. Results depend on it only by rounding."""


@dataclass(frozen=True)
class ChunkLayout:
    """B · H sequences of `tokens` tokens, `form.micro` rows each, in chunks of `length` rows."""

    batch: int
    heads: int
    tokens: int
    form: RecurrenceClass
    length: int

    @property
    def per_chunk(self) -> int:
        """The number of tokens of a chunk."""
        return self.form.per_chunk(self.length)

    @property
    def chunks(self) -> int:
        """The number of chunks of a sequence."""
        return self.form.chunks(self.tokens, self.length)

    @property
    def used(self) -> int:
        """The number of rows of a chunk that hold steps; the rest is padding."""
        return self.per_chunk * self.form.micro

    @property
    def is_plain(self) -> bool:
        """Whether the rows are exactly the tokens, in order and without padding."""
        return self.form.micro == 1 and self.tokens == self.chunks * self.length

    def stretches(self, *, by_sequence: bool) -> list[ChunkStretch]:
        """Return the stretches of all chunks, in order within a sequence: for all sequences at once, or `by_sequence`.

        By sequence, rows that are contiguous in memory need no copy; with all sequences at once, the serial loop over
        chunks runs once for all of them.
        """
        size = max(STRETCH // self.length, 1)
        everything = slice(0, self.batch), slice(0, self.heads)
        if not by_sequence or self.chunks * self.heads * self.batch <= size:
            count = max(size // (self.batch * self.heads), 1)
            return [
                ChunkStretch(self, *everything, at, min(at + count, self.chunks)) for at in range(0, self.chunks, count)
            ]
        return [
            stretch for entry in range(self.batch) for stretch in self._entry_stretches(slice(entry, entry + 1), size)
        ]

    def _entry_stretches(self, entry: slice, size: int) -> list[ChunkStretch]:
        heads, count = max(size // self.chunks, 1), min(size, self.chunks)
        return [
            ChunkStretch(self, entry, slice(head, min(head + heads, self.heads)), at, min(at + count, self.chunks))
            for head in range(0, self.heads, heads)
            for at in range(0, self.chunks, count)
        ]


@dataclass(frozen=True)
class ChunkStretch:
    """The chunks from `start` to before `stop` of some sequences; n = sequences · (stop - start)."""

    layout: ChunkLayout
    entries: slice
    heads: slice
    start: int
    stop: int

    @property
    def sequences(self) -> slice:
        """The stretch's sequences among all B · H; a stretch of several batch entries holds all of their heads."""
        first = self.entries.start * self.layout.heads + self.heads.start
        return slice(first, (self.entries.stop - 1) * self.layout.heads + self.heads.stop)

    @property
    def _counts(self) -> tuple[int, int]:
        return self.entries.stop - self.entries.start, self.heads.stop - self.heads.start

    @property
    def tokens(self) -> slice:
        """The tokens of the stretch's chunks."""
        return slice(self.start * self.layout.per_chunk, min(self.stop * self.layout.per_chunk, self.layout.tokens))

    @property
    def steps(self) -> slice:
        """The micro-steps of the stretch's chunks."""
        micro = self.layout.form.micro
        return slice(self.tokens.start * micro, self.tokens.stop * micro)

    def rows(self, x: Tensor) -> Tensor:
        """Return the stretch's rows of a tensor (B, H, N, F), one row per micro-step, as (n, L, F)."""
        return self._padded(x[self.entries, self.heads, self.steps])

    def put(self, rows: Tensor, out: Tensor) -> None:
        """Copy rows (n, L, F) to the stretch's micro-steps in `out` (B, H, N, F)."""
        rows = self._by_chunk(rows)[:, :, :, : self.layout.used]
        steps = self.steps
        out[self.entries, self.heads, steps] = rows.flatten(2, 3)[:, :, : steps.stop - steps.start]

    def token_rows(self, x: Tensor) -> Tensor:
        """Return the stretch's rows of a tensor (B, H, T, F), one row per token, as (n, L, F)."""
        form = self.layout.form
        if form.micro == 1:
            return self.rows(x)
        spread = x.new_zeros(*self._counts, self.tokens.stop - self.tokens.start, form.micro, x.shape[-1])
        spread[:, :, :, form.read_at] = x[self.entries, self.heads, self.tokens]
        return self._padded(spread.flatten(2, 3))

    def put_tokens(self, rows: Tensor, out: Tensor) -> None:
        """Copy the tokens' rows of (n, L, F) to the stretch's tokens in `out` (B, H, T, F)."""
        used = slice(self.layout.form.read_at, self.layout.used, self.layout.form.micro)
        rows = self._by_chunk(rows)[:, :, :, used]
        tokens = self.tokens
        out[self.entries, self.heads, tokens] = rows.flatten(2, 3)[:, :, : tokens.stop - tokens.start]

    def _padded(self, x: Tensor) -> Tensor:
        """Return rows (B, H, rows, F) of whole tokens as chunks (n, L, F), padded with zeros."""
        layout = self.layout
        used, chunks = layout.used, self.stop - self.start
        if x.shape[2] == chunks * layout.length:
            return x.reshape(-1, layout.length, x.shape[-1])
        padded = x.new_zeros(*self._counts, chunks, layout.length, x.shape[-1])
        full_chunks = x.shape[2] // used
        padded[:, :, :full_chunks, :used] = x[:, :, : full_chunks * used].view(
            *x.shape[:2], full_chunks, used, x.shape[-1]
        )
        if full_chunks < chunks:
            padded[:, :, full_chunks, : x.shape[2] - full_chunks * used] = x[:, :, full_chunks * used :]
        return padded.flatten(0, 2)

    def _by_chunk(self, rows: Tensor) -> Tensor:
        """View rows (n, L, F) as (B, H, chunks, L, F)."""
        return rows.view(*self._counts, self.stop - self.start, *rows.shape[1:])
