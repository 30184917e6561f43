"""A unit of tokens: `b = k // block`, with its place."""

from __future__ import annotations

from collections.abc import Mapping

from attnc.spec import program, syntax
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.scope import Symbol
from attnc.spec.report import DiagnosticList

EXAMPLE = "`per a = q // block, b = k // block`"


def resolve_unit(
    binder: syntax.UnitDecl,
    names: Mapping[str, Symbol],
    resolver: Resolver,
    report: DiagnosticList,
) -> program.Unit | None:
    """The unit; None, and a report, where it is not one of queries alone or of keys alone."""
    faults = len(report.diagnostics)
    value = resolver.resolve(binder.value, names)
    places = resolver.measures.of(value).places
    if len(report.diagnostics) > faults:
        return None
    if len(places) != 1:
        both = "both a query and a key" if places else "neither a query nor a key"
        message = f"a unit is a set of queries or of keys, and this depends on {both}"
        report.error("A221", message, binder.value.span, "no unit", help=f"units are written {EXAMPLE}")
        return None
    place: program.PlaceName = "q" if "q" in places else "k"
    return program.Unit(binder.span, program.Binder(binder.name.span, binder.name.id), place, value)
