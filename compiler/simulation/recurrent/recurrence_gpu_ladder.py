"""The ladder of a recurrence on a GPU: the fastest predicted plan of every pass, and the cost that each rung adds."""

from __future__ import annotations

from collections.abc import Sequence

from attnc.compiler.kernels.kernel_source import BYTES
from attnc.compiler.planning.tile_work import NATURAL
from attnc.compiler.simulation.machine import Machine, MachineError
from attnc.compiler.simulation.print_simulation import count, size
from attnc.compiler.simulation.recurrent.assembled import assembled, chunk_cost, rival, token_pass
from attnc.compiler.simulation.recurrent.chunk_work import Amount, backward, forward
from attnc.compiler.simulation.recurrent.kernel_times import Task, run
from attnc.compiler.simulation.recurrent.pass_plans import CHUNKS, LEAST, PassPlan, backward_plans, plans
from attnc.compiler.simulation.recurrent.recurrence_call import Entries, PassPart, RecurrenceCall, RunningLogSum
from attnc.compiler.simulation.recurrent.recurrence_simulation import (
    ChunkCost,
    PassKernel,
    RecurrenceSimulation,
    SimulatedPass,
)
from attnc.compiler.simulation.recurrent.token_loop_cost import COLUMNS, decode_run, entries_run, loop_run
from attnc.compiler.simulation.simulation import Pass, SimulatedSchedule
from attnc.compiler.simulation.traffic import memory_ms

SHOWN = 3
"""Number of plans that are shown besides the chosen one."""

PLANNED = "no recurrence kernel has been timed: all times are predictions for planned kernels"


def simulate_recurrence_gpu(call: RecurrenceCall, machine: Machine, stage: Pass = "forward") -> RecurrenceSimulation:
    """Simulate a call of a recurrence. Raises MachineError for dtypes and states that the machine does not support."""
    if call.shape.dtype not in BYTES:
        raise MachineError(f"{machine.name} runs recurrences in {', '.join(BYTES)}, not in {call.shape.dtype}")
    loop = loop_run(call, machine, stage)
    if stage == "decode":
        passes, others = [token_pass(call, decode_run(call, machine))], list[SimulatedSchedule]()
    elif call.parts is None:
        passes, others = [token_pass(call, loop)], []
    else:
        passes, others = _planned(call, call.parts, machine, stage)
    kernels = [kernel for simulated in passes for kernel in simulated.kernels]
    least = call.least if stage != "backward" else 2 * call.least
    read = memory_ms(machine, least)
    sums = [sum(times) for times in zip(*((k.memory_ms, k.units_ms, k.chain_ms, k.ms) for k in kernels), strict=True)]
    return assembled(
        call,
        machine.name,
        machine.title,
        stage,
        (read, *sums),
        (
            f"{', '.join(sorted(call.inputs))} read{' and their gradients written' if stage == 'backward' else ''}, "
            f"once: {size(least)}",
            _lost_to_states(call, passes, stage, sum(k.moved for k in kernels) - least),
            _lost_to_units(call, kernels),
            _lost_to_chain(kernels, machine),
            _lost_to_time(kernels, machine),
        ),
        passes,
        others,
        rival(call, machine, stage),
        loop_ms=loop.ms,
        least=least,
        held=_held(call, passes),
        notes=(*call.notes, *_notes(call, stage, passes)),
    )


def _planned(
    call: RecurrenceCall,
    parts: Sequence[PassPart | RunningLogSum | Entries],
    machine: Machine,
    stage: Pass,
) -> tuple[list[SimulatedPass], list[SimulatedSchedule]]:
    """Return every pass with its fastest plan, and other plans of the costliest pass."""
    passes = list[SimulatedPass]()
    ranks = list[list[PassPlan]]()
    for part in parts:
        if isinstance(part, RunningLogSum):
            passes.append(_log_sum_pass(call, part, machine))
            continue
        if isinstance(part, Entries):
            passes.append(_elementwise_pass(call, part, machine, stage))
            continue
        ranked = (backward_plans if stage == "backward" else plans)(call, part, machine)
        ranks.append(ranked)
        passes.append(_chunked_pass(call, part, ranked))
    if not ranks:
        return passes, []
    costliest = max(ranks, key=lambda ranked: ranked[0].ms)
    other_ms = sum(simulated.ms for simulated in passes) - costliest[0].ms
    return passes, [_choice(plan, other_ms + plan.ms) for plan in _other_plans(costliest)]


def _other_plans(ranked: list[PassPlan]) -> list[PassPlan]:
    """Return the next best plans, each with a different kind, chunk or split."""
    shown_classes = {_plan_class(ranked[0])}
    others = list[PassPlan]()
    for plan in sorted(ranked, key=lambda plan: plan.ms):
        if _plan_class(plan) not in shown_classes and len(others) < SHOWN:
            shown_classes.add(_plan_class(plan))
            others.append(plan)
    return others


def _plan_class(plan: PassPlan) -> tuple[str, int, bool]:
    return plan.kind, plan.chunk, plan.segments > 1


def _choice(plan: PassPlan, ms: float) -> SimulatedSchedule:
    slowest = max(plan.kernels, key=lambda kernel: kernel.ms)
    return SimulatedSchedule("plan", plan.chunk, plan.chunk, NATURAL, str(plan), slowest.limit, ms)


