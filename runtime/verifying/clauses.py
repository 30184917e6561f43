"""The clauses of a relation, and the values that each clause takes during an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from attnc.runtime.verifying.bounds import JUNCTIONS, Bounds, BoundScope, is_condition
from attnc.runtime.verifying.condition_lines import relation_lines, step_lines
from attnc.spec import program
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning.denotation import EvaluationFrame, Meaning, Meanings, Result
from attnc.spec.meaning.evaluate import Evaluator
from attnc.spec.program import BoundProgram, Expr

_SIGNS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


@dataclass(slots=True, eq=False)
class ExercisedClause:
    """A comparison, lookup or aggregate of a relation, and whether it was true and false for some pair.

    `reason`: why the clause has one value for every pair; empty where it can have both values.
    """

    where: str
    text: str
    reason: str = ""
    was_true: bool = False
    was_false: bool = False
    node: Expr | None = None

    @property
    def is_exercised(self) -> bool:
        """Whether the clause was true for some pair and false for another."""
        return self.was_true and self.was_false

    @property
    def is_settled(self) -> bool:
        """Whether the clause was exercised, or has one value for every pair."""
        return self.is_exercised or bool(self.reason)

    @property
    def missing(self) -> str:
        """The value that the clause never had, in words."""
        if not (self.was_true or self.was_false):
            return "never evaluated"
        return "never false" if self.was_true else "never true"


class WatchedMeanings(Meanings):
    """The meanings of a program, which record the values of the clauses of its relation."""

    def __init__(self, bound: BoundProgram, *, more_queries: bool = True) -> None:
        super().__init__(bound.program, bound.values)
        self.clauses: list[ExercisedClause] = []
        self._bounds = Bounds(bound, more_queries=more_queries)
        self._roots = {id(node): where for where, node in relation_lines(bound.program)}
        self._roots |= {id(node): where for where, _, node in step_lines(bound.program)}
        self.lines = [node for _, node in relation_lines(bound.program)]
        self.lines += [node for _, _, node in step_lines(bound.program)]
        self._watched: dict[int, Meaning] = {}
        self._lets: dict[program.Definition, Meaning] = {}

    def of(self, node: Expr) -> Meaning:
        """Return the meaning of an expression; a line of the relation is watched."""
        where = self._roots.get(id(node))
        if where is None:
            return super().of(node)
        if id(node) not in self._watched:
            self._watched[id(node)] = self._clause(node, where, BoundScope(), "")
        return self._watched[id(node)]

    # --- the tree of a condition -------------------------------------------------------------------------------------

    def _clause(self, node: Expr, where: str, scope: BoundScope, prefix: str) -> Meaning:
        match node:
            case program.Literal():
                return super().of(node)
            case program.Operation(op=op, operands=operands) if op in JUNCTIONS:
                first = len(self.clauses)
                parts = [self._clause(operand, where, scope, prefix) for operand in operands]
                return self._junction(op, parts, self.clauses[first:])
            case program.Operation(op="eq" | "ne" as op, operands=(a, b)) if is_condition(a) and is_condition(b):
                left, right = (self._clause(operand, where, scope, prefix) for operand in (a, b))
                return lambda frame: (bool(left(frame)) == bool(right(frame))) is (op == "eq")
            case program.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
                return self._choice(condition, then, otherwise, where, scope, prefix)
            case program.DefinitionUse():
                return self._definition_use(node, where, scope, prefix)
            case _:
                return self._leaf_clause(node, where, scope, prefix)

    def _junction(self, op: str, parts: list[Meaning], clauses: list[ExercisedClause]) -> Meaning:
        if op == "not":
            (part,) = parts
            return lambda frame: not part(frame)
        stop = op == "or"
        unsettled = list(clauses)

        def value(frame: EvaluationFrame) -> Result:
            for i, part in enumerate(parts):
                if bool(part(frame)) is stop:
                    if unsettled:
                        _try(parts[i + 1 :], frame)
                        unsettled[:] = [clause for clause in unsettled if not clause.is_settled]
                    return stop
            return not stop

        return value

    def _choice(
        self, condition: Expr, then: Expr, otherwise: Expr, where: str, scope: BoundScope, prefix: str
    ) -> Meaning:
        truth = self._bounds.truth(condition, scope)
        if truth is not None:
            if not self._bounds.is_constant(condition, scope):
                self._add_clause(condition, where, scope, prefix)
            return self._clause(then if truth else otherwise, where, scope, prefix)
        decides, yes, no = (self._clause(part, where, scope, prefix) for part in (condition, then, otherwise))
        return lambda frame: yes(frame) if decides(frame) else no(frame)

    def _definition_use(self, node: program.DefinitionUse, where: str, scope: BoundScope, prefix: str) -> Meaning:
        definition = node.definition
        if not definition.parameters:
            if self._measures.of_definition(definition).free or prefix:
                return self._clause(definition.body, where, scope, prefix)
            if definition not in self._lets:
                self._lets[definition] = self._clause(definition.body, where, scope, prefix)
            return _memoised(node, self._lets[definition])
        inner = self._bounds.inside(node, scope)
        text = f"{prefix}{_text(node)}: "
        return self._call(node, self._clause(definition.body, where, inner, text))

    def _leaf_clause(self, node: Expr, where: str, scope: BoundScope, prefix: str) -> Meaning:
        meaning = super().of(node)
        clause = self._add_clause(node, where, scope, prefix)

        def value(frame: EvaluationFrame) -> Result:
            result = meaning(frame)
            if result:
                clause.was_true = True
            else:
                clause.was_false = True
            return result

        return value

    def _add_clause(self, node: Expr, where: str, scope: BoundScope, prefix: str) -> ExercisedClause:
        clause = ExercisedClause(where, prefix + _text(node), self._bounds.reason(node, scope), node=node)
        self.clauses.append(clause)
        return clause

    @property
    def is_complete(self) -> bool:
        """Whether every clause so far is settled."""
        return all(clause.is_settled for clause in self.clauses)


class WatchedEvaluator(Evaluator):
    """An evaluator that records the values of clauses."""

    clauses: list[ExercisedClause]

    def meanings_of(self, bound: BoundProgram) -> Meanings:
        """Return watched meanings of a program."""
        result = WatchedMeanings(bound)
        self.clauses = result.clauses
        return result


def clauses_of(bound: BoundProgram, *, more_queries: bool = True) -> list[ExercisedClause]:
    """Return the clauses of a relation without evaluating any; `more_queries` as in `Bounds`."""
    meanings = WatchedMeanings(bound, more_queries=more_queries)
    for line in meanings.lines:
        meanings.of(line)
    return meanings.clauses


def _memoised(node: program.DefinitionUse, body: Meaning) -> Meaning:
    definition, span = node.definition, node.span

    def value(frame: EvaluationFrame) -> Result:
        if definition not in frame.known:
            frame.around.tick(span)
            frame.known[definition] = body(frame)
        return frame.known[definition]

    return value


def _try(parts: list[Meaning], frame: EvaluationFrame) -> None:
    """Evaluate conditions on which the result does not depend; they may be undefined here."""
    for part in parts:
        try:
            part(frame)
        except EvaluationError as error:
            if any(d.code == "A908" for d in error.diagnostics):
                raise
            return


def _text(node: Expr) -> str:
    if isinstance(node, program.Operation) and node.op in _SIGNS:
        left, right = (" ".join(operand.span.text.split()) for operand in node.operands)
        return f"{left} {_SIGNS[node.op]} {right}"
    return " ".join(node.span.text.split())
