"""The ladder of the local CPU: the pieces that the executor would run, at the rates measured on this machine.

The simulation reports what the planner used: the rates and the cost formula of a piece are shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, inf

import numpy as np

from attnc.compiler.planning.cpu_plan import Plan, PlanPiece, stretch
from attnc.compiler.planning.rates import KEY_BLOCK, PieceWork, Rates, computed
from attnc.compiler.planning.tile_work import NATURAL, Order
from attnc.compiler.simulation.balance import Float64
from attnc.compiler.simulation.cpu_choices import Deciding, SelectionWork
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
    time_share,
)

GRADIENTS = 2
"""The number of operations in the gradient of an operation with two operands."""

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class CpuMachine:
    """The local CPU with its title, threads and rates; `calibrated`: whether the rates were measured here."""

    title: str
    threads: int
    rates: Rates
    calibrated: bool


def simulate_cpu(
    problem: SimulatedCall,
    plan: Plan,
    cpu: CpuMachine,
    nodes: int,
    stage: Pass = "forward",
    baseline: Baseline = "full",
    chosen: Sequence[SelectionWork] = (),
    besides: Deciding | None = None,
) -> Simulation:
    """Simulate a call with its plan.

    `nodes`: the number of nodes of the relation, which pieces with masks evaluated at run time evaluate. `chosen`: the
    attentions to selected blocks, which the plan has no pieces for. `besides`: the work of combining attentions and of
    pooling keys.
    """
    shape = problem.shape
    pieces = [run for leaf in _plans(plan) for run in _runs(leaf, problem, cpu, nodes, stage)]
    pieces += [run for work in chosen for run in _gathered(work, problem, cpu, stage)]
    best = cpu.rates.best(shape.dtype, _width(problem))
    pairs = problem.dense_pairs(baseline)
    ideal, dense = dense_ms(problem, cpu, stage, baseline)
    elements = sum(run.elements for run in pieces)
    chunks = sum(run.longest_thread for run in pieces)
    rates = cpu.rates.choices
    besides_ns = 0.0 if besides is None else besides.ns(rates) * (GRADIENTS if stage == "backward" else 1)
    attended = (sum(run.ns for run in pieces) + besides_ns) / 1e6
    listing = sum(work.listing_ns(rates, shape.dk, shape.dv, cpu.threads, stage) for work in chosen) / 1e6
    choosing = sum(work.deciding.ns(rates) for work in chosen) / 1e6 if stage != "backward" else 0.0
    predicted = attended + listing + choosing
    visible = plan.visible
    tile = pairs / elements if elements else inf
    balanced = pairs / cpu.threads / chunks if chunks else inf
    *bounds, last = ladder(pairs, visible, tile, balanced, ideal / attended if attended else inf)
    lost = (
        "pairs were not counted" if visible is None else f"{visible:,} of {pairs:,} pairs are visible",
        f"{elements:,} score elements are computed in {len(pieces)} kinds of kernel calls",
        f"the slowest of {cpu.threads} threads in every call",
        _lost_to_time(pieces, cpu, best),
    )
    rungs = [Rung(name, speedup, why) for name, speedup, why in zip(RUNGS, bounds, lost, strict=False)]
    if chosen:
        listed, total = (min(last, ideal / ms if ms else inf) for ms in (attended + listing, predicted))
        rungs += [Rung("attended", last, lost[-1]), Rung("listed", listed, time_share("lists", listing, predicted))]
        what = "selected in the forward" if stage == "backward" else time_share("the selection", choosing, predicted)
        rungs.append(Rung("predicted", total, what))
    else:
        rungs.append(Rung("predicted", last, lost[-1]))
    size = BYTES[shape.dtype]
    masks = sum(mask.whole().size for leaf in _plans(plan) for mask in leaf.masks)
    tensors = (shape.lanes * shape.n_q + shape.batch * shape.kv_heads * shape.n_k) * (shape.dk + shape.dv) * size
    order = _order(plan)
    how = f"{len(pieces)} piece{'s' if len(pieces) != 1 else ''}, {plan.schedule}"
    choice = SimulatedSchedule("cpu", plan.q_tile, plan.k_tile, order, how, "score elements", predicted)
    return Simulation(
        pattern=problem.pattern,
        params=problem.params,
        device="cpu",
        title=cpu.title,
        shape=shape,
        stage=stage,
        baseline=baseline,
        causal=problem.is_causal,
        visible=visible,
        tiles=Tiles(plan.tiles.total, plan.tiles.live, plan.tiles.full, plan.tiles.partial),
        choices=(choice,),
        others=(),
        rungs=tuple(rungs),
        predicted_ms=predicted,
        dense_ms=dense,
        ideal_ms=ideal,
        calibrated=cpu.calibrated,
        flop=2 * (visible or 0) * (shape.dk + shape.dv),
        traffic=Traffic(tensors, tensors, tensors + masks * size),
        notes=(*problem.notes, *plan.reasons, *(() if plan.fallback is None else (plan.fallback,))),
        loads=_loads(pieces, cpu),
        workers="threads",
    )


def _plans(plan: Plan) -> list[Plan]:
    """Return the plans of all branches, or the plan itself if it has none."""
    return [leaf for _, branch in plan.branches for leaf in _plans(branch)] or [plan]


def _runs(plan: Plan, problem: SimulatedCall, cpu: CpuMachine, nodes: int, stage: Pass) -> Iterator[_PieceRun]:
    """Yield the runs of a plan's pieces."""
    factor = _backward_factor(problem.shape.dtype, cpu, stage, cpu.threads)
    for group in plan.groups:
        work = PieceWork(problem.shape.dtype, _width(problem), len(group.batches) * len(group.heads), nodes)
        for piece in group.pieces:
            yield _PieceRun(piece, work, _is_trimmed(plan, piece), cpu, longer=factor)


