"""Check the names in a file's definitions, even where no pattern uses them."""

from __future__ import annotations

from attnc.spec.diagnostics import DiagnosticList
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.module_scopes import ModuleScope
from attnc.spec.names.name_resolver import Surroundings
from attnc.spec.syntax import NameExpr


def check_definitions(scope: ModuleScope, report: DiagnosticList) -> None:
    """Report unknown names and cycles in the `def` and `let` of a file."""
    resolver = Resolver(report, Surroundings(alone=True))
    for source in scope.definitions:
        if source.span.source is scope.module.source:
            resolver.prepare(NameExpr(source.span, source.name), scope.names)
