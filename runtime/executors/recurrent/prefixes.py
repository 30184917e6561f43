"""The states of all tokens of a stretch, by elementwise affine steps or running maxima. Not recorded by autograd.

A state with many entries per token is computed token by token, at the speed of memory. For a small state a torch call
costs more than its arithmetic, so tokens are cut into chunks, and one call computes one position of all chunks. Each
chunk runs from an empty state, which gives what it adds. Then the states between chunks are computed in fp64, by the
products of the chunks' decays. Then each chunk runs again from the state before it. No quotient and no logarithm is
computed.
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

# Bytes of a token's states, in all heads and batch entries, from which states are computed token by token (measured).
# Half for complex numbers (measured), whose arithmetic is slower than memory.
LARGE = 1 << 14
# Minimum number of tokens for which chunks pay off.
FEWEST = 32
# Chunks with a common decay that are joined in blocks instead of one after another.
JOINED = 16
# Maximum number of complex entries whose squares stay in the cache.
CACHED = 1 << 14


class PrefixSteps(NamedTuple):
    """The tensor `out` (B, H, N, …) to fill, and the operands of its steps; `out` and `write` may be the same tensor.

    `decay` broadcasts to `out`, with N = 1 if it is the same at all tokens; None: the step is the maximum of the state
    and `write` (B, H, N, …). `emptied` bool (B, H or 1, N): where the state is discarded before the step.
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
    """Within this context, run the steps of CPU tensors by kernels too, if their dtype has kernels."""
    token = _BY_KERNELS.set(wanted)
    try:
        yield
    finally:
        _BY_KERNELS.reset(token)


def are_by_kernels() -> bool:
    """Check whether steps of CPU tensors are run by kernels."""
    return _BY_KERNELS.get()


def fill(steps: PrefixSteps, start: Tensor, *, backwards: bool = False) -> None:
    """Compute out_t = decay_t · out_{t-1} + write_t from `start` (B, H, …); `backwards`: from out_{t+1}."""
    if (steps.out.is_cuda or are_by_kernels()) and steps.out.dtype in (torch.float32, torch.complex64):
        from attnc.runtime.executors.triton.recurrent import scan_on_gpu  # only where kernels run

        return scan_on_gpu.fill(*steps, start, backwards=backwards)
    return _fill_in_torch(steps, start, backwards=backwards)


def _fill_in_torch(steps: PrefixSteps, start: Tensor, *, backwards: bool) -> None:
    count = steps.out.shape[2]
    length = _chunk_length(steps)
    chunks = count // length if length else 0
    if chunks:
        tokens = slice(count - chunks * length, count) if backwards else slice(0, chunks * length)
        same = steps.decay is not None and steps.decay.shape[2] == 1 and steps.emptied is None
        start = (_fill_blocks if same else _fill_chunks)(steps.part(tokens), start, chunks, length, backwards)
        steps = steps.part(slice(0, tokens.start) if backwards else slice(tokens.stop, count))
        count -= chunks * length
    if count:
        step_list = _StepList.of(steps, 2)
        step_list.walk(step_list.outs, start, _order(count, backwards))


def _fill_chunks(steps: PrefixSteps, start: Tensor, chunks: int, length: int, backwards: bool) -> Tensor:
    """Fill whole chunks; return the state after the last token."""
    decay, emptied, cut = steps.decay, steps.emptied, (chunks, length)
    if decay is not None:
        decay = torch.unflatten(decay, 2, cut) if decay.shape[2] > 1 else decay.unsqueeze(3)
    if emptied is not None:
        emptied = torch.unflatten(emptied, 2, cut)
    step_list = _StepList.of(
        PrefixSteps(torch.unflatten(steps.out, 2, cut), decay, torch.unflatten(steps.write, 2, cut), emptied), 3
    )
    inner, outer = _order(length, backwards), _order(chunks, backwards)
    added = steps.out.new_full((*start.shape[:2], chunks, *start.shape[2:]), step_list.nothing)
    step_list.walk([added] * length, added, inner)
    added_wide = added.to(torch.promote_types(added.dtype, torch.float64))
    chunk_decay = None if decay is None else _product(decay, length, added_wide.dtype)
    ends = PrefixSteps(
        torch.empty_like(added_wide), chunk_decay, added_wide, None if emptied is None else emptied.any(3)
    )
    befores = ends.out.unbind(2)
    befores[outer[0]].copy_(start)
    between = _StepList.of(ends, 2)
    for chunk, following in pairwise(outer):
        _step(between.writes[chunk], between.decays[chunk], befores[chunk], befores[following])
        emptied_mask = between.masks[chunk]
        if emptied_mask is not None:
            befores[following].copy_(torch.where(emptied_mask, between.writes[chunk], befores[following]))
    return step_list.walk(step_list.outs, ends.out.to(added.dtype), inner).select(2, outer[-1])


