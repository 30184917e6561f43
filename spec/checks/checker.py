"""Types, stages and exactness of expressions: what is known of each in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from typing_extensions import assert_never

from attnc.spec import program
from attnc.spec.checks.attention_clauses import AttentionChecker, Reads
from attnc.spec.checks.expression_forms import (
    BOOL,
    FLOAT,
    INT,
    NOTHING,
    REAL,
    UNKNOWN,
    ExprForm,
    Finding,
    as_number,
    floating,
    join,
    of_constant,
    of_type,
)
from attnc.spec.checks.guards import Facts, Guards
from attnc.spec.checks.measure import (
    Measures,
    children,
    first_use,
)
from attnc.spec.checks.operations import OperationRules
from attnc.spec.checks.recurrence_lines import RecurrentChecker
from attnc.spec.diagnostics import Label
from attnc.spec.names.builtins import SIZES
from attnc.spec.report import DiagnosticList
from attnc.spec.source import Span

Environment = Mapping[program.Binder, Finding]
_Leaf = (
    program.Literal
    | program.ParameterRead
    | program.PositionRead
    | program.HeadIndexRead
    | program.Size
    | program.InSegment
    | program.ScaleRead
    | program.StateRead
    | program.Infinity
    | program.RankingRead
)


class Checker:
    """Finds out what is known of every expression; a definition is checked once for each kind of use."""

    def __init__(self, pattern: program.Program, report: DiagnosticList) -> None:
        self._pattern = pattern
        self._report = report
        self._rules = OperationRules(self._complain)
        self.recurrent = RecurrentChecker(self, self._complain)
        self._guards = Guards()
        self._measures = Measures()
        self._parameters = {p.name: p for p in pattern.parameters}
        self._sizes = _size_stages(pattern)
        self.attention: AttentionChecker | None = None
        """The checker of the current attention, None outside of one."""
        self._uses: list[Span] = []
        self._in_unit = False
        self._complaints: set[tuple[str, Span]] = set()
        self._known: dict[object, Finding] = {}

    def _unit(self, unit: program.Unit, facts: Facts) -> Finding:
        self._in_unit = True
        result = self.find(unit.value, {}, facts)
        self._in_unit = False
        item = result.form.item
        self._rules.integer(unit.value, result if item is None else Finding(item), "a unit")
        return result

    def unit(self, unit: program.Unit, facts: Facts) -> Finding:
        """Check that a unit's value is an integer or a list of integers; return what is known of it."""
        return self._unit(unit, facts)

    def integer(self, node: program.Expr, what: str, facts: Facts, env: Environment | None = None) -> Finding:
        """Check that an expression is an integer; return what is known of it."""
        result = self.find(node, env or {}, facts)
        self._rules.integer(node, result, what)
        return result

    @property
    def has_branches(self) -> bool:
        """Whether some recurrence is a branch."""
        return bool(self._pattern.stateful)

    @contextmanager
    def by_name(self) -> Iterator[None]:
        """While this holds, a vector goes with a matrix over its axis."""
        self._rules.floating.by_name = True
        try:
            yield
        finally:
            self._rules.floating.by_name = False

    @property
    def everywhere(self) -> Facts:
        """The facts that hold for every token."""
        return self._everywhere()

    def condition(self, node: program.Expr, env: Environment, facts: Facts, what: str = "`visible`") -> Finding:
        """Check that an expression is a truth value; return what is known of it."""
        result = self.find(node, env, facts)
        self._rules.boolean(node, result, what)
        return result

    def facts_after(self, node: program.Expr, facts: Facts) -> Facts:
        """The facts where a condition holds."""
        return self._guards.after(node, True, facts)

    def first_use(self, node: program.Expr, place: str) -> Span | None:
        """Where an expression first reads a place."""
        return first_use(node, place, self._measures)

    def _everywhere(self) -> Facts:
        segments = frozenset(self._pattern.segments)
        return Facts(segments, segments)

    # --- expressions -------------------------------------------------------------------------------------------------

    def find(self, node: program.Expr, env: Environment, facts: Facts | None) -> Finding:  # noqa: C901  one case a kind
        """Return what is known of an expression. Without `facts`, coordinates are not checked."""
        match node:
            case program.Local(binder=binder):
                return env.get(binder, NOTHING)
            case program.Coordinate():
                return self._coordinate(node, facts)
            case program.InputRead():
                return self._input(node, env, facts)
            case program.DefinitionUse():
                return self._use(node, env, facts)
            case program.Operation():
                return self._operation(node, env, facts)
            case program.ConditionalValue():
                return self._choice(node, env, facts)
            case program.Aggregate():
                return self._aggregate(node, env, facts)
            case program.ListValue() | program.Item():
                return (
                    self._table(node, env, facts)
                    if isinstance(node, program.ListValue)
                    else self._item(node, env, facts)
                )
            case (
                program.Vector()
                | program.ScoreRead()
                | program.SoftmaxShare()
                | program.BranchRead()
                | program.MergeCall()
            ):
                return self._of_attention(node, env, facts)
            case program.InUnit() | program.SelectedTest() | program.SelectedCount():
                return self._of_set(node, env, facts)
            case _:
                return self._leaf(node)

    def _of_set(
        self, node: program.InUnit | program.SelectedTest | program.SelectedCount, env: Environment, facts: Facts | None
    ) -> Finding:
        """Whether something is in a unit or was chosen, and how many were."""
        needs = frozenset[str]()
        for child in children(node):
            found = self.find(child, env, facts)
            self._rules.integer(child, found, "what stands before `in`")
            needs |= found.needs
        if not isinstance(node, program.SelectedCount) and node.unit is not None:
            needs |= env.get(node.unit.binder, NOTHING).needs
        if isinstance(node, program.InUnit):
            return Finding(BOOL, needs | {"length"})
        needs |= {"data", "head", "batch", "row"}
        return Finding(INT, needs, natural=True) if isinstance(node, program.SelectedCount) else Finding(BOOL, needs)

    def _vector(self, node: program.Vector, env: Environment, facts: Facts | None) -> Finding:
        needs = frozenset({"data", "head", "batch"})
        if node.at is not None:
            index = self.find(node.at, env, facts)
            self._rules.integer(node.at, index, f"the place of `{node.tensor}[…]`")
            needs |= index.needs
        return Finding(floating(("dv" if node.tensor == "v" else "dk",)), needs)

    def _of_attention(
        self,
        node: program.Vector | Reads,
        env: Environment,
        facts: Facts | None,
    ) -> Finding:
        if isinstance(node, program.Vector):
            return self._vector(node, env, facts)
        for child in children(node):
            found = self.find(child, env, facts)
            if isinstance(node, program.ScoreRead | program.BranchRead):
                self._rules.integer(child, found, "an index")
        if self.attention is None:
            return Finding(FLOAT)  # a `def` by itself
        return self.attention.find(node)

    def _leaf(self, node: _Leaf) -> Finding:  # noqa: C901  one case a kind
        match node:
            case program.Literal(value=value):
                return of_constant(value)
            case program.ParameterRead(name=name):
                return self._parameter(name)
            case program.PositionRead(place=place):
                return Finding(INT, frozenset({place}), natural=True)
            case program.HeadIndexRead(name=name):
                return Finding(INT, frozenset({"batch" if name == "batch" else "head"}), natural=True)
            case program.Size(name=name):
                return Finding(INT, self._sizes.get(name, frozenset({"size"})), natural=True)
            case program.InSegment(place=place):
                return Finding(BOOL, frozenset({place, "length"}))
            case program.ScaleRead():
                return Finding(FLOAT, frozenset({"size"}))
            case program.Infinity():
                return Finding(FLOAT)
            case program.RankingRead():
                return Finding(FLOAT, frozenset({"data", "head", "batch", "q", "k", "key"}))
            case program.StateRead(state=state):
                form = floating(state.dims, is_complex=state.is_complex)
                return Finding(form, frozenset({"data", "head", "batch"}))
            case _:
                assert_never(node)

    def _parameter(self, name: str) -> Finding:
        parameter = self._parameters.get(name)
        if parameter is None:
            return NOTHING
        return Finding(of_type(parameter.type), frozenset({"head"} if parameter.per_head else ()))

    def _coordinate(self, node: program.Coordinate, facts: Facts | None) -> Finding:
        finding = Finding(INT, frozenset({node.place, "length"}), natural=True)
        if facts is None or facts.of(node.place) <= {node.segment}:
            return finding
        axis = node.segment.axes[node.axis]
        also = (Label(axis.span, "the axis"), *self._used_here())
        name = node.segment.name
        test = f"test it first: `{node.place} in {name} and …`"
        self._report.error(
            "A407",
            f"`{node.place}.{axis.name}` is read where `{node.place}` may be outside `{name}`",
            node.span,
            f"`{node.place}` is not known to be in `{name}`",
            also=also,
            help=f"every token is in a unit: divide its position, `{node.place} // 64`" if self._in_unit else test,
        )
        return finding

    def _input(self, node: program.InputRead, env: Environment, facts: Facts | None) -> Finding:
        dims = node.input.type.dims
        needs = {"data"} | {n for n in ("batch", "head") if n in dims} | ({"head"} if "kv_head" in dims else set())
        written = [d for d in dims if d not in ("batch", "head", "kv_head")]
        for dim, index in zip(written, node.indices, strict=False):
            found = self.find(index, env, facts)
            self._rules.integer(index, found, f"an index of `{node.input.name}`")
            self._check_bounds(index, found, dim if isinstance(dim, int) else None)
            is_row = dim == "query" and isinstance(index, program.PositionRead) and index.place == "q"
            needs |= {"row"} if is_row else found.needs
        if node.input.type.is_floating:
            rest = tuple(written[len(node.indices) :])
            return Finding(floating(rest, is_complex=node.input.type.kind == "complex"), frozenset(needs))
        return Finding(BOOL if node.input.type.kind == "bool" else INT, frozenset(needs))

    def _check_bounds(self, index: program.Expr, finding: Finding, length: int | None) -> None:
        value = finding.constant
        if isinstance(value, int) and (value < 0 or (length is not None and value >= length)):
            limit = f"the entries are 0 to {length - 1}" if length is not None else "indices start at 0"
            self._complain("A312", f"the index {value} is out of range", index.span, "no such entry", help=limit)

    def _use(self, node: program.DefinitionUse, env: Environment, facts: Facts | None) -> Finding:
        definition = node.definition
        given = [self.find(a, env, facts).without_value for a in node.arguments]
        free = self._measures.of_definition(definition).free
        around = {b: env[b] for b in env if b in free}
        key = (definition, tuple(given), frozenset((b, f) for b, f in around.items()), facts)
        if key not in self._known:
            self._uses.append(node.span)
            inner = {**around, **dict(zip(definition.parameters, given, strict=True))}
            self._known[key] = self.find(definition.body, inner, facts)
            self._uses.pop()
        body = self._known[key]
        needs = body.needs.union(*(f.needs for f in given))
        return Finding(body.form, needs, body.constant, body.natural)

    def _operation(self, node: program.Operation, env: Environment, facts: Facts | None) -> Finding:
        found = []
        for operand in node.operands:
            found.append(self.find(operand, env, facts))
            if facts is not None and node.op in ("and", "or"):
                facts = self._guards.after(operand, node.op == "and", facts)
        return self._rules.of(node, found)

    def _choice(self, node: program.ConditionalValue, env: Environment, facts: Facts | None) -> Finding:
        condition = self.find(node.condition, env, facts)
        self._rules.boolean(node.condition, condition)
        then = self.find(node.then, env, facts and self._guards.after(node.condition, True, facts))
        otherwise = self.find(node.otherwise, env, facts and self._guards.after(node.condition, False, facts))
        form = join(then.form, otherwise.form)
        if form is None:
            message = f"one side of `if` is {then.form}, the other {otherwise.form}"
            also = (Label(node.then.span, str(then.form)),)
            help_ = "make both sides alike"
            self._complain("A313", message, node.otherwise.span, str(otherwise.form), also=also, help=help_)
            form = UNKNOWN
        needs = condition.needs | then.needs | otherwise.needs
        return Finding(form, needs, None, then.natural and otherwise.natural)

    def _table(self, node: program.ListValue, env: Environment, facts: Facts | None) -> Finding:
        found = [self.find(item, env, facts) for item in node.items]
        form = found[0].form
        for item, here in zip(node.items[1:], found[1:], strict=True):
            joined = join(form, here.form)
            if joined is None:
                message = f"a list holds {form} and {here.form}"
                also = (Label(node.items[0].span, str(found[0].form)),)
                self._complain("A313", message, item.span, str(here.form), also=also, help="make all entries alike")
                return NOTHING
            form = joined
        needs = frozenset[str]().union(*(f.needs for f in found))
        return Finding(ExprForm("list", form, len(found)), needs)

    def _item(self, node: program.Item, env: Environment, facts: Facts | None) -> Finding:
        table, index = self.find(node.table, env, facts), self.find(node.index, env, facts)
        needs = table.needs | index.needs
        if table.form.kind == "unknown":
            return Finding(UNKNOWN, needs)
        if table.form.kind == "float" and table.form.axes:
            self._rules.integer(node.index, index, "an index")
            return Finding(replace(table.form, axes=table.form.axes[1:]), needs)
        if table.form.item is None:
            message = f"only a list has entries, and this is {table.form}"
            self._complain("A311", message, node.table.span, str(table.form), help="leave the index out")
            return Finding(UNKNOWN, needs)
        self._rules.integer(node.index, index, "an index")
        self._check_bounds(node.index, index, table.form.length)
        return Finding(table.form.item, needs)

    # --- aggregates --------------------------------------------------------------------------------------------------

    def _aggregate(self, node: program.Aggregate, env: Environment, facts: Facts | None) -> Finding:
        inner, bound, needs = dict(env), set[str](), set[str]()
        seen = [r for r in node.runnings if isinstance(r, program.VisibleVariable)]
        if seen:
            self._check_seen(node, len(seen))
        for running in node.runnings:
            if isinstance(running, program.VisibleVariable):
                bound |= {"k", "key"}
                continue
            range_needs, natural = self._domain(running, inner, facts)
            needs |= range_needs - bound
            if isinstance(running.target, program.Binder):
                inner[running.target] = Finding(INT, range_needs, natural=natural)
            else:
                bound |= {running.target, "row"} if running.target == "q" else {running.target}
                facts = self._anywhere(running.target, facts)
        if node.condition is not None:
            condition = self.find(node.condition, inner, facts)
            self._rules.boolean(node.condition, condition)
            needs |= condition.needs - bound
            facts = facts and self._guards.after(node.condition, True, facts)
        body = self.find(node.body, inner, facts)
        needs |= body.needs - bound
        form = self._aggregate_form(node, body)
        form = FLOAT if seen and form.is_number else form
        return Finding(form, frozenset(needs), None, body.natural or node.op == "count")

    def _check_seen(self, node: program.Aggregate, number: int) -> None:
        """An aggregate over the keys of a row: one variable, where there is a row."""
        if self.attention is not None:
            self.attention.check_row(node.span)
        if number != len(node.runnings):
            help_ = "put one into the other: `sum(sum(… for j in …) for k)`"
            self._complain("A701", "`for k` beside other variables is not supported yet", node.span, help=help_)
        if node.op in ("any", "all"):
            help_ = "count: `count(… for k) > 0` is for relations; in weights write `max((1 if … else 0) for k)`"
            self._complain("A701", f"`{node.op}` over the keys of a row is not supported yet", node.span, help=help_)

    def _domain(
        self, running: program.RangeVariable | program.UnitVariable, env: Environment, facts: Facts | None
    ) -> tuple[frozenset[str], bool]:
        """Return the stages that a domain needs, and whether its members are never negative."""
        if isinstance(running, program.UnitVariable):
            return env.get(running.unit.binder, NOTHING).needs | {"length"}, True
        ends = [self._range_end(end, env, facts) for end in (running.low, running.high)]
        return ends[0].needs | ends[1].needs, ends[0].natural

    def _range_end(self, node: program.Expr, env: Environment, facts: Facts | None) -> Finding:
        result = self.find(node, env, facts)
        self._rules.integer(node, result, "the end of a range")
        return result

    def _anywhere(self, place: str, facts: Facts | None) -> Facts | None:
        if facts is None or place == "head":
            return facts
        return facts.known(place, frozenset(self._pattern.segments))

    def _aggregate_form(self, node: program.Aggregate, body: Finding) -> ExprForm:
        if node.op in ("any", "all", "count"):
            self._rules.boolean(node.body, body, f"what `{node.op}` asks")
            return INT if node.op == "count" else BOOL
        if not node.floating and not self._rules.exact(node.body, body, f"`{node.op}`"):
            return UNKNOWN
        if body.form.is_complex and node.op in ("max", "min"):
            message, help_ = f"`{node.op}` needs real numbers, and this is {body.form}", "take `real(z)` or `imag(z)`"
            self._complain("A310", message, node.body.span, str(body.form), help=help_)
            return UNKNOWN
        if body.form.kind in ("float", "approximate"):
            return body.form
        if node.op == "mean" and (body.form.is_number or body.form == BOOL):
            return REAL
        if body.form.is_number:
            return body.form
        counted = "count conditions with `count(… for …)`"
        help_ = counted if body.form == BOOL else as_number(body.form, node.body.span.text)
        self._complain("A310", f"`{node.op}` needs numbers, and this is {body.form}", node.body.span, help=help_)
        return UNKNOWN

    # --- messages ----------------------------------------------------------------------------------------------------

    def _complain(
        self, code: str, message: str, span: Span, label: str = "", *, also: tuple[Label, ...] = (), help: str = ""
    ) -> None:
        """Report once for each place, however many uses there are of the definition around it."""
        if (code, span) not in self._complaints:
            self._complaints.add((code, span))
            self._report.error(code, message, span, label, also=also + self._used_here(), help=help)

    def _used_here(self) -> tuple[Label, ...]:
        return (Label(self._uses[-1], "used here"),) if self._uses else ()


def _size_stages(pattern: program.Program) -> dict[str, frozenset[str]]:
    """Return the stages of each size: none where the parameters fix it, else a call's sizes or length."""
    stages = {name: frozenset({"length" if name in ("queries", "keys") else "size"}) for name in SIZES}
    for segment in pattern.segments:
        for axis in segment.axes:
            if isinstance(axis.extent, program.Size):
                stages[axis.extent.name] = frozenset({"length"})
    for parameter in pattern.parameters:
        for dim in parameter.type.dims:
            if isinstance(dim, str) and dim != "head":
                stages[dim] = frozenset()
    return stages
