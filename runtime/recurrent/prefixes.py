"""The states of all tokens of a stretch: affine steps entry by entry, or running maxima. Not recorded by autograd.

A state that is large at each token is taken token by token, as fast as memory lets it. For a small one a call of torch
costs more than its arithmetic: tokens go in chunks, a position in all chunks at once. Every chunk is run from an empty
state, which tells what it adds; then, with the products of the chunks' decays and in fp64, the states between chunks;
then every chunk again from the state before it. Nothing is divided and no logarithm taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of a token's states, in all heads and batch entries, from which they are taken token by token: measured, as
# is half as many for complex numbers, whose arithmetic is slower than memory.
LARGE = 1 << 14
# Tokens that are worth cutting into chunks.
FEWEST = 32
# Chunks of one decay that are joined at once rather than one after another.
JOINED = 16
# Numbers whose squares stay in the cache.
CACHED = 1 << 14


class PrefixSteps(NamedTuple):
    """`out` (B, H, N, …) to be filled, and what its steps are made of, (B, H, N, …) each; `out` may be `write`.

    `decay` broadcasts to `out`, with 1 for N where it is the same at all tokens; None: the step is the maximum of the
    state and `write`. `emptied` bool (B, H or 1, N): nothing is left of the state before the step.
    """

    out: Tensor
    decay: Tensor | None
    write: Tensor
    emptied: Tensor | None

    def part(self, tokens: slice) -> PrefixSteps:
        """Return the steps of some tokens."""
        decay, emptied = self.decay, self.emptied
        if decay is not None and decay.shape[2] > 1:
            decay = decay[:, :, tokens]
        if emptied is not None:
            emptied = emptied[:, :, tokens]
        return PrefixSteps(self.out[:, :, tokens], decay, self.write[:, :, tokens], emptied)


_BY_KERNELS: ContextVar[bool] = ContextVar("whether tensors on the CPU are for Triton's interpreter", default=False)


@contextmanager
def by_kernels(wanted: bool = True) -> Iterator[None]:
    """Inside, steps of tensors on the CPU are run by kernels too, where there are some."""
    token = _BY_KERNELS.set(wanted)
    try:
        yield
    finally:
        _BY_KERNELS.reset(token)


def are_by_kernels() -> bool:
    """Whether they are."""
    return _BY_KERNELS.get()


def fill(steps: PrefixSteps, start: Tensor, *, backwards: bool = False) -> None:
    """out_t = decay_t · out_{t-1} + write_t, the first from `start` (B, H, …); `backwards`: from out_{t+1}."""
    if (steps.out.is_cuda or are_by_kernels()) and steps.out.dtype in (torch.float32, torch.complex64):
        from attnc.runtime.gpu.recurrent import scan_on_gpu

        return scan_on_gpu.fill(*steps, start, backwards=backwards)
    return _in_torch(steps, start, backwards=backwards)


def _in_torch(steps: PrefixSteps, start: Tensor, *, backwards: bool) -> None:
    count = steps.out.shape[2]
    length = _chunk_length(steps)
    chunks = count // length if length else 0
    if chunks:
        tokens = slice(count - chunks * length, count) if backwards else slice(0, chunks * length)
        same = steps.decay is not None and steps.decay.shape[2] == 1 and steps.emptied is None
        start = (_by_blocks if same else _by_chunks)(steps.part(tokens), start, chunks, length, backwards)
        steps = steps.part(slice(0, tokens.start) if backwards else slice(tokens.stop, count))
        count -= chunks * length
    if count:
        places = _Places.of(steps, 2)
        places.walk(places.outs, start, _order(count, backwards))


def _by_chunks(steps: PrefixSteps, start: Tensor, chunks: int, length: int, backwards: bool) -> Tensor:
    """The state after all of them."""
    decay, emptied, cut = steps.decay, steps.emptied, (chunks, length)
    if decay is not None:
        decay = torch.unflatten(decay, 2, cut) if decay.shape[2] > 1 else decay.unsqueeze(3)
    if emptied is not None:
        emptied = torch.unflatten(emptied, 2, cut)
    places = _Places.of(
        PrefixSteps(torch.unflatten(steps.out, 2, cut), decay, torch.unflatten(steps.write, 2, cut), emptied), 3
    )
    inner, outer = _order(length, backwards), _order(chunks, backwards)
    made = steps.out.new_full((*start.shape[:2], chunks, *start.shape[2:]), places.nothing)
    places.walk([made] * length, made, inner)
    wide = made.to(torch.promote_types(made.dtype, torch.float64))
    kept = None if decay is None else _product(decay, length, wide.dtype)
    ends = PrefixSteps(torch.empty_like(wide), kept, wide, None if emptied is None else emptied.any(3))
    befores = ends.out.unbind(2)
    befores[outer[0]].copy_(start)
    between = _Places.of(ends, 2)
    for here, after in pairwise(outer):
        _step(between.writes[here], between.decays[here], befores[here], befores[after])
        mask = between.masks[here]
        if mask is not None:
            befores[after].copy_(torch.where(mask, between.writes[here], befores[after]))
    return places.walk(places.outs, ends.out.to(made.dtype), inner).select(2, outer[-1])


def _by_blocks(steps: PrefixSteps, start: Tensor, chunks: int, length: int, backwards: bool) -> Tensor:
    """As `_by_chunks`, where the decay is the same at all tokens: its powers join blocks of 1, 2, 4, … tokens."""
    assert steps.decay is not None
    powers = steps.decay.to(torch.promote_types(steps.out.dtype, torch.float64))
    while powers.shape[2] < length:
        powers = torch.cat([powers, powers * powers[:, :, -1:]], 2)
    whole, powers = powers[:, :, -1:], powers.to(steps.out.dtype)
    if steps.out.data_ptr() != steps.write.data_ptr():
        steps.out.copy_(steps.write)
    _join(torch.unflatten(steps.out, 2, (chunks, length)), powers, backwards)
    out = torch.unflatten(steps.out, 2, (chunks, length))
    ends = out.select(3, 0 if backwards else -1).to(whole.dtype)
    between = PrefixSteps(torch.empty_like(ends), whole, ends, None)
    wide = start.to(whole.dtype)
    if chunks % JOINED == 0:
        last = _by_blocks(between, wide, chunks // JOINED, JOINED, backwards)
    else:
        last = _Places.of(between, 2).walk(between.out.unbind(2), wide, _order(chunks, backwards))
    kept = between.out[:, :, 1:] if backwards else between.out[:, :, :-1]
    parts = [kept, wide[:, :, None]] if backwards else [wide[:, :, None], kept]
    befores = torch.cat(parts, 2).to(out.dtype)[:, :, :, None]
    out.addcmul_((powers.flip(2) if backwards else powers)[:, :, None], befores)
    return last.to(start.dtype)


def _join(out: Tensor, powers: Tensor, backwards: bool) -> None:
    """Within chunks (B, H, chunks, L, …) of writes, from an empty state; `powers` (B, H, L, …) of 1, 2, … steps."""
    size = 1
    while size < out.shape[3]:
        first, second = torch.unflatten(out, 3, (-1, 2, size)).unbind(4)
        if backwards:
            first.addcmul_(powers[:, :, :size].flip(2)[:, :, None, None], second[:, :, :, :, :1])
        else:
            second.addcmul_(powers[:, :, :size][:, :, None, None], first[:, :, :, :, -1:])
        size *= 2


class _Places(NamedTuple):
    """Steps one by one: of tokens, or of the tokens at a place of all chunks. Lists of the same length."""

    outs: Sequence[Tensor]
    decays: Sequence[Tensor | None]
    writes: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    """True where the state is emptied before the step; None where it nowhere is."""
    nothing: float

    @classmethod
    def of(cls, steps: PrefixSteps, axis: int) -> _Places:
        """The steps along an axis."""
        outs = steps.out.unbind(axis)
        decays: Sequence[Tensor | None] = [None] * len(outs)
        if steps.decay is not None:
            decays = steps.decay.unbind(axis)
            decays = decays * len(outs) if len(decays) == 1 else decays
        masks: list[Tensor | None] = [None] * len(outs)
        if steps.emptied is not None:
            lead = steps.emptied.movedim(axis, 0)
            for place in lead.flatten(1).any(1).nonzero().flatten().tolist():
                masks[place] = lead[place].reshape(*lead.shape[1:], *(1,) * (steps.out.ndim - steps.emptied.ndim))
        return cls(outs, decays, steps.write.unbind(axis), masks, -torch.inf if steps.decay is None else 0.0)

    def walk(self, outs: Sequence[Tensor], before: Tensor, order: Iterable[int]) -> Tensor:
        """Every step, into its place in `outs`; the last of them."""
        for place in order:
            mask = self.masks[place]
            if mask is not None:
                before = torch.where(mask, self.nothing, before)
            _step(self.writes[place], self.decays[place], before, outs[place])
            before = outs[place]
        return before


def _product(decay: Tensor, length: int, wide: torch.dtype) -> Tensor:
    """Return the product of the decays of each chunk, (B, H, chunks or 1, length or 1, …), multiplied in pairs.

    Of a decay that all tokens have, in the wide dtype: a rounding would be the same in every chunk, and add up.
    """
    if decay.shape[3] > 1:
        while decay.shape[3] > 1:
            decay = decay[:, :, :, 0::2] * decay[:, :, :, 1::2]
        return decay[:, :, :, 0].to(wide)
    power = decay[:, :, :, 0].to(wide)
    for _ in range(length.bit_length() - 1):
        power = power * power
    return power


def _step(write: Tensor, decay: Tensor | None, before: Tensor, out: Tensor) -> None:
    if decay is None:
        torch.maximum(write, before, out=out)
    else:
        torch.addcmul(write, decay, before, out=out)


def _order(count: int, backwards: bool) -> range:
    return range(count - 1, -1, -1) if backwards else range(count)


def _chunk_length(steps: PrefixSteps) -> int:
    """Tokens of a chunk, a power of two; 0: token by token.

    So too where decays grow: what a chunk makes of an empty state could then be larger than what it makes of its own.
    """
    out, decay = steps.out, steps.decay
    count = out.shape[2]
    large = LARGE // 2 if out.is_complex() else LARGE
    if count < FEWEST or not 0 < out.numel() * out.element_size() < large * count:
        return 0
    length = min(max(1 << (math.isqrt(count // 2).bit_length() - 1), 4), 128)
    return length if decay is None or _largest(decay) <= 2 ** (1 / length) else 0


def _largest(x: Tensor) -> float:
    """The largest absolute value, nan where there is one."""
    if x.is_complex():
        parts = x.chunk(-(-x.numel() // CACHED), 2)
        squares = [torch.view_as_real((part * part.conj()).resolve_conj()).amax() for part in parts]
        return math.sqrt(torch.stack(squares).amax().item())
    low, high = (end.item() for end in x.aminmax())
    return max(-low, high)


__all__ = ["PrefixSteps", "are_by_kernels", "by_kernels", "fill"]
