"""Elementwise affine recurrences, x_t = a_t · x_{t-1} + b_t, real or complex, stretch by stretch. Differentiable once.

HGRN (Qin et al. 2023), Mamba (Gu and Dao 2023), S5 (Smith et al. 2023), and the image and video recurrences built from
them. The scan takes no logarithms and no quotients, so a and b may be any numbers, zero and growing factors included,
as in a token loop. The decays, writes and states of all tokens never exist at once: those of a stretch are computed,
read and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.executors.cpu.autograd import FirstOrder
from attnc.runtime.executors.recurrent.prefixes import PrefixSteps, are_by_kernels, by_kernels, fill
from attnc.runtime.executors.recurrent.recorded import SpanWork, Tensors, is_keeping, recorded
from attnc.runtime.process.vector_math import settle

settle()

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
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

    def __init__(self, after: Tensor, start: Tensor, emptied: Tensor | None) -> None:
        self.after = after
        self.taken: Tensor | None = None
        """The value of `before` once it was read, else None."""
        self._start = start
        self._emptied = emptied

    @property
    def before(self) -> Tensor:
        """The states before each token's step, after resets; a copy, made when it is first read."""
        if self.taken is None:
            shifted = torch.cat([self._start[:, :, None], self.after[:, :, :-1]], 2)
            self.taken = _emptied(shifted, self._emptied)
        return self.taken


