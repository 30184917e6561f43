"""Collect the top-level names of files: `def`, `let`, and the names that `use` imports from other files."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from attnc.spec import program, syntax
from attnc.spec.diagnostics import DiagnosticList, Label
from attnc.spec.errors import SpecError
from attnc.spec.names.builtins import FUNCTIONS, RESERVED_NAMES
from attnc.spec.names.scope import DefinitionSource, DefinitionSymbol, SilentSymbol, Symbol
from attnc.spec.reading.parse import parse
from attnc.spec.source import SourceFile, Span
from attnc.spec.suggest import did_you_mean

MAX_USE_DEPTH = 16


class Loader(Protocol):
    """A function that finds the text of a module, given its name and the file that uses it."""

    def __call__(self, name: str, asking: SourceFile, /) -> SourceFile | None:
        """Return the text of the module, or None if there is no such module."""


@runtime_checkable
class Shelf(Protocol):
    """A loader that lists its modules, so that an error can suggest the nearest name."""

    def names(self) -> Iterable[str]:
        """Return the names of the modules that `use` may name."""


@dataclass(frozen=True, slots=True, eq=False)
class ModuleScope:
    """One file with the symbols of its top-level names."""

    module: syntax.ModuleSyntax
    names: dict[str, Symbol] = field(default_factory=dict)

    @property
    def patterns(self) -> tuple[syntax.PatternDecl, ...]:
        """The patterns and recurrences of the file."""
        return tuple(i for i in self.module.items if isinstance(i, syntax.PatternDecl))

    @property
    def definitions(self) -> tuple[DefinitionSource, ...]:
        """The file's own `def` and `let`."""
        source = self.module.source
        sources = (s.source for s in self.names.values() if isinstance(s, DefinitionSymbol))
        return tuple(d for d in sources if d.span.source is source)


