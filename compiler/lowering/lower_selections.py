"""Lowering of selections: rows and places by number, what they are ranked by, and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NoReturn

from attnc.compiler import fold, ir, value_nodes
from attnc.compiler.heads import heads_read
from attnc.compiler.ir import Index
from attnc.compiler.lowering.lower_attention import AttentionContext, AttentionLowering, KeyNaming, refuse
from attnc.compiler.lowering.lower_expressions import LoweringScope
from attnc.compiler.lowering.lower_round import is_list, members_of
from attnc.compiler.lowering.lower_units import Numbered, UnitMembers
from attnc.compiler.lowering.lowered_operations import Lowered, as_index, as_value, number_of
from attnc.compiler.lowering.members import Term, asked_through, divides, joined, member_name, size_of
from attnc.compiler.rewrite import substitute
from attnc.spec import program as checked
from attnc.spec.checks.attention_clauses import same_keys
from attnc.spec.checks.measure import below
from attnc.spec.diagnostics import Diagnostic, Label
from attnc.spec.errors import SpecError
from attnc.spec.source import Span

_COMPARED = {"lt": ("lt", False), "gt": ("lt", True), "le": ("le", False), "ge": ("le", True), "eq": ("eq", False)}
"""Comparisons: which of the IR's, and whether their sides change places."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Who decides: how many rows where these are no queries, and the row that the query q is in.

    Of a family there are so many rows for each member, which begins at `low`.
    """

    count: Index | None
    row_of: Index
    family: tuple[Index, Index] | None = None
    """The first member, and the rows of each."""


Name = tuple[str, int | None]
"""A selection, or one of a family."""


@dataclass
class SelectingLowering(AttentionLowering):
    """Lowers attentions and the selections that they ask, these when they are first met.

    A family is one selection with rows for each member. Where its members ask each other, or have places of their
    own, each is one by itself.
    """

    _selections: dict[Name, ir.Selection] = field(default_factory=dict, init=False)
    _rows_of: dict[str, _Rows] = field(default_factory=dict, init=False)
    _units_of_members: dict[Name, UnitMembers] = field(default_factory=dict, init=False)
    """The units of keys that a selection ranks."""
    _apart: dict[str, bool] = field(default_factory=dict, init=False)
    _deciding: checked.SelectionClauses | None = field(default=None, init=False)
    _own_row: Index = field(default_factory=lambda: fold.place("q"), init=False)
    """The row that decides, counted among those of a member."""
    _open: list[Name] = field(default_factory=list, init=False)

    def selections(self) -> tuple[ir.Selection, ...]:
        """The lowered selections of the program."""
        found = []
        for item in self.program.selections:
            members = self._members(item) if self._is_apart(item) else [None]
            found += [self.selection(item, member) for member in members]
        return tuple(found)

    def context(self) -> object:
        """The keys, and who decides, are those at hand."""
        return super().context(), self._deciding

    # --- a selection -------------------------------------------------------------------------------------------------

    def selection(self, item: checked.SelectionClauses, member: int | None = None) -> ir.Selection:
        """One selection. Raises SpecError where something in it is not supported, or asks itself in a circle."""
        name = item.name, member
        if name in self._open:
            self._refuse_circle(item, name)
        if name not in self._selections:
            kept = self._around, self._deciding, self._own_row
            units = {unit: self.units[unit] for unit in item.row.units if unit in self.units}
            self._deciding = item
            self._open.append(name)
            self._selections[name] = self._lowered(item, member)
            self._open.pop()
            self._around, self._deciding, self._own_row = kept
            if isinstance(item.row.over, checked.Unit):
                self._units_of_members[name] = self.units[item.row.over]
            self.units.update(units)
        return self._selections[name]

    def _is_apart(self, item: checked.SelectionClauses) -> bool:
        """Whether each member of a family is a selection by itself: it asks others, or has places of its own."""
        if item.family is None:
            return False
        if item.name not in self._apart:
            over = item.row.over
            own = isinstance(over, checked.Unit) and item.family.binder in self._measures.of(over.value).free
            self._apart[item.name] = own or item.name in asked_through(item.name, self.program.selections)
        return self._apart[item.name]

    def _members(self, item: checked.SelectionClauses) -> range:
        """The members of a family, which parameters tell."""
        assert item.family is not None
        ends = [self.integer(end, LoweringScope()) for end in (item.family.low, item.family.high)]
        if not all(isinstance(end, ir.Const) for end in ends):
            what = "a family whose members ask each other or have places of their own, and whose number sizes tell,"
            refuse(item.family.span, what, "Let a parameter be its number.")
        low, high = (number_of(end) for end in ends)
        return range(low, high)

    def _ranges(self, item: checked.SelectionClauses) -> list[range]:
        """The ranges of a family's names where it has several."""
        parts = () if item.family is None else item.family.parts
        return [
            range(*(number_of(self.integer(end, LoweringScope())) for end in (part.low, part.high))) for part in parts
        ]

    def _refuse_circle(self, item: checked.SelectionClauses, name: Name) -> NoReturn:
        circle = [*self._open[self._open.index(name) :], name]
        ranges = {own.name: self._ranges(own) for own in self.program.selections}
        names = " → ".join(f"`{own if i is None else member_name(own, i, ranges[own])}`" for own, i in reversed(circle))
        message = f"the selections of a family ask each other in a circle: {names}"
        help_ = "ask a member that is nearer to an end: `stage[s - 1]`, and test for the first: `s == 0 or …`"
        raise SpecError((Diagnostic("A205", message, Label(item.span), help=help_),))

    def _lowered(self, item: checked.SelectionClauses, member: int | None) -> ir.Selection:
        row = item.row
        if self.program.pads and not isinstance(row.over, checked.Unit):
            refuse(item.span, "a choice among padded keys one by one", "Choose units of them: `over b = k.y // 8`.")
        scope = (
            LoweringScope()
            if member is None or item.family is None
            else LoweringScope().bind(item.family.binder, fold.const(member))
        )
        if item.family is not None and isinstance(row.over, checked.KeyRange):
            free = self._measures.of(row.over.low).free | self._measures.of(row.over.high).free
            if item.family.binder in free:
                what = "a range of places that differs from member to member"
                refuse(row.over.span, what, "Give all the same, and say in `from` which of it a member may choose.")
        rows, scope = self._rows(item, scope)
        self._rows_of[item.name] = rows
        scope, keys = self._queries(scope) if item.of_queries else self._keys(row, scope)
        self._around = AttentionContext(row, scope, keys.key)
        exists = self._exists(row.over, keys.key, scope)
        candidates = fold.conjunction(exists, *(self.truth(line, scope) for line in row.visible))
        self._around = AttentionContext(row, scope, keys.key, candidates)
        assert isinstance(row.weights, checked.Expr)
        score = self.value(row.weights, scope)
        keep = self._kept(item.keep, scope)
        always = fold.truth(False) if item.always is None else self.truth(item.always, scope)
        heads = None if item.by == "batch" else heads_read([score, candidates, keep, always])
        name = item.name if member is None else member_name(item.name, member, self._ranges(item))
        dims: list[str | int] = ["batch", *([heads] if heads else []), *self._dims(item, name, rows, keys.count)]
        given = ir.intern(ir.Tensor(name, "bool", tuple(dims)))
        item_of = keys.key_of if row.over is not None or item.of_queries else fold.place("k")
        return ir.Selection(
            name, given, rows.count, rows.row_of, keys.count, item_of, score, candidates, keep, always, item.pairs
        )

    def _queries(self, scope: LoweringScope) -> tuple[LoweringScope, KeyNaming]:
        """Queries as places: the place k is the number of one."""
        first = self.first_query()
        position = fold.add(fold.place("k"), first)
        return replace(scope, q=position), KeyNaming(
            fold.place("k"), fold.extent("queries"), fold.sub(fold.place("k"), first)
        )

    def _own_key(self, scope: LoweringScope) -> LoweringScope:
        """The scope with the place that runs over the row's."""
        if self._deciding is not None and self._deciding.of_queries:
            return replace(scope, q=self._here().scope.q)
        return super()._own_key(scope)

    def _dims(
        self, item: checked.SelectionClauses, name: str, rows: _Rows, items: Index | None
    ) -> tuple[str | int, str]:
        """The dimensions of rows and places: positions of queries and keys, or sizes of their own."""
        row: str | int = "query" if rows.count is None else f"{name} rows"
        if rows.count is fold.const(1) and item.by != "query":
            row = 1
        return row, "key" if items is None else f"{name} places"

    def _exists(self, over: checked.Unit | checked.KeyRange | None, key: Lowered, scope: LoweringScope) -> Index:
        """Whether a place is one of the row's, and has a token: numbers that an input never gives are none."""
        if isinstance(over, checked.KeyRange) and over.by_query:
            low, high = (self.integer(end, scope) for end in (over.low, over.high))
            return fold.conjunction(fold.less_equal(low, as_index(key)), fold.less(as_index(key), high))
        form = self.units[over].form if isinstance(over, checked.Unit) else None
        if not isinstance(form, Numbered):
            return fold.truth(True)
        assert not isinstance(key, tuple)
        return fold.less(*form.ends(as_index(key)))

    def _rows(self, item: checked.SelectionClauses, scope: LoweringScope) -> tuple[_Rows, LoweringScope]:
        """Who decides, and the scope of a row."""
        if item.row.per:
            return self._rows_of_units(item, scope)
        each = item.by == "query" or item.pairs
        if item.family is None or self._is_apart(item):
            self._own_row = fold.place("q") if each else fold.const(0)
            return _Rows(None, fold.place("q")) if each else _Rows(fold.const(1), fold.const(0)), scope
        family, count, scope = self._of_family(item, fold.extent("queries") if each else fold.const(1), scope)
        if not each:
            return _Rows(count, fold.const(0), family), scope
        first = self.first_query()
        own = _Rows(count, fold.sub(fold.place("q"), first), family)
        return own, replace(scope, q=fold.add(self._own_row, first))

    def _rows_of_units(self, item: checked.SelectionClauses, scope: LoweringScope) -> tuple[_Rows, LoweringScope]:
        (unit,) = item.row.per
        if item.family is not None and item.family.binder in self._measures.of(unit.value).free:
            what = "a unit of queries that differs from member to member"
            refuse(unit.span, what, "Give all the same, and write a selection for each size.")
        members, own = members_of(unit, self.program, self)
        self.units[unit] = members
        counts = members.counts()
        count, family = fold.product(counts), None
        self._own_row = fold.place("q")
        if item.family is not None and not self._is_apart(item):
            family, count, scope = self._of_family(item, count, scope)
        numbers, row_of = [], fold.const(0)
        for i, each in enumerate(counts):
            number = fold.floordiv(self._own_row, fold.product(counts[i + 1 :]))
            numbers.append(number if i == 0 else fold.mod(number, each))
            row_of = fold.add(fold.mul(row_of, each), own[i])
        bound: Lowered = tuple(numbers) if is_list(unit, self) else numbers[0]
        return _Rows(count, row_of, family), scope.bind(unit.binder, bound)

    def _of_family(
        self, item: checked.SelectionClauses, rows: Index, scope: LoweringScope
    ) -> tuple[tuple[Index, Index], Index, LoweringScope]:
        """Rows for each member of a family: its first member and these rows, all rows, and the scope of one."""
        assert item.family is not None
        if item.pairs:
            refuse(item.span, "a family of choices among pairs", "Write its members one by one.")
        low, high = (self.integer(end, scope) for end in (item.family.low, item.family.high))
        member = fold.add(low, fold.floordiv(fold.place("q"), rows))
        self._own_row = fold.mod(fold.place("q"), rows)
        count = fold.mul(fold.maximum(fold.sub(high, low), fold.const(0)), rows)
        return (low, rows), count, scope.bind(item.family.binder, member)

    # --- what is kept ------------------------------------------------------------------------------------------------

    def _kept(self, expr: checked.Expr, scope: LoweringScope) -> ir.Value:
        """A condition on floating-point numbers, as 1 or 0."""
        one = value_nodes.number(1.0)
        match expr:
            case checked.Operation(op="and" | "or", operands=operands):
                parts = [self._kept(operand, scope) for operand in operands]
                result = parts[0]
                for part in parts[1:]:
                    result = value_nodes.apply("min" if expr.op == "and" else "max", result, part)
                return result
            case checked.Operation(op="not", operands=(operand,)):
                return value_nodes.apply("sub", one, self._kept(operand, scope))
            case checked.Operation(op="ne", operands=operands, floating=True):
                return value_nodes.apply("sub", one, value_nodes.apply("eq", *(self.value(o, scope) for o in operands)))
            case checked.Operation(op=op, operands=operands, floating=True) if op in _COMPARED:
                own, turned = _COMPARED[op]
                sides = [self.lower(operand, scope) for operand in operands]
                if not any(value_nodes.is_value(side) or isinstance(side, float) for side in sides):
                    return value_nodes.select(self.truth(expr, scope), one, value_nodes.number(0.0))
                a, b = map(as_value, reversed(sides) if turned else sides)
                return value_nodes.apply(own, a, b)
            case checked.DefinitionUse(definition=definition, arguments=arguments):
                inner = scope
                for binder, argument in zip(definition.parameters, arguments, strict=True):
                    inner = inner.bind(binder, self.lower(argument, scope))
                return self._kept(definition.body, inner)
            case checked.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
                sides_ = self._kept(then, scope), self._kept(otherwise, scope)
                return value_nodes.select(self.truth(condition, scope), *sides_)
            case _:
                return value_nodes.select(self.truth(expr, scope), one, value_nodes.number(0.0))

    # --- what expressions ask ----------------------------------------------------------------------------------------

    def of_attention(self, expr: checked.Expr, scope: LoweringScope) -> Lowered:
        """Units and selections, and all that attentions know."""
        match expr:
            case checked.Infinity():
                return value_nodes.number(float("inf"))
            case checked.RankingRead(name=name):
                return value_nodes.ranking(name)
            case checked.InUnit():
                return self._in_unit(expr, scope)
            case checked.SelectedTest():
                return self._chosen(expr, scope)
            case checked.SelectedCount():
                return self._size(expr, scope)
            case _:
                return super().of_attention(expr, scope)

    def _aggregate(self, expr: checked.Aggregate, scope: LoweringScope) -> Lowered:
        """An aggregate that asks one member of a family after another is written out, a term for each."""
        terms = self._terms(expr, scope) if self._asks_members(expr) else None
        if terms is None:
            return super()._aggregate(expr, scope)
        result = joined(expr.op, terms)
        if result is None:
            what = f"`{expr.op}` over members of a family that ask each other"
            refuse(expr.span, what, "Take `sum`, `count`, `any` or `all`.")
        return result

    def _asks_members(self, expr: checked.Aggregate) -> bool:
        """Whether an aggregate asks members of a family that are selections by themselves."""
        inside = [expr.body, *([] if expr.condition is None else [expr.condition])]
        apart = {item.name for item in self.program.selections if self._is_apart(item)}
        asked = (node for node in below(inside) if isinstance(node, checked.SelectedTest | checked.SelectedCount))
        return any(node.member is not None and node.selection in apart for node in asked)

    def _terms(self, expr: checked.Aggregate, scope: LoweringScope) -> list[Term] | None:
        """Each term with its condition; None where parameters do not tell how many there are."""
        scopes = [scope]
        for running in expr.runnings:
            if not (isinstance(running, checked.RangeVariable) and isinstance(running.target, checked.Binder)):
                return None
            ends = [[self.integer(end, inner) for end in (running.low, running.high)] for inner in scopes]
            if not all(isinstance(end, ir.Const) for pair in ends for end in pair):
                return None
            each = [range(*map(number_of, pair)) for pair in ends]
            pairs = zip(scopes, each, strict=True)
            scopes = [inner.bind(running.target, fold.const(i)) for inner, numbers in pairs for i in numbers]
        result = []
        for inner in scopes:
            truth = fold.truth(True) if expr.condition is None else self.truth(expr.condition, inner)
            if truth is not fold.truth(False):
                result.append((truth, self.lower(expr.body, inner)))
        return result

    def _in_unit(self, expr: checked.InUnit, scope: LoweringScope) -> Index:
        own = self._numbers(expr.unit, self.integer(expr.at, scope))
        found = scope.lookup(expr.unit.binder)
        here = found if isinstance(found, tuple) else (found,)
        return fold.conjunction(*(fold.equal(a, as_index(b)) for a, b in zip(own, here, strict=True)))

    def _numbers(self, unit: checked.Unit, position: Index) -> tuple[Index, ...]:
        """The numbers of the unit that the token at a position is in."""
        where = LoweringScope(q=position) if unit.place == "q" else LoweringScope(k=position)
        found = self.lower(unit.value, where)
        return tuple(map(as_index, found)) if isinstance(found, tuple) else (as_index(found),)

    def _find(
        self, name: str, member: checked.Expr | None, scope: LoweringScope
    ) -> tuple[checked.SelectionClauses, ir.Selection, Index]:
        """A selection by name, and the row at hand."""
        item = next(item for item in self.program.selections if item.name == name)
        which = None if member is None else self.integer(member, scope)
        number = None
        if which is not None and member is not None:
            number = self._member_of(item, which, member.span)
        found = self.selection(item, number)
        row, family = self._row_of(item, found, scope), self._rows_of[name].family
        if family is not None and which is not None:
            row = fold.add(fold.mul(fold.sub(which, family[0]), family[1]), row)
        return item, found, row

    def _member_of(self, item: checked.SelectionClauses, which: Index, at: Span) -> int | None:
        """The member that is asked, of those that ask each other. Raises SpecError for one that there is not."""
        apart = self._is_apart(item)
        if not apart and not isinstance(which, ir.Const):
            return None
        assert item.family is not None
        ends = [self.integer(end, LoweringScope()) for end in (item.family.low, item.family.high)]
        if not apart and not all(isinstance(end, ir.Const) for end in ends):
            return None
        members = self._members(item)
        if not isinstance(which, ir.Const) or which.value not in members:
            what = f"a member of `{item.name}` that is none of {members.start} to {members.stop - 1}"
            refuse(at, what, "Test for the first one before: `s == 0 or …`.")
        return which.value if apart else None

    def _row_of(self, item: checked.SelectionClauses, found: ir.Selection, scope: LoweringScope) -> Index:
        """The row at hand: that of the query, or of the unit that decides here too."""
        deciding = self._deciding
        if item.row.per and deciding is not None and deciding.row.per:
            (unit,), (own,) = item.row.per, deciding.row.per
            if same_keys(unit, own):
                return self._own_row
        return _at(found.row_of, "q", scope.q)

    def _chosen(self, expr: checked.SelectedTest, scope: LoweringScope) -> Index:
        item, found, row = self._find(expr.selection, expr.member, scope)
        if expr.number is not None:
            assert isinstance(item.row.over, checked.KeyRange)
            low, _ = self.ends(item.row.over, LoweringScope())
            return _asked(found, scope.head, row, fold.sub(self.integer(expr.number, scope), low))
        if expr.unit is not None:
            return self._whole_unit(expr, item, found, row, scope)
        assert expr.item is not None
        if (
            self.program.pads
            and isinstance(expr.item, checked.PositionRead)
            and isinstance(item.row.over, checked.Unit)
        ):
            numbers = self.lower(item.row.over.value, scope)
            own = tuple(map(as_index, numbers)) if isinstance(numbers, tuple) else (as_index(numbers),)
            return _asked(found, scope.head, row, self._flat(self.units[item.row.over], own))
        return self._holds(item, found, row, self.integer(expr.item, scope), scope)

    def _holds(
        self, item: checked.SelectionClauses, found: ir.Selection, row: Index, place: Index, scope: LoweringScope
    ) -> Index:
        """Whether a row chose the token at a position, or a number."""
        if not isinstance(item.row.over, checked.KeyRange):
            assert found.item_of is not None
            asked = _asked(found, scope.head, row, _at(found.item_of, "k", place))
            if not item.of_queries or place is scope.q:
                return asked
            number = fold.sub(place, self.first_query())
            return fold.conjunction(fold.nonnegative(number), fold.less(number, fold.extent("queries")), asked)
        low, _ = self.ends(item.row.over, LoweringScope())
        if item.covers is None:
            return _asked(found, scope.head, row, fold.sub(place, low))
        variable = self.variable(item.row.over.binder.name)
        inner = LoweringScope(q=scope.q, k=place, head=scope.head).bind(item.row.over.binder, fold.add(variable, low))
        assert found.items is not None
        held = fold.conjunction(_asked(found, scope.head, row, variable), self.truth(item.covers, inner))
        return fold.reduce("any", variable, fold.const(0), found.items, fold.truth(True), held)

    def _whole_unit(
        self,
        expr: checked.SelectedTest,
        item: checked.SelectionClauses,
        found: ir.Selection,
        row: Index,
        scope: LoweringScope,
    ) -> Index:
        """Whether a row chose all tokens of the unit at hand."""
        assert expr.unit is not None
        over, number = item.row.over, scope.lookup(expr.unit.binder)
        numbers = tuple(map(as_index, number)) if isinstance(number, tuple) else (as_index(number),)
        own = self.units[expr.unit]
        if isinstance(over, checked.Unit):
            asked = self._units_of_members[self._name_of(item, found)]
            if same_keys(over, expr.unit) and asked == own:
                return _asked(found, scope.head, row, self._flat(own, numbers))
            if divides(own, asked):
                first = fold.mul(numbers[0], fold.const(size_of(own)))
                return _asked(found, scope.head, row, fold.floordiv(first, fold.const(size_of(asked))))
        token = own.token(numbers, lambda: self.variable("token"))
        held = self._holds(item, found, row, token.position, scope)
        for variable, low, high in reversed(token.loops):
            held = fold.reduce("all", variable, low, high, token.condition, held)
        return held

    def _name_of(self, item: checked.SelectionClauses, found: ir.Selection) -> Name:
        """The name of a selection that was lowered."""
        return next(name for name, own in self._selections.items() if name[0] == item.name and own is found)

    def _flat(self, members: UnitMembers, numbers: tuple[Index, ...]) -> Index:
        """The number of a unit among all."""
        flat = fold.const(0)
        for count, number in zip(members.counts(), numbers, strict=True):
            flat = fold.add(fold.mul(flat, count), number)
        return flat

    def _size(self, expr: checked.SelectedCount, scope: LoweringScope) -> Index:
        _, found, row = self._find(expr.selection, expr.member, scope)
        variable = self.variable("place")
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
