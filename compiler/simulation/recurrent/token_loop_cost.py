"""The cost of a recurrence token by token on a GPU.

A loop over all of its steps and an elementwise scan keep the state on the chip; a decoding step keeps it in memory.
"""

from __future__ import annotations

from math import ceil

from attnc.compiler.simulation.machine import Machine
from attnc.compiler.simulation.recurrent.chunk_work import Amount
from attnc.compiler.simulation.recurrent.kernel_times import MEMORY_SHARE, Task
from attnc.compiler.simulation.recurrent.recurrence_call import Entries, PassPart, RecurrenceCall
from attnc.compiler.simulation.recurrent.recurrence_simulation import PassKernel
from attnc.compiler.simulation.simulation import Pass
from attnc.compiler.simulation.traffic import memory_ms

TOKEN_CLOCKS = 400.0
"""Minimum clocks of a token, however small the state: its loads, a sum over the rows of the state, its store."""

BACKWARD = 3.0
"""The time of the backward over the forward: it runs forward again, and back with two states."""

ENTRY_CLOCKS = 100.0
"""Clocks of a token with an elementwise state: a multiplication and an addition that depend on the token before."""

SEGMENT = 256
"""Minimum number of tokens of a segment."""

STEPS = "steps one after another"

COLUMNS = 32
"""Number of columns of a state per program, if a derivation shows that columns do not read each other."""


def loop_run(call: RecurrenceCall, machine: Machine, stage: Pass) -> PassKernel:
    """Return the times of a loop in which every token reads and writes the whole state of its head.

    Without a derivation of the steps, one program holds the whole state of a head.
    """
    shape = call.shape
    entries = sum(call.states.values())
    blocks = _blocks(call)
    programs = max(shape.lanes * blocks, 1)
    traffic = 4.0 * (2 * entries + call.solves)
    rate = machine["shared_bytes_per_clock"]
    if 4 * entries / blocks > machine["shared_kib"] * 1024 + 2 * machine["registers"]:
        rate = machine["l2_bytes_per_clock"] / machine.sms
    factor = BACKWARD if stage == "backward" else 1.0
    to_ms = factor * shape.n_q / machine.hertz * 1e3
    memory = memory_ms(machine, call.least * (2 if stage == "backward" else 1))
    full = max(memory, shape.lanes * traffic / rate / machine.sms * to_ms)
    token_clocks = traffic / blocks / rate
    chain = max(full, ceil(programs / machine.sms) * token_clocks * to_ms, max(token_clocks, TOKEN_CLOCKS) * to_ms)
    start = machine["launch_us"] / 1e3 + machine["prologue_clocks"] / machine.hertz * 1e3
    ms = max(chain, memory / MEMORY_SHARE) + start
    work = Amount(products=2.0 * shape.lanes * shape.n_q * (2 * entries + call.solves) * factor)
    task = Task("token by token", call.least, work, programs, shape.n_q)
    return task.kernel(memory, full, chain, ms, STEPS if chain > memory else "memory")


def entries_run(call: RecurrenceCall, part: Entries, machine: Machine, stage: Pass) -> tuple[PassKernel, int]:
    """Return the times of an elementwise state and the number of its segments.

    Several segments are walked at once from an empty state, and again from the state before them. Each entry takes two
    multiplications, two additions and its decay.
    """
    shape, factor = call.shape, BACKWARD if stage == "backward" else 1.0
    moved = call.size(part.sources | part.reads) * (2 if stage == "backward" else 1)
    memory, runs = memory_ms(machine, moved), list[tuple[PassKernel, int]]()
    lanes = max(shape.lanes * ceil(part.columns / COLUMNS), 1)
    for segments in (2**i for i in range(8) if i == 0 or shape.n_q >= SEGMENT << i):
        walks = factor * (1 if segments == 1 else 2)
        updates = shape.lanes * shape.n_q * walks
        work = Amount(fma=4.0 * updates * part.rows * part.columns, exps=float(updates * part.exps))
        clocks = max(work.fma / machine["fma_per_clock"], work.exps / machine["exp_per_clock"]) / machine.sms
        units = clocks / machine.hertz * 1e3
        programs, steps = lanes * segments, ceil(shape.n_q / segments)
        uneven = ceil(programs / machine.sms) / (programs / machine.sms)
        chain = max(memory, units * uneven, walks * steps * ENTRY_CLOCKS / machine.hertz * 1e3)
        start = (1 if segments == 1 else 2) * machine["launch_us"] / 1e3
        task = Task("entries", moved, work, programs, steps)
        limit = "memory" if chain == memory else "exponentials and fp32 units" if units * uneven == chain else STEPS
        ms = max(chain, memory / MEMORY_SHARE) + start
        runs.append((task.kernel(memory, max(memory, units), chain, ms, limit), segments))
    return min(runs, key=lambda entry: (entry[0].ms, entry[1]))


def decode_run(call: RecurrenceCall, machine: Machine) -> PassKernel:
    """Return the times of a decoding step: the state is read and written once, however many tokens came before."""
    shape = call.shape
    moved = 2 * call.state_bytes + call.least
    programs = max(shape.lanes * _blocks(call), 1)
    memory = memory_ms(machine, moved)
    tokens = shape.n_q * max(TOKEN_CLOCKS, 0.0) / machine.hertz * 1e3
    chain = max(memory / min(1.0, programs / machine.sms), tokens)
    start = machine["launch_us"] / 1e3 + machine["prologue_clocks"] / machine.hertz * 1e3
    ms = max(chain, memory / MEMORY_SHARE) + start
    work = Amount(products=4.0 * shape.lanes * shape.n_q * sum(call.states.values()))
    task = Task("decode", moved, work, programs, shape.n_q)
    return task.kernel(memory, memory, chain, ms, "memory" if memory / MEMORY_SHARE > start else "launch")


def _blocks(call: RecurrenceCall) -> int:
    """Return the number of programs of a batch entry and head."""
    if call.parts is None:
        return 1
    columns = [part.form.columns for part in call.parts if isinstance(part, PassPart)]
    columns += [part.columns for part in call.parts if isinstance(part, Entries)]
    return ceil(max(columns, default=1) / COLUMNS)
