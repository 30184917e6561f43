"""Check the clauses of attentions: which names each clause may read, and the form of its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from attnc.spec import program
from attnc.spec.checks.expression_forms import BOOL, FLOAT, INT, UNKNOWN, ExprForm, Finding, as_number, floating
from attnc.spec.checks.guards import Facts
from attnc.spec.checks.measure import Measures, below, first_use
from attnc.spec.source import Span

if TYPE_CHECKING:
    from attnc.spec.checks.checker import Checker

Clause = Literal["score", "weights", "extra", "value", "combine", "ranking", "keep"]
Reads = program.ScoreRead | program.SoftmaxShare | program.BranchRead | program.MergeCall

_DATA = frozenset({"data", "head", "batch"})


class AttentionChecker:
    """Checks the attentions of a pattern in order; an attention may read the branches checked before it."""

    def __init__(self, checker: Checker, pattern: program.Program, complain: Callable[..., None]) -> None:
        self._checker = checker
        self._pattern = pattern
        self._complain = complain
        self.outputs: dict[str, ExprForm] = {}
        self._branches = {attend.name: attend for attend in pattern.attends}
        self._clause: Clause | None = None
        self._attend: program.AttentionClauses | None = None

    # --- one attention -----------------------------------------------------------------------------------------------

    def check(self, attend: program.AttentionClauses, facts: Facts, everywhere: Facts) -> frozenset[str]:
        """Return the stages that an attention needs; `facts` hold where the pattern's relation is true."""
        self._attend = attend
        checker = self._checker
        env = self._introduced_names(attend, everywhere)
        needs = frozenset[str]()
        for line in attend.visible:
            needs |= checker.condition(line, env, facts).needs
            self._check_key(line)
            facts = checker.facts_after(line, facts)
        if attend.over is not None:
            for line in self._pattern.visible:
                self._check_key(line)
        self._check_round(attend)
        self._check_score(attend)
        if attend.score is not None:
            needs |= self._number("score", attend.score, "the score", env, facts).needs
        needs |= self._weights(attend, env, facts, everywhere)
        self.outputs[attend.name] = self._value(attend, env, facts)
        return needs

    def check_selection(self, selection: program.SelectionClauses, facts: Facts) -> frozenset[str]:
        """Return the stages that a selection needs."""
        self._attend = row = selection.row
        checker, needs = self._checker, frozenset[str]()
        env = self._introduced_names(row, facts)
        if selection.by != "query" or row.per:
            needs -= {"q"}
        conditions = [*row.visible, *(e for e in (selection.covers, selection.always) if e is not None)]
        for line in conditions:
            needs |= checker.condition(line, env, facts, "`from`" if line in row.visible else "this line").needs
        assert isinstance(row.weights, program.Expr)
        needs |= self._number("ranking", row.weights, "the score", env, facts).needs
        self._clause, checker.attention = "keep", self
        kept = checker.condition(selection.keep, env, facts, "`keep`")
        self._clause, checker.attention = None, None
        for line in (*conditions[: len(row.visible)], row.weights, selection.keep):
            self._check_key(line)
            self._check_single_query(selection, line)
        return needs | kept.needs

    def _check_single_query(self, selection: program.SelectionClauses, line: program.Expr) -> None:
        """Report a read of a single query in a selection that many queries make together."""
        if selection.pairs or (selection.by == "query" and not selection.row.per):
            return
        if selection.of_queries:
            span = self._checker.first_use(line, "k")
            if span is not None:
                message = "there is no key here: queries are ranked"
                self._complain("A206", message, span, "which key?", help="the vector of a key is `k[j]`")
            return
        by_unit = (other for other in self._pattern.selections if other.row.per and selection.row.per)
        same_units = {other.name for other in by_unit if same_keys(other.row.per[0], selection.row.per[0])}
        span = first_use(line, "q", Measures(frozenset(same_units)))
        if span is None or self._reads_unit_weights(line):
            return
        names = [unit.binder.name for unit in selection.row.per]
        rows = f"the queries of the unit `{names[0]}`" if names else f"all queries of a {selection.by}"
        other = f"or `mean({names[0]}.q)` for the mean of the unit" if names else "or aggregate: `sum(… for q)`"
        message = f"there is no single query here: {rows} select together"
        self._complain("A206", message, span, "which query?", help=f"write `q[i]` for the vector of a query, {other}")

    def _reads_unit_weights(self, line: program.Expr) -> bool:
        """Whether a line reads the weights of a branch whose rows are units as well."""
        weight_reads = (
            node for node in below([line]) if isinstance(node, program.BranchRead) and node.part == "weight"
        )
        return any(node.branch in self._branches and self._branches[node.branch].per for node in weight_reads)

    def _introduced_names(self, attend: program.AttentionClauses, facts: Facts) -> Mapping[program.Binder, Finding]:
        """Return the findings of the names that an attention introduces, by binder."""
        env: dict[program.Binder, Finding] = {}
        for unit in attend.units:
            finding = self._checker.unit(unit, facts)
            key_stage = {"key"} if unit is attend.over else set()
            env[unit.binder] = Finding(finding.form, finding.needs | key_stage, None, finding.natural)
        for item in (attend.over, attend.stack, attend.family):
            if isinstance(item, program.KeyRange):
                ends = [self._checker.integer(end, "the end of a range", facts) for end in (item.low, item.high)]
                self._check_range(item, ends)
                needs = frozenset({"key"} if item is attend.over else ())
                env[item.binder] = Finding(INT, needs, None, ends[0].natural)
        return env

    def _check_range(self, item: program.KeyRange, ends: list[Finding]) -> None:
        for end, finding in zip((item.low, item.high), ends, strict=True):
            if finding.needs & ({"q", "k", "row", "head", "batch", "data"} - ({"q"} if item.by_query else set())):
                help_ = "use parameters and sizes; exclude keys of a row with `visible`"
                message = "a range of keys must be the same for all queries"
                self._complain("A406", message, end.span, "differs from query to query", help=help_)

    def _check_round(self, attend: program.AttentionClauses) -> None:
        item = self._pattern.round
        if item is not None and (attend.over is not None or attend.visible):
            help_ = "use `round` in a separate pattern, without such branches"
            message = "`round` with branches that have relations or keys of their own is not supported yet"
            self._complain("A703", message, item.span, help=help_)

    def _check_score(self, attend: program.AttentionClauses) -> None:
        """Report a missing `score` where the keys are units or a range, which have no vectors for a default score."""
        if attend.over is None or attend.score is not None:
            return
        weights = attend.weights
        needs_score = weights is None or isinstance(weights, program.SoftmaxClause)
        if not needs_score:
            roots = [root for root in (weights, attend.value) if root is not None]
            needs_score = any(isinstance(node, program.ScoreRead | program.SoftmaxShare) for node in below(roots))  # type: ignore[arg-type]
        if needs_score:
            name = attend.over.binder.name
            unit = isinstance(attend.over, program.Unit)
            help_ = f"write `score scale * dot(q, mean({name}.k))`" if unit else "write a `score` line"
            message = f"the keys `{name}` have no default score"
            self._complain("A215", message, attend.over.span, "no `score`", help=help_)

    def _check_key(self, node: program.Expr) -> None:
        """Report a read of a single key token `k` where the keys are units or a range."""
        attend = self._attend
        if attend is None or attend.over is None:
            return
        span = self._checker.first_use(node, "k")
        if span is not None:
            name = attend.over.binder.name
            word = "v" if span.text == "v" else "k"
            message = f"there is no `{word}` here: the keys are `{name}`"
            unit = isinstance(attend.over, program.Unit)
            mean = f"`mean({name}.{word})` for the mean of the unit"
            other = mean if unit else f"an entry of an input, indexed by `{name}`"
            help_ = f"write `{word}[i]` for the vector of a token, or {other}"
            if node in self._pattern.visible and self._pattern.combine is not None:
                message = f"this line applies to every branch, but the keys of `{attend.name}` are `{name}`"
                help_ = "move it into the branches whose keys are tokens"
            self._complain("A206", message, span, f"which `{word}` of `{name}`?", help=help_)

    # --- clauses -----------------------------------------------------------------------------------------------------

    def _in(self, clause: Clause, node: program.Expr, env: Mapping[program.Binder, Finding], facts: Facts) -> Finding:
        self._clause, self._checker.attention = clause, self
        result = self._checker.find(node, env, facts)
        self._clause, self._checker.attention = None, None
        if clause != "combine":
            self._check_key(node)
        return result

    def _number(
        self, clause: Clause, node: program.Expr, what: str, env: Mapping[program.Binder, Finding], facts: Facts
    ) -> Finding:
        result = self._in(clause, node, env, facts)
        is_list_of_logits = clause == "extra" and len(result.form.axes) == 1
        if not (result.form.is_number or is_list_of_logits):
            message = f"{what} must be a number, got {result.form}"
            help_ = as_number(result.form, node.span.text)
            if clause == "score" and result.form == BOOL:
                help_ = f"{help_}; put a condition on visible keys into `visible`"
            self._complain("A310", message, node.span, str(result.form), help=help_)
        return result

    def _weights(
        self, attend: program.AttentionClauses, env: Mapping[program.Binder, Finding], facts: Facts, everywhere: Facts
    ) -> frozenset[str]:
        weights = attend.weights
        if weights is None:
            return frozenset()
        if not isinstance(weights, program.SoftmaxClause):
            return self._number("weights", weights, "a weight", env, facts).needs
        if weights.extra is None:
            return frozenset()
        return self._extra(weights.extra, env, everywhere).needs

    def _extra(self, node: program.Expr, env: Mapping[program.Binder, Finding], facts: Facts) -> Finding:
        result = self._number("extra", node, "`extra`", env, facts)
        span = self._checker.first_use(node, "k") or self._checker.first_use(node, "key")
        if span is None and "key" in result.needs:
            span = node.span
        if span is not None:
            help_ = "read only the query, the head and inputs"
            self._complain(
                "A206", "`extra` is one logit for all keys and cannot depend on a key", span, "which key?", help=help_
            )
        return result

    def _value(self, attend: program.AttentionClauses, env: Mapping[program.Binder, Finding], facts: Facts) -> ExprForm:
        """Check the `value` clause; return the form of the attention's output for a row."""
        if attend.value is None:
            if attend.over is not None:
                name = attend.over.binder.name
                help_ = f"write `value mean({name}.v)`" if isinstance(attend.over, program.Unit) else ""
                message = f"the keys `{name}` have no default value"
                self._complain("A215", message, attend.over.span, "no `value`", help=help_ or "write a `value` line")
            return floating(("dv",))
        form = self._in("value", attend.value, env, facts).form
        if form.kind == "unknown":
            return UNKNOWN
        if not (form.is_number or form.kind == "float") or len(form.axes) > 1:
            help_ = "write a number or a vector over one axis"
            message = f"a value must be a number or a vector over one axis, got {form}"
            self._complain("A310", message, attend.value.span, str(form), help=help_)
            return UNKNOWN
        if attend.stack is not None:
            if form.axes:
                help_ = f"give one number for each `{attend.stack.binder.name}`: take an entry, `v[k][i]`"
                message = "with a range in `per` the value must be a number, got a vector"
                self._complain("A310", message, attend.value.span, help=help_)
            return floating((attend.stack.binder.name,))
        return floating(form.axes)

    def check_combine(self, node: program.Expr, facts: Facts) -> None:
        """Check that `combine` gives a vector for each query and reads no key."""
        self._attend = None
        form = self._in("combine", node, {}, facts).form
        for place, words in (("k", "a key"), ("key", "a key")):
            span = self._checker.first_use(node, place)
            if span is not None:
                help_ = "combine the branches' outputs; read keys inside the branches"
                message = f"`combine` is computed for each query and cannot depend on {words}"
                self._complain("A206", message, span, help=help_)
                return
        if form.kind != "unknown" and (form.kind != "float" or len(form.axes) != 1):
            help_ = "use a branch's output, which a number may scale: `gate[q] * near`"
            message = f"the result must be a vector, got {form}"
            self._complain("A310", message, node.span, str(form), help=help_)

    # --- reads of scores and branches --------------------------------------------------------------------------------

    def find(self, node: Reads) -> Finding:
        """Return the finding of a score, a softmax share, a result of a branch or a merge."""
        match node:
            case program.ScoreRead() | program.SoftmaxShare():
                return self._row_read(node)
            case program.BranchRead():
                return self._branch(node)
            case program.MergeCall():
                return self._merge(node)

    def check_row(self, span: Span) -> None:
        """Report an aggregate over visible keys in a clause that has no row."""
        if self._clause in ("combine", "extra", None):
            help_ = "use it in `score`, `weights`, `value` or `keep`"
            message = "an aggregate over the visible keys of a query is not available here"
            self._complain("A210", message, span, "over which keys?", help=help_)

    def _row_read(self, node: program.ScoreRead | program.SoftmaxShare) -> Finding:
        has_score = isinstance(node, program.SoftmaxShare) and node.score is not None
        clauses = ("weights", "value", "ranking") if has_score else ("weights", "value", "keep")
        if self._clause not in clauses or (self._clause == "keep" and isinstance(node, program.SoftmaxShare)):
            word = "score" if isinstance(node, program.ScoreRead) else "softmax"
            reason = "this line defines the score" if self._clause in ("score", "ranking") else "no row has scores here"
            help_ = "read it in `weights` or in `value`"
            if self._clause == "ranking":
                help_ = "write the expression itself, as in `softmax(dot(q, mean(b.k)))`; in `keep` its name is `score`"
            if word == "softmax" and self._clause == "score":
                help_ = "remove it: the weights are the softmax of the score already"
            self._complain("A206", f"`{word}` is not available here: {reason}", node.span, help=help_)
        return Finding(FLOAT, _DATA | {"q", "k", "key"})

    def _branch(self, node: program.BranchRead) -> Finding:
        attend = self._branches.get(node.branch)
        if attend is None:
            return Finding(self.outputs.get(node.branch, UNKNOWN), _DATA | {"row"})
        if node.part != "out" and not is_softmax(attend):
            help_ = "only a softmax has one: remove the `weights` line, or write `weights softmax(…)`"
            message = f"`{node.branch}` has no `{node.part}`: its weights are not a softmax"
            self._complain("A206", message, node.span, help=help_)
        if node.part == "weight":
            self._check_weight(node, attend)
        if node.part == "out":
            return Finding(self.outputs.get(node.branch, UNKNOWN), _DATA | {"row"})
        return Finding(FLOAT, _DATA | ({"q", "k", "key"} if node.part == "weight" else {"row"}))

    def _check_weight(self, node: program.BranchRead, attend: program.AttentionClauses) -> None:
        reader = self._attend
        if self._clause in ("combine", "extra") or reader is None:
            message = f"`{node.branch}.weight` needs a key, and no key is available here"
            self._complain("A206", message, node.span, "which key?", help="read it in `score`, `weights` or `value`")
        elif not same_keys(attend.over, reader.over):
            help_ = "write the same `over` in both"
            message = f"the keys of `{node.branch}` differ from those of `{reader.name}`"
            self._complain("A206", message, node.span, "which key?", help=help_)

    def _merge(self, node: program.MergeCall) -> Finding:
        if self._clause != "combine":
            self._complain("A206", "`merge` is only available in `combine`", node.span, help="move it there")
        form: ExprForm | None = None
        for part in node.parts:
            attend = self._branches.get(part.branch)
            if attend is None and part.branch not in self.outputs:
                return Finding(UNKNOWN)
            if attend is None or not is_softmax(attend):
                reason = "it has a state" if attend is None else "its weights are not a softmax"
                message = f"`{part.branch}` cannot be merged without an LSE: {reason}"
                help_ = "add the outputs, each with a factor: `a * near + b * far`"
                self._complain("A206", message, part.span, help=help_)
            branch_form = self.outputs.get(part.branch, UNKNOWN)
            if form is not None and branch_form != form and UNKNOWN not in (branch_form, form):
                help_ = "merge branches whose outputs have the same axis"
                self._complain(
                    "A314", f"cannot merge {form} and {branch_form}", part.span, str(branch_form), help=help_
                )
            form = branch_form if form is None else form
        return Finding(form or UNKNOWN, _DATA | {"row"})


def is_softmax(attend: program.AttentionClauses) -> bool:
    """Whether an attention's weights are a softmax, so that it has an LSE."""
    return attend.weights is None or isinstance(attend.weights, program.SoftmaxClause)


def same_keys(a: program.Unit | program.KeyRange | None, b: program.Unit | program.KeyRange | None) -> bool:
    """Whether two attentions have the same keys; compares the source text of their expressions."""
    if a is None or b is None or type(a) is not type(b):
        return a is b
    if isinstance(a, program.Unit) and isinstance(b, program.Unit):
        return _text(a.value) == _text(b.value)
    assert isinstance(a, program.KeyRange)
    assert isinstance(b, program.KeyRange)
    return (_text(a.low), _text(a.high)) == (_text(b.low), _text(b.high))


def _text(node: program.Expr) -> str:
    return "".join(node.span.text.split())
