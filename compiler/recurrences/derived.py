"""The derived form of a recurrence: passes over its states, and their reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar, Literal, cast

from attnc.compiler import ir
from attnc.compiler.ir import Loop, Value
from attnc.compiler.recurrences.recurrence_class import Corrected, Gate, RecurrenceClass

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

    @property
    def decay(self) -> DecayForm | None:
        """The decay of a token's first step; None without one."""
        return next((micro.decay for micro in self.steps if micro.decay is not None), None)

    @property
    def gates(self) -> tuple[Value, ...]:
        """The values that decays are computed from."""
        return tuple(micro.decay.log for micro in self.steps if micro.decay is not None)

    @property
    def results(self) -> tuple[str, ...]:
        """The names of the tensors that the stage computes."""
        return (*(read.name for read in self.reads), *(solved.name for solved in self.solves))

    def form(self, micro: int = 1) -> RecurrenceClass:
        """Return the class of the pass, with `micro` steps for each token; a scalar gate may differ between tokens.

        Only a token's first step decays, so that the other corrections read the old state as well as the decayed one.
        """
        gate: Gate = "none"
        if self.decay is not None and self.decay.side != "columns":
            gate = self.decay.side
        corrections = [micro.correction for micro in self.steps if micro.correction is not None]
        corrected: Corrected = "old" if any(correction.sees == "old" for correction in corrections) else "decayed"
        if all(correction.merged for correction in corrections):
            corrected = "comba" if corrections else "none"
        columns = self.decay is not None and self.decay.side == "columns"
        return RecurrenceClass(gate=gate, columns=columns, correction=corrected, micro=micro)


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
    gates: ClassVar[tuple[Value, ...]] = ()
    """The values that decays are computed from: none."""

    @property
    def results(self) -> tuple[str, ...]:
        """The names of the tensors that the stage computes."""
        return self.before, self.after


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

    @property
    def gates(self) -> tuple[Value, ...]:
        """The values that decays are computed from."""
        return (self.decay,)

    @property
    def results(self) -> tuple[str, ...]:
        """The names of the tensors that the stage computes."""
        return tuple(name for name, _ in self.reads)


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

    @property
    def gates(self) -> tuple[Value, ...]:
        """The factors of the states before a token and of its impulses in the states after it."""
        factors = (factor for mix in self.after for factor in (*mix.states, *mix.impulses))
        return tuple(factor for factor in factors if factor is not None)

    @property
    def results(self) -> tuple[str, ...]:
        """The names of the tensors that the stage computes."""
        return tuple(read.name for read in self.reads)


Stage = Pass | ElementwiseScan | RunningReduction | Coupled


def states_of(stage: Stage) -> tuple[ir.State, ...]:
    """Return the states that a stage computes."""
    return stage.states if isinstance(stage, Coupled) else (stage.state,)


def values_of(part: object) -> Iterator[Value]:
    """Yield the values that a stage computes or reads, or those of a part of a stage."""
    if isinstance(part, ir.Node):
        yield cast("Value", part)
    elif isinstance(part, tuple):
        for item in part:
            yield from values_of(item)
    elif is_dataclass(part) and not isinstance(part, ir.State):
        for part_field in fields(part):
            yield from values_of(getattr(part, part_field.name))
