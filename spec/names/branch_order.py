"""The order in which branches and selections are computed: what they read first."""

from __future__ import annotations

from collections.abc import Iterable

from attnc.spec import program
from attnc.spec.checks.measure import below, expressions, expressions_of_selection
from attnc.spec.diagnostics import Label
from attnc.spec.report import DiagnosticList

Stage = program.AttentionClauses | program.SelectionClauses


def ordered(
    relation: tuple[program.Expr, ...],
    branches: tuple[program.AttentionClauses, ...],
    selections: tuple[program.SelectionClauses, ...],
    report: DiagnosticList,
) -> tuple[tuple[program.AttentionClauses, ...], tuple[program.SelectionClauses, ...]]:
    """The branches and the selections, those that others read first, otherwise as written; a circle is refused.

    `relation` is part of every branch. Selections of families may ask others of these families: which ones, and that
    it is in no circle, their members tell.
    """
    stages: tuple[Stage, ...] = (*branches, *selections)
    if len(stages) < 2 and not selections:
        return branches, selections
    import networkx  # only where there is an order to find: it takes as long to import as all of the language

    by_name = {stage.name: stage for stage in stages}
    graph = networkx.DiGraph()
    graph.add_nodes_from(by_name)
    for stage in stages:
        if isinstance(stage, program.AttentionClauses):
            read = _read([*expressions(stage), *relation])
        else:
            read = _read(expressions_of_selection(stage))
        graph.add_edges_from((name, stage.name) for name in read & by_name.keys())
    families = {item.name for item in selections if item.family is not None}
    for circle in list(networkx.strongly_connected_components(graph)):
        if circle <= families:
            graph.remove_edges_from(list(graph.subgraph(circle).edges))
    try:
        at = {stage.name: i for i, stage in enumerate(stages)}
        names = list(networkx.lexicographical_topological_sort(graph, key=at.__getitem__))
    except networkx.NetworkXUnfeasible:
        _refuse([edge[1] for edge in networkx.find_cycle(graph)][::-1], by_name, report)
        return branches, selections
    found = [by_name[name] for name in names]
    return (
        tuple(stage for stage in found if isinstance(stage, program.AttentionClauses)),
        tuple(stage for stage in found if isinstance(stage, program.SelectionClauses)),
    )


def _refuse(circle: list[str], by_name: dict[str, Stage], report: DiagnosticList) -> None:
    names = " → ".join(f"`{name}`" for name in [*circle, circle[0]])
    first = by_name[circle[0]]
    also = tuple(Label(by_name[name].span, "in the circle") for name in circle[1:8])
    if all(isinstance(by_name[name], program.AttentionClauses) for name in circle):
        what, help_ = "the branches read each other", "compute what both need in a third branch"
    elif all(isinstance(by_name[name], program.SelectionClauses) for name in circle):
        what, help_ = "the selections ask each other", "choose in stages, each from what the one before it kept"
    else:
        what, help_ = "the branches and selections read each other", "choose by a branch that asks no selection"
    report.error("A205", f"{what} in a circle: {names}", first.span, also=also, help=help_)


def _read(roots: Iterable[program.Expr]) -> set[str]:
    result = set()
    for node in below(roots):
        if isinstance(node, program.BranchRead):
            result.add(node.branch)
        elif isinstance(node, program.SelectedTest | program.SelectedCount):
            result.add(node.selection)
    return result
