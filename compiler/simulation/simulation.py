"""The result of a simulation: a ladder of bounds from visible pairs to predicted time, and the schedule behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Literal

from attnc.compiler.planning.tile_work import Order
from attnc.compiler.simulation.print_simulation import print_simulation
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
        """The number of attention matrices: batch × heads."""
        return self.batch * self.heads

    @property
    def pairs(self) -> int:
        """The number of pairs of a query and a key over all attention matrices."""
        return self.lanes * self.n_q * self.n_k


@dataclass(frozen=True, slots=True)
class Rung:
    """A speedup over ideal dense attention; `lost_to`: the cost that this rung counts and the rung above does not."""

    name: RungName
    speedup: float
    lost_to: str


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile counts over all attention matrices, in tiles of the schedule; `total`: dense attention in natural order."""

    total: int
    live: int
    full: int
    partial: int


@dataclass(frozen=True, slots=True)
class SimulatedSchedule:
    """A kernel and how it would run; `limit`: the busiest unit of the machine. Passes over a state have no tiles."""

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
    """The bytes of a call: `least` if each is read or written once, `moved` as predicted, `held` in memory at once."""

    least: int
    moved: int
    held: int


@dataclass(frozen=True)
class Simulation:
    """The simulation of a call; times are in milliseconds.

    `rungs`: speedups over ideal dense attention. `ideal_ms`: the time of ideal dense attention, with every unit busy,
    no tail and no launch. `dense_ms`: the predicted time of dense attention. `visible`: visible pairs, None where they
    were not counted. `estimated`: whether pairs and tiles are extrapolated from a part of the rows. `loads`:
    milliseconds of every worker in the main kernel, longest first.
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
        """The share of pairs that are visible, None where they were not counted."""
        return None if self.visible is None else self.visible / max(self.shape.pairs, 1)

    @property
    def speedup(self) -> float:
        """The speedup over the predicted time of dense attention."""
        return self.dense_ms / self.predicted_ms if self.predicted_ms else inf

    def rung(self, name: RungName) -> Rung:
        """Return a rung of the ladder."""
        return next(rung for rung in self.rungs if rung.name == name)

    def __str__(self) -> str:
        return print_simulation(self)


def ladder(pairs: int, visible: int | None, tile: float, balanced: float, predicted: float) -> tuple[float, ...]:
    """Return the four speedups of `RUNGS`, each lowered to the one before, whose costs it includes.

    Without that, ragged edges could reverse them, since dense attention is also counted in whole tiles.
    """
    element = inf if visible == 0 else None if visible is None else pairs / visible
    tile = tile if element is None else min(tile, element)
    balanced = min(balanced, tile)
    return tile if element is None else element, tile, balanced, min(predicted, balanced)


def time_share(what: str, ms: float, total_ms: float) -> str:
    """Return the share of the time that something takes, as text."""
    return f"{what} {ms / total_ms:.0%} of the time" if ms else f"{what} 0% of the time"
