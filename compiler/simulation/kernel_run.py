"""The run of a kernel on a machine, with tiles in one order: its work items, their schedule, and its time by cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attnc.compiler.planning.tile_work import Strips, TileWork
from attnc.compiler.simulation.balance import Float64, Items, items, least_time, scheduled
from attnc.compiler.simulation.gpu_clocks import TileModel
from attnc.compiler.simulation.machine import Machine
from attnc.compiler.simulation.traffic import memory_ms

SPLITS = (2, 4, 8)
"""Numbers of parts into which the keys of a row may be split if there are too few rows for the machine."""


@dataclass(frozen=True, eq=False)
class KernelRun:
    """The run of a kernel with tiles in one order, in clocks of an SM.

    `parts`: the number of programs that walk a strip of tiles and whose results are merged.
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
        """The machine of the run."""
        return self.model.machine

    @property
    def full_clocks(self) -> float:
        """The expected clocks of a full tile."""
        return self.model.predicted(self.model.full) * self.passes

    @property
    def mask_clocks(self) -> float:
        """The additional expected clocks of a partial tile."""
        return self.model.predicted(self.model.partial) * self.passes - self.full_clocks

    @cached_property
    def items(self) -> Items:
        """The programs with their clocks, one for each strip."""
        strips = self.strips
        clocks = (strips.full + strips.partial) * self.full_clocks + strips.partial * self.mask_clocks
        return items(clocks + self.machine["prologue_clocks"], strips.times)

    @cached_property
    def tiles(self) -> Items:
        """The programs with their numbers of tiles, one for each strip."""
        return _in_tiles(self.strips)

    @cached_property
    def least_clocks(self) -> float:
        """The minimum clocks of the machine for the live tiles over all splits of the keys of a row.

        The bound must not depend on the chosen split.
        """
        unsplit = self.work.columns if self.model.kernel == "dkdv" else self.work.rows
        choices = (1, *SPLITS) if self.model.kernel == "forward" else (1,)
        work = [_in_tiles(unsplit.split(parts)) for parts in choices]
        return min(least_time(tiles, self.machine.sms) for tiles in work) * self.full_clocks

    @cached_property
    def loads(self) -> Float64:
        """The clocks of every program slot of the machine; the slots of an SM share its units."""
        work = self.items
        return scheduled(Items(work.size * self.programs, work.times), self.machine.sms * self.programs)

    @cached_property
    def estimate_ms(self) -> float:
        """The time without a schedule: the mean of all SMs, or the time of the longest programs if that is more."""
        clocks = least_time(self.items, self.machine.sms)
        return self._with_memory(clocks)

    @cached_property
    def ms(self) -> float:
        """The time of the schedule or of the memory, whichever is longer, with launch and merge."""
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
    """Return the text of the tile rung: live and partial tiles, and the share of hidden pairs."""
    live, shape = run.strips.live, run.model.shape
    computed = live * shape.q_tile * shape.k_tile
    hidden = f", {1 - visible / computed:.0%} of their pairs hidden" if visible is not None and computed else ""
    return f"{live:,} live tiles of {shape.q_tile}×{shape.k_tile}, {run.strips.partial_tiles:,} partial{hidden}"


def lost_to_balance(run: KernelRun) -> str:
    """Return the text of the balanced rung: programs for each SM, and the longest and mean program."""
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
    """Return the text of the predicted rung: the shares of the time that are not spent in full tiles."""
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
