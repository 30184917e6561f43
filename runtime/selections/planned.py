"""The plan of a call whose choices are not known yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import ir
from attnc.compiler.attentions import asked
from attnc.compiler.keeping import most_kept
from attnc.compiler.planning.plan import Plan, Schedule
from attnc.runtime.call import Sizes, call_shape, number
from attnc.runtime.selections.placed import choice_of


def blank_choices_of(pattern: ir.Pattern, sizes: Sizes, inputs: Mapping[str, object]) -> dict[str, NDArray[np.bool_]]:
    """Arrays of the shapes of what the selections choose that an attention asks, by name."""
    own = {item.given for item in pattern.selections}
    before = replace(pattern, tensors=tuple(tensor for tensor in pattern.tensors if tensor not in own))
    names = {tensor.name for tensor in before.tensors}
    shape = call_shape(before, sizes, {name: x for name, x in inputs.items() if name in names})
    return {item.name: _blank_choice(item, sizes, shape.sizes) for item in pattern.selections}


def _blank_choice(item: ir.Selection, sizes: Sizes, named: Mapping[str, int]) -> NDArray[np.bool_]:
    fixed = {"batch": sizes.batch, "head": sizes.heads, "kv_head": sizes.kv_heads}
    rows = sizes.n_q if item.rows is None else number(item.rows, sizes, named)
    places = sizes.n_k if item.items is None else number(item.items, sizes, named)
    lanes = [fixed[str(dim)] for dim in item.given.dims[:-2]]
    return np.broadcast_to(np.zeros((), dtype=np.bool_), (*lanes, max(rows, 0), max(places, 0)))


def plan_of_choices(whole: Plan, pattern: ir.Pattern, lists: Mapping[str, str]) -> Plan:
    """The plan of all that may be chosen, `whole`, with what is known of the choice before a call.

    `lists`: where lists of tiles come from, in words, by attention.
    """
    branches = whole.branches or ((pattern.nodes[0].name, whole),)
    found = []
    for node, (name, plan) in zip(pattern.nodes, branches, strict=True):
        items = [item for item in pattern.selections if item.given in asked([node.visible])]
        how = [lists[node.name]] if node.name in lists else []
        found.append((name, _chosen(plan, node, items, how) if items else plan))
    return replace(whole, branches=tuple(found)) if whole.branches else found[0][1]


def _chosen(plan: Plan, node: ir.Attend, items: list[ir.Selection], how: list[str]) -> Plan:
    """The plan of one attention that asks selections."""
    reasons = (*map(_in_words, items), *how)
    schedule: Schedule = "gathered queries" if choice_of(node) is not None else "chosen tiles"
    return replace(plan, schedule=schedule, groups=(), masks=(), reasons=reasons)


def _in_words(item: ir.Selection) -> str:
    count = most_kept(item.keep)
    most = "what `keep` leaves" if count is None else f"at most {count} places"
    besides = "" if isinstance(item.always, ir.Truth) and not item.always.value else " and those that it always takes"
    who = "each query takes" if item.rows is None else "each unit of queries takes"
    who = "all queries of a head together take" if item.pairs else who
    return f"{who} {most} of `{item.name}`{besides}; counted is all that it may take"
