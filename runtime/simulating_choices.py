"""Simulations of a pattern that chooses by content: from how many places a row keeps, without a choice made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attnc.compiler import ir
from attnc.compiler.attentions import asked, asked_by_selection, choosing, might_hold
from attnc.compiler.keeping import most_kept
from attnc.compiler.lowering.specialise import Window, specialise
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.chosen import ChosenKeys, Places, find_places
from attnc.compiler.planning.plan import Plan, TileCounts, joined
from attnc.compiler.rewrite import walk
from attnc.compiler.simulation.choices import Taking, expected_choice
from attnc.compiler.simulation.cpu import Cpu, simulate_cpu
from attnc.compiler.simulation.cpu_choices import ChosenWork, Deciding
from attnc.compiler.simulation.problem import problem_of
from attnc.compiler.simulation.simulation import Baseline, Pass, Simulation
from attnc.runtime.call import Sizes, call_shape, number
from attnc.runtime.errors import UnsupportedError
from attnc.runtime.plans import relations_of
from attnc.runtime.selections.counted import deciding
from attnc.runtime.selections.placed import choice_of
from attnc.runtime.simulating import check_baseline
from attnc.spec.program import Value


def simulated_choices(
    pattern: ir.Pattern,
    params: Mapping[str, Value],
    open_relations: list[Relations],
    plan: Plan,
    sizes: Sizes,
    inputs: Mapping[str, object],
    cpu: Cpu,
    stage: Pass,
    baseline: Baseline,
) -> Simulation:
    """The ladder on this CPU; `open_relations` and `plan` are those of all that may be chosen.

    Raises UnsupportedError where a choice is no choice among places of keys, EvaluationError.
    """
    problem = problem_of(open_relations, pattern.name, params, sizes.n_k)
    check_baseline(problem, baseline)
    works: dict[str, ChosenWork] = {}
    known: set[str] = set()
    for node in pattern.nodes:
        if asked([node.visible]) & {item.given for item in pattern.selections}:
            works[node.name] = _work(pattern, node, sizes, inputs, known)
    branches = plan.branches or ((pattern.nodes[0].name, plan),)
    own = [(name, _counted(one, works[name]) if name in works else one) for name, one in branches]
    whole = joined(own) if plan.branches else own[0][1]
    nodes = max(sum(1 for _ in walk(relations.pattern.attend.visible)) for relations in open_relations)
    found = simulate_cpu(problem, whole, cpu, nodes, stage, baseline, tuple(works.values()))
    return replace(found, notes=(*found.notes, *_notes(pattern, works)), estimated=True)


def _work(
    pattern: ir.Pattern, node: ir.Attend, sizes: Sizes, inputs: Mapping[str, object], known: set[str]
) -> ChosenWork:
    """What an attention to chosen places is; `known`: selections that an earlier one has worked out."""
    choice = choice_of(node)
    if choice is None or pattern.documents is not None:
        raise UnsupportedError(
            f"`{node.name}` of `{pattern.name}` is no choice among places of consecutive keys of one sequence, which "
            f"is not simulated yet; measure it, or look at what may be chosen with `attend.plan(…)`"
        )
    item = next(item for item in pattern.selections if item.given is choice.chosen)
    places, taking = _taken(pattern, choice, item, sizes, inputs)
    heads = {"head": sizes.heads, "kv_head": sizes.kv_heads}.get(item.by_heads or "", 1)
    decided = Deciding()
    for own in _asked_before(pattern, item):
        if own.name not in known:
            known.add(own.name)
            decided += deciding(own, sizes, _rows(own, sizes), _items(own, sizes))
    return ChosenWork(
        expected_choice(places, taking, sizes.n_q, sizes.n_k),
        sizes.n_q,
        sizes.batch * heads,
        sizes.heads // heads,
        decided,
        taking.kept is not None,
    )


def _taken(
    pattern: ir.Pattern, choice: ChosenKeys, item: ir.Selection, sizes: Sizes, inputs: Mapping[str, object]
) -> tuple[Places, Taking]:
    """Where the places lie, and what a row may take of them."""
    own = replace(choosing(pattern, item), tensors=pattern.tensors)
    relations = relations_of(own, replace(call_shape(own, sizes, inputs), n_k=sizes.n_k, shift=None))
    (window,) = relations.windows(0)
    rows, items = _rows(item, sizes), _items(item, sizes)

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


def _asked_before(pattern: ir.Pattern, item: ir.Selection) -> list[ir.Selection]:
    """The selection, and those that it asks."""
    read = asked_by_selection(item)
    before = [one for one in pattern.selections if one.given in read]
    return [*(below for one in before for below in _asked_before(pattern, one)), item]


def _rows(item: ir.Selection, sizes: Sizes) -> int:
    return sizes.n_q if item.rows is None else max(number(item.rows, sizes, {}), 0)


def _items(item: ir.Selection, sizes: Sizes) -> int:
    return sizes.n_k if item.items is None else max(number(item.items, sizes, {}), 0)


def _counted(plan: Plan, work: ChosenWork) -> Plan:
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


def _notes(pattern: ir.Pattern, works: Mapping[str, ChosenWork]) -> list[str]:
    """What was assumed."""
    notes = []
    for node in pattern.nodes:
        if node.name not in works:
            continue
        work = works[node.name]
        item = next(item for item in pattern.selections if item.given in asked([node.visible]))
        if not work.counted:
            why = f"how many places `{item.name}` keeps is told by content: taken are all that it may keep"
        else:
            why = f"each place that `{item.name}` may take is taken to be as likely as another"
        notes.append(f"{why}; {work.visible:,} pairs of `{node.name}` are expected, {work.most:,} at most")
    return notes


__all__ = ["simulated_choices"]
