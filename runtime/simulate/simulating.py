"""Simulations of an `Attention`: at one size, over many, and the length from which a pattern beats dense attention.

Density floors: how sparse a pattern gets as a real parameter vanishes, and the pairs that stay visible.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING, Any, cast

from attnc.compiler.growth.growth import Growth, find_growth, fit_growth
from attnc.compiler.ir import Const, Index, Pattern
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.lowering.lower import lower
from attnc.compiler.lowering.specialise import alone
from attnc.compiler.simulation.candidates import ScheduleRequest
from attnc.compiler.simulation.cpu_ladder import CpuMachine, simulate_cpu
from attnc.compiler.simulation.gpu_ladder import simulate_gpu
from attnc.compiler.simulation.machine import Machine, find_machine
from attnc.compiler.simulation.recurrent.recurrence_simulation import RecurrenceSimulation
from attnc.compiler.simulation.simulated_call import SimulatedCall, problem_of
from attnc.compiler.simulation.simulation import PASSES, Baseline, Pass, Simulation
from attnc.runtime.call.call_errors import ArgumentError, needing_torch
from attnc.runtime.call.call_shapes import TensorSizes, shape_of_call
from attnc.runtime.planning.call_relations import relations_of
from attnc.spec.checks.measure import children
from attnc.spec.errors import SpecError
from attnc.spec.meaning.bind import bind
from attnc.spec.program import BoundProgram, DefinitionUse, Expr, Operation, ParameterRead, Value
from attnc.spec.source import SourceFile, Span

if TYPE_CHECKING:
    from attnc.compiler.planning.build_plan import Relations
    from attnc.compiler.planning.cpu_plan import Plan

SHORTEST = 64
"""The shortest length at which `break_even` compares a pattern with dense attention."""

Device = Machine | CpuMachine


def find_device(name: str) -> Device:
    """Return a machine by its name or file; "cpu" is this machine. Raises MachineError, OSError, TorchMissingError."""
    if name.lower() == "cpu":
        with needing_torch("a simulation on this CPU, whose rates are those of torch's kernels,"):
            import torch  # may be missing

            from attnc.runtime.planning import stored_rates  # only for simulations
        rates = stored_rates.rates()
        title = f"this CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
        return CpuMachine(title, torch.get_num_threads(), rates, stored_rates.measured() is not None)
    return find_machine(name)


def default_dtype(device: Device) -> str:
    """Return the name of the default dtype of a call on a device."""
    return "float32" if isinstance(device, CpuMachine) else "bfloat16"


@dataclass(frozen=True)
class RequestedSimulation:
    """A call to simulate; `plan` makes the CPU executor's plan. `schedule`: the requested tile and order."""

    pattern: Pattern
    params: Mapping[str, Value]
    sizes: TensorSizes
    inputs: Mapping[str, object]
    device: Device
    stage: Pass
    baseline: Baseline | None
    schedule: ScheduleRequest
    plan: Callable[[], Plan]

    def check_stage(self) -> None:
        """Raise ArgumentError for an invalid stage."""
        if self.stage not in PASSES:
            raise ArgumentError(f"stage is {self.stage!r}: it must be {', '.join(map(repr, PASSES))}")

    def check(self, fixed: str = "") -> None:
        """Raise ArgumentError for an invalid stage, baseline, tile or order.

        `fixed`: why neither a tile nor an order can be requested; empty where they can.
        """
        self.check_stage()
        if self.baseline not in (None, "full", "causal"):
            raise ArgumentError(f'baseline is {self.baseline!r}: it must be "full", "causal" or None')
        order, requested = self.schedule.order, self.schedule != ScheduleRequest()
        if order not in (None, "natural", "bricks", "residues"):
            raise ArgumentError(f'order is {order!r}: it must be "natural", "bricks" or "residues"')
        if requested and isinstance(self.device, CpuMachine):
            raise ArgumentError("tile and order are options for GPUs; on the CPU the plan chooses them")
        if requested and fixed:
            raise ArgumentError(f"tile and order apply to pairs; {fixed}")

    def problem(self, attends: Sequence[Relations], name: str | None = None) -> SimulatedCall:
        """Return the simulated call of relations; `name`: of the branch, None for the whole pattern."""
        return problem_of(attends, name or self.pattern.name, self.params, self.sizes.n_k)


