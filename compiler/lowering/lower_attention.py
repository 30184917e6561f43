"""Lowering of attentions: their keys, the names that rows bind, scores, weights, values, and joined branches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from attnc.compiler import ir
from attnc.compiler.ir import Index, fold, value_nodes
from attnc.compiler.ir.rewrite import aggregate, substitute, substitute_attend, substitute_value
from attnc.compiler.lowering.lower_expressions import Lowering, LoweringScope
from attnc.compiler.lowering.lower_round import is_list, members_of
from attnc.compiler.lowering.lower_units import LinearUnit, row_major, unflattened
from attnc.compiler.lowering.lowered_operations import Lowered, as_value, refuse
from attnc.compiler.lowering.rational import Rational
from attnc.spec import program as checked
from attnc.spec.checks.measure import Measures
from attnc.spec.source import Span

TOKENS = "key tokens"
"""The name of the size for the number of tokens on the key side where keys are not tokens."""


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """The attention that is being lowered: its scope, the name of its key, and its relation once it is lowered."""

    attend: checked.AttentionClauses
    scope: LoweringScope
    key: Lowered
    relation: Index | None = None


@dataclass(frozen=True, slots=True)
class KeyNaming:
    """The name of a key; where keys are not tokens, also their number and the key that a token is in."""

    key: Lowered
    count: Index | None = None
    key_of: Index | None = None


@dataclass
class AttentionLowering(Lowering):
    """Lowers attentions in order; an attention may read the results of earlier attentions."""

    program: checked.Program = field(kw_only=True)
    stateful: dict[str, tuple[ir.Recur, ...]] = field(default_factory=dict, init=False)
    """The branches with a state by name; a family's branches are listed together."""
    _nodes: dict[str, ir.Attend] = field(default_factory=dict, init=False)
    _attention: AttentionContext | None = field(default=None, init=False)
    _measures: Measures = field(default_factory=Measures, init=False)

    def check_sorts(self, what: str, span: Span) -> None:
        """Raise SpecError in a pattern with documents, because tokens would have to be sorted within each document."""
        if self.program.documents is not None:
            refuse(span, f"{what} in a pattern with `documents`", "Remove `documents`, and call with cu_seqlens.")

    def context(self) -> object:
        """Return the attention that is being lowered: scores and the keys of a row depend on it."""
        return None if self._attention is None else self._attention.attend

    # --- attentions ---

    def attend(self, attend: checked.AttentionClauses, rounded: Index | None) -> ir.Attend:
        """Lower an attention. `rounded`: the pattern's relation where it is rounded.

        Raises SpecError where a part of the attention is not supported.
        """
        family, scope = self._loop(attend.family, LoweringScope())
        stack, scope = self._loop(attend.stack, scope)
        self._refuse_documents(attend)
        for unit in attend.per:
            self.units[unit], _ = members_of(unit, self.program, self, scope)
            scope = scope.bind(unit.binder, self.lower(unit.value, scope))
        scope, keys = self._keys(attend, scope)
        self._attention = AttentionContext(attend, scope, keys.key)
        lines = [] if rounded is not None else list(self.program.visible)
        visible = fold.conjunction(*(self.truth(line, scope) for line in (*lines, *attend.visible)))
        visible = visible if rounded is None else rounded
        self._attention = replace(self._attention, relation=visible)
        score = self._score(scope)
        weights = self._weights(attend, scope)
        value = self._value(attend, scope)
        node = ir.Attend(attend.name, visible, score, weights, value, keys.count, keys.key_of, stack, family)
        self._attention = None
        self._nodes[attend.name] = node = node if keys.count is None else _on_tokens(node)
        return node

    def _refuse_documents(self, attend: checked.AttentionClauses) -> None:
        if (attend.over is not None or self.program.pads) and self.program.documents is not None:
            span = attend.over.span if attend.over is not None else self.program.pads[0].span
            refuse(span, "a pattern with `documents` and keys that are not tokens", "Call it once for each document.")

    def _keys(self, attend: checked.AttentionClauses, scope: LoweringScope) -> tuple[LoweringScope, KeyNaming]:
        """Return the scope in which keys are named, and how they are named."""
        match attend.over:
            case None if self.program.pads:
                return self._padded(scope)
            case None:
                return scope, KeyNaming(fold.place("k"))
            case checked.Unit() as unit:
                keys = self._unit_keys(unit, scope)
                return scope.bind(unit.binder, keys.key), keys
            case checked.KeyRange(binder=binder) as item:
                first, last = self.ends(item, scope)
                key = fold.add(fold.place("k"), first)
                return scope.bind(binder, key), KeyNaming(key, fold.sub(last, first))

    def first_query(self) -> Index:
        """The position of query 0."""
        if self.program.align != "end":
            return fold.const(0)
        return fold.sub(fold.extent("keys"), fold.extent("queries"))

    def _loop(self, item: checked.KeyRange | None, scope: LoweringScope) -> tuple[ir.Loop | None, LoweringScope]:
        if item is None:
            return None, scope
        variable = self.variable(item.binder.name)
        ends = self.ends(item, scope)
        return (variable, *ends), scope.bind(item.binder, variable)

    def ends(self, item: checked.KeyRange, scope: LoweringScope) -> tuple[Index, Index]:
        """The ends of a range; where the ends depend on the query, the ends of the union over all queries."""
        if not item.by_query:
            return self.integer(item.low, scope), self.integer(item.high, scope)
        return self._over_queries("min", item.low, scope), self._over_queries("max", item.high, scope)

    def _over_queries(self, op: Literal["min", "max"], end: checked.Expr, scope: LoweringScope) -> Index:
        """The least or greatest value of a query-dependent end over all queries, at least query 0."""
        query = self.variable("q")
        end_of_query = self.integer(end, replace(scope, q=fold.add(query, self.first_query())))
        count = fold.maximum(fold.extent("queries"), fold.const(1))
        return aggregate(op, query, fold.const(0), count, fold.truth(True), end_of_query)

    def _unit_keys(self, unit: checked.Unit, scope: LoweringScope) -> KeyNaming:
        """Keys that are units, in row-major order of their numbers: the first number of a list changes slowest."""
        members, unit_numbers = members_of(unit, self.program, self, scope)
        if isinstance(members.form, LinearUnit) and not 0 <= members.form.shift < members.form.size:
            refuse(unit.span, "units whose numbers do not begin at 0", "Number them from 0: `k // 4`.")
        self.units[unit] = members
        counts = members.counts()
        numbers = unflattened(fold.place("k"), counts)
        key: Lowered = numbers if is_list(unit, self, scope) else numbers[0]
        return KeyNaming(key, fold.product(counts), row_major(counts, unit_numbers))

    def _padded(self, scope: LoweringScope) -> tuple[LoweringScope, KeyNaming]:
        """The scope and naming of keys that are tokens padded with zeros."""
        pads = {pad.axis: pad for pad in self.program.pads}
        place = fold.place("k")
        (segment,) = self.segments.values()
        lows, counts = [], []
        for axis, (_, extent) in enumerate(segment.axes):
            low = self.integer(pads[axis].low, scope) if axis in pads else fold.const(0)
            high = self.integer(pads[axis].high, scope) if axis in pads else extent
            lows.append(low)
            counts.append(fold.sub(high, low))
        coordinates, inside, token, key_of = [], [], fold.const(0), fold.const(0)
        for axis, (name, extent) in enumerate(segment.axes):
            along = fold.coord(
                place, fold.const(0), fold.product(tuple(counts[axis + 1 :])), counts[axis] if axis else None, name
            )
            coordinates.append(fold.add(along, lows[axis]))
            inside += [fold.nonnegative(coordinates[-1]), fold.less(coordinates[-1], extent)]
            token = fold.add(fold.mul(token, extent), coordinates[-1])
            inner = fold.product(tuple(extent for _, extent in segment.axes[axis + 1 :]))
            coordinate = fold.coord(place, fold.const(0), inner, extent if axis else None, name)
            key_of = fold.add(fold.mul(key_of, counts[axis]), fold.sub(coordinate, lows[axis]))
        position = fold.choice(fold.conjunction(*inside), token, fold.const(ir.OUTSIDE))
        scope = replace(scope, k=position, coordinates=(*scope.coordinates, ("k", tuple(coordinates))))
        return scope, KeyNaming(position, fold.product(tuple(counts)), key_of)

    # --- clauses ---

    def _score(self, scope: LoweringScope) -> ir.Value:
        attend = self._current_attention().attend
        if attend.score is not None:
            return self.value(attend.score, scope)
        q, k = (value_nodes.vector(name, scope.head, position) for name, position in (("q", scope.q), ("k", scope.k)))  # type: ignore[arg-type]
        return value_nodes.apply("mul", value_nodes.scale(), value_nodes.dot(q, k))

    def _weights(self, attend: checked.AttentionClauses, scope: LoweringScope) -> ir.Softmax | ir.Value:
        weights = attend.weights
        if weights is None:
            return ir.Softmax()
        if not isinstance(weights, checked.SoftmaxClause):
            return self.value(weights, scope)
        return ir.Softmax(None if weights.extra is None else self.value(weights.extra, scope))

    def _value(self, attend: checked.AttentionClauses, scope: LoweringScope) -> ir.Value:
        if attend.value is not None:
            return self.value(attend.value, scope)
        return value_nodes.vector("v", scope.head, scope.k)

    def _current_attention(self) -> AttentionContext:
        assert self._attention is not None
        return self._attention

    # --- what its expressions read ---

    def lower_attention_read(self, expr: checked.Expr, scope: LoweringScope) -> Lowered:
        """Lower a vector, a score, a softmax weight, or a read of a branch's result."""
        match expr:
            case checked.Vector():
                return self._vector(expr, scope)
            case checked.ScoreRead():
                return self._score(self._at_key(scope, expr.at))
            case checked.SoftmaxShare():
                return self._share(expr, scope)
            case checked.BranchRead():
                return self._branch(expr, scope)
            case checked.MergeCall():
                return self._merged(expr, scope)[0]
            case _:
                raise AssertionError(expr)

    def _vector(self, expr: checked.Vector, scope: LoweringScope) -> ir.Value:
        position = self.integer(expr.at, scope) if expr.at is not None else scope.q if expr.tensor == "q" else scope.k
        return value_nodes.vector(expr.tensor, scope.head, position)

    def _at_key(self, scope: LoweringScope, key_expr: checked.Expr | None) -> LoweringScope:
        """Return the scope in which the key is the one at `at`; the same scope for None."""
        if key_expr is None:
            return scope
        index, over = self.integer(key_expr, scope), self._current_attention().attend.over
        if isinstance(over, checked.Unit) and is_list(over, self, scope):
            refuse(key_expr.span, "a read of the score of another tile", "Read the score of the current key.")
        if over is not None:
            return scope.bind(over.binder, index)
        return scope.at("k", index)

    def _scope_of_row_keys(self, scope: LoweringScope) -> LoweringScope:
        """Return the scope with the key that an aggregate over the row's keys runs over."""
        current = self._current_attention()
        if current.attend.over is not None:
            return scope.bind(current.attend.over.binder, current.key)
        return scope.at("k", current.scope.k, dict(current.scope.coordinates).get("k"))

    def lower_row_aggregate(self, expr: checked.Aggregate, scope: LoweringScope) -> Lowered:
        """Lower an aggregate over the keys of a row."""
        self._refuse_outer_key(expr, scope)
        inner = self._scope_of_row_keys(scope)
        conditions = [] if expr.condition is None else [self._selected(expr.condition, inner)]
        if expr.op == "count":
            return value_nodes.seen(
                "sum", fold.conjunction(*conditions, self._selected(expr.body, inner)), value_nodes.number(1.0)
            )
        condition = fold.conjunction(*conditions)
        body = as_value(self.lower(expr.body, inner))
        if expr.op == "mean":
            number = value_nodes.seen("sum", condition, value_nodes.number(1.0))
            return value_nodes.apply("share", value_nodes.seen("sum", condition, body), number)
        op: Literal["sum", "min", "max"] = "sum" if expr.op == "sum" else "min" if expr.op == "min" else "max"
        return value_nodes.seen(op, condition, body)

    def _refuse_outer_key(self, expr: checked.Aggregate, scope: LoweringScope) -> None:
        """Raise SpecError where an aggregate over the row's keys reads the outer key, which has no name in the IR."""
        over = self._current_attention().attend.over
        used = self._measures.of(expr).free - ({over.binder} if over is not None else set())
        for binder, value in scope.names:
            parts = (value.num, value.den) if isinstance(value, Rational) else (value,)
            if binder in used and any("k" in value_nodes.reads(p) for p in parts if isinstance(p, ir.Node)):
                refuse(expr.span, "a read of the outer key inside `for k`", "Move the read out of the aggregate.")

    def _selected(self, condition: checked.Expr, scope: LoweringScope) -> Index:
        """Lower a condition on a visible key; the pattern's own relation holds there and becomes true."""
        truth = self.truth(condition, scope)
        return fold.truth(True) if truth is self._current_attention().relation else truth

    def _share(self, expr: checked.SoftmaxShare, scope: LoweringScope) -> ir.Value:
        """Lower a softmax weight: exp(x) / (sum(exp(x) for k) + exp(extra))."""
        inner = self._scope_of_row_keys(scope)
        score, running = (self._score(s) if expr.score is None else self.value(expr.score, s) for s in (scope, inner))
        total = value_nodes.seen("sum", fold.truth(True), value_nodes.apply("exp", running))
        if expr.extra is not None:
            total = value_nodes.apply("add", total, self._exponentials(self.value(expr.extra, scope)))
        return value_nodes.apply("share", value_nodes.apply("exp", score), total)

    def _exponentials(self, extra: ir.Value) -> ir.Value:
        """Return the sum of exponentials of the extra logits: one logit or a vector of them."""
        if not value_nodes.rank(extra):
            return value_nodes.apply("exp", extra)
        if not isinstance(extra, ir.Element):
            span = self.origins.get(extra, self.program.span)  # type: ignore[call-overload]
            refuse(span, "a vector of extra logits that is not an input", "Declare it as an input, or write one logit.")
        dim = extra.tensor.dims[-1]
        length = fold.const(dim) if isinstance(dim, int) else fold.extent(dim)
        variable = self.variable("i")
        body = value_nodes.apply("exp", value_nodes.pick(extra, variable))
        return value_nodes.total("sum", variable, fold.const(0), length, fold.truth(True), body)

    # --- branches ---

    def _branch(self, expr: checked.BranchRead, scope: LoweringScope) -> ir.Value:
        if expr.branch in self.stateful:
            place = scope.q if expr.at is None else self.integer(expr.at, scope)
            output, family = value_nodes.output_of_state(self.stateful[expr.branch][0]), self._low(expr.branch)
            indices = fold.head_index("batch"), scope.head, place
            if family is None or expr.member is None:
                return value_nodes.element(output, indices)
            return value_nodes.element(output, (*indices, fold.sub(self.integer(expr.member, scope), family)))
        node = self._nodes[expr.branch]
        if expr.part == "weight":
            return self._weight(expr, scope)
        tensor = value_nodes.output(node) if expr.part == "out" else value_nodes.output_lse(node)
        position = scope.q if expr.at is None else self.integer(expr.at, scope)
        return value_nodes.element(
            tensor, (fold.head_index("batch"), scope.head, position, *self._member(expr, node, scope))
        )

    def _low(self, name: str) -> Index | None:
        """The number of the first member of a family of branches with a state; None for a single branch."""
        family = next(branch for branch in self.program.stateful if branch.name == name).family
        return None if family is None else self.integer(family.low, LoweringScope())

    def _member(self, expr: checked.BranchRead, node: ir.Attend, scope: LoweringScope) -> tuple[Index, ...]:
        if expr.member is None or node.family is None:
            return ()
        return (fold.sub(self.integer(expr.member, scope), node.family[1]),)

    def _weight(self, expr: checked.BranchRead, scope: LoweringScope) -> ir.Value:
        """exp(score - lse) where the row of the branch sees this key, with the branch's expressions written out."""
        node = self._nodes[expr.branch]
        attend = next(a for a in self.program.attends if a.name == expr.branch)
        sums = any(isinstance(below, ir.VisibleReduce) for below in node.score.below)
        if attend.per or attend.stack is not None or sums:
            phrase = "the weight of a branch that has rows or sums of its own"
            refuse(expr.span, phrase, "Write the weight out in the branch that reads it.")
        lse = value_nodes.element(
            value_nodes.output_lse(node),
            (fold.head_index("batch"), scope.head, scope.q, *self._member(expr, node, scope)),
        )
        changes: dict[Index, Index] = {}
        if node.family is not None and expr.member is not None:
            changes[node.family[0]] = self.integer(expr.member, scope)
        if scope.q is not fold.place("q"):
            changes[fold.place("q")] = scope.q
        if scope.head is not fold.head_index("head"):
            changes[fold.head_index("head")] = scope.head
        current = self._current_attention()
        key = scope.lookup(current.attend.over.binder) if current.attend.over is not None else scope.k
        if key is not current.key:
            refuse(expr.span, "the weight of a branch at another key", "Read the weight at the current key.")
        score = substitute_value(node.score, changes) if changes else node.score
        visible = substitute(node.visible, changes) if changes else node.visible
        finite = value_nodes.apply(
            "max", lse, value_nodes.number(-1e30)
        )  # the LSE is -inf in a row whose scores are all -inf
        weight = value_nodes.apply("exp", value_nodes.apply("sub", score, finite))
        return value_nodes.select(visible, weight, value_nodes.number(0.0))

    def _merged(self, expr: checked.MergeCall, scope: LoweringScope) -> tuple[ir.Value, ir.Value]:
        """Lower `merge`: Σ exp(lse) · out / Σ exp(lse), and the logarithm of the divisor."""
        outs, shares = [], []
        for part in expr.parts:
            outs.append(self._branch(part, scope))
            shares.append(value_nodes.apply("exp", self._branch(replace(part, part="lse"), scope)))
        weighted = value_nodes.summed(
            [value_nodes.apply("mul", share, out) for share, out in zip(shares, outs, strict=True)]
        )
        total = value_nodes.summed(shares)
        return value_nodes.apply("share", weighted, total), value_nodes.apply("log", total)

    def combined(self) -> tuple[ir.Value | None, ir.Value | None]:
        """Lower `combine` to the result and its LSE, if any; both None where the only attention is the result."""
        expr, scope = self.program.combine, LoweringScope()
        if expr is None:
            return None, None
        if isinstance(expr, checked.MergeCall):
            return self._merged(expr, scope)
        result = self.value(expr, scope)
        if not isinstance(expr, checked.BranchRead) or expr.part != "out" or expr.at is not None:
            return result, None
        if expr.branch in self.stateful or not isinstance(self._nodes[expr.branch].weights, ir.Softmax):
            return result, None
        return result, self._branch(replace(expr, part="lse"), scope)


def _on_tokens(node: ir.Attend) -> ir.Attend:
    """Return a node whose keys are not tokens, with `TOKENS` as the size for the number of tokens."""
    assert node.keys is not None
    return substitute_attend(node, {fold.extent("keys"): fold.extent(TOKENS)})
