"""Resolve a unit of tokens, `b = k // block`."""

from __future__ import annotations

from collections.abc import Mapping

from attnc.spec import program, syntax
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.scope import Symbol

EXAMPLE = "`per a = q // block, b = k // block`"


def resolve_unit(binder: syntax.UnitDecl, names: Mapping[str, Symbol], resolver: Resolver) -> program.Unit | None:
    """Return the unit; None after an error about a value that is not of queries only or of keys only."""
    report = resolver.report
    error_count = len(report.diagnostics)
    value = resolver.resolve(binder.value, names)
    places = resolver.measures.of(value).places
    if len(report.diagnostics) > error_count:
        return None
    if len(places) != 1:
        label = "depends on both" if places else "depends on neither"
        message = "a unit must depend on queries only, or on keys only"
        report.error("A221", message, binder.value.span, label, help=f"write units as {EXAMPLE}")
        return None
    place: program.PlaceName = "q" if "q" in places else "k"
    return program.Unit(binder.span, program.Binder(binder.name.span, binder.name.id), place, value)
