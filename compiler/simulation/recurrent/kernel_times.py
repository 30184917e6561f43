"""Kernels of a pass on a GPU: what they move and compute, how many programs they are, and how long they take.

No kernel of ours has been timed. The four constants below were set so that the predictions for the plan of
flash-linear-attention come near its published times (`benchmarks/recurrences.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from attnc.compiler.simulation.machine import Machine
from attnc.compiler.simulation.recurrent.chunk_work import Amount
from attnc.compiler.simulation.traffic import memory_ms

PRODUCT_SHARE = 0.45
"""The share of dense attention's rate that kernels reach on chunks: small products that wait for others."""

MEMORY_SHARE = 0.7
"""The share of the rate of long copies that chunk kernels reach."""

STEP_CLOCKS = 800.0
"""Clocks of a step of a walk over chunks, beside its products: late loads, barriers, stores."""

LINK_CLOCKS = 700.0
"""Clocks of a product that waits for the one before it: draining, rounding, the way through shared memory."""

ACCUMULATED = 16384
"""Numbers that a program sums at once at most: half of the registers of an SM, half of these for operands."""


WIDTH = 128
"""The head whose share of dense attention stands for all."""


@dataclass(frozen=True, slots=True)
class Task:
    """The work of a kernel, all programs together. `steps`: one after another, in each of `programs`; `links`: the
    products of a step that wait for each other; `beside`: programs that an SM has room for at once."""

    name: str
    moved: int
    work: Amount
    programs: int
    steps: int = 1
    links: int = 0
    beside: int = 2


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """A kernel with its times in milliseconds, each at least as long as the one before it.

    `memory`: to move what it moves; `full`: with every unit busy; `chain`: with programs whole and steps one after
    another; `ms`: as predicted. `limit`: what decides.
    """

    task: Task
    memory: float
    full: float
    chain: float
    ms: float
    limit: str


def run(machine: Machine, dtype: str, task: Task) -> KernelTimes:
    """The times of a kernel."""
    memory = memory_ms(machine, task.moved)
    units = _units(machine, dtype, task.work)
    products, rest = units["tensor cores"], max(x for name, x in units.items() if name != "tensor cores")
    full = max(memory, products, rest)
    uneven = _unevenness(machine, task)
    whole = _waves(machine, task) * (_floor(machine, task) + (products + rest) * machine.sms / task.programs)
    chain = max(full, whole, max(products, rest) * uneven)
    start = machine["launch_us"] / 1e3 + machine["prologue_clocks"] / machine.hertz * 1e3
    share = PRODUCT_SHARE * machine.kernel_share(WIDTH)
    computed = (products + rest) * uneven / share
    predicted = max(chain, computed, memory / MEMORY_SHARE) + start
    longest = {"memory": memory / MEMORY_SHARE, "steps one after another": whole}
    busiest = max(units, key=lambda name: units[name])
    longest[busiest] = computed
    return KernelTimes(task, memory, full, chain, predicted, max(longest, key=lambda name: longest[name]))


def _units(machine: Machine, dtype: str, work: Amount) -> dict[str, float]:
    """Milliseconds of each kind of unit, of all SMs."""
    tensor = machine.tensor_flop(dtype)
    exact = max(machine.tables["tensor_flop_per_clock"].get("tf32", 0.0) / 3, machine.tensor_flop("float32"))
    if dtype == "float32":
        tensor = exact
    clocks = {
        "tensor cores": work.products / tensor + work.exact / exact,
        "exponentials": work.exps / machine["exp_per_clock"],
        "fp32 units": work.fma / machine["fma_per_clock"],
    }
    return {name: x / machine.sms / machine.hertz * 1e3 for name, x in clocks.items()}


def _floor(machine: Machine, task: Task) -> float:
    """Milliseconds of a program's steps, however little there is to compute."""
    return task.steps * (STEP_CLOCKS + LINK_CLOCKS * task.links) / machine.hertz * 1e3


def _waves(machine: Machine, task: Task) -> int:
    """How often the machine is filled."""
    return ceil(task.programs / (machine.sms * task.beside))


def _unevenness(machine: Machine, task: Task) -> float:
    """How much longer the busiest SM takes than the mean of all."""
    return ceil(task.programs / machine.sms) / (task.programs / machine.sms)


def fitting(machine: Machine, numbers: float, shared: float) -> int:
    """Programs that an SM has room for, each with so many numbers in registers and bytes of shared memory; at most 4.

    Registers hold as much again as what is summed: operands, addresses, what is on its way.
    """
    by_registers = machine["registers"] / (2 * numbers)
    by_shared = machine["shared_kib"] * 1024 / max(shared, 1)
    return min(4, int(by_registers), int(by_shared))


__all__ = [
    "ACCUMULATED",
    "LINK_CLOCKS",
    "MEMORY_SHARE",
    "PRODUCT_SHARE",
    "STEP_CLOCKS",
    "KernelTimes",
    "Task",
    "fitting",
    "run",
]
