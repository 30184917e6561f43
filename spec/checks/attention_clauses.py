"""The clauses of attentions: what each may read, and what it gives."""

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
    """Checks attentions one after another; a branch is known to those after it."""

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
        """Return the stages that an attention needs; `facts` hold where the pattern's relation does."""
        self._attend = attend
        checker = self._checker
        env = self._places(attend, everywhere)
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
        env = self._places(row, facts)
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
            self._check_decides(selection, line)
        return needs | kept.needs

    def _check_decides(self, selection: program.SelectionClauses, line: program.Expr) -> None:
        """Where many queries decide together, there is no one query."""
        if selection.pairs or (selection.by == "query" and not selection.row.per):
            return
        if selection.of_queries:
            at = self._checker.first_use(line, "k")
            if at is not None:
                message = "there is no key here: queries are ranked"
                self._complain("A206", message, at, "which key?", help="the vector of a key is `k[j]`")
            return
        others = (other for other in self._pattern.selections if other.row.per and selection.row.per)
        alike = {other.name for other in others if same_keys(other.row.per[0], selection.row.per[0])}
        at = first_use(line, "q", Measures(frozenset(alike)))
        if at is None or self._weighs_alike(line):
            return
        names = [unit.binder.name for unit in selection.row.per]
        who = f"the unit `{names[0]}`" if names else f"a whole {selection.by}"
        own = f"those of the unit are `mean({names[0]}.q)`" if names else "let it run: `sum(… for q)`"
        message = f"there is no one query here: {who} decides"
        self._complain("A206", message, at, "which query?", help=f"the vector of a query is `q[i]`; {own}")

    def _weighs_alike(self, line: program.Expr) -> bool:
        """Whether it reads weights of a branch whose rows are such units too."""
        read = (n for n in below([line]) if isinstance(n, program.BranchRead) and n.part == "weight")
        return any(n.branch in self._branches and self._branches[n.branch].per for n in read)

    def _places(self, attend: program.AttentionClauses, facts: Facts) -> Mapping[program.Binder, Finding]:
        """Return what is known of the attention's own names, by binder."""
        env: dict[program.Binder, Finding] = {}
        for unit in attend.units:
            found = self._checker.unit(unit, facts)
            key = {"key"} if unit is attend.over else set()
            env[unit.binder] = Finding(found.form, found.needs | key, None, found.natural)
        for item in (attend.over, attend.stack, attend.family):
            if isinstance(item, program.KeyRange):
                ends = [self._checker.integer(end, "the end of a range", facts) for end in (item.low, item.high)]
                self._check_range(item, ends)
                needs = frozenset({"key"} if item is attend.over else ())
                env[item.binder] = Finding(INT, needs, None, ends[0].natural)
        return env

    def _check_range(self, item: program.KeyRange, ends: list[Finding]) -> None:
        for end, found in zip((item.low, item.high), ends, strict=True):
            if found.needs & ({"q", "k", "row", "head", "batch", "data"} - ({"q"} if item.by_query else set())):
                help_ = "use parameters and sizes; hide what a row does not see by `visible`"
                message = "a range of keys is the same for all queries"
                self._complain("A406", message, end.span, "differs from query to query", help=help_)

    def _check_round(self, attend: program.AttentionClauses) -> None:
        item = self._pattern.round
        if item is not None and (attend.over is not None or attend.visible):
            help_ = "round in a pattern of its own"
            message = "`round` with branches that have relations or keys of their own is not supported yet"
            self._complain("A703", message, item.span, help=help_)

    def _check_score(self, attend: program.AttentionClauses) -> None:
        """Keys that are no tokens have no vectors of their own, and so no score by default."""
        if attend.over is None or attend.score is not None:
            return
        weights = attend.weights
        scored = weights is None or isinstance(weights, program.SoftmaxClause)
        if not scored:
            roots = [root for root in (weights, attend.value) if root is not None]
            scored = any(isinstance(node, program.ScoreRead | program.SoftmaxShare) for node in below(roots))  # type: ignore[arg-type]
        if scored:
            name = attend.over.binder.name
            unit = isinstance(attend.over, program.Unit)
            help_ = f"say it: `score scale * dot(q, mean({name}.k))`" if unit else "write a `score` line"
            message = f"the keys are `{name}`, which has no score of its own"
            self._complain("A215", message, attend.over.span, "no `score`", help=help_)

    def _check_key(self, node: program.Expr) -> None:
        """Where keys are units or a range, there is no one token `k`."""
        attend = self._attend
        if attend is None or attend.over is None:
            return
        at = self._checker.first_use(node, "k")
        if at is not None:
            name = attend.over.binder.name
            word = "v" if at.text == "v" else "k"
            message = f"there is no `{word}` here: the keys are `{name}`"
            unit = isinstance(attend.over, program.Unit)
            own = f"those of the unit are `mean({name}.{word})`" if unit else f"what stands at `{name}` is an input's"
            help_ = f"the vector of a token is `{word}[i]`; {own}"
            if node in self._pattern.visible and self._pattern.combine is not None:
                message = f"this line holds in every branch, and the keys of `{attend.name}` are `{name}`"
                help_ = "write it in the branches whose keys are tokens"
            self._complain("A206", message, at, f"which `{word}` of `{name}`?", help=help_)

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
        several = clause == "extra" and len(result.form.axes) == 1
        if not (result.form.is_number or several):
            message = f"{what} is a number, and this is {result.form}"
            help_ = as_number(result.form, node.span.text)
            if clause == "score" and result.form == BOOL:
                help_ = f"{help_}; a condition for what is seen stands in `visible`"
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
        at = self._checker.first_use(node, "k") or self._checker.first_use(node, "key")
        if at is None and "key" in result.needs:
            at = node.span
        if at is not None:
            help_ = "it may depend on the query, the head and inputs"
            self._complain("A206", "`extra` is one logit for all keys", at, "which key?", help=help_)
        return result

    def _value(self, attend: program.AttentionClauses, env: Mapping[program.Binder, Finding], facts: Facts) -> ExprForm:
        """The form of what it gives for a row."""
        if attend.value is None:
            if attend.over is not None:
                name = attend.over.binder.name
                help_ = f"say what a key gives: `value mean({name}.v)`" if isinstance(attend.over, program.Unit) else ""
                message = f"the keys are `{name}`, which has no value of its own"
                self._complain("A215", message, attend.over.span, "no `value`", help=help_ or "write a `value` line")
            return floating(("dv",))
        form = self._in("value", attend.value, env, facts).form
        if form.kind == "unknown":
            return UNKNOWN
        if not (form.is_number or form.kind == "float") or len(form.axes) > 1:
            help_ = "write a number or a vector over one axis"
            self._complain("A310", f"a value is a vector, and this is {form}", attend.value.span, str(form), help=help_)
            return UNKNOWN
        if attend.stack is not None:
            if form.axes:
                help_ = f"each place of `{attend.stack.binder.name}` gives one number: take an entry, `v[k][i]`"
                self._complain("A310", "a row stacks numbers, and this is a vector", attend.value.span, help=help_)
            return floating((attend.stack.binder.name,))
        return floating(form.axes)

    def check_combine(self, node: program.Expr, facts: Facts) -> None:
        """The result is a vector of this query."""
        self._attend = None
        form = self._in("combine", node, {}, facts).form
        for place, words in (("k", "a key"), ("key", "a key")):
            at = self._checker.first_use(node, place)
            if at is not None:
                help_ = "join the branches' outputs; keys belong into the branches"
                self._complain("A206", f"`combine` is of one query, and this depends on {words}", at, help=help_)
                return
        if form.kind != "unknown" and (form.kind != "float" or len(form.axes) != 1):
            help_ = "a branch's output is one; a number goes with it: `gate[q] * near`"
            self._complain("A310", f"the result is a vector, and this is {form}", node.span, str(form), help=help_)

    # --- what its expressions read -----------------------------------------------------------------------------------

    def find(self, node: Reads) -> Finding:
        """Return what is known of a score, a softmax share or the result of a branch."""
        match node:
            case program.ScoreRead() | program.SoftmaxShare():
                return self._of_row(node)
            case program.BranchRead():
                return self._branch(node)
            case program.MergeCall():
                return self._merged(node)

    def check_row(self, span: Span) -> None:
        """Whether there are keys of a row to run over."""
        if self._clause in ("combine", "extra", None):
            help_ = "in `score`, `weights`, `value` and `keep`, `for k` runs over the keys that the query sees"
            self._complain("A210", "there are no keys of a row here", span, "over which keys?", help=help_)

    def _of_row(self, node: program.ScoreRead | program.SoftmaxShare) -> Finding:
        own = isinstance(node, program.SoftmaxShare) and node.score is not None
        known = ("weights", "value", "ranking") if own else ("weights", "value", "keep")
        if self._clause not in known or (self._clause == "keep" and isinstance(node, program.SoftmaxShare)):
            word = "score" if isinstance(node, program.ScoreRead) else "softmax"
            here = "this line defines it" if self._clause in ("score", "ranking") else "there is none here"
            help_ = "it is known in `weights` and in `value`"
            if self._clause == "ranking":
                help_ = "write the number itself, as in `softmax(dot(q, mean(b.k)))`; `keep` knows it as `score`"
            if word == "softmax" and self._clause == "score":
                help_ = "leave it out: the weights are the softmax of the score already"
            self._complain("A206", f"`{word}` is of a row's scores, and {here}", node.span, help=help_)
        return Finding(FLOAT, _DATA | {"q", "k", "key"})

    def _branch(self, node: program.BranchRead) -> Finding:
        attend = self._branches.get(node.branch)
        if attend is None:
            return Finding(self.outputs.get(node.branch, UNKNOWN), _DATA | {"row"})
        if node.part != "out" and not is_softmax(attend):
            help_ = "only a softmax has one: leave `weights` out, or write `weights softmax(…)`"
            message = f"`{node.branch}` has no `{node.part}`: its weights are no softmax"
            self._complain("A206", message, node.span, help=help_)
        if node.part == "weight":
            self._check_weight(node, attend)
        if node.part == "out":
            return Finding(self.outputs.get(node.branch, UNKNOWN), _DATA | {"row"})
        return Finding(FLOAT, _DATA | ({"q", "k", "key"} if node.part == "weight" else {"row"}))

    def _check_weight(self, node: program.BranchRead, attend: program.AttentionClauses) -> None:
        here = self._attend
        if self._clause in ("combine", "extra") or here is None:
            message = f"`{node.branch}.weight` is of a query and a key, and there is no key here"
            self._complain("A206", message, node.span, "of which key?", help="read it in `score`, `weights` or `value`")
        elif not same_keys(attend.over, here.over):
            help_ = "write both `over` alike"
            message = f"`{node.branch}` has other keys than `{here.name}`"
            self._complain("A206", message, node.span, "of which key?", help=help_)

    def _merged(self, node: program.MergeCall) -> Finding:
        if self._clause != "combine":
            self._complain("A206", "`merge` joins branches in `combine`", node.span, help="write it there")
        form: ExprForm | None = None
        for part in node.parts:
            attend = self._branches.get(part.branch)
            if attend is None and part.branch not in self.outputs:
                return Finding(UNKNOWN)
            if attend is None or not is_softmax(attend):
                why = "it has a state" if attend is None else "its weights are no softmax"
                message = f"`{part.branch}` has no LSE to merge by: {why}"
                help_ = "add the outputs, with factors: `a * near + b * far`"
                self._complain("A206", message, part.span, help=help_)
            own = self.outputs.get(part.branch, UNKNOWN)
            if form is not None and own != form and UNKNOWN not in (own, form):
                self._complain("A314", f"{form} and {own} do not merge", part.span, str(own), help="make them alike")
            form = own if form is None else form
        return Finding(form or UNKNOWN, _DATA | {"row"})


def is_softmax(attend: program.AttentionClauses) -> bool:
    """Whether its weights are a softmax, so that it has an LSE."""
    return attend.weights is None or isinstance(attend.weights, program.SoftmaxClause)


def same_keys(a: program.Unit | program.KeyRange | None, b: program.Unit | program.KeyRange | None) -> bool:
    """Whether two attentions have the same keys, as they are written."""
    if a is None or b is None or type(a) is not type(b):
        return a is b
    if isinstance(a, program.Unit) and isinstance(b, program.Unit):
        return _text(a.value) == _text(b.value)
    assert isinstance(a, program.KeyRange)
    assert isinstance(b, program.KeyRange)
    return (_text(a.low), _text(a.high)) == (_text(b.low), _text(b.high))


def _text(node: program.Expr) -> str:
    return "".join(node.span.text.split())
