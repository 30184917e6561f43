"""The plan of a call before its selections are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import ir
from attnc.compiler.analysis.keeping import most_kept
from attnc.compiler.passes.attentions import alone, content_masks
from attnc.compiler.planning.cpu_plan import Plan, Schedule
from attnc.runtime.call.tensor_checks import TensorSizes, call_shape, number
from attnc.runtime.planning.gather_choices import choice_of, tokens_of


def blank_choices_of(
    pattern: ir.Pattern, sizes: TensorSizes, inputs: Mapping[str, object]
) -> dict[str, NDArray[np.bool_]]:
    """Return blank bool arrays of the shapes of a pattern's selections, by name."""
    selection_tensors = {item.given for item in pattern.selections}
    without_selections = replace(
        pattern, tensors=tuple(tensor for tensor in pattern.tensors if tensor not in selection_tensors)
    )
    names = {tensor.name for tensor in without_selections.tensors}
    shape = call_shape(without_selections, sizes, {name: x for name, x in inputs.items() if name in names})
    return {item.name: _blank_choice(item, sizes, shape.sizes) for item in pattern.selections}


def _blank_choice(item: ir.Selection, sizes: TensorSizes, named: Mapping[str, int]) -> NDArray[np.bool_]:
    fixed = {"batch": sizes.batch, "head": sizes.heads, "kv_head": sizes.kv_heads}
    rows = sizes.n_q if item.rows is None else number(item.rows, sizes, named)
    blocks = sizes.n_k if item.items is None else number(item.items, sizes, named)
    leading_sizes = [fixed[str(dim)] for dim in item.given.dims[:-2]]
    return np.broadcast_to(np.zeros((), dtype=np.bool_), (*leading_sizes, max(rows, 0), max(blocks, 0)))


def plan_of_choices(whole: Plan, pattern: ir.Pattern, lists: Mapping[str, str] | None) -> Plan:
    """Return the plan `whole`, which covers everything selectable, with schedules and reasons for its selections.

    `lists`: the source of the tile lists, as text, by attention; None on a CPU.
    """
    branches = whole.branches or ((pattern.nodes[0].name, whole),)
    nodes = {node.name: alone(pattern, node, None if node.family is None else 0).attend for node in pattern.nodes}
    planned_branches = []
    for name, plan in branches:
        node = nodes[name.partition("[")[0]]
        read = content_masks([node.visible])
        items = [item for item in pattern.selections if item.given in read]
        sorted_by = sorted({tensor.made.of for tensor in read if tensor.made is not None})
        reasons = [*map(_in_words, items), *(f"tokens are sorted by `{name}` in every call" for name in sorted_by)]
        planned_branches.append((name, _chosen(plan, node, reasons, lists) if reasons else plan))
    return replace(whole, branches=tuple(planned_branches)) if whole.branches else planned_branches[0][1]


def _chosen(plan: Plan, node: ir.Attend, why: list[str], lists: Mapping[str, str] | None) -> Plan:
    """Return the plan of one attention that reads selections or sorts tokens."""
    schedule: Schedule = "chosen tiles"
    if choice_of(node) is not None:
        schedule = "gathered queries"
    elif lists is None and tokens_of(node) is not None:
        schedule = "gathered tokens"
    elif lists is not None and node.name in lists:
        why += [lists[node.name]]
    reasons = tuple(why)
    return replace(plan, schedule=schedule, groups=(), masks=(), reasons=reasons)


def _in_words(item: ir.Selection) -> str:
    count = most_kept(item.keep)
    unit = "tokens" if item.items is None else "blocks"
    kept_text = f"the {unit} that `keep` allows" if count is None else f"at most {count} {unit}"
    takes_always = not isinstance(item.always, ir.Truth) or item.always.value
    besides = f" and the {unit} that it always selects" if takes_always else ""
    who = "each query selects" if item.rows is None else "each unit of queries selects"
    who = "all queries of a head together select" if item.pairs else who
    return f"{who} {kept_text} of `{item.name}`{besides}; the counts include everything it may select"
