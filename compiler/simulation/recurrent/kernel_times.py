"""The predicted times of the kernels of a pass on a GPU, from their bytes, work and programs.

No kernel of attnc has been timed. The first four constants were fitted so that the predictions for the plan of
flash-linear-attention come near its published times (`benchmarks/recurrences.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from attnc.compiler.simulation.machine import Machine
from attnc.compiler.simulation.recurrent.chunk_work import Amount
from attnc.compiler.simulation.recurrent.recurrence_simulation import PassKernel
from attnc.compiler.simulation.traffic import memory_ms

PRODUCT_SHARE = 0.45
"""The share of dense attention's rate that kernels reach on chunks, whose small products wait for each other."""

MEMORY_SHARE = 0.7
"""The share of the rate of long copies that chunk kernels reach."""

STEP_CLOCKS = 800.0
"""Clocks of a step of a walk over chunks besides its products: late loads, barriers, stores."""

LINK_CLOCKS = 700.0
"""Clocks of a product that waits for another: draining, rounding, and a round trip through shared memory."""

ACCUMULATED = 16384
"""Maximum number of accumulators of a program: a quarter of the registers of an SM; operands take another quarter."""


WIDTH = 128
"""The head dimension whose `kernel_share` is used for all kernels."""


@dataclass(frozen=True, slots=True)
class Task:
    """The work of a kernel over all programs.

    `moved`: bytes. `steps`: steps that each program takes one after another. `links`: products of a step that wait for
    each other. `beside`: programs that fit on an SM at once.
    """

    name: str
    moved: int
    work: Amount
    programs: int
    steps: int = 1
    links: int = 0
    beside: int = 2

    def kernel(self, memory: float, full: float, chain: float, ms: float, limit: str) -> PassKernel:
        """Return the kernel with its milliseconds: of its bytes, with busy units, with steps in a chain, predicted."""
        flop = self.work.flop
        return PassKernel(self.name, self.programs, self.steps, self.moved, flop, memory, full, chain, ms, limit)


def run(machine: Machine, dtype: str, task: Task) -> PassKernel:
    """Return the times of a kernel."""
    memory = memory_ms(machine, task.moved)
    units = _units(machine, dtype, task.work)
    products, other_units = units["tensor cores"], max(x for name, x in units.items() if name != "tensor cores")
    full = max(memory, products, other_units)
    unevenness = _unevenness(machine, task)
    chain_ms = _waves(machine, task) * (_floor(machine, task) + (products + other_units) * machine.sms / task.programs)
    chain = max(full, chain_ms, max(products, other_units) * unevenness)
    start = machine["launch_us"] / 1e3 + machine["prologue_clocks"] / machine.hertz * 1e3
    share = PRODUCT_SHARE * machine.kernel_share(WIDTH)
    computed = (products + other_units) * unevenness / share
    predicted = max(chain, computed, memory / MEMORY_SHARE) + start
    times = {"memory": memory / MEMORY_SHARE, "steps one after another": chain_ms}
    busiest = max(units, key=lambda name: units[name])
    times[busiest] = computed
    return task.kernel(memory, full, chain, predicted, max(times, key=lambda name: times[name]))


def _units(machine: Machine, dtype: str, work: Amount) -> dict[str, float]:
    """Return the milliseconds of each kind of unit over all SMs."""
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
    """Return the minimum milliseconds of a program's steps, however little they compute."""
    return task.steps * (STEP_CLOCKS + LINK_CLOCKS * task.links) / machine.hertz * 1e3


def _waves(machine: Machine, task: Task) -> int:
    """Return the number of waves of programs."""
    return ceil(task.programs / (machine.sms * task.beside))


def _unevenness(machine: Machine, task: Task) -> float:
    """Return the time of the busiest SM over the mean of all SMs."""
    return ceil(task.programs / machine.sms) / (task.programs / machine.sms)


def fitting(machine: Machine, numbers: float, shared: float) -> int:
    """Return the number of programs, at most 4, that fit on an SM with `numbers` accumulators and `shared` bytes each.

    Operands, addresses and loads in flight take as many registers again as the accumulators.
    """
    by_registers = machine["registers"] / (2 * numbers)
    by_shared = machine["shared_kib"] * 1024 / max(shared, 1)
    return min(4, int(by_registers), int(by_shared))