def _chunked_pass(call: RecurrenceCall, part: PassPart, ranked: list[PassPlan]) -> SimulatedPass:
    """Return a pass with its best plan and the cost of every length of chunks."""
    best, form = ranked[0], part.form
    costs = tuple(_cost(call, part, chunk, ranked) for chunk in CHUNKS if chunk >= form.micro)
    return SimulatedPass(
        form.state, form.words, form.micro, best.kind, best.chunk, best.segments, best.columns, best.kernels, costs
    )


def _cost(call: RecurrenceCall, part: PassPart, chunk: int, ranked: list[PassPlan]) -> ChunkCost:
    """Return the cost of chunks of `chunk` rows."""
    work = [count_work(part.form, chunk, least=LEAST).total for count_work in (forward, backward)]
    return chunk_cost(call, part, chunk, work, min((plan.ms for plan in ranked if plan.chunk == chunk), default=None))


def _log_sum_pass(call: RecurrenceCall, part: RunningLogSum, machine: Machine) -> SimulatedPass:
    """Return the pass of a running log-sum-exp: two exponentials for each element."""
    moved = call.size(part.sources | part.reads)
    numbers = call.shape.lanes * call.shape.n_q * call.states[part.state]
    task = Task("log-sum-exp", moved, Amount(fma=4.0 * numbers, exps=2.0 * numbers), max(numbers // 4096, 1))
    kernel = run(machine, call.shape.dtype, task)
    return SimulatedPass(part.state, "log-sum-exp", 1, "sum", 0, 1, 1, (kernel,), ())


def _elementwise_pass(call: RecurrenceCall, part: Entries, machine: Machine, stage: Pass) -> SimulatedPass:
    """Return the pass of a state with an elementwise update."""
    kernel, segments = entries_run(call, part, machine, stage)
    name = f"{part.state}[{part.rows}, {part.columns}]" if part.rows > 1 else f"{part.state}[{part.columns}]"
    return SimulatedPass(name, "entry by entry", 1, "entries", 0, segments, COLUMNS, (kernel,), ())


# --- in words --------------------------------------------------------------------------------------------------------


def _held(call: RecurrenceCall, passes: Sequence[SimulatedPass]) -> int:
    """Return the bytes of all states and of the states before chunks that one kernel writes for another."""
    chunked = [x for x in passes if x.kind == "apart"]
    return sum(cost.state_bytes for x in chunked for cost in x.costs if cost.chunk == x.chunk) + call.state_bytes


def _lost_to_states(call: RecurrenceCall, passes: Sequence[SimulatedPass], stage: Pass, more_bytes: int) -> str:
    """Return the text of the states rung; `more_bytes`: bytes that are moved beyond inputs and outputs."""
    if stage == "decode":
        return f"the state read and written: {size(2 * call.state_bytes)}"
    if call.parts is None:
        return f"the state stays on the chip: {size(call.state_bytes)} of all heads"
    held = [
        f"{x.state} {size(cost.state_bytes)} (chunks of {x.chunk})"
        for x in passes
        for cost in x.costs
        if x.kind == "apart" and cost.chunk == x.chunk
    ]
    if held:
        return f"states before chunks: {', '.join(held)}; in all {size(more_bytes)} more between the kernels"
    stays = "the state stays on the chip"
    return (
        f"{stays}; {size(more_bytes)} more between the kernels" if more_bytes > 0 else f"{stays}: nothing more is moved"
    )


def _lost_to_units(call: RecurrenceCall, kernels: Sequence[PassKernel]) -> str:
    flop = sum(kernel.flop for kernel in kernels)
    tokens = max(call.shape.lanes * call.shape.n_q, 1)
    bound = [kernel.name for kernel in kernels if kernel.units_ms > kernel.memory_ms]
    busy = f"; more than the memory takes: {', '.join(bound)}" if bound else ", less than the memory takes"
    return f"{count(flop / tokens)}FLOP in products for a token and head{busy}"


def _lost_to_chain(kernels: Sequence[PassKernel], machine: Machine) -> str:
    longest = max(kernels, key=lambda kernel: kernel.chain_ms if kernel.steps > 1 else 0.0)
    programs = f"{longest.programs:,} program{'' if longest.programs == 1 else 's'}"
    if longest.steps == 1:
        return f"{programs} on {machine.sms} SMs"
    return f"{longest.name}: {longest.steps:,} steps one after another, {programs} on {machine.sms} SMs"


def _lost_to_time(kernels: Sequence[PassKernel], machine: Machine) -> str:
    total = sum(kernel.ms for kernel in kernels)
    start = len(kernels) * (machine["launch_us"] / 1e3 + machine["prologue_clocks"] / machine.hertz * 1e3)
    limits = ", ".join(f"{kernel.name} {kernel.ms / total:.0%} ({kernel.limit})" for kernel in kernels)
    return f"{limits}; starts {start / total:.0%}"


def _notes(call: RecurrenceCall, stage: Pass, passes: Sequence[SimulatedPass]) -> tuple[str, ...]:
    notes = [PLANNED]
    if stage == "backward" and call.parts is not None:
        notes.append("the backward reads the states before chunks that the forward kept")
    corrected = [
        part.form.state for part in call.parts or () if isinstance(part, PassPart) and part.form.kind.is_corrected
    ]
    split = [x.state for x in passes if x.segments > 1 and x.state in corrected]
    if split:
        notes.append(
            f"{', '.join(split)} in segments: corrections turn a segment into a matrix, and a head whose matrix lets "
            f"states grow is walked without segments"
        )
    return tuple(notes)
