"""Simulations of a pattern whose branches have states, beside branches with keys or alone: one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

from attnc.compiler.ir import Attend
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.simulation.gpu_choices import alike
from attnc.compiler.simulation.gpu_ladder import simulate_gpu
from attnc.compiler.simulation.machine import Machine
from attnc.compiler.simulation.recurrent.recurrence_call import own_sizes
from attnc.compiler.simulation.recurrent.recurrence_simulation import RUNGS, RecurrenceSimulation
from attnc.compiler.simulation.simulated_call import problem_of
from attnc.compiler.simulation.simulation import Baseline, Pass, Rung, RungName, SimulatedSchedule, Simulation, Traffic
from attnc.runtime.call_shapes import TensorSizes
from attnc.runtime.recurrent.derived_recurrence import DerivedRecurrence
from attnc.runtime.simulating import baseline_of
from attnc.runtime.simulating_recurrences import simulated_recurrence
from attnc.spec.program import Value

WITH_STATES: tuple[RungName, ...] = ("element", "tile", "balanced", "attended", "predicted")
"""All attentions, up to their time; then with the states."""


def simulated_states(
    name: str,
    params: Mapping[str, Value],
    attends: Sequence[tuple[Attend, Relations]],
    stateful: Sequence[DerivedRecurrence],
    sizes: TensorSizes,
    machine: Machine,
    stage: Pass,
    baseline: Baseline | None,
    inputs: Mapping[str, object],
) -> Simulation:
    """The ladder of such a pattern; `stateful` is one branch at least.

    Of branches with a state alone it is a `RecurrenceSimulation` of all their passes. What joins the branches is not
    counted, and a note says so. Raises MachineError, ArgumentError, EvaluationError.
    """
    states = [simulated_recurrence(one, params, sizes, machine, stage, _own(one, inputs)) for one in stateful]
    if not attends:
        return _joined(name, states)
    problem = problem_of([own for _, own in attends], name, params, sizes.n_k)
    baseline = baseline_of(problem, baseline)
    apart = [
        simulate_gpu(problem_of([own], node.name, params, sizes.n_k), machine, stage, baseline) for node, own in attends
    ]
    first = apart[0]
    recurred = sum(one.predicted_ms for one in states)
    attended = [sum(_ms(one, rung) for one in apart) for rung in ("element", "tile", "balanced", "predicted")]
    predicted = attended[-1] + recurred
    share = f"the states of {_counted(len(states))} {recurred / predicted:.0%} of the time"
    lost = [*(rung.lost_to for rung in first.rungs), share]
    counts = [one.visible for one in apart]
    return replace(
        first,
        pattern=name,
        params=problem.params,
        causal=problem.is_causal,
        visible=None if None in counts else sum(count for count in counts if count is not None),
        choices=tuple(alike([*(choice for one in apart for choice in one.choices), *_plans(states)])),
        others=(),
        rungs=_ladder(WITH_STATES, [*attended, predicted], first.ideal_ms, lost),
        predicted_ms=predicted,
        flop=sum(one.flop for one in (*apart, *states)),
        traffic=_traffic([*apart, *states]),
        notes=_notes([*apart, *states]),
        estimated=any(one.estimated for one in apart),
    )


def _plans(states: Sequence[RecurrenceSimulation]) -> list[SimulatedSchedule]:
    """How branches with a state run, which is no matter of tiles."""
    return [replace(choice, q_tile=0, k_tile=0) for one in states for choice in one.choices]


def _own(recurrent: DerivedRecurrence, inputs: Mapping[str, object]) -> dict[str, object]:
    """The inputs and sizes that a branch has."""
    known = {tensor.name for tensor in recurrent.pattern.tensors} | own_sizes(recurrent.recur)
    return {name: x for name, x in inputs.items() if name in known}


def _joined(name: str, states: Sequence[RecurrenceSimulation]) -> RecurrenceSimulation:
    """One after another."""
    first = states[0]
    times = tuple(map(sum, zip(*(one.times for one in states), strict=True)))
    return replace(
        first,
        pattern=name,
        choices=tuple(alike(choice for one in states for choice in one.choices)),
        others=(),
        rungs=_ladder(RUNGS, times, first.ideal_ms, [rung.lost_to for rung in first.rungs]),
        predicted_ms=times[-1],
        flop=sum(one.flop for one in states),
        traffic=_traffic(states),
        notes=_notes(states),
        passes=tuple(found for one in states for found in one.passes),
        times=times,
        loop_ms=sum(one.loop_ms for one in states),
        state_bytes=sum(one.state_bytes for one in states),
    )


def _ladder(names: Sequence[RungName], times: Sequence[float], ideal: float, lost: Sequence[str]) -> tuple[Rung, ...]:
    """Speedups by the times of rungs, none above the one before."""
    rungs, least = [], inf
    for name, time, why in zip(names, times, lost, strict=True):
        least = min(least, ideal / time if time else inf)
        rungs.append(Rung(name, least, why))
    return tuple(rungs)


def _ms(one: Simulation, rung: RungName) -> float:
    return one.ideal_ms / one.rung(rung).speedup


def _traffic(simulations: Sequence[Simulation]) -> Traffic:
    """Inputs of branches count for each, results too."""
    least, moved = (sum(getattr(one.traffic, name) for one in simulations) for name in ("least", "moved"))
    return Traffic(least, moved, max(one.traffic.held for one in simulations))


def _notes(simulations: Sequence[Simulation]) -> tuple[str, ...]:
    found = dict.fromkeys(note for one in simulations for note in one.notes)
    return (*found, "what joins the branches is not counted")


def _counted(branches: int) -> str:
    return "a branch" if branches == 1 else f"{branches} branches"


__all__ = ["simulated_states"]
