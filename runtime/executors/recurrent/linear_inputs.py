"""The arguments of a linear recurrence, checked: its class and its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attnc.compiler.recurrences.recurrence_class import Corrected, Gate, RecurrenceClass
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError


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


class Inputs(NamedTuple):
    """The tensors of a call; q has a row for each token, the others for each step. None if absent."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor
    gate: Tensor | None
    columns: Tensor | None
    beta: Tensor | None
    read: Tensor | None
    left: Tensor | None
    resets: Tensor | None


_GATES: Mapping[int, Gate] = {1: "constant", 3: "scalar", 4: "rows"}
"""The kind of a gate by its number of dimensions."""


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor | None = None,
    gate_columns: Tensor | None = None,
    correction: Delta | RankOne | None = None,
    before: bool = False,
    resets: Tensor | None = None,
    state: Tensor | None = None,
    micro: int = 1,
    chunk: int = 64,
) -> tuple[RecurrenceClass, Inputs]:
    """Return the class and the tensors of a call of `linear_recurrence`, which documents the arguments.

    Raises ArgumentError, ArgumentTypeError.
    """
    _check_options(gate_columns, correction, micro, chunk)
    _check_shapes(q, k, v, micro, gate, gate_columns, correction, resets, state)
    corrected: Corrected = "none"
    if isinstance(correction, Delta):
        corrected = "delta" if correction.read is None else "comba"
    elif correction is not None:
        corrected = correction.sees
    form = RecurrenceClass(
        gate="none" if gate is None else _GATES[gate.ndim],
        columns=gate_columns is not None,
        correction=corrected,
        before=before,
        resets=resets is not None,
        micro=micro,
    )
    if state is None:
        dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
        state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=dtype, device=q.device)
    inputs = Inputs(
        q,
        k,
        v,
        state,
        gate=gate,
        columns=gate_columns,
        beta=correction.beta if isinstance(correction, Delta) else None,
        read=correction.read if correction else None,
        left=correction.left if isinstance(correction, RankOne) else None,
        resets=resets,
    )
    return form, inputs


def _check_options(
    gate_columns: Tensor | None,
    correction: Delta | RankOne | None,
    micro: int,
    chunk: int,
) -> None:
    """Raise ArgumentError for options that cannot be combined or are out of range."""
    if gate_columns is not None and correction is not None:
        raise ArgumentError(
            "gate_columns with a correction is not supported, as each column would need its own triangular solve; "
            "use gate, or no correction"
        )
    if chunk < 1 or chunk & (chunk - 1):
        raise ArgumentError(f"chunk must be a power of two, got {chunk}")
    if not 1 <= micro <= chunk:
        raise ArgumentError(f"micro must be from 1 to the {chunk} rows of a chunk, got {micro}")


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    micro: int,
    gate: Tensor | None,
    gate_columns: Tensor | None,
    correction: Delta | RankOne | None,
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
