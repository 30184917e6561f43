"""The segments that a query or key may be in at a point of an expression; coordinates are checked against them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from attnc.spec import program


@dataclass(frozen=True, slots=True)
class Facts:
    """The segments that the query `q` and the key `k` may be in."""

    q: frozenset[program.TokenSegment]
    k: frozenset[program.TokenSegment]

    def of(self, place: str) -> frozenset[program.TokenSegment]:
        """Return the segments that `place` may be in."""
        return self.q if place == "q" else self.k

    def placed_in(self, place: str, segments: frozenset[program.TokenSegment]) -> Facts:
        """Return the facts with `place` restricted to `segments`."""
        return replace(self, q=segments) if place == "q" else replace(self, k=segments)

    def joined(self, other: Facts) -> Facts:
        """Return the facts that hold in both cases: each place may be in the segments of either."""
        return Facts(self.q | other.q, self.k | other.k)


class Guards:
    """Derives facts from conditions; visits each definition once for the same facts."""

    def __init__(self) -> None:
        self._memo: dict[tuple[program.Definition, bool, Facts], Facts] = {}

    def after(self, node: program.Expr, truth: bool, facts: Facts) -> Facts:
        """Return the facts that hold where `node` has the truth value `truth`."""
        match node:
            case program.InSegment(place=place, segment=segment):
                segments = facts.of(place)
                return facts.placed_in(place, segments & {segment} if truth else segments - {segment})
            case program.Operation(op="not", operands=(operand,)):
                return self.after(operand, not truth, facts)
            case program.Operation(op="and", operands=operands):
                return self._all(operands, True, facts) if truth else self._some(operands, True, facts)
            case program.Operation(op="or", operands=operands):
                return self._some(operands, False, facts) if truth else self._all(operands, False, facts)
            case program.DefinitionUse(definition=definition):
                return self._definition(definition, truth, facts)
            case _:
                return facts

    def _all(self, operands: Iterable[program.Expr], truth: bool, facts: Facts) -> Facts:
        for operand in operands:
            facts = self.after(operand, truth, facts)
        return facts

    def _some(self, operands: Iterable[program.Expr], passed: bool, facts: Facts) -> Facts:
        """Return the facts where some operand differs from `passed`, and all operands before it equal `passed`."""
        joined: Facts | None = None
        for operand in operands:
            operand_facts = self.after(operand, not passed, facts)
            joined = operand_facts if joined is None else joined.joined(operand_facts)
            facts = self.after(operand, passed, facts)
        return joined or facts

    def _definition(self, definition: program.Definition, truth: bool, facts: Facts) -> Facts:
        key = (definition, truth, facts)
        if key not in self._memo:
            self._memo[key] = self.after(definition.body, truth, facts)
        return self._memo[key]
