"""Check the lines of a recurrence: the form of each line must fit the state or the output that it defines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attnc.spec import program
from attnc.spec.checks.expression_forms import INT, UNKNOWN, ExprForm, Finding, floating
from attnc.spec.checks.measure import below
from attnc.spec.types import Dim

if TYPE_CHECKING:
    from attnc.spec.checks.checker import Checker


class RecurrentChecker:
    """Checks the recurrences of a pattern."""

    def __init__(self, checker: Checker, complain: Callable[..., None]) -> None:
        self._checker = checker
        self._complain = complain

    def check(self, item: program.RecurrenceClauses) -> ExprForm:
        """Check all lines, the processing order and the reset condition; return the form of a token's output."""
        with self._checker.by_name():
            return self._check(item)

    def _check(self, item: program.RecurrenceClauses) -> ExprForm:
        checker, facts = self._checker, self._checker.everywhere
        env = self._family_index(item.family)
        out = UNKNOWN
        for line in item.lines:
            if isinstance(line, program.Let):
                finding = checker.find(line.value, env, facts)
                env[line.binder] = Finding(finding.form, finding.needs | {"data"})
            elif isinstance(line, program.ReadClause):
                out = self._check_read(line, checker.find(line.value, env, facts).form)
            else:
                self._check_step(line, env)
        if item.scan is not None:
            finding = checker.integer(item.scan, "the order of the tokens", facts, env)
            if "batch" in finding.needs:
                help_ = "read inputs without a `batch` dimension"
                self._complain(
                    "A406", "the processing order must be the same for all batch entries", item.scan.span, help=help_
                )
        if item.reset is not None:
            checker.condition(item.reset, env, facts)
        return out

    def _family_index(self, family: program.KeyRange | None) -> dict[program.Binder, Finding]:
        """Return the finding of a family's index, and check that the parameters fix its range."""
        if family is None:
            return {}
        facts = self._checker.everywhere
        ends = [self._checker.integer(end, "the end of a range", facts) for end in (family.low, family.high)]
        for end, finding in zip((family.low, family.high), ends, strict=True):
            if finding.needs:
                help_ = "use parameters and numbers"
                message = "the number of branches with a state must be known when the pattern is compiled"
                self._complain("A406", message, end.span, "not a constant", help=help_)
        return {family.binder: Finding(INT, frozenset(), None, ends[0].natural)}

    def _check_step(self, line: program.StepClause, env: dict[program.Binder, Finding]) -> None:
        checker, facts = self._checker, self._checker.everywhere
        inner = dict(env)
        if line.repeat is not None:
            ends = [checker.integer(e, "the end of a range", facts) for e in (line.repeat.low, line.repeat.high)]
            for end, finding in zip((line.repeat.low, line.repeat.high), ends, strict=True):
                if finding.needs - {"size"}:
                    help_ = "use parameters and sizes of inputs"
                    message = "the number of repetitions of a step must be the same for all tokens"
                    self._complain("A406", message, end.span, help=help_)
            inner[line.repeat.binder] = Finding(INT, frozenset(), None, ends[0].natural)
        form = checker.find(line.value, inner, facts).form
        expected = floating(line.state.dims, is_complex=line.state.is_complex)
        if form.kind != "unknown" and (not _is_number(form) or form.axes != expected.axes):
            message = f"the state `{line.state.name}` is {expected}, got {form}"
            help_ = "products match axes by their names: `outer(k, v)`, `k @ S`, `exp(g) * S`"
            self._complain("A314", message, line.value.span, str(form), help=help_)
        elif form.is_complex and not line.state.is_complex:
            message = f"the state `{line.state.name}` is {expected}, got {form}"
            name, dims = line.state.name, ", ".join(map(_shown, line.state.dims))
            help_ = f"declare `state {name}: complex[{dims}]`; or take the real part, `real(z)`"
            self._complain("A310", message, line.value.span, str(form), help=help_)

    def _check_read(self, line: program.ReadClause, form: ExprForm) -> ExprForm:
        if form.kind == "float" and len(form.axes) == 2 and self._checker.has_branches:
            help_ = "read a vector: use a state of one axis, or a branch for each row"
            message = f"a branch that gives {form} is not supported yet"
            self._complain("A703", message, line.value.span, str(form), help=help_)
            return UNKNOWN
        if form is not UNKNOWN and form.kind != "unknown" and (form.kind != "float" or len(form.axes) != 1):
            help_ = "read a vector: `q @ S`"
            message = f"`read` must give a vector, got {form}"
            self._complain("A310", message, line.value.span, str(form), help=help_)
        if form.is_complex:
            message = f"`read` must give real numbers, got {form}"
            self._complain("A310", message, line.value.span, str(form), help="read the real part: `real(C @ x)`")
            return UNKNOWN
        return form

    def check_states(self, item: program.RecurrenceClauses) -> None:
        """Report states that nothing reads except their own steps."""
        for state in item.states:
            others = [x.value for x in item.lines if not (isinstance(x, program.StepClause) and x.state is state)]
            if not any(isinstance(node, program.StateRead) and node.state is state for node in below(others)):
                help_ = f"read it: `read q @ {state.name}`; or remove it"
                self._complain("A222", f"nothing reads the state `{state.name}`", state.span, help=help_)


def _shown(dim: Dim) -> str:
    return str(dim) if isinstance(dim, str | int) else "…"


def _is_number(form: ExprForm) -> bool:
    return form.kind in ("int", "real", "approximate", "float")
