"""The ladder of a recurrence on the local CPU: the executor's chunks at measured rates.

The rates are the rates of dense attention (`compiler.planning.rates`): the time of a score element is taken as the time
of its two products. The executor computes in fp32 for every dtype but fp64.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from attnc.compiler.planning.tile_work import NATURAL
from attnc.compiler.simulation.cpu_ladder import CpuMachine
from attnc.compiler.simulation.print_simulation import count, size
from attnc.compiler.simulation.recurrent.assembled import assembled, chunk_cost, rival, token_pass
from attnc.compiler.simulation.recurrent.chunk_work import Amount, backward, forward
from attnc.compiler.simulation.recurrent.cpu_chunks import (
    CALL_SHARE,
    CALLS,
    EXP,
    STRETCH,
    Times,
    chunk_on_cpu,
    chunk_times,
    flop_ns,
    work_per_chunk,
)
from attnc.compiler.simulation.recurrent.pass_plans import CHUNKS
from attnc.compiler.simulation.recurrent.recurrence_call import Entries, PassPart, RecurrenceCall, RunningLogSum
from attnc.compiler.simulation.recurrent.recurrence_simulation import (
    ChunkCost,
    Kind,
    PassKernel,
    RecurrenceSimulation,
    SimulatedPass,
)
from attnc.compiler.simulation.simulation import Pass, SimulatedSchedule


def simulate_recurrence_cpu(
    call: RecurrenceCall, cpu: CpuMachine, nodes: int, stage: Pass = "forward"
) -> RecurrenceSimulation:
    """Simulate a call of a recurrence.

    `nodes`: the number of operations of a token, each a call of torch if the recurrence runs token by token.
    """
    loop = _loop_times(call, cpu, nodes, stage)
    others = list[SimulatedSchedule]()
    if stage == "decode" or call.parts is None:
        passes, times = [_token_pass(call, loop)], [loop]
    else:
        passes, times = list[SimulatedPass](), list[Times]()
        for part in call.parts:
            pass_times, simulated_pass = _part(call, part, cpu, stage)
            passes.append(simulated_pass)
            times.append(pass_times)
        others = _others(passes)
    rung_times = [
        sum(getattr(part_times, name) for part_times in times)
        for name in ("inputs", "states", "units", "chain", "rest")
    ]
    flop = sum(kernel.flop for x in passes for kernel in x.kernels)
    steps = max(kernel.steps for x in passes for kernel in x.kernels)
    held = sum(c.state_bytes for x in passes for c in x.costs if c.chunk == x.chunk)
    return assembled(
        call,
        "cpu",
        cpu.title,
        stage,
        [sum(rung_times[: i + 1]) for i in range(len(rung_times))],
        (
            f"inputs read and outputs written: {size(call.least)}",
            f"states written and read: {size(held or call.state_bytes)}",
            f"{count(flop)}FLOP in products, and exponentials, at the rates of dense attention",
            f"{steps:,} steps one after another",
            "calls of torch, and products slowed by small chunks",
        ),
        passes,
        others,
        rival(call, cpu, stage),
        loop_ms=loop.total,
        least=call.least,
        held=held + call.state_bytes,
        notes=call.notes,
        calibrated=cpu.calibrated,
        workers="threads",
    )


def _part(
    call: RecurrenceCall, part: PassPart | RunningLogSum | Entries, cpu: CpuMachine, stage: Pass
) -> tuple[Times, SimulatedPass]:
    """Return the times of a part of the call, and its pass for the report."""
    if isinstance(part, PassPart):
        chunk = chunk_on_cpu(part.form, call.shape.lanes, call.shape.dtype)
        times = _chunked_times(call, part, cpu, stage, chunk)
        costs = tuple(_cost(call, part, cpu, stage, n) for n in CHUNKS if n >= part.form.micro)
        work, chunks = work_per_chunk(part.form, stage, chunk).total, part.form.kind.chunks(call.shape.n_q, chunk)
        kernel = _kernel("chunks", times, work.flop * chunks * call.shape.lanes, chunks)
        form = part.form
        simulated_pass = SimulatedPass(
            form.state, form.words, form.micro, "cpu", chunk, 1, form.columns, (kernel,), costs
        )
        return times, simulated_pass
    rows, copy = call.shape.lanes * call.shape.n_q, cpu.rates.copy / 1e6
    numbers = part.rows * part.columns if isinstance(part, Entries) else call.states[part.state]
    factor = 3.0 if stage == "backward" else 1.0
    exps = part.exps if isinstance(part, Entries) else 2 * numbers
    units = rows * (4 * numbers + EXP * exps) * copy * factor
    inputs = call.size(part.sources | part.reads) / 4 * copy * factor
    times = Times(inputs, 0.0, units, 0.0, CALLS * ceil(rows / STRETCH) * cpu.rates.call * CALL_SHARE / 1e6)
    kind: Kind = "entries" if isinstance(part, Entries) else "sum"
    words = "entry by entry" if kind == "entries" else "log-sum-exp"
    return times, SimulatedPass(part.state, words, 1, kind, 0, 1, 0, (_kernel(words, times, 0.0, 1),), ())


def _chunked_times(call: RecurrenceCall, part: PassPart, cpu: CpuMachine, stage: Pass, chunk: int) -> Times:
    """Return the times of a pass in chunks of `chunk` rows."""
    moved = call.size(part.sources | part.reads) / 4 * (2 if stage == "backward" else 1)
    times = chunk_times(part.form, call.shape.lanes, call.shape.n_q, call.shape.dtype, cpu.rates, stage, chunk)
    return replace(times, inputs=moved * cpu.rates.copy / 1e6)


def _cost(call: RecurrenceCall, part: PassPart, cpu: CpuMachine, stage: Pass, chunk: int) -> ChunkCost:
    work = [count_work(part.form, chunk, apart=False).total for count_work in (forward, backward)]
    return chunk_cost(call, part, chunk, work, _chunked_times(call, part, cpu, stage, chunk).total)


def _loop_times(call: RecurrenceCall, cpu: CpuMachine, nodes: int, stage: Pass) -> Times:
    """Return the times of running token by token: a call of torch for every operation, over the states of all heads."""
    shape, copy = call.shape, cpu.rates.copy / 1e6
    factor = 3.0 if stage == "backward" else 1.0
    entries = shape.lanes * shape.n_q * sum(call.states.values())
    solving = 10 * call.solves / max(shape.dk * shape.dk, 1)
    calls = shape.n_q * (nodes + solving) * cpu.rates.call * CALL_SHARE / 1e6 * factor
    work = Amount(products=2.0 * (2 * entries + shape.lanes * shape.n_q * call.solves))
    units = work.products * flop_ns(call.shape.dtype, cpu.rates) / 1e6 * factor
    return Times(call.least / 4 * copy, 2 * entries * copy * factor, units, calls, 0.0)


def _token_pass(call: RecurrenceCall, times: Times) -> SimulatedPass:
    """Return the pass of a recurrence that runs token by token."""
    flop = 4.0 * call.shape.lanes * call.shape.n_q * sum(call.states.values())
    return token_pass(call, _kernel("token by token", times, flop, call.shape.n_q))


def _kernel(name: str, times: Times, flop: float, steps: int) -> PassKernel:
    named = {"copies": times.inputs + times.states, "products": times.units, "steps one after another": times.chain}
    limit = max(named, key=lambda name: named[name])
    memory = times.inputs + times.states
    units = memory + times.units
    return PassKernel(name, 1, steps, 0, flop, memory, units, units + times.chain, times.total, limit)


def _others(passes: list[SimulatedPass]) -> list[SimulatedSchedule]:
    """Return other lengths of chunks of the costliest pass, the fastest first; the executor does not use them."""
    slowest = max(passes, key=lambda simulated: simulated.ms)
    other_ms = sum(simulated.ms for simulated in passes) - slowest.ms
    schedules = [
        SimulatedSchedule(
            "plan", cost.chunk, cost.chunk, NATURAL, f"chunks of {cost.chunk}", "products", other_ms + cost.ms
        )
        for cost in slowest.costs
        if cost.chunk != slowest.chunk and cost.ms is not None
    ]
    return sorted(schedules, key=lambda choice: choice.ms)[:3]
