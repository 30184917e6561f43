"""The plan of an attention to selections that neither gathered queries nor gathered tokens can execute.

Rows are cut into blocks, each with the range of keys that its rows might select. The ranges are computed once for the
sizes of a call, so the arithmetic of a row does not depend on what other rows select. The selection is the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attnc.compiler import ir
from attnc.compiler.analysis.pooled import pooled_keys
from attnc.compiler.ir.value_nodes import is_scored
from attnc.compiler.passes.attentions import open_inputs
from attnc.compiler.planning.build_plan import Relations, build_plan
from attnc.compiler.planning.cpu_plan import Group, Plan, PlanPiece, stretch
from attnc.compiler.planning.seen_keys import find_seen_keys
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.tensor_checks import TensorSizes, call_shape
from attnc.runtime.planning import stored_rates
from attnc.runtime.planning.plans import Planner, planning, relations_of

ROWS = 512
"""Number of rows in a block."""


def plan_of(planner: Planner, call: CallArguments) -> Plan | None:
    """Return the plan of one attention that reads selections; None without selections or if planned row by row."""
    pattern = planner.pattern
    fits = is_scored(pattern.attend) or pooled_keys(pattern.attend) is not None
    if not pattern.chooses or not fits or pattern.documents is not None:
        return None
    shape = call_shape(pattern, call.sizes, call.inputs)
    template = planner.remembered(
        ("blocks", call.sizes, tuple(sorted(shape.sizes.items()))), lambda: _planned(pattern, call)
    )
    relations = relations_of(pattern, shape)
    return replace(template, groups=tuple(_groups(template, pattern)), exact_mask=relations.exact_mask)


def _planned(pattern: ir.Pattern, call: CallArguments) -> Plan:
    with planning():
        return _made(pattern, call.sizes, call.inputs)


def blocks_of(pattern: ir.Pattern, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
    """Return the plan before anything is selected: the blocks are the same whatever rows select."""
    template = _made(pattern, sizes, inputs)
    return replace(template, groups=tuple(_groups(template, pattern)))


def _made(closed_pattern: ir.Pattern, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
    """Plan blocks of rows with the keys that they might select, in one group of all heads.

    The plan is cached for calls with other inputs, so it uses no input values.
    """
    pattern = open_inputs(closed_pattern)
    names = {tensor.name for tensor in pattern.tensors}
    shape = call_shape(pattern, sizes, {name: x for name, x in inputs.items() if name in names})
    relations = Relations(pattern, shape)
    pieces: dict[tuple[int, int], list[int]] = {}
    for batches, heads, windows in relations.groups(cut=False):
        if not (batches and heads):
            continue
        for local in windows:
            for start in range(0, shape.n_q, ROWS):
                rows = start, min(start + ROWS, shape.n_q)
                seen = find_seen_keys(local.relation, rows, shape.n_k, pattern.origins)
                keys = [*seen.first.tolist(), *(x - 1 for x in seen.stop.tolist()), *seen.keys.tolist()]
                pieces.setdefault(rows, []).extend(keys)
    plan_pieces = tuple(
        PlanPiece(stretch(*rows), stretch(min(keys), max(keys) + 1), "exact") for rows, keys in pieces.items() if keys
    )
    plan = build_plan(relations, rates=stored_rates.rates())
    one_group = Group(tuple(range(shape.batch)), tuple(range(shape.heads)), plan_pieces)
    return replace(plan, groups=(one_group,), masks=(), schedule="chosen tiles", reasons=(), fallback=None)


def _groups(template: Plan, pattern: ir.Pattern) -> list[Group]:
    """Split the group where batch entries or heads select separately."""
    (whole,) = template.groups
    selected = [item.given for item in pattern.selections]
    dims = {dim for tensor in (*selected, *pattern.tensors) for dim in tensor.dims}
    batches = [(b,) for b in whole.batches] if "batch" in dims else [whole.batches]
    per = {"head": 1, "kv_head": template.heads // max(template.kv_heads, 1)}
    size = min((per[str(dim)] for dim in dims if dim in per), default=max(len(whole.heads), 1))
    heads = [whole.heads[i : i + size] for i in range(0, len(whole.heads), size)]
    return [replace(whole, batches=b, heads=h) for b in batches for h in heads]
