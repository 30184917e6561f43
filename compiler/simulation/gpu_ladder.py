"""The ladder of a call on a GPU, from visible pairs to predicted time, for forward, backward and decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, inf

from attnc.compiler.kernels.kernel_source import BYTES
from attnc.compiler.planning.tile_work import NATURAL, Strips, TileWork
from attnc.compiler.simulation.candidates import SCHEDULED, ScheduleCandidates, ScheduleRequest, dense_runs
from attnc.compiler.simulation.gpu_clocks import (
    Kernel,
)
from attnc.compiler.simulation.kernel_run import KernelRun, lost_to_balance, lost_to_tiles, lost_to_time
from attnc.compiler.simulation.machine import Machine, MachineError
from attnc.compiler.simulation.simulated_call import SimulatedCall
from attnc.compiler.simulation.simulation import (
    RUNGS,
    Baseline,
    Pass,
    Rung,
    SimulatedSchedule,
    Simulation,
    Tiles,
    Traffic,
    ladder,
)
from attnc.compiler.simulation.traffic import least_bytes, memory_ms, tensor_bytes

KERNELS: Mapping[Pass, tuple[Kernel, ...]] = {"forward": ("forward",), "backward": ("dq", "dkdv")}
"""The kernels of a pass."""

MOST_QUERIES = 16
"""Maximum number of queries of a call that decodes."""

DECODE_TILE = (MOST_QUERIES, 64)
"""Queries and keys of a tile when a call decodes."""

DECODE_WAVES = 2
"""Number of programs for each SM into which a cache is split."""


def simulate_gpu(
    problem: SimulatedCall,
    machine: Machine,
    stage: Pass = "forward",
    baseline: Baseline = "full",
    wish: ScheduleRequest | None = None,
) -> Simulation:
    """Simulate a call on a GPU. Raises MachineError for tiles or dtypes that the machine does not support."""
    if problem.shape.dtype not in BYTES:
        raise MachineError(f"{machine.name} runs attention in {', '.join(BYTES)}, not in {problem.shape.dtype}")
    candidates = ScheduleCandidates(problem, machine, wish or ScheduleRequest())
    if stage == "decode":
        return _decoded(problem, machine, baseline, candidates, wish or ScheduleRequest())
    runs: list[KernelRun] = []
    others: list[KernelRun] = []
    for kernel in KERNELS[stage]:
        first, *runners_up = candidates.ranked(kernel, baseline)
        runs.append(first)
        others += runners_up[:2]
    ideal, dense = dense_ms(problem, machine, stage, baseline)
    visible, pairs = runs[0].work.visible, problem.dense_pairs(baseline)
    dense_clocks = sum(run.dense.live * run.full_clocks for run in runs)
    live_clocks = sum(run.strips.live * run.full_clocks for run in runs)
    least_clocks = sum(run.least_clocks for run in runs)
    predicted = sum(run.ms for run in runs)
    speedups = ladder(
        pairs,
        visible,
        _ratio(dense_clocks, live_clocks),
        _ratio(dense_clocks / machine.sms, least_clocks),
        _ratio(ideal, predicted),
    )
    lost = (lost_to_tiles(runs[0], visible), lost_to_balance(runs[0]), lost_to_time(runs, machine))
    lists = sum(4 * (run.work.rows.count if run.work.order is NATURAL else run.strips.live) for run in runs)
    return _simulation(
        problem,
        machine,
        stage,
        baseline,
        runs[0].work,
        runs[0].strips,
        choices=tuple(map(schedule_of, runs)),
        others=tuple(map(schedule_of, others)),
        rungs=_rungs(speedups, problem, baseline, visible, lost),
        times=(predicted, dense, ideal),
        traffic=Traffic(
            sum(least_bytes(problem.shape, kernel) for kernel in KERNELS[stage]),
            sum(run.moved for run in runs),
            tensor_bytes(problem.shape) * len(runs) + lists,
        ),
        refused=candidates.refused,
        run=runs[0],
    )


def dense_ms(problem: SimulatedCall, machine: Machine, stage: Pass, baseline: Baseline) -> tuple[float, float]:
    """Return the milliseconds of dense attention: ideal, and predicted."""
    ideal = predicted = 0.0
    for kernel in KERNELS[stage]:
        runs = dense_runs(problem, machine, kernel, baseline)
        ideal += min(run.strips.live * run.full_clocks for run in runs) / machine.sms / machine.hertz * 1e3
        predicted += min(run.ms for run in runs[:SCHEDULED])
    return ideal, predicted


def _decoded(
    problem: SimulatedCall, machine: Machine, baseline: Baseline, candidates: ScheduleCandidates, wish: ScheduleRequest
) -> Simulation:
    """Simulate a few queries against a cache that is split over the SMs; the bytes read from the cache decide.

    Heads that share keys are rows of one tile, so that keys are read once for all of these heads.
    """
    shape = problem.shape
    if shape.n_q > MOST_QUERIES:
        raise MachineError(f"decode takes 1 to {MOST_QUERIES} queries, got {shape.n_q}")
    q_tile, k_tile = wish.tile or DECODE_TILE
    work = candidates.work(q_tile, k_tile)
    if work is None:
        raise candidates.no_candidates()
    group = shape.heads // shape.kv_heads
    tile_bytes = k_tile * (shape.dk + shape.dv) * BYTES[shape.dtype]
    queries = 2 * shape.lanes * shape.n_q * (shape.dk + shape.dv) * BYTES[shape.dtype]
    read, dense_tiles = (
        ceil(tiles / group) for tiles in (work.rows.live, _dense_tiles(problem, baseline, q_tile, k_tile))
    )
    programs = _programs(read, machine)

    def time(tiles: int) -> float:
        busy = min(1.0, _programs(tiles, machine) / machine.sms)
        start = 2 * machine["launch_us"] / 1e3 + machine["prologue_clocks"] / machine.hertz * 1e3
        return memory_ms(machine, tiles * tile_bytes + queries) / busy + start

    predicted, dense, ideal = time(read), time(dense_tiles), memory_ms(machine, dense_tiles * tile_bytes)
    tile = _ratio(dense_tiles, read)
    speedups = ladder(
        problem.dense_pairs(baseline),
        work.visible,
        tile,
        tile * min(1.0, programs / machine.sms),
        _ratio(ideal, predicted),
    )
    lost = (
        f"{read:,} tiles of {k_tile} keys are read, of {dense_tiles:,}",
        f"{programs:,} programs on {machine.sms} SMs",
        "two launches, a start, and the bytes of queries and partial results",
    )
    how = f"{programs:,} programs, merged by log-sum-exp; {group} head{'s' if group > 1 else ''} share a tile"
    moved = read * tile_bytes + queries
    return _simulation(
        problem,
        machine,
        "decode",
        baseline,
        work,
        work.rows,
        choices=(SimulatedSchedule("decode", q_tile, k_tile, work.order, how, "memory", predicted),),
        others=(),
        rungs=_rungs(speedups, problem, baseline, work.visible, lost),
        times=(predicted, dense, ideal),
        traffic=Traffic(moved, moved, tensor_bytes(shape)),
        refused=candidates.refused,
        run=None,
    )


def _programs(tiles: int, machine: Machine) -> int:
    """Return the number of programs for a cache of `tiles` tiles: at most a few waves, each with at least one tile."""
    tiles_per_program = max(1, ceil(tiles / (machine.sms * DECODE_WAVES)))
    return max(ceil(tiles / tiles_per_program), 1)


def _dense_tiles(problem: SimulatedCall, baseline: Baseline, q_tile: int, k_tile: int) -> int:
    return problem.dense_strips(baseline, q_tile, k_tile).live


def _ratio(a: float, b: float) -> float:
    return a / b if b else inf


def _rungs(
    speedups: Sequence[float], problem: SimulatedCall, baseline: Baseline, visible: int | None, lost: Sequence[str]
) -> tuple[Rung, ...]:
    pairs = problem.dense_pairs(baseline)
    noun = "pairs" if baseline == "full" else "causal pairs"
    hidden = (
        "pairs were not counted: the tile bound replaces the element bound"
        if visible is None
        else f"{visible:,} of {pairs:,} {noun} are visible"
    )
    return tuple(Rung(name, speedup, why) for name, speedup, why in zip(RUNGS, speedups, (hidden, *lost), strict=True))


def _estimated(work: TileWork) -> tuple[str, ...]:
    if not work.sampled:
        return ()
    return (
        f"estimated: there are too many tiles to count, so pairs, tiles and bounds are extrapolated from "
        f"{work.sampled} rows of tiles",
    )


def schedule_of(run: KernelRun, note: str = "") -> SimulatedSchedule:
    """Return the schedule of a run; `note` ends its description."""
    tiles = run.model.shape
    split = f", keys split in {run.parts}" if run.parts > 1 else ""
    how = f"{tiles.warps} warps, {tiles.stages} stages, {run.programs} on an SM{split}{note}"
    limit = "memory" if run.moving_ms > 0.9 * run.ms else run.model.full.limit
    return SimulatedSchedule(run.model.kernel, tiles.q_tile, tiles.k_tile, run.work.order, how, limit, run.ms)


def _simulation(
    problem: SimulatedCall,
    machine: Machine,
    stage: Pass,
    baseline: Baseline,
    work: TileWork,
    strips: Strips,
    *,
    choices: tuple[SimulatedSchedule, ...],
    others: tuple[SimulatedSchedule, ...],
    rungs: tuple[Rung, ...],
    times: tuple[float, float, float],
    traffic: Traffic,
    refused: Mapping[str, None],
    run: KernelRun | None,
) -> Simulation:
    """Return the simulation with the figures that follow from the call and its tiles."""
    shape = problem.shape
    products = (3, 2) if stage == "backward" else (1, 1)
    predicted, dense, ideal = times
    return Simulation(
        pattern=problem.pattern,
        params=problem.params,
        device=machine.name,
        title=machine.title,
        shape=shape,
        stage=stage,
        baseline=baseline,
        causal=problem.is_causal,
        visible=work.visible,
        tiles=Tiles(
            _dense_tiles(problem, "full", work.q_tile, work.k_tile),
            strips.live,
            strips.full_tiles,
            strips.partial_tiles,
        ),
        choices=choices,
        others=others,
        rungs=rungs,
        predicted_ms=predicted,
        dense_ms=dense,
        ideal_ms=ideal,
        calibrated=False,
        flop=2 * (work.visible or 0) * (products[0] * shape.dk + products[1] * shape.dv),
        traffic=traffic,
        notes=(*problem.notes, *_estimated(work), *refused),
        estimated=bool(work.sampled),
        loads=() if run is None else tuple((run.loads / machine.hertz * 1e3).tolist()),
    )
