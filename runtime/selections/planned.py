"""The plan of a call whose choices are not known yet."""

from __future__ import annotations

from dataclasses import replace

from attnc.compiler import ir
from attnc.compiler.attentions import alone, asked
from attnc.compiler.keeping import most_kept
from attnc.compiler.planning.plan import Plan, Schedule
from attnc.runtime.selections.placed import choice_of
from attnc.runtime.selections.tokens import tokens_of


def plan_of_choices(whole: Plan, pattern: ir.Pattern) -> Plan:
    """The plan of all that may be chosen, `whole`, with what is known of the choice before a call."""
    branches = whole.branches or ((pattern.nodes[0].name, whole),)
    found = []
    nodes = {node.name: alone(pattern, node, None if node.family is None else 0).attend for node in pattern.nodes}
    for name, plan in branches:
        node = nodes[name.partition("[")[0]]
        read = asked([node.visible])
        items = [item for item in pattern.selections if item.given in read]
        sorted_by = sorted({tensor.made.of for tensor in read if tensor.made is not None})
        reasons = [*map(_in_words, items), *(f"tokens are sorted by `{name}` in every call" for name in sorted_by)]
        found.append((name, _chosen(plan, node, tuple(reasons)) if reasons else plan))
    return replace(whole, branches=tuple(found)) if whole.branches else found[0][1]


def _chosen(plan: Plan, node: ir.Attend, reasons: tuple[str, ...]) -> Plan:
    """The plan of one attention that asks selections, or sorts tokens."""
    schedule: Schedule = "chosen tiles"
    if choice_of(node) is not None:
        schedule = "gathered queries"
    elif tokens_of(node) is not None:
        schedule = "gathered tokens"
    return replace(plan, schedule=schedule, groups=(), masks=(), reasons=reasons)


def _in_words(item: ir.Selection) -> str:
    count = most_kept(item.keep)
    most = "what `keep` leaves" if count is None else f"at most {count} places"
    besides = "" if isinstance(item.always, ir.Truth) and not item.always.value else " and those that it always takes"
    who = "each query takes" if item.rows is None else "each unit of queries takes"
    who = "all queries of a head together take" if item.pairs else who
    return f"{who} {most} of `{item.name}`{besides}; counted is all that it may take"
