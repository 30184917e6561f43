"""Resolve a recurrence: its states, its lines in order, and the processing order of the tokens.

Branches with a state process tokens one after another beside branches with keys.
"""

from __future__ import annotations

import math
from collections import ChainMap
from dataclasses import replace
from typing import ClassVar

from attnc.spec import program, syntax
from attnc.spec.diagnostics import Label
from attnc.spec.names.bodies import BodyResolver
from attnc.spec.names.constants import NotConstant, constant
from attnc.spec.names.dimensions import Dimensions
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.families import family_of, range_of
from attnc.spec.names.module_scopes import let_source
from attnc.spec.names.scope import (
    BranchSymbol,
    DefinitionSource,
    DefinitionSymbol,
    RangeSymbol,
    SilentSymbol,
    StateSymbol,
    Symbol,
    walk,
)
from attnc.spec.names.worlds import World

RECURRENT = frozenset(
    {
        *("state", "let", "step", "read", "scan", "reset"),
        *("input", "learned", "tokens", "require", "preset", "documents", "approximate"),
    }
)
"""The words that begin a statement of a recurrence."""


def stateful_lets(statements: tuple[syntax.Statement, ...]) -> frozenset[str]:
    """Return the `let` names that read a state, directly or through others; each is computed where it stands."""
    states = {item.name.id for item in statements if isinstance(item, syntax.Declaration) and item.word.id == "state"}
    lets: set[str] = set()
    for item in statements:
        if isinstance(item, syntax.DefinitionDecl) and item.word.id == "let":
            names = {node.id for node in walk(item.value) if isinstance(node, syntax.NameExpr)}
            if names & (states | lets):
                lets.add(item.name.id)
    return frozenset(lets)


class RecurrenceResolver(BodyResolver):
    """Resolves one recurrence."""

    def __init__(
        self,
        name: syntax.NameExpr,
        statements: tuple[syntax.Statement, ...],
        names: ChainMap[str, Symbol],
        dimensions: Dimensions,
        resolver: Resolver,
    ) -> None:
        super().__init__(statements, names, resolver)
        self.name = name
        self._dimensions = dimensions

    def resolve(self, stateful: frozenset[str]) -> program.RecurrenceClauses:
        """Return the recurrence. `stateful`: the `let` names that are lines of the recurrence."""
        states = tuple(self._state(item) for item in self._lines(syntax.Declaration, "state"))
        waiting = {item.name.id: item.name for item in self._lines(syntax.DefinitionDecl, "let")}
        lines: list[program.Line] = []
        for item in self._statements:
            if isinstance(item, syntax.DefinitionDecl) and item.word.id == "let" and item.name.id in stateful:
                self._check_order(item.value, waiting, stateful)
                waiting.pop(item.name.id, None)
                line = self._let(item)
                lines += [] if line is None else [line]
            elif isinstance(item, syntax.DefinitionDecl) and item.word.id == "step":
                self._check_order(item.value, waiting, stateful)
                step = self._step(item)
                lines += [] if step is None else [step]
            elif isinstance(item, syntax.ClauseStatement) and item.word.id == "read":
                self._check_order(item.value, waiting, stateful)
                lines.append(program.ReadClause(item.span, self._line(item.value)))
        self._check_complete(states, lines)
        return program.RecurrenceClauses(
            self.name.span,
            self.name.id,
            states,
            tuple(lines),
            self._clause("scan"),
            self._clause("reset"),
        )

    # --- states ------------------------------------------------------------------------------------------------------

    def _state(self, item: syntax.Declaration) -> program.StateClause:
        dims = self._dimensions.state_dims(item.type)
        is_complex = item.type.name is not None and item.type.name.id == "complex"
        state = program.StateClause(item.name.span, item.name.id, dims, self._start(item.default), is_complex)
        self._declare(item.name, StateSymbol(item.name.span, state))
        return state

    def _start(self, value: syntax.Expr | None) -> float:
        """Return the value of each state entry before the first token."""
        if value is None:
            return 0.0
        sign, inner = (-1, value.operand) if isinstance(value, syntax.UnaryExpr) and value.op == "-" else (1, value)
        if isinstance(inner, syntax.NameExpr) and inner.id == "inf":
            return sign * math.inf
        try:
            return float(constant(value))  # type: ignore[arg-type]  # a list raises TypeError
        except NotConstant as fault:
            self._report.error("A402", fault.message, fault.span, fault.label, help=fault.help)
        except TypeError:
            help_ = "all entries of a state have the same start value: `= 0`, `= -inf`"
            self._report.error("A301", "the start value of a state must be a number", value.span, "a list", help=help_)
        return 0.0

    # --- lines -------------------------------------------------------------------------------------------------------

    def _let(self, item: syntax.DefinitionDecl) -> program.Let | None:
        if item.parameters:
            message = "a `let` with parameters that reads a state is not supported yet"
            self._report.error("A701", message, item.name.span, help="write the expression where it is needed")
            self._declare(item.name, SilentSymbol(item.name.span))
            return None
        value = self._line(item.value)
        binder = program.Binder(item.name.span, item.name.id)
        self._declare(item.name, RangeSymbol(item.name.span, binder))
        return program.Let(item.span, binder, value)

    def _step(self, item: syntax.DefinitionDecl) -> program.StepClause | None:
        symbol = self._names.get(item.name.id)
        if not isinstance(symbol, StateSymbol):
            if not isinstance(symbol, SilentSymbol):
                help_ = f"declare it: `state {item.name.id}: [dk, dv]`"
                self._report.error(
                    "A201", f"there is no state `{item.name.id}`", item.name.span, "not a state", help=help_
                )
            return None
        if item.each is None:
            return program.StepClause(item.span, symbol.state, self._line(item.value), None)
        repeat = self._repeat(item.each)
        if repeat is None:
            return None
        inner = self._names.new_child({repeat.binder.name: RangeSymbol(repeat.span, repeat.binder)})
        return program.StepClause(item.span, symbol.state, self._line(item.value, inner), repeat)

    def _repeat(self, each: syntax.ForClause) -> program.KeyRange | None:
        variable = each.runnings[0]
        domain = variable.domain
        if len(each.runnings) > 1 or each.condition is not None or domain is None:
            help_ = "write one range: `step S = … for j in 0 .. n`"
            self._report.error("A210", "a repeated step needs a range", each.span, "over what?", help=help_)
            return None
        if variable.name.id in self._names:
            also = (Label(self._names[variable.name.id].span, "the name it hides"),)
            message, help_ = f"`{variable.name.id}` hides a name", "choose another name"
            self._report.error("A211", message, variable.name.span, "already taken", also=also, help=help_)
            return None
        zero = program.Literal(variable.span, 0)
        low, high = (zero, domain) if not isinstance(domain, syntax.RangeExpr) else (domain.low, domain.high)
        ends = [end if isinstance(end, program.Literal) else self._line(end, world="exact") for end in (low, high)]
        return program.KeyRange(variable.span, program.Binder(variable.name.span, variable.name.id), ends[0], ends[1])

    def _line(
        self, value: syntax.Expr, names: ChainMap[str, Symbol] | None = None, world: World = "vector"
    ) -> program.Expr:
        result, fits = self._resolve(value, world, names)
        return result if fits else program.Literal(value.span, 0)

    def _clause(self, word: str) -> program.Expr | None:
        for item in self._clauses(word):
            return self._line(item.value, world="exact")
        return None

    # --- order -------------------------------------------------------------------------------------------------------

    def _check_order(self, value: syntax.Expr, waiting: dict[str, syntax.NameExpr], stateful: frozenset[str]) -> None:
        for node in walk(value):
            if isinstance(node, syntax.NameExpr) and node.id in waiting and node.id in stateful:
                also = (Label(waiting[node.id].span, "computed here"),)
                message = f"`{node.id}` is read before its line"
                help_ = "move the `let` up: it reads a state, so it is computed where it stands"
                self._report.error("A215", message, node.span, "not computed yet", also=also, help=help_)

    def _check_complete(self, states: tuple[program.StateClause, ...], lines: list[program.Line]) -> None:
        if not states:
            help_ = "declare one: `state S: [dk, dv]`"
            message = f"`{self.name.id}` declares no state"
            self._report.error("A215", message, self.name.span, "no `state`", help=help_)
        if not any(isinstance(line, program.ReadClause) for line in lines):
            help_ = "add the output of a token: `read scale * q @ S`"
            self._report.error("A215", f"`{self.name.id}` has no output", self.name.span, "no `read`", help=help_)
        stepped = {line.state for line in lines if isinstance(line, program.StepClause)}
        for state in states:
            if state not in stepped:
                help_ = f"write `step {state.name} = …`, or remove the state"
                self._report.error("A222", f"the state `{state.name}` is never updated", state.span, help=help_)


