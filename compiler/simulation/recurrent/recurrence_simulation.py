"""The result of simulating a recurrence: a ladder from the memory down to the time, and the plan of every pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnc.compiler.simulation.simulation import RungName, Simulation

RUNGS: tuple[RungName, ...] = ("memory", "states", "units", "chain", "predicted")
"""The rungs, each counting one cost more than the one before: inputs and outputs moved once; all that is moved, states
before chunks among it; every unit busy with the work of the chunks; programs whole, chunks one after another; what
kernels reach."""

Kind = Literal["apart", "walk", "sum", "entries", "token by token", "cpu"]


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """A pass in chunks of `chunk` rows, for a token and head: operations in matrix products, forward and backward, and
    exponentials; `state_bytes`: of the states before all chunks of the call. `ms`: the best plan's, None: none fits."""

    chunk: int
    forward: float
    backward: float
    exps: float
    state_bytes: int
    ms: float | None


@dataclass(frozen=True, slots=True)
class PassKernel:
    """One kernel of a plan. Times are in milliseconds, none below the one before it: see `RUNGS`."""

    name: str
    programs: int
    steps: int
    moved: int
    flop: float
    memory_ms: float
    units_ms: float
    chain_ms: float
    ms: float
    limit: str


@dataclass(frozen=True, slots=True)
class SimulatedPass:
    """A pass over a state and how it runs. `words`: its class; `micro`: rows of a chunk for a token; `columns`: of the
    state, for each program; `chunk` 0: it has no chunks."""

    state: str
    words: str
    micro: int
    kind: Kind
    chunk: int
    segments: int
    columns: int
    kernels: tuple[PassKernel, ...]
    costs: tuple[ChunkCost, ...]

    @property
    def ms(self) -> float:
        """As predicted."""
        return sum(kernel.ms for kernel in self.kernels)

    def __str__(self) -> str:
        split = f", {self.segments} segments" if self.segments > 1 else ""
        if not self.chunk:
            alone = {"sum": "one kernel for all tokens", "entries": f"entry by entry{split}"}
            return alone.get(self.kind, self.kind)
        hows = {"apart": ", states apart", "walk": ", one walk", "cpu": ""}
        return f"chunks of {self.chunk}{hows.get(self.kind, '')}{split}"


@dataclass(frozen=True, kw_only=True)
class RecurrenceSimulation(Simulation):
    """The simulation of a recurrence. Its rival is dense causal attention; the tiles are the chunks' own, on the
    diagonal, of those of dense attention. `times`: milliseconds of the rungs; `loop_ms`: predicted token by token;
    `state_bytes`: of all states of all heads, however many tokens there are; `reason`: why it runs token by token,
    where it does.
    """

    passes: tuple[SimulatedPass, ...]
    times: tuple[float, ...]
    loop_ms: float
    state_bytes: int
    reason: str = ""

    @property
    def growth(self) -> str:
        """The law of its time."""
        return "O(1) a token, however many came before" if self.stage == "decode" else "O(n)"

    def rung_ms(self, name: RungName) -> float:
        """The time that a rung says."""
        return self.times[RUNGS.index(name)]

    def __str__(self) -> str:
        from attnc.compiler.simulation.recurrent.print_found import print_found

        return print_found(self)


__all__ = ["RUNGS", "ChunkCost", "Kind", "PassKernel", "RecurrenceSimulation", "SimulatedPass"]
