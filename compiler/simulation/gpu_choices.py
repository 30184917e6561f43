"""The cost of attention to selected blocks on a GPU: kernels on expected queries, lists, and the selection.

The kernels are the gathering kernels of `compiler.kernels`: a program takes a tile of the queries that selected a
block, writes its partial results in fp32, and another kernel merges them; a program of the gradients of keys walks all
queries of its block. Lists and selection are torch operations on whole tensors, so that their bytes decide. No figure
has been compared with a measurement yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import inf

import numpy as np

from attnc.compiler.kernels.kernel_source import BYTES, TileShape
from attnc.compiler.planning.tile_work import NATURAL, Strips, TileWork, strips, together
from attnc.compiler.simulation.cpu_choices import SelectionWork
from attnc.compiler.simulation.expected_choices import ExpectedChoice, Float64
from attnc.compiler.simulation.gpu_clocks import (
    Kernel,
    TileModel,
    resources,
)
from attnc.compiler.simulation.gpu_ladder import KERNELS, dense_ms, schedule_of
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
    time_share,
)
from attnc.compiler.simulation.traffic import key_bytes, memory_ms, tensor_bytes

FP32 = 4

RANK_BYTES, RANK_LAUNCHES = 150, 20
"""Bytes moved for each candidate of a row by the ranking of `selections.ranking`, and its launches.

The ranking never synchronises with the host: eleven operations turn scores into 64-bit numbers, a radix top-k reads
them in three passes, and the truth tensor is scattered.
"""
OPERATION_BYTES = 8
"""Bytes moved for each element of an operation of a score: one fp32 read, one fp32 write."""
SORT_BYTES, LIST_LAUNCHES = 150, 25
"""Bytes moved for each pair of a row and a block in the lists (`gpu.selected_lists`), and their launches.

A stable radix sort of 32-bit numbers and their indices takes four passes; then the pair's side, row and query are
written.
"""
TAKEN_BYTES, SLOT_BYTES = 7, 24
"""Bytes moved for each candidate of a row, and for each selected block, when the selected blocks are listed."""

TILED_BYTES = 13
"""Bytes moved for each entry of a truth tensor when tiles are listed.

The entry is read and summed along both axes in 32 bits; the sums at corners count each tile (`gpu.mask_lists`).
"""
TILE_RUNGS: tuple[RungName, RungName] = ("tile", "balanced")

CAUTION = "an estimate that was never compared with a measurement of these kernels on a GPU (benchmarks/OWED.md)"


@dataclass(frozen=True, eq=False)
class GpuWork:
    """An attention to selected blocks and the tiles of its kernels.

    `slots`: the maximum number of blocks that a row selects. `items`: the number of candidate blocks.
    """

    work: SelectionWork
    tiles: Mapping[Kernel, TileShape]
    slots: int
    items: int


@dataclass(frozen=True, eq=False)
class ListedWork:
    """A selection of single keys, from which live tiles are listed; its attention is simulated without the selection.

    `entries`: entries of the truth tensor by row and key, over all lanes.
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
    """Simulate a call that selects: attentions to selected blocks (`works`) and all other attentions (`others`).

    `listed`: the selections of the other attentions, whose tiles are listed. `works` or `others` must not be empty.
    Raises MachineError for a dtype or tile that the machine does not support.
    """
    if problem.shape.dtype not in BYTES:
        raise MachineError(f"{machine.name} runs attention in {', '.join(BYTES)}, not in {problem.shape.dtype}")
    ideal, dense = dense_ms(problem, machine, stage, baseline)
    runs = [_run(gpu_work, problem, machine, kernel) for gpu_work in works for kernel in KERNELS[stage]]
    visible = sum(gpu_work.work.visible for gpu_work in works) + sum(other.visible or 0 for other in others)
    listing = sum(_listing_ms(x, machine) for x in works) + sum(_tiling_ms(x, machine) for x in listed)
    deciding = [*(x.work for x in works), *(x.work for x in listed)] if stage != "backward" else []
    choosing = sum(_choosing_ms(work, problem, machine) for work in deciding)
    ms = 1e3 / machine.hertz
    tile = sum(run.strips.live * run.full_clocks for run in runs) / machine.sms * ms
    balanced = sum(run.least_clocks for run in runs) * ms
    attended = sum(run.ms for run in runs) + sum(other.predicted_ms for other in others)
    pairs = problem.dense_pairs(baseline)
    times = (
        ideal * visible / pairs if pairs else 0.0,
        tile + _others_ms(others, "tile"),
        balanced + _others_ms(others, "balanced"),
        attended,
        attended + listing,
        attended + listing + choosing,
    )
    predicted = times[-1]
    lost = (
        f"{visible:,} of {pairs:,} pairs are visible",
        *(_lost_to_gathering(runs, machine) if runs else [others[0].rung(name).lost_to for name in TILE_RUNGS]),
        time_share("partial results, written in fp32 and merged,", sum(run.merged_ms for run in runs), predicted),
        time_share("lists", listing, predicted),
        "selected in the forward" if stage == "backward" else time_share("the selection", choosing, predicted),
    )
    rungs, speedup = [], inf
    for name, rung_ms, why in zip(CHOSEN_RUNGS, times, lost, strict=True):
        speedup = min(speedup, ideal / rung_ms if rung_ms else inf)
        rungs.append(Rung(name, speedup, why))
    moved = sum(run.moved for run in runs) + sum(other.traffic.moved for other in others)
    products = (3, 2) if stage == "backward" else (1, 1)
    tensors = tensor_bytes(problem.shape)
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
        choices=(
            *(schedule_of(run, "; gathered queries") for run in runs),
            *alike(choice for other in others for choice in other.choices),
        ),
        others=(),
        rungs=tuple(rungs),
        predicted_ms=predicted,
        dense_ms=dense,
        ideal_ms=ideal,
        calibrated=False,
        flop=2 * visible * (products[0] * problem.shape.dk + products[1] * problem.shape.dv),
        traffic=Traffic(tensors, moved, tensors + max((_partial_bytes(x, problem, stage) for x in works), default=0)),
        notes=(*dict.fromkeys(note for other in others for note in other.notes), CAUTION),
        estimated=True,
        loads=tuple((runs[0].loads * ms).tolist()) if runs else others[0].loads,
    )


