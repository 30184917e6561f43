"""The definitions of a file by themselves: their names are checked even where no pattern uses them."""

from __future__ import annotations

from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.module_scopes import ModuleScope
from attnc.spec.names.name_resolver import Surroundings
from attnc.spec.report import DiagnosticList
from attnc.spec.syntax import NameExpr


def check_definitions(scope: ModuleScope, report: DiagnosticList) -> None:
    """Report unknown names and circles in the file's own `def` and `let`."""
    resolver = Resolver(report, Surroundings(alone=True))
    for source in scope.definitions:
        if source.span.source is scope.module.source:
            resolver.prepare(NameExpr(source.span, source.name), scope.names)
