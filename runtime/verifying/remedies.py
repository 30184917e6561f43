"""Suggest options for a clause that no call made both true and false."""

from __future__ import annotations

from attnc.runtime.verifying.clauses import ExercisedClause
from attnc.runtime.verifying.compared import MOST_HEADS, heads_needed, reads_heads
from attnc.runtime.verifying.condition_lines import constants
from attnc.runtime.verifying.exercise import Look
from attnc.spec.checks.measure import below, inputs_read
from attnc.spec.program import BoundProgram, Coordinate, ParameterRead, PositionRead


def remedy(look: Look, clause: ExercisedClause | None = None) -> str:
    """Return the options that may exercise a clause, or all options if it has none; empty without clauses."""
    bound = look.choice.bound
    if not look.clauses:
        return ""
    nodes = [] if clause is None or clause.node is None else list(below([clause.node]))
    options = [
        *(["smaller parameters with -p"] if any(isinstance(node, ParameterRead) for node in nodes) else []),
        *([_heads_option(look)] if any(map(reads_heads, nodes)) else []),
        *([_length_option(look)] if any(isinstance(node, PositionRead | Coordinate) for node in nodes) else []),
    ]
    names = sorted(item.name for item in inputs_read(nodes))
    if names:
        listed = " and ".join(f"`{name}`" for name in names)
        return f"; no example of {listed} exercises it: compare a call of your own with `.reference`"
    return "; use " + ", or ".join(options or _all_options(bound))


def _all_options(bound: BoundProgram) -> list[str]:
    counts = any(p.type.kind == "int" for p in bound.program.parameters)
    return [*(["smaller parameters with -p"] if counts else []), "another --len"]


def _heads_option(look: Look) -> str:
    """Return another number of heads: the number that constants need, if the call has fewer."""
    needed = max(heads_needed(look.choice.bound, MOST_HEADS**2))
    return f"--heads {needed}" if needed > look.case.heads else "another --heads"


def _length_option(look: Look) -> str:
    """Return another length: beyond the largest constant of the text, if the call is shorter."""
    largest = max(constants(look.choice.bound.program), default=0)
    return f"--len {largest + 2} or more" if largest + 2 > look.case.n_k else "another --len"
