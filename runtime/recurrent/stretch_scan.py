"""A scan of all tokens, stretch by stretch: forward, and backward from the states before stretches.

The decays, the writes and the states of all tokens are never there at once: a stretch's are made, read and dropped,
and made anew by the backward, which differentiates what made and read them by torch's own autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from attnc.runtime.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.cpu.autograd import FirstOrder
from attnc.runtime.recurrent.prefixes import PrefixSteps, are_by_kernels, fill
from attnc.runtime.vector_math import settle

settle()

# Bytes of a stretch's states: few enough for the cache, many enough for the calls that compute them (measured); so many
# times of states that are vectors, whose tokens are small beside a call.
STRETCH = 1 << 21
OF_VECTORS = 4
# On a GPU, where nothing was measured: memory of some TB/s takes longer over so many than a kernel's start does.
STRETCH_ON_GPU = 1 << 26

Make = Callable[..., tuple[Tensor, Tensor]]
Read = Callable[..., Sequence[Tensor]]


class StretchStates:
    """The states of a stretch's tokens: `before` each token's step, after resets, and `after` it; (B, H, S, …) each."""

    def __init__(self, after: Tensor, start: Tensor, emptied: Tensor | None, *, leaves: bool = False) -> None:
        self.after = after.detach().requires_grad_() if leaves else after
        self.taken: Tensor | None = None
        """`before`, where it was asked for."""
        self._start = start
        self._emptied = emptied
        self._leaves = leaves

    @property
    def before(self) -> Tensor:
        """A copy, made when it is first asked for."""
        if self.taken is None:
            shifted = torch.cat([self._start[:, :, None], self.after.detach()[:, :, :-1]], 2)
            self.taken = _emptied(shifted, self._emptied).requires_grad_(self._leaves)
        return self.taken


class RecordedStates(StretchStates):
    """States of a stretch recorded by autograd, which follows `before` and `after` back to the states."""

    @property
    def before(self) -> Tensor:
        """A copy, made when it is first asked for."""
        if self.taken is None:
            shifted = torch.cat([self._start[:, :, None], self.after[:, :, :-1]], 2)
            self.taken = _emptied(shifted, self._emptied)
        return self.taken


class _Made(NamedTuple):
    """Inputs of a stretch of S tokens: `write` (B, H, S, …), `decay` broadcast to it; `emptied` bool (B, H or 1, S)."""

    decay: Tensor
    write: Tensor
    emptied: Tensor | None

    @property
    def factor(self) -> Tensor:
        """The decay as numbers: one for all tokens where it is the same at all of them."""
        decay = self.decay.detach()
        return decay[:, :, :1] if decay.stride(2) == 0 else decay

    def place(self, parts: Sequence[Tensor], spare: Tensor | None) -> Tensor:
        """Where the states after tokens go: in the place of the writes, where these are nobody else's."""
        write = self.write
        if write.device.type != "cpu" or are_by_kernels() or not write.is_contiguous():
            return torch.empty_like(write, memory_format=torch.contiguous_format)
        others = (self.decay, *(x for x in parts if spare is None or x.data_ptr() != spare.data_ptr()))
        shared = any(x.untyped_storage().data_ptr() == write.untyped_storage().data_ptr() for x in others)
        return torch.empty_like(write) if shared else write

    def fill(self, out: Tensor, start: Tensor) -> None:
        """The states after tokens, from the one before the first."""
        fill(PrefixSteps(out, self.factor, self.write.detach(), self.emptied), start)


