"""Simulations of recurrences, from sizes alone, and of patterns whose branches have states, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

import numpy as np

from attnc.compiler.ir import Attend
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.simulation.cpu_ladder import CpuMachine
from attnc.compiler.simulation.gpu_choices import alike
from attnc.compiler.simulation.gpu_ladder import simulate_gpu
from attnc.compiler.simulation.machine import Machine, MachineError
from attnc.compiler.simulation.recurrent.recurrence_call import call_of, own_sizes, repeats
from attnc.compiler.simulation.recurrent.recurrence_cpu_ladder import simulate_recurrence_cpu
from attnc.compiler.simulation.recurrent.recurrence_gpu_ladder import simulate_recurrence_gpu
from attnc.compiler.simulation.recurrent.recurrence_simulation import RUNGS, RecurrenceSimulation
from attnc.compiler.simulation.simulation import Rung, RungName, Shape, SimulatedSchedule, Simulation, Traffic
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.call.call_shapes import TensorSizes, is_tensor
from attnc.runtime.executors.recurrent.derived_recurrence import DerivedRecurrence
from attnc.runtime.simulate.simulating import RequestedSimulation, baseline_of
from attnc.spec.suggest import did_you_mean

OWN_SIZE, OWN_REPEATS = 64, 2
"""Sizes of dimensions that neither q, k, v nor an input fixes: of a state, and of a repeated step."""

MOST_TOKENS = 16
"""Maximum number of tokens of a decoding call."""

WITH_STATES: tuple[RungName, ...] = ("element", "tile", "balanced", "attended", "predicted")
"""The rungs of all attentions up to their time, then the prediction with the states."""


def simulated_states(
    request: RequestedSimulation, attends: Sequence[tuple[Attend, Relations]], stateful: Sequence[DerivedRecurrence]
) -> Simulation:
    """Simulate a pattern with states on a GPU; `stateful` holds at least one branch.

    The result is a `RecurrenceSimulation` of all passes where every branch has a state. The combination of branches is
    not counted, and a note says so. Raises MachineError, ArgumentError, EvaluationError.
    """
    name, machine = request.pattern.name, request.device
    assert isinstance(machine, Machine)
    states = [simulated_recurrence(_of_branch(request, recurrent), recurrent) for recurrent in stateful]
    if not attends:
        return _joined(name, states)
    problem = request.problem([relations for _, relations in attends])
    baseline = baseline_of(problem, request.baseline)
    separate = [
        simulate_gpu(request.problem([relations], node.name), machine, request.stage, baseline)
        for node, relations in attends
    ]
    first = separate[0]
    recurred = sum(simulation.predicted_ms for simulation in states)
    attended = [
        sum(simulation.ideal_ms / simulation.rung(rung).speedup for simulation in separate)
        for rung in ("element", "tile", "balanced", "predicted")
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


def _of_branch(request: RequestedSimulation, recurrent: DerivedRecurrence) -> RequestedSimulation:
    """Return the request with only the inputs and sizes that a branch has."""
    names = {tensor.name for tensor in recurrent.pattern.tensors} | own_sizes(recurrent.recur)
    return replace(request, inputs={name: x for name, x in request.inputs.items() if name in names})


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


def _traffic(simulations: Sequence[Simulation]) -> Traffic:
    """Return the total traffic; inputs and results count for each branch."""
    least, moved = (sum(getattr(simulation.traffic, name) for simulation in simulations) for name in ("least", "moved"))
    return Traffic(least, moved, max(simulation.traffic.held for simulation in simulations))


def _notes(simulations: Sequence[Simulation]) -> tuple[str, ...]:
    notes = dict.fromkeys(note for simulation in simulations for note in simulation.notes)
    return (*notes, "the combination of branches is not counted")


def _counted(branches: int) -> str:
    return "a branch" if branches == 1 else f"{branches} branches"


# --- one recurrence -------------------------------------------------------------------------------------------------


def simulated_recurrence(request: RequestedSimulation, recurrent: DerivedRecurrence) -> RecurrenceSimulation:
    """Simulate a call of `n_q` tokens; decoding follows `n_k` tokens.

    The inputs show sizes, or are sizes themselves by name, `slots=64`; other sizes are assumed, with a note.

    Raises MachineError, ArgumentError.
    """
    request.check_stage()
    sizes, stage, name = request.sizes, request.stage, recurrent.recur.name
    if not sizes.n_q:
        raise ArgumentError(f"n_q is 0: `{name}` needs at least one token to be simulated")
    if stage != "decode" and sizes.n_q != sizes.n_k:
        raise ArgumentError(
            f"n_q is {sizes.n_q} and n_k {sizes.n_k}: a recurrence takes as many keys as queries; "
            f'stage="decode" has n_k tokens before'
        )
    if stage == "decode" and sizes.n_q > MOST_TOKENS:
        raise MachineError(f"decode takes 1 to {MOST_TOKENS} tokens, got {sizes.n_q}")
    named, notes = _named(recurrent, sizes, request.inputs)
    shape = Shape(sizes.batch, sizes.heads, sizes.kv_heads, sizes.n_q, sizes.n_k, sizes.dk, sizes.dv, sizes.dtype)
    call = call_of(recurrent.recur, recurrent.derived, recurrent.reason, request.params, shape, named, notes)
    if isinstance(request.device, CpuMachine):
        recur = recurrent.recur
        nodes = {node for root in (recur.read, *(step.value for step in recur.steps)) for node in root.below}
        return simulate_recurrence_cpu(call, request.device, len(nodes), stage)
    return simulate_recurrence_gpu(call, request.device, stage)


def _named(
    recurrent: DerivedRecurrence, sizes: TensorSizes, inputs: Mapping[str, object]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return every size by name, and notes on the assumed sizes."""
    size_names = own_sizes(recurrent.recur)
    named = {"heads": sizes.heads, "kv_heads": sizes.kv_heads, "dk": sizes.dk, "dv": sizes.dv}
    tensors = {tensor.name: tensor for tensor in recurrent.pattern.tensors}
    for name, value in inputs.items():
        if name in size_names:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} is {value!r}: a size must be an integer, at least 1")
            named[name] = value
        elif name in tensors and (is_tensor(value) or isinstance(value, np.ndarray)):
            named |= {str(d): n for d, n in zip(tensors[name].dims, value.shape, strict=False) if d in size_names}
        else:
            raise _unknown_input(recurrent, name, value, size_names)
    repeated = repeats(recurrent.recur)
    assumed = {name: OWN_REPEATS if name in repeated else OWN_SIZE for name in sorted(size_names - named.keys())}
    notes = tuple(f"{name} is assumed to be {value}: pass `{name}` to change it" for name, value in assumed.items())
    return {**named, **assumed}, notes


def _unknown_input(recurrent: DerivedRecurrence, name: str, value: object, size_names: frozenset[str]) -> ArgumentError:
    names = sorted({tensor.name for tensor in recurrent.pattern.tensors} | size_names)
    if name in names:
        return ArgumentError(f"{name} is {type(value).__name__}: it must be a torch tensor, or be left out")
    listed = f"it has {', '.join(names)}" if names else "it has none"
    return ArgumentError(
        f"`{recurrent.recur.name}` has no input and no size `{name}`: {did_you_mean(name, names, listed)}"
    )