class Modules:
    """The files of one compilation; each is read once."""

    def __init__(self, loader: Loader, report: DiagnosticList) -> None:
        self._loader = loader
        self._report = report
        self._scopes: dict[str, ModuleScope | None] = {}
        self._open: list[str] = []

    def scope(self, module: syntax.ModuleSyntax) -> ModuleScope:
        """Return the top-level names of a file, following its `use` lines."""
        scope = ModuleScope(module)
        self._scopes[module.source.name] = scope
        self._open.append(module.source.name)
        for item in module.items:
            match item:
                case syntax.UseDecl():
                    self._use(item, scope)
                case syntax.FunctionDecl():
                    self._declare(scope, item.name, self._function(item, scope))
                case syntax.DefinitionDecl():
                    self._declare(scope, item.name, DefinitionSymbol(item.name.span, let_source(item, scope.names)))
                case syntax.PatternDecl():
                    pass
        for item in module.items:
            if isinstance(item, syntax.FunctionDecl):
                self._check_function_names(item, scope)
        self._check_patterns(scope)
        self._open.pop()
        return scope

    # --- use ---------------------------------------------------------------------------------------------------------

    def _use(self, item: syntax.UseDecl, importer: ModuleScope) -> None:
        scope = self._load(item, importer.module.source)
        for name in item.names:
            symbol = self._exported(scope, name) if scope else SilentSymbol(name.span)
            self._declare(importer, name, symbol)

    def _exported(self, scope: ModuleScope, name: syntax.NameExpr) -> Symbol:
        symbol = scope.names.get(name.id)
        if symbol is not None:
            return symbol
        file = scope.module.source.name
        if any(p.name.id == name.id for p in scope.patterns):
            help_ = "`use` imports `def` and `let`; a pattern is compiled separately"
            self._report.error("A603", f"`{name.id}` is a pattern", name.span, f"defined in {file}", help=help_)
        else:
            listed = ", ".join(f"`{n}`" for n in sorted(scope.names)) or "nothing"
            help_ = did_you_mean(name.id, scope.names, f"it defines {listed}")
            self._report.error("A602", f"{file} does not define `{name.id}`", name.span, "no such name", help=help_)
        return SilentSymbol(name.span)

    def _load(self, item: syntax.UseDecl, asking: SourceFile) -> ModuleScope | None:
        source = self._loader(item.module.id, asking)
        if source is None:
            help_ = f"`use {item.module.id}` reads `{item.module.id}.attn` beside this file, or in the standard library"
            help_ = did_you_mean(item.module.id, self._loader.names() if isinstance(self._loader, Shelf) else (), help_)
            self._report.error(
                "A601", f"no module is named `{item.module.id}`", item.module.span, "not found", help=help_
            )
            return None
        if source.name in self._open:
            path = " → ".join([*self._open[self._open.index(source.name) :], source.name])
            help_ = "move what both need into a third file"
            self._report.error("A604", f"files use each other in a cycle: {path}", item.module.span, help=help_)
            return None
        if len(self._open) >= MAX_USE_DEPTH:
            help_ = "use the file that defines the name directly"
            message = f"`use` is nested more than {MAX_USE_DEPTH} files deep"
            self._report.error("A605", message, item.module.span, "too deep here", help=help_)
            return None
        if source.name not in self._scopes:
            self._scopes[source.name] = self._parse(source)
        return self._scopes[source.name]

    def _parse(self, source: SourceFile) -> ModuleScope | None:
        try:
            module = parse(source)
        except SpecError as error:
            self._report.extend(error.diagnostics)
            return None
        return self.scope(module)

    # --- names of one file -------------------------------------------------------------------------------------------

    def _declare(self, scope: ModuleScope, name: syntax.NameExpr, symbol: Symbol) -> None:
        previous = scope.names.get(name.id)
        if previous is not None:
            self._twice(name, name.span, previous.span)
        elif name.id in RESERVED_NAMES | FUNCTIONS:
            refuse_hiding(self._report, name)
            scope.names[name.id] = SilentSymbol(name.span)
        else:
            # Errors about an imported name point to its use, not to its definition in another file.
            scope.names[name.id] = symbol

    def _twice(self, name: syntax.NameExpr, span: Span, first: Span) -> None:
        also = (Label(first, "first here"),)
        self._report.error(
            "A212", f"`{name.id}` is defined twice", span, "again here", also=also, help="rename one of them"
        )

    def _check_patterns(self, scope: ModuleScope) -> None:
        seen: dict[str, Span] = {}
        for pattern in scope.patterns:
            if pattern.name.id in seen:
                self._twice(pattern.name, pattern.name.span, seen[pattern.name.id])
            seen.setdefault(pattern.name.id, pattern.name.span)

    def _function(self, item: syntax.FunctionDecl, scope: ModuleScope) -> Symbol:
        binders = tuple(program.Binder(p.name.span, p.name.id) for p in item.parameters)
        defaults = tuple(p.default for p in item.parameters)
        if not isinstance(item.value, syntax.Body):
            source = DefinitionSource(
                item.name.span, item.name.id, binders, defaults, item.value, scope.names, {}, is_function=True
            )
            return DefinitionSymbol(item.name.span, source)
        inner: dict[str, Symbol] = {}
        names: ChainMap[str, Symbol] = ChainMap(inner, scope.names)
        outer = {b.name: b for b in binders}
        for statement in item.value.statements:
            if isinstance(statement, syntax.DefinitionDecl) and statement.word.id == "let":
                inner.setdefault(
                    statement.name.id, DefinitionSymbol(statement.name.span, let_source(statement, names, outer))
                )
        result = self._returned(item, item.value)
        if result is None:
            return SilentSymbol(item.name.span)
        source = DefinitionSource(item.name.span, item.name.id, binders, defaults, result, names, {}, is_function=True)
        return DefinitionSymbol(item.name.span, source)

    def _returned(self, item: syntax.FunctionDecl, body: syntax.Body) -> syntax.Expr | None:
        """Return the value of the `return` that ends a body; report other statements than `let`."""
        result: syntax.Expr | None = None
        for i, statement in enumerate(body.statements):
            last = i == len(body.statements) - 1
            if isinstance(statement, syntax.ClauseStatement) and statement.word.id == "return":
                result = statement.value
                if not last:
                    self._report.error(
                        "A215", "`return` is not the last line", statement.word.span, help="move it down"
                    )
            elif not (isinstance(statement, syntax.DefinitionDecl) and statement.word.id == "let"):
                word = statement.word
                help_ = "the body of a `def` holds `let` lines and one `return`"
                self._report.error("A214", f"`{word.id}` does not belong in a `def`", word.span, help=help_)
        if result is None:
            help_ = "end its body with `return` and an expression"
            self._report.error("A215", f"`def {item.name.id}` returns nothing", item.name.span, help=help_)
        return result

    def _check_function_names(self, item: syntax.FunctionDecl, scope: ModuleScope) -> None:
        declared: dict[str, Span] = {}
        for parameter in item.parameters:
            self._check_inner(parameter.name, declared, scope)
            if parameter.type is not None:
                help_ = "remove the type: a `def` accepts any value"
                self._report.error(
                    "A307", "a parameter of a `def` must not have a type", parameter.type.span, help=help_
                )
        statements = item.value.statements if isinstance(item.value, syntax.Body) else ()
        for statement in statements:
            if isinstance(statement, syntax.DefinitionDecl):
                self._check_inner(statement.name, declared, scope)

    def _check_inner(self, name: syntax.NameExpr, declared: dict[str, Span], scope: ModuleScope) -> None:
        if name.id in declared:
            self._twice(name, name.span, declared[name.id])
        elif name.id in scope.names:
            refuse_hiding(self._report, name, scope.names[name.id].span)
        elif name.id in RESERVED_NAMES | FUNCTIONS:
            refuse_hiding(self._report, name)
        declared.setdefault(name.id, name.span)


