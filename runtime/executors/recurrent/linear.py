"""Linear recurrences with decays and corrections of rank one, computed chunk by chunk, differentiable once.

For each batch entry and head, with a state S (R, C):

    for each token t, for each of its micro-steps j:
        S ← D_j S                      the decay: along rows, along columns, along both, or one scalar
        S ← S + u_j (r_jᵀ S)           the correction; r_j reads S after the decay, or before it
        S ← S + k_j v_jᵀ
    o_t = q_tᵀ S

Linear attention, retention, Mamba-2, GLA, HGRN2, RWKV-6 and 7, DeltaNet and its gated variants, and Comba are special
cases. Within a chunk everything is matrix products; only passing the state from chunk to chunk is serial. All exponents
are ≤ 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.executors.recurrent.chunk_layout import ChunkLayout
from attnc.runtime.executors.recurrent.chunked import ChunkedRecurrence, Inputs
from attnc.runtime.executors.recurrent.recorded import is_keeping, recorded


@dataclass(frozen=True)
class Delta:
    """The delta rule: the write is β k vᵀ; the correction reads the decayed state and has u = -β k and r = read.

    `beta` (B, H, N); `read` (B, H, N, R), None for the key (Schlag et al. 2021; Yang et al. 2024). A separate `read`
    gives the rule of Comba (Hu et al. 2025).
    """

    beta: Tensor
    read: Tensor | None = None


@dataclass(frozen=True)
class RankOne:
    """A general correction of rank one: S ← S + u (rᵀ S) with u = `left` and r = `read`, both (B, H, N, R).

    `sees`: whether r reads the state after its micro-step's decay, "decayed", or before it, "old" (RWKV-7, Peng et al.
    2025).
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
    """Compute (out (B, H, T, C) in q's dtype, the final state (B, H, R, C) in fp32, or in fp64 for fp64 inputs).

    Args:
        q: (B, H, T, R), any T ≥ 0.
        k: (B, H, N, R), N = T · micro; the micro-steps of a token are consecutive.
        v: (B, H, N, C).
        gate: log decay of each micro-step, ≤ 0 (-inf is legal): (H,) one per head, the same at every micro-step;
            (B, H, N) one for all rows; (B, H, N, R) one per row; None: no decay.
        gate_columns: log decay along the columns (B, H, N, C), with or without `gate`; not supported with a correction.
        correction: `Delta` or `RankOne`.
        before: o_t reads the state before the steps of token t, but after its reset.
        bonus: (H, R) or (B, H, T, R), with `before` and one micro-step: o_t = q_tᵀ (S + diag(bonus) k_t v_tᵀ)
            (RWKV-6, Peng et al. 2024); k_t v_tᵀ without the β of `Delta`.
        resets: bool (B, T): the state is set to zero before the token's read and steps.
        state: the state before the first token (B, H, R, C); None: zeros.
        micro: the number of micro-steps of a token; o_t reads the state after the last micro-step.
        chunk: the number of rows of a chunk, a power of two.

    16-bit inputs are computed in fp32. Both results are differentiable once in every real tensor. The memory of a call
    grows with T. The backward pass keeps the inputs and the states before chunks, and recomputes everything else.

    Raises:
        ArgumentError: for shapes that do not match, `gate_columns` with a correction, a bonus without `before` or with
            more than one micro-step, a chunk that is not a power of two or is shorter than a token's micro-steps.
        ArgumentTypeError: for a tensor of the wrong dtype.
        UnsupportedError: for second derivatives, forward-mode differentiation, and `vmap`.
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
    """Return a gate of any shape as (B, H, N, R or 1); the gradient of a per-head gate is summed in `dtype`."""
    if gate is None or gate.ndim == 4:
        return gate
    if gate.ndim == 3:
        return gate[..., None]
    return gate.to(dtype)[None, :, None, None].expand(*k.shape[:3], 1)


def _reset_steps(resets: Tensor, heads: int, micro: int) -> Tensor:
    """Return resets (B, T) as int32 (B, H, N, 1), 1 at the first micro-step of a token with a reset."""
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
    """Raise ArgumentError for options that cannot be combined or are out of range."""
    if gate_columns is not None and correction is not None:
        raise ArgumentError(
            "gate_columns with a correction is not supported, as each column would need its own triangular solve; "
            "use gate, or no correction"
        )
    if bonus is not None and (not before or micro != 1):
        raise ArgumentError(f"bonus requires before=True and micro=1, got before={before} and micro={micro}")
    if chunk < 1 or chunk & (chunk - 1):
        raise ArgumentError(f"chunk must be a power of two, got {chunk}")
    if not 1 <= micro <= chunk:
        raise ArgumentError(f"micro must be from 1 to the {chunk} rows of a chunk, got {micro}")


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
    """Raise ArgumentError for shapes that do not match, and ArgumentTypeError for wrong dtypes."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ArgumentError(f"{name} must have four dimensions, got shape {tuple(x.shape)}")
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
        _check_tensor(name, tensor, shapes)


def _check_tensor(name: str, x: Tensor | None, shapes: Sequence[tuple[int, ...]]) -> None:
    if x is None:
        return
    if x.shape not in shapes:
        raise ArgumentError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
    if x.dtype != torch.bool if name == "resets" else not x.is_floating_point():
        raise ArgumentTypeError(f"{name}: expected {'bool' if name == 'resets' else 'real numbers'}, got {x.dtype}")
