"""One kernel with its tiles in an order, on a machine: its work items, their schedule, its time and where that goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attnc.compiler.simulation.balance import Float64, Items, items, least_time, scheduled
from attnc.compiler.simulation.gpu_clocks import TileModel
from attnc.compiler.simulation.machine import Machine
from attnc.compiler.simulation.strips import Strips
from attnc.compiler.simulation.tile_work import TileWork
from attnc.compiler.simulation.traffic import memory_ms

SPLITS = (2, 4, 8)
"""Parts that a row's keys are split into, where there are too few rows to keep the machine busy."""


@dataclass(frozen=True, eq=False)
class KernelRun:
    """A kernel with tiles in an order: what it takes of a machine, in clocks of an SM.

    `parts`: each strip of tiles is walked by so many programs, whose results are merged.
    """

    model: TileModel
    work: TileWork
    strips: Strips
    dense: Strips
    programs: int
    merged_ms: float
    moved: int
    passes: int
    parts: int = 1

    @property
    def machine(self) -> Machine:
        """Where it runs."""
        return self.model.machine

    @property
    def full_clocks(self) -> float:
        """The expected clocks of a full tile."""
        return self.model.predicted(self.model.full) * self.passes

    @property
    def mask_clocks(self) -> float:
        """Beyond that, of a partial one."""
        return self.model.predicted(self.model.partial) * self.passes - self.full_clocks

    @cached_property
    def items(self) -> Items:
        """A program for each strip."""
        strips = self.strips
        clocks = (strips.full + strips.partial) * self.full_clocks + strips.partial * self.mask_clocks
        return items(clocks + self.machine["prologue_clocks"], strips.times)

    @cached_property
    def tiles(self) -> Items:
        """The strips in tiles."""
        return _in_tiles(self.strips)

    @cached_property
    def least_clocks(self) -> float:
        """The least clocks of the machine for the live tiles, however the keys of a row are split.

        A bound must not depend on which split is chosen.
        """
        unsplit = self.work.columns if self.model.kernel == "dkdv" else self.work.rows
        choices = (1, *SPLITS) if self.model.kernel == "forward" else (1,)
        work = [_in_tiles(unsplit.split(parts)) for parts in choices]
        return min(least_time(tiles, self.machine.sms) for tiles in work) * self.full_clocks

    @cached_property
    def loads(self) -> Float64:
        """Clocks of every slot for a program; those of one SM share it."""
        work = self.items
        return scheduled(Items(work.size * self.programs, work.times), self.machine.sms * self.programs)

    @cached_property
    def estimate_ms(self) -> float:
        """The time without a schedule: the mean, or what the longest programs need."""
        clocks = least_time(self.items, self.machine.sms)
        return self._with_memory(clocks)

    @cached_property
    def ms(self) -> float:
        """The time of the schedule, or of the memory, with the launch."""
        return self._with_memory(float(self.loads[0]) if len(self.loads) else 0.0)

    def _with_memory(self, clocks: float) -> float:
        return max(clocks / self.machine.hertz * 1e3, self.moving_ms) + self.machine["launch_us"] / 1e3 + self.merged_ms

    @property
    def moving_ms(self) -> float:
        """The milliseconds of moving the kernel's bytes."""
        return memory_ms(self.machine, self.moved)


def _in_tiles(strips: Strips) -> Items:
    return items((strips.full + strips.partial).astype(np.float64), strips.times)


# --- in words --------------------------------------------------------------------------------------------------------


def lost_to_tiles(run: KernelRun, visible: int | None) -> str:
    """Return what is lost between the visible pairs and the live tiles, in words."""
    live, shape = run.strips.live, run.model.shape
    computed = live * shape.q_tile * shape.k_tile
    hidden = f", {1 - visible / computed:.0%} of their pairs hidden" if visible is not None and computed else ""
    return f"{live:,} live tiles of {shape.q_tile}×{shape.k_tile}, {run.strips.partial_tiles:,} partial{hidden}"


def lost_to_balance(run: KernelRun) -> str:
    """Return what is lost between the live tiles and the longest SM, in words."""
    work, sms = run.tiles, run.machine.sms
    if not work.count:
        return "nothing to do"
    mean = work.total / work.count
    waves = work.count / sms
    return (
        f"{work.count:,} programs on {sms} SMs ({waves:.1f} each), the longest of {work.longest:,.0f} tiles, the mean "
        f"of {mean:,.1f}"
    )


def lost_to_time(runs: Sequence[KernelRun], machine: Machine) -> str:
    """The shares of the time beside full tiles."""
    total = sum(r.ms for r in runs)
    if not total:
        return "nothing to do"
    ms = 1e3 / machine.hertz / machine.sms
    masks = sum(r.strips.partial_tiles * r.mask_clocks for r in runs) * ms
    starts = sum(r.strips.count for r in runs) * machine["prologue_clocks"] * ms
    tails = sum(max(float(r.loads[0]) - float(r.loads.mean()), 0.0) for r in runs) / machine.hertz * 1e3
    launch = len(runs) * machine["launch_us"] / 1e3
    merges = sum(r.merged_ms for r in runs)
    memory = sum(max(r.moving_ms - float(r.loads[0]) / machine.hertz * 1e3, 0.0) for r in runs)
    named = {
        "masks of partial tiles": masks,
        "starts of programs": starts,
        "tails": tails,
        "launches": launch,
        "merging": merges,
        "waiting for memory": memory,
    }
    parts = [
        f"{name} {x / total:.0%}" for name, x in sorted(named.items(), key=lambda kv: -kv[1]) if x >= 0.005 * total
    ]
    return ", ".join(parts) or "next to nothing"