def _gathered(work: SelectionWork, problem: SimulatedCall, cpu: CpuMachine, stage: Pass) -> Iterator[_PieceRun]:
    """Yield the expected runs of gathered queries on their selected blocks."""
    dtype = problem.shape.dtype
    for met in work.met(cpu.threads):
        piece_work, factor = (
            PieceWork(dtype, _width(problem), met.lanes, 1),
            _backward_factor(dtype, cpu, stage, met.lanes),
        )
        yield _PieceRun(met.piece, piece_work, False, cpu, met.times, factor, called=False)


def _width(problem: SimulatedCall) -> int:
    return max(problem.shape.dk, problem.shape.dv)


def _is_trimmed(plan: Plan, piece: PlanPiece) -> bool:
    return isinstance(piece.mask, int) and plan.masks[piece.mask].is_triangular


def _order(plan: Plan) -> Order:
    """Return the order of tokens in the pieces of a plan."""
    pieces = [piece for leaf in _plans(plan) for group in leaf.groups for piece in group.pieces]
    strides = {axis.stride for piece in pieces for axis in piece.queries.axes}
    bricks = [piece for piece in pieces if len(piece.queries.axes) > 1]
    if bricks:
        sides = tuple(axis.length for axis in bricks[0].queries.axes)
        return Order("bricks", sides, tuple(axis.length for axis in bricks[0].keys.axes))
    return Order("residues", divisors=tuple(sorted(strides - {1}))) if strides - {1} else NATURAL


