"""The candidate schedules of a call on a GPU: every tile that fits in every order of tokens, the fastest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from attnc.compiler.analysis.live_tiles import TooManyTilesError
from attnc.compiler.kernels.kernel_source import TileShape
from attnc.compiler.planning.runs import TooManyClassesError
from attnc.compiler.planning.tile_work import NATURAL, TileWork, joined
from attnc.compiler.simulation.gpu_clocks import (
    Extra,
    Kernel,
    TileModel,
    given_shape,
    resources,
    tile_shapes,
)
from attnc.compiler.simulation.kernel_run import SPLITS, KernelRun
from attnc.compiler.simulation.machine import Machine, MachineError
from attnc.compiler.simulation.orders import TileFinder
from attnc.compiler.simulation.simulated_call import SimulatedCall, SimulatedRelation
from attnc.compiler.simulation.simulation import Baseline
from attnc.compiler.simulation.traffic import memory_ms, moved_bytes

FIRST_BRICKS = 3
"""Number of shapes of bricks that are counted for each pair of tile sides, fewest live pairs of bricks first."""

SCHEDULED = 4
"""Number of candidates whose programs are scheduled one by one, those with the lowest estimates."""

MERGE_BYTES = 8
"""Bytes moved for each element of a partial result: written in fp32 and read again."""


@dataclass(frozen=True)
class ScheduleRequest:
    """The tile (q, k) and the kind of order that a user requests; None leaves the choice to the simulation."""

    tile: tuple[int, int] | None = None
    order: str | None = None


class ScheduleCandidates:
    """The candidate schedules of a call on a machine; `refused`: the reasons why some were not tried."""

    def __init__(self, problem: SimulatedCall, machine: Machine, wish: ScheduleRequest) -> None:
        self._problem, self._machine, self._request = problem, machine, wish
        self.refused: dict[str, None] = {}

    def ranked(self, kernel: Kernel, baseline: Baseline) -> list[KernelRun]:
        """Return the runs of a kernel, the fastest first.

        The first SCHEDULED runs are ranked by their scheduled time, the others by their estimate. Raises MachineError
        if there is no run.
        """
        runs = sorted(self._runs(kernel, baseline), key=lambda run: run.estimate_ms)
        if not runs:
            raise self.no_candidates()
        return sorted(runs[:SCHEDULED], key=lambda run: run.ms) + runs[SCHEDULED:]

    def no_candidates(self) -> MachineError:
        """Return the error of a call without candidates."""
        why = "; ".join(self.refused) or "no query sees a key"
        return MachineError(f"`{self._problem.pattern}` cannot be simulated at this size: {why}")

    def _runs(self, kernel: Kernel, baseline: Baseline) -> Iterator[KernelRun]:
        for tiles in self._shapes(kernel):
            work = self.work(tiles.q_tile, tiles.k_tile)
            if work is None:
                continue
            run = self._run(kernel, baseline, tiles, work)
            yield run
            if kernel == "forward" and run.strips.count < 2 * self._machine.sms * run.programs:
                yield from (self._run(kernel, baseline, tiles, work, parts) for parts in SPLITS)

    def _shapes(self, kernel: Kernel) -> list[TileShape]:
        heads = self._problem.heads
        if self._request.tile is not None:
            return [given_shape(self._machine, kernel, heads, *self._request.tile)]
        return tile_shapes(self._machine, kernel, heads)

    def work(self, q_tile: int, k_tile: int) -> TileWork | None:
        """Return the tiles of all parts, each in the order with the fewest tiles; None if a part cannot be counted."""
        part_works = []
        for part in self._problem.parts:
            orders = list(self._orders(part, q_tile, k_tile))
            if not orders:
                return None
            best = min(orders, key=lambda work: (work.rows.live + _merging(work), work.rows.partial_tiles))
            part_works.append(best.repeated(part.times))
        if not part_works:
            return None
        return joined(part_works, max(part_works, key=lambda work: work.rows.live).order, q_tile, k_tile)

    def _orders(self, part: SimulatedRelation, q_tile: int, k_tile: int) -> Iterator[TileWork]:
        """Yield the tiles of a part in every order that is allowed and can be counted."""
        finder, requested = part.finder, self._request.order
        makers: dict[str, Callable[[], list[TileWork]]] = {}
        if finder.divisors:
            makers["residues"] = lambda: [finder.by_residues(q_tile, k_tile)]
        if finder.bricks is not None:
            makers["bricks"] = lambda: _bricks(finder, q_tile, k_tile)
        makers["natural"] = lambda: [finder.natural(q_tile, k_tile)]
        if requested is not None and requested not in makers:
            has = {"bricks": "reads no grid of tokens", "residues": "has no congruence of q - k"}[requested]
            self.refused[f"order {requested}: the relation {has}"] = None
        for name, make in makers.items():
            if requested not in (None, name):
                continue
            try:
                yield from make()
            except (TooManyTilesError, TooManyClassesError) as error:
                why = "too many" if isinstance(error, TooManyTilesError) else "too different"
                self.refused[f"{name} order: partial tiles are {why} to count"] = None

    def _run(self, kernel: Kernel, baseline: Baseline, tiles: TileShape, work: TileWork, parts: int = 1) -> KernelRun:
        problem, machine = self._problem, self._machine
        by_columns = kernel == "dkdv"
        walked = (work.columns if by_columns else work.rows).split(parts)
        programs = resources(machine, kernel, tiles, problem.heads).programs
        merged = _merged_bytes(problem, work, parts) if not by_columns else 0
        return KernelRun(
            TileModel(machine, kernel, tiles, problem.heads, problem.extra),
            work,
            walked,
            problem.dense_strips(baseline, tiles.q_tile, tiles.k_tile, by_columns=by_columns),
            programs,
            memory_ms(machine, merged) + (machine["launch_us"] / 1e3 if merged else 0.0),
            moved_bytes(machine, problem.shape, kernel, tiles, walked, programs),
            problem.passes,
            parts,
        )


def _merged_bytes(problem: SimulatedCall, work: TileWork, parts: int) -> int:
    """Return the bytes of partial results, written and read again, and of the merged rows."""
    rows = problem.shape.lanes * problem.shape.n_q
    walks = 2 * work.merged if parts == 1 else parts * rows + work.merged
    return (walks * MERGE_BYTES + (work.merged if parts == 1 else rows) * 4) * problem.shape.dv


def dense_runs(problem: SimulatedCall, machine: Machine, kernel: Kernel, baseline: Baseline) -> list[KernelRun]:
    """Return the runs of dense attention with every tile that fits, lowest estimate first."""
    extra = Extra(2.0 if baseline == "causal" else 0.0)
    runs = []
    for tiles in tile_shapes(machine, kernel, problem.heads):
        strips = problem.dense_strips(baseline, tiles.q_tile, tiles.k_tile, by_columns=kernel == "dkdv")
        programs = resources(machine, kernel, tiles, problem.heads).programs
        moved = moved_bytes(machine, problem.shape, kernel, tiles, strips, programs)
        work = TileWork(NATURAL, tiles.q_tile, tiles.k_tile, strips, strips, None)
        model = TileModel(machine, kernel, tiles, problem.heads, extra)
        runs.append(KernelRun(model, work, strips, strips, programs, 0.0, moved, 1))
    return sorted(runs, key=lambda run: run.estimate_ms)


def _merging(work: TileWork) -> float:
    """Return the cost of merging, in tiles: about two tiles for each tile of merged rows."""
    return 2 * work.merged / work.q_tile


def _bricks(finder: TileFinder, q_tile: int, k_tile: int) -> list[TileWork]:
    """Return the tiles of a relation in its best shapes of bricks."""
    bricks = finder.bricks
    assert bricks is not None
    return [bricks.work(*shape) for shape in bricks.best(q_tile, k_tile)[:FIRST_BRICKS]]