def refuse_hiding(report: DiagnosticList, name: syntax.NameExpr, hidden: Span | None = None) -> None:
    """Report a name that hides a name of the language, or one declared at the span `hidden`."""
    also = (Label(hidden, "the name it hides"),) if hidden else ()
    kind = "a name" if hidden else "a name of the language"
    report.error("A211", f"`{name.id}` hides {kind}", name.span, "already taken", also=also, help="choose another name")


def refuse_taken(report: DiagnosticList, name: syntax.NameExpr, names: Mapping[str, Symbol]) -> None:
    """Report a name that the language has, or that stands in `names` already."""
    if name.id in RESERVED_NAMES | FUNCTIONS:
        refuse_hiding(report, name)
    elif name.id in names:
        refuse_hiding(report, name, names[name.id].span)


def declare(report: DiagnosticList, names: ChainMap[str, Symbol], name: syntax.NameExpr, symbol: Symbol) -> None:
    """Declare a name in the first map of `names`; report a name that is taken, and silence its further uses."""
    scope = names.maps[0]
    if name.id in scope:
        also = (Label(scope[name.id].span, "first here"),)
        report.error("A212", f"`{name.id}` is declared twice", name.span, "again here", also=also, help="rename one")
    elif name.id in RESERVED_NAMES | FUNCTIONS or name.id in names.parents:
        refuse_taken(report, name, names.parents)
    else:
        scope[name.id] = symbol
    scope.setdefault(name.id, SilentSymbol(name.span))


def let_source(
    item: syntax.DefinitionDecl, names: Mapping[str, Symbol], outer: Mapping[str, program.Binder] | None = None
) -> DefinitionSource:
    """Return the definition source of a `let`."""
    parameters = item.parameters or ()
    binders = tuple(program.Binder(p.span, p.id) for p in parameters)
    return DefinitionSource(
        item.name.span,
        item.name.id,
        binders,
        tuple(None for _ in binders),
        item.value,
        names,
        outer or {},
        is_function=item.parameters is not None,
    )
