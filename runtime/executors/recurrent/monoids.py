"""Elementwise running maximum and running log-sum-exp over tokens.

Both take x (B, H, T, …) and the state before the first token (B, H, …), -inf for none. `resets`, bool (B, T) or
(B, H, T), sets the state to -inf before the token's step. Both return the running value after each token, (B, H, T, …).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.executors.cpu.autograd import FirstOrder, once
from attnc.runtime.executors.recurrent.prefixes import PrefixSteps, fill
from attnc.runtime.executors.recurrent.stretch_scan import stretch_length
from attnc.runtime.process.profiling import backward_row, keep_name
from attnc.runtime.process.vector_math import settle

settle()


def running_max(x: Tensor, state: Tensor, resets: Tensor | None = None) -> Tensor:
    """Compute m_t = max(m_{t-1}, x_t). Among equal maxima, the last one gets the gradient.

    Raises ArgumentError, ArgumentTypeError.
    """
    emptied = _emptied(x, state, resets)
    with torch.no_grad():
        maxima = _maxima(x, state, emptied)
    if not torch.is_grad_enabled() or not (x.requires_grad or state.requires_grad):
        return maxima
    with torch.no_grad():
        reached = (x >= _before(maxima, state, emptied)) | x.isnan()
        tokens = torch.arange(1, x.shape[2] + 1, dtype=torch.float64).reshape(-1, *(1,) * (x.ndim - 3))
        latest = _maxima(torch.where(reached, tokens, 0), torch.zeros_like(state, dtype=torch.float64), None)
    return torch.cat([state[:, :, None], x], 2).gather(2, latest.long())


def running_log_sum(x: Tensor, state: Tensor, resets: Tensor | None = None) -> Tensor:
    """Compute z_t = log(exp(z_{t-1}) + exp(x_t)). Entries of -inf get a gradient of 0 and pass none on.

    Differentiable once.

    Raises ArgumentError and ArgumentTypeError, and UnsupportedError where `scan_stretches` does.
    """
    emptied = _emptied(x, state, resets)
    return cast("Tensor", _LogSum.apply(x, state, emptied))  # type: ignore[no-untyped-call]


class _LogSum(FirstOrder):
    """The running log-sum-exp under autograd."""

    @staticmethod
    def forward(x: Tensor, state: Tensor, emptied: Tensor | None) -> Tensor:
        return _log_sum(x, state, emptied)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        keep_name(ctx)
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor | None, ...]:
        with backward_row(ctx):
            return (*once(_log_sum_gradient, d_sum, *ctx.saved_tensors), None)


def _log_sum(x: Tensor, state: Tensor, emptied: Tensor | None) -> Tensor:
    """Compute the running log-sums stretch by stretch; a stretch starts from the last value of the one before."""
    sums = torch.empty_like(x, memory_format=torch.contiguous_format)
    for tokens in _stretches(x, state):
        stretch_emptied = None if emptied is None else emptied[:, :, tokens]
        sums[:, :, tokens] = _log_sum_of_stretch(x[:, :, tokens], state, stretch_emptied)
        state = sums[:, :, tokens.stop - 1]
    return sums


def _log_sum_gradient(
    d_sum: Tensor, x: Tensor, state: Tensor, emptied: Tensor | None, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute (dx, d state), last stretch first: a stretch passes the gradient of its start to the one before it."""
    d_x, last = torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(state)
    for tokens in reversed(_stretches(x, state)):
        start = sums[:, :, tokens.start - 1] if tokens.start else state
        stretch_emptied = None if emptied is None else emptied[:, :, tokens]
        d_x[:, :, tokens], last = _gradient_of_stretch(
            d_sum[:, :, tokens], last, x[:, :, tokens], start, stretch_emptied, sums[:, :, tokens]
        )
    return d_x, last


def _stretches(x: Tensor, state: Tensor) -> list[slice]:
    length = stretch_length(x.shape[2], state)
    return [slice(at, min(at + length, x.shape[2])) for at in range(0, x.shape[2], length)]


