"""The ladder of the CPU at hand: the pieces that the executor would run, at the rates that were measured here.

What the plan was chosen by is what is reported: the same rates, the same formula for a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, inf

import numpy as np

from attnc.compiler.planning.cpu_plan import Plan, PlanPiece, stretch
from attnc.compiler.planning.rates import KEY_BLOCK, PieceWork, Rates, computed
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
)
from attnc.compiler.simulation.tile_work import NATURAL, Order

GRADIENTS = 2
"""Operations of the gradient of an operation of two operands."""

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class CpuMachine:
    """The machine: its name, threads and rates."""

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
    """The ladder of a plan. `nodes`: the size of the relation, which pieces with masks of their own evaluate.

    `chosen`: the attentions to chosen places, of which the plan has no pieces; `besides`: what joins attentions, and
    averages the keys of some.
    """
    shape = problem.shape
    pieces = [run for own in _plans(plan) for run in _runs(own, problem, cpu, nodes, stage)]
    pieces += [run for work in chosen for run in _gathered(work, problem, cpu, stage)]
    best = cpu.rates.best(shape.dtype, _width(problem))
    pairs = problem.dense_pairs(baseline)
    ideal, dense = dense_ms(problem, cpu, stage, baseline)
    elements = sum(run.elements for run in pieces)
    chunks = sum(run.longest_thread for run in pieces)
    rates = cpu.rates.choices
    more = 0.0 if besides is None else besides.ns(rates) * (GRADIENTS if stage == "backward" else 1)
    attended = (sum(run.ns for run in pieces) + more) / 1e6
    listing = sum(work.listing_ns(rates, shape.dk, shape.dv, cpu.threads, stage) for work in chosen) / 1e6
    choosing = sum(work.deciding.ns(rates) for work in chosen) / 1e6 if stage != "backward" else 0.0
    predicted = attended + listing + choosing
    visible = plan.visible
    tile = pairs / elements if elements else inf
    balanced = pairs / cpu.threads / chunks if chunks else inf
    *bounds, last = ladder(pairs, visible, tile, balanced, ideal / attended if attended else inf)
    lost = (
        _hidden(visible, pairs),
        f"{elements:,} score elements are computed in {len(pieces)} kinds of kernel calls",
        f"the longest of {cpu.threads} threads, call by call",
        _lost(pieces, cpu, best),
    )
    rungs = [Rung(name, speedup, why) for name, speedup, why in zip(RUNGS, bounds, lost, strict=False)]
    if chosen:
        listed, all_ = (min(last, ideal / ms if ms else inf) for ms in (attended + listing, predicted))
        rungs += [Rung("attended", last, lost[-1]), Rung("listed", listed, _share("lists", listing, predicted))]
        what = "chosen in the forward" if stage == "backward" else _share("the choice", choosing, predicted)
        rungs.append(Rung("predicted", all_, what))
    else:
        rungs.append(Rung("predicted", last, lost[-1]))
    size = BYTES[shape.dtype]
    masks = sum(mask.whole().size for one in _plans(plan) for mask in one.masks)
    own = (shape.lanes * shape.n_q + shape.batch * shape.kv_heads * shape.n_k) * (shape.dk + shape.dv) * size
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
        traffic=Traffic(own, own, own + masks * size),
        notes=(*problem.notes, *plan.reasons, *(() if plan.fallback is None else (plan.fallback,))),
        loads=_loads(pieces, cpu),
        workers="threads",
    )


def _plans(plan: Plan) -> list[Plan]:
    return [own for _, branch in plan.branches for own in _plans(branch)] or [plan]


def _runs(plan: Plan, problem: SimulatedCall, cpu: CpuMachine, nodes: int, stage: Pass) -> Iterator[_PieceRun]:
    longer = _longer(problem.shape.dtype, cpu, stage, cpu.threads)
    for group in plan.groups:
        work = PieceWork(problem.shape.dtype, _width(problem), len(group.batches) * len(group.heads), nodes)
        for piece in group.pieces:
            yield _PieceRun(piece, work, _is_trimmed(plan, piece), cpu, longer=longer)


def _gathered(work: SelectionWork, problem: SimulatedCall, cpu: CpuMachine, stage: Pass) -> Iterator[_PieceRun]:
    dtype = problem.shape.dtype
    for met in work.met(cpu.threads):
        own, longer = PieceWork(dtype, _width(problem), met.lanes, 1), _longer(dtype, cpu, stage, met.lanes)
        yield _PieceRun(met.piece, own, False, cpu, met.times, longer, called=False)


def _width(problem: SimulatedCall) -> int:
    return max(problem.shape.dk, problem.shape.dv)


def _is_trimmed(plan: Plan, piece: PlanPiece) -> bool:
    return isinstance(piece.mask, int) and plan.masks[piece.mask].is_triangular


def _order(plan: Plan) -> Order:
    """Return the order of tokens in the pieces."""
    pieces = [piece for own in _plans(plan) for group in own.groups for piece in group.pieces]
    strides = {axis.stride for piece in pieces for axis in piece.queries.axes}
    bricks = [piece for piece in pieces if len(piece.queries.axes) > 1]
    if bricks:
        sides = tuple(axis.length for axis in bricks[0].queries.axes)
        return Order("bricks", sides, tuple(axis.length for axis in bricks[0].keys.axes))
    return Order("residues", divisors=tuple(sorted(strides - {1}))) if strides - {1} else NATURAL


@dataclass(frozen=True, eq=False)
class _PieceRun:
    """A piece as torch's kernel runs it, `times` times; `called`: its call is one of the executor's pieces."""

    piece: PlanPiece
    work: PieceWork
    trimmed: bool
    cpu: CpuMachine
    times: float = 1.0
    longer: float = 1.0
    called: bool = True

    @cached_property
    def ns(self) -> float:
        """By the rates; `longer` by what the backward takes, without the call itself where that is counted apart."""
        own = self.cpu.rates.piece(self.piece, self.work, self.trimmed)
        return (own if self.called else own - self.cpu.rates.call) * self.times * self.longer

    @cached_property
    def elements(self) -> int:
        """Score elements that the kernel computes."""
        return round(computed(self.piece, trimmed=self.trimmed) * self.work.lanes * self.times)

    @cached_property
    def longest_thread(self) -> float:
        """Score elements of the thread that has most of them: blocks of rows are dealt out in one stretch a thread."""
        loads = self.loads
        return float(loads.max()) if len(loads) else 0.0

    @cached_property
    def loads(self) -> Float64:
        """Score elements of every thread."""
        rows, keys = self.piece.queries.length, self.piece.keys.length
        block = 256 if rows >= 768 else 64 if rows >= 192 else 32
        starts = np.arange(0, rows, block)
        heights = np.minimum(block, rows - starts)
        widths = np.full(len(starts), keys)
        if self.piece.mask == "causal" or self.trimmed:
            widths = np.minimum(-(-(starts + heights) // KEY_BLOCK) * KEY_BLOCK, keys)
        own = (heights * widths).astype(np.float64)
        many = self.piece.queries.count * self.work.lanes
        chunk = ceil(len(own) * many / self.cpu.threads)
        before = np.append(0.0, np.cumsum(own))
        ends = np.minimum(np.arange(self.cpu.threads + 1) * chunk, len(own) * many)
        each = ends // len(own) * before[-1] + before[ends % len(own)]
        return np.asarray(np.diff(each) * self.times)


def _loads(pieces: list[_PieceRun], cpu: CpuMachine) -> tuple[float, ...]:
    """Milliseconds of every thread, all pieces together."""
    total = np.zeros(cpu.threads)
    for run in pieces:
        if run.longest_thread:
            total += run.loads / run.longest_thread * run.ns / 1e6
    return tuple(np.sort(total)[::-1].tolist())


def dense_ms(problem: SimulatedCall, cpu: CpuMachine, stage: Pass, baseline: Baseline) -> tuple[float, float]:
    """Milliseconds of dense attention: at its ideal, and as predicted."""
    shape = problem.shape
    ideal = problem.dense_pairs(baseline) * cpu.rates.best(shape.dtype, _width(problem))
    longer = _longer(shape.dtype, cpu, stage, shape.batch * shape.kv_heads)
    at_best = _longer(shape.dtype, cpu, stage, cpu.threads)
    return ideal * at_best / 1e6, _dense(problem, cpu, baseline).ns * longer / 1e6


def _longer(dtype: str, cpu: CpuMachine, stage: Pass, kv_lanes: int) -> float:
    """How much longer than its forward a pass takes that has so many kv heads to give to threads."""
    return 1.0 if stage != "backward" else cpu.rates.longer(dtype, kv_lanes, cpu.threads)


def _dense(problem: SimulatedCall, cpu: CpuMachine, baseline: Baseline) -> _PieceRun:
    shape = problem.shape
    square = baseline == "causal" and shape.n_q == shape.n_k
    piece = PlanPiece(stretch(0, shape.n_q), stretch(0, shape.n_k), "causal" if square else "full")
    return _PieceRun(piece, PieceWork(shape.dtype, _width(problem), shape.lanes, 1), False, cpu)


def _hidden(visible: int | None, pairs: int) -> str:
    return "pairs were not counted" if visible is None else f"{visible:,} of {pairs:,} pairs are visible"


def _share(what: str, own: float, whole: float) -> str:
    return f"{what} {own / whole:.0%} of the time" if own else f"{what} nothing"


def _lost(pieces: list[_PieceRun], cpu: CpuMachine, best: float) -> str:
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
