"""What there is to decide in a call, and the first few options of each, as the cost model ranks them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch

from attnc.compiler.analysis.live_tiles import TooManyTilesError
from attnc.compiler.kernels.attention_kernels import HeadShape
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.planning.build_plan import Relations, build_plan
from attnc.compiler.planning.cpu_plan import Plan
from attnc.compiler.planning.recipes import Recipe, recipes
from attnc.compiler.planning.runs import TooManyClassesError
from attnc.compiler.planning.schedule import CoverChoice, choose
from attnc.compiler.planning.schedule import CoverProblem as Covering
from attnc.compiler.rewrite import walk
from attnc.compiler.simulation.candidates import ScheduleCandidates, ScheduleRequest
from attnc.compiler.simulation.cpu_ladder import CpuMachine, simulate_cpu
from attnc.compiler.simulation.gpu_clocks import Kernel, TileShape
from attnc.compiler.simulation.machine import Machine, MachineError
from attnc.compiler.simulation.simulated_call import SimulatedCall, problem_of
from attnc.compiler.simulation.simulation import Pass
from attnc.runtime.gpu.device_targets import target_of
from attnc.runtime.plans import Planner, by_option, relations_of
from attnc.runtime.simulating import find_device
from attnc.runtime.tensor_checks import call_shape
from attnc.runtime.tuning.records import MODEL
from attnc.runtime.tuning.tile_candidates import STAGES, allowed_shapes, knob_of, machine_of
from attnc.runtime.tuning.tune_request import TuneRequest

FIRST = 5
"""Options of a knob that are measured, the model's choice among them."""


HOPELESS = 4.0
"""What is predicted to take so many times the model's choice is not measured."""


@dataclass(frozen=True)
class Knob:
    """One thing to decide. `options`: what is tried for it, the model's choice first, with the milliseconds that are
    predicted; None where nothing is.
    """

    name: str
    options: Mapping[str, float | None]


def knobs_of(planners: Sequence[Planner], asked: TuneRequest, until: float) -> list[Knob]:
    """The knobs of a call of these attentions, found until a moment of `time.perf_counter`; none where there is nothing
    to choose.
    """
    found: list[Knob] = []
    for planner in planners:
        found += _of_kernels(planner, asked) if asked.by_kernels else [_of_pieces(planner, asked, until)]
    return [knob for knob in found if len(knob.options) > 1]


# --- pieces of the cpu executor --------------------------------------------------------------------------------------


def _of_pieces(planner: Planner, asked: TuneRequest, until: float) -> Knob:
    """The covers of the relations of an attention: a recipe, for each of them that has such a cover."""
    relations = relations_of(planner.pattern, call_shape(planner.pattern, asked.sizes, asked.inputs))
    seen: list[Covering] = []

    def first(problem: Covering) -> CoverChoice:
        seen.append(problem)
        return choose(problem)

    own = build_plan(relations, first)
    predict = _Prediction(relations, asked)
    plans = {MODEL: own}
    for recipe in _ranked(seen, until):
        if len(plans) > 2 * FIRST or time.perf_counter() >= until:
            break
        plan = build_plan(relations, by_option(str(recipe)))
        if not any(_alike(plan, other) for other in plans.values()):
            plans[str(recipe)] = plan
    times = {name: predict.ms(plan) for name, plan in plans.items()}
    worth = [name for name in plans if name != MODEL and times[name] <= HOPELESS * times[MODEL]]
    others = sorted(worth, key=lambda name: times[name])
    return Knob(planner.knob, {name: times[name] for name in [MODEL, *others[: FIRST - 1]]})


def _ranked(problems: list[Covering], until: float) -> list[Recipe]:
    """The recipes of several relations, by what they cost together; of a relation without such a cover: the model's."""
    costs: list[dict[Recipe, float]] = []
    for problem in problems:
        own = {}
        for recipe, choice in recipes(problem):
            own[recipe] = choice.cost
            if time.perf_counter() >= until:
                break
        costs.append(own)
    least = [min(own.values()) for own in costs]
    known = dict.fromkeys(recipe for own in costs for recipe in own)
    return sorted(known, key=lambda recipe: sum(own.get(recipe, low) for own, low in zip(costs, least, strict=True)))


