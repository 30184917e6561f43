"""The plan of a call that the reference executor runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnc.compiler.planning.build_plan import Relations, build_plan
from attnc.compiler.planning.cpu_plan import Plan, TileCounts, joined
from attnc.runtime.planning import stored_rates

REASON = 'backend="reference": every score, then the mask, in torch, on the device of q'


def reference_plan(attentions: Sequence[tuple[str, Relations]], states: Sequence[str]) -> Plan:
    """Return the dense plan of attentions by name, several as branches; `states`: branches with a state before them."""
    plans = [(name, _dense(relations)) for name, relations in attentions]
    if len(plans) == 1 and not states:
        return plans[0][1]
    whole = joined(plans)
    before = (f"before them the state of `{name}`, token by token" for name in dict.fromkeys(states))
    return replace(whole, reasons=(REASON, *whole.reasons, *before))


def _dense(relations: Relations) -> Plan:
    plan = build_plan(relations, rates=stored_rates.rates())
    total = plan.tiles.total
    return replace(
        plan,
        executor="reference",
        schedule="dense",
        reasons=(REASON,),
        fallback=None,
        tiles=TileCounts(total, total, 0, total),
        groups=(),
        masks=(),
    )