def simulated(request: RequestedSimulation, attends: Sequence[Relations]) -> Simulation:
    """Simulate a call of these relations. Raises MachineError, ArgumentError, EvaluationError."""
    request.check()
    problem, device = request.problem(attends), request.device
    baseline = baseline_of(problem, request.baseline)
    if isinstance(device, Machine):
        return simulate_gpu(problem, device, request.stage, baseline, request.schedule)
    nodes = max(sum(1 for _ in walk(relations.pattern.attend.visible)) for relations in attends)
    return simulate_cpu(problem, request.plan(), device, nodes, request.stage, baseline)


def baseline_of(problem: SimulatedCall, baseline: Baseline | None) -> Baseline:
    """Return the dense rival: the requested one, or causal attention if it covers the pattern's pairs, else full.

    Raises ArgumentError where causal attention is requested and shows fewer pairs than the pattern.
    """
    if baseline is None:
        return "causal" if problem.is_causal else "full"
    if baseline == "causal" and not problem.is_causal:
        raise ArgumentError(
            f'baseline="causal": `{problem.pattern}` shows keys behind their queries, so causal attention is not a '
            f'valid baseline; use "full"'
        )
    return baseline


def growth(bound: BoundProgram, pattern: Pattern, heads: int | None) -> Growth:
    """Return the growth law of a pattern; for a grid of tokens, fitted over its first axis, if that is a parameter."""
    segments = bound.program.segments
    extent = segments[0].axes[0].extent if len(segments) == 1 else None
    several = len(pattern.nodes) > 1 or pattern.nodes[0].keys is not None
    if not isinstance(extent, ParameterRead) or several or pattern.selections:
        return find_growth(pattern, heads=heads)
    name, default_extent = extent.name, bound.values[extent.name]
    assert isinstance(default_extent, int)

    def grown(extent: int) -> tuple[Index, int]:
        larger = lower(bind(bound.program, {**bound.values, name: extent}))
        tokens = prod(axis.value for _, axis in larger.segments[0].axes if isinstance(axis, Const))
        return alone(larger.attend.visible, tokens, 0, heads or 1), tokens

    return fit_growth(grown, [default_extent * factor for factor in (1, 2, 3, 4, 6, 8)])


def floors(bound: BoundProgram, sizes: TensorSizes, inputs: Mapping[str, object]) -> tuple[Floor, ...]:
    """Return how sparse a pattern of one attention can become by its real parameters."""

    def count(program: BoundProgram) -> int:
        pattern = lower(program)
        relations = relations_of(pattern, shape_of_call(pattern, sizes, inputs))
        visible = problem_of([relations], program.program.name, {}, sizes.n_k).visible
        return sizes.batch * sizes.heads * sizes.n_q * sizes.n_k if visible is None else visible

    if len(bound.program.attends) > 1 or any(attend.visible for attend in bound.program.attends):
        return ()
    return find_floors(bound, sizes.batch * sizes.heads * sizes.n_q * sizes.n_k, count)


def differs(simulation: Simulation) -> bool:
    """Check that the pattern shows fewer pairs than its dense rival; a recurrence without pairs always differs."""
    return isinstance(simulation, RecurrenceSimulation) or simulation.rungs[0].speedup > 1.0