def _log_sum_of_stretch(x: Tensor, state: Tensor, emptied: Tensor | None) -> Tensor:
    """Compute m + log u with the running maximum m and u = Σ exp(x - m), which decays by exp(m_{t-1} - m_t)."""
    maxima = _maxima(x, state, emptied)
    base = torch.where(maxima.isinf(), 0, maxima)
    decay = torch.where(maxima == torch.inf, 1, (_before(maxima, state, emptied) - base).exp_())
    sums = torch.empty_like(maxima)
    fill(PrefixSteps(sums, decay, (x - base).exp_(), emptied), (state > -torch.inf).to(x.dtype))
    return torch.where(maxima.isinf(), maxima, sums.log_().add_(base))


def _gradient_of_stretch(
    d_sum: Tensor, last: Tensor, x: Tensor, state: Tensor, emptied: Tensor | None, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute dx_i = exp(x_i - z_i) r_i, r_i = dz_i + exp(z_i - z_{i+1}) r_{i+1}; every exponent is at most 0."""
    passed, later = _share(sums[:, :, :-1], sums[:, :, 1:]), None
    if emptied is not None:
        later = emptied[:, :, 1:]
        passed = torch.where(_as_mask(later, x), 0, passed)
    total = torch.empty_like(sums, memory_format=torch.contiguous_format)
    torch.add(d_sum[:, :, -1], last, out=total[:, :, -1])
    fill(PrefixSteps(total[:, :, :-1], passed, d_sum[:, :, :-1], later), total[:, :, -1], backwards=True)
    d_state = _share(state, sums[:, :, 0]) * total[:, :, 0]
    if emptied is not None:
        d_state = torch.where(_as_mask(emptied, x)[:, :, 0], 0, d_state)
    return _share(x, sums) * total, d_state


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Compute exp(part - whole): 0 where `part` is -inf, 1 where both are inf."""
    share = torch.where(part == whole, 1, (part - whole).exp())
    return torch.where(part == -torch.inf, 0, share)


def _maxima(x: Tensor, state: Tensor, emptied: Tensor | None) -> Tensor:
    maxima = torch.empty_like(x, memory_format=torch.contiguous_format)
    fill(PrefixSteps(maxima, None, x, emptied), state)
    return maxima


def _before(sums: Tensor, state: Tensor, emptied: Tensor | None) -> Tensor:
    """Return the running value before each token's step."""
    before = torch.cat([state[:, :, None], sums[:, :, :-1]], 2)[:, :, : sums.shape[2]]
    return before if emptied is None else torch.where(_as_mask(emptied, sums), -torch.inf, before)


def _as_mask(emptied: Tensor, x: Tensor) -> Tensor:
    """Append axes of size 1 to `emptied` so that it broadcasts to `x`."""
    return emptied.reshape(*emptied.shape, *(1,) * (x.ndim - 3))


def _emptied(x: Tensor, state: Tensor, resets: Tensor | None) -> Tensor | None:
    """Return the checked resets as (B, H or 1, T), None if no token has one.

    Raises ArgumentError, ArgumentTypeError.
    """
    if x.ndim < 3 or state.shape != (*x.shape[:2], *x.shape[3:]):
        raise ArgumentError(
            f"expected x of shape (B, H, T, …) and state of shape (B, H, …), got {tuple(x.shape)} and "
            f"{tuple(state.shape)}"
        )
    if x.dtype != state.dtype or x.dtype not in (torch.float32, torch.float64):
        raise ArgumentTypeError(f"x and state must be both fp32 or both fp64, got {x.dtype} and {state.dtype}")
    if resets is None:
        return None
    if resets.shape not in ((x.shape[0], x.shape[2]), x.shape[:3]):
        raise ArgumentError(
            f"resets: expected shape (B, T) or (B, H, T) for x of shape {tuple(x.shape)}, got {tuple(resets.shape)}"
        )
    if resets.dtype != torch.bool:
        raise ArgumentTypeError(f"resets: expected bool, got {resets.dtype}")
    if not resets.any():
        return None
    return resets[:, None] if resets.ndim == 2 else resets
