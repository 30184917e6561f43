"""Load checked programs from a text: parse, resolve and check it."""

from __future__ import annotations

from attnc.spec.checks.pattern_checker import check_pattern
from attnc.spec.checks.text_warnings import warn
from attnc.spec.diagnostics import Diagnostic, DiagnosticList, Label, in_order
from attnc.spec.errors import SpecError
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.module_scopes import Loader, Modules, ModuleScope
from attnc.spec.names.name_resolver import Surroundings
from attnc.spec.names.resolve import PatternResolver
from attnc.spec.program import Program
from attnc.spec.reading.parse import parse
from attnc.spec.source import SourceFile, Span
from attnc.spec.suggest import did_you_mean
from attnc.spec.syntax import ModuleSyntax, NameExpr

LISTED = 20
"""Maximum number of patterns that a message lists."""


def load_programs(source: SourceFile, loader: Loader) -> tuple[Program, ...]:
    """Return the checked patterns of a text. Raises `SpecError` with all errors, sorted by position."""
    return check_module(parse(source), loader)


def check_module(module: ModuleSyntax, loader: Loader) -> tuple[Program, ...]:
    """Return the checked patterns of a syntax tree. Raises `SpecError` with all errors, sorted by position."""
    report = DiagnosticList()
    programs = _check(module, loader, report)
    if report.failed:
        raise SpecError(in_order(report.diagnostics))
    return programs


def check_source(source: SourceFile, loader: Loader) -> tuple[Diagnostic, ...]:
    """Return all errors and warnings of a text, sorted by position. Never raises for an invalid text."""
    report = DiagnosticList()
    try:
        module = parse(source)
        _check(module, loader, report)
        if not report.failed:
            warn(module, report)
    except SpecError as error:
        report.extend(error.diagnostics)
    return in_order(report.diagnostics)


def load_program(source: SourceFile, loader: Loader, name: str | None = None) -> Program:
    """Return the pattern `name` of a text, or the only pattern. Raises `SpecError`, also if several patterns match."""
    programs = load_programs(source, loader)
    matching = [p for p in programs if name is None or p.name == name]
    if len(matching) == 1:
        return matching[0]
    raise SpecError((_no_single_pattern(source, [p.name for p in programs], name),))


def _check(module: ModuleSyntax, loader: Loader, report: DiagnosticList) -> tuple[Program, ...]:
    scope = Modules(loader, report).scope(module)
    resolved = [PatternResolver(scope, pattern, report).resolve() for pattern in scope.patterns]
    programs = [check_pattern(r, report) for r in resolved]
    _check_definitions(scope, report)
    return tuple(programs)


def _no_single_pattern(source: SourceFile, names: list[str], name: str | None) -> Diagnostic:
    listed = ", ".join(f"`{n}`" for n in names[:LISTED])
    if len(names) > LISTED:
        listed += f" and {len(names) - LISTED:,} more"
    label = Label(Span(source, 0, 0))
    if not names:
        return Diagnostic("A606", f"{source.name} defines no pattern", label, help="write `pattern name` and a body")
    if name is None:
        help_ = f"name one, as in `{source.name}:{names[0]}`"
        return Diagnostic("A606", f"{source.name} defines several patterns: {listed}", label, help=help_)
    help_ = did_you_mean(name, names, f"it defines {listed}")
    return Diagnostic("A606", f"{source.name} has no pattern `{name}`", label, help=help_)


def _check_definitions(scope: ModuleScope, report: DiagnosticList) -> None:
    """Report unknown names and cycles in the `def` and `let` of a file, even where no pattern uses them."""
    resolver = Resolver(report, Surroundings(alone=True))
    for source in scope.definitions:
        if source.span.source is scope.module.source:
            resolver.prepare(NameExpr(source.span, source.name), scope.names)
