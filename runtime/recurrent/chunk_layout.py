"""Where the tokens of a call stand in chunks: laying a stretch of chunks out in rows, and taking rows back.

A chunk is `length` rows, a power of two. Its tokens' micro-steps fill as many of the rows as whole tokens can, the rest
are padding: zeros, which leave the state as it is, a log decay of 0 among them. What there is once a token (queries,
outputs) stands at the first of its rows or at the last.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Rows that are computed at once: few enough for their intermediates to stay in the cache, many enough for the calls
# that compute them to be worth their while. No result depends on it but by rounding.
STRETCH = 8192


@dataclass(frozen=True)
class ChunkLayout:
    """B · H sequences of `tokens` tokens of `micro` rows, in chunks of `length` rows; queries stand at `read_at`."""

    batch: int
    heads: int
    tokens: int
    micro: int
    length: int
    read_at: int

    @property
    def per_chunk(self) -> int:
        """Tokens of a chunk."""
        return self.length // self.micro

    @property
    def chunks(self) -> int:
        """The number of chunks of a sequence."""
        return -(-self.tokens // self.per_chunk)

    @property
    def is_plain(self) -> bool:
        """Whether rows are tokens, all of them and in their order."""
        return self.micro == 1 and self.tokens == self.chunks * self.length

    def stretches(self, *, by_sequence: bool) -> list[ChunkStretch]:
        """All chunks, those of a sequence in order: of all sequences side by side, or `by_sequence`.

        By sequence, rows that stand side by side in memory are taken as they are; side by side, the serial part of all
        sequences is one.
        """
        size = max(STRETCH // self.length, 1)
        whole = slice(0, self.batch), slice(0, self.heads)
        if not by_sequence or self.chunks * self.heads * self.batch <= size:
            each = max(size // (self.batch * self.heads), 1)
            return [ChunkStretch(self, *whole, at, min(at + each, self.chunks)) for at in range(0, self.chunks, each)]
        return [stretch for entry in range(self.batch) for stretch in self._of_entry(slice(entry, entry + 1), size)]

    def _of_entry(self, entry: slice, size: int) -> list[ChunkStretch]:
        heads, each = max(size // self.chunks, 1), min(size, self.chunks)
        return [
            ChunkStretch(self, entry, slice(head, min(head + heads, self.heads)), at, min(at + each, self.chunks))
            for head in range(0, self.heads, heads)
            for at in range(0, self.chunks, each)
        ]


@dataclass(frozen=True)
class ChunkStretch:
    """The chunks from `start` to before `stop` of some sequences; n = of these · (stop - start)."""

    layout: ChunkLayout
    entries: slice
    heads: slice
    start: int
    stop: int

    @property
    def sequences(self) -> slice:
        """The sequences of the stretch among all B · H; a stretch of several batch entries has all of their heads."""
        first = self.entries.start * self.layout.heads + self.heads.start
        return slice(first, (self.entries.stop - 1) * self.layout.heads + self.heads.stop)

    @property
    def _counts(self) -> tuple[int, int]:
        return self.entries.stop - self.entries.start, self.heads.stop - self.heads.start

    @property
    def tokens(self) -> slice:
        """The tokens of these chunks."""
        return slice(self.start * self.layout.per_chunk, min(self.stop * self.layout.per_chunk, self.layout.tokens))

    @property
    def steps(self) -> slice:
        """The micro-steps of these chunks."""
        return slice(self.tokens.start * self.layout.micro, self.tokens.stop * self.layout.micro)

    def rows(self, x: Tensor) -> Tensor:
        """(B, H, N, F), a row a micro-step → (n, L, F)."""
        return self._laid(x[self.entries, self.heads, self.steps])

    def put(self, rows: Tensor, out: Tensor) -> None:
        """(n, L, F) → its place in (B, H, N, F)."""
        place = self.layout
        rows = self._by_chunk(rows)[:, :, :, : place.per_chunk * place.micro]
        steps = self.steps
        out[self.entries, self.heads, steps] = rows.flatten(2, 3)[:, :, : steps.stop - steps.start]

    def token_rows(self, x: Tensor) -> Tensor:
        """(B, H, T, F), a row a token → (n, L, F)."""
        place = self.layout
        if place.micro == 1:
            return self.rows(x)
        spread = x.new_zeros(*self._counts, self.tokens.stop - self.tokens.start, place.micro, x.shape[-1])
        spread[:, :, :, place.read_at] = x[self.entries, self.heads, self.tokens]
        return self._laid(spread.flatten(2, 3))

    def put_tokens(self, rows: Tensor, out: Tensor) -> None:
        """The tokens' rows of (n, L, F) → their place in (B, H, T, F)."""
        place = self.layout
        used = slice(place.read_at, place.per_chunk * place.micro, place.micro)
        rows = self._by_chunk(rows)[:, :, :, used]
        tokens = self.tokens
        out[self.entries, self.heads, tokens] = rows.flatten(2, 3)[:, :, : tokens.stop - tokens.start]

    def _laid(self, x: Tensor) -> Tensor:
        place = self.layout
        used, chunks = place.per_chunk * place.micro, self.stop - self.start
        if x.shape[2] == chunks * place.length:
            return x.reshape(-1, place.length, x.shape[-1])
        padded = x.new_zeros(*self._counts, chunks, place.length, x.shape[-1])
        whole = x.shape[2] // used
        padded[:, :, :whole, :used] = x[:, :, : whole * used].view(*x.shape[:2], whole, used, x.shape[-1])
        if whole < chunks:
            padded[:, :, whole, : x.shape[2] - whole * used] = x[:, :, whole * used :]
        return padded.flatten(0, 2)

    def _by_chunk(self, rows: Tensor) -> Tensor:
        """(n, L, F) → (B, H, chunks, L, F)."""
        return rows.view(*self._counts, self.stop - self.start, *rows.shape[1:])
