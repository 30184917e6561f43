"""The derived form of a recurrence: passes over its states, and their reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnc.compiler import ir
from attnc.compiler.ir import Loop, Value

Side = Literal["scalar", "rows", "columns"]


class NoFormError(Exception):
    """Raised for a recurrence that must run token by token. The message is a noun phrase: what prevents a form."""


@dataclass(frozen=True)
class DecayForm:
    """The decay `D` of a state, as its logarithm (at most 0): a scalar, or one value per row or per column."""

    log: Value
    side: Side


@dataclass(frozen=True)
class Correction:
    """The correction `u (rᵀ S)` of a step, u = `left` and r = `read`, of the decayed state or of the state before.

    `merged`: u is minus the write's key, as in delta rules.
    """

    left: Value
    read: Value
    sees: Literal["decayed", "old"]
    merged: bool


@dataclass(frozen=True)
class Micro:
    """One step of a state: decay, correction, write `k vᵀ`. `repeat`: a loop of steps; only the first one decays."""

    decay: DecayForm | None = None
    correction: Correction | None = None
    write: tuple[Value, Value] | None = None
    repeat: Loop | None = None


@dataclass(frozen=True)
class Taken:
    """The read `qᵀ S` of every token, before or after its steps, stored as the tensor `name`."""

    name: str
    query: Value
    before: bool


@dataclass(frozen=True)
class SolvedRead:
    """The read `solve(factor * S + rest, vector)` of every token, after its steps, stored as the tensor `name`.

    `steps`: the number of steps of conjugate gradients.
    """

    name: str
    factor: Value
    rest: Value | None
    vector: Value
    steps: int


@dataclass(frozen=True)
class Pass:
    """A state with its steps and its reads, computed chunk by chunk.

    A vector is a matrix of one column; if `flat`, a vector or a number is a matrix of one row.
    """

    state: ir.State
    steps: tuple[Micro, ...]
    reads: tuple[Taken, ...]
    flat: bool = False
    solves: tuple[SolvedRead, ...] = ()


@dataclass(frozen=True)
class RunningReduction:
    """A state that is the running maximum or log-sum-exp of `added`.

    `before`, `after`: the names of the tensors of its values before and after each token.
    """

    state: ir.State
    op: Literal["logaddexp", "max"]
    added: Value
    before: str
    after: str


@dataclass(frozen=True)
class ElementwiseScan:
    """A state with the elementwise update `S ← D ⊙ S + W`, D = `decay` and W = `write`.

    `versions`: the number of its steps per token. `reads`: (name of the tensor, value that reads the state).
    """

    state: ir.State
    decay: Value
    write: Value
    versions: int
    reads: tuple[tuple[str, Value], ...]


@dataclass(frozen=True)
class Mix:
    """A mix `Σ f_j S_j + Σ w_p u_p e_pᵀ` of the states before a token and its impulses; numbers f, w, None for 0."""

    states: tuple[Value | None, ...]
    impulses: tuple[Value | None, ...] = ()


@dataclass(frozen=True)
class Impulse:
    """An impulse `u eᵀ` with e = v + Σ rᵀ S. `reads`: (vector r, the state S as a mix of what precedes the impulse)."""

    left: Value
    value: Value | None
    reads: tuple[tuple[Value, Mix], ...]


@dataclass(frozen=True)
class Mixed:
    """The read `qᵀ S` of every token, stored as the tensor `name`; `of`: the version S of a state, as a mix."""

    name: str
    query: Value
    of: Mix


@dataclass(frozen=True)
class Coupled:
    """Coupled states, which have the same axes and read each other. A vector is a matrix of one column.

    `impulses`: of a token, in the order of its steps. `after`: the states after the token. `reads`: its reads.
    """

    states: tuple[ir.State, ...]
    impulses: tuple[Impulse, ...]
    after: tuple[Mix, ...]
    reads: tuple[Mixed, ...]


Stage = Pass | ElementwiseScan | RunningReduction | Coupled


def states_of(stage: Stage) -> tuple[ir.State, ...]:
    """Return the states that a stage computes."""
    return stage.states if isinstance(stage, Coupled) else (stage.state,)


__all__ = [
    "Correction",
    "Coupled",
    "DecayForm",
    "ElementwiseScan",
    "Impulse",
    "Micro",
    "Mix",
    "Mixed",
    "NoFormError",
    "Pass",
    "RunningReduction",
    "Side",
    "SolvedRead",
    "Stage",
    "Taken",
    "states_of",
]
