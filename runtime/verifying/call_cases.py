"""The shapes of the calls that `verify` compares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from attnc.compiler.lowering.lower import lower
from attnc.compiler.passes.before_keys import needs_tokens
from attnc.runtime.call.example_inputs import head_count
from attnc.spec.checks.measure import Measures, expressions, expressions_of_selection
from attnc.spec.errors import SpecError
from attnc.spec.program import BoundProgram, Expr, KeyRange, Program

AWKWARD = (
    (1, 1, 1, 1, 1, 8, 8),
    (13, 13, 1, 2, 1, 6, 6),
    (31, 31, 2, 6, 2, 16, 24),
    (17, 45, 1, 3, 1, 16, 16),
    (15, 6, 1, 2, 1, 8, 6),
    (129, 129, 1, 5, 1, 72, 40),
)
"""Numbers of queries and keys, batch size, heads, kv heads, head dimensions: none fits the tiles of an executor."""

SHORT_AWKWARD = ((1, 1, 1, 1, 1, 8, 8), (13, 13, 1, 2, 1, 6, 6), (9, 13, 1, 2, 1, 4, 6), (11, 6, 1, 2, 1, 4, 6))
"""Awkward shapes for patterns whose rows are expensive to evaluate."""

AWKWARD_STATES = ((1, 1, 1, 1, 1, 8, 8), (13, 13, 1, 2, 1, 6, 6), (67, 67, 1, 2, 2, 5, 3))
"""Awkward shapes for patterns with states; the last is longer than a chunk."""

FEW_HEADS = 256
"""Grids with more tokens than this are compared with two heads only."""


@dataclass(frozen=True, slots=True)
class CallCase:
    """The shape of a call.

    `own_size`: the extent of dimensions that only inputs have, None for the default. `at_constants`: integer inputs
    hold the constants that the text compares them with.
    """

    n_q: int
    n_k: int
    batch: int
    heads: int
    kv_heads: int
    dk: int
    dv: int
    own_size: int | None = None
    at_constants: bool = False

    def __str__(self) -> str:
        return (
            f"length {self.lengths}, batch {self.batch}, heads {self.heads}/{self.kv_heads}, dims {self.dk}/{self.dv}"
        )

    @property
    def lengths(self) -> str:
        """The numbers of queries and keys, as one number where they are equal."""
        return str(self.n_q) if self.n_q == self.n_k else f"{self.n_q}→{self.n_k}"

    @property
    def counts(self) -> dict[str, int]:
        """The sizes that the evaluator takes as keyword arguments."""
        return {"heads": self.heads, "kv_heads": self.kv_heads, "dk": self.dk, "dv": self.dv}


@dataclass(frozen=True, slots=True)
class ShapeRequest:
    """The shapes that the user requests; None where the user leaves a size open."""

    length: int | None = None
    heads: int | None = None
    kv_heads: int | None = None


def loops(bound: BoundProgram) -> int:
    """Return the loop depth of a pattern's most expensive expression; a row of keys counts as one loop."""
    measures = Measures()
    return max((measures.of(node).loops for node in every_expression(bound.program)), default=0)


def every_expression(pattern: Program) -> Iterator[Expr]:
    """Yield the expressions of attentions, selections, `visible` lines and `combine`."""
    for attend in pattern.attends:
        yield from expressions(attend)
    for item in pattern.selections:
        yield from expressions_of_selection(item)
    yield from pattern.visible
    if pattern.combine is not None:
        yield pattern.combine


def has_state(bound: BoundProgram) -> bool:
    """Whether a pattern carries a state from token to token."""
    return bound.program.recurrence is not None or bool(bound.program.stateful)


def may_differ(bound: BoundProgram) -> bool:
    """Whether a pattern accepts calls with fewer queries than keys."""
    pattern = bound.program
    if has_state(bound) or pattern.segments or pattern.documents is not None:
        return False
    if all(isinstance(attend.over, KeyRange) for attend in pattern.attends):
        return False  # the keys are not tokens, so the tokens are unknown
    return pattern.align is not None or not pattern.needs_align


@lru_cache(maxsize=64)
def takes_more_queries(bound: BoundProgram) -> bool:
    """Whether a pattern accepts more queries than keys; under `align end` the first queries are before key 0."""
    if not may_differ(bound):
        return False
    try:
        return bound.program.align != "end" or needs_tokens(lower(bound)) is None
    except SpecError:  # no executor supports the pattern
        return False


def awkward_cases(bound: BoundProgram, length: int | None, request: ShapeRequest) -> list[CallCase]:
    """Return small and uneven shapes; `length` is the pattern's only length, None where the length is free."""
    costly = bool(bound.program.selections) or loops(bound) > 0
    table = AWKWARD_STATES if has_state(bound) else SHORT_AWKWARD if costly else AWKWARD
    cases = [CallCase(*row) for row in table if _accepts(bound, row[0], row[1])]
    if bound.program.selections and any("dv" in item.type.dims for item in bound.program.inputs):
        cases = [
            replace(case, dv=case.dk) for case in cases
        ]  # `mask` has no v argument and assumes the head dimension of q
    if length is not None:
        cases = [replace(case, n_q=length, n_k=length) for case in cases[1:3][-1:]]
    if length is not None and length > FEW_HEADS:
        cases = [replace(case, heads=2, kv_heads=1) for case in cases]
    return [with_heads(bound, case, request) for case in cases]


def _accepts(bound: BoundProgram, n_q: int, n_k: int) -> bool:
    """Whether a pattern accepts calls with these numbers of queries and keys.

    More queries than keys are used only where the pattern states an `align`.
    """
    if n_q > n_k:
        return bound.program.align is not None and takes_more_queries(bound)
    return n_q == n_k or may_differ(bound)


def with_heads(bound: BoundProgram, case: CallCase, request: ShapeRequest) -> CallCase:
    """Return a shape with the numbers of heads that the user requests, else those that the parameters fix."""
    heads = request.heads or head_count(bound)
    if heads is None and request.kv_heads is None:
        return case
    kv_heads = request.kv_heads or (1 if case.kv_heads < case.heads else heads or 1)
    heads = heads or kv_heads * (case.heads // case.kv_heads)
    return replace(case, heads=heads, kv_heads=kv_heads)
