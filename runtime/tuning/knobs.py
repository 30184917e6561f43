"""The knobs of a call, and the first few options of each as the cost model ranks them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch

from attnc.compiler.analysis.live_tiles import TooManyTilesError
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.kernels.attention_kernels import HeadShape
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.kernel_source import TileShape
from attnc.compiler.planning.build_plan import Relations, build_plan
from attnc.compiler.planning.cpu_plan import Plan
from attnc.compiler.planning.recipes import Recipe, recipes
from attnc.compiler.planning.runs import TooManyClassesError
from attnc.compiler.planning.schedule import CoverChoice, choose
from attnc.compiler.planning.schedule import CoverProblem as Covering
from attnc.compiler.simulation.candidates import ScheduleCandidates, ScheduleRequest
from attnc.compiler.simulation.cpu_ladder import CpuMachine, simulate_cpu
from attnc.compiler.simulation.gpu_clocks import Kernel
from attnc.compiler.simulation.machine import Machine, MachineError
from attnc.compiler.simulation.simulated_call import problem_of
from attnc.compiler.simulation.simulation import Pass
from attnc.runtime.call.device_targets import target_of
from attnc.runtime.call.tensor_checks import call_shape
from attnc.runtime.choices.records import MODEL
from attnc.runtime.choices.tile_candidates import STAGES, allowed_shapes, knob_of, machine_of
from attnc.runtime.executors.cpu.cpu_plans import by_option
from attnc.runtime.executors.triton.planner import gpu_planner
from attnc.runtime.planning import stored_rates
from attnc.runtime.planning.plans import Planner, relations_of
from attnc.runtime.simulate.simulating import find_device
from attnc.runtime.tuning.tune_request import TuneRequest

FIRST = 5
"""Maximum number of options of a knob that are measured, including the model's choice."""


HOPELESS = 4.0
"""Options predicted to take this many times as long as the model's choice are not measured."""


@dataclass(frozen=True)
class Knob:
    """A decision of a call. `options`: the candidates, the model's choice first, with predicted ms or None."""

    name: str
    options: Mapping[str, float | None]


def knobs_of(planners: Sequence[Planner], request: TuneRequest, until: float) -> list[Knob]:
    """Return the knobs of a call of these attentions; empty where there is nothing to choose.

    `until`: the time of `time.perf_counter` at which the search for options ends.
    """
    knobs: list[Knob] = []
    for planner in planners:
        knobs += _kernel_knobs(planner, request) if request.by_kernels else [_piece_knob(planner, request, until)]
    return [knob for knob in knobs if len(knob.options) > 1]


# --- pieces of the cpu executor --------------------------------------------------------------------------------------


def _piece_knob(planner: Planner, request: TuneRequest, until: float) -> Knob:
    """Return the knob for the covers of an attention's relations: a recipe, for each relation with such a cover."""
    relations = relations_of(planner.pattern, call_shape(planner.pattern, request.sizes, request.inputs))
    coverings: list[Covering] = []

    def first(problem: Covering) -> CoverChoice:
        coverings.append(problem)
        return choose(problem)

    rates = stored_rates.rates()
    model_plan = build_plan(relations, first, rates)
    plans = {MODEL: model_plan}
    for recipe in _ranked(coverings, until):
        if len(plans) > 2 * FIRST or time.perf_counter() >= until:
            break
        plan = build_plan(relations, by_option(str(recipe)), rates)
        if not any(_are_equal(plan, other) for other in plans.values()):
            plans[str(recipe)] = plan
    times = dict(zip(plans, _predicted_ms(relations, request, plans.values()), strict=True))
    worth = [name for name in plans if name != MODEL and times[name] <= HOPELESS * times[MODEL]]
    others = sorted(worth, key=lambda name: times[name])
    return Knob(planner.knob, {name: times[name] for name in [MODEL, *others[: FIRST - 1]]})


