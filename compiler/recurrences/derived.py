"""What a recurrence is taken apart into: passes over its states, and what is read of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnc.compiler import ir
from attnc.compiler.ir import Loop, Value

Side = Literal["scalar", "rows", "columns"]


class NoFormError(Exception):
    """A recurrence that is run token by token. The message says why."""


@dataclass(frozen=True)
class Decay:
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

    decay: Decay | None = None
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
class Pass:
    """A state with its steps, and what is read of it. A vector is a matrix of one column."""

    state: ir.State
    steps: tuple[Micro, ...]
    reads: tuple[Taken, ...]


@dataclass(frozen=True)
class Running:
    """A state that becomes the largest so far of x, or `logaddexp`: before and after each token, by these names."""

    state: ir.State
    op: Literal["logaddexp", "max"]
    added: Value
    before: str
    after: str


@dataclass(frozen=True)
class Scan:
    """A state whose entries go each for itself, `S ← D ⊙ S + W`; reads are nodes of it, as tensors of these names."""

    state: ir.State
    decay: Value
    write: Value
    versions: int
    reads: tuple[tuple[str, Value], ...]


Stage = Pass | Scan | Running


@dataclass(frozen=True)
class Derived:
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
    "Decay",
    "Derived",
    "Micro",
    "NoFormError",
    "Pass",
    "Running",
    "Scan",
    "Side",
    "Stage",
    "Taken",
]
