"""A scan over all tokens, stretch by stretch: forward, and backward from the states before stretches.

The decays, writes and states of all tokens never exist at once: those of a stretch are computed, read and dropped. The
backward pass recomputes them and differentiates `make` and `read` by torch's autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.executors.cpu.autograd import FirstOrder
from attnc.runtime.executors.recurrent.prefixes import PrefixSteps, are_by_kernels, fill
from attnc.runtime.process.vector_math import settle

settle()

# Bytes of a stretch's states: few enough for the cache, many enough to amortise the overhead of torch calls (measured).
STRETCH = 1 << 21
# The factor of STRETCH for states that are vectors, whose arithmetic per token is small beside a call.
OF_VECTORS = 4
# Bytes of a stretch's states on a GPU (not measured): at some TB/s, accessing them takes longer than a kernel launch.
STRETCH_ON_GPU = 1 << 26

Make = Callable[..., tuple[Tensor, Tensor]]
Read = Callable[..., Sequence[Tensor]]


class StretchStates:
    """The states of a stretch's tokens: `before` each token's step, after resets, and `after` it; (B, H, S, …) each."""

    def __init__(self, after: Tensor, start: Tensor, emptied: Tensor | None, *, leaves: bool = False) -> None:
        self.after = after.detach().requires_grad_() if leaves else after
        self.taken: Tensor | None = None
        """The value of `before` once it was read, else None."""
        self._start = start
        self._emptied = emptied
        self._leaves = leaves

    @property
    def before(self) -> Tensor:
        """The states before each token's step, after resets; a copy, made when it is first read."""
        if self.taken is None:
            shifted = torch.cat([self._start[:, :, None], self.after.detach()[:, :, :-1]], 2)
            self.taken = _emptied(shifted, self._emptied).requires_grad_(self._leaves)
        return self.taken


class RecordedStates(StretchStates):
    """The states of a stretch, recorded by autograd: `before` and `after` are differentiable."""

    @property
    def before(self) -> Tensor:
        """The states before each token's step, after resets; a copy, made when it is first read."""
        if self.taken is None:
            shifted = torch.cat([self._start[:, :, None], self.after[:, :, :-1]], 2)
            self.taken = _emptied(shifted, self._emptied)
        return self.taken


class _StretchOperands(NamedTuple):
    """The operands of a stretch of S tokens: `write` (B, H, S, …), and `decay`, which broadcasts to it.

    `emptied` bool (B, H or 1, S): where the state is set to 0 before the token's step; None: nowhere.
    """

    decay: Tensor
    write: Tensor
    emptied: Tensor | None

    @property
    def factor(self) -> Tensor:
        """The decay without autograd, with a token axis of size 1 if it is the same at all tokens."""
        decay = self.decay.detach()
        return decay[:, :, :1] if decay.stride(2) == 0 else decay

    def allocate(self, parts: Sequence[Tensor], spare: Tensor | None) -> Tensor:
        """Return the tensor for the states after tokens: the writes' memory unless something shares it."""
        write = self.write
        if write.device.type != "cpu" or are_by_kernels() or not write.is_contiguous():
            return torch.empty_like(write, memory_format=torch.contiguous_format)
        others = (self.decay, *(x for x in parts if spare is None or x.data_ptr() != spare.data_ptr()))
        is_shared = any(x.untyped_storage().data_ptr() == write.untyped_storage().data_ptr() for x in others)
        return torch.empty_like(write) if is_shared else write

    def fill(self, out: Tensor, start: Tensor) -> None:
        """Compute the states after tokens into `out`, from the state before the first."""
        fill(PrefixSteps(out, self.factor, self.write.detach(), self.emptied), start)