@dataclass(frozen=True)
class StretchScan:
    """x_t = decay_t · x_{t-1} + write_t over `tokens` tokens, `length` at a time; `make` and `read` as their caller's.

    `split` says of each tensor whether it is cut along its dimension 2; `spare` as its caller's.
    """

    make: Make
    read: Read | None
    tokens: int
    length: int
    split: tuple[bool, ...]
    spare: Tensor | None = None
    by_kernels: bool = field(default_factory=are_by_kernels)

    def stretches(self) -> list[slice]:
        """All tokens, in order; one of none where there are none."""
        starts = range(0, max(self.tokens, 1), self.length)
        return [slice(start, min(start + self.length, self.tokens)) for start in starts]

    def forward(self, tensors: Sequence[Tensor], state: Tensor, resets: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """(what is read (B, H, T, …), states before each stretch and after the last (stretches + 1, B, H, …))."""
        stretches = self.stretches()
        kept = state.new_empty(len(stretches) + 1, *state.shape)
        kept[0] = state
        outs: list[Tensor] = []
        if self.read is None and len(stretches) > 1:
            outs = [state.new_empty(*state.shape[:2], self.tokens, *state.shape[2:])]
        for place, tokens in enumerate(stretches):
            parts = self._parts(tensors, tokens)
            made = self._made(parts, state, resets, tokens)
            in_place = self.read is not None or len(stretches) == 1
            after = made.place(parts, self.spare) if in_place else outs[0][:, :, tokens]
            made.fill(after, kept[place])
            kept[place + 1] = after[:, :, -1] if self.tokens else state
            if self.read is None:
                outs = outs or [after]
            else:
                found = self.read(StretchStates(after, kept[place], made.emptied), *parts)
                if len(stretches) == 1 and all(self._is_own(x, state, parts) for x in found):
                    return list(found), kept
                outs = outs or [x.new_empty(*state.shape[:2], self.tokens, *x.shape[3:]) for x in found]
                for out, x in zip(outs, found, strict=True):
                    out[:, :, tokens] = x
        return outs, kept

    def _is_own(self, x: Tensor, state: Tensor, parts: Sequence[Tensor]) -> bool:
        """Whether what was read is whole, and shares its place with nothing that was given."""
        places = {part.untyped_storage().data_ptr() for part in parts}
        return x.shape[:3] == (*state.shape[:2], self.tokens) and x.untyped_storage().data_ptr() not in places

    def at_once(self, tensors: Sequence[Tensor], state: Tensor, resets: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """(what is read, the final state) of a call that is one stretch, recorded by autograd as it is."""
        made = self._made(tensors, state, resets, slice(0, self.tokens))
        decay = made.decay.expand_as(made.write)
        after = cast("Tensor", _Filled.apply(made.emptied, state, decay, made.write))  # type: ignore[no-untyped-call]
        found = [after] if self.read is None else self.read(RecordedStates(after, state, made.emptied), *tensors)
        return [x.expand(*after.shape[:3], *x.shape[3:]) for x in found], after[:, :, -1]

    def backward(
        self,
        tensors: Sequence[Tensor],
        kept: Tensor,
        resets: Tensor | None,
        whole: Tensor | None,
        d_outs: Sequence[Tensor],
        d_final: Tensor,
        needed: Sequence[bool],
    ) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of the tensors that need one, and of the state before the first token.

        `whole`: the states after all tokens, where they are what was read.
        """
        totals = [
            _Total(x, split) if need else None for x, split, need in zip(tensors, self.split, needed, strict=True)
        ]
        last = d_final
        for place, tokens in reversed(list(enumerate(self.stretches() if self.tokens else []))):
            parts = [x.detach() for x in self._parts(tensors, tokens)]
            wanted = [x.requires_grad_() for x, need in zip(parts, needed, strict=True) if need]
            with torch.enable_grad():
                made = self._made(parts, kept[0], resets, tokens)
            start, d_here = kept[place], [d[:, :, tokens] for d in d_outs]
            if whole is None:
                after = torch.empty_like(made.write, memory_format=torch.contiguous_format)
                made.fill(after, start)
                d_before, d_after, direct = self._of_reads(after, start, made.emptied, parts, wanted, d_here)
            else:
                after, d_before, d_after, direct = whole[:, :, tokens], None, d_here[0], [None] * len(wanted)
            d_states, last = _adjoint(made, d_before, d_after, last, after)
            through = _of_made(made, d_states, after, start, wanted)
            for total, *both in zip([x for x in totals if x is not None], direct, through, strict=True):
                total.add(tokens, both)
        return [None if total is None else total.result() for total in totals], last

    def _of_reads(
        self,
        after: Tensor,
        start: Tensor,
        emptied: Tensor | None,
        parts: Sequence[Tensor],
        wanted: Sequence[Tensor],
        d_outs: Sequence[Tensor],
    ) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
        """Return the gradients through reads: of the states before and after tokens, and of the tensors."""
        assert self.read is not None
        states = StretchStates(after, start, emptied, leaves=True)
        with torch.enable_grad():
            found = [x.expand(*after.shape[:3], *x.shape[3:]) for x in self.read(states, *parts)]
        before = states.taken
        own = [states.after] if before is None else [states.after, before]
        gradients = _gradients(found, d_outs, [*own, *wanted])
        return None if before is None else gradients[1], gradients[0], gradients[len(own) :]

    def _parts(self, tensors: Sequence[Tensor], tokens: slice) -> list[Tensor]:
        return [x[:, :, tokens] if split else x for x, split in zip(tensors, self.split, strict=True)]

    def _made(self, parts: Sequence[Tensor], state: Tensor, resets: Tensor | None, tokens: slice) -> _Made:
        decay, write = self.make(*parts)
        shape = (*state.shape[:2], tokens.stop - tokens.start, *state.shape[2:])
        for name, x in (("decay", decay), ("write", write)):
            if x.ndim != len(shape) or any(
                size not in (1, wanted) for size, wanted in zip(x.shape, shape, strict=True)
            ):
                raise ArgumentError(f"{name}: a shape that broadcasts to {shape}, not {tuple(x.shape)}")
            if x.is_complex() and not state.is_complex():
                raise ArgumentTypeError(f"{name}: complex numbers need a complex state")
        emptied = None if resets is None else resets[:, :, tokens]
        if emptied is not None and not emptied.any():
            emptied = None
        return _Made(decay.to(state.dtype), write.to(state.dtype).expand(shape), emptied)


class _Filled(FirstOrder):
    """The states after tokens; kept with the decays, for a backward pass that follows at once."""

    @staticmethod
    def forward(emptied: Tensor | None, state: Tensor, decay: Tensor, write: Tensor) -> Tensor:
        after = torch.empty_like(write, memory_format=torch.contiguous_format)
        _Made(decay, write, emptied).fill(after, state)
        return after

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        emptied, state, decay, _ = inputs
        ctx.save_for_backward(emptied, state, decay, output)

    @staticmethod
    def backward(ctx: Any, d_after: Tensor) -> tuple[Tensor | None, ...]:
        emptied, state, decay, after = ctx.saved_tensors
        made = _Made(decay, after, emptied)
        d_states, d_state = _adjoint(made, None, d_after, torch.zeros_like(state), after)
        d_decay = _decay_adjoint(made, d_states, after, state) if ctx.needs_input_grad[2] else None
        return None, d_state, d_decay, d_states


class _Total:
    """A tensor's gradient, from its parts: of tokens, or summed over stretches, in fp32 at least."""

    def __init__(self, x: Tensor, split: bool) -> None:
        self._split = split
        self._dtype = x.dtype
        wide = torch.promote_types(x.dtype, torch.float32)
        self._sum = torch.zeros(x.shape, dtype=x.dtype if split else wide, device=x.device)

    def add(self, tokens: slice, parts: Sequence[Tensor | None]) -> None:
        """Add the gradients of a stretch."""
        place = self._sum[:, :, tokens] if self._split else self._sum
        for part in parts:
            if part is not None:
                place += part

    def result(self) -> Tensor:
        """In the tensor's dtype."""
        return self._sum.to(self._dtype)


def stretch_length(tokens: int, state: Tensor) -> int:
    """Tokens of a stretch, given the state (B, H, …). At least √T / 2: fewer would have more states kept than made."""
    size = max(state.numel() * state.element_size(), 1)
    on_cpu = STRETCH * (OF_VECTORS if state.ndim <= 3 else 1)
    return max((STRETCH_ON_GPU if state.is_cuda else on_cpu) // size, math.isqrt(tokens) // 2, 1)


def _emptied(x: Tensor, emptied: Tensor | None) -> Tensor:
    """Zeros where the state is emptied, whatever is there."""
    if emptied is None:
        return x
    return torch.where(emptied.reshape(*emptied.shape, *(1,) * (x.ndim - emptied.ndim)), 0, x)


def _adjoint(
    made: _Made, d_before: Tensor | None, d_after: Tensor | None, last: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The adjoints of the states after each token, and of the state before the first, from `last`, that of the end.

    `d_before`, `d_after`: what the reads give to the states before the tokens and after them.
    """
    decay = made.factor.conj().resolve_conj()
    given = torch.zeros_like(like) if d_after is None else d_after
    if d_before is not None:
        d_before = _emptied(d_before, made.emptied)
        given = torch.cat([given[:, :, :-1] + d_before[:, :, 1:], given[:, :, -1:]], 2)
    states = torch.empty_like(like, memory_format=torch.contiguous_format)
    torch.add(given[:, :, -1], last, out=states[:, :, -1])
    later = decay[:, :, 1:] if decay.shape[2] > 1 else decay
    emptied = None if made.emptied is None else made.emptied[:, :, 1:]
    fill(PrefixSteps(states[:, :, :-1], later, given[:, :, :-1], emptied), states[:, :, -1], backwards=True)
    first = None if made.emptied is None else made.emptied[:, :, :1]
    d_start = _emptied(decay[:, :, :1] * states[:, :, :1], first)
    if d_before is not None:
        d_start = d_start + d_before[:, :, :1]
    return states, d_start[:, :, 0]


def _of_made(
    made: _Made, d_states: Tensor, after: Tensor, start: Tensor, wanted: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Return the gradients of tensors through decays and writes: d write = d x, d decay = d x · conj(x before)."""
    d_decay = d_states
    with torch.enable_grad():
        decay = made.decay.expand_as(made.write)
    if decay.requires_grad:
        d_decay = _decay_adjoint(made, d_states, after, start)
    return _gradients([decay, made.write], [d_decay, d_states], wanted)


def _decay_adjoint(made: _Made, d_states: Tensor, after: Tensor, start: Tensor) -> Tensor:
    found = torch.empty_like(d_states)
    torch.mul(d_states[:, :, :1], start[:, :, None].conj(), out=found[:, :, :1])
    torch.mul(d_states[:, :, 1:], after[:, :, :-1].conj(), out=found[:, :, 1:])
    return _emptied(found, made.emptied)


def _gradients(
    roots: Sequence[Tensor], d_roots: Sequence[Tensor], tensors: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Return the gradients of the tensors, None where nothing depends on one."""
    pairs = [(x, d) for x, d in zip(roots, d_roots, strict=True) if x.requires_grad]
    if not pairs or not tensors:
        return [None] * len(tensors)
    return torch.autograd.grad([x for x, _ in pairs], tensors, [d for _, d in pairs], allow_unused=True)


__all__ = ["Make", "Read", "StretchScan", "StretchStates", "stretch_length"]
