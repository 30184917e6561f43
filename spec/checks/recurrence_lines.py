"""The lines of a recurrence: what each gives, and whether it is what a state or a token takes."""

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
    """Checks one recurrence."""

    def __init__(self, checker: Checker, complain: Callable[..., None]) -> None:
        self._checker = checker
        self._complain = complain

    def check(self, item: program.RecurrenceClauses) -> ExprForm:
        """Forms of all lines; the order of the tokens, and where states begin anew. What a token gets."""
        with self._checker.by_name():
            return self._check(item)

    def _check(self, item: program.RecurrenceClauses) -> ExprForm:
        checker, facts = self._checker, self._checker.everywhere
        env = self._of_family(item.family)
        out = UNKNOWN
        for line in item.lines:
            if isinstance(line, program.Let):
                found = checker.find(line.value, env, facts)
                env[line.binder] = Finding(found.form, found.needs | {"data"})
            elif isinstance(line, program.ReadClause):
                out = self._check_read(line, checker.find(line.value, env, facts).form)
            else:
                self._check_step(line, env)
        if item.scan is not None:
            found = checker.integer(item.scan, "the order of the tokens", facts, env)
            if "batch" in found.needs:
                help_ = "give it no batch dimension: one route for all"
                self._complain("A406", "a route that differs from sequence to sequence", item.scan.span, help=help_)
        if item.reset is not None:
            checker.condition(item.reset, env, facts)
        return out

    def _of_family(self, family: program.KeyRange | None) -> dict[program.Binder, Finding]:
        """Return the finding for a family's binder; the parameters fix its range."""
        if family is None:
            return {}
        facts = self._checker.everywhere
        ends = [self._checker.integer(end, "the end of a range", facts) for end in (family.low, family.high)]
        for end, found in zip((family.low, family.high), ends, strict=True):
            if found.needs:
                help_ = "use parameters and numbers"
                message = "how many branches with a state there are is fixed when the pattern is compiled"
                self._complain("A406", message, end.span, "not a constant", help=help_)
        return {family.binder: Finding(INT, frozenset(), None, ends[0].natural)}

    def _check_step(self, line: program.StepClause, env: dict[program.Binder, Finding]) -> None:
        checker, facts = self._checker, self._checker.everywhere
        inner = dict(env)
        if line.repeat is not None:
            ends = [checker.integer(e, "the end of a range", facts) for e in (line.repeat.low, line.repeat.high)]
            for end, found in zip((line.repeat.low, line.repeat.high), ends, strict=True):
                if found.needs - {"size"}:
                    help_ = "use parameters, and sizes of inputs"
                    self._complain("A406", "a step is repeated alike for all tokens", end.span, help=help_)
            inner[line.repeat.binder] = Finding(INT, frozenset(), None, ends[0].natural)
        form = checker.find(line.value, inner, facts).form
        wanted = floating(line.state.dims, is_complex=line.state.is_complex)
        if form.kind != "unknown" and (not _is_number(form) or form.axes != wanted.axes):
            message = f"the state `{line.state.name}` is {wanted}, and this is {form}"
            help_ = "products go by the names of axes: `outer(k, v)`, `k @ S`, `exp(g) * S`"
            self._complain("A314", message, line.value.span, str(form), help=help_)
        elif form.is_complex and not line.state.is_complex:
            message = f"the state `{line.state.name}` is {wanted}, and this is {form}"
            name, dims = line.state.name, ", ".join(map(_shown, line.state.dims))
            help_ = f"declare `state {name}: complex[{dims}]`; or take a part of it, `real(z)`"
            self._complain("A310", message, line.value.span, str(form), help=help_)

    def _check_read(self, line: program.ReadClause, form: ExprForm) -> ExprForm:
        if form.kind == "float" and len(form.axes) == 2 and self._checker.has_branches:
            help_ = "read a vector of it, and write a state of one axis, or a branch for each of a few rows"
            message = f"a branch that gives {form} is not supported yet"
            self._complain("A703", message, line.value.span, str(form), help=help_)
            return UNKNOWN
        if form is not UNKNOWN and form.kind != "unknown" and (form.kind != "float" or len(form.axes) != 1):
            help_ = "read a vector: `q @ S`"
            self._complain("A310", f"a token gets a vector, and this is {form}", line.value.span, str(form), help=help_)
        if form.is_complex:
            message = f"a token gets real numbers, and this is {form}"
            self._complain("A310", message, line.value.span, str(form), help="read a part of it: `real(C @ x)`")
            return UNKNOWN
        return form

    def check_states(self, item: program.RecurrenceClauses) -> None:
        """A state that nothing reads but its own steps is of no use."""
        for state in item.states:
            others = [x.value for x in item.lines if not (isinstance(x, program.StepClause) and x.state is state)]
            if not any(isinstance(node, program.StateRead) and node.state is state for node in below(others)):
                help_ = f"read it: `read q @ {state.name}`; or drop it"
                self._complain("A222", f"nothing reads the state `{state.name}`", state.span, help=help_)


def _shown(dim: Dim) -> str:
    return str(dim) if isinstance(dim, str | int) else "…"


def _is_number(form: ExprForm) -> bool:
    return form.kind in ("int", "real", "approximate", "float")
