"""Resolve one pattern: sort its statements into the fields of a `Program` and resolve every name.

Types are checked afterwards, in `spec.checks.pattern_checker`.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from attnc.spec import program, syntax
from attnc.spec.checks.measure import (
    expressions,
    expressions_of_selection,
    lines_of,
    recurrences_of,
    selections_read,
)
from attnc.spec.diagnostics import DiagnosticList, Label
from attnc.spec.meaning.parameter_values import Mismatch, convert
from attnc.spec.names.attention_resolver import Branch, Clauses
from attnc.spec.names.bodies import BodyResolver
from attnc.spec.names.branch_order import ordered
from attnc.spec.names.builtins import CALL_NAMES, RESERVED_NAMES
from attnc.spec.names.constants import NotConstant, constant
from attnc.spec.names.dimensions import Dimensions
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.later import remedy, unsupported
from attnc.spec.names.module_scopes import ModuleScope, let_source, refuse_hiding, refuse_taken
from attnc.spec.names.name_resolver import Surroundings
from attnc.spec.names.recurrence_resolver import (
    RECURRENT,
    RecurrenceResolver,
    StatefulBranch,
    is_stateful,
    stateful_lets,
)
from attnc.spec.names.round_resolver import RoundResolver
from attnc.spec.names.scope import (
    DefinitionSource,
    DefinitionSymbol,
    InputSymbol,
    ParameterSymbol,
    SegmentSymbol,
    SilentSymbol,
    Symbol,
)
from attnc.spec.names.selection_resolver import SelectResolver
from attnc.spec.names.worlds import World
from attnc.spec.reading.limits import MAX_BRANCHES
from attnc.spec.suggest import did_you_mean
from attnc.spec.types import Type

_T = TypeVar("_T")

_ONCE = (
    "read",
    "scan",
    "reset",
    "approximate",
    "align",
    "documents",
    "round",
    "score",
    "weights",
    "value",
    "over",
    "per",
    "pad",
    "combine",
)
_HOME = {
    **dict.fromkeys(("covers", "from", "always"), "a `select`"),
    "keep": "a `round`, or a `select`",
    **dict.fromkeys(("scan", "reset", "read", "step", "state"), "a `recurrence`, or a `branch` with a state"),
    "return": "a `def`",
}
"""Where a statement belongs that may not stand in the body of a pattern."""


@dataclass(frozen=True, slots=True)
class ResolvedPattern:
    """A pattern with its names resolved, before its types are checked.

    `spare`: the definitions that no expression uses. `whole`: no statement was refused as not supported.
    """

    pattern: program.Program
    spare: tuple[program.Definition, ...]
    whole: bool


class PatternResolver(BodyResolver):
    """Resolves one pattern or recurrence of a file; errors go to `report`."""

    def __init__(self, scope: ModuleScope, pattern: syntax.PatternDecl, report: DiagnosticList) -> None:
        self._is_recurrence = pattern.word.id == "recurrence"
        patterns = frozenset(p.name.id for p in scope.patterns)
        self._surroundings = Surroundings(patterns=patterns, recurrent=self._is_recurrence)
        names: ChainMap[str, Symbol] = ChainMap({}, scope.names)
        super().__init__(pattern.body.statements, names, Resolver(report, self._surroundings))
        self._pattern = pattern
        self._surroundings.align = self._align()
        self._dimensions = Dimensions(self._resolver, names, recurrent=self._is_recurrence)
        self._unsupported = False
        self._has_reported_branches = False

    def resolve(self) -> ResolvedPattern:
        """Return the pattern with its names resolved."""
        for parameter in self._pattern.parameters:
            self._declare_of_call(parameter.name, ParameterSymbol(parameter.name.span, parameter.name.id))
        stateful = stateful_lets(self._statements) if self._is_recurrence else frozenset[str]()
        lets = self._declare_lets_besides(stateful)
        self._check_statements()
        parameters = tuple(self._parameter(p) for p in self._pattern.parameters)
        inputs = tuple(self._inputs())
        self._surroundings.segments = segments = tuple(self._segments())
        requirements = tuple(
            program.Requirement(c.span, self._resolver.resolve(c.value, self._names), "call")
            for c in self._clauses("require")
        )
        pads = tuple(self._pads(segments))
        branches = [] if self._unsupported else self._declare_branches()
        selects = [] if self._unsupported else self._declare_selects()
        selections = tuple(self._selected(selects))
        documents, recurrence = self._documents(), None
        relation: tuple[program.Expr, ...] = ()
        attends: tuple[program.AttentionClauses, ...] = ()
        stateful_branches: tuple[program.RecurrenceClauses, ...] = ()
        if self._is_recurrence:
            recurrence = RecurrenceResolver(
                self._pattern.name, self._statements, self._names, self._dimensions, self._resolver
            ).resolve(stateful)
        else:
            stateful_branches = tuple(b.recurrence() for b in branches if isinstance(b, StatefulBranch))
            relation, attends, selections = self._attends(branches, selections)
        result = program.Program(
            span=self._pattern.name.span,
            source=self._pattern.span.source,
            name=self._pattern.name.id,
            docstring=self._pattern.body.doc.value if self._pattern.body.doc else "",
            parameters=tuple(p for p in parameters if p is not None),
            presets=tuple(self._presets({p.name: p for p in parameters if p is not None})),
            requirements=requirements,
            segments=segments,
            inputs=inputs,
            align="end"
            if self._surroundings.align == "end"
            else "start"
            if self._surroundings.align == "start"
            else None,
            needs_align=False,
            documents=documents,
            visible=relation,
            round=self._round(),
            attends=attends,
            combine=self._combine() if branches else None,
            pads=pads,
            approximate=self._approximate(),
            recurrence=recurrence,
            stateful=stateful_branches,
            selections=selections,
        )
        if len(selections) == len(selects) and not self._report.failed:
            self._check_selections_read(result)
        spare = [*lets, *(source for block in (*branches, *selects) for source in block.lets)]
        return ResolvedPattern(result, self._unused_definitions(spare), not self._unsupported)

    # --- names -------------------------------------------------------------------------------------------------------

    def _declare_of_call(self, name: syntax.NameExpr, symbol: Symbol) -> None:
        """Declare a name that calls use as an argument."""
        if name.id in CALL_NAMES:
            message = f"no parameter or input may be named `{name.id}`"
            self._report.error("A213", message, name.span, "reserved for calls", help="choose another name")
            self._names.maps[0].setdefault(name.id, SilentSymbol(name.span))
        else:
            self._declare(name, symbol)

    def _declare_lets_besides(self, others: frozenset[str]) -> list[DefinitionSource]:
        """Declare every `let` except `others`, before resolving any expression that may use it."""
        sources = []
        for item in self._lines(syntax.DefinitionDecl, "let"):
            if item.name.id not in others:
                source = let_source(item, self._names)
                self._declare(item.name, DefinitionSymbol(item.name.span, source))
                sources.append(source)
                self._check_let(item)
        return sources

    def _check_let(self, item: syntax.DefinitionDecl) -> None:
        parameters: set[str] = set()
        for name in item.parameters or ():
            if name.id in parameters:
                refuse_hiding(self._report, name)
            else:
                refuse_taken(self._report, name, self._names)
            parameters.add(name.id)

    # --- statements --------------------------------------------------------------------------------------------------

    def _check_statements(self) -> None:
        """Report statements that are not supported, misplaced or repeated."""
        first: dict[str, syntax.Statement] = {}
        blocks = self._lines(syntax.BlockStatement, "select")
        selections = frozenset(block.name.id for block in blocks if block.name is not None)
        for item in self._statements:
            word = item.word.id
            feature = None if self._is_recurrence else unsupported(item, selections)
            if feature:
                self._refuse_unsupported(item, feature)
            elif self._is_recurrence and word not in RECURRENT:
                help_ = f"it belongs in {_HOME.get(word, 'a `pattern`')}; a recurrence processes one token at a time"
                self._report.error("A214", f"`{word}` does not belong in a `recurrence`", item.word.span, help=help_)
                self._silence(item)
            elif word in _HOME and not self._is_recurrence:
                help_ = f"it belongs in {_HOME[word]}"
                self._report.error("A214", f"`{word}` does not belong in a `pattern`", item.word.span, help=help_)
                self._silence(item)
            elif word in _ONCE and word in first:
                self._refuse_twice(word, item.span, first[word].span)
            elif word == "visible" and "round" in first:
                also = (Label(first["round"].word.span, "rounded here"),)
                message = "`visible` must stand above `round`"
                help_ = "move it up: `round` applies to the lines above it"
                self._report.error("A215", message, item.word.span, "out of place", also=also, help=help_)
            first.setdefault(word, item)

    def _refuse_unsupported(self, item: syntax.Statement, feature: str) -> None:
        word = item.word
        message = f"`{word.id}` with {feature} is not supported yet"
        self._report.error("A703", message, word.span, "not compiled yet", help=remedy(feature))
        if not self._unsupported:
            for other in self._statements:
                if other.word.id in ("branch", "over", "per", "select"):
                    self._silence(other)
        self._unsupported = True

    def _silence(self, item: syntax.Statement) -> None:
        """Declare the names of a refused statement as silent, so that their uses are not reported too."""
        names: list[syntax.NameExpr] = []
        match item:
            case syntax.DefinitionDecl(name=name) | syntax.Declaration(name=name):
                names = [name]
            case syntax.BinderClause(binders=binders):
                names = [b.name for b in binders if not isinstance(b, syntax.AxisDecl)]
            case syntax.BlockStatement(name=block) if block is not None:
                names = [block]
            case _:
                pass
        for name in names:
            if name.id not in RESERVED_NAMES:
                self._declare(name, SilentSymbol(name.span))

    def _parameter(self, item: syntax.ParameterDecl) -> program.Parameter | None:
        type_ = self._dimensions.parameter_type(item)
        if type_ is None:
            self._names[item.name.id] = SilentSymbol(item.name.span)
            return None
        default: program.Value | None = None
        if item.default is not None:
            default = self._constant(item.default, type_)
        return program.Parameter(item.name.span, item.name.id, type_, default)

    def _constant(self, expression: syntax.Expr, type_: Type) -> program.Value | None:
        lengths = tuple(d if isinstance(d, int) else None for d in type_.dims)
        try:
            return convert(constant(expression), type_, lengths)
        except NotConstant as fault:
            self._report.error("A402", fault.message, fault.span, fault.label, help=fault.help)
        except Mismatch as fault:
            kind = "`true` or `false`" if str(type_) == "bool" else f"a value of the type `{type_}`"
            help_ = f"write {kind}, or declare another type"
            self._report.error(
                "A301", f"this parameter expects {fault}", expression.span, f"expected {type_}", help=help_
            )
        return None

    def _inputs(self) -> Iterable[program.Input]:
        for item in self._statements:
            if not isinstance(item, syntax.Declaration) or item.word.id not in ("input", "learned"):
                continue
            type_ = self._dimensions.input_type(item)
            symbol: Symbol = SilentSymbol(item.name.span)
            if type_ is not None:
                tensor = program.Input(item.name.span, item.name.id, type_, item.word.id == "learned")
                symbol = InputSymbol(item.name.span, tensor)
                yield tensor
            self._declare_of_call(item.name, symbol)
            if item.default is not None:
                help_ = "remove the default; a call must give every input"
                self._report.error(
                    "A705", "the default of an input is not supported yet", item.default.span, help=help_
                )

    def _segments(self) -> Iterable[program.TokenSegment]:
        lines = self._lines(syntax.BinderClause, "tokens")
        for line in lines:
            if line.name is None and len(lines) > 1:
                help_ = "name each one: `tokens video(t: frames, y: height)`"
                self._report.error("A217", "several `tokens` lines need names", line.span, help=help_)
            segment = self._dimensions.segment(line)
            if line.name is not None:
                self._declare(line.name, SegmentSymbol(line.name.span, segment))
            yield segment

    def _pads(self, segments: tuple[program.TokenSegment, ...]) -> Iterable[program.Pad]:
        axes = {axis.name: (segment, i) for segment in segments for i, axis in enumerate(segment.axes)}
        for binder in (b for line in self._lines(syntax.BinderClause, "pad") for b in line.binders):
            assert isinstance(binder, syntax.AxisDecl)
            if not isinstance(binder.domain, syntax.RangeExpr):
                message = "`pad` needs a range of keys along an axis, got an extent"
                help_ = f"write `{binder.name.id}: 0 .. {binder.domain.span.text}`; keys may begin below 0"
                self._report.error("A304", message, binder.domain.span, "an extent", help=help_)
            elif len(segments) != 1:
                help_ = "remove the other `tokens` lines, or pad the tensors before the call"
                self._report.error("A703", "`pad` with several segments is not supported yet", binder.span, help=help_)
            elif binder.name.id not in axes:
                help_ = did_you_mean(binder.name.id, axes, "name an axis of `tokens`")
                self._report.error("A203", f"no axis is named `{binder.name.id}`", binder.name.span, help=help_)
            else:
                low, high = (self._resolver.resolve(e, self._names) for e in (binder.domain.low, binder.domain.high))
                yield program.Pad(binder.span, *axes[binder.name.id], low, high)

    def _attends(
        self, branches: list[Branch | StatefulBranch], selections: tuple[program.SelectionClauses, ...]
    ) -> tuple[tuple[program.Expr, ...], tuple[program.AttentionClauses, ...], tuple[program.SelectionClauses, ...]]:
        """Return the shared relation, the attentions and the selections, each ordered after what it reads."""
        name, clauses = self._pattern.name, Clauses(self._statements, self._names, self._resolver)
        if self._unsupported:
            return clauses.relation(), (program.AttentionClauses(name.span, name.id, ()),), ()
        clauses.places()
        defaults = clauses.attend(name.id, name.span)
        relation, defaults = defaults.visible, replace(defaults, visible=())
        attends = tuple(branch.attention(defaults) for branch in branches if isinstance(branch, Branch))
        self._check_combine(branches)
        with_state = next((branch for branch in branches if isinstance(branch, StatefulBranch)), None)
        if with_state is not None and relation:
            also = (Label(relation[0].span, "applies to every branch"),)
            message = f"`visible` cannot apply to `{with_state.name.id}`, a branch with a state and without keys"
            help_ = "move `visible` into the branches that have keys"
            self._report.error("A215", message, with_state.name.span, also=also, help=help_)
        attends = attends or (() if branches else (defaults,))
        return relation, *ordered(relation, attends, selections, self._report)

    def _declare_branches(self) -> list[Branch | StatefulBranch]:
        """Declare the branches before resolving any expression that may read them."""
        branches: list[Branch | StatefulBranch] = []
        for block in self._lines(syntax.BlockStatement, "branch"):
            if block.name is not None:
                if len(branches) == MAX_BRANCHES:
                    self._refuse_branches(block.name)
                    self._silence(block)
                    continue
                branch: Branch | StatefulBranch
                if is_stateful(block):
                    branch = StatefulBranch(block, self._names, self._dimensions, self._resolver)
                else:
                    branch = Branch(block, self._names, self._resolver)
                self._declare(block.name, branch.symbol)
                branches.append(branch)
        return branches

    def _refuse_branches(self, name: syntax.NameExpr) -> None:
        """Report that there are too many branches, once."""
        if not self._has_reported_branches:
            message = f"`{self._pattern.name.id}` has more than {MAX_BRANCHES} branches"
            help_ = "write similar branches as a family: `branch near[c in 0 .. n]`; or merge their conditions"
            self._report.error("A508", message, name.span, "the first branch too many", help=help_)
        self._has_reported_branches = True

    def _declare_selects(self) -> list[SelectResolver]:
        """Declare the selections before resolving any expression that may read them."""
        selects = []
        for block in self._lines(syntax.BlockStatement, "select"):
            if block.name is not None:
                select = SelectResolver(block, self._names, self._resolver)
                self._declare(block.name, select.symbol)
                selects.append(select)
        return selects

    def _selected(self, selects: list[SelectResolver]) -> Iterable[program.SelectionClauses]:
        """Yield the resolved selections, each available to the ones after it."""
        for select in selects:
            selection = select.selection()
            if selection is not None:
                self._surroundings.selected[selection.name] = selection
                yield selection

    def _check_selections_read(self, result: program.Program) -> None:
        """Report selections that nothing reads."""
        roots = [*result.visible, *(() if result.combine is None else (result.combine,))]
        for attend in result.attends:
            roots += expressions(attend)
        for selection in result.selections:
            roots += expressions_of_selection(selection)
        for item in recurrences_of(result):
            roots += lines_of(item)
        read = selections_read(roots)
        for selection in result.selections:
            if selection.name not in read:
                help_ = f"read it: `visible k in {selection.name}`; or remove it"
                message = f"nothing reads the selection `{selection.name}`"
                self._report.error("A224", message, selection.span, "never read", help=help_)

    def _check_combine(self, branches: list[Branch | StatefulBranch]) -> None:
        clauses = self._clauses("combine")
        if branches and not clauses:
            names = ", ".join(f"`{branch.name.id}`" for branch in branches)
            help_ = f"add `combine {branches[0].name.id}`, or an expression of {names}"
            self._report.error("A215", "the pattern has branches but no `combine`", branches[0].name.span, help=help_)
        if clauses and not branches:
            help_ = "declare a branch: `branch near`, with a body"
            self._report.error(
                "A215", "`combine` needs branches, and the pattern has none", clauses[0].span, help=help_
            )

    def _approximate(self) -> program.Expr | None:
        """Return `n` of `approximate conjugate_gradient(n)`, the number of steps; None without such a line."""
        for clause in self._clauses("approximate"):
            value = clause.value
            is_call = isinstance(value, syntax.CallExpr) and isinstance(value.function, syntax.NameExpr)
            if is_call and value.function.id == "conjugate_gradient" and len(value.arguments) == 1:  # type: ignore[union-attr]
                return self._resolver.resolve(value.arguments[0].value, self._names)  # type: ignore[union-attr]
            help_ = "write `approximate conjugate_gradient(8)`: 8 steps for every `solve`"
            message = "the only supported approximation is `conjugate_gradient(n)`"
            self._report.error("A223", message, value.span, "not supported", help=help_)
        return None

    def _combine(self) -> program.Expr | None:
        for clause in self._clauses("combine"):
            result, fits = self._resolve(clause.value, "vector")
            return result if fits else None
        return None

    def _round(self) -> program.RoundClause | None:
        blocks = self._lines(syntax.BlockStatement, "round")
        return RoundResolver(blocks[0], self._names, self._resolver).resolve() if blocks else None

    def _align(self) -> str | None:
        for item in self._clauses("align"):
            value = item.value
            if isinstance(value, syntax.NameExpr) and value.id in ("end", "start"):
                return value.id
            listed = "`align end` puts the last query at the last key, `align start` the first query at the first key"
            help_ = did_you_mean(value.span.text, ("start", "end"), listed)
            self._report.error("A218", "`align` must be `start` or `end`", value.span, "neither", help=help_)
        return None

    def _documents(self) -> program.Input | None:
        for item in self._clauses("documents"):
            value = item.value
            symbol = self._names.get(value.id) if isinstance(value, syntax.NameExpr) else None
            if isinstance(symbol, SilentSymbol):
                continue
            if isinstance(symbol, InputSymbol):
                tensor = symbol.input
                if tensor.type.kind == "int" and tensor.type.dims in (("batch", "token"), ("token",)):
                    return tensor
            help_ = "declare `input doc: int[batch, token]` and write `documents doc`"
            if isinstance(value, syntax.NameExpr) and symbol is None:
                help_ = did_you_mean(
                    value.id, (n for n, s in self._names.maps[0].items() if isinstance(s, InputSymbol)), help_
                )
            message = "`documents` needs an int input with the dimensions `[batch, token]` or `[token]`"
            self._report.error("A219", message, value.span, "not such an input", help=help_)
        return None

    def _presets(self, parameters: dict[str, program.Parameter]) -> Iterable[program.Preset]:
        seen: dict[str, program.Preset] = {}
        for item in self._clauses("preset"):
            call = item.value
            if not isinstance(call, syntax.CallExpr) or not isinstance(call.function, syntax.NameExpr):
                help_ = "write `preset name(parameter = value, …)`"
                self._report.error("A220", "a preset must name the parameters that it sets", call.span, help=help_)
                continue
            name = call.function
            preset = program.Preset(name.span, name.id, dict(self._preset_values(call, parameters)))
            if name.id in seen:
                also = (Label(seen[name.id].span, "first here"),)
                self._report.error(
                    "A212", f"the preset `{name.id}` is defined twice", name.span, also=also, help="rename one"
                )
            seen.setdefault(name.id, preset)
            yield preset

    def _preset_values(
        self, call: syntax.CallExpr, parameters: dict[str, program.Parameter]
    ) -> Iterable[tuple[str, program.Value]]:
        seen: set[str] = set()
        for argument in call.arguments:
            if argument.name is None:
                help_ = "write `parameter = value`"
                self._report.error("A220", "a value of a preset needs its parameter's name", argument.span, help=help_)
                continue
            name = argument.name
            if name.id not in parameters:
                if name.id not in self._names.maps[0]:
                    help_ = did_you_mean(name.id, parameters, "the pattern's parameters are declared in its first line")
                    self._report.error("A201", f"the pattern has no parameter `{name.id}`", name.span, help=help_)
                continue
            if name.id in seen:
                self._report.error("A212", f"`{name.id}` is given twice", name.span, help="keep one")
            seen.add(name.id)
            value = self._constant(argument.value, parameters[name.id].type)
            if value is not None:
                yield name.id, value

    def _unused_definitions(self, lets: list[DefinitionSource]) -> tuple[program.Definition, ...]:
        """Return the unused definitions of a supported pattern, so that they are checked as well."""
        if self._unsupported:
            return ()
        definitions = []
        floating = ("score", "weights", "value", "combine")
        selects = bool(self._lines(syntax.BlockStatement, "select"))
        world: World = "float" if selects or any(self._clauses(word) for word in floating) else "exact"
        if self._is_recurrence:
            world = "vector"
        for source in lets:
            if self._resolver.is_used(source) or self._resolver.takes_units(source):
                continue
            self._resolver.prepare(syntax.NameExpr(source.span, source.name), source.names, world)
            definition = self._resolver.define(source, world)
            if definition is not None:
                definitions.append(definition)
        return tuple(definitions)
