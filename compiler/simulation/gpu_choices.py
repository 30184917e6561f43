"""The cost of attention to selected blocks on a GPU: kernels on expected queries, lists, and the selection.

Kernels are those of `compiler.kernels.chosen`: a program takes a tile of the queries of one place, its results are
written in fp32 and merged by another kernel; a program of the gradients of keys meets all queries of its place. Lists
and choice are operations of torch on whole tensors, whose bytes decide. None of it was held against a clock yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import inf

import numpy as np

from attnc.compiler.simulation.cpu_choices import SelectionWork
from attnc.compiler.simulation.expected_choices import ExpectedChoice, Float64
from attnc.compiler.simulation.gpu_clocks import BYTES, Kernel, TileModel, TileShape, resources
from attnc.compiler.simulation.gpu_ladder import KERNELS, dense_ms
from attnc.compiler.simulation.kernel_run import KernelRun
from attnc.compiler.simulation.machine import Machine, MachineError
from attnc.compiler.simulation.simulated_call import SimulatedCall
from attnc.compiler.simulation.simulation import (
    CHOSEN_RUNGS,
    Baseline,
    Pass,
    Rung,
    RungName,
    SimulatedSchedule,
    Simulation,
    Tiles,
    Traffic,
)
from attnc.compiler.simulation.strips import Strips, strips, together
from attnc.compiler.simulation.tile_work import NATURAL, TileWork
from attnc.compiler.simulation.traffic import key_bytes, memory_ms, tensor_bytes

FP32 = 4

RANK_BYTES, RANK_LAUNCHES = 150, 20
"""Bytes of a place of a row while it is ranked, as `selections.ranking` does it without a question to the host: scores
become 64-bit numbers by eleven operations, three passes of a top-k by radix read them, truth is scattered."""
OPERATION_BYTES = 8
"""An element of an operation of a score is read and written in fp32."""
SORT_BYTES, LIST_LAUNCHES = 150, 25
"""Bytes of a pair of a row and a block in the lists (`gpu.selected_lists`).

