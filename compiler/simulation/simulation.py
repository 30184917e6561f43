"""The result of a simulation: a ladder of bounds from the visible pairs down to the time, and its schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Literal

from attnc.compiler.simulation.tile_work import Order
from attnc.spec.program import Value

Pass = Literal["forward", "backward", "decode"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "decode")

Baseline = Literal["full", "causal"]

RungName = Literal[
    "element", "tile", "balanced", "predicted", "memory", "states", "units", "chain", "attended", "listed"
]
RUNGS: tuple[RungName, ...] = ("element", "tile", "balanced", "predicted")
"""The rungs of patterns without selections; a recurrence's are in `recurrent.recurrence_simulation`."""

CHOSEN_RUNGS: tuple[RungName, ...] = ("element", "tile", "balanced", "attended", "listed", "predicted")
"""The rungs of patterns with selections: all attentions, then with the lists of blocks, then with the selection."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a call: q (batch, heads, n_q, dk), k and v (batch, kv_heads, n_k, dk and dv)."""

    batch: int
    heads: int
    kv_heads: int
    n_q: int
    n_k: int
    dk: int
    dv: int
    dtype: str

    @property
    def lanes(self) -> int:
        """Attention matrices."""
        return self.batch * self.heads

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key of all of them."""
        return self.lanes * self.n_q * self.n_k


@dataclass(frozen=True, slots=True)
class Rung:
    """A speedup over ideal dense attention, and what was lost on the way from the rung above."""

    name: RungName
    speedup: float
    lost_to: str


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile counts over all attention matrices, in the schedule's tiles; `total`: dense attention, in natural order."""

    total: int
    live: int
    full: int
    partial: int


@dataclass(frozen=True, slots=True)
class SimulatedSchedule:
    """A kernel and how it would run. `limit`: the unit of the machine that is busiest. Without tiles: of a state."""

    kernel: str
    q_tile: int
    k_tile: int
    order: Order
    how: str
    limit: str
    ms: float

    def __str__(self) -> str:
        tiles = f"tiles of {self.q_tile}×{self.k_tile} in {self.order}; " if self.q_tile else ""
        return f"{self.kernel}: {tiles}{self.how}"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of a call: read and written at least, moved as predicted, and held at once beside nothing else."""

    least: int
    moved: int
    held: int


@dataclass(frozen=True)
class Simulation:
    """Times are in milliseconds; `rungs` are speedups over dense attention at its own ideal (`ideal_ms`): every unit
    busy, no tail, no launch. `dense_ms` is what dense attention is predicted to take. `visible`: pairs, None where
    they were not counted. `estimated`: pairs and tiles were counted in a part of the rows. `loads`: milliseconds of
    work of every worker, by falling time, of the main kernel.
    """

    pattern: str
    params: Mapping[str, Value]
    device: str
    title: str
    shape: Shape
    stage: Pass
    baseline: Baseline
    causal: bool
    visible: int | None
    tiles: Tiles
    choices: tuple[SimulatedSchedule, ...]
    others: tuple[SimulatedSchedule, ...]
    rungs: tuple[Rung, ...]
    predicted_ms: float
    dense_ms: float
    ideal_ms: float
    calibrated: bool
    flop: int
    traffic: Traffic
    notes: tuple[str, ...]
    estimated: bool = False
    loads: tuple[float, ...] = ()
    workers: str = "SMs"

    @property
    def density(self) -> float | None:
        """Visible pairs of all pairs."""
        return None if self.visible is None else self.visible / max(self.shape.pairs, 1)

    @property
    def speedup(self) -> float:
        """Over dense attention as it is predicted to run."""
        return self.dense_ms / self.predicted_ms if self.predicted_ms else inf

    def rung(self, name: RungName) -> Rung:
        """Return a rung of the ladder."""
        return next(rung for rung in self.rungs if rung.name == name)

    def __str__(self) -> str:
        from attnc.compiler.simulation.print_simulation import print_simulation

        return print_simulation(self)


def ladder(pairs: int, visible: int | None, tile: float, balanced: float, predicted: float) -> tuple[float, ...]:
    """The four speedups, none above the one before: each counts everything that the one before does.

    Ragged edges alone could turn them around: dense attention is counted in whole tiles too.
    """
    element = inf if visible == 0 else None if visible is None else pairs / visible
    tile = tile if element is None else min(tile, element)
    balanced = min(balanced, tile)
    return tile if element is None else element, tile, balanced, min(predicted, balanced)