def break_even(at: Callable[[int], Simulation], longest: int) -> int | None:
    """Return the least length, to an eighth, at which the prediction beats dense attention, as it does at twice that.

    None where no length up to `longest` does. Powers of two are tried, then lengths between the last that loses and the
    first that wins. A length that `require` refuses, or at which the pattern shows the same pairs as its rival, counts
    as lost.
    """
    results: dict[int, bool] = {}

    def wins(n: int) -> bool:
        if n not in results:
            try:
                simulation = at(n)
                results[n] = simulation.speedup > 1.0 and differs(simulation)
            except SpecError:
                results[n] = False
        return results[n]

    n = SHORTEST
    while not (wins(n) and wins(2 * n)):
        if n >= longest:
            return None
        n *= 2
    step = max(n // 16, 1)
    return n if n == SHORTEST else next(m for m in range(n // 2 + step, n + 1, step) if wins(m))


# --- density floors --------------------------------------------------------------------------------------------------


Count = Callable[[BoundProgram], int]
"""A function that returns the number of visible pairs of a call."""

SMALLEST = Fraction(1, 10**6)
"""Factor applied to a parameter that must not be 0."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The density floor of one parameter: at `least`, `visible` of `pairs` pairs stay visible.

    `causes`: each alternative of the relation, with the pairs visible by it alone.
    """

    parameter: str
    least: Fraction
    visible: int
    pairs: int
    causes: tuple[tuple[str, int], ...]

    @property
    def density(self) -> float:
        """The fraction of pairs that is visible."""
        return self.visible / max(self.pairs, 1)

    def __str__(self) -> str:
        parts = [f"`{text}` alone {count / max(self.pairs, 1):.2%}" for text, count in self.causes if count]
        why = f": {', '.join(parts)}" if len(parts) > 1 else ""
        small = f"with {self.parameter} = {self.least}" if not self.least else f"however small `{self.parameter}` is"
        return f"the density does not fall below {self.density:.2%}, {small}{why}"


def find_floors(bound: BoundProgram, pairs: int, count: Count) -> tuple[Floor, ...]:
    """Return the floors of a pattern, one for each real parameter that its relation reads.

    `count` is called a few times per parameter. Raises the errors of `count`.
    """
    floors = []
    for parameter in bound.program.parameters:
        value = bound.values[parameter.name]
        if parameter.type.kind != "real" or parameter.type.dims or not isinstance(value, Fraction | int) or not value:
            continue
        smallest = _least(bound, parameter.name, Fraction(value))
        if smallest is None or not _reads(bound, parameter.name):
            continue
        at, least = smallest
        visible = count(least)
        causes = tuple((text, count(part)) for text, part in _alternatives(least))
        floors.append(Floor(parameter.name, at, visible, pairs, causes))
    return tuple(floors)


def _least(bound: BoundProgram, name: str, value: Fraction) -> tuple[Fraction, BoundProgram] | None:
    """Return the parameter at 0, or close to 0 where `require` refuses 0, and the pattern with it."""
    for least in (Fraction(0), value * SMALLEST):
        try:
            return least, bind(bound.program, {**bound.values, name: least})
        except SpecError:
            continue
    return None


def _reads(bound: BoundProgram, name: str) -> bool:
    """Check whether the relation reads a parameter."""
    stack, seen = list(bound.program.visible), set()
    while stack:
        expr = stack.pop()
        if isinstance(expr, ParameterRead) and expr.name == name:
            return True
        if id(expr) not in seen:
            seen.add(id(expr))
            stack.extend(children(expr))
            if isinstance(expr, DefinitionUse):
                stack.append(expr.definition.body)
    return False


def _alternatives(bound: BoundProgram) -> list[tuple[str, BoundProgram]]:
    """Return the pattern with one alternative of its relation at a time, each with its text."""
    program = bound.program
    if len(program.visible) != 1:
        return []
    (whole,) = program.visible
    alternatives = []
    for span, part in _split(whole):
        round_ = program.round
        if round_ is not None:
            round_ = replace(round_, keep=_replaced(round_.keep, whole, part, {}))
        reduced = replace(program, visible=(part,), round=round_)
        alternatives.append((_text(bound, span), BoundProgram(reduced, bound.values)))
    return alternatives


def _replaced(node: Any, old: Expr, new: Expr, memo: dict[int, Any]) -> Any:
    """Return a part of a program with one expression replaced everywhere; unchanged parts keep their identity."""
    if node is old:
        return new
    if isinstance(node, tuple):
        parts = tuple(_replaced(part, old, new, memo) for part in node)
        return node if all(a is b for a, b in zip(parts, node, strict=True)) else parts
    if not is_dataclass(node) or isinstance(node, SourceFile | Span):
        return node
    if id(node) not in memo:
        values = {f.name: getattr(node, f.name) for f in fields(node)}
        changed = {name: _replaced(value, old, new, memo) for name, value in values.items()}
        same = all(changed[name] is values[name] for name in values)
        memo[id(node)] = node if same else cast("Any", type(node))(**changed)
    return memo[id(node)]


def _split(expr: Expr) -> list[tuple[Span, Expr]]:
    """Return the operands of `a or b`, also of `let x = a or b` within an `and`, each with the span of its own text."""
    if isinstance(expr, DefinitionUse) and not expr.arguments:
        inner = _split(expr.definition.body)
        return inner if len(inner) > 1 else [(expr.span, expr)]
    if not isinstance(expr, Operation):
        return [(expr.span, expr)]
    if expr.op == "or":
        return [part for operand in expr.operands for part in _split(operand)]
    if expr.op == "and":
        for i, operand in enumerate(expr.operands):
            parts = _split(operand)
            if len(parts) > 1:
                before, after = expr.operands[:i], expr.operands[i + 1 :]
                return [(span, replace(expr, operands=(*before, part, *after))) for span, part in parts]
    return [(expr.span, expr)]


def _text(bound: BoundProgram, span: Span) -> str:
    return " ".join(bound.program.source.text[span.start : span.end].split())
