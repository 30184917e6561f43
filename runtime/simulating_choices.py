"""Simulations of a pattern that chooses by content: from how many places a row keeps, without a choice made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from attnc.compiler import ir
from attnc.compiler.attentions import alone, asked, asked_by_selection, choosing, might_hold
from attnc.compiler.keeping import most_kept
from attnc.compiler.kernels.selected.selected_kernels import tiles_of
from attnc.compiler.kernels.selected.selected_problem import SelectedProblem, columns_for
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.lowering.specialise import Window, specialise
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.cpu_plan import Plan, TileCounts, joined
from attnc.compiler.planning.selected_keys import BlockKeys, SelectedKeys, find_places, single_keys
from attnc.compiler.pooled import pooled_keys
from attnc.compiler.rewrite import walk
from attnc.compiler.simulation.cpu_choices import Deciding, SelectionWork
from attnc.compiler.simulation.cpu_ladder import CpuMachine, simulate_cpu
from attnc.compiler.simulation.expected_choices import Taking, all_taken, expected_choice
from attnc.compiler.simulation.gpu_choices import GpuWork, ListedWork, repeated, simulate_gpu_choices
from attnc.compiler.simulation.gpu_clocks import Kernel, TileShape
from attnc.compiler.simulation.gpu_ladder import simulate_gpu
from attnc.compiler.simulation.machine import Machine
from attnc.compiler.simulation.mask_cost import LOOKUP
from attnc.compiler.simulation.simulated_call import SimulatedCall, problem_of
from attnc.compiler.simulation.simulation import Baseline, Pass, Simulation
from attnc.compiler.value_nodes import is_scored
from attnc.compiler.verify_ir import checked
from attnc.runtime.call_errors import UnsupportedError
from attnc.runtime.call_relations import relations_of
from attnc.runtime.call_shapes import TensorSizes, missing, number, shape_of_call
from attnc.runtime.selections.counted import besides, deciding
from attnc.runtime.selections.gather_choices import choice_of, tokens_of
from attnc.runtime.selections.score_limits import AT_ONCE, ON_DEVICE
from attnc.runtime.simulating import Device, baseline_of
from attnc.spec.program import Value

MOST_MEMBERS = 8
"""Of a family of branches: as many are simulated, and stand for the others."""

ASKED = LOOKUP + 1
"""Operations of a pair: whether it is chosen is read, and its score chosen by that."""

Open = Sequence[tuple[ir.Attend, Relations]]


def simulated_choices(
    pattern: ir.Pattern,
    params: Mapping[str, Value],
    open_relations: Open,
    plan: Callable[[], Plan],
    sizes: TensorSizes,
    inputs: Mapping[str, object],
    device: Device,
    stage: Pass,
    baseline: Baseline | None,
) -> Simulation:
    """The ladder of a pattern that chooses; `open_relations` and `plan` are those of all that may be chosen.

    Raises UnsupportedError for what is not simulated, ArgumentTypeError for an input that is missing, MachineError,
    EvaluationError.
    """
    open_relations, stands_for = _some_members(open_relations)
    problem = problem_of([own for _, own in open_relations], pattern.name, params, sizes.n_k)
    baseline = baseline_of(problem, baseline)
    works: dict[str, _SelectingAttention] = {}
    known: set[str] = set()
    at_once = ON_DEVICE if isinstance(device, Machine) else AT_ONCE
    for node in pattern.nodes:
        if isinstance(device, CpuMachine):
            _check_rows(pattern, node)
        if asked([node.visible]) & {item.given for item in pattern.selections}:
            works[node.name] = _attention(pattern, node, open_relations, stands_for, sizes, inputs, known, at_once)
    if isinstance(device, Machine):
        found = _on_gpu(problem, works, open_relations, stands_for, params, sizes, device, stage, baseline)
    else:
        found = _on_cpu(problem, works, pattern, plan(), sizes, inputs, device, stage, baseline)
    return replace(found, notes=(*found.notes, *_notes(works)), estimated=True)


def _on_cpu(
    problem: SimulatedCall,
    works: Mapping[str, _SelectingAttention],
    pattern: ir.Pattern,
    plan: Plan,
    sizes: TensorSizes,
    inputs: Mapping[str, object],
    cpu: CpuMachine,
    stage: Pass,
    baseline: Baseline,
) -> Simulation:
    from attnc.runtime.selections.listed import blocks_of

    branches = plan.branches or ((pattern.nodes[0].name, plan),)
    own = []
    for node, (name, one) in zip(pattern.nodes, branches, strict=True):
        asks = works.get(name)
        if asks is not None and not asks.places:
            blocks = blocks_of(alone(pattern, node), sizes, inputs)
            own.append((name, replace(blocks, visible=asks.work.visible)))
        else:
            own.append((name, one if asks is None else _counted(one, asks.work)))
    whole = joined(own) if plan.branches else own[0][1]
    nodes = max(sum(1 for _ in walk(node.visible)) for node in pattern.nodes)
    chosen = tuple(one.work for one in works.values())
    return simulate_cpu(problem, whole, cpu, nodes, stage, baseline, chosen, besides(pattern, sizes))


def _on_gpu(
    problem: SimulatedCall,
    works: Mapping[str, _SelectingAttention],
    open_relations: Open,
    stands_for: Mapping[str, float],
    params: Mapping[str, Value],
    sizes: TensorSizes,
    machine: Machine,
    stage: Pass,
    baseline: Baseline,
) -> Simulation:
    target = TARGETS.get(machine.architecture)
    if target is None:
        raise UnsupportedError(
            f"`{problem.pattern}` chooses by content, and there are kernels of that for {', '.join(TARGETS)}, not for "
            f"{machine.architecture}, which is what {machine.name} has"
        )
    own, listed, others = [], [], []
    for one in works.values():
        if not one.places:
            listed.append(ListedWork(one.work, one.entries))
            continue
        kernels = SelectedProblem(sizes.dk, sizes.dv, sizes.dtype, target, columns=columns_for(one.largest))
        tiles: dict[Kernel, TileShape] = {stage: tiles_of(kernels, stage) for stage in ("forward", "dq", "dkdv")}
        own.append(GpuWork(one.work, tiles, one.work.expected.slots, one.items))
    for node, relations in open_relations:
        asks = works.get(_family(node))
        if asks is None or not asks.places:
            whole = problem_of([relations], node.name, params, sizes.n_k)
            found = simulate_gpu(whole, machine, stage) if asks is None else _scattered(whole, asks, machine, stage)
            others.append(repeated(found, stands_for[_family(node)]))
    return simulate_gpu_choices(problem, own, listed, others, machine, stage, baseline)


def _scattered(whole: SimulatedCall, asks: _SelectingAttention, machine: Machine, stage: Pass) -> Simulation:
    """An attention to single keys that are chosen: every tile that may have one is taken to have one, and to ask."""
    asking = replace(whole, extra=replace(whole.extra, score=whole.extra.score + ASKED))
    found = simulate_gpu(asking, machine, stage)
    note = f"what `{asks.item.name}` takes is taken to lie scattered: every tile of `{asks.name}` that may be live is"
    tiles = replace(found.tiles, full=0, partial=found.tiles.live)
    visible = asks.work.visible if asks.work.counted else found.visible
    return replace(found, visible=visible, tiles=tiles, notes=(*found.notes, note))


def _check_rows(pattern: ir.Pattern, node: ir.Attend) -> None:
    """Raise UnsupportedError for what the CPU's executor runs otherwise than it is simulated."""
    if node.family is not None or not _of_rows(pattern, node) or not (is_scored(node) or pooled_keys(node)):
        raise UnsupportedError(
            f"`{node.name}` of `{pattern.name}` is no softmax over keys of one sequence that each row chooses for "
            f"itself, which is not simulated on a CPU yet; measure it, or ask for a GPU, where all that may be chosen "
            f"is taken"
        )


