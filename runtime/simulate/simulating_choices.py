"""Simulations of patterns that select keys by content, from expected numbers of keys instead of a selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from attnc.compiler import ir
from attnc.compiler.analysis.keeping import most_kept
from attnc.compiler.analysis.pooled import pooled_keys
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.ir.value_nodes import is_scored
from attnc.compiler.ir.verify_ir import checked
from attnc.compiler.kernels.kernel_source import TileShape
from attnc.compiler.kernels.selected.selected_kernels import tiles_of
from attnc.compiler.kernels.selected.selected_problem import SelectedProblem, columns_for
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.lowering.specialise import Window, specialise
from attnc.compiler.passes.attentions import alone, choosing, content_masks, content_masks_of_selection, might_hold
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.cpu_plan import Plan, TileCounts, joined
from attnc.compiler.planning.selected_keys import BlockKeys, SelectedKeys, find_places, single_keys
from attnc.compiler.simulation.cpu_choices import Deciding, SelectionWork
from attnc.compiler.simulation.cpu_ladder import CpuMachine, simulate_cpu
from attnc.compiler.simulation.expected_choices import Taking, all_taken, expected_choice
from attnc.compiler.simulation.gpu_choices import GpuWork, ListedWork, repeated, simulate_gpu_choices
from attnc.compiler.simulation.gpu_clocks import Kernel
from attnc.compiler.simulation.gpu_ladder import simulate_gpu
from attnc.compiler.simulation.machine import Machine
from attnc.compiler.simulation.mask_cost import LOOKUP
from attnc.compiler.simulation.simulated_call import SimulatedCall, problem_of
from attnc.compiler.simulation.simulation import Baseline, Pass, Simulation
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.call_shapes import TensorSizes, missing, number, shape_of_call
from attnc.runtime.executors.selections.counted import besides, deciding
from attnc.runtime.executors.selections.score_limits import AT_ONCE, ON_DEVICE
from attnc.runtime.planning.call_relations import relations_of
from attnc.runtime.planning.gather_choices import choice_of, tokens_of
from attnc.runtime.simulate.simulating import RequestedSimulation, baseline_of

MOST_MEMBERS = 8
"""Maximum number of simulated members of a family of branches; they stand for the others."""

ASKED = LOOKUP + 1
"""Operations per pair: reading whether the pair is selected, and selecting its score."""

Open = Sequence[tuple[ir.Attend, Relations]]


def simulated_choices(request: RequestedSimulation, open_relations: Open) -> Simulation:
    """Simulate a pattern that selects; `open_relations` and the plan take everything that may be selected as visible.

    Raises UnsupportedError for patterns that cannot be simulated, ArgumentTypeError for a missing input, MachineError,
    EvaluationError.
    """
    pattern, device = request.pattern, request.device
    open_relations, stands_for = _some_members(open_relations)
    problem = request.problem([relations for _, relations in open_relations])
    baseline = baseline_of(problem, request.baseline)
    works: dict[str, _SelectingAttention] = {}
    worked_out: set[str] = set()
    for node in pattern.nodes:
        if isinstance(device, CpuMachine):
            _check_rows(pattern, node)
        if content_masks([node.visible]) & {item.given for item in pattern.selections}:
            works[node.name] = _attention(request, node, open_relations, stands_for, worked_out)
    if isinstance(device, Machine):
        simulation = _on_gpu(request, device, problem, baseline, works, open_relations, stands_for)
    else:
        simulation = _on_cpu(request, device, problem, baseline, works)
    return replace(simulation, notes=(*simulation.notes, *_notes(works)), estimated=True)


def _on_cpu(
    request: RequestedSimulation,
    cpu: CpuMachine,
    problem: SimulatedCall,
    baseline: Baseline,
    works: Mapping[str, _SelectingAttention],
) -> Simulation:
    from attnc.runtime.executors.selections.listed import blocks_of  # only for simulations

    pattern, plan, sizes = request.pattern, request.plan(), request.sizes
    branches = plan.branches or ((pattern.nodes[0].name, plan),)
    plans = []
    for node, (name, branch_plan) in zip(pattern.nodes, branches, strict=True):
        selecting = works.get(name)
        if selecting is not None and not selecting.places:
            blocks = blocks_of(alone(pattern, node), sizes, request.inputs)
            plans.append((name, replace(blocks, visible=selecting.work.visible)))
        else:
            plans.append((name, branch_plan if selecting is None else _counted(branch_plan, selecting.work)))
    whole = joined(plans) if plan.branches else plans[0][1]
    nodes = max(sum(1 for _ in walk(node.visible)) for node in pattern.nodes)
    chosen = tuple(branch_plan.work for branch_plan in works.values())
    return simulate_cpu(problem, whole, cpu, nodes, request.stage, baseline, chosen, besides(pattern, sizes))


def _on_gpu(
    request: RequestedSimulation,
    machine: Machine,
    problem: SimulatedCall,
    baseline: Baseline,
    works: Mapping[str, _SelectingAttention],
    open_relations: Open,
    stands_for: Mapping[str, float],
) -> Simulation:
    sizes, stage = request.sizes, request.stage
    target = TARGETS.get(machine.architecture)
    if target is None:
        raise UnsupportedError(
            f"`{problem.pattern}` selects keys by content, which has kernels for {', '.join(TARGETS)}, not "
            f"for {machine.architecture}, the architecture of {machine.name}"
        )
    gathered, listed, others = [], [], []
    for selecting in works.values():
        if not selecting.places:
            listed.append(ListedWork(selecting.work, selecting.entries))
            continue
        kernels = SelectedProblem(sizes.dk, sizes.dv, sizes.dtype, target, columns=columns_for(selecting.largest))
        tiles: dict[Kernel, TileShape] = {stage: tiles_of(kernels, stage) for stage in ("forward", "dq", "dkdv")}
        gathered.append(GpuWork(selecting.work, tiles, selecting.work.expected.slots, selecting.items))
    for node, relations in open_relations:
        branch = works.get(_family(node))
        if branch is None or not branch.places:
            whole = request.problem([relations], node.name)
            simulation = (
                simulate_gpu(whole, machine, stage) if branch is None else _scattered(whole, branch, machine, stage)
            )
            others.append(repeated(simulation, stands_for[_family(node)]))
    return simulate_gpu_choices(problem, gathered, listed, others, machine, stage, baseline)


def _scattered(whole: SimulatedCall, selecting: _SelectingAttention, machine: Machine, stage: Pass) -> Simulation:
    """Simulate attention to selected single keys; every tile that may hold such a key holds one and reads its mask."""
    masked = replace(whole, extra=replace(whole.extra, score=whole.extra.score + ASKED))
    simulation = simulate_gpu(masked, machine, stage)
    note = (
        f"keys selected by `{selecting.item.name}` are assumed to be scattered: every tile of `{selecting.name}` that "
        f"may be live is"
    )
    tiles = replace(simulation.tiles, full=0, partial=simulation.tiles.live)
    visible = selecting.work.visible if selecting.work.counted else simulation.visible
    return replace(simulation, visible=visible, tiles=tiles, notes=(*simulation.notes, note))


def _check_rows(pattern: ir.Pattern, node: ir.Attend) -> None:
    """Raise UnsupportedError for attentions that the CPU executor runs differently from their simulation."""
    if node.family is not None or not _selects_by_row(pattern, node) or not (is_scored(node) or pooled_keys(node)):
        raise UnsupportedError(
            f"`{node.name}` of `{pattern.name}` is not a softmax over keys of one sequence that each row selects for "
            f"itself; others cannot be simulated on a CPU yet. Measure it, or simulate a GPU, where every key that "
            f"may be selected counts"
        )


def _selects_by_row(pattern: ir.Pattern, node: ir.Attend) -> bool:
    """Check whether each row of one sequence selects for itself."""
    return pattern.documents is None and node.family is None and tokens_of(node) is None


@dataclass(frozen=True, eq=False)
class _SelectingAttention:
    """An attention that reads the selection `item`.

    `places`: whether it selects among places, `items` of them; `entries`: the number of mask entries of all its
    selections, over batch and heads.
    """

    work: SelectionWork
    item: ir.Selection
    places: bool
    items: int
    entries: int
    largest: int
    name: str


def _attention(
    request: RequestedSimulation,
    node: ir.Attend,
    open_relations: Open,
    stands_for: Mapping[str, float],
    known: set[str],
) -> _SelectingAttention:
    """Return the work of an attention to selected keys.

    `known`: selections that an earlier attention has computed; this function adds to it.
    """
    pattern, sizes = request.pattern, request.sizes
    at_once = ON_DEVICE if isinstance(request.device, Machine) else AT_ONCE
    named = {name: size for _, relations in open_relations for name, size in relations.sizes.values.items()}
    of_rows = _selects_by_row(pattern, node)
    items = [item for item in pattern.selections if item.given in content_masks([node.visible])]
    decided = Deciding()
    for item in items:
        for earlier in _asked_before(pattern, item):
            if earlier.name not in known:
                known.add(earlier.name)
                decided += deciding(
                    earlier, sizes, _rows(earlier, sizes, named), _items(earlier, sizes, named), at_once
                )
    choice, (item, *_) = choice_of(node) if of_rows else None, items
    keys = single_keys(node.visible) if of_rows and choice is None and len(items) == 1 else None
    places_or_keys = choice or keys
    head_kind = "head" if any(one.by_heads == "head" for one in items) else item.by_heads
    heads = {"head": sizes.heads, "kv_head": sizes.kv_heads}.get(head_kind or "", 1)
    counted = False
    if places_or_keys is None:
        matrices = max(sizes.batch * sizes.heads, 1)
        expected = all_taken(_may_be_chosen(pattern, node, open_relations, stands_for, sizes) // matrices)
    else:
        places, taking = _taken(request, places_or_keys, item, named)
        counted = taking.kept is not None
        expected = expected_choice(places, taking, sizes.n_q, sizes.n_k)
    largest = int(expected.keys.max(initial=0))
    expected = expected if choice is not None else expected.without_places
    work = SelectionWork(expected, sizes.n_q, sizes.batch * heads, sizes.heads // max(heads, 1), decided, counted)
    entries = sum(_rows(one, sizes, named) * _items(one, sizes, named) for one in items) * sizes.batch * heads
    return _SelectingAttention(work, item, choice is not None, _items(item, sizes, named), entries, largest, node.name)


def _may_be_chosen(
    pattern: ir.Pattern, node: ir.Attend, open_relations: Open, stands_for: Mapping[str, float], sizes: TensorSizes
) -> int:
    """Return the number of pairs, over heads and family members, that may be selected; 0 for an empty family."""
    pairs = 0
    for relations in (own for attend, own in open_relations if _family(attend) == node.name):
        visible = problem_of([relations], pattern.name, {}, sizes.n_k).visible
        pairs += sizes.batch * sizes.heads * sizes.n_q * sizes.n_k if visible is None else visible
    return round(pairs * stands_for.get(node.name, 0.0))


def _family(attend: ir.Attend) -> str:
    """Return the name of an attention; for a member of a family, the name of the family."""
    return attend.name.partition("[")[0]


def _some_members(open_relations: Open) -> tuple[Open, Mapping[str, float]]:
    """Return at most MOST_MEMBERS members of each family, evenly spaced, and how many members each stands for."""
    families: dict[str, list[tuple[ir.Attend, Relations]]] = {}
    for attend, relations in open_relations:
        families.setdefault(_family(attend), []).append((attend, relations))
    taken = {name: members[:: -(-len(members) // MOST_MEMBERS)] for name, members in families.items()}
    stands_for = {name: len(members) / len(taken[name]) for name, members in families.items()}
    return [member for members in taken.values() for member in members], stands_for


def _taken(
    request: RequestedSimulation, choice: SelectedKeys, item: ir.Selection, named: Mapping[str, int]
) -> tuple[BlockKeys, Taking]:
    """Return the positions of the selected blocks, and which of them a row may select."""
    pattern, sizes = request.pattern, request.sizes
    pattern_of_choice = checked(replace(choosing(pattern, item), tensors=pattern.tensors))
    relations = relations_of(
        pattern_of_choice, replace(shape_of_call(pattern_of_choice, sizes, request.inputs), n_k=sizes.n_k, shift=None)
    )
    _check_given(pattern, choice, item, relations.slices.tensors)
    (window,) = relations.windows(0)
    rows, items = _rows(item, sizes, named), _items(item, sizes, named)

    def special(node: ir.Index, place: Window = window) -> ir.Index:
        return specialise(node, relations.sizes, relations.slices, place, batch=0, head=0, group=1)

    row_of = None if choice.is_by_query else special(choice.row_of)
    places = find_places(row_of, special(choice.item_of), special(choice.rest), sizes.n_q, sizes.n_k, rows, items)
    if places is None:
        raise UnsupportedError(
            f"some query or key of `{pattern.name}` lies in no place of `{item.name}`, which cannot be simulated"
        )
    chosen = {selection.given for selection in pattern.selections}
    running = window if item.rows is None else replace(window, shift=0)
    candidates, always = (special(might_hold(x, chosen), running) for x in (item.candidates, item.always))
    return places, Taking(rows, items, candidates, always, most_kept(item.keep, special), item.pairs)


def _check_given(
    pattern: ir.Pattern, choice: SelectedKeys, item: ir.Selection, inputs: Mapping[str, NDArray[Any]]
) -> None:
    """Raise ArgumentTypeError for a missing input that decides the positions of blocks."""
    roots = [choice.row_of, choice.item_of, choice.rest, item.candidates, item.always]
    chosen = {selection.given for selection in pattern.selections}
    for node in (node for root in roots for node in walk(root)):
        if isinstance(node, ir.Lookup) and node.tensor not in chosen and node.tensor.name not in inputs:
            raise missing(pattern, node.tensor)


def _asked_before(pattern: ir.Pattern, item: ir.Selection) -> list[ir.Selection]:
    """Return a selection, preceded by the selections that it reads."""
    read = content_masks_of_selection(item)
    before = [selection for selection in pattern.selections if selection.given in read]
    return [*(earlier for selection in before for earlier in _asked_before(pattern, selection)), item]


def _rows(item: ir.Selection, sizes: TensorSizes, named: Mapping[str, int]) -> int:
    return sizes.n_q if item.rows is None else max(number(item.rows, sizes, named), 0)


def _items(item: ir.Selection, sizes: TensorSizes, named: Mapping[str, int]) -> int:
    return sizes.n_k if item.items is None else max(number(item.items, sizes, named), 0)


def _counted(plan: Plan, work: SelectionWork) -> Plan:
    """Return the plan of everything that may be selected, with the expected counts."""
    area = plan.q_tile * plan.k_tile
    elements = {True: 0.0, False: 0.0}
    for met in work.met(1):
        elements[met.piece.mask == "full"] += met.piece.elements * met.lanes * met.times
    full, partial = (round(elements[whole] / area) for whole in (True, False))
    return replace(
        plan,
        visible=work.visible,
        tiles=TileCounts(plan.tiles.total, full + partial, full, partial),
        groups=(),
        masks=(),
    )


def _notes(works: Mapping[str, _SelectingAttention]) -> list[str]:
    """Return the assumptions of the simulation, as sentences."""
    notes = []
    for name, selecting in works.items():
        work = selecting.work
        if not work.counted:
            why = f"the content decides how much `{selecting.item.name}` keeps: the maximum is assumed"
        else:
            why = f"every place that `{selecting.item.name}` may select is assumed to be equally likely"
        notes.append(f"{why}; {work.visible:,} pairs of `{name}` are expected, {work.most:,} at most")
    return notes
