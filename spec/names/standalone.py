"""The definitions of a file by themselves: their names are checked even where no pattern uses them."""

from __future__ import annotations

from attnc.spec.names.expressions import Resolver
from attnc.spec.names.modules import Scope
from attnc.spec.names.name_resolver import Surroundings
from attnc.spec.report import Report
from attnc.spec.syntax import Name


def check_definitions(scope: Scope, report: Report) -> None:
    """Report unknown names and circles in the file's own `def` and `let`."""
    resolver = Resolver(report, Surroundings(alone=True))
    for source in scope.definitions:
        if source.span.source is scope.module.source:
            resolver.prepare(Name(source.span, source.name), scope.names)