# --- kernels ---------------------------------------------------------------------------------------------------------


def _run(gpu_work: GpuWork, problem: SimulatedCall, machine: Machine, kernel: Kernel) -> KernelRun:
    """Return the run of a kernel on the queries and keys that its programs are expected to have."""
    shape, heads, tiles = problem.shape, problem.heads, gpu_work.tiles[kernel]
    walk = _key_strips if kernel == "dkdv" else _row_strips
    walked = together([walk(gpu_work.work, tiles, problem, full) for full in (True, False)])
    rows = _selected_pairs(gpu_work.work)
    size, head_dim = BYTES[shape.dtype], shape.dk if kernel == "dq" else shape.dv
    gathered = rows * shape.dk * size * (1 if kernel == "forward" else 2)
    parts = 0.0 if kernel == "dkdv" else rows * (head_dim + 1) * FP32
    moved = round(gathered + parts + key_bytes(shape) * (2 if kernel == "dkdv" else 1))
    joined = parts + shape.lanes * shape.n_q * head_dim * size
    merging = memory_ms(machine, joined) + machine["launch_us"] / 1e3 if parts else 0.0
    programs = max(resources(machine, kernel, tiles, heads).programs, 1)
    work = TileWork(NATURAL, tiles.q_tile, tiles.k_tile, walked, walked, None)
    model = TileModel(machine, kernel, tiles, heads, problem.extra)
    return KernelRun(model, work, walked, walked, programs, merging, moved, 1)


def _selected_pairs(work: SelectionWork) -> float:
    """Return the expected number of pairs of a query and a selected block, over all heads."""
    expected = work.expected
    return float((expected.whole + expected.part).sum()) * work.lanes * work.together


def _row_strips(work: SelectionWork, tiles: TileShape, problem: SimulatedCall, full: bool) -> Strips:
    """Return a strip for each tile of the queries of a block; its program walks the block's keys."""
    del problem
    rows, keys = _block_sizes(work.expected, full)
    count = np.ceil(rows / tiles.q_tile) * np.minimum(1.0, rows)
    return _strips(np.ceil(keys / tiles.k_tile), count * work.lanes * work.together, full)