A stable radix sort of 32-bit numbers and their places takes four passes; then follow the pair's side, row and query.
"""
TAKEN_BYTES, SLOT_BYTES = 7, 24
"""Bytes of a place of a row, and of one that it chose, when the chosen ones are found."""

TILED_BYTES = 13
"""An entry of truth is read, and summed along both axes in 32 bits: corners tell of tiles (`gpu.mask_lists`)."""
OF_TILES: tuple[RungName, RungName] = ("tile", "balanced")

CAUTION = "an estimate that was never held against a clock: no GPU was at hand for these kernels (benchmarks/OWED.md)"


@dataclass(frozen=True, eq=False)
class GpuWork:
    """An attention to chosen places and the tiles of its kernels. `slots`: places of a row at most."""

    work: SelectionWork
    tiles: Mapping[Kernel, TileShape]
    slots: int
    items: int


@dataclass(frozen=True, eq=False)
class ListedWork:
    """A choice of single keys, by which tiles are listed; the attention is simulated as one that chooses nothing.

    `entries`: of truth by row and item, in all lanes.
    """

    work: SelectionWork
    entries: int


def simulate_gpu_choices(
    problem: SimulatedCall,
    works: Sequence[GpuWork],
    listed: Sequence[ListedWork],
    others: Sequence[Simulation],
    machine: Machine,
    stage: Pass,
    baseline: Baseline,
) -> Simulation:
    """The ladder of attentions to chosen places, of the choices of others by which tiles are `listed`, and of the
    `others` themselves. There is one of them at least.

    Raises MachineError for what the machine does not have.
    """
    if problem.shape.dtype not in BYTES:
        raise MachineError(f"{machine.name} runs attention in {', '.join(BYTES)}, not in {problem.shape.dtype}")
    ideal, dense = dense_ms(problem, machine, stage, baseline)
    runs = [_run(one, problem, machine, kernel) for one in works for kernel in KERNELS[stage]]
    visible = sum(one.work.visible for one in works) + sum(one.visible or 0 for one in others)
    listing = sum(_listing_ms(one, machine) for one in works) + sum(_tiling_ms(one, machine) for one in listed)
    decided = [*(one.work for one in works), *(one.work for one in listed)] if stage != "backward" else []
    choosing = sum(_choosing_ms(one, problem, machine) for one in decided)
    ms = 1e3 / machine.hertz
    tile = sum(run.strips.live * run.full_clocks for run in runs) / machine.sms * ms
    balanced = sum(run.least_clocks for run in runs) * ms
    attended = sum(run.ms for run in runs) + sum(one.predicted_ms for one in others)
    pairs = problem.dense_pairs(baseline)
    times = (
        ideal * visible / pairs if pairs else 0.0,
        tile + _of_others(others, "tile"),
        balanced + _of_others(others, "balanced"),
        attended,
        attended + listing,
        attended + listing + choosing,
    )
    predicted = times[-1]
    lost = (
        f"{visible:,} of {pairs:,} pairs are visible",
        *(_of_gathered(runs, machine) if runs else [others[0].rung(name).lost_to for name in OF_TILES]),
        _share("partial results, written in fp32 and merged,", sum(run.merged_ms for run in runs), predicted),
        _share("lists", listing, predicted),
        "chosen in the forward" if stage == "backward" else _share("the choice", choosing, predicted),
    )
    rungs, least = [], inf
    for name, time, why in zip(CHOSEN_RUNGS, times, lost, strict=True):
        least = min(least, ideal / time if time else inf)
        rungs.append(Rung(name, least, why))
    moved = sum(run.moved for run in runs) + sum(one.traffic.moved for one in others)
    products = (3, 2) if stage == "backward" else (1, 1)
    own = tensor_bytes(problem.shape)
    return Simulation(
        pattern=problem.pattern,
        params=problem.params,
        device=machine.name,
        title=machine.title,
        shape=problem.shape,
        stage=stage,
        baseline=baseline,
        causal=problem.is_causal,
        visible=visible,
        tiles=_tiles(problem, runs, others),
        choices=(*map(_choice, runs), *alike(choice for one in others for choice in one.choices)),
        others=(),
        rungs=tuple(rungs),
        predicted_ms=predicted,
        dense_ms=dense,
        ideal_ms=ideal,
        calibrated=False,
        flop=2 * visible * (products[0] * problem.shape.dk + products[1] * problem.shape.dv),
        traffic=Traffic(own, moved, own + max((_part_bytes(one, problem, stage) for one in works), default=0)),
        notes=(*dict.fromkeys(note for one in others for note in one.notes), CAUTION),
        estimated=True,
        loads=tuple((runs[0].loads * ms).tolist()) if runs else others[0].loads,
    )


# --- kernels ---------------------------------------------------------------------------------------------------------


def _run(one: GpuWork, problem: SimulatedCall, machine: Machine, kernel: Kernel) -> KernelRun:
    """A kernel on what its programs are expected to meet."""
    shape, heads, tiles = problem.shape, problem.heads, one.tiles[kernel]
    walk = _keys_meet if kernel == "dkdv" else _rows_meet
    walked = together([walk(one.work, tiles, problem, whole) for whole in (True, False)])
    rows = _rows_of(one.work)
    size, width = BYTES[shape.dtype], shape.dk if kernel == "dq" else shape.dv
    gathered = rows * shape.dk * size * (1 if kernel == "forward" else 2)
    parts = 0.0 if kernel == "dkdv" else rows * (width + 1) * FP32
    moved = round(gathered + parts + key_bytes(shape) * (2 if kernel == "dkdv" else 1))
    joined = parts + shape.lanes * shape.n_q * width * size
    merging = memory_ms(machine, joined) + machine["launch_us"] / 1e3 if parts else 0.0
    programs = max(resources(machine, kernel, tiles, heads).programs, 1)
    work = TileWork(NATURAL, tiles.q_tile, tiles.k_tile, walked, walked, None)
    model = TileModel(machine, kernel, tiles, heads, problem.extra)
    return KernelRun(model, work, walked, walked, programs, merging, moved, 1)


def _rows_of(work: SelectionWork) -> float:
    """Pairs of a row and a place, of all heads."""
    expected = work.expected
    return float((expected.whole + expected.part).sum()) * work.lanes * work.together


def _rows_meet(work: SelectionWork, tiles: TileShape, problem: SimulatedCall, whole: bool) -> Strips:
    """A program for each tile of the queries of a place, which walks its keys."""
    del problem
    rows, keys = _side(work.expected, whole)
    count = np.ceil(rows / tiles.q_tile) * np.minimum(1.0, rows)
    return _strips(np.ceil(keys / tiles.k_tile), count * work.lanes * work.together, whole)


def _keys_meet(work: SelectionWork, tiles: TileShape, problem: SimulatedCall, whole: bool) -> Strips:
    """A program for each tile of keys of a place, which walks the queries of all heads that share them."""
    shape = problem.shape
    rows, keys = _side(work.expected, whole)
    walked = np.ceil(rows / tiles.q_tile) * (shape.heads // shape.kv_heads)
    return _strips(walked, np.ceil(keys / tiles.k_tile) * shape.batch * shape.kv_heads, whole)


def _side(expected: ExpectedChoice, whole: bool) -> tuple[Float64, Float64]:
    """Queries and keys of the places that someone sees whole, or in part."""
    rows = expected.whole if whole else expected.part
    some = (rows > 0) & (expected.keys > 0)
    return rows[some], expected.keys[some].astype(np.float64)


def _strips(tiles: Float64, times: Float64, whole: bool) -> Strips:
    each, many = tiles.astype(np.int64), np.ceil(times).astype(np.int64)
    nothing = np.zeros_like(each)
    return strips(each if whole else nothing, nothing if whole else each, many)


# --- lists and choice ------------------------------------------------------------------------------------------------


def _listing_ms(one: GpuWork, machine: Machine) -> float:
    """The lists of pairs: found in the rows, and sorted by place."""
    rows = one.work.lanes * one.work.n_q
    bytes_ = rows * one.items * TAKEN_BYTES + rows * one.slots * (SLOT_BYTES + SORT_BYTES)
    return memory_ms(machine, bytes_) + LIST_LAUNCHES * machine["launch_us"] / 1e3


def _tiling_ms(one: ListedWork, machine: Machine) -> float:
    """The lists of tiles: what is chosen is reduced to tiles along rows and along keys, and compacted."""
    return memory_ms(machine, one.entries * TILED_BYTES) + LIST_LAUNCHES * machine["launch_us"] / 1e3


def _choosing_ms(work: SelectionWork, problem: SimulatedCall, machine: Machine) -> float:
    """Scores by products in fp32, what is done with them, and their ranks."""
    found, shape = work.deciding, problem.shape
    products = 2 * found.products * 64 / (2 * machine["fma_per_clock"] * machine.sms * machine.hertz) * 1e3
    bytes_ = (
        found.products * 64 / max(shape.dk, 1) * FP32
        + found.operations * OPERATION_BYTES
        + (found.places + found.ordered) * RANK_BYTES
        + found.pooled * (BYTES[shape.dtype] + 3 * FP32)
        + shape.lanes * shape.n_q * shape.dk * (BYTES[shape.dtype] + 2 * FP32)
    )
    launches = RANK_LAUNCHES + found.nodes
    return max(products, memory_ms(machine, bytes_)) + launches * machine["launch_us"] / 1e3


def _part_bytes(one: GpuWork, problem: SimulatedCall, stage: Pass) -> int:
    width = problem.shape.dk if stage == "backward" else problem.shape.dv + 1
    return round(problem.shape.lanes * problem.shape.n_q * one.slots * width * FP32)


# --- in words --------------------------------------------------------------------------------------------------------


def _of_others(others: Sequence[Simulation], name: RungName) -> float:
    """Milliseconds of the other attentions at one of their rungs."""
    return sum(one.ideal_ms / one.rung(name).speedup for one in others)


def _of_gathered(runs: Sequence[KernelRun], machine: Machine) -> tuple[str, str]:
    """Return what tiles of gathered queries and their balance lose, in words."""
    tile = runs[0].model.shape
    live, programs = sum(run.strips.live for run in runs), sum(run.strips.count for run in runs)
    return (
        f"{live:,} tiles of {tile.q_tile} gathered queries and {tile.k_tile} keys",
        f"{programs:,} programs on {machine.sms} SMs",
    )


def _tiles(problem: SimulatedCall, runs: Sequence[KernelRun], others: Sequence[Simulation]) -> Tiles:
    if not runs:
        return Tiles(
            *(sum(getattr(one.tiles, name) for one in others) for name in ("total", "live", "full", "partial"))
        )
    own, of = runs[0].strips, runs[0].model.shape
    full, partial = (sum(getattr(one.tiles, name) for one in others) for name in ("full", "partial"))
    total = problem.dense_strips("full", of.q_tile, of.k_tile).live
    return Tiles(total, own.live + full + partial, own.full_tiles + full, own.partial_tiles + partial)


def _choice(run: KernelRun) -> SimulatedSchedule:
    tiles = run.model.shape
    how = f"{tiles.warps} warps, {tiles.stages} stages, {run.programs} on an SM; gathered queries"
    limit = "memory" if run.moving_ms > 0.9 * run.ms else run.model.full.limit
    return SimulatedSchedule(run.model.kernel, tiles.q_tile, tiles.k_tile, NATURAL, how, limit, run.ms)


def repeated(one: Simulation, times: float) -> Simulation:
    """Return the simulation repeated a number of times, one after another: a member of a family stands for others."""
    if times == 1:
        return one
    counts = (round(count * times) for count in astuple(one.tiles))
    return replace(
        one,
        visible=None if one.visible is None else round(one.visible * times),
        tiles=Tiles(*counts),
        choices=tuple(replace(choice, ms=choice.ms * times) for choice in one.choices),
        rungs=tuple(replace(rung, speedup=rung.speedup / times) for rung in one.rungs),
        predicted_ms=one.predicted_ms * times,
        traffic=replace(one.traffic, moved=round(one.traffic.moved * times)),
        notes=(*one.notes, f"of many branches alike some are simulated: each stands for {times:.1f}"),
    )


def alike(choices: Iterable[SimulatedSchedule]) -> list[SimulatedSchedule]:
    """Each kernel and how it runs once, with the time of all that run so: branches alike."""
    found: dict[SimulatedSchedule, float] = {}
    for choice in choices:
        key = replace(choice, ms=0.0)
        found[key] = found.get(key, 0.0) + choice.ms
    return [replace(choice, ms=ms) for choice, ms in found.items()]


def _share(what: str, own: float, whole: float) -> str:
    return f"{what} {own / whole:.0%} of the time" if own else f"{what} nothing"
