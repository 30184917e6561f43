"""Typing rules of floating-point operations on numbers and on vectors over named axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from attnc.spec import program
from attnc.spec.checks.expression_forms import BOOL, FLOAT, UNKNOWN, ExprForm, Finding, as_number, floating
from attnc.spec.diagnostics import Label
from attnc.spec.exact_operations import COMPARISONS, EXACT_OPERATIONS
from attnc.spec.names.builtins import FLOAT_BUILTINS, VECTOR_FUNCTIONS, WORD_OF
from attnc.spec.types import Dim

Complain = Callable[..., None]

_ELEMENTWISE = frozenset(
    {
        "share",
        *(name for name, item in EXACT_OPERATIONS.items() if item.takes == "numbers" and item.gives != "int"),
        *(name for name in FLOAT_BUILTINS if name not in VECTOR_FUNCTIONS | {"eye"}),
    }
)
"""Elementwise operations on numbers and vectors; a number is broadcast over a vector."""


_COMPLEX = frozenset(
    {*("add", "sub", "mul", "div", "neg", "exp", "matmul", "dot", "outer", "diag", "part", "real", "imag", "conj")}
)
"""Operations that accept complex numbers."""

_USAGE = {
    "part": "take the i-th of n equal parts of a vector: `part(q, 0, 2)`",
    "outer": "use two vectors: `outer(a, b)`",
    "eye": "use a size: `eye(dk)`",
    "solve": "use a symmetric matrix and a vector over its axis: `solve(sum(outer(d, d) for k) + eye(dk), mu)`",
}


def _lies_in(axes: tuple[Dim, ...], others: tuple[Dim, ...]) -> bool:
    """Whether `axes` equals `others`, or is a subsequence of `others` and no axis occurs twice there."""
    if axes == others:
        return True
    remaining = iter(others)
    return len(set(others)) == len(others) and all(axis in remaining for axis in axes)


class FloatRules:
    """Typing rules of operations with a floating-point operand."""

    def __init__(self, complain: Complain) -> None:
        self._complain = complain
        self.by_name = False
        """Whether elementwise operations broadcast a vector over a matrix that has its axis, as in recurrences."""

    def of(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        """Return the form of an operation; UNKNOWN after an error was reported."""
        if not (self._are_numbers(node, findings) and self._are_real(node, findings)):
            return UNKNOWN
        form = self._form(node, findings)
        if form.kind != "float" or node.op in ("real", "imag"):
            return replace(form, is_complex=False)
        return replace(form, is_complex=any(f.form.is_complex for f in findings))

    def _form(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        if node.op in ("part", "outer", "eye", "solve"):
            return self._matrix_form(node, findings)
        if node.op in ("matmul", "diag", "softmax"):
            return self._axis_form(node, findings)
        if node.op in VECTOR_FUNCTIONS:
            return self._vector_form(node, findings)
        if node.op in _ELEMENTWISE:
            return self._elementwise(node, findings)
        if node.op in COMPARISONS and node.floating:
            return self._compared(node, findings)
        floating_operand = next(o for o, f in zip(node.operands, findings, strict=True) if f.form.kind == "float")
        name = WORD_OF.get(node.op, node.op)
        message = f"`{name}` needs exact numbers, got {FLOAT}"
        help_ = "compare and round positions, sizes and int inputs; functions such as `max(x, 0)` take any number"
        self._complain("A401", message, floating_operand.span, "floating point", help=help_)
        return UNKNOWN

    def _are_numbers(self, node: program.Operation, findings: Sequence[Finding]) -> bool:
        good = True
        for operand, f in zip(node.operands, findings, strict=True):
            if not (f.form.is_number or f.form.kind == "float"):
                message = f"`{WORD_OF.get(node.op, node.op)}` needs numbers, got {f.form}"
                help_ = as_number(f.form, operand.span.text)
                self._complain("A310", message, operand.span, str(f.form), help=help_)
                good = False
        return good

    def _are_real(self, node: program.Operation, findings: Sequence[Finding]) -> bool:
        """Check that an operation with complex operands accepts them; return whether it does."""
        first_complex = next(
            ((o, f.form) for o, f in zip(node.operands, findings, strict=True) if f.form.is_complex), None
        )
        is_exact = node.op not in _ELEMENTWISE | VECTOR_FUNCTIONS | {"matmul", "softmax"}
        if first_complex is None or node.op in _COMPLEX or is_exact:
            return True
        operand, form = first_complex
        message = f"`{WORD_OF.get(node.op, node.op)}` needs real numbers, got {form}"
        help_ = "take `real(z)`, `imag(z)`, or the squared absolute value `real(z * conj(z))`"
        self._complain("A310", message, operand.span, str(form), help=help_)
        return False

    def _elementwise(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        vectors = [(o, f.form) for o, f in zip(node.operands, findings, strict=True) if f.form.axes]
        if self.by_name:
            widest = max((form for _, form in vectors), key=lambda form: len(form.axes), default=FLOAT)
            if all(_lies_in(form.axes, widest.axes) for _, form in vectors):
                return widest
        for operand, form in vectors[1:]:
            if form.axes != vectors[0][1].axes:
                message = f"{vectors[0][1]} and {form} cannot be combined elementwise"
                help_ = _swapped_outer(vectors[0][0], operand) if form.axes == vectors[0][1].axes[::-1] else ""
                help_ = help_ or "combine a number with any vector, or two vectors over the same axis"
                also = (Label(vectors[0][0].span, str(vectors[0][1])),)
                self._complain("A314", message, operand.span, str(form), also=also, help=help_)
                return UNKNOWN
        return vectors[0][1] if vectors else FLOAT

    def _compared(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        """Return the form of a comparison in `keep`, where floating-point numbers may be compared."""
        for operand, f in zip(node.operands, findings, strict=True):
            if f.form.axes:
                message = f"`{WORD_OF[node.op]}` compares numbers, got {f.form}"
                self._complain("A310", message, operand.span, str(f.form), help=as_number(f.form, operand.span.text))
                return UNKNOWN
        return BOOL

    def _axis_form(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        """Return the form of `a @ b`, `diag(x)` or `softmax(x)`."""
        forms = [f.form for f in findings]
        if node.op == "matmul":
            return self._product(node, *forms)
        if len(forms[0].axes) != 1:
            help_ = f"use a vector: `{node.op}(x)`"
            message = f"`{node.op}` needs a vector, got {forms[0]}"
            self._complain("A314", message, node.operands[0].span, str(forms[0]), help=help_)
            return UNKNOWN
        return floating(forms[0].axes * 2) if node.op == "diag" else forms[0]

    def _product(self, node: program.Operation, left: ExprForm, right: ExprForm) -> ExprForm:
        """Return the form of `left @ right`: a sum over the adjacent shared axis, or else over the only shared axis."""
        shared = [axis for axis in left.axes if axis in right.axes]
        if left.axes and right.axes and left.axes[-1] == right.axes[0]:
            return floating(left.axes[:-1] + right.axes[1:])
        if len(shared) == 1 and left.axes.count(shared[0]) == right.axes.count(shared[0]) == 1:
            return floating(tuple(a for a in left.axes + right.axes if a != shared[0]))
        message = f"`@` cannot multiply {left} and {right}"
        help_ = "`@` sums over an axis that both operands have: `k @ S` over `dk`, `S @ v` over `dv`"
        self._complain("A314", message, node.span, "no shared axis", help=help_)
        return UNKNOWN

    def _matrix_form(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        """Return the form of `part(x, i, n)`, `outer(a, b)`, `eye(n)` or `solve(A, b)`."""
        axes = [f.form.axes for f in findings]
        ranks = {"part": (1, 0, 0), "outer": (1, 1), "eye": (0,), "solve": (2, 1)}[node.op]
        for operand, finding, rank in zip(node.operands, findings, ranks, strict=True):
            if len(finding.form.axes) != rank:
                kind = ("a number", "a vector", "a matrix")[rank]
                message = f"`{node.op}` needs {kind} here, got {finding.form}"
                self._complain("A314", message, operand.span, str(finding.form), help=_USAGE[node.op])
                return UNKNOWN
        match node.op:
            case "part":
                return self._part(node, findings)
            case "outer":
                return floating(axes[0] + axes[1])
            case "eye":
                return self._eye(node, findings[0])
        if axes[0] != axes[1] * 2:
            message = f"`solve` needs one axis, got {findings[0].form} and {findings[1].form}"
            self._complain("A314", message, node.span, "over different axes", help=_USAGE["solve"])
            return UNKNOWN
        return floating(axes[1])

    def _part(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        """Return the form of `part(x, i, n)`, where `i` and `n` must be constants."""
        for operand, f in zip(node.operands[1:], findings[1:], strict=True):
            if not isinstance(f.constant, int):
                message = "the index and the number of parts of `part` must be constants"
                self._complain("A402", message, operand.span, "not a constant", help=_USAGE["part"])
                return UNKNOWN
        index, parts = findings[1].constant, findings[2].constant
        assert isinstance(index, int)
        assert isinstance(parts, int)
        if parts < 1:
            message = f"the number of parts must be positive, got {parts}"
            self._complain("A312", message, node.operands[2].span, "not above 0", help=_USAGE["part"])
            return UNKNOWN
        if not 0 <= index < parts:
            message = f"the part {index} of {parts} is out of range"
            help_ = f"the parts are 0 to {parts - 1}"
            self._complain("A312", message, node.operands[1].span, "no such part", help=help_)
            return UNKNOWN
        return floating((f"{findings[0].form.axes[0]}/{parts}",))

    def _eye(self, node: program.Operation, finding: Finding) -> ExprForm:
        size = node.operands[0]
        if isinstance(size, program.Size):
            return floating((size.name, size.name))
        if isinstance(finding.constant, int) and finding.constant > 0:
            return floating((finding.constant, finding.constant))
        message = "`eye` needs the name of a size, or a number"
        self._complain("A314", message, size.span, "which axis?", help=_USAGE["eye"])
        return UNKNOWN

    def _vector_form(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        forms = [f.form for f in findings]
        for operand, form in zip(node.operands, forms, strict=True):
            if len(form.axes) != 1:
                message = f"`{node.op}` needs a vector, got {form}"
                help_ = "`q`, `k`, and a row of a real input such as `table[i]` are vectors"
                self._complain("A314", message, operand.span, str(form), help=help_)
                return UNKNOWN
        if node.op != "dot":
            return floating(forms[0].axes)
        if forms[0].axes != forms[1].axes:
            message = f"`dot` cannot multiply {forms[0]} and {forms[1]}"
            also = (Label(node.operands[0].span, str(forms[0])),)
            help_ = "use two vectors over the same axis, such as `q` and `k`"
            self._complain("A314", message, node.operands[1].span, str(forms[1]), also=also, help=help_)
            return UNKNOWN
        return FLOAT


def _swapped_outer(*operands: program.Expr) -> str:
    """Return the remedy for an outer product with its axes in the wrong order; empty if no operand is one."""
    for node in operands:
        if isinstance(node, program.Operation) and node.op == "outer":
            rows, columns = (operand.span.text for operand in node.operands)
            return f"the axes are the other way round: write `outer({columns}, {rows})`"
    return ""