def _of_rows(pattern: ir.Pattern, node: ir.Attend) -> bool:
    """Whether each row of one sequence chooses for itself."""
    return pattern.documents is None and node.family is None and tokens_of(node) is None


@dataclass(frozen=True, eq=False)
class _SelectingAttention:
    """An attention that asks `item`. `places`: whether that is a choice among places, `items` of them; `entries`: of
    all that it asks, in all lanes.
    """

    work: SelectionWork
    item: ir.Selection
    places: bool
    items: int
    entries: int
    largest: int
    name: str


def _attention(
    pattern: ir.Pattern,
    node: ir.Attend,
    open_relations: Open,
    stands_for: Mapping[str, float],
    sizes: TensorSizes,
    inputs: Mapping[str, object],
    known: set[str],
    at_once: int,
) -> _SelectingAttention:
    """What an attention to what is chosen is; `known`: selections that an earlier one has worked out.

    `at_once`: scores of a block of rows.
    """
    named = {name: size for _, relations in open_relations for name, size in relations.sizes.values.items()}
    of_rows = _of_rows(pattern, node)
    items = [item for item in pattern.selections if item.given in asked([node.visible])]
    decided = Deciding()
    for item in items:
        for own in _asked_before(pattern, item):
            if own.name not in known:
                known.add(own.name)
                decided += deciding(own, sizes, _rows(own, sizes, named), _items(own, sizes, named), at_once)
    choice, (item, *_) = choice_of(node) if of_rows else None, items
    keys = single_keys(node.visible) if of_rows and choice is None and len(items) == 1 else None
    of = choice or keys
    by = "head" if any(one.by_heads == "head" for one in items) else item.by_heads
    heads = {"head": sizes.heads, "kv_head": sizes.kv_heads}.get(by or "", 1)
    counted = False
    if of is None:
        matrices = max(sizes.batch * sizes.heads, 1)
        expected = all_taken(_may_be_chosen(pattern, node, open_relations, stands_for, sizes) // matrices)
    else:
        places, taking = _taken(pattern, of, item, sizes, inputs, named)
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
    """Pairs of all heads, and of all members of a family, that may be chosen; 0 for a family that is empty here."""
    found = 0
    for relations in (own for attend, own in open_relations if _family(attend) == node.name):
        visible = problem_of([relations], pattern.name, {}, sizes.n_k).visible
        found += sizes.batch * sizes.heads * sizes.n_q * sizes.n_k if visible is None else visible
    return round(found * stands_for.get(node.name, 0.0))


def _family(attend: ir.Attend) -> str:
    """The name of an attention, of a member that of its family."""
    return attend.name.partition("[")[0]


def _some_members(open_relations: Open) -> tuple[Open, Mapping[str, float]]:
    """At most so many members of each family, evenly spread, and how many each stands for."""
    families: dict[str, list[tuple[ir.Attend, Relations]]] = {}
    for attend, relations in open_relations:
        families.setdefault(_family(attend), []).append((attend, relations))
    taken = {name: own[:: -(-len(own) // MOST_MEMBERS)] for name, own in families.items()}
    stands_for = {name: len(own) / len(taken[name]) for name, own in families.items()}
    return [one for own in taken.values() for one in own], stands_for


def _taken(
    pattern: ir.Pattern,
    choice: SelectedKeys,
    item: ir.Selection,
    sizes: TensorSizes,
    inputs: Mapping[str, object],
    named: Mapping[str, int],
) -> tuple[BlockKeys, Taking]:
    """Where the places lie, and what a row may take of them."""
    own = checked(replace(choosing(pattern, item), tensors=pattern.tensors))
    relations = relations_of(own, replace(shape_of_call(own, sizes, inputs), n_k=sizes.n_k, shift=None))
    _check_given(pattern, choice, item, relations.slices.tensors)
    (window,) = relations.windows(0)
    rows, items = _rows(item, sizes, named), _items(item, sizes, named)

    def special(node: ir.Index, place: Window = window) -> ir.Index:
        return specialise(node, relations.sizes, relations.slices, place, batch=0, head=0, group=1)

    row_of = None if choice.is_by_query else special(choice.row_of)
    places = find_places(row_of, special(choice.item_of), special(choice.rest), sizes.n_q, sizes.n_k, rows, items)
    if places is None:
        raise UnsupportedError(f"some query or key of `{pattern.name}` is in no place of `{item.name}`: not simulated")
    chosen = {one.given for one in pattern.selections}
    running = window if item.rows is None else replace(window, shift=0)
    candidates, always = (special(might_hold(x, chosen), running) for x in (item.candidates, item.always))
    return places, Taking(rows, items, candidates, always, most_kept(item.keep, special), item.pairs)


def _check_given(
    pattern: ir.Pattern, choice: SelectedKeys, item: ir.Selection, given: Mapping[str, NDArray[Any]]
) -> None:
    """Raise ArgumentTypeError for an input that says where places lie and is not given."""
    roots = [choice.row_of, choice.item_of, choice.rest, item.candidates, item.always]
    chosen = {one.given for one in pattern.selections}
    for node in (node for root in roots for node in walk(root)):
        if isinstance(node, ir.Lookup) and node.tensor not in chosen and node.tensor.name not in given:
            raise missing(pattern, node.tensor)


def _asked_before(pattern: ir.Pattern, item: ir.Selection) -> list[ir.Selection]:
    """The selection, and those that it asks."""
    read = asked_by_selection(item)
    before = [one for one in pattern.selections if one.given in read]
    return [*(below for one in before for below in _asked_before(pattern, one)), item]


def _rows(item: ir.Selection, sizes: TensorSizes, named: Mapping[str, int]) -> int:
    return sizes.n_q if item.rows is None else max(number(item.rows, sizes, named), 0)


def _items(item: ir.Selection, sizes: TensorSizes, named: Mapping[str, int]) -> int:
    return sizes.n_k if item.items is None else max(number(item.items, sizes, named), 0)


def _counted(plan: Plan, work: SelectionWork) -> Plan:
    """The plan of all that may be chosen, which counts what is expected."""
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
    """What was assumed."""
    notes = []
    for name, one in works.items():
        work = one.work
        if not work.counted:
            why = f"how much `{one.item.name}` keeps is told by content: taken is all that it may keep"
        else:
            why = f"each place that `{one.item.name}` may take is taken to be as likely as another"
        notes.append(f"{why}; {work.visible:,} pairs of `{name}` are expected, {work.most:,} at most")
    return notes


__all__ = ["simulated_choices"]