def _ranked(problems: list[Covering], until: float) -> list[Recipe]:
    """Return recipes ranked by total cost over several relations; a relation without the cover costs the model's."""
    costs: list[dict[Recipe, float]] = []
    for problem in problems:
        recipe_costs = {}
        for recipe, choice in recipes(problem):
            recipe_costs[recipe] = choice.cost
            if time.perf_counter() >= until:
                break
        costs.append(recipe_costs)
    least = [min(recipe_costs.values()) for recipe_costs in costs]
    all_recipes = dict.fromkeys(recipe for recipe_costs in costs for recipe in recipe_costs)
    return sorted(
        all_recipes,
        key=lambda recipe: sum(recipe_costs.get(recipe, low) for recipe_costs, low in zip(costs, least, strict=True)),
    )


def _are_equal(a: Plan, b: Plan) -> bool:
    """Check whether two plans make the same calls."""
    return a.groups == b.groups and [m.shape for m in a.masks] == [m.shape for m in b.masks]


def _predicted_ms(relations: Relations, request: TuneRequest, plans: Iterable[Plan]) -> list[float]:
    """Return the predicted milliseconds of the measured passes, by plan."""
    cpu = find_device("cpu")
    assert isinstance(cpu, CpuMachine)
    problem = problem_of([relations], relations.pattern.name, {}, request.sizes.n_k)
    nodes = sum(1 for _ in walk(relations.pattern.attend.visible))
    passes: tuple[Pass, ...] = ("forward", "backward") if request.stage == "training" else ("forward",)
    return [sum(simulate_cpu(problem, plan, cpu, nodes, pass_).predicted_ms for pass_ in passes) for plan in plans]


# --- tiles of kernels ------------------------------------------------------------------------------------------------


def _kernel_knobs(planner: Planner, request: TuneRequest) -> Iterator[Knob]:
    """Yield the knobs for the tiles of each kernel of an attention; of backward kernels only where measured."""
    sizes, target = request.sizes, target_of(request.device)
    tf32 = sizes.dtype == "float32" and torch.backends.cuda.matmul.allow_tf32
    heads = HeadShape(sizes.dk, sizes.dv, sizes.dtype, tf32, None, sizes.heads != sizes.kv_heads)
    try:
        kernels = gpu_planner(planner).kernels_of(heads, target, sizes, request.inputs)
    except NotInKernelsError:
        return
    relations = relations_of(planner.pattern, call_shape(planner.pattern, sizes, request.inputs))
    model_tiles = {"forward": kernels.forward.tiles, "dq": kernels.dq.tiles, "dkdv": kernels.dkdv.tiles}
    stages = STAGES if request.stage == "training" else STAGES[:1]
    machine = machine_of(target, request.device)
    times = {
        stage: {} if machine is None else _predicted(relations, machine, stage, model_tiles[stage]) for stage in stages
    }
    model_ms = {stage: times[stage].get(str(model_tiles[stage])) for stage in stages}
    for stage in stages:
        other_ms = [ms for other, ms in model_ms.items() if other != stage]
        other_total = None if None in other_ms else sum(ms for ms in other_ms if ms is not None)
        others = {name: times[stage].get(name) for name in allowed_shapes(target, stage, heads)}
        others.pop(str(model_tiles[stage]), None)
        ranked = sorted(others.items(), key=lambda option: inf if option[1] is None else option[1])
        options = {MODEL: model_ms[stage], **dict(ranked[: FIRST - 1])}
        total_ms = {
            name: None if ms is None or other_total is None else ms + other_total for name, ms in options.items()
        }
        yield Knob(knob_of(planner.knob, stage), total_ms)


def _predicted(relations: Relations, machine: Machine, stage: Kernel, tile_shape: TileShape) -> dict[str, float]:
    """Return a kernel's predicted milliseconds by tiles, where the simulator knows them; `tile_shape` has any warps."""
    problem = problem_of([relations], relations.pattern.name, {}, relations.shape.n_k)
    ms_by_tiles: dict[str, float] = {}
    for request in (ScheduleRequest(), ScheduleRequest((tile_shape.q_tile, tile_shape.k_tile))):
        try:
            runs = ScheduleCandidates(problem, machine, request).ranked(stage, "full")
        except (MachineError, TooManyTilesError, TooManyClassesError, KeyError):
            continue
        for run in runs:
            if run.parts == 1:
                ms_by_tiles.setdefault(str(tile_shape if request.tile else run.model.shape), run.ms)
    return ms_by_tiles
