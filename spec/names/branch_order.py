"""The order in which branches are computed: what they read first."""

from __future__ import annotations

from attnc.spec import program
from attnc.spec.checks.measure import below, expressions
from attnc.spec.diagnostics import Label
from attnc.spec.report import Report


def ordered(branches: tuple[program.Attend, ...], report: Report) -> tuple[program.Attend, ...]:
    """The branches, those that others read first, otherwise as written; a circle is refused."""
    if len(branches) < 2:
        return branches
    import networkx  # only where there is an order to find: it takes as long to import as all of the language

    by_name = {branch.name: branch for branch in branches}
    graph = networkx.DiGraph()
    graph.add_nodes_from(by_name)
    for branch in branches:
        graph.add_edges_from((name, branch.name) for name in _read(branch) & by_name.keys())
    try:
        at = {branch.name: i for i, branch in enumerate(branches)}
        return tuple(by_name[name] for name in networkx.lexicographical_topological_sort(graph, key=at.__getitem__))
    except networkx.NetworkXUnfeasible:
        circle = [edge[1] for edge in networkx.find_cycle(graph)][::-1]
    names = " → ".join(f"`{name}`" for name in [*circle, circle[0]])
    first = by_name[circle[0]]
    also = tuple(Label(by_name[name].span, "in the circle") for name in circle[1:8])
    help_ = "compute what both need in a third branch"
    report.error("A205", f"the branches read each other in a circle: {names}", first.span, also=also, help=help_)
    return branches


def _read(branch: program.Attend) -> set[str]:
    return {node.branch for node in below(expressions(branch)) if isinstance(node, program.BranchRead)}
