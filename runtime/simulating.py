"""Simulations of an `Attention`: at one size, over many, and the length from which on a pattern is worth it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from attnc.compiler.lowering.lower import lower
from attnc.compiler.rewrite import walk
from attnc.compiler.simulation.candidates import Wish
from attnc.compiler.simulation.cpu import Cpu, simulate_cpu
from attnc.compiler.simulation.gpu import simulate_gpu
from attnc.compiler.simulation.machine import Machine, find_machine
from attnc.compiler.simulation.problem import problem_of
from attnc.compiler.simulation.simulation import PASSES, Baseline, Pass, Simulation
from attnc.runtime.call import Sizes, call_shape
from attnc.runtime.cpu import calibration
from attnc.runtime.errors import ArgumentError
from attnc.runtime.floors import Floor, find_floors
from attnc.runtime.plans import relations_of
from attnc.spec.errors import SpecError
from attnc.spec.program import BoundProgram

if TYPE_CHECKING:
    from attnc.compiler.planning.build_plan import Relations
    from attnc.compiler.planning.plan import Plan

SHORTEST = 64
"""Lengths from here on are asked whether a pattern is worth it."""

Device = Machine | Cpu


def find_device(name: str) -> Device:
    """A machine by its name or file; "cpu" is the one at hand. Raises MachineError, OSError."""
    if name.lower() == "cpu":
        rates = calibration.rates()
        title = f"this CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
        return Cpu(title, torch.get_num_threads(), rates, calibration.rates_file().exists())
    return find_machine(name)


def default_dtype(device: Device) -> torch.dtype:
    """What a call runs in where nothing else is said."""
    return torch.float32 if isinstance(device, Cpu) else torch.bfloat16


def simulated(
    name: str,
    params: Mapping[str, object],
    attends: Sequence[Relations],
    sizes: Sizes,
    device: Device,
    plan: Callable[[], Plan],
    stage: Pass,
    baseline: Baseline,
    wish: Wish,
) -> Simulation:
    """The ladder of a call of these relations; `plan` makes the plan of the CPU's executor.

    Raises MachineError, ArgumentError, EvaluationError.
    """
    if stage not in PASSES:
        raise ArgumentError(f"stage is {stage!r}: it must be {', '.join(map(repr, PASSES))}")
    if baseline not in ("full", "causal"):
        raise ArgumentError(f'baseline is {baseline!r}: it must be "full" or "causal"')
    if wish.order not in (None, "natural", "bricks", "residues"):
        raise ArgumentError(f'order is {wish.order!r}: it must be "natural", "bricks" or "residues"')
    problem = problem_of(attends, name, params, sizes.n_k)
    if baseline == "causal" and not problem.is_causal:
        raise ArgumentError(
            f'baseline="causal": `{name}` shows keys behind their queries, so that causal attention is no rival of it; '
            f'leave it at "full"'
        )
    if isinstance(device, Machine):
        return simulate_gpu(problem, device, stage, baseline, wish)
    if wish != Wish():
        raise ArgumentError("tile and order are chosen for GPUs; on the CPU the plan chooses them")
    nodes = max(sum(1 for _ in walk(relations.pattern.attend.visible)) for relations in attends)
    return simulate_cpu(problem, plan(), device, nodes, stage, baseline)


def floors(bound: BoundProgram, sizes: Sizes, inputs: Mapping[str, object]) -> tuple[Floor, ...]:
    """How sparse a pattern of one attention can become by its real parameters."""

    def count(of: BoundProgram) -> int:
        pattern = lower(of)
        relations = relations_of(pattern, call_shape(pattern, sizes, inputs))
        visible = problem_of([relations], of.program.name, {}, sizes.n_k).visible
        return sizes.batch * sizes.heads * sizes.n_q * sizes.n_k if visible is None else visible

    if len(bound.program.attends) > 1 or any(attend.visible for attend in bound.program.attends):
        return ()
    return find_floors(bound, sizes.batch * sizes.heads * sizes.n_q * sizes.n_k, count)


def break_even(at: Callable[[int], Simulation], longest: int) -> int | None:
    """The least length, to an eighth, from which on the prediction beats dense attention; None where it never does.

    Powers of two up to the first that is `longest` or more are tried, then what lies between the last that loses and
    the first that wins. Lengths that `require` refuses count as lost.
    """

    def wins(n: int) -> bool:
        try:
            return at(n).speedup > 1.0
        except SpecError:
            return False

    lengths = [SHORTEST << i for i in range(max((longest - 1).bit_length() - SHORTEST.bit_length() + 2, 1))]
    lost = 0
    found = None
    for n in reversed(lengths):
        if not wins(n):
            lost = n
            break
        found = n
    if found is None or not lost:
        return found
    step = max(lost // 8, 1)
    return next((n for n in range(lost + step, found, step) if wins(n)), found)