def scan_stretches(
    make: Make,
    read: Read | None,
    tensors: Sequence[Tensor],
    *,
    tokens: int,
    state: Tensor,
    resets: Tensor | None = None,
    length: int | None = None,
    spare: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Compute x_t = decay_t · x_{t-1} + write_t stretch by stretch; return the results of `read` and the final state.

    Args:
        make: a function of the tensors of a stretch of S tokens that returns decay and write, each with as many axes as
            (B, H, S, …) and broadcastable to it.
        read: a function of the `StretchStates` of the stretch and the same tensors that returns the results of the
            tokens: any number of tensors (B or 1, H or 1, S or 1, …). None: the states after the tokens.
        tensors: the arguments of `make` and `read`. Tensors (·, ·, T, …) are cut along their third axis; others are
            passed whole.
        tokens: T.
        state: the state before the first token (B, H, …), fp32, fp64 or complex; complex where decay or write is.
        resets: bool (B, T) or (B, H, T): the state is set to 0, whatever it is, before the token's step.
        length: the number of tokens of a stretch; None: as many as fit the cache, and at least √T / 2.
        spare: a tensor among `tensors` that nothing reads after `make`, so that states may overwrite it.

    The results and the final state are differentiable once in `tensors` and `state`, but not in tensors that `make` and
    `read` capture. Both functions are called once per stretch, and again by the backward pass, which keeps the tensors
    and the states before stretches. They must be deterministic and must not write to their arguments.

    Example: Mamba's step S = exp(dt * A) * S + outer(k, dt * v) and read q @ S, with dt and v (B, H, T, dv), k and q
    (B, H, T, dk):

        def make(q, k, v, dt, A):
            return torch.exp(dt[..., None, :] * A), k[..., :, None] * (dt * v)[..., None, :]

        def read(states, q, k, v, dt, A):
            return [(q[..., None, :] @ states.after).squeeze(-2)]

        (out,), final = scan_stretches(make, read, [q, k, v, dt, A], tokens=T, state=S)

    Raises:
        ArgumentError: for a shape that does not match.
        ArgumentTypeError: for a dtype that is not supported.
        UnsupportedError: for second derivatives, forward-mode differentiation, and `vmap`.

    Errors raised by `make` and `read` propagate.
    """
    _check(tokens, state, resets, length)
    emptied = resets[:, None] if resets is not None and resets.ndim == 2 else resets
    scan = _StretchScan(make, read, tokens, length or stretch_length(tokens, state), emptied, spare)
    scan.split = tuple(x.ndim > 2 and x.shape[2] == tokens for x in tensors)
    if is_keeping() and 0 < tokens <= scan.length:
        outs, (final,) = scan.run(list(tensors), [state], slice(0, tokens), ())
        return list(outs), final
    *outs, final = recorded(scan, [*tensors, state])
    return outs, final


class _StretchScan(SpanWork):
    """The scan of `scan_stretches`, in stretches of `length`. `split`: whether each tensor is cut along dimension 2."""

    split: tuple[bool, ...]

    def __init__(
        self, make: Make, read: Read | None, tokens: int, length: int, emptied: Tensor | None, spare: Tensor | None
    ) -> None:
        super().__init__(1, tokens, spare)
        self.length = length
        self._make, self._read, self._emptied = make, read, emptied
        self.reuses = read is None
        self._by_kernels = are_by_kernels()

    def spans(self, arguments: Tensors) -> list[slice]:
        """Return the stretches of all tokens; one empty stretch if there are no tokens."""
        starts = range(0, max(self._tokens, 1), self.length)
        return [slice(start, min(start + self.length, self._tokens)) for start in starts]

    def cut(self, arguments: Tensors, span: slice) -> list[Tensor]:
        """Return the tensors of a stretch."""
        return [x[:, :, span] if split else x for x, split in zip(arguments, self.split, strict=True)]

    def run(
        self, parts: list[Tensor], states: Tensors, span: slice, known: Tensors | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Compute (results (B, H, S, …), the state after the stretch)."""
        (state,) = states
        with by_kernels(self._by_kernels):
            operands = self._operands(parts, state, span)
            if known is not None and span.stop > span.start:
                decay = operands.decay.expand_as(operands.write)
                after, last = _Filled.apply(known, operands.emptied, state, decay, operands.write)  # type: ignore[no-untyped-call]
            else:
                after = operands.allocate(parts, self.spare)
                operands.fill(after, state)
                last = after[:, :, -1].clone() if span.stop > span.start else state
            results = [after]
            if self._read is not None:
                results = list(self._read(StretchStates(after, state, operands.emptied), *parts))
        return [x.expand(*after.shape[:3], *x.shape[3:]) for x in results], [last]

    def _operands(self, parts: Sequence[Tensor], state: Tensor, tokens: slice) -> _StretchOperands:
        decay, write = self._make(*parts)
        shape = (*state.shape[:2], tokens.stop - tokens.start, *state.shape[2:])
        for name, x in (("decay", decay), ("write", write)):
            if x.ndim != len(shape) or any(
                size not in (1, wanted) for size, wanted in zip(x.shape, shape, strict=True)
            ):
                raise ArgumentError(f"{name}: expected a shape that broadcasts to {shape}, got {tuple(x.shape)}")
            if x.is_complex() and not state.is_complex():
                raise ArgumentTypeError(f"{name} is complex: the state must be complex, too, got {state.dtype}")
        emptied = None if self._emptied is None else self._emptied[:, :, tokens]
        if emptied is not None and not emptied.any():
            emptied = None
        return _StretchOperands(decay.to(state.dtype), write.to(state.dtype).expand(shape), emptied)


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


class _Filled(FirstOrder):
    """The states after tokens, and the last of them, under autograd; `known`: the states, if they are known already."""

    @staticmethod
    def forward(
        known: Tensors, emptied: Tensor | None, state: Tensor, decay: Tensor, write: Tensor
    ) -> tuple[Tensor, Tensor]:
        if known:
            return known[0].view_as(known[0]), known[0][:, :, -1].clone()
        after = torch.empty_like(write, memory_format=torch.contiguous_format)
        _StretchOperands(decay, write, emptied).fill(after, state)
        return after, after[:, :, -1].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.by_kernels = are_by_kernels()
        ctx.save_for_backward(*inputs[1:4], output[0])

    @staticmethod
    def backward(ctx: Any, d_after: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        emptied, state, decay, after = ctx.saved_tensors
        operands = _StretchOperands(decay, after, emptied)
        with by_kernels(ctx.by_kernels):
            d_states, d_state = _adjoint(operands, d_after, d_last)
        d_decay = _decay_adjoint(operands, d_states, after, state) if ctx.needs_input_grad[3] else None
        return None, None, d_state, d_decay, d_states


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


def _adjoint(operands: _StretchOperands, d_after: Tensor, d_last: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the adjoints of the states after each token, and of the state before the first token.

    `d_after`: the adjoints that reads contribute. `d_last`: the adjoint of the final state from later stretches.
    """
    decay = operands.factor.conj().resolve_conj()
    states = torch.empty_like(d_after, memory_format=torch.contiguous_format)
    torch.add(d_after[:, :, -1], d_last, out=states[:, :, -1])
    later_decay = decay[:, :, 1:] if decay.shape[2] > 1 else decay
    later_emptied = None if operands.emptied is None else operands.emptied[:, :, 1:]
    steps = PrefixSteps(states[:, :, :-1], later_decay, d_after[:, :, :-1], later_emptied)
    fill(steps, states[:, :, -1], backwards=True)
    first_emptied = None if operands.emptied is None else operands.emptied[:, :, :1]
    return states, _emptied(decay[:, :, :1] * states[:, :, :1], first_emptied)[:, :, 0]


def _decay_adjoint(operands: _StretchOperands, d_states: Tensor, after: Tensor, start: Tensor) -> Tensor:
    d_decay = torch.empty_like(d_states)
    torch.mul(d_states[:, :, :1], start[:, :, None].conj(), out=d_decay[:, :, :1])
    torch.mul(d_states[:, :, 1:], after[:, :, :-1].conj(), out=d_decay[:, :, 1:])
    return _emptied(d_decay, operands.emptied)


def _check(tokens: int, state: Tensor, resets: Tensor | None, length: int | None) -> None:
    if state.ndim < 2:
        raise ArgumentError(f"state: expected shape (B, H, …), got {tuple(state.shape)}")
    if state.dtype not in DTYPES:
        raise ArgumentTypeError(f"state: expected fp32, fp64, complex64 or complex128, got {state.dtype}")
    if length is not None and length < 1:
        raise ArgumentError(f"length must be at least 1, got {length}")
    batch, heads = state.shape[:2]
    if resets is None:
        return
    if resets.shape not in ((batch, tokens), (batch, heads, tokens)):
        raise ArgumentError(
            f"resets: expected shape {(batch, tokens)} or {(batch, heads, tokens)}, got {tuple(resets.shape)}"
        )
    if resets.dtype != torch.bool:
        raise ArgumentTypeError(f"resets: expected bool, got {resets.dtype}")