def _key_strips(work: SelectionWork, tiles: TileShape, problem: SimulatedCall, full: bool) -> Strips:
    """Return a strip for each tile of a block's keys; its program walks the queries of all heads that share them."""
    shape = problem.shape
    rows, keys = _block_sizes(work.expected, full)
    walked = np.ceil(rows / tiles.q_tile) * (shape.heads // shape.kv_heads)
    return _strips(walked, np.ceil(keys / tiles.k_tile) * shape.batch * shape.kv_heads, full)


def _block_sizes(expected: ExpectedChoice, full: bool) -> tuple[Float64, Float64]:
    """Return the expected queries and the keys of each block that some query sees fully if `full`, else in part."""
    rows = expected.whole if full else expected.part
    is_seen = (rows > 0) & (expected.keys > 0)
    return rows[is_seen], expected.keys[is_seen].astype(np.float64)


def _strips(tiles: Float64, times: Float64, full: bool) -> Strips:
    """Return strips of `tiles[i]` tiles, all full if `full`, else all partial."""
    live_tiles, counts = tiles.astype(np.int64), np.ceil(times).astype(np.int64)
    nothing = np.zeros_like(live_tiles)
    return strips(live_tiles if full else nothing, nothing if full else live_tiles, counts)


# --- lists and choice ------------------------------------------------------------------------------------------------


def _listing_ms(gpu_work: GpuWork, machine: Machine) -> float:
    """Return the time of the lists of pairs, which are collected from the rows and sorted by block."""
    rows = gpu_work.work.lanes * gpu_work.work.n_q
    bytes_ = rows * gpu_work.items * TAKEN_BYTES + rows * gpu_work.slots * (SLOT_BYTES + SORT_BYTES)
    return memory_ms(machine, bytes_) + LIST_LAUNCHES * machine["launch_us"] / 1e3


def _tiling_ms(listed_work: ListedWork, machine: Machine) -> float:
    """Return the time of the lists of tiles: the truth tensor is reduced to tiles along both axes and compacted."""
    return memory_ms(machine, listed_work.entries * TILED_BYTES) + LIST_LAUNCHES * machine["launch_us"] / 1e3


def _choosing_ms(work: SelectionWork, problem: SimulatedCall, machine: Machine) -> float:
    """Return the time of a selection: its scores as fp32 products, the operations on them, and their ranking."""
    deciding, shape = work.deciding, problem.shape
    products = 2 * deciding.products * 64 / (2 * machine["fma_per_clock"] * machine.sms * machine.hertz) * 1e3
    bytes_ = (
        deciding.products * 64 / max(shape.dk, 1) * FP32
        + deciding.operations * OPERATION_BYTES
        + (deciding.places + deciding.ordered) * RANK_BYTES
        + deciding.pooled * (BYTES[shape.dtype] + 3 * FP32)
        + shape.lanes * shape.n_q * shape.dk * (BYTES[shape.dtype] + 2 * FP32)
    )
    launches = RANK_LAUNCHES + deciding.nodes
    return max(products, memory_ms(machine, bytes_)) + launches * machine["launch_us"] / 1e3


def _partial_bytes(gpu_work: GpuWork, problem: SimulatedCall, stage: Pass) -> int:
    """Return the bytes of the partial results of all rows."""
    width = problem.shape.dk if stage == "backward" else problem.shape.dv + 1
    return round(problem.shape.lanes * problem.shape.n_q * gpu_work.slots * width * FP32)


# --- in words --------------------------------------------------------------------------------------------------------


def _others_ms(others: Sequence[Simulation], name: RungName) -> float:
    """Return the milliseconds of the other attentions at a rung of their ladders."""
    return sum(other.ideal_ms / other.rung(name).speedup for other in others)


def _lost_to_gathering(runs: Sequence[KernelRun], machine: Machine) -> tuple[str, str]:
    """Return the texts of the tile rung and the balanced rung for gathered queries."""
    tile = runs[0].model.shape
    live, programs = sum(run.strips.live for run in runs), sum(run.strips.count for run in runs)
    return (
        f"{live:,} tiles of {tile.q_tile} gathered queries and {tile.k_tile} keys",
        f"{programs:,} programs on {machine.sms} SMs",
    )


def _tiles(problem: SimulatedCall, runs: Sequence[KernelRun], others: Sequence[Simulation]) -> Tiles:
    """Return the tile counts of the gathering kernels and the other attentions together."""
    if not runs:
        return Tiles(
            *(sum(getattr(other.tiles, name) for other in others) for name in ("total", "live", "full", "partial"))
        )
    gathered, shape = runs[0].strips, runs[0].model.shape
    full, partial = (sum(getattr(other.tiles, name) for other in others) for name in ("full", "partial"))
    total = problem.dense_strips("full", shape.q_tile, shape.k_tile).live
    return Tiles(total, gathered.live + full + partial, gathered.full_tiles + full, gathered.partial_tiles + partial)


def repeated(one: Simulation, times: float) -> Simulation:
    """Return the simulation with all times and counts multiplied, for a branch that represents `times` equal ones."""
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
        notes=(*one.notes, f"only some of many equal branches are simulated: each represents {times:.1f}"),
    )


def alike(choices: Iterable[SimulatedSchedule]) -> list[SimulatedSchedule]:
    """Return each distinct schedule once, with the total time of all kernels that run so."""
    total_ms: dict[SimulatedSchedule, float] = {}
    for choice in choices:
        key = replace(choice, ms=0.0)
        total_ms[key] = total_ms.get(key, 0.0) + choice.ms
    return [replace(choice, ms=ms) for choice, ms in total_ms.items()]