def _fill_blocks(steps: PrefixSteps, start: Tensor, chunks: int, length: int, backwards: bool) -> Tensor:
    """Fill whole chunks with one decay for all tokens: powers of the decay join blocks of 1, 2, 4, … tokens."""
    assert steps.decay is not None
    powers = steps.decay.to(torch.promote_types(steps.out.dtype, torch.float64))
    while powers.shape[2] < length:
        powers = torch.cat([powers, powers * powers[:, :, -1:]], 2)
    chunk_power, powers = powers[:, :, -1:], powers.to(steps.out.dtype)
    if steps.out.data_ptr() != steps.write.data_ptr():
        steps.out.copy_(steps.write)
    _join_blocks(torch.unflatten(steps.out, 2, (chunks, length)), powers, backwards)
    out = torch.unflatten(steps.out, 2, (chunks, length))
    ends = out.select(3, 0 if backwards else -1).to(chunk_power.dtype)
    between = PrefixSteps(torch.empty_like(ends), chunk_power, ends, None)
    wide_start = start.to(chunk_power.dtype)
    if chunks % JOINED == 0:
        last = _fill_blocks(between, wide_start, chunks // JOINED, JOINED, backwards)
    else:
        last = _StepList.of(between, 2).walk(between.out.unbind(2), wide_start, _order(chunks, backwards))
    inner = between.out[:, :, 1:] if backwards else between.out[:, :, :-1]
    parts = [inner, wide_start[:, :, None]] if backwards else [wide_start[:, :, None], inner]
    befores = torch.cat(parts, 2).to(out.dtype)[:, :, :, None]
    out.addcmul_((powers.flip(2) if backwards else powers)[:, :, None], befores)
    return last.to(start.dtype)


def _join_blocks(out: Tensor, powers: Tensor, backwards: bool) -> None:
    """Turn the writes of chunks (B, H, chunks, L, …) into states from an empty state; `powers` (B, H, L, …)."""
    size = 1
    while size < out.shape[3]:
        first, second = torch.unflatten(out, 3, (-1, 2, size)).unbind(4)
        if backwards:
            first.addcmul_(powers[:, :, :size].flip(2)[:, :, None, None], second[:, :, :, :, :1])
        else:
            second.addcmul_(powers[:, :, :size][:, :, None, None], first[:, :, :, :, -1:])
        size *= 2


class _StepList(NamedTuple):
    """The operands of steps as lists: one step per token, or per position within all chunks."""

    outs: Sequence[Tensor]
    decays: Sequence[Tensor | None]
    writes: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    """True where the state is discarded before the step; None if no state is."""
    nothing: float

    @classmethod
    def of(cls, steps: PrefixSteps, axis: int) -> _StepList:
        """Return the steps along an axis."""
        outs = steps.out.unbind(axis)
        decays: Sequence[Tensor | None] = [None] * len(outs)
        if steps.decay is not None:
            decays = steps.decay.unbind(axis)
            decays = decays * len(outs) if len(decays) == 1 else decays
        masks: list[Tensor | None] = [None] * len(outs)
        if steps.emptied is not None:
            emptied_by_step = steps.emptied.movedim(axis, 0)
            for i in emptied_by_step.flatten(1).any(1).nonzero().flatten().tolist():
                masks[i] = emptied_by_step[i].reshape(
                    *emptied_by_step.shape[1:], *(1,) * (steps.out.ndim - steps.emptied.ndim)
                )
        return cls(outs, decays, steps.write.unbind(axis), masks, -torch.inf if steps.decay is None else 0.0)

    def walk(self, outs: Sequence[Tensor], before: Tensor, order: Iterable[int]) -> Tensor:
        """Run the steps in `order` from the state `before`, writing into `outs`; return the last state."""
        for i in order:
            mask = self.masks[i]
            if mask is not None:
                before = torch.where(mask, self.nothing, before)
            _step(self.writes[i], self.decays[i], before, outs[i])
            before = outs[i]
        return before


def _product(decay: Tensor, length: int, wide: torch.dtype) -> Tensor:
    """Return the product of the decays of each chunk, (B, H, chunks or 1, length or 1, …), multiplied in pairs.

    A decay that all tokens share is multiplied in the wide dtype, since rounding errors that are equal in every chunk
    would add up.
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
    """Run a step from the state `before` into `out`; a decay of None takes the maximum."""
    if decay is None:
        torch.maximum(write, before, out=out)
    else:
        torch.addcmul(write, decay, before, out=out)


def _order(count: int, backwards: bool) -> range:
    """Return the order in which `count` steps run."""
    return range(count - 1, -1, -1) if backwards else range(count)


def _chunk_length(steps: PrefixSteps) -> int:
    """Return the number of tokens of a chunk, a power of two; 0: token by token.

    Growing factors run token by token: the states of a chunk from an empty state could be larger than its real states.
    """
    out, decay = steps.out, steps.decay
    count = out.shape[2]
    large = LARGE // 2 if out.is_complex() else LARGE
    if count < FEWEST or not 0 < out.numel() * out.element_size() < large * count:
        return 0
    length = min(max(1 << (math.isqrt(count // 2).bit_length() - 1), 4), 128)
    return length if decay is None or _largest(decay) <= 2 ** (1 / length) else 0


def _largest(x: Tensor) -> float:
    """Return the largest absolute value, or NaN if there is one."""
    if x.is_complex():
        parts = x.chunk(-(-x.numel() // CACHED), 2)
        squares = [torch.view_as_real((part * part.conj()).resolve_conj()).amax() for part in parts]
        return math.sqrt(torch.stack(squares).amax().item())
    low, high = (end.item() for end in x.aminmax())
    return max(-low, high)
