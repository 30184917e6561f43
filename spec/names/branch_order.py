"""Order branches and selections so that each is computed after what it reads."""

from __future__ import annotations

from collections.abc import Iterable

from attnc.spec import program
from attnc.spec.checks.measure import below, expressions, expressions_of_selection
from attnc.spec.diagnostics import DiagnosticList, Label

Stage = program.AttentionClauses | program.SelectionClauses


def ordered(
    relation: tuple[program.Expr, ...],
    branches: tuple[program.AttentionClauses, ...],
    selections: tuple[program.SelectionClauses, ...],
    report: DiagnosticList,
) -> tuple[tuple[program.AttentionClauses, ...], tuple[program.SelectionClauses, ...]]:
    """Return the branches and the selections, each after what it reads, otherwise in source order; report a cycle.

    `relation` is part of every branch. Families of selections may read each other, because only their members show
    whether there is a cycle.
    """
    stages: tuple[Stage, ...] = (*branches, *selections)
    if len(stages) < 2 and not selections:
        return branches, selections
    import networkx  # imported only when needed: it takes as long to import as the whole `spec` package

    by_name = {stage.name: stage for stage in stages}
    graph = networkx.DiGraph()
    graph.add_nodes_from(by_name)
    for stage in stages:
        if isinstance(stage, program.AttentionClauses):
            names_read = _read([*expressions(stage), *relation])
        else:
            names_read = _read(expressions_of_selection(stage))
        graph.add_edges_from((name, stage.name) for name in names_read & by_name.keys())
    families = {item.name for item in selections if item.family is not None}
    for component in list(networkx.strongly_connected_components(graph)):
        if component <= families:
            graph.remove_edges_from(list(graph.subgraph(component).edges))
    try:
        source_order = {stage.name: i for i, stage in enumerate(stages)}
        names = list(networkx.lexicographical_topological_sort(graph, key=source_order.__getitem__))
    except networkx.NetworkXUnfeasible:
        _refuse([edge[1] for edge in networkx.find_cycle(graph)][::-1], by_name, report)
        return branches, selections
    sorted_stages = [by_name[name] for name in names]
    return (
        tuple(stage for stage in sorted_stages if isinstance(stage, program.AttentionClauses)),
        tuple(stage for stage in sorted_stages if isinstance(stage, program.SelectionClauses)),
    )


def _refuse(cycle: list[str], by_name: dict[str, Stage], report: DiagnosticList) -> None:
    names = " → ".join(f"`{name}`" for name in [*cycle, cycle[0]])
    first = by_name[cycle[0]]
    also = tuple(Label(by_name[name].span, "in the cycle") for name in cycle[1:8])
    if all(isinstance(by_name[name], program.AttentionClauses) for name in cycle):
        problem, help_ = "the branches read each other", "compute what both need in a third branch"
    elif all(isinstance(by_name[name], program.SelectionClauses) for name in cycle):
        problem, help_ = "the selections read each other", "select in stages, each from the result of the stage before"
    else:
        problem, help_ = "the branches and selections read each other", "select by a branch that reads no selection"
    report.error("A205", f"{problem} in a cycle: {names}", first.span, also=also, help=help_)


def _read(roots: Iterable[program.Expr]) -> set[str]:
    result = set()
    for node in below(roots):
        if isinstance(node, program.BranchRead):
            result.add(node.branch)
        elif isinstance(node, program.SelectedTest | program.SelectedCount):
            result.add(node.selection)
    return result
