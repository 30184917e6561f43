"""Resolve `in` tests and attributes such as `q.y`, `b.start`, `chosen.size` and `near.lse`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

from attnc.spec import program, syntax
from attnc.spec.checks.measure import below
from attnc.spec.names.builtins import POSITIONS
from attnc.spec.names.families import SelectedPlace, number_in
from attnc.spec.names.name_resolver import EXACT_ONLY, NameResolver
from attnc.spec.names.scope import BranchSymbol, SegmentSymbol, SelectionSymbol, SilentSymbol, UnitSymbol
from attnc.spec.names.worlds import World
from attnc.spec.suggest import did_you_mean


class SetResolver(NameResolver):
    """Resolves memberships and attributes of segments, units, selections and branches."""

    @abstractmethod
    def resolve(self, node: syntax.Expr) -> program.Expr:
        """Return the program node of a syntax node."""

    @abstractmethod
    def _in_world(self, world: World) -> SetResolver:
        """Return a resolver with the same names in another world."""

    # --- in -----------------------------------------------------------------------------------------------------------

    def _membership(self, node: syntax.ComparisonExpr) -> program.Expr:
        if len(node.rest) > 1:
            return self.refuse("A209", "`in` cannot be chained", node.span, "join the two tests with `and`")
        op, right = node.rest[0]
        symbol = self._names.get(right.id) if isinstance(right, syntax.NameExpr) else None
        base = right.base if isinstance(right, syntax.IndexExpr) else right
        if isinstance(base, syntax.NameExpr) and isinstance(self._names.get(base.id), SilentSymbol):
            return self.unknown(node.span)
        entry = self.selected_place(right)
        if entry is not None:
            return self._in_entry(node, right, entry)
        selected = self._names.get(base.id) if isinstance(base, syntax.NameExpr) else None
        if isinstance(selected, SelectionSymbol | UnitSymbol):
            membership = self._selection_test(node, selected, right) if isinstance(selected, SelectionSymbol) else None
            membership = self._in_unit(node, right) if isinstance(selected, UnitSymbol) else membership
            assert membership is not None
            return membership if op == "in" else program.Operation(node.span, "not", (membership,))
        if not isinstance(symbol, SegmentSymbol):
            return self._refuse_membership(node, right)
        recurrent = self._resolver.surroundings.recurrent
        if recurrent and isinstance(node.first, syntax.NameExpr) and node.first.id == "t":
            token_test = program.InSegment(node.span, "q", symbol.segment)
            return token_test if op == "in" else program.Operation(node.span, "not", (token_test,))
        if not isinstance(node.first, syntax.NameExpr) or node.first.id not in POSITIONS or recurrent:
            help_ = "write `t in …`" if recurrent else "write `q in …` or `k in …`"
            return self.refuse("A209", "only a token can be in a segment", node.first.span, help_)
        place_name: program.PlaceName = "q" if node.first.id == "q" else "k"
        test = program.InSegment(node.span, place_name, symbol.segment)
        return test if op == "in" else program.Operation(node.span, "not", (test,))

    def _selection_test(self, node: syntax.ComparisonExpr, symbol: SelectionSymbol, right: syntax.Expr) -> program.Expr:
        """Return a membership test such as `k in chosen`, `b in chosen[level]` or `i in chosen`."""
        if self._resolver.surroundings.recurrent:
            help_ = "read the selection in a branch with keys, or in `combine`"
            return self.refuse("A703", "a state that depends on a selection is not supported yet", node.span, help_)
        member = self._member(right, symbol)
        unit = self._unit(node.first)
        if unit is not None:
            return program.SelectedTest(node.span, symbol.name, None, unit, member, symbol.by_query)
        named = isinstance(node.first, syntax.NameExpr) and node.first.id in POSITIONS
        if symbol.is_numbered and named:
            help_ = f"test an index: `i in {symbol.name}`; or add `covers`, the keys that an index covers"
            message = f"`{symbol.name}` selects indices of a range, which cover no tokens"
            return self.refuse("A209", message, node.first.span, help_)
        item = self._in_world("float").resolve(node.first)
        return program.SelectedTest(node.span, symbol.name, item, None, member, symbol.by_query)

    def iterate_selection(
        self, binder: program.Binder, domain: syntax.Expr, symbol: SelectionSymbol
    ) -> SelectedPlace | None:
        """Resolve a name that iterates over a selection; None after an error was reported."""
        selection = self._resolver.surroundings.selected.get(symbol.name)
        if selection is None:
            help_ = "iterate over the selection in a branch or in `combine`"
            self.refuse("A703", "a `select` over another selection is not supported yet", binder.span, help_)
            return None
        over = selection.row.over
        if not isinstance(over, program.KeyRange):
            help_ = f"select from a range: `over n in 0 .. count` and `covers` in `{symbol.name}`"
            self.refuse("A703", "a `for` over selected units is not supported yet", binder.span, help_)
            return None
        selected_place = SelectedPlace(selection, over, binder, self._member(domain, symbol), symbol.by_query)
        self._resolver.surroundings.places[binder] = selected_place
        return selected_place

    def _member(self, node: syntax.Expr, symbol: SelectionSymbol) -> program.Expr | None:
        """Return the index of the member of a family; None for a selection without a family."""
        indices = self._indices(node) if isinstance(node, syntax.IndexExpr) else ()
        if symbol.names and len(indices) != symbol.names:
            help_ = f"name a member: `{symbol.name}[{', '.join('ijlmn'[: symbol.names])}]`"
            return self.refuse("A206", f"`{symbol.name}` is a family of selections", node.span, help_, "which one?")
        if symbol.names > 1:
            ranges = symbol.ranges()
            return number_in(node.span, ranges, indices) if ranges else self.unknown(node.span)
        if not symbol.names and indices:
            help_ = f"test `k in {symbol.name}`"
            return self.refuse("A204", f"`{symbol.name}` is a single selection", node.span, help_, "not a family")
        return indices[0] if indices else None

    def _in_entry(self, node: syntax.ComparisonExpr, right: syntax.Expr, entry: SelectedPlace) -> program.Expr:
        """Return `k in s`, which tests whether the selected entry `s` covers the key."""
        name = entry.selection.name
        if not (isinstance(node.first, syntax.NameExpr) and node.first.id == "k"):
            return self.refuse(
                "A209", "only `k` can be in a selected entry", node.first.span, f"write `k in {right.span.text}`"
            )
        covered = entry.holds(node.span)
        if covered is None:
            message = f"`{name}` selects indices of a range, which cover no tokens"
            return self.refuse("A209", message, right.span, f"add `covers` to `{name}`, the keys that an index covers")
        return covered if node.rest[0][0] == "in" else program.Operation(node.span, "not", (covered,))

    def _in_unit(self, node: syntax.ComparisonExpr, right: syntax.Expr) -> program.Expr:
        """Return `q in b`, which tests whether a token is in the current unit."""
        unit = self._unit(right)
        if unit is None or not isinstance(node.first, syntax.NameExpr) or node.first.id not in POSITIONS:
            help_ = f"write `q in {right.span.text}` or `k in {right.span.text}`"
            return self.refuse("A209", "only tokens can be in a unit", node.first.span, help_)
        return program.InUnit(node.span, self._in_world("float").resolve(node.first), unit)

    def _refuse_membership(self, node: syntax.ComparisonExpr, right: syntax.Expr) -> program.Expr:
        segments = {name for name, symbol in self._names.items() if isinstance(symbol, SegmentSymbol)}
        if isinstance(right, syntax.NameExpr) and right.id not in self.known_names():
            return self._unknown_name(right, "segment or selection", segments)
        self.resolve(node.first)
        help_ = "to compare with numbers write `low <= q < high`; segments are declared with `tokens name(…)`"
        return self.refuse("A209", "`in` needs a segment or a selection", right.span, help_, "this is neither")

    # --- attributes, items, calls ------------------------------------------------------------------------------------

    def _attribute(self, node: syntax.AttributeExpr) -> program.Expr:
        base = node.base
        if isinstance(base, syntax.IndexExpr) and isinstance(base.base, syntax.NameExpr):
            symbol = self._names.get(base.base.id)
            if isinstance(symbol, BranchSymbol) and symbol.is_family and base.base.id not in self._binders:
                return self._branch_attribute(node, symbol, self._indices(base))
        inner = base.base if isinstance(base, syntax.IndexExpr) else base
        selection = self._names.get(inner.id) if isinstance(inner, syntax.NameExpr) else None
        if isinstance(selection, SelectionSymbol):
            return self._selection_attribute(node, selection)
        entry = self.selected_place(base)
        if entry is not None:
            return self._entry_attribute(node, entry)
        if not isinstance(base, syntax.NameExpr):
            return self.refuse("A202", "only a token has coordinates", node.span, "write `q.axis` or `k.axis`")
        symbol = self._names.get(base.id)
        if isinstance(symbol, SilentSymbol):
            return self.unknown(node.span)
        unit = self._unit(base)
        if unit is not None:
            return self._unit_attribute(node, unit)
        if isinstance(symbol, BranchSymbol):
            return self._branch_attribute(node, symbol)
        if base.id in self._binders:
            message = "a coordinate of a definition's parameter is not supported yet"
            return self.refuse("A701", message, node.span, "pass the coordinate itself, as in `f(q.y)`")
        return self._token_attribute(node, base)

    def _selection_attribute(self, node: syntax.AttributeExpr, symbol: SelectionSymbol) -> program.Expr:
        """Return `chosen.size`, the number of selected entries."""
        if node.name.id == "size":
            return program.SelectedCount(node.span, symbol.name, self._member(node.base, symbol), symbol.by_query)
        help_ = did_you_mean(node.name.id, ("size",), f"its size is `{symbol.name}.size`")
        return self.refuse("A202", f"a selection has no `{node.name.id}`", node.name.span, help_, "no such attribute")

    def _entry_attribute(self, node: syntax.AttributeExpr, entry: SelectedPlace) -> program.Expr:
        """Return `s.score`, the score of a selected entry."""
        if node.name.id != "score":
            help_ = did_you_mean(node.name.id, ("score",), "it has a `score`")
            return self.refuse(
                "A202", f"a selected entry has no `{node.name.id}`", node.name.span, help_, "no such attribute"
            )
        if self._world == "exact":
            return self.refuse("A401", "a score is floating-point", node.span, EXACT_ONLY)
        score = entry.selection.row.weights
        assert isinstance(score, program.Expr)
        if any(isinstance(n, program.Aggregate) and _is_over_candidates(n) for n in below([score])):
            help_ = "use a score that reads only its own candidate"
            message = f"the score of `{entry.selection.name}` aggregates over all candidates"
            return self.refuse("A703", f"{message}, which is not supported here yet", node.span, help_)
        return entry.score(node.span)

    def _token_attribute(self, node: syntax.AttributeExpr, base: syntax.NameExpr) -> program.Expr:
        """Return the coordinate `q.y`, or `t.y` in a recurrence."""
        recurrent = self._resolver.surroundings.recurrent
        places = frozenset({"t"}) if recurrent else POSITIONS
        if base.id in places:
            return self._coordinate(node, "k" if base.id == "k" else "q")
        if base.id not in self.known_names() and base.id not in self._names:
            return self._unknown_name(base, "name", self.known_names())
        help_ = "write `t.axis`" if recurrent else "write `q.axis` or `k.axis`"
        return self.refuse("A202", f"`{base.id}` has no coordinates", node.span, help_)

    def _unit_attribute(self, node: syntax.AttributeExpr, unit: program.Unit) -> program.Expr:
        """Return `b.start`, `b.end` or `b.size`, computed over the existing tokens of a unit."""
        span, place = node.span, program.PositionRead(node.span, unit.place)
        one = program.Literal(span, 1)
        members = (program.UnitVariable(unit.place, unit),)
        match node.name.id:
            case "size":
                return program.Aggregate(span, "sum", one, members, None)
            case "start":
                return program.Aggregate(span, "min", place, members, None)
            case "end":
                last = program.Aggregate(span, "max", place, members, None)
                return program.Operation(span, "add", (last, one))
            case "q" | "k" | "v" if self._world != "exact":
                help_ = (
                    f"aggregate them with `mean`, `sum`, `max` or `min`: `mean({node.base.span.text}.{node.name.id})`"
                )
                return self.refuse("A206", "this stands for all vectors of a unit", node.span, help_, "many vectors")
        help_ = did_you_mean(node.name.id, ("start", "end", "size"), "a unit has `start`, `end` and `size`")
        return self.refuse("A202", f"a unit has no `{node.name.id}`", node.name.span, help_, "no such attribute")

    def _branch_attribute(
        self, node: syntax.AttributeExpr, symbol: BranchSymbol, indices: tuple[program.Expr, ...] = ()
    ) -> program.Expr:
        """Return `near.lse` or `near.weight`; for a member of a family, `at[i].lse`."""
        out = self.branch(node.span, symbol, indices)
        if not isinstance(out, program.BranchRead):
            return out
        if symbol.is_stateful:
            help_ = f"the branch's output is `{symbol.name}`, and `{symbol.name}[j]` at token j"
            return self.refuse("A202", f"a branch with a state has no `{node.name.id}`", node.name.span, help_)
        if node.name.id in ("lse", "weight"):
            return replace(out, part="lse" if node.name.id == "lse" else "weight")
        help_ = did_you_mean(node.name.id, ("lse", "weight"), "a branch has `lse` and `weight`")
        return self.refuse("A202", f"a branch has no `{node.name.id}`", node.name.span, help_, "no such attribute")

    def _coordinate(self, node: syntax.AttributeExpr, place: program.PlaceName) -> program.Expr:
        surroundings = self._resolver.surroundings
        for segment in surroundings.segments:
            for i, axis in enumerate(segment.axes):
                if axis.name == node.name.id:
                    return program.Coordinate(node.span, place, segment, i)
        if surroundings.alone:
            return self.unknown(node.span)
        axes = [axis.name for segment in surroundings.segments for axis in segment.axes]
        listed = (
            f"the axes are {', '.join(f'`{a}`' for a in axes)}"
            if axes
            else "declare axes: `tokens y: height, x: width`"
        )
        help_ = did_you_mean(node.name.id, axes, listed)
        return self.refuse("A203", f"no axis is named `{node.name.id}`", node.name.span, help_)

    def _indices(self, node: syntax.IndexExpr) -> tuple[program.Expr, ...]:
        return tuple(self._in_world("float").resolve(index) for index in node.indices)

    def _unit(self, domain: syntax.Expr | syntax.RangeExpr | None) -> program.Unit | None:
        """Return the unit that a domain names; None for other domains."""
        if not isinstance(domain, syntax.NameExpr):
            return None
        if domain.id in self._binders:
            return self._units.get(domain.id)
        symbol = self._names.get(domain.id)
        return symbol.unit if isinstance(symbol, UnitSymbol) else None


def _is_over_candidates(node: program.Aggregate) -> bool:
    return any(isinstance(variable, program.VisibleVariable) for variable in node.runnings)
