"""Lowering of attentions: their keys, the rows' own names, scores, weights, values, and what joins branches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NoReturn

from attnc.compiler import fold, ir, value_nodes
from attnc.compiler.ir import Index
from attnc.compiler.lowering.lower_expressions import Lowering, LoweringScope
from attnc.compiler.lowering.lower_round import is_list, members_of
from attnc.compiler.lowering.lower_units import LinearUnit
from attnc.compiler.lowering.lowered_operations import Lowered, as_value
from attnc.compiler.lowering.rational import Rational
from attnc.compiler.rewrite import substitute, substitute_attend, substitute_value
from attnc.spec import program as checked
from attnc.spec.checks.measure import Measures
from attnc.spec.diagnostics import Diagnostic, Label
from attnc.spec.errors import SpecError
from attnc.spec.source import Span

TOKENS = "key tokens"
"""The size that stands for the number of tokens on the key side where keys are something else."""


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """The attention at hand: how its keys are named, and its relation, once it is known."""

    attend: checked.AttentionClauses
    scope: LoweringScope
    key: Lowered
    relation: Index | None = None


@dataclass(frozen=True, slots=True)
class KeyNaming:
    """How a key is named; how many there are, and which one a token is in, where they are no tokens."""

    key: Lowered
    count: Index | None = None
    key_of: Index | None = None


@dataclass
class AttentionLowering(Lowering):
    """Lowers attentions one after another; later ones may read what earlier ones give."""

    program: checked.Program = field(kw_only=True)
    stateful: dict[str, tuple[ir.Recur, ...]] = field(default_factory=dict, init=False)
    """The branches with a state, those of a family together."""
    _nodes: dict[str, ir.Attend] = field(default_factory=dict, init=False)
    _around: AttentionContext | None = field(default=None, init=False)
    _measures: Measures = field(default_factory=Measures, init=False)

    def check_sorts(self, what: str, span: Span) -> None:
        """Raise SpecError in a pattern with documents, whose tokens are sorted by themselves."""
        if self.program.documents is not None:
            refuse(span, f"{what} in a pattern with `documents`", "Leave these out, and call it with cu_seqlens.")

    def context(self) -> object:
        """Scores, and the keys of a row, are those of the attention at hand."""
        return None if self._around is None else self._around.attend

    # --- attentions ---

    def attend(self, attend: checked.AttentionClauses, rounded: Index | None) -> ir.Attend:
        """One attention. `rounded`: the pattern's relation where it is rounded.

        Raises SpecError where something in it is not supported.
        """
        family, scope = self._loop(attend.family, LoweringScope())
        stack, scope = self._loop(attend.stack, scope)
        self._refuse_documents(attend)
        for unit in attend.per:
            self.units[unit], _ = members_of(unit, self.program, self, scope)
            scope = scope.bind(unit.binder, self.lower(unit.value, scope))
        scope, places = self._keys(attend, scope)
        self._around = AttentionContext(attend, scope, places.key)
        lines = [] if rounded is not None else list(self.program.visible)
        visible = fold.conjunction(*(self.truth(line, scope) for line in (*lines, *attend.visible)))
        visible = visible if rounded is None else rounded
        self._around = replace(self._around, relation=visible)
        score = self._score(scope)
        weights = self._weights(attend, scope)
        value = self._own_value(attend, scope)
        node = ir.Attend(attend.name, visible, score, weights, value, places.count, places.key_of, stack, family)
        self._around = None
        self._nodes[attend.name] = node = node if places.count is None else _on_tokens(node)
        return node

    def _refuse_documents(self, attend: checked.AttentionClauses) -> None:
        if (attend.over is not None or self.program.pads) and self.program.documents is not None:
            span = attend.over.span if attend.over is not None else self.program.pads[0].span
            refuse(span, "keys that are no tokens, with `documents`,", "Call it once for each document.")

    def _keys(self, attend: checked.AttentionClauses, scope: LoweringScope) -> tuple[LoweringScope, KeyNaming]:
        """The scope in which keys have their names, and what they are."""
        match attend.over:
            case None if self.program.pads:
                return self._padded(scope)
            case None:
                return scope, KeyNaming(fold.place("k"))
            case checked.Unit() as unit:
                keys = self._units_of(unit, scope)
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
        """The ends of a range; of one that differs from query to query those of all together."""
        if not item.by_query:
            return self.integer(item.low, scope), self.integer(item.high, scope)
        return self._of_queries("min", item.low, scope), self._of_queries("max", item.high, scope)

    def _of_queries(self, op: Literal["min", "max"], end: checked.Expr, scope: LoweringScope) -> Index:
        """The least or greatest of an end that differs from query to query; without queries that of query 0."""
        query = self.variable("q")
        own = self.integer(end, replace(scope, q=fold.add(query, self.first_query())))
        count = fold.maximum(fold.extent("queries"), fold.const(1))
        return fold.reduce(op, query, fold.const(0), count, fold.truth(True), own)

    def _units_of(self, unit: checked.Unit, scope: LoweringScope) -> KeyNaming:
        """Units by number: the first of a list of numbers is the slowest."""
        members, own = members_of(unit, self.program, self, scope)
        if isinstance(members.form, LinearUnit) and not 0 <= members.form.shift < members.form.size:
            refuse(unit.span, "units whose numbers do not begin at 0", "Number them from 0: `k // 4`.")
        self.units[unit] = members
        counts = members.counts()
        numbers, key_of = [], fold.const(0)
        for i, count in enumerate(counts):
            number = fold.floordiv(fold.place("k"), fold.product(counts[i + 1 :]))
            numbers.append(number if i == 0 else fold.mod(number, count))
            key_of = fold.add(fold.mul(key_of, count), own[i])
        key: Lowered = tuple(numbers) if is_list(unit, self, scope) else numbers[0]
        return KeyNaming(key, fold.product(counts), key_of)

    def _padded(self, scope: LoweringScope) -> tuple[LoweringScope, KeyNaming]:
        """Keys that are tokens, with zeros around them."""
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
            own = fold.coord(place, fold.const(0), inner, extent if axis else None, name)
            key_of = fold.add(fold.mul(key_of, counts[axis]), fold.sub(own, lows[axis]))
        position = fold.choice(fold.conjunction(*inside), token, fold.const(ir.OUTSIDE))
        scope = replace(scope, k=position, coordinates=(*scope.coordinates, ("k", tuple(coordinates))))
        return scope, KeyNaming(position, fold.product(tuple(counts)), key_of)

    # --- clauses ---

    def _score(self, scope: LoweringScope) -> ir.Value:
        attend = self._here().attend
        if attend.score is not None:
            return self.value(attend.score, scope)
        q, k = (value_nodes.vector(name, scope.head, at) for name, at in (("q", scope.q), ("k", scope.k)))  # type: ignore[arg-type]
        return value_nodes.apply("mul", value_nodes.scale(), value_nodes.dot(q, k))

    def _weights(self, attend: checked.AttentionClauses, scope: LoweringScope) -> ir.Softmax | ir.Value:
        weights = attend.weights
        if weights is None:
            return ir.Softmax()
        if not isinstance(weights, checked.SoftmaxClause):
            return self.value(weights, scope)
        return ir.Softmax(None if weights.extra is None else self.value(weights.extra, scope))

    def _own_value(self, attend: checked.AttentionClauses, scope: LoweringScope) -> ir.Value:
        if attend.value is not None:
            return self.value(attend.value, scope)
        return value_nodes.vector("v", scope.head, scope.k)

    def _here(self) -> AttentionContext:
        assert self._around is not None
        return self._around

    # --- what its expressions read ---

    def of_attention(self, expr: checked.Expr, scope: LoweringScope) -> Lowered:
        """Vectors, scores, shares, and what branches gave."""
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
        at = self.integer(expr.at, scope) if expr.at is not None else scope.q if expr.tensor == "q" else scope.k
        return value_nodes.vector(expr.tensor, scope.head, at)

    def _at_key(self, scope: LoweringScope, at: checked.Expr | None) -> LoweringScope:
        """The scope with another key."""
        if at is None:
            return scope
        index, over = self.integer(at, scope), self._here().attend.over
        if isinstance(over, checked.Unit) and is_list(over, self, scope):
            refuse(at.span, "a score of a tile by its number", "Read the score of this key.")
        if over is not None:
            return scope.bind(over.binder, index)
        others = tuple(item for item in scope.coordinates if item[0] != "k")
        return replace(scope, k=index, coordinates=others)

    def _own_key(self, scope: LoweringScope) -> LoweringScope:
        """The scope with the key that runs over the row's."""
        around = self._here()
        if around.attend.over is not None:
            return scope.bind(around.attend.over.binder, around.key)
        others = tuple(item for item in scope.coordinates if item[0] != "k")
        own = tuple(item for item in around.scope.coordinates if item[0] == "k")
        return replace(scope, k=around.scope.k, coordinates=others + own)

    def of_row(self, expr: checked.Aggregate, scope: LoweringScope) -> Lowered:
        """An aggregate over the keys of a row."""
        self._refuse_outer_key(expr, scope)
        inner = self._own_key(scope)
        conditions = [] if expr.condition is None else [self._asked(expr.condition, inner)]
        if expr.op == "count":
            return value_nodes.seen(
                "sum", fold.conjunction(*conditions, self._asked(expr.body, inner)), value_nodes.number(1.0)
            )
        condition = fold.conjunction(*conditions)
        body = as_value(self.lower(expr.body, inner))
        if expr.op == "mean":
            number = value_nodes.seen("sum", condition, value_nodes.number(1.0))
            return value_nodes.apply("share", value_nodes.seen("sum", condition, body), number)
        op: Literal["sum", "min", "max"] = "sum" if expr.op == "sum" else "min" if expr.op == "min" else "max"
        return value_nodes.seen(op, condition, body)

    def _refuse_outer_key(self, expr: checked.Aggregate, scope: LoweringScope) -> None:
        """Inside an aggregate over the row's keys, the key outside of it has no name in the IR."""
        over = self._here().attend.over
        used = self._measures.of(expr).free - ({over.binder} if over is not None else set())
        for binder, value in scope.names:
            parts = (value.num, value.den) if isinstance(value, Rational) else (value,)
            if binder in used and any("k" in value_nodes.reads(p) for p in parts if isinstance(p, ir.Node)):
                refuse(expr.span, "the key outside of a `for k`, inside of it,", "Write the sum without it.")

    def _asked(self, condition: checked.Expr, scope: LoweringScope) -> Index:
        """A condition on a key that is seen: that it is seen is known."""
        found = self.truth(condition, scope)
        return fold.truth(True) if found is self._here().relation else found

    def _share(self, expr: checked.SoftmaxShare, scope: LoweringScope) -> ir.Value:
        """exp(x) / (sum(exp(x) for k) + exp(extra))."""
        inner = self._own_key(scope)
        own, running = (self._score(s) if expr.score is None else self.value(expr.score, s) for s in (scope, inner))
        whole = value_nodes.seen("sum", fold.truth(True), value_nodes.apply("exp", running))
        if expr.extra is not None:
            whole = value_nodes.apply("add", whole, self._exponentials(self.value(expr.extra, scope)))
        return value_nodes.apply("share", value_nodes.apply("exp", own), whole)

    def _exponentials(self, extra: ir.Value) -> ir.Value:
        """Return the sum of exponentials of the extra logits: one logit or a vector of them."""
        if not value_nodes.rank(extra):
            return value_nodes.apply("exp", extra)
        if not isinstance(extra, ir.Element):
            span = self.origins.get(extra, self.program.span)  # type: ignore[call-overload]
            refuse(span, "a vector of extra logits that is no input", "Give them as an input, or one by one.")
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
        at = scope.q if expr.at is None else self.integer(expr.at, scope)
        return value_nodes.element(tensor, (fold.head_index("batch"), scope.head, at, *self._member(expr, node, scope)))

    def _low(self, name: str) -> Index | None:
        """Where a family of branches with a state begins."""
        family = next(branch for branch in self.program.stateful if branch.name == name).family
        return None if family is None else self.integer(family.low, LoweringScope())

    def _member(self, expr: checked.BranchRead, node: ir.Attend, scope: LoweringScope) -> tuple[Index, ...]:
        if expr.member is None or node.family is None:
            return ()
        return (fold.sub(self.integer(expr.member, scope), node.family[1]),)

    def _weight(self, expr: checked.BranchRead, scope: LoweringScope) -> ir.Value:
        """exp(score - lse) where that branch's row sees this key: its expressions, written here."""
        node = self._nodes[expr.branch]
        attend = next(a for a in self.program.attends if a.name == expr.branch)
        sums = any(isinstance(below, ir.VisibleReduce) for below in node.score.below)
        if attend.per or attend.stack is not None or sums:
            what = "the weight of a branch that has rows or sums of its own"
            refuse(expr.span, what, "Compute it in this branch.")
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
        key = scope.lookup(self._here().attend.over.binder) if self._here().attend.over is not None else scope.k  # type: ignore[union-attr]
        if key is not self._here().key:
            refuse(expr.span, "the weight of a branch at another key", "Read it at this key.")
        score = substitute_value(node.score, changes) if changes else node.score
        visible = substitute(node.visible, changes) if changes else node.visible
        finite = value_nodes.apply("max", lse, value_nodes.number(-1e30))  # of a row whose scores are all -inf
        weight = value_nodes.apply("exp", value_nodes.apply("sub", score, finite))
        return value_nodes.select(visible, weight, value_nodes.number(0.0))

    def _merged(self, expr: checked.MergeCall, scope: LoweringScope) -> tuple[ir.Value, ir.Value]:
        """Σ exp(lse) · out / Σ exp(lse), and the logarithm of the divisor."""
        outs, shares = [], []
        for part in expr.parts:
            outs.append(self._branch(part, scope))
            shares.append(value_nodes.apply("exp", self._branch(replace(part, part="lse"), scope)))
        top = value_nodes.summed(
            [value_nodes.apply("mul", share, out) for share, out in zip(shares, outs, strict=True)]
        )
        whole = value_nodes.summed(shares)
        return value_nodes.apply("share", top, whole), value_nodes.apply("log", whole)

    def combined(self) -> tuple[ir.Value | None, ir.Value | None]:
        """The pattern's result, and its LSE where it has one; None where the only attention is the result."""
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
    """A node whose keys are no tokens, with the number of tokens by a name of its own."""
    assert node.keys is not None
    return substitute_attend(node, {fold.extent("keys"): fold.extent(TOKENS)})


def refuse(span: Span, what: str, remedy: str) -> NoReturn:
    """Raise SpecError (A701): not supported yet, with what to do instead."""
    raise SpecError((Diagnostic("A701", f"{what} is not supported yet", Label(span), help=remedy),))
