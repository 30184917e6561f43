"""Simulations of patterns whose branches have states, with or without attention branches: one after another."""

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
from attnc.runtime.call.call_shapes import TensorSizes
from attnc.runtime.executors.recurrent.derived_recurrence import DerivedRecurrence
from attnc.runtime.simulate.simulating import baseline_of
from attnc.runtime.simulate.simulating_recurrences import simulated_recurrence
from attnc.spec.program import Value

WITH_STATES: tuple[RungName, ...] = ("element", "tile", "balanced", "attended", "predicted")
"""The rungs of all attentions up to their time, then the prediction with the states."""


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
    """Simulate a pattern with states; `stateful` holds at least one branch.

    The result is a `RecurrenceSimulation` of all passes where every branch has a state. The combination of branches is
    not counted, and a note says so. Raises MachineError, ArgumentError, EvaluationError.
    """
    states = [
        simulated_recurrence(simulation, params, sizes, machine, stage, _branch_inputs(simulation, inputs))
        for simulation in stateful
    ]
    if not attends:
        return _joined(name, states)
    problem = problem_of([relations for _, relations in attends], name, params, sizes.n_k)
    baseline = baseline_of(problem, baseline)
    separate = [
        simulate_gpu(problem_of([relations], node.name, params, sizes.n_k), machine, stage, baseline)
        for node, relations in attends
    ]
    first = separate[0]
    recurred = sum(simulation.predicted_ms for simulation in states)
    attended = [
        sum(_ms(simulation, rung) for simulation in separate) for rung in ("element", "tile", "balanced", "predicted")
    ]
    predicted = attended[-1] + recurred
    states_share = f"the states of {_counted(len(states))} {recurred / predicted:.0%} of the time"
    lost = [*(rung.lost_to for rung in first.rungs), states_share]
    counts = [simulation.visible for simulation in separate]
    return replace(
        first,
        pattern=name,
        params=problem.params,
        causal=problem.is_causal,
        visible=None if None in counts else sum(count for count in counts if count is not None),
        choices=tuple(alike([*(choice for simulation in separate for choice in simulation.choices), *_plans(states)])),
        others=(),
        rungs=_ladder(WITH_STATES, [*attended, predicted], first.ideal_ms, lost),
        predicted_ms=predicted,
        flop=sum(simulation.flop for simulation in (*separate, *states)),
        traffic=_traffic([*separate, *states]),
        notes=_notes([*separate, *states]),
        estimated=any(simulation.estimated for simulation in separate),
    )


def _plans(states: Sequence[RecurrenceSimulation]) -> list[SimulatedSchedule]:
    """Return the schedules of branches with a state, without tile sizes."""
    return [replace(choice, q_tile=0, k_tile=0) for simulation in states for choice in simulation.choices]


def _branch_inputs(recurrent: DerivedRecurrence, inputs: Mapping[str, object]) -> dict[str, object]:
    """Return the inputs and sizes that a branch has."""
    names = {tensor.name for tensor in recurrent.pattern.tensors} | own_sizes(recurrent.recur)
    return {name: x for name, x in inputs.items() if name in names}


def _joined(name: str, states: Sequence[RecurrenceSimulation]) -> RecurrenceSimulation:
    """Return the simulation of several recurrences that run one after another."""
    first = states[0]
    times = tuple(map(sum, zip(*(state.times for state in states), strict=True)))
    return replace(
        first,
        pattern=name,
        choices=tuple(alike(choice for state in states for choice in state.choices)),
        others=(),
        rungs=_ladder(RUNGS, times, first.ideal_ms, [rung.lost_to for rung in first.rungs]),
        predicted_ms=times[-1],
        flop=sum(state.flop for state in states),
        traffic=_traffic(states),
        notes=_notes(states),
        passes=tuple(pass_ for state in states for pass_ in state.passes),
        times=times,
        loop_ms=sum(state.loop_ms for state in states),
        state_bytes=sum(state.state_bytes for state in states),
    )


def _ladder(names: Sequence[RungName], times: Sequence[float], ideal: float, lost: Sequence[str]) -> tuple[Rung, ...]:
    """Return rungs with their speedups from times, none above the rung before."""
    rungs, least = [], inf
    for name, time, why in zip(names, times, lost, strict=True):
        least = min(least, ideal / time if time else inf)
        rungs.append(Rung(name, least, why))
    return tuple(rungs)


def _ms(simulation: Simulation, rung: RungName) -> float:
    return simulation.ideal_ms / simulation.rung(rung).speedup


def _traffic(simulations: Sequence[Simulation]) -> Traffic:
    """Return the total traffic; inputs and results count for each branch."""
    least, moved = (sum(getattr(simulation.traffic, name) for simulation in simulations) for name in ("least", "moved"))
    return Traffic(least, moved, max(simulation.traffic.held for simulation in simulations))


def _notes(simulations: Sequence[Simulation]) -> tuple[str, ...]:
    notes = dict.fromkeys(note for simulation in simulations for note in simulation.notes)
    return (*notes, "the combination of branches is not counted")


def _counted(branches: int) -> str:
    return "a branch" if branches == 1 else f"{branches} branches"


__all__ = ["simulated_states"]
