"""The result of simulating a recurrence: a ladder from memory traffic to predicted time, and the plan of every pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnc.compiler.simulation.recurrent.print_found import print_found
from attnc.compiler.simulation.simulation import RungName, Simulation

RUNGS: tuple[RungName, ...] = ("memory", "states", "units", "chain", "predicted")
"""The rungs of a recurrence, each of which counts one cost more than the one before.

memory: inputs and outputs moved once. states: all bytes that are moved, including states before chunks. units: every
unit busy with the work of the chunks. chain: whole programs, and chunks one after another. predicted: the rates that
kernels reach.
"""

Kind = Literal["apart", "walk", "sum", "entries", "token by token", "cpu"]


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """The cost of a pass in chunks of `chunk` rows.

    `forward`, `backward`, `exps`: operations in matrix products and exponentials, for each token and head.
    `state_bytes`: bytes of the states before all chunks of the call. `ms`: the best plan's time, None if none fits.
    """

    chunk: int
    forward: float
    backward: float
    exps: float
    state_bytes: int
    ms: float | None


@dataclass(frozen=True, slots=True)
class PassKernel:
    """A kernel of a plan, with a time in milliseconds for each rung of `RUNGS`, none below the one before it."""

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
    """A pass over a state and how it runs.

    `words`: the name of its class. `micro`: rows of a chunk for each token. `columns`: columns of the state for each
    program. `chunk`: rows of a chunk, 0 if the pass has no chunks.
    """

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
        """The predicted milliseconds of all kernels."""
        return sum(kernel.ms for kernel in self.kernels)

    def __str__(self) -> str:
        split = f", {self.segments} segments" if self.segments > 1 else ""
        if not self.chunk:
            unchunked = {"sum": "one kernel for all tokens", "entries": f"entry by entry{split}"}
            return unchunked.get(self.kind, self.kind)
        hows = {"apart": ", states apart", "walk": ", one walk", "cpu": ""}
        return f"chunks of {self.chunk}{hows.get(self.kind, '')}{split}"


@dataclass(frozen=True, kw_only=True)
class RecurrenceSimulation(Simulation):
    """The simulation of a recurrence, whose rival is dense causal attention.

    `tiles`: the live tiles are the chunks on the diagonal. `times`: milliseconds of the rungs. `loop_ms`: the predicted
    time token by token. `state_bytes`: bytes of all states of all heads, which do not grow with the number of tokens.
    `reason`: why the recurrence runs token by token, empty if it does not.
    """

    passes: tuple[SimulatedPass, ...]
    times: tuple[float, ...]
    loop_ms: float
    state_bytes: int
    reason: str = ""

    @property
    def growth(self) -> str:
        """The growth of the time with the number of tokens."""
        return "O(1) a token, however many came before" if self.stage == "decode" else "O(n)"

    def rung_ms(self, name: RungName) -> float:
        """Return the milliseconds of a rung."""
        return self.times[RUNGS.index(name)]

    def __str__(self) -> str:
        return print_found(self)