@dataclass(frozen=True, eq=False)
class _PieceRun:
    """A piece that torch's kernel runs `times` times.

    `longer`: the factor of the backward. `called`: whether the cost of the call itself is included.
    """

    piece: PlanPiece
    work: PieceWork
    trimmed: bool
    cpu: CpuMachine
    times: float = 1.0
    longer: float = 1.0
    called: bool = True

    @cached_property
    def ns(self) -> float:
        """The nanoseconds of all runs of the piece."""
        ns = self.cpu.rates.piece(self.piece, self.work, self.trimmed)
        return (ns if self.called else ns - self.cpu.rates.call) * self.times * self.longer

    @cached_property
    def elements(self) -> int:
        """The score elements that the kernel computes."""
        return round(computed(self.piece, trimmed=self.trimmed) * self.work.lanes * self.times)

    @cached_property
    def longest_thread(self) -> float:
        """The score elements of the busiest thread; each thread gets one stretch of consecutive blocks of rows."""
        loads = self.loads
        return float(loads.max()) if len(loads) else 0.0

    @cached_property
    def loads(self) -> Float64:
        """The score elements of every thread."""
        rows, keys = self.piece.queries.length, self.piece.keys.length
        block = 256 if rows >= 768 else 64 if rows >= 192 else 32
        starts = np.arange(0, rows, block)
        heights = np.minimum(block, rows - starts)
        widths = np.full(len(starts), keys)
        if self.piece.mask == "causal" or self.trimmed:
            widths = np.minimum(-(-(starts + heights) // KEY_BLOCK) * KEY_BLOCK, keys)
        block_elements = (heights * widths).astype(np.float64)
        repeats = self.piece.queries.count * self.work.lanes
        chunk = ceil(len(block_elements) * repeats / self.cpu.threads)
        before = np.append(0.0, np.cumsum(block_elements))
        ends = np.minimum(np.arange(self.cpu.threads + 1) * chunk, len(block_elements) * repeats)
        assigned = ends // len(block_elements) * before[-1] + before[ends % len(block_elements)]
        return np.asarray(np.diff(assigned) * self.times)


def _loads(pieces: list[_PieceRun], cpu: CpuMachine) -> tuple[float, ...]:
    """Return the milliseconds of every thread over all pieces, longest first."""
    total = np.zeros(cpu.threads)
    for run in pieces:
        if run.longest_thread:
            total += run.loads / run.longest_thread * run.ns / 1e6
    return tuple(np.sort(total)[::-1].tolist())


def dense_ms(problem: SimulatedCall, cpu: CpuMachine, stage: Pass, baseline: Baseline) -> tuple[float, float]:
    """Return the milliseconds of dense attention: ideal, and predicted."""
    shape = problem.shape
    ideal = problem.dense_pairs(baseline) * cpu.rates.best(shape.dtype, _width(problem))
    factor = _backward_factor(shape.dtype, cpu, stage, shape.batch * shape.kv_heads)
    best_factor = _backward_factor(shape.dtype, cpu, stage, cpu.threads)
    return ideal * best_factor / 1e6, _dense_run(problem, cpu, baseline).ns * factor / 1e6


def _backward_factor(dtype: str, cpu: CpuMachine, stage: Pass, kv_lanes: int) -> float:
    """Return the time of a pass over that of the forward, if `kv_lanes` kv heads are shared out to threads."""
    return 1.0 if stage != "backward" else cpu.rates.longer(dtype, kv_lanes, cpu.threads)


def _dense_run(problem: SimulatedCall, cpu: CpuMachine, baseline: Baseline) -> _PieceRun:
    shape = problem.shape
    square = baseline == "causal" and shape.n_q == shape.n_k
    piece = PlanPiece(stretch(0, shape.n_q), stretch(0, shape.n_k), "causal" if square else "full")
    return _PieceRun(piece, PieceWork(shape.dtype, _width(problem), shape.lanes, 1), False, cpu)


def _lost_to_time(pieces: list[_PieceRun], cpu: CpuMachine, best: float) -> str:
    """Return the text of the predicted rung: shares of the time beyond elements at the best rate."""
    total = sum(run.ns / run.longer for run in pieces)
    if not total:
        return "nothing to do"
    calls = sum(
        cpu.rates.call * run.times * (run.piece.queries.count if run.piece.mask == "exact" else 1)
        for run in pieces
        if run.called
    )
    at_best = sum(run.elements for run in pieces) * best
    named = {"calls": calls / total, "short stretches, masks, merging and copies": 1 - (calls + at_best) / total}
    return ", ".join(f"{name} {share:.0%}" for name, share in named.items() if share >= 0.005) or "next to nothing"