def _alike(a: Plan, b: Plan) -> bool:
    """Whether two plans are the same calls."""
    return a.groups == b.groups and [m.shape for m in a.masks] == [m.shape for m in b.masks]


class _Prediction:
    """What the simulator says of plans of one call."""

    def __init__(self, relations: Relations, asked: TuneRequest) -> None:
        cpu = find_device("cpu")
        assert isinstance(cpu, CpuMachine)
        self._cpu = cpu
        self._asked = asked
        self._problem: SimulatedCall = problem_of([relations], relations.pattern.name, {}, asked.sizes.n_k)
        self._nodes = sum(1 for _ in walk(relations.pattern.attend.visible))

    def ms(self, plan: Plan) -> float:
        """Milliseconds of what is measured."""
        passes: tuple[Pass, ...] = ("forward", "backward") if self._asked.stage == "training" else ("forward",)
        return sum(simulate_cpu(self._problem, plan, self._cpu, self._nodes, own).predicted_ms for own in passes)


# --- tiles of kernels ------------------------------------------------------------------------------------------------


def _of_kernels(planner: Planner, asked: TuneRequest) -> Iterator[Knob]:
    """The tiles of each kernel of an attention; of the backward only where that is measured."""
    sizes, target = asked.sizes, target_of(asked.device)
    tf32 = sizes.dtype == "float32" and torch.backends.cuda.matmul.allow_tf32
    heads = HeadShape(sizes.dk, sizes.dv, sizes.dtype, tf32, None, sizes.heads != sizes.kv_heads)
    try:
        kernels = planner.gpu.kernels_of(heads, target, sizes, asked.inputs)
    except NotInKernelsError:
        return
    relations = relations_of(planner.pattern, call_shape(planner.pattern, sizes, asked.inputs))
    own = {"forward": kernels.forward.tiles, "dq": kernels.dq.tiles, "dkdv": kernels.dkdv.tiles}
    stages = STAGES if asked.stage == "training" else STAGES[:1]
    machine = machine_of(target, asked.device)
    times = {stage: {} if machine is None else _predicted(relations, machine, stage, own[stage]) for stage in stages}
    known = {stage: times[stage].get(str(own[stage])) for stage in stages}
    for stage in stages:
        besides = [ms for other, ms in known.items() if other != stage]
        whole = None if None in besides else sum(ms for ms in besides if ms is not None)
        others = {name: times[stage].get(name) for name in allowed_shapes(target, stage, heads)}
        others.pop(str(own[stage]), None)
        ranked = sorted(others.items(), key=lambda one: inf if one[1] is None else one[1])
        told = {MODEL: known[stage], **dict(ranked[: FIRST - 1])}
        in_all = {name: None if ms is None or whole is None else ms + whole for name, ms in told.items()}
        yield Knob(knob_of(planner.knob, stage), in_all)


def _predicted(relations: Relations, machine: Machine, stage: Kernel, own: TileShape) -> dict[str, float]:
    """Milliseconds of a kernel by its tiles, as far as the simulator knows; its own are taken with any warps."""
    problem = problem_of([relations], relations.pattern.name, {}, relations.shape.n_k)
    found: dict[str, float] = {}
    for wish in (ScheduleRequest(), ScheduleRequest((own.q_tile, own.k_tile))):
        try:
            runs = ScheduleCandidates(problem, machine, wish).ranked(stage, "full")
        except (MachineError, TooManyTilesError, TooManyClassesError, KeyError):
            continue
        for run in runs:
            if run.parts == 1:
                found.setdefault(str(own if wish.tile else run.model.shape), run.ms)
    return found
