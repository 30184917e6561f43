"""Elementwise affine recurrences, x_t = a_t · x_{t-1} + b_t, real or complex. Differentiable once.

HGRN (Qin et al. 2023), Mamba (Gu and Dao 2023), S5 (Smith et al. 2023), and the image and video recurrences built from
them. The scan takes no logarithms and no quotients, so a and b may be any numbers, zero and growing factors included,
as in a token loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.executors.cpu.autograd import FirstOrder, once
from attnc.runtime.executors.recurrent.prefixes import by_kernels
from attnc.runtime.executors.recurrent.recorded import is_keeping
from attnc.runtime.executors.recurrent.stretch_scan import (
    Make,
    Read,
    StretchScan,
    stretch_length,
)
from attnc.runtime.process.profiling import backward_row, keep_name

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


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
    split = tuple(x.ndim > 2 and x.shape[2] == tokens for x in tensors)
    scan = StretchScan(make, read, tokens, length or stretch_length(tokens, state), split, spare)
    emptied = resets[:, None] if resets is not None and resets.ndim == 2 else resets
    if is_keeping() and tokens and len(scan.stretches()) == 1:
        return scan.at_once(tensors, state, emptied)
    *outs, final, _ = _Scan.apply(scan, emptied, state, *tensors)  # type: ignore[no-untyped-call]
    return cast("list[Tensor]", outs), cast("Tensor", final)


class _Scan(FirstOrder):
    """The scan under autograd; its last result holds the states that the backward pass needs."""

    @staticmethod
    def forward(scan: StretchScan, resets: Tensor | None, state: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outs, kept = scan.forward(tensors, state, resets)
        return (*outs, kept[-1].clone(), kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        scan, resets, _, *tensors = inputs
        ctx.scan = scan
        keep_name(ctx)
        ctx.save_for_backward(output[-1], resets, output[0] if scan.read is None else None, *tensors)
        ctx.mark_non_differentiable(output[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *d_outs, d_final, _ = grads
        needed = tuple(ctx.needs_input_grad[3:])
        arguments = (ctx.scan, needed, len(d_outs), *d_outs, d_final, *ctx.saved_tensors)
        with backward_row(ctx):
            return (None, None, *once(_gradients, *arguments))


def _gradients(
    scan: StretchScan, needed: Sequence[bool], outs: int, *grads_and_saved: Any
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the state and of the tensors."""
    d_outs, (d_final, kept, resets, states, *tensors) = grads_and_saved[:outs], grads_and_saved[outs:]
    with by_kernels(scan.by_kernels):
        gradients, d_state = scan.backward(tensors, kept, resets, states, d_outs, d_final, needed)
    return (d_state, *gradients)


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


__all__ = ["scan_stretches"]
