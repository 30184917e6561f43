"""Lowering of `round`: the relation moves into the condition on blocks, with q and k running inside the units."""

from __future__ import annotations

from typing import Literal, NoReturn

from attnc.compiler import ir
from attnc.compiler.ir import Index, fold, value_nodes
from attnc.compiler.lowering.lower_expressions import Lowering, LoweringScope
from attnc.compiler.lowering.lower_units import Numbered, PositionRange, UnitMembers, form_of, numbers_of
from attnc.compiler.lowering.lowered_operations import fail
from attnc.spec import program as checked


def lower_round(item: checked.RoundClause, program: checked.Program, lowering: Lowering) -> Index:
    """Lower a `round` clause to the rounded relation. Raises SpecError (A701) for units that are not supported."""
    scope = LoweringScope()
    sides = []
    for unit in (item.q, item.k):
        members, values = members_of(unit, program, lowering)
        name = unit.binder.name
        names = (name,) if len(values) == 1 else tuple(f"{name}[{i}]" for i in range(len(values)))
        numbers = tuple(fold.var(name, 0) for name in names)
        scope = scope.bind(unit.binder, numbers if is_list(unit, lowering) else numbers[0])
        lowering.units[unit] = members
        sides.append((numbers, values))
    return fold.rounded(*sides[0], *sides[1], lowering.truth(item.keep, scope))


def members_of(
    unit: checked.Unit, program: checked.Program, lowering: Lowering, scope: LoweringScope | None = None
) -> tuple[UnitMembers, tuple[Index, ...]]:
    """The tokens of a unit by number, and the unit's numbers as functions of q or k.

    `scope`: the names that the unit's value may read. Raises SpecError (A701) for units that are not supported.
    """
    values = _values(unit, lowering, scope or LoweringScope())
    segments = tuple(lowering.segments.values())
    padded = _padded_extents(program, lowering) if unit.place == "k" and program.pads else None
    form = form_of(values, fold.place(unit.place), segments[0] if len(segments) == 1 else None, padded)
    form = form or _numbered(unit, values, lowering)
    if form is None:
        _refuse(unit)
    return UnitMembers(form, _rows(unit.place, program.align)), values


def _numbered(unit: checked.Unit, values: tuple[Index, ...], lowering: Lowering) -> Numbered | None:
    """Units whose numbers an input holds, such as `clusters[k] % 64`; None where the value has another form."""
    numbering = numbers_of(values[0], fold.place(unit.place)) if len(values) == 1 else None
    if numbering is None:
        return None
    lookup, count = numbering
    *lead, last = lookup.tensor.dims
    if last not in {"q": ("query",), "k": ("key", "token")}[unit.place]:
        return None
    lowering.check_sorts("units that an input numbers", unit.value.span)
    name, source = f"{lookup.tensor.name} % {count}", lookup.tensor.name
    order = lowering.derive_tensor(f"order({name})", (*lead, f"tokens by {name}"), ir.Made(source, "order", count))
    starts = lowering.derive_tensor(f"starts({name})", (*lead, count + 1), ir.Made(source, "starts", count))
    return Numbered(count, order, starts, lookup.indices[:-1])


def _padded_extents(program: checked.Program, lowering: Lowering) -> tuple[Index, ...]:
    """The number of padded keys along each axis. Raises SpecError (A701) for padding before the first token."""
    (segment,) = lowering.segments.values()
    pads = {pad.axis: pad for pad in program.pads}
    extents = []
    for axis, (_, extent) in enumerate(segment.axes):
        pad = pads.get(axis)
        if pad is not None and lowering.integer(pad.low, LoweringScope()) is not fold.const(0):
            message = "units of padded keys that begin before the first token are not supported yet"
            fail(pad.span, "A701", message, "pad after the last token only: `y: 0 .. rows`", "does not start at 0")
        extents.append(extent if pad is None else lowering.integer(pad.high, LoweringScope()))
    return tuple(extents)


def _values(unit: checked.Unit, lowering: Lowering, scope: LoweringScope) -> tuple[Index, ...]:
    value = lowering.lower(unit.value, scope)
    items = value if isinstance(value, tuple) else (value,)
    nodes = [item for item in items if isinstance(item, ir.Node) and not value_nodes.is_value(item)]
    if len(nodes) < len(items):
        _refuse(unit)
    return tuple(nodes)


def is_list(unit: checked.Unit, lowering: Lowering, scope: LoweringScope | None = None) -> bool:
    """Whether a unit's value is a list of numbers."""
    return isinstance(lowering.lower(unit.value, scope or LoweringScope()), tuple)


def _rows(place: str, align: Literal["start", "end"] | None) -> PositionRange:
    if place == "k":
        return PositionRange(fold.const(0), fold.extent("keys"), True)
    queries = fold.extent("queries")
    first = fold.sub(fold.extent("keys"), queries) if align == "end" else fold.const(0)
    return PositionRange(first, queries, align is None)


def _refuse(unit: checked.Unit) -> NoReturn:
    place = unit.place
    help_ = (
        f"use stretches of tokens: `{place} // 128`; tiles of a grid: `[{place}.y // 8, {place}.x // 8]`; or numbers "
        f"of an input below a bound: `clusters[{place}] % 64`"
    )
    message = "units other than stretches of tokens, tiles of a grid, and numbers of an input are not supported yet"
    fail(unit.value.span, "A701", message, help_, "another form")
