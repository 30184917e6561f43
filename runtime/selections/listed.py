"""The plan of an attention to what was chosen where that is no choice among places of keys.

Rows are taken in blocks, each with the stretch of keys that it might choose from: these are found once for the sizes of
a call, so that what other rows choose has no part in how a row is computed. What was chosen is the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attnc.compiler import ir
from attnc.compiler.attentions import open_inputs
from attnc.compiler.planning.build_plan import Relations, build_plan
from attnc.compiler.planning.cpu_plan import Group, Plan, PlanPiece, stretch
from attnc.compiler.planning.seen_keys import find_seen_keys
from attnc.compiler.pooled import pooled_keys
from attnc.compiler.value_nodes import is_scored
from attnc.runtime.call_inputs import CallInputs
from attnc.runtime.plans import Planner, planning, relations_of
from attnc.runtime.tensor_checks import TensorSizes, call_shape

ROWS = 512
"""Rows of a block."""


def plan_of(planner: Planner, given: CallInputs) -> Plan | None:
    """The plan of one attention that asks selections; None for any other, and for what is planned row by row."""
    pattern = planner.pattern
    fits = is_scored(pattern.attend) or pooled_keys(pattern.attend) is not None
    if not pattern.chooses or not fits or pattern.documents is not None:
        return None
    shape = call_shape(pattern, given.sizes, given.inputs)
    template = planner.remembered(
        ("blocks", given.sizes, tuple(sorted(shape.sizes.items()))), lambda: _planned(pattern, given)
    )
    relations = relations_of(pattern, shape)
    return replace(template, groups=tuple(_groups(template, pattern)), exact_mask=relations.exact_mask)


def _planned(pattern: ir.Pattern, given: CallInputs) -> Plan:
    with planning():
        return _made(pattern, given.sizes, given.inputs)


def blocks_of(pattern: ir.Pattern, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
    """The plan of such an attention before anything is chosen: blocks are the same whatever that is."""
    template = _made(pattern, sizes, inputs)
    return replace(template, groups=tuple(_groups(template, pattern)))


def _made(one: ir.Pattern, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
    """Blocks of rows with the keys that they might choose from, as a plan of every head alike.

    It is kept for other inputs, and so knows nothing of what they hold.
    """
    pattern = open_inputs(one)
    own = {tensor.name for tensor in pattern.tensors}
    shape = call_shape(pattern, sizes, {name: x for name, x in inputs.items() if name in own})
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
    found = tuple(
        PlanPiece(stretch(*rows), stretch(min(keys), max(keys) + 1), "exact") for rows, keys in pieces.items() if keys
    )
    plan = build_plan(relations)
    everywhere = Group(tuple(range(shape.batch)), tuple(range(shape.heads)), found)
    return replace(plan, groups=(everywhere,), masks=(), schedule="chosen tiles", reasons=(), fallback=None)


def _groups(template: Plan, pattern: ir.Pattern) -> list[Group]:
    """Batch entries and heads apart where they choose by themselves."""
    (whole,) = template.groups
    chosen = [item.given for item in pattern.selections]
    dims = {dim for tensor in (*chosen, *pattern.tensors) for dim in tensor.dims}
    batches = [(b,) for b in whole.batches] if "batch" in dims else [whole.batches]
    per = {"head": 1, "kv_head": template.heads // max(template.kv_heads, 1)}
    size = min((per[str(dim)] for dim in dims if dim in per), default=max(len(whole.heads), 1))
    heads = [whole.heads[i : i + size] for i in range(0, len(whole.heads), size)]
    return [replace(whole, batches=b, heads=h) for b in batches for h in heads]
