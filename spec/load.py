"""From a text to checked programs: parse, resolve, check."""

from __future__ import annotations

from attnc.spec.checks.pattern_checker import check_pattern
from attnc.spec.checks.text_warnings import warn
from attnc.spec.diagnostics import Diagnostic, Label, in_order
from attnc.spec.errors import SpecError
from attnc.spec.names.module_scopes import Loader, Modules
from attnc.spec.names.resolve import resolve_pattern
from attnc.spec.names.unused_definitions import check_definitions
from attnc.spec.program import Program
from attnc.spec.reading.parse import parse
from attnc.spec.report import DiagnosticList
from attnc.spec.source import SourceFile, Span
from attnc.spec.suggest import did_you_mean
from attnc.spec.syntax import ModuleSyntax

__all__ = ["Loader", "check_module", "check_source", "load_program", "load_programs"]

LISTED = 20
"""Patterns that a message lists at most."""


def load_programs(source: SourceFile, loader: Loader) -> tuple[Program, ...]:
    """Every pattern of a text, checked. Raises `SpecError` with all that is wrong, in order of place."""
    return check_module(parse(source), loader)


def check_module(module: ModuleSyntax, loader: Loader) -> tuple[Program, ...]:
    """Every pattern of a syntax tree, checked. Raises `SpecError` with all that is wrong, in order of place."""
    report = DiagnosticList()
    programs = _check(module, loader, report)
    if report.failed:
        raise SpecError(in_order(report.diagnostics))
    return programs


def check_source(source: SourceFile, loader: Loader) -> tuple[Diagnostic, ...]:
    """All that is wrong or doubtful in a text, in order of place. Never raises for what the text says."""
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
    """The pattern `name` of a text, or its only one. Raises `SpecError`, also where the choice is not clear."""
    programs = load_programs(source, loader)
    chosen = [p for p in programs if name is None or p.name == name]
    if len(chosen) == 1:
        return chosen[0]
    raise SpecError((_no_choice(source, [p.name for p in programs], name),))


def _check(module: ModuleSyntax, loader: Loader, report: DiagnosticList) -> tuple[Program, ...]:
    scope = Modules(loader, report).scope(module)
    resolved = [resolve_pattern(scope, pattern, report) for pattern in scope.patterns]
    programs = [check_pattern(r, report) for r in resolved]
    check_definitions(scope, report)
    return tuple(programs)


def _no_choice(source: SourceFile, names: list[str], name: str | None) -> Diagnostic:
    listed = ", ".join(f"`{n}`" for n in names[:LISTED])
    if len(names) > LISTED:
        listed += f" and {len(names) - LISTED:,} more"
    start = Label(Span(source, 0, 0))
    if not names:
        return Diagnostic("A606", f"{source.name} defines no pattern", start, help="write `pattern name` and a body")
    if name is None:
        help_ = f"name one, as in `{source.name}:{names[0]}`"
        return Diagnostic("A606", f"{source.name} defines several patterns: {listed}", start, help=help_)
    help_ = did_you_mean(name, names, f"it defines {listed}")
    return Diagnostic("A606", f"{source.name} has no pattern `{name}`", start, help=help_)
