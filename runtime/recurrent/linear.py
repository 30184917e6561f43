"""Linear recurrences with decays and corrections of rank one, computed chunk by chunk, differentiable once.

Of each batch entry and head, with a state S (R, C):

    for each token t, for each of its micro-steps j:
        S ← D_j S                      the decay: along rows, along columns, both, or one for all
        S ← S + u_j (r_jᵀ S)           the correction; r_j sees the S after the decay, or the one before it
        S ← S + k_j v_jᵀ
    o_t = q_tᵀ S

Linear attention, retention, Mamba-2, GLA, HGRN2, RWKV-6 and 7, DeltaNet and its gated kin, and Comba are settings of
it. Within a chunk all is matrix products; only the state's way from chunk to chunk is serial. All exponents are ≤ 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnc.runtime.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.recurrent.chunk_layout import ChunkLayout
from attnc.runtime.recurrent.chunked import ChunkedRecurrence, Inputs
from attnc.runtime.recurrent.recorded import is_keeping, recorded


@dataclass(frozen=True)
class Delta:
    """The delta rule: the write is β k vᵀ, and the correction, which sees the decayed state, has u = -β k and r = read.

    `beta` (B, H, N); `read` (B, H, N, R), None: the key itself (Schlag et al. 2021; Yang et al. 2024). With a read of
    its own it is the rule of Comba (Hu et al. 2025).
    """

    beta: Tensor
    read: Tensor | None = None


@dataclass(frozen=True)
class RankOne:
    """Any correction of rank one: S ← S + u (rᵀ S), u = `left` and r = `read`, both (B, H, N, R).

    `sees`: r reads the state after its micro-step's decay, or the one before it, "old" (RWKV-7, Peng et al. 2025).
    """

    left: Tensor
    read: Tensor
    sees: Literal["decayed", "old"]


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor | None = None,
    gate_columns: Tensor | None = None,
    correction: Delta | RankOne | None = None,
    before: bool = False,
    bonus: Tensor | None = None,
    resets: Tensor | None = None,
    state: Tensor | None = None,
    micro: int = 1,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """(out (B, H, T, C) in q's dtype, the final state (B, H, R, C) in fp32, in fp64 for fp64 inputs).

    Args:
        q: (B, H, T, R), any T ≥ 0.
        k: (B, H, N, R), N = T · micro: the micro-steps of a token one after another.
        v: (B, H, N, C).
        gate: log decay of each micro-step, ≤ 0, -inf is legal: (H,) the same at every micro-step, (B, H, N) for all
            rows, (B, H, N, R) one a row; None: no decay.
        gate_columns: log decay along the columns (B, H, N, C), as well or instead; not with a correction.
        correction: `Delta` or `RankOne`.
        before: o_t reads the state before all that token t does (but resets).
        bonus: (H, R) or (B, H, T, R), with `before` and one micro-step: o_t = q_tᵀ (S + diag(bonus) k_t v_tᵀ)
            (RWKV-6, Peng et al. 2024), k_t v_tᵀ without the β of `Delta`.
        resets: bool (B, T): the state is emptied before all that the token does, reading included.
        state: the state before the first token (B, H, R, C); None: zeros.
        micro: micro-steps of a token; o_t reads the state after the last of them.
        chunk: rows of a chunk, a power of two.

    16-bit inputs are computed in fp32. Both results are differentiable once in every real tensor. The memory of a call
    grows with T; kept for the gradient are the inputs and the states before chunks, from which it is computed anew.

    Raises:
        ArgumentError: on a shape that does not fit, on `gate_columns` with a correction, on a bonus without `before` or
            with more than one micro-step, on a chunk that is no power of two or shorter than a token's micro-steps.
        ArgumentTypeError: on a tensor of the wrong dtype.
        UnsupportedError: on differentiating a gradient, forward-mode differentiation, or `vmap`.
    """
    check_options(gate_columns, correction, before, bonus, micro, chunk)
    check_shapes(q, k, v, micro, gate, gate_columns, correction, bonus, resets, state)
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    batch, heads, tokens, rows = q.shape
    if state is None:
        state = torch.zeros(batch, heads, rows, v.shape[-1], dtype=dtype, device=q.device)
    if not batch * heads * tokens:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), state.to(dtype, copy=True)
    length = min(chunk, 1 << (tokens * micro - 1).bit_length())
    layout = ChunkLayout(batch, heads, tokens, micro, length, read_at=0 if before else micro - 1)
    old = isinstance(correction, RankOne) and correction.sees == "old"
    inputs = Inputs(
        q,
        k,
        v,
        state,
        gate=_gates(gate, k, dtype),
        columns=gate_columns,
        beta=correction.beta[..., None] if isinstance(correction, Delta) else None,
        read=correction.read if correction else None,
        left=correction.left if isinstance(correction, RankOne) else None,
        bonus=bonus.to(dtype)[None, :, None].expand_as(q) if bonus is not None and bonus.ndim == 2 else bonus,
        resets=None if resets is None else _reset_steps(resets, heads, micro),
    )
    return recorded(ChunkedRecurrence(layout, before, old, dtype, [] if is_keeping() else None), inputs)


def _gates(gate: Tensor | None, k: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(B, H, N, R or 1) of a gate of any shape; what heads have in common is summed in `dtype` by the gradient."""
    if gate is None or gate.ndim == 4:
        return gate
    if gate.ndim == 3:
        return gate[..., None]
    return gate.to(dtype)[None, :, None, None].expand(*k.shape[:3], 1)


def _reset_steps(resets: Tensor, heads: int, micro: int) -> Tensor:
    """(B, T) → (B, H, N, 1): at a token's first micro-step."""
    steps = resets.new_zeros(*resets.shape, micro, dtype=torch.int32)
    steps[..., 0] = resets
    return steps.flatten(1)[:, None, :, None].expand(-1, heads, -1, 1)


def check_options(
    gate_columns: Tensor | None,
    correction: Delta | RankOne | None,
    before: bool,
    bonus: Tensor | None,
    micro: int,
    chunk: int,
) -> None:
    """Raise ArgumentError for what does not go together."""
    if gate_columns is not None and correction is not None:
        raise ArgumentError("gate_columns with a correction: each column would need a triangle of its own")
    if bonus is not None and (not before or micro != 1):
        raise ArgumentError("bonus: it goes with before=True and micro=1")
    if chunk < 1 or chunk & (chunk - 1):
        raise ArgumentError(f"chunk: a power of two, not {chunk}")
    if not 1 <= micro <= chunk:
        raise ArgumentError(f"micro: from 1 to the chunk's {chunk} rows, not {micro}")


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    micro: int,
    gate: Tensor | None,
    gate_columns: Tensor | None,
    correction: Delta | RankOne | None,
    bonus: Tensor | None,
    resets: Tensor | None,
    state: Tensor | None,
) -> None:
    """Raise ArgumentError, ArgumentTypeError for tensors that do not fit one another."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ArgumentError(f"{name}: four dimensions, not shape {tuple(x.shape)}")
    batch, heads, tokens, rows = q.shape
    steps, columns = (batch, heads, tokens * micro), v.shape[-1]
    expected: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "q": (q, [tuple(q.shape)]),
        "k": (k, [(*steps, rows)]),
        "v": (v, [(*steps, columns)]),
        "gate": (gate, [(heads,), steps, (*steps, rows)]),
        "gate_columns": (gate_columns, [(*steps, columns)]),
        "bonus": (bonus, [(heads, rows), tuple(q.shape)]),
        "resets": (resets, [(batch, tokens)]),
        "state": (state, [(batch, heads, rows, columns)]),
    }
    for name, x in vars(correction).items() if correction else ():
        if name != "sees":
            expected[f"correction.{name}"] = (x, [steps if name == "beta" else (*steps, rows)])
    for name, (tensor, shapes) in expected.items():
        _check(name, tensor, shapes)


def _check(name: str, x: Tensor | None, shapes: Sequence[tuple[int, ...]]) -> None:
    if x is None:
        return
    if x.shape not in shapes:
        raise ArgumentError(f"{name}: shape {' or '.join(map(str, shapes))}, not {tuple(x.shape)}")
    if x.dtype != torch.bool if name == "resets" else not x.is_floating_point():
        raise ArgumentTypeError(f"{name}: {'bool' if name == 'resets' else 'real numbers'}, not {x.dtype}")
