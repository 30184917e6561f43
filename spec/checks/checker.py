"""Find the type, the stages and the exactness of every expression of a pattern."""

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
    constant_finding,
    floating,
    join,
    parameter_form,
)
from attnc.spec.checks.guards import Facts, Guards
from attnc.spec.checks.measure import (
    Measures,
    children,
    first_use,
)
from attnc.spec.checks.operations import OperationRules
from attnc.spec.checks.recurrence_lines import RecurrentChecker
from attnc.spec.diagnostics import DiagnosticList, Label
from attnc.spec.names.builtins import SIZES
from attnc.spec.source import Span

Environment = Mapping[program.Binder, Finding]
"""The findings of the names in scope."""
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
    """Computes the findings of expressions; a definition is checked once for each combination of argument findings."""

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
        """The checker of the current attention; None outside an attention."""
        self._uses: list[Span] = []
        self._in_unit = False
        self._reported: set[tuple[str, Span]] = set()
        self._definition_findings: dict[object, Finding] = {}

    def unit(self, unit: program.Unit, facts: Facts) -> Finding:
        """Check that a unit's value is an integer or a list of integers; return its finding."""
        self._in_unit = True
        result = self.find(unit.value, {}, facts)
        self._in_unit = False
        item = result.form.item
        self._rules.integer(unit.value, result if item is None else Finding(item), "the value of a unit")
        return result

    def integer(self, node: program.Expr, what: str, facts: Facts | None, env: Environment | None = None) -> Finding:
        """Check that an expression is an integer; return its finding. `what` names the expression in an error."""
        result = self.find(node, env or {}, facts)
        self._rules.integer(node, result, what)
        return result

    @property
    def has_branches(self) -> bool:
        """Whether the pattern has a branch with a state."""
        return bool(self._pattern.stateful)

    @contextmanager
    def by_name(self) -> Iterator[None]:
        """Within this context, elementwise operations broadcast a vector over a matrix that has its axis."""
        self._rules.floating.by_name = True
        try:
            yield
        finally:
            self._rules.floating.by_name = False

    @property
    def everywhere(self) -> Facts:
        """The facts that hold for every token."""
        segments = frozenset(self._pattern.segments)
        return Facts(segments, segments)

    def condition(self, node: program.Expr, env: Environment, facts: Facts, what: str = "`visible`") -> Finding:
        """Check that an expression is a truth value; return its finding. `what` names the expression in an error."""
        result = self.find(node, env, facts)
        self._rules.boolean(node, result, what)
        return result

    def facts_after(self, node: program.Expr, facts: Facts) -> Facts:
        """Return the facts that hold where a condition is true."""
        return self._guards.after(node, True, facts)

    def first_use(self, node: program.Expr, place: str) -> Span | None:
        """Return where an expression first reads `place` (`q`, `k` or `key`); None where it never does."""
        return first_use(node, place, self._measures)

    # --- expressions -------------------------------------------------------------------------------------------------

    def find(self, node: program.Expr, env: Environment, facts: Facts | None) -> Finding:  # noqa: C901  one case per kind
        """Return the finding of an expression. Without `facts`, coordinates are not checked."""
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
                return self._conditional(node, env, facts)
            case program.Aggregate():
                return self._aggregate(node, env, facts)
            case program.ListValue():
                return self._table(node, env, facts)
            case program.Item():
                return self._item(node, env, facts)
            case (
                program.Vector()
                | program.ScoreRead()
                | program.SoftmaxShare()
                | program.BranchRead()
                | program.MergeCall()
            ):
                return self._attention_read(node, env, facts)
            case program.InUnit() | program.SelectedTest() | program.SelectedCount():
                return self._membership(node, env, facts)
            case _:
                return self._leaf(node)

    def _membership(
        self, node: program.InUnit | program.SelectedTest | program.SelectedCount, env: Environment, facts: Facts | None
    ) -> Finding:
        """Return the finding of a membership test, or of the size of a selection."""
        needs = frozenset[str]()
        for child in children(node):
            finding = self.find(child, env, facts)
            self._rules.integer(child, finding, "the left side of `in`")
            needs |= finding.needs
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
            self._rules.integer(node.at, index, f"the index of `{node.tensor}[…]`")
            needs |= index.needs
        return Finding(floating(("dv" if node.tensor == "v" else "dk",)), needs)

    def _attention_read(
        self,
        node: program.Vector | Reads,
        env: Environment,
        facts: Facts | None,
    ) -> Finding:
        if isinstance(node, program.Vector):
            return self._vector(node, env, facts)
        for child in children(node):
            finding = self.find(child, env, facts)
            if isinstance(node, program.ScoreRead | program.BranchRead):
                self._rules.integer(child, finding, "an index")
        if self.attention is None:
            return Finding(FLOAT)  # a `def` that no attention uses
        return self.attention.find(node)

    def _leaf(self, node: _Leaf) -> Finding:  # noqa: C901  one case per kind
        match node:
            case program.Literal(value=value):
                return constant_finding(value)
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
        return Finding(parameter_form(parameter.type), frozenset({"head"} if parameter.per_head else ()))

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
            help=f"a unit holds every token: divide its position, `{node.place} // 64`" if self._in_unit else test,
        )
        return finding

    def _input(self, node: program.InputRead, env: Environment, facts: Facts | None) -> Finding:
        dims = node.input.type.dims
        needs = {"data"} | {n for n in ("batch", "head") if n in dims} | ({"head"} if "kv_head" in dims else set())
        indexed_dims = [d for d in dims if d not in ("batch", "head", "kv_head")]
        for dim, index in zip(indexed_dims, node.indices, strict=False):
            finding = self.find(index, env, facts)
            self._rules.integer(index, finding, f"an index of `{node.input.name}`")
            self._check_bounds(index, finding, dim if isinstance(dim, int) else None)
            is_row = dim == "query" and isinstance(index, program.PositionRead) and index.place == "q"
            needs |= {"row"} if is_row else finding.needs
        if node.input.type.is_floating:
            vector_axes = tuple(indexed_dims[len(node.indices) :])
            return Finding(floating(vector_axes, is_complex=node.input.type.kind == "complex"), frozenset(needs))
        return Finding(BOOL if node.input.type.kind == "bool" else INT, frozenset(needs))

    def _check_bounds(self, index: program.Expr, finding: Finding, length: int | None) -> None:
        value = finding.constant
        if isinstance(value, int) and (value < 0 or (length is not None and value >= length)):
            limit = f"valid indices are 0 to {length - 1}" if length is not None else "indices start at 0"
            self._complain("A312", f"the index {value} is out of range", index.span, "no such entry", help=limit)

    def _use(self, node: program.DefinitionUse, env: Environment, facts: Facts | None) -> Finding:
        definition = node.definition
        arguments = [replace(self.find(a, env, facts), constant=None) for a in node.arguments]
        free = self._measures.of_definition(definition).free
        captured = {b: env[b] for b in env if b in free}
        key = (definition, tuple(arguments), frozenset((b, f) for b, f in captured.items()), facts)
        if key not in self._definition_findings:
            self._uses.append(node.span)
            inner = {**captured, **dict(zip(definition.parameters, arguments, strict=True))}
            self._definition_findings[key] = self.find(definition.body, inner, facts)
            self._uses.pop()
        body = self._definition_findings[key]
        needs = body.needs.union(*(f.needs for f in arguments))
        return Finding(body.form, needs, body.constant, body.natural)

    def _operation(self, node: program.Operation, env: Environment, facts: Facts | None) -> Finding:
        findings = []
        for operand in node.operands:
            findings.append(self.find(operand, env, facts))
            if facts is not None and node.op in ("and", "or"):
                facts = self._guards.after(operand, node.op == "and", facts)
        return self._rules.of(node, findings)

    def _conditional(self, node: program.ConditionalValue, env: Environment, facts: Facts | None) -> Finding:
        condition = self.find(node.condition, env, facts)
        self._rules.boolean(node.condition, condition)
        then = self.find(node.then, env, facts and self._guards.after(node.condition, True, facts))
        otherwise = self.find(node.otherwise, env, facts and self._guards.after(node.condition, False, facts))
        form = join(then.form, otherwise.form)
        if form is None:
            message = f"one side of `if` is {then.form}, the other {otherwise.form}"
            also = (Label(node.then.span, str(then.form)),)
            help_ = "give both sides the same type"
            self._complain("A313", message, node.otherwise.span, str(otherwise.form), also=also, help=help_)
            form = UNKNOWN
        needs = condition.needs | then.needs | otherwise.needs
        return Finding(form, needs, None, then.natural and otherwise.natural)

    def _table(self, node: program.ListValue, env: Environment, facts: Facts | None) -> Finding:
        findings = [self.find(item, env, facts) for item in node.items]
        form = findings[0].form
        for item, finding in zip(node.items[1:], findings[1:], strict=True):
            joined = join(form, finding.form)
            if joined is None:
                message = f"a list holds {form} and {finding.form}"
                also = (Label(node.items[0].span, str(findings[0].form)),)
                self._complain(
                    "A313", message, item.span, str(finding.form), also=also, help="give all entries the same type"
                )
                return NOTHING
            form = joined
        needs = frozenset[str]().union(*(f.needs for f in findings))
        return Finding(ExprForm("list", form, len(findings)), needs)

    def _item(self, node: program.Item, env: Environment, facts: Facts | None) -> Finding:
        table, index = self.find(node.table, env, facts), self.find(node.index, env, facts)
        needs = table.needs | index.needs
        if table.form.kind == "unknown":
            return Finding(UNKNOWN, needs)
        if table.form.kind == "float" and table.form.axes:
            self._rules.integer(node.index, index, "an index")
            return Finding(replace(table.form, axes=table.form.axes[1:]), needs)
        if table.form.item is None:
            message = f"only a list can be indexed, got {table.form}"
            self._complain("A311", message, node.table.span, str(table.form), help="remove the index")
            return Finding(UNKNOWN, needs)
        self._rules.integer(node.index, index, "an index")
        self._check_bounds(node.index, index, table.form.length)
        return Finding(table.form.item, needs)

    # --- aggregates --------------------------------------------------------------------------------------------------

    def _aggregate(self, node: program.Aggregate, env: Environment, facts: Facts | None) -> Finding:
        inner, bound, needs = dict(env), set[str](), set[str]()
        row_variables = [r for r in node.runnings if isinstance(r, program.VisibleVariable)]
        if row_variables:
            self._check_row_aggregate(node, len(row_variables))
        for variable in node.runnings:
            if isinstance(variable, program.VisibleVariable):
                bound |= {"k", "key"}
                continue
            range_needs, natural = self._domain(variable, inner, facts)
            needs |= range_needs - bound
            if isinstance(variable.target, program.Binder):
                inner[variable.target] = Finding(INT, range_needs, natural=natural)
            else:
                bound |= {variable.target, "row"} if variable.target == "q" else {variable.target}
                facts = self._anywhere(variable.target, facts)
        if node.condition is not None:
            condition = self.find(node.condition, inner, facts)
            self._rules.boolean(node.condition, condition)
            needs |= condition.needs - bound
            facts = facts and self._guards.after(node.condition, True, facts)
        body = self.find(node.body, inner, facts)
        needs |= body.needs - bound
        form = self._aggregate_form(node, body)
        form = FLOAT if row_variables and form.is_number else form
        return Finding(form, frozenset(needs), None, body.natural or node.op == "count")

    def _check_row_aggregate(self, node: program.Aggregate, variables: int) -> None:
        """Check that an aggregate over a row's visible keys has a single variable and stands where a row is known."""
        if self.attention is not None:
            self.attention.check_row(node.span)
        if variables != len(node.runnings):
            help_ = "nest the aggregates: `sum(sum(… for j in …) for k)`"
            self._complain("A701", "`for k` beside other variables is not supported yet", node.span, help=help_)
        if node.op in ("any", "all"):
            help_ = "write `count(… for k) > 0` in a relation, `max((1 if … else 0) for k)` in weights"
            self._complain("A701", f"`{node.op}` over the keys of a row is not supported yet", node.span, help=help_)

    def _domain(
        self, variable: program.RangeVariable | program.UnitVariable, env: Environment, facts: Facts | None
    ) -> tuple[frozenset[str], bool]:
        """Return the stages that a domain needs, and whether its members are never negative."""
        if isinstance(variable, program.UnitVariable):
            return env.get(variable.unit.binder, NOTHING).needs | {"length"}, True
        ends = [self.integer(end, "the end of a range", facts, env) for end in (variable.low, variable.high)]
        return ends[0].needs | ends[1].needs, ends[0].natural

    def _anywhere(self, place: str, facts: Facts | None) -> Facts | None:
        if facts is None or place == "head":
            return facts
        return facts.placed_in(place, frozenset(self._pattern.segments))

    def _aggregate_form(self, node: program.Aggregate, body: Finding) -> ExprForm:
        if node.op in ("any", "all", "count"):
            self._rules.boolean(node.body, body, f"the condition of `{node.op}`")
            return INT if node.op == "count" else BOOL
        if not node.floating and not self._rules.exact(node.body, body, f"`{node.op}`"):
            return UNKNOWN
        if body.form.is_complex and node.op in ("max", "min"):
            message, help_ = f"`{node.op}` needs real numbers, got {body.form}", "take `real(z)` or `imag(z)`"
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
        self._complain("A310", f"`{node.op}` needs numbers, got {body.form}", node.body.span, help=help_)
        return UNKNOWN

    # --- messages ----------------------------------------------------------------------------------------------------

    def _complain(
        self, code: str, message: str, span: Span, label: str = "", *, also: tuple[Label, ...] = (), help: str = ""
    ) -> None:
        """Report an error once per place, however often the definition around the place is used."""
        if (code, span) not in self._reported:
            self._reported.add((code, span))
            self._report.error(code, message, span, label, also=also + self._used_here(), help=help)

    def _used_here(self) -> tuple[Label, ...]:
        return (Label(self._uses[-1], "used here"),) if self._uses else ()


def _size_stages(pattern: program.Program) -> dict[str, frozenset[str]]:
    """Return the stages of each size: none where the parameters fix the size, else a call's sizes or its length."""
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
