"""Print a plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnc.compiler.planning.cpu_plan import Group, Plan, PlanPiece


SHOWN = 12
"""Maximum number of pieces that are printed for a group; further pieces are only counted."""


def print_plan(plan: Plan) -> str:
    """Return a plan as text: sizes, tile counts, pieces and reasons, a line each."""
    t = plan.tiles
    visible = "" if plan.visible is None else f", {plan.visible} visible pairs ({_share(plan)})"
    lines = [
        f"plan for {plan.n_q} queries, {plan.n_k} keys, batch {plan.batch}, heads {plan.heads}/{plan.kv_heads}",
        f"executor {plan.executor}: {plan.schedule}{visible}",
        f"tiles {plan.q_tile}×{plan.k_tile}: {t.live} live of {t.total} ({t.full} full, {t.partial} partial)",
    ]
    if plan.fallback is not None:
        lines.append(f"fallback: {plan.fallback}")
    for group in plan.groups:
        lines.extend(_group(plan, group))
    if (cache := plan.cache) is not None:
        lines.append(f"a cache needs {cache}")
    if (memory := plan.memory) is not None:
        lines.append(f"memory: {memory}")
    lines.extend(f"why: {reason}" for reason in plan.reasons)
    for name, branch in plan.branches:
        lines.append(f"{name}:")
        lines.extend(f"  {line}" for line in print_plan(branch).splitlines())
    return "\n".join(lines)


def _share(plan: Plan) -> str:
    pairs = plan.n_q * plan.n_k * plan.batch * plan.heads
    return f"{100 * (plan.visible or 0) / max(pairs, 1):.4g} %"


def _group(plan: Plan, group: Group) -> list[str]:
    lines = [f"  batch {_numbers(group.batches)}, heads {_numbers(group.heads)}: {len(group.pieces)} pieces"]
    lines.extend(f"    {_piece(plan, piece)}" for piece in group.pieces[:SHOWN])
    if len(group.pieces) > SHOWN:
        lines.append(f"    … and {len(group.pieces) - SHOWN} more")
    return lines


def _piece(plan: Plan, piece: PlanPiece) -> str:
    mask = piece.mask
    if isinstance(mask, int):
        rows, columns = plan.masks[mask].shape
        mask_text = f"mask {mask} ({rows}×{columns})"
    else:
        mask_text = {"full": "no mask", "causal": "causal", "exact": "mask evaluated as it runs"}[mask]
    return f"queries {piece.queries} · keys {piece.keys} · {mask_text}{'' if piece.fresh else ' · merged'}"


def _numbers(values: tuple[int, ...]) -> str:
    if len(values) > 2 and values == tuple(range(values[0], values[-1] + 1)):
        return f"{values[0]}..{values[-1] + 1}"
    return ", ".join(map(str, values))
