"""The typing rules of operators and functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attnc.spec import program
from attnc.spec.checks.expression_forms import (
    APPROXIMATE,
    BOOL,
    INT,
    NOTHING,
    REAL,
    UNKNOWN,
    ExprForm,
    Finding,
    as_number,
    constant_finding,
    join,
)
from attnc.spec.checks.float_rules import FloatRules
from attnc.spec.meaning.exact_arithmetic import ArithmeticFault, apply
from attnc.spec.names.builtins import EXACT_FUNCTIONS, FLOAT_BUILTINS, INTEGER_FUNCTIONS, TRANSCENDENTAL, WORD_OF
from attnc.spec.source import Span

Complain = Callable[..., None]

_ORDER = frozenset({"lt", "le", "gt", "ge"})
_EQUALITY = frozenset({"eq", "ne"})
_LOGIC = frozenset({"and", "or", "not"})
_DIVISIONS = frozenset({"div", "floordiv", "mod"})


_RANGE = "integers have 64 bits: write a formula whose intermediate values are all defined and in range"


class OperationRules:
    """Typing rules of operations. Errors go to `complain(code, message, span, label, help=…)`."""

    def __init__(self, complain: Complain) -> None:
        self._complain = complain
        self.floating = FloatRules(complain)

    def of(self, node: program.Operation, findings: Sequence[Finding]) -> Finding:
        """Return the finding of an operation, given the findings of its operands."""
        needs = frozenset[str]().union(*(f.needs for f in findings))
        if any(f.form.kind == "unknown" for f in findings):
            return Finding(BOOL if node.op in _LOGIC | _ORDER | _EQUALITY | {"power_of_two"} else UNKNOWN, needs)
        if node.op in FLOAT_BUILTINS or node.op == "share" or any(f.form.kind == "float" for f in findings):
            return Finding(self.floating.of(node, findings), needs)
        form = self._form(node, findings)
        if form is None:
            return Finding(UNKNOWN, needs)
        value = self._constant(node, findings)
        if value is not None:
            return Finding(value.form, needs, value.constant, value.natural)
        return Finding(form, needs, None, _natural(node.op, findings))

    def _form(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm | None:
        op = node.op
        if op in _LOGIC:
            return BOOL if _all_fulfil(node, findings, self.boolean) else None
        if op in _EQUALITY and all(f.form == BOOL for f in findings):
            return BOOL
        if not _all_fulfil(node, findings, lambda o, f: self._number(node, o, f)):
            return None
        if op in _ORDER | _EQUALITY | {"floordiv", "mod"}:
            exact = _all_fulfil(node, findings, lambda o, f: self.exact(o, f, f"`{WORD_OF[op]}`"))
            return self._exact_form(op, findings) if exact else None
        if op in INTEGER_FUNCTIONS:
            integral = _all_fulfil(node, findings, lambda o, f: self.integer(o, f, f"`{op}`"))
            return (BOOL if op == "power_of_two" else INT) if integral else None
        return _number_form(op, findings)

    def _exact_form(self, op: str, findings: Sequence[Finding]) -> ExprForm:
        if op in _ORDER | _EQUALITY:
            return BOOL
        return INT if op == "floordiv" else _join_all(findings)

    # --- demands on operands -----------------------------------------------------------------------------------------

    def boolean(self, node: program.Expr, finding: Finding, what: str = "a condition") -> bool:
        """Check that an operand is a truth value, and report an error otherwise; return whether it is."""
        if finding.form.kind in ("bool", "unknown"):
            return True
        help_ = "compare it with something: `… > 0`, `… == 0`"
        if what == "`keep`" and finding.form.kind == "int":
            help_ = f"`rank` is 0 for the best score: write `rank < {node.span.text}` to keep that many candidates"
        self._complain(
            "A308", f"{what} must be true or false, got {finding.form}", node.span, str(finding.form), help=help_
        )
        return False

    def integer(self, node: program.Expr, finding: Finding, what: str) -> bool:
        """Check that an operand is an integer, and report an error otherwise; return whether it is."""
        if finding.form.kind in ("int", "unknown"):
            return True
        verb = "needs" if what.startswith("`") else "must be"
        message = f"{what} {verb} an integer, got {finding.form}"
        self._complain("A309", message, node.span, str(finding.form), help=_to_integer(finding.form))
        return False

    def exact(self, node: program.Expr, finding: Finding, what: str) -> bool:
        """Check that an operand is exact, not a rounded number; report an error otherwise; return whether it is."""
        if finding.form.kind != "approximate":
            return True
        help_ = "round it to an integer: `floor(…)` or `ceil(…)` of the whole formula"
        message = f"{what} needs an exact number, got a rounded one: the result of sqrt, exp, log or a fractional power"
        self._complain("A401", message, node.span, "not exact", help=help_)
        return False

    def _number(self, parent: program.Operation, node: program.Expr, finding: Finding) -> bool:
        if finding.form.is_number:
            return True
        name = parent.op if parent.op in EXACT_FUNCTIONS else WORD_OF[parent.op]
        help_ = as_number(finding.form, node.span.text)
        if finding.form == BOOL and parent.op in _EQUALITY:
            help_ = "a condition cannot be compared with a number: write the condition alone, or `not` before it"
        self._complain("A310", f"`{name}` needs numbers, got {finding.form}", node.span, str(finding.form), help=help_)
        return False

    # --- constants ---------------------------------------------------------------------------------------------------

    def _constant(self, node: program.Operation, findings: Sequence[Finding]) -> Finding | None:
        values = [f.constant for f in findings]
        if node.op in ("and", "or"):
            return None
        if node.op in _DIVISIONS and values[1] == 0:
            return self._fault(
                "division by zero", node.operands[1].span, "this is 0", "divide by a number other than 0"
            )
        if node.op == "clamp" and values[1] is not None and values[2] is not None and values[1] > values[2]:
            message = "`clamp(x, low, high)` needs low <= high"
            return self._fault(message, node.span, "low is above high", "swap the two bounds")
        constants = tuple(v for v in values if v is not None)
        if len(constants) < len(values):
            return None
        try:
            return constant_finding(apply(node.op, constants))
        except ArithmeticFault as fault:
            return self._fault(str(fault), node.span, "this constant has no value", _RANGE)

    def _fault(self, message: str, span: Span, label: str, help_: str) -> Finding:
        self._complain("A403", message, span, label, help=help_)
        return NOTHING


def _to_integer(form: ExprForm) -> str:
    match form.kind:
        case "float":
            return "use positions, sizes, parameters and int inputs: they are integers"
        case "bool":
            return "write `(1 if … else 0)` for an integer"
        case "list":
            return "take one entry, `x[0]`; or iterate over the indices of the list, `for j in 0 .. 3`, and read `x[j]`"
        case "real":
            return "divide by `//`, which rounds down, or take `floor(…)` or `ceil(…)` of it"
        case _:
            return "take `floor(…)` or `ceil(…)` of it"


def _all_fulfil(
    node: program.Operation, findings: Sequence[Finding], demand: Callable[[program.Expr, Finding], bool]
) -> bool:
    """Whether every operand fulfils a demand; checks all operands, so that every error is reported."""
    return sum(not demand(operand, f) for operand, f in zip(node.operands, findings, strict=True)) == 0


def _join_all(findings: Sequence[Finding]) -> ExprForm:
    form = findings[0].form
    for other in findings[1:]:
        form = join(form, other.form) or UNKNOWN
    return form


def _number_form(op: str, findings: Sequence[Finding]) -> ExprForm:
    joined = _join_all(findings)
    if op in ("floor", "ceil"):
        return INT
    if op in TRANSCENDENTAL:
        return APPROXIMATE
    if op == "div":
        return REAL if joined == INT else joined
    if op == "pow":
        return _power_form(findings[0].form, findings[1])
    return joined


def _power_form(base: ExprForm, exponent: Finding) -> ExprForm:
    if base == APPROXIMATE or exponent.form != INT:
        return APPROXIMATE
    return INT if base == INT and exponent.natural else REAL


def _natural(op: str, findings: Sequence[Finding]) -> bool:
    """Whether the result is surely never negative, given which operands are never negative."""
    signs = [f.natural for f in findings]
    match op:
        case "abs" | "isqrt" | "bitlen" | "sqrt" | "exp":
            return True
        case "add" | "mul" | "div" | "floordiv" | "min" | "floor" | "ceil" | "bitand" | "bitor" | "xor":
            return all(signs)
        case "max":
            return any(signs)
        case "mod" | "clamp":
            return signs[1]
        case "pow":
            return signs[0]
        case _:
            return False
