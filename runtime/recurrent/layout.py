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
class Layout:
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
        """Of a sequence."""
        return -(-self.tokens // self.per_chunk)

    def stretches(self) -> list[Stretch]:
        """All chunks, in order."""
        size = max(STRETCH // (self.length * self.batch * self.heads), 1)
        return [Stretch(self, at, min(at + size, self.chunks)) for at in range(0, self.chunks, size)]


@dataclass(frozen=True)
class Stretch:
    """The chunks from `start` to before `stop` of every sequence; n = B · H · (stop - start)."""

    layout: Layout
    start: int
    stop: int

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
        return self._laid(x[:, :, self.steps])

    def put(self, rows: Tensor, out: Tensor) -> None:
        """(n, L, F) → its place in (B, H, N, F)."""
        place = self.layout
        rows = self._by_chunk(rows)[:, :, :, : place.per_chunk * place.micro]
        steps = self.steps
        out[:, :, steps] = rows.flatten(2, 3)[:, :, : steps.stop - steps.start]

    def token_rows(self, x: Tensor) -> Tensor:
        """(B, H, T, F), a row a token → (n, L, F)."""
        place = self.layout
        if place.micro == 1:
            return self.rows(x)
        spread = x.new_zeros(*x.shape[:2], self.tokens.stop - self.tokens.start, place.micro, x.shape[-1])
        spread[:, :, :, place.read_at] = x[:, :, self.tokens]
        return self._laid(spread.flatten(2, 3))

    def put_tokens(self, rows: Tensor, out: Tensor) -> None:
        """The tokens' rows of (n, L, F) → their place in (B, H, T, F)."""
        place = self.layout
        used = slice(place.read_at, place.per_chunk * place.micro, place.micro)
        rows = self._by_chunk(rows)[:, :, :, used]
        tokens = self.tokens
        out[:, :, tokens] = rows.flatten(2, 3)[:, :, : tokens.stop - tokens.start]

    def _laid(self, x: Tensor) -> Tensor:
        place = self.layout
        used, chunks = place.per_chunk * place.micro, self.stop - self.start
        if x.shape[2] == chunks * place.length:
            return x.reshape(-1, place.length, x.shape[-1])
        padded = x.new_zeros(place.batch, place.heads, chunks, place.length, x.shape[-1])
        whole = x.shape[2] // used
        padded[:, :, :whole, :used] = x[:, :, : whole * used].view(*x.shape[:2], whole, used, x.shape[-1])
        if whole < chunks:
            padded[:, :, whole, : x.shape[2] - whole * used] = x[:, :, whole * used :]
        return padded.flatten(0, 2)

    def _by_chunk(self, rows: Tensor) -> Tensor:
        """(n, L, F) → (B, H, chunks, L, F)."""
        return rows.view(self.layout.batch, self.layout.heads, self.stop - self.start, *rows.shape[1:])