STATEFUL = frozenset({"state", "step", "read", "scan", "reset"})
"""The words that only a branch with a state may hold; `let` may stand beside them."""


def is_stateful(block: syntax.BlockStatement) -> bool:
    """Whether a branch has a state."""
    return any(item.word.id in STATEFUL for item in block.body.statements)


class StatefulBranch(RecurrenceResolver):
    """Resolves one `branch` with a state. Its name is declared first, so that expressions above may read it."""

    lets: ClassVar[tuple[DefinitionSource, ...]] = ()
    """No definitions: unused `let` statements of a branch with a state are not checked."""

    def __init__(
        self,
        block: syntax.BlockStatement,
        names: ChainMap[str, Symbol],
        dimensions: Dimensions,
        resolver: Resolver,
    ) -> None:
        assert block.name is not None
        super().__init__(block.name, block.body.statements, names.new_child(), dimensions, resolver)
        self._block = block

    @property
    def symbol(self) -> BranchSymbol:
        """Return the symbol of the branch's name."""
        return BranchSymbol(self.name.span, self.name.id, bool(self._block.binders), is_stateful=True)

    def recurrence(self) -> program.RecurrenceClauses:
        """Return the recurrence of the branch."""
        self._check_statements()
        family = self._family()
        stateful = stateful_lets(self._statements)
        for item in self._lines(syntax.DefinitionDecl, "let"):
            if item.name.id not in stateful:
                source = let_source(item, self._names)
                self._declare(item.name, DefinitionSymbol(item.name.span, source))
        surroundings = self._resolver.surroundings
        surroundings.recurrent = True
        try:
            return replace(self.resolve(stateful), family=family)
        finally:
            surroundings.recurrent = False

    def _family(self) -> program.KeyRange | None:
        variable = family_of(self._block, self._report)
        if variable is None:
            return None
        key_range = range_of(variable, lambda end: self._resolver.resolve(end, self._names, world="exact"))
        self._declare(variable.name, RangeSymbol(variable.name.span, key_range.binder))
        return key_range

    def _check_statements(self) -> None:
        first: dict[str, syntax.Statement] = {}
        for item in self._statements:
            word = item.word.id
            if word not in STATEFUL and word != "let":
                message = f"`{word}` does not belong in a branch with a state"
                help_ = "it processes one token at a time, with `state`, `let`, `step`, `read`, `scan`, `reset`"
                self._report.error("A214", message, item.word.span, help=help_)
            elif word in first and word in ("read", "scan", "reset"):
                self._refuse_twice(word, item.span, first[word].span)
            first.setdefault(word, item)
