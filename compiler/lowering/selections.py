"""Lowering of selections: rows and places by number, what they are ranked by, and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from attnc.compiler import fold, ir, values
from attnc.compiler.heads import heads_read
from attnc.compiler.ir import Index
from attnc.compiler.lowering.attends import Around, AttentionLowering, refuse
from attnc.compiler.lowering.expressions import Lowered, Scope, as_index, as_value
from attnc.compiler.lowering.rounding import is_list, members_of
from attnc.compiler.lowering.units import Numbered
from attnc.compiler.rewrite import substitute
from attnc.spec import program as checked
from attnc.spec.checks.attends import same_keys

_COMPARED = {"lt": ("lt", False), "gt": ("lt", True), "le": ("le", False), "ge": ("le", True), "eq": ("eq", False)}
"""Comparisons: which of the IR's, and whether their sides change places."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Who decides: how many rows where these are no queries, and the row that the query q is in."""

    count: Index | None
    row_of: Index
    numbers: Lowered | None = None


@dataclass
class SelectingLowering(AttentionLowering):
    """Lowers attentions and the selections that they ask, these when they are first met."""

    _selections: dict[str, ir.Selection] = field(default_factory=dict, init=False)
    _deciding: checked.Selection | None = field(default=None, init=False)

    def selections(self) -> tuple[ir.Selection, ...]:
        """All of the program's, those that others read first."""
        return tuple(self.selection(item) for item in self.program.selections)

    def context(self) -> object:
        """The keys, and who decides, are those at hand."""
        return super().context(), self._deciding

    # --- a selection -------------------------------------------------------------------------------------------------

    def selection(self, item: checked.Selection) -> ir.Selection:
        """One selection. Raises SpecError where something in it is not supported."""
        if item.name not in self._selections:
            around, deciding = self._around, self._deciding
            self._deciding = item
            self._selections[item.name] = self._lowered(item)
            self._around, self._deciding = around, deciding
        return self._selections[item.name]

    def _lowered(self, item: checked.Selection) -> ir.Selection:
        row = item.row
        if item.family is not None:
            refuse(item.span, "a family of selections", "Write its members one by one.")
        if self.program.pads and not isinstance(row.over, checked.Unit):
            refuse(item.span, "a choice among padded keys one by one", "Choose units of them: `over b = k.y // 8`.")
        self._refuse_with_documents(item)
        rows, scope = self._rows(item, Scope())
        scope, keys = self._keys(row, scope)
        self._around = Around(row, scope, keys.key)
        exists = self._exists(row.over, keys.key)
        candidates = fold.conjunction(exists, *(self.truth(line, scope) for line in row.visible))
        self._around = Around(row, scope, keys.key, candidates)
        assert isinstance(row.weights, checked.Expr)
        score = self.value(row.weights, scope)
        keep = self._kept(item.keep, scope)
        always = fold.truth(False) if item.always is None else self.truth(item.always, scope)
        heads = None if item.by == "batch" else heads_read([score, candidates, keep, always])
        dims: list[str | int] = ["batch", *([heads] if heads else []), *self._dims(item, rows, keys.count)]
        given = ir.intern(ir.Tensor(item.name, "bool", tuple(dims)))
        item_of = fold.place("k") if row.over is None else keys.key_of
        return ir.Selection(
            item.name, given, rows.count, rows.row_of, keys.count, item_of, score, candidates, keep, always, item.pairs
        )

    def _dims(self, item: checked.Selection, rows: _Rows, items: Index | None) -> tuple[str | int, str]:
        """The dimensions of rows and places: positions of queries and keys, or sizes of their own."""
        row: str | int = "query" if rows.count is None else 1 if item.by != "query" else f"{item.name} rows"
        return row, "key" if items is None else f"{item.name} places"

    def _refuse_with_documents(self, item: checked.Selection) -> None:
        if self.program.documents is not None:
            refuse(item.span, "a selection in a pattern with `documents`", "Call it once for each document.")

    def _exists(self, over: checked.Unit | checked.Range | None, key: Lowered) -> Index:
        """Whether a place has a token: numbers that an input never gives are none."""
        form = self.units[over].form if isinstance(over, checked.Unit) else None
        if not isinstance(form, Numbered):
            return fold.truth(True)
        assert not isinstance(key, tuple)
        return fold.less(*form.ends(as_index(key)))

    def _rows(self, item: checked.Selection, scope: Scope) -> tuple[_Rows, Scope]:
        if not item.row.per:
            if item.by == "query" or item.pairs:
                return _Rows(None, fold.place("q")), scope
            return _Rows(fold.const(1), fold.const(0)), scope
        (unit,) = item.row.per
        members, own = members_of(unit, self.program, self)
        self.units[unit] = members
        counts = members.counts()
        numbers, row_of = [], fold.const(0)
        for i, count in enumerate(counts):
            number = fold.floordiv(fold.place("q"), fold.product(counts[i + 1 :]))
            numbers.append(number if i == 0 else fold.mod(number, count))
            row_of = fold.add(fold.mul(row_of, count), own[i])
        bound: Lowered = tuple(numbers) if is_list(unit, self) else numbers[0]
        return _Rows(fold.product(counts), row_of, bound), scope.bind(unit.binder, bound)

    # --- what is kept ------------------------------------------------------------------------------------------------

    def _kept(self, expr: checked.Expr, scope: Scope) -> ir.Value:
        """A condition on floating-point numbers, as 1 or 0."""
        one = values.number(1.0)
        match expr:
            case checked.Operation(op="and" | "or", operands=operands):
                parts = [self._kept(operand, scope) for operand in operands]
                found = parts[0]
                for part in parts[1:]:
                    found = values.apply("min" if expr.op == "and" else "max", found, part)
                return found
            case checked.Operation(op="not", operands=(operand,)):
                return values.apply("sub", one, self._kept(operand, scope))
            case checked.Operation(op="ne", operands=operands, floating=True):
                return values.apply("sub", one, values.apply("eq", *(self.value(o, scope) for o in operands)))
            case checked.Operation(op=op, operands=operands, floating=True) if op in _COMPARED:
                own, turned = _COMPARED[op]
                sides = [self.lower(operand, scope) for operand in operands]
                if not any(values.is_value(side) or isinstance(side, float) for side in sides):
                    return values.select(self.truth(expr, scope), one, values.number(0.0))
                a, b = map(as_value, reversed(sides) if turned else sides)
                return values.apply(own, a, b)
            case checked.DefinitionUse(definition=definition, arguments=arguments):
                inner = scope
                for binder, argument in zip(definition.parameters, arguments, strict=True):
                    inner = inner.bind(binder, self.lower(argument, scope))
                return self._kept(definition.body, inner)
            case checked.Choice(condition=condition, then=then, otherwise=otherwise):
                sides_ = self._kept(then, scope), self._kept(otherwise, scope)
                return values.select(self.truth(condition, scope), *sides_)
            case _:
                return values.select(self.truth(expr, scope), one, values.number(0.0))

    # --- what expressions ask ----------------------------------------------------------------------------------------

    def of_attention(self, expr: checked.Expr, scope: Scope) -> Lowered:
        """Units and selections, and all that attentions know."""
        match expr:
            case checked.Infinity():
                return values.number(float("inf"))
            case checked.Ranking(name=name):
                return values.ranking(name)
            case checked.InUnit():
                return self._in_unit(expr, scope)
            case checked.Chosen():
                return self._chosen(expr, scope)
            case checked.ChosenSize():
                return self._size(expr, scope)
            case _:
                return super().of_attention(expr, scope)

    def _in_unit(self, expr: checked.InUnit, scope: Scope) -> Index:
        own = self._numbers(expr.unit, self.integer(expr.at, scope))
        found = scope.lookup(expr.unit.binder)
        here = found if isinstance(found, tuple) else (found,)
        return fold.conjunction(*(fold.equal(a, as_index(b)) for a, b in zip(own, here, strict=True)))

    def _numbers(self, unit: checked.Unit, position: Index) -> tuple[Index, ...]:
        """The numbers of the unit that the token at a position is in."""
        where = Scope(q=position) if unit.place == "q" else Scope(k=position)
        found = self.lower(unit.value, where)
        return tuple(map(as_index, found)) if isinstance(found, tuple) else (as_index(found),)

    def _find(self, name: str) -> tuple[checked.Selection, ir.Selection]:
        item = next(item for item in self.program.selections if item.name == name)
        return item, self.selection(item)

    def _row_of(self, item: checked.Selection, found: ir.Selection, scope: Scope) -> Index:
        """The row at hand: that of the query, or of the unit that decides here too."""
        deciding = self._deciding
        if item.row.per and deciding is not None and deciding.row.per:
            (unit,), (own,) = item.row.per, deciding.row.per
            if same_keys(unit, own):
                return fold.place("q")
        return _at(found.row_of, "q", scope.q)

    def _chosen(self, expr: checked.Chosen, scope: Scope) -> Index:
        item, found = self._find(expr.selection)
        row = self._row_of(item, found, scope)
        if expr.unit is not None:
            return self._whole_unit(expr, item, found, row, scope)
        assert expr.item is not None
        if self.program.pads and isinstance(expr.item, checked.Place) and isinstance(item.row.over, checked.Unit):
            numbers = self.lower(item.row.over.value, scope)
            own = tuple(map(as_index, numbers)) if isinstance(numbers, tuple) else (as_index(numbers),)
            return _asked(found, scope.head, row, self._flat(item.row.over, own))
        return self._holds(item, found, row, self.integer(expr.item, scope), scope)

    def _holds(self, item: checked.Selection, found: ir.Selection, row: Index, place: Index, scope: Scope) -> Index:
        """Whether a row chose the token at a position, or a number."""
        if not isinstance(item.row.over, checked.Range):
            assert found.item_of is not None
            return _asked(found, scope.head, row, _at(found.item_of, "k", place))
        low = self.integer(item.row.over.low, Scope())
        if item.covers is None:
            return _asked(found, scope.head, row, fold.sub(place, low))
        variable = self.variable(item.row.over.binder.name)
        inner = Scope(q=scope.q, k=place, head=scope.head).bind(item.row.over.binder, fold.add(variable, low))
        assert found.items is not None
        held = fold.conjunction(_asked(found, scope.head, row, variable), self.truth(item.covers, inner))
        return fold.reduce("any", variable, fold.const(0), found.items, fold.truth(True), held)

    def _whole_unit(
        self, expr: checked.Chosen, item: checked.Selection, found: ir.Selection, row: Index, scope: Scope
    ) -> Index:
        """Whether a row chose all tokens of the unit at hand."""
        assert expr.unit is not None
        over, number = item.row.over, scope.lookup(expr.unit.binder)
        numbers = tuple(map(as_index, number)) if isinstance(number, tuple) else (as_index(number),)
        if isinstance(over, checked.Unit) and same_keys(over, expr.unit):
            return _asked(found, scope.head, row, self._flat(over, numbers))
        token = self.units[expr.unit].token(numbers, lambda: self.variable("token"))
        held = self._holds(item, found, row, token.position, scope)
        for variable, low, high in reversed(token.loops):
            held = fold.reduce("all", variable, low, high, token.condition, held)
        return held

    def _flat(self, unit: checked.Unit, numbers: tuple[Index, ...]) -> Index:
        """The number of a unit among all."""
        flat = fold.const(0)
        for count, number in zip(self.units[unit].counts(), numbers, strict=True):
            flat = fold.add(fold.mul(flat, count), number)
        return flat

    def _size(self, expr: checked.ChosenSize, scope: Scope) -> Index:
        item, found = self._find(expr.selection)
        row, variable = self._row_of(item, found, scope), self.variable("place")
        one = fold.choice(_asked(found, scope.head, row, variable), fold.const(1), fold.const(0))
        count = found.items if found.items is not None else fold.extent("keys")
        return fold.reduce("sum", variable, fold.const(0), count, fold.truth(True), one)


def _asked(found: ir.Selection, head: Index, row: Index, item: Index) -> Index:
    """An element of what a selection gives."""
    indices = [fold.head_index("batch")]
    if found.by_heads is not None:
        indices.append(head if found.by_heads == "head" else fold.floordiv(head, fold.extent("group")))
    return fold.lookup(found.given, (*indices, row, item))


def _at(node: Index, place: str, position: Index) -> Index:
    """A number of a place, at a position."""
    own = fold.place("q" if place == "q" else "k")
    return node if position is own else substitute(node, {own: position})
