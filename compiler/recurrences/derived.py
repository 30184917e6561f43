"""The derived form of a recurrence: passes over its states, and their reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnc.compiler import ir
from attnc.compiler.ir import Loop, Value

Side = Literal["scalar", "rows", "columns"]


class NoFormError(Exception):
    """A recurrence that is run token by token. The message says why."""


@dataclass(frozen=True)
class DecayForm:
    """`D`: its logarithm, at most 0, of each row, of each column, or one for all."""

    log: Value
    side: Side


@dataclass(frozen=True)
class Correction:
    """`u (rᵀ S)`, of the decayed state or of the one before. `merged`: u is minus the write's key (delta rules)."""

    left: Value
    read: Value
    sees: Literal["decayed", "old"]
    merged: bool


@dataclass(frozen=True)
class Micro:
    """One step of a state: decay, correction and write `k vᵀ`; so often as `repeat` says, the decay the first time."""

    decay: DecayForm | None = None
    correction: Correction | None = None
    write: tuple[Value, Value] | None = None
    repeat: Loop | None = None


@dataclass(frozen=True)
class Taken:
    """`qᵀ S` of every token, before its steps or after them, as the tensor `name`."""

    name: str
    query: Value
    before: bool


@dataclass(frozen=True)
class SolvedRead:
    """`solve(factor * S + rest, vector)` of every token, after its steps, by `steps` of conjugate gradients; `name`."""

    name: str
    factor: Value
    rest: Value | None
    vector: Value
    steps: int


@dataclass(frozen=True)
class Pass:
    """A state with its steps, and what is read of it. A vector is a matrix of one column; where `flat` it, or
    a number, is one of one row."""

    state: ir.State
    steps: tuple[Micro, ...]
    reads: tuple[Taken, ...]
    flat: bool = False
    solves: tuple[SolvedRead, ...] = ()


@dataclass(frozen=True)
class RunningReduction:
    """A state that becomes the largest so far of x, or `logaddexp`: before and after each token, by these names."""

    state: ir.State
    op: Literal["logaddexp", "max"]
    added: Value
    before: str
    after: str


@dataclass(frozen=True)
class ElementwiseScan:
    """A state whose entries go each for itself, `S ← D ⊙ S + W`; reads are nodes of it, as tensors of these names."""

    state: ir.State
    decay: Value
    write: Value
    versions: int
    reads: tuple[tuple[str, Value], ...]


@dataclass(frozen=True)
class Mix:
    """`Σ f_j S_j + Σ w_p u_p e_pᵀ` of states before a token and of its impulses; f and w are numbers. None: 0."""

    states: tuple[Value | None, ...]
    impulses: tuple[Value | None, ...] = ()


@dataclass(frozen=True)
class Impulse:
    """`u eᵀ`, e = v + Σ rᵀ S: of every read the vector r, and S as a mix of what there was before."""

    left: Value
    value: Value | None
    reads: tuple[tuple[Value, Mix], ...]


@dataclass(frozen=True)
class Mixed:
    """`qᵀ S` of every token, as the tensor `name`; S: a version of a state, as a mix."""

    name: str
    query: Value
    of: Mix


@dataclass(frozen=True)
class Coupled:
    """States of the same axes that read each other: the impulses of a token in the order of its lines, what the states
    are `after` it, and what is read of them. A vector is a matrix of one column."""

    states: tuple[ir.State, ...]
    impulses: tuple[Impulse, ...]
    after: tuple[Mix, ...]
    reads: tuple[Mixed, ...]


Stage = Pass | ElementwiseScan | RunningReduction | Coupled


def states_of(stage: Stage) -> tuple[ir.State, ...]:
    """The states that a stage computes."""
    return stage.states if isinstance(stage, Coupled) else (stage.state,)


@dataclass(frozen=True)
class RecurrenceForm:
    """Passes in their order, and what a token gets of their reads.

    `reason`: why states are taken entry by entry instead of by products of matrices, where some are.
    """

    stages: tuple[Stage, ...]
    result: Value
    reason: str = ""

    def __str__(self) -> str:
        from attnc.compiler.recurrences.print_derived import print_derived

        return print_derived(self)


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
    "RecurrenceForm",
    "RunningReduction",
    "Side",
    "SolvedRead",
    "Stage",
    "Taken",
    "states_of",
]
