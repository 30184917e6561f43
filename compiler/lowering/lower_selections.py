"""Lowering of selections: their rows and candidates by number, their ranking, and the reads of their results."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NoReturn

from attnc.compiler import ir
from attnc.compiler.analysis.heads import heads_read
from attnc.compiler.ir import Index, fold, value_nodes
from attnc.compiler.ir.rewrite import aggregate, substitute
from attnc.compiler.lowering.lower_attention import AttentionContext, AttentionLowering, KeyNaming
from attnc.compiler.lowering.lower_expressions import LoweringScope
from attnc.compiler.lowering.lower_round import is_list, members_of
from attnc.compiler.lowering.lower_units import Numbered, UnitMembers, row_major, unflattened
from attnc.compiler.lowering.lowered_operations import Lowered, as_index, as_indices, as_value, fail, number_of, refuse
from attnc.compiler.lowering.members import Term, divides, joined, member_name, selections_read_through, size_of
from attnc.spec import program as checked
from attnc.spec.checks.attention_clauses import same_keys
from attnc.spec.checks.measure import below
from attnc.spec.source import Span

_COMPARED = {"lt": ("lt", False), "gt": ("lt", True), "le": ("le", False), "ge": ("le", True), "eq": ("eq", False)}
"""The IR comparison that stands for a comparison of the language, and whether its sides are swapped."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a selection: their number (None where rows are queries), and the row that the query q is in.

    The rows of a family are those of its first member, then those of the second member, and so on.
    """

    count: Index | None
    row_of: Index
    family: tuple[Index, Index] | None = None
    """The number of the first member, and the number of rows of a member."""


Name = tuple[str, int | None]
"""The name of a selection, and the member where it is lowered as one selection per member of a family."""


@dataclass
class SelectingLowering(AttentionLowering):
    """Lowers attentions and the selections that they read; a selection is lowered when it is first read.

    A family becomes one selection with rows for each member. Where its members read each other, or each member ranks
    candidates of its own, every member becomes a selection of its own.
    """

    _selections: dict[Name, ir.Selection] = field(default_factory=dict, init=False)
    _rows_of: dict[str, _Rows] = field(default_factory=dict, init=False)
    _units_of_members: dict[Name, UnitMembers] = field(default_factory=dict, init=False)
    """The units of keys that each selection ranks."""
    _separate: dict[str, bool] = field(default_factory=dict, init=False)
    _selecting: checked.SelectionClauses | None = field(default=None, init=False)
    _row_in_member: Index = field(default_factory=lambda: fold.place("q"), init=False)
    """The number of the row that selects, among the rows of its member."""
    _open: list[Name] = field(default_factory=list, init=False)

    def selections(self) -> tuple[ir.Selection, ...]:
        """The lowered selections of the program."""
        result = []
        for item in self.program.selections:
            members = self._members(item) if self._is_separate(item) else [None]
            result += [self.selection(item, member) for member in members]
        return tuple(result)

    def context(self) -> object:
        """Return the attention and the selection that are being lowered."""
        return super().context(), self._selecting

    # --- a selection -------------------------------------------------------------------------------------------------

    def selection(self, item: checked.SelectionClauses, member: int | None = None) -> ir.Selection:
        """Lower a selection. Raises SpecError for an unsupported part, or members that read each other in a cycle."""
        name = item.name, member
        if name in self._open:
            self._refuse_cycle(item, name)
        if name not in self._selections:
            kept = self._attention, self._selecting, self._row_in_member
            units = {unit: self.units[unit] for unit in item.row.units if unit in self.units}
            self._selecting = item
            self._open.append(name)
            self._selections[name] = self._lowered(item, member)
            self._open.pop()
            self._attention, self._selecting, self._row_in_member = kept
            if isinstance(item.row.over, checked.Unit):
                self._units_of_members[name] = self.units[item.row.over]
            self.units.update(units)
        return self._selections[name]

    def _is_separate(self, item: checked.SelectionClauses) -> bool:
        """Whether each member of a family becomes a selection: it reads other members, or ranks its own candidates."""
        if item.family is None:
            return False
        if item.name not in self._separate:
            over = item.row.over
            units_differ = isinstance(over, checked.Unit) and item.family.binder in self._measures.of(over.value).free
            selections_read = selections_read_through(item.name, self.program.selections)
            self._separate[item.name] = units_differ or item.name in selections_read
        return self._separate[item.name]

    def _members(self, item: checked.SelectionClauses) -> range:
        """The numbers of a family's members; parameters must determine them."""
        assert item.family is not None
        ends = [self.integer(end, LoweringScope()) for end in (item.family.low, item.family.high)]
        if not all(isinstance(end, ir.Const) for end in ends):
            what = "a family whose members read each other or rank their own units, and whose range depends on sizes,"
            refuse(item.family.span, what, "Bound the range of the family by parameters.")
        low, high = (number_of(end) for end in ends)
        return range(low, high)

    def _ranges(self, item: checked.SelectionClauses) -> list[range]:
        """The range of each name of a family that has several names."""
        parts = () if item.family is None else item.family.parts
        return [
            range(*(number_of(self.integer(end, LoweringScope())) for end in (part.low, part.high))) for part in parts
        ]

    def _refuse_cycle(self, item: checked.SelectionClauses, name: Name) -> NoReturn:
        cycle = [*self._open[self._open.index(name) :], name]
        ranges = {selection.name: self._ranges(selection) for selection in self.program.selections}
        names = " → ".join(
            f"`{family if i is None else member_name(family, i, ranges[family])}`" for family, i in reversed(cycle)
        )
        message = f"the members of a family read each other in a cycle: {names}"
        help_ = "read a member closer to one end, `stage[s - 1]`, and guard the first member: `s == 0 or …`"
        fail(item.span, "A205", message, help_)

    def _lowered(self, item: checked.SelectionClauses, member: int | None) -> ir.Selection:
        row = item.row
        if self.program.pads and not isinstance(row.over, checked.Unit):
            refuse(item.span, "a selection of single padded keys", "Select units of keys: `over b = k.y // 8`.")
        scope = (
            LoweringScope()
            if member is None or item.family is None
            else LoweringScope().bind(item.family.binder, fold.const(member))
        )
        if item.family is not None and isinstance(row.over, checked.KeyRange):
            free = self._measures.of(row.over.low).free | self._measures.of(row.over.high).free
            if item.family.binder in free:
                what = "a range of candidates that differs from member to member"
                refuse(row.over.span, what, "Use one range for all members, and restrict their candidates in `from`.")
        rows, scope = self._rows(item, scope)
        self._rows_of[item.name] = rows
        scope, keys = self._queries(scope) if item.of_queries else self._keys(row, scope)
        self._attention = AttentionContext(row, scope, keys.key)
        exists = self._exists(row.over, keys.key, scope)
        candidates = fold.conjunction(exists, *(self.truth(line, scope) for line in row.visible))
        self._attention = AttentionContext(row, scope, keys.key, candidates)
        assert isinstance(row.weights, checked.Expr)
        score = self.value(row.weights, scope)
        keep = self._kept(item.keep, scope)
        always = fold.truth(False) if item.always is None else self.truth(item.always, scope)
        heads = None if item.by == "batch" else heads_read([score, candidates, keep, always])
        name = item.name if member is None else member_name(item.name, member, self._ranges(item))
        dims: list[str | int] = ["batch", *([heads] if heads else []), *self._dims(item, name, rows, keys.count)]
        selected = ir.intern(ir.Tensor(name, "bool", tuple(dims)))
        item_of = keys.key_of if row.over is not None or item.of_queries else fold.place("k")
        return ir.Selection(
            name, selected, rows.count, rows.row_of, keys.count, item_of, score, candidates, keep, always, item.pairs
        )

    def _queries(self, scope: LoweringScope) -> tuple[LoweringScope, KeyNaming]:
        """Return the scope and naming where candidates are queries: k is the number of a query."""
        first = self.first_query()
        position = fold.add(fold.place("k"), first)
        return replace(scope, q=position), KeyNaming(
            fold.place("k"), fold.extent("queries"), fold.sub(fold.place("k"), first)
        )

    def _scope_of_row_keys(self, scope: LoweringScope) -> LoweringScope:
        """Return the scope with the key, or the candidate query, that an aggregate over the row's keys runs over."""
        if self._selecting is not None and self._selecting.of_queries:
            return replace(scope, q=self._current_attention().scope.q)
        return super()._scope_of_row_keys(scope)

    def _dims(
        self, item: checked.SelectionClauses, name: str, rows: _Rows, items: Index | None
    ) -> tuple[str | int, str]:
        """The names of the dimensions of rows and candidates: `query` and `key`, or dimensions of the selection."""
        row: str | int = "query" if rows.count is None else f"{name} rows"
        if rows.count is fold.const(1) and item.by != "query":
            row = 1
        return row, "key" if items is None else f"{name} places"

    def _exists(self, over: checked.Unit | checked.KeyRange | None, key: Lowered, scope: LoweringScope) -> Index:
        """Whether a candidate is in the row's range and holds a token; an input may leave some of its units empty."""
        if isinstance(over, checked.KeyRange) and over.by_query:
            low, high = (self.integer(end, scope) for end in (over.low, over.high))
            return fold.conjunction(fold.less_equal(low, as_index(key)), fold.less(as_index(key), high))
        form = self.units[over].form if isinstance(over, checked.Unit) else None
        if not isinstance(form, Numbered):
            return fold.truth(True)
        assert not isinstance(key, tuple)
        return fold.less(*form.ends(as_index(key)))

    def _rows(self, item: checked.SelectionClauses, scope: LoweringScope) -> tuple[_Rows, LoweringScope]:
        """The rows of a selection, and the scope of a row."""
        if item.row.per:
            return self._rows_of_units(item, scope)
        by_query = item.by == "query" or item.pairs
        if item.family is None or self._is_separate(item):
            self._row_in_member = fold.place("q") if by_query else fold.const(0)
            return _Rows(None, fold.place("q")) if by_query else _Rows(fold.const(1), fold.const(0)), scope
        family, count, scope = self._family_rows(item, fold.extent("queries") if by_query else fold.const(1), scope)
        if not by_query:
            return _Rows(count, fold.const(0), family), scope
        first = self.first_query()
        rows = _Rows(count, fold.sub(fold.place("q"), first), family)
        return rows, replace(scope, q=fold.add(self._row_in_member, first))

    def _rows_of_units(self, item: checked.SelectionClauses, scope: LoweringScope) -> tuple[_Rows, LoweringScope]:
        (unit,) = item.row.per
        if item.family is not None and item.family.binder in self._measures.of(unit.value).free:
            what = "a unit of queries that differs from member to member"
            refuse(unit.span, what, "Use one unit for all members, or write a selection for each size.")
        members, unit_numbers = members_of(unit, self.program, self)
        self.units[unit] = members
        counts = members.counts()
        count, family = fold.product(counts), None
        self._row_in_member = fold.place("q")
        if item.family is not None and not self._is_separate(item):
            family, count, scope = self._family_rows(item, count, scope)
        numbers = unflattened(self._row_in_member, counts)
        bound: Lowered = numbers if is_list(unit, self) else numbers[0]
        return _Rows(count, row_major(counts, unit_numbers), family), scope.bind(unit.binder, bound)

    def _family_rows(
        self, item: checked.SelectionClauses, rows: Index, scope: LoweringScope
    ) -> tuple[tuple[Index, Index], Index, LoweringScope]:
        """The first member with the number of rows per member, the number of all rows, and the scope of a member."""
        assert item.family is not None
        if item.pairs:
            refuse(item.span, "a family of selections among pairs", "Write each member as a selection of its own.")
        low, high = (self.integer(end, scope) for end in (item.family.low, item.family.high))
        member = fold.add(low, fold.floordiv(fold.place("q"), rows))
        self._row_in_member = fold.mod(fold.place("q"), rows)
        count = fold.mul(fold.maximum(fold.sub(high, low), fold.const(0)), rows)
        return (low, rows), count, scope.bind(item.family.binder, member)

    # --- the `keep` condition ----------------------------------------------------------------------------------------

    def _kept(self, expr: checked.Expr, scope: LoweringScope) -> ir.Value:
        """Lower the `keep` condition, which may compare floating-point numbers, to 1 or 0."""
        true = value_nodes.number(1.0)
        match expr:
            case checked.Operation(op="and" | "or", operands=operands):
                parts = [self._kept(operand, scope) for operand in operands]
                result = parts[0]
                for part in parts[1:]:
                    result = value_nodes.apply("min" if expr.op == "and" else "max", result, part)
                return result
            case checked.Operation(op="not", operands=(operand,)):
                return value_nodes.apply("sub", true, self._kept(operand, scope))
            case checked.Operation(op="ne", operands=operands, floating=True):
                return value_nodes.apply(
                    "sub", true, value_nodes.apply("eq", *(self.value(o, scope) for o in operands))
                )
            case checked.Operation(op=op, operands=operands, floating=True) if op in _COMPARED:
                comparison, swapped = _COMPARED[op]
                sides = [self.lower(operand, scope) for operand in operands]
                if not any(value_nodes.is_value(side) or isinstance(side, float) for side in sides):
                    return value_nodes.select(self.truth(expr, scope), true, value_nodes.number(0.0))
                a, b = map(as_value, reversed(sides) if swapped else sides)
                return value_nodes.apply(comparison, a, b)
            case checked.DefinitionUse(definition=definition, arguments=arguments):
                inner = scope
                for binder, argument in zip(definition.parameters, arguments, strict=True):
                    inner = inner.bind(binder, self.lower(argument, scope))
                return self._kept(definition.body, inner)
            case checked.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
                branches = self._kept(then, scope), self._kept(otherwise, scope)
                return value_nodes.select(self.truth(condition, scope), *branches)
            case _:
                return value_nodes.select(self.truth(expr, scope), true, value_nodes.number(0.0))

    # --- reads of units and selections -------------------------------------------------------------------------------

    def lower_attention_read(self, expr: checked.Expr, scope: LoweringScope) -> Lowered:
        """Lower a read of a unit or selection, or any expression that an attention may hold."""
        match expr:
            case checked.Infinity():
                return value_nodes.number(float("inf"))
            case checked.RankingRead(name=name):
                return value_nodes.ranking(name)
            case checked.InUnit():
                return self._in_unit(expr, scope)
            case checked.SelectedTest():
                return self._lower_test(expr, scope)
            case checked.SelectedCount():
                return self._size(expr, scope)
            case _:
                return super().lower_attention_read(expr, scope)

    def _aggregate(self, expr: checked.Aggregate, scope: LoweringScope) -> Lowered:
        """Lower an aggregate; where its terms read members of a family, each term is written out."""
        terms = self._terms(expr, scope) if self._reads_members(expr) else None
        if terms is None:
            return super()._aggregate(expr, scope)
        result = joined(expr.op, terms)
        if result is None:
            what = f"`{expr.op}` over members of a family that read each other"
            refuse(expr.span, what, "Use `sum`, `count`, `any` or `all`.")
        return result

    def _reads_members(self, expr: checked.Aggregate) -> bool:
        """Whether an aggregate reads members of a family that are separate selections."""
        inside = [expr.body, *([] if expr.condition is None else [expr.condition])]
        separate = {item.name for item in self.program.selections if self._is_separate(item)}
        reads = (node for node in below(inside) if isinstance(node, checked.SelectedTest | checked.SelectedCount))
        return any(node.member is not None and node.selection in separate for node in reads)

    def _terms(self, expr: checked.Aggregate, scope: LoweringScope) -> list[Term] | None:
        """The terms of an aggregate with their conditions; None where parameters do not determine their number."""
        scopes = [scope]
        for running in expr.runnings:
            if not (isinstance(running, checked.RangeVariable) and isinstance(running.target, checked.Binder)):
                return None
            ends = [[self.integer(end, inner) for end in (running.low, running.high)] for inner in scopes]
            if not all(isinstance(end, ir.Const) for pair in ends for end in pair):
                return None
            ranges = [range(*map(number_of, pair)) for pair in ends]
            pairs = zip(scopes, ranges, strict=True)
            scopes = [inner.bind(running.target, fold.const(i)) for inner, numbers in pairs for i in numbers]
        result = []
        for inner in scopes:
            truth = fold.truth(True) if expr.condition is None else self.truth(expr.condition, inner)
            if truth is not fold.truth(False):
                result.append((truth, self.lower(expr.body, inner)))
        return result

    def _in_unit(self, expr: checked.InUnit, scope: LoweringScope) -> Index:
        unit_numbers = self._numbers(expr.unit, self.integer(expr.at, scope))
        bound = as_indices(scope.lookup(expr.unit.binder))
        return fold.conjunction(*(fold.equal(a, b) for a, b in zip(unit_numbers, bound, strict=True)))

    def _numbers(self, unit: checked.Unit, position: Index) -> tuple[Index, ...]:
        """The numbers of the unit that holds the token at a position."""
        token_scope = LoweringScope(q=position) if unit.place == "q" else LoweringScope(k=position)
        return as_indices(self.lower(unit.value, token_scope))

    def _find(
        self, name: str, member: checked.Expr | None, scope: LoweringScope
    ) -> tuple[checked.SelectionClauses, ir.Selection, Index]:
        """A selection by name as it was checked and as it was lowered, and the row that the scope reads."""
        item = next(item for item in self.program.selections if item.name == name)
        member_index = None if member is None else self.integer(member, scope)
        number = None
        if member_index is not None and member is not None:
            number = self._member_of(item, member_index, member.span)
        selection = self.selection(item, number)
        row, family = self._row_of(item, selection, scope), self._rows_of[name].family
        if family is not None and member_index is not None:
            row = fold.add(fold.mul(fold.sub(member_index, family[0]), family[1]), row)
        return item, selection, row

    def _member_of(self, item: checked.SelectionClauses, member: Index, span: Span) -> int | None:
        """The member that is read, None where its family is one selection. Raises SpecError for an unknown member."""
        is_separate = self._is_separate(item)
        if not is_separate and not isinstance(member, ir.Const):
            return None
        assert item.family is not None
        ends = [self.integer(end, LoweringScope()) for end in (item.family.low, item.family.high)]
        if not is_separate and not all(isinstance(end, ir.Const) for end in ends):
            return None
        members = self._members(item)
        if not isinstance(member, ir.Const) or member.value not in members:
            what = f"a read of `{item.name}` at a member other than {members.start} to {members.stop - 1}"
            refuse(span, what, "Guard the first member: `s == 0 or …`.")
        return member.value if is_separate else None

    def _row_of(self, item: checked.SelectionClauses, selection: ir.Selection, scope: LoweringScope) -> Index:
        """The row that the scope reads: the query's row, or the row that selects, where both are of the same unit."""
        selecting = self._selecting
        if item.row.per and selecting is not None and selecting.row.per:
            (unit,), (selecting_unit,) = item.row.per, selecting.row.per
            if same_keys(unit, selecting_unit):
                return self._row_in_member
        return _at_position(selection.row_of, "q", scope.q)

    def _lower_test(self, expr: checked.SelectedTest, scope: LoweringScope) -> Index:
        item, selection, row = self._find(expr.selection, expr.member, scope)
        if expr.number is not None:
            assert isinstance(item.row.over, checked.KeyRange)
            low, _ = self.ends(item.row.over, LoweringScope())
            return _selected(selection, scope.head, row, fold.sub(self.integer(expr.number, scope), low))
        if expr.unit is not None:
            return self._whole_unit(expr, item, selection, row, scope)
        assert expr.item is not None
        if (
            self.program.pads
            and isinstance(expr.item, checked.PositionRead)
            and isinstance(item.row.over, checked.Unit)
        ):
            unit_numbers = as_indices(self.lower(item.row.over.value, scope))
            return _selected(selection, scope.head, row, row_major(self.units[item.row.over].counts(), unit_numbers))
        return self._holds(item, selection, row, self.integer(expr.item, scope), scope)

    def _holds(
        self, item: checked.SelectionClauses, selection: ir.Selection, row: Index, place: Index, scope: LoweringScope
    ) -> Index:
        """Whether a row selected the token at a position, or the candidate with a number."""
        if not isinstance(item.row.over, checked.KeyRange):
            assert selection.item_of is not None
            selected = _selected(selection, scope.head, row, _at_position(selection.item_of, "k", place))
            if not item.of_queries or place is scope.q:
                return selected
            number = fold.sub(place, self.first_query())
            return fold.conjunction(fold.nonnegative(number), fold.less(number, fold.extent("queries")), selected)
        low, _ = self.ends(item.row.over, LoweringScope())
        if item.covers is None:
            return _selected(selection, scope.head, row, fold.sub(place, low))
        variable = self.variable(item.row.over.binder.name)
        inner = LoweringScope(q=scope.q, k=place, head=scope.head).bind(item.row.over.binder, fold.add(variable, low))
        assert selection.items is not None
        covered = fold.conjunction(_selected(selection, scope.head, row, variable), self.truth(item.covers, inner))
        return aggregate("any", variable, fold.const(0), selection.items, fold.truth(True), covered)

    def _whole_unit(
        self,
        expr: checked.SelectedTest,
        item: checked.SelectionClauses,
        selection: ir.Selection,
        row: Index,
        scope: LoweringScope,
    ) -> Index:
        """Whether a row selected all tokens of a unit."""
        assert expr.unit is not None
        over, numbers = item.row.over, as_indices(scope.lookup(expr.unit.binder))
        members = self.units[expr.unit]
        if isinstance(over, checked.Unit):
            selected_members = self._units_of_members[self._name_of(item, selection)]
            if same_keys(over, expr.unit) and selected_members == members:
                return _selected(selection, scope.head, row, row_major(members.counts(), numbers))
            if divides(members, selected_members):
                first = fold.mul(numbers[0], fold.const(size_of(members)))
                containing_unit = fold.floordiv(first, fold.const(size_of(selected_members)))
                return _selected(selection, scope.head, row, containing_unit)
        token = members.token(numbers, lambda: self.variable("token"))
        selected = self._holds(item, selection, row, token.position, scope)
        for variable, low, high in reversed(token.loops):
            selected = aggregate("all", variable, low, high, token.condition, selected)
        return selected

    def _name_of(self, item: checked.SelectionClauses, selection: ir.Selection) -> Name:
        """The name under which a lowered selection is kept."""
        return next(name for name, lowered in self._selections.items() if name[0] == item.name and lowered is selection)

    def _size(self, expr: checked.SelectedCount, scope: LoweringScope) -> Index:
        _, selection, row = self._find(expr.selection, expr.member, scope)
        variable = self.variable("place")
        selected = fold.choice(_selected(selection, scope.head, row, variable), fold.const(1), fold.const(0))
        count = selection.items if selection.items is not None else fold.extent("keys")
        return aggregate("sum", variable, fold.const(0), count, fold.truth(True), selected)


def _selected(selection: ir.Selection, head: Index, row: Index, item: Index) -> Index:
    """The element of a selection's truth tensor at a head, row and candidate."""
    indices = [fold.head_index("batch")]
    if selection.by_heads is not None:
        indices.append(head if selection.by_heads == "head" else fold.floordiv(head, fold.extent("group")))
    return fold.lookup(selection.given, (*indices, row, item))


def _at_position(node: Index, name: str, position: Index) -> Index:
    """An expression over q or k, with a position in the place of q or k."""
    variable = fold.place("q" if name == "q" else "k")
    return node if position is variable else substitute(node, {variable: position})