@dataclass(frozen=True)
class StretchScan:
    """The scan x_t = decay_t · x_{t-1} + write_t over `tokens` tokens, in stretches of `length`.

    `make`, `read`, `spare`: as in `scan_stretches`. `split`: for each tensor, whether it is cut along dimension 2.
    """

    make: Make
    read: Read | None
    tokens: int
    length: int
    split: tuple[bool, ...]
    spare: Tensor | None = None
    by_kernels: bool = field(default_factory=are_by_kernels)

    def stretches(self) -> list[slice]:
        """Return the stretches of all tokens, in order; one empty stretch if there are no tokens."""
        starts = range(0, max(self.tokens, 1), self.length)
        return [slice(start, min(start + self.length, self.tokens)) for start in starts]

    def forward(self, tensors: Sequence[Tensor], state: Tensor, resets: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Compute (results (B, H, T, …), states before each stretch and after the last (stretches + 1, B, H, …))."""
        stretches = self.stretches()
        kept = state.new_empty(len(stretches) + 1, *state.shape)
        kept[0] = state
        outs: list[Tensor] = []
        if self.read is None and len(stretches) > 1:
            outs = [state.new_empty(*state.shape[:2], self.tokens, *state.shape[2:])]
        for i, tokens in enumerate(stretches):
            parts = self._parts(tensors, tokens)
            operands = self._operands(parts, state, resets, tokens)
            in_place = self.read is not None or len(stretches) == 1
            after = operands.allocate(parts, self.spare) if in_place else outs[0][:, :, tokens]
            operands.fill(after, kept[i])
            kept[i + 1] = after[:, :, -1] if self.tokens else state
            if self.read is None:
                outs = outs or [after]
            else:
                results = self.read(StretchStates(after, kept[i], operands.emptied), *parts)
                if len(stretches) == 1 and all(self._is_result(x, state, parts) for x in results):
                    return list(results), kept
                outs = outs or [x.new_empty(*state.shape[:2], self.tokens, *x.shape[3:]) for x in results]
                for out, x in zip(outs, results, strict=True):
                    out[:, :, tokens] = x
        return outs, kept

    def _is_result(self, x: Tensor, state: Tensor, parts: Sequence[Tensor]) -> bool:
        """Check whether a result of one stretch can be returned as it is: full shape, and no memory of an argument."""
        argument_memory = {part.untyped_storage().data_ptr() for part in parts}
        return x.shape[:3] == (*state.shape[:2], self.tokens) and x.untyped_storage().data_ptr() not in argument_memory

    def at_once(self, tensors: Sequence[Tensor], state: Tensor, resets: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Compute (results, the final state) of a call that is a single stretch, recorded by autograd."""
        operands = self._operands(tensors, state, resets, slice(0, self.tokens))
        emptied, write = operands.emptied, operands.write
        decay = operands.decay.expand_as(write)
        after = cast("Tensor", _Filled.apply(emptied, state, decay, write))  # type: ignore[no-untyped-call]
        results = [after] if self.read is None else self.read(RecordedStates(after, state, emptied), *tensors)
        return [x.expand(*after.shape[:3], *x.shape[3:]) for x in results], after[:, :, -1]

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
        """Compute the gradients of the tensors that need one, and of the state before the first token.

        `whole`: the states after all tokens, if they are the result; else None.
        """
        totals = [
            _GradientSum(x, split) if need else None for x, split, need in zip(tensors, self.split, needed, strict=True)
        ]
        last = d_final
        for i, tokens in reversed(list(enumerate(self.stretches() if self.tokens else []))):
            parts = [x.detach() for x in self._parts(tensors, tokens)]
            wanted = [x.requires_grad_() for x, need in zip(parts, needed, strict=True) if need]
            with torch.enable_grad():
                operands = self._operands(parts, kept[0], resets, tokens)
            start, d_stretch = kept[i], [d[:, :, tokens] for d in d_outs]
            if whole is None:
                after = torch.empty_like(operands.write, memory_format=torch.contiguous_format)
                operands.fill(after, start)
                d_before, d_after, direct = self._read_gradients(
                    after, start, operands.emptied, parts, wanted, d_stretch
                )
            else:
                after, d_before, d_after, direct = whole[:, :, tokens], None, d_stretch[0], [None] * len(wanted)
            d_states, last = _adjoint(operands, d_before, d_after, last, after)
            through_operands = _operand_gradients(operands, d_states, after, start, wanted)
            for total, *gradients in zip([x for x in totals if x is not None], direct, through_operands, strict=True):
                total.add(tokens, gradients)
        return [None if total is None else total.result() for total in totals], last

    def _read_gradients(
        self,
        after: Tensor,
        start: Tensor,
        emptied: Tensor | None,
        parts: Sequence[Tensor],
        wanted: Sequence[Tensor],
        d_outs: Sequence[Tensor],
    ) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
        """Return the gradients through `read`: of the states before tokens, after tokens, and of the tensors."""
        assert self.read is not None
        states = StretchStates(after, start, emptied, leaves=True)
        with torch.enable_grad():
            results = [x.expand(*after.shape[:3], *x.shape[3:]) for x in self.read(states, *parts)]
        before = states.taken
        state_leaves = [states.after] if before is None else [states.after, before]
        gradients = _gradients(results, d_outs, [*state_leaves, *wanted])
        return None if before is None else gradients[1], gradients[0], gradients[len(state_leaves) :]

    def _parts(self, tensors: Sequence[Tensor], tokens: slice) -> list[Tensor]:
        """Return the tensors of a stretch."""
        return [x[:, :, tokens] if split else x for x, split in zip(tensors, self.split, strict=True)]

    def _operands(
        self, parts: Sequence[Tensor], state: Tensor, resets: Tensor | None, tokens: slice
    ) -> _StretchOperands:
        decay, write = self.make(*parts)
        shape = (*state.shape[:2], tokens.stop - tokens.start, *state.shape[2:])
        for name, x in (("decay", decay), ("write", write)):
            if x.ndim != len(shape) or any(
                size not in (1, wanted) for size, wanted in zip(x.shape, shape, strict=True)
            ):
                raise ArgumentError(f"{name}: expected a shape that broadcasts to {shape}, got {tuple(x.shape)}")
            if x.is_complex() and not state.is_complex():
                raise ArgumentTypeError(f"{name} is complex: the state must be complex, too, got {state.dtype}")
        emptied = None if resets is None else resets[:, :, tokens]
        if emptied is not None and not emptied.any():
            emptied = None
        return _StretchOperands(decay.to(state.dtype), write.to(state.dtype).expand(shape), emptied)


class _Filled(FirstOrder):
    """The states after tokens under autograd, kept with the decays for a backward pass that follows at once."""

    @staticmethod
    def forward(emptied: Tensor | None, state: Tensor, decay: Tensor, write: Tensor) -> Tensor:
        after = torch.empty_like(write, memory_format=torch.contiguous_format)
        _StretchOperands(decay, write, emptied).fill(after, state)
        return after

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        emptied, state, decay, _ = inputs
        ctx.save_for_backward(emptied, state, decay, output)

    @staticmethod
    def backward(ctx: Any, d_after: Tensor) -> tuple[Tensor | None, ...]:
        emptied, state, decay, after = ctx.saved_tensors
        operands = _StretchOperands(decay, after, emptied)
        d_states, d_state = _adjoint(operands, None, d_after, torch.zeros_like(state), after)
        d_decay = _decay_adjoint(operands, d_states, after, state) if ctx.needs_input_grad[2] else None
        return None, d_state, d_decay, d_states


class _GradientSum:
    """A tensor's gradient, collected by stretch: written where the tensor is cut, else summed in fp32 or wider."""

    def __init__(self, x: Tensor, split: bool) -> None:
        self._split = split
        self._dtype = x.dtype
        sum_dtype = torch.promote_types(x.dtype, torch.float32)
        self._sum = torch.zeros(x.shape, dtype=x.dtype if split else sum_dtype, device=x.device)

    def add(self, tokens: slice, parts: Sequence[Tensor | None]) -> None:
        """Add the gradients of a stretch."""
        target = self._sum[:, :, tokens] if self._split else self._sum
        for part in parts:
            if part is not None:
                target += part

    def result(self) -> Tensor:
        """Return the gradient in the tensor's dtype."""
        return self._sum.to(self._dtype)


def stretch_length(tokens: int, state: Tensor) -> int:
    """Return the number of tokens of a stretch for a state (B, H, …), at least √T / 2.

    In shorter stretches the states between stretches would take more memory than the states of a stretch.
    """
    size = max(state.numel() * state.element_size(), 1)
    on_cpu = STRETCH * (OF_VECTORS if state.ndim <= 3 else 1)
    return max((STRETCH_ON_GPU if state.is_cuda else on_cpu) // size, math.isqrt(tokens) // 2, 1)


def _emptied(x: Tensor, emptied: Tensor | None) -> Tensor:
    """Return `x` with 0 where the state is emptied, even if `x` is not finite there."""
    if emptied is None:
        return x
    return torch.where(emptied.reshape(*emptied.shape, *(1,) * (x.ndim - emptied.ndim)), 0, x)


def _adjoint(
    operands: _StretchOperands, d_before: Tensor | None, d_after: Tensor | None, last: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the adjoints of the states after each token, and of the state before the first token.

    `last`: the adjoint of the final state from later stretches. `d_before`, `d_after`: the adjoints that reads
    contribute to the states before and after tokens.
    """
    decay = operands.factor.conj().resolve_conj()
    from_reads = torch.zeros_like(like) if d_after is None else d_after
    if d_before is not None:
        d_before = _emptied(d_before, operands.emptied)
        from_reads = torch.cat([from_reads[:, :, :-1] + d_before[:, :, 1:], from_reads[:, :, -1:]], 2)
    states = torch.empty_like(like, memory_format=torch.contiguous_format)
    torch.add(from_reads[:, :, -1], last, out=states[:, :, -1])
    later_decay = decay[:, :, 1:] if decay.shape[2] > 1 else decay
    later_emptied = None if operands.emptied is None else operands.emptied[:, :, 1:]
    fill(
        PrefixSteps(states[:, :, :-1], later_decay, from_reads[:, :, :-1], later_emptied),
        states[:, :, -1],
        backwards=True,
    )
    first_emptied = None if operands.emptied is None else operands.emptied[:, :, :1]
    d_start = _emptied(decay[:, :, :1] * states[:, :, :1], first_emptied)
    if d_before is not None:
        d_start = d_start + d_before[:, :, :1]
    return states, d_start[:, :, 0]


def _operand_gradients(
    operands: _StretchOperands, d_states: Tensor, after: Tensor, start: Tensor, wanted: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Return the gradients of tensors through decays and writes: d write = dx, d decay = dx · conj(x before)."""
    d_decay = d_states
    with torch.enable_grad():
        decay = operands.decay.expand_as(operands.write)
    if decay.requires_grad:
        d_decay = _decay_adjoint(operands, d_states, after, start)
    return _gradients([decay, operands.write], [d_decay, d_states], wanted)


def _decay_adjoint(operands: _StretchOperands, d_states: Tensor, after: Tensor, start: Tensor) -> Tensor:
    d_decay = torch.empty_like(d_states)
    torch.mul(d_states[:, :, :1], start[:, :, None].conj(), out=d_decay[:, :, :1])
    torch.mul(d_states[:, :, 1:], after[:, :, :-1].conj(), out=d_decay[:, :, 1:])
    return _emptied(d_decay, operands.emptied)


def _gradients(
    roots: Sequence[Tensor], d_roots: Sequence[Tensor], tensors: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Return the gradients of the tensors, None where the roots do not depend on a tensor."""
    pairs = [(x, d) for x, d in zip(roots, d_roots, strict=True) if x.requires_grad]
    if not pairs or not tensors:
        return [None] * len(tensors)
    return torch.autograd.grad([x for x, _ in pairs], tensors, [d for _, d in pairs], allow_unused=True)


__all__ = ["Make", "Read", "StretchScan", "StretchStates", "stretch_length"]
