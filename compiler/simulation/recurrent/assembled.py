"""Assemble the simulation of a recurrence from its times, its passes and its dense rival."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import ceil

from attnc.compiler.kernels.kernel_source import BYTES
from attnc.compiler.planning.tile_work import NATURAL
from attnc.compiler.simulation.cpu_ladder import CpuMachine
from attnc.compiler.simulation.cpu_ladder import dense_ms as dense_on_cpu
from attnc.compiler.simulation.gpu_clocks import (
    Extra,
)
from attnc.compiler.simulation.gpu_ladder import dense_ms as dense_on_gpu
from attnc.compiler.simulation.machine import Machine, MachineError
from attnc.compiler.simulation.recurrent.chunk_work import Amount
from attnc.compiler.simulation.recurrent.recurrence_call import PassPart, RecurrenceCall
from attnc.compiler.simulation.recurrent.recurrence_simulation import (
    RUNGS,
    ChunkCost,
    PassKernel,
    RecurrenceSimulation,
    SimulatedPass,
)
from attnc.compiler.simulation.simulated_call import SimulatedCall
from attnc.compiler.simulation.simulation import Pass, Rung, SimulatedSchedule, Tiles, Traffic
from attnc.compiler.simulation.traffic import memory_ms


def rival(call: RecurrenceCall, machine: Machine | CpuMachine, stage: Pass) -> tuple[float, float]:
    """Return the milliseconds of dense causal attention: ideal, and predicted."""
    shape = call.shape
    problem = SimulatedCall(call.name, {}, shape, shape.n_k - shape.n_q, (), Extra(), 1, ())
    if isinstance(machine, CpuMachine):
        return dense_on_cpu(problem, machine, stage, "causal")
    if stage != "decode":
        try:
            return dense_on_gpu(problem, machine, stage, "causal")
        except MachineError:  # no tile fits such heads: take the time of the products
            flop = 2.0 * problem.dense_pairs("causal") * (shape.dk + shape.dv) * (1 if stage == "forward" else 2.5)
            ideal = flop / machine.tensor_flop(shape.dtype) / machine.sms / machine.hertz * 1e3
            return ideal, ideal / machine.kernel_share(shape.dk)
    element_bytes = BYTES[shape.dtype]
    cache = shape.batch * shape.kv_heads * shape.n_k * (shape.dk + shape.dv) * element_bytes
    queries = 2 * shape.lanes * shape.n_q * (shape.dk + shape.dv) * element_bytes
    start = 2 * machine["launch_us"] / 1e3 + machine["prologue_clocks"] / machine.hertz * 1e3
    busy = min(1.0, ceil(shape.n_k / 64) * shape.batch * shape.kv_heads / machine.sms)
    return memory_ms(machine, cache), memory_ms(machine, cache + queries) / busy + start


def assembled(
    call: RecurrenceCall,
    device: str,
    title: str,
    stage: Pass,
    times: Sequence[float],
    lost: Sequence[str],
    passes: Sequence[SimulatedPass],
    others: Sequence[SimulatedSchedule],
    dense: tuple[float, float],
    *,
    loop_ms: float,
    least: int,
    held: int,
    notes: tuple[str, ...],
    calibrated: bool = False,
    workers: str = "SMs",
) -> RecurrenceSimulation:
    """Return the simulation whose rungs have these times, each raised to at least the one before it."""
    ideal, predicted = dense
    rising = tuple(accumulate(times, max))
    rungs = tuple(Rung(name, ideal / ms, why) for name, ms, why in zip(RUNGS, rising, lost, strict=True))
    kernels = [kernel for simulated in passes for kernel in simulated.kernels]
    return RecurrenceSimulation(
        pattern=call.name,
        params=call.params,
        device=device,
        title=title,
        shape=call.shape,
        stage=stage,
        baseline="causal",
        causal=True,
        visible=None,
        tiles=_tiles(call, passes),
        choices=tuple(_choice(simulated) for simulated in passes),
        others=tuple(others),
        rungs=rungs,
        predicted_ms=rising[-1],
        dense_ms=predicted,
        ideal_ms=ideal,
        calibrated=calibrated,
        flop=round(sum(kernel.flop for kernel in kernels)),
        traffic=Traffic(least, sum(kernel.moved for kernel in kernels), held),
        notes=notes,
        workers=workers,
        passes=tuple(passes),
        times=rising,
        loop_ms=loop_ms,
        state_bytes=call.state_bytes,
        reason=call.reason,
    )


def chunk_cost(call: RecurrenceCall, part: PassPart, chunk: int, work: Sequence[Amount], ms: float | None) -> ChunkCost:
    """Return the cost of chunks of `chunk` rows, for each token and head; `work`: of a chunk, forward and backward."""
    form, (ahead, back) = part.form, work
    tokens = form.kind.per_chunk(chunk)
    states = call.shape.lanes * form.kind.chunks(call.shape.n_q, chunk) * form.entries * 4
    return ChunkCost(chunk, ahead.flop / tokens, back.flop / tokens, ahead.exps / tokens, states, ms)


def token_pass(call: RecurrenceCall, kernel: PassKernel) -> SimulatedPass:
    """Return the pass of a recurrence that runs token by token."""
    return SimulatedPass(", ".join(call.states), "token by token", 1, "token by token", 0, 1, 0, (kernel,), ())


def _tiles(call: RecurrenceCall, passes: Sequence[SimulatedPass]) -> Tiles:
    """Return the tiles of dense attention and the chunks on the diagonal as live tiles."""
    slowest = max(passes, key=lambda simulated: simulated.ms)
    side = max(slowest.chunk // slowest.micro, 1)
    rows = ceil(call.shape.n_q / side) * call.shape.lanes
    total = rows * ceil(call.shape.n_k / side)
    return Tiles(total, rows, 0, rows) if slowest.chunk else Tiles(total, 0, 0, 0)


def _choice(simulated: SimulatedPass) -> SimulatedSchedule:
    slowest = max(simulated.kernels, key=lambda kernel: kernel.ms)
    return SimulatedSchedule(
        simulated.state, simulated.chunk, simulated.chunk, NATURAL, str(simulated), slowest.limit, simulated.ms
    )
