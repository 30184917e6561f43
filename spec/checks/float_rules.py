"""The typing rules of floating-point operations: numbers, and vectors over a named axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from attnc.spec import program
from attnc.spec.checks.expression_forms import BOOL, FLOAT, UNKNOWN, ExprForm, Finding, as_number, floating
from attnc.spec.diagnostics import Label
from attnc.spec.names.builtins import FLOAT_BUILTINS, VECTOR_FUNCTIONS, WORD_OF
from attnc.spec.types import Dim

Complain = Callable[..., None]

_COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})

_ELEMENTWISE = frozenset(
    {
        *(
            "add",
            "sub",
            "mul",
            "div",
            "share",
            "neg",
            "pow",
            "abs",
            "min",
            "max",
            "clamp",
            "sqrt",
            "exp",
            "log",
            "log2",
        ),
        *(name for name in FLOAT_BUILTINS if name not in VECTOR_FUNCTIONS | {"eye"}),
    }
)
"""Operations on numbers, and on vectors entry by entry; a number goes with a vector."""


_COMPLEX = frozenset(
    {*("add", "sub", "mul", "div", "neg", "exp", "matmul", "dot", "outer", "diag", "part", "real", "imag", "conj")}
)
"""Operations that complex numbers have."""

_HOW = {
    "part": "the i-th of n equal parts of a vector: `part(q, 0, 2)`",
    "outer": "of two vectors: `outer(a, b)`",
    "eye": "of a size: `eye(dk)`",
    "solve": "a symmetric matrix and a vector over its axis: `solve(sum(outer(d, d) for k) + eye(dk), mu)`",
}


def _lies_in(axes: tuple[Dim, ...], others: tuple[Dim, ...]) -> bool:
    """Whether axes are some of others, in their order, each of which is there once."""
    if axes == others:
        return True
    rest = iter(others)
    return len(set(others)) == len(others) and all(axis in rest for axis in axes)


class FloatRules:
    """Typing rules of operations with a floating-point operand."""

    def __init__(self, complain: Complain) -> None:
        self._complain = complain
        self.by_name = False
        """Whether a vector goes with a matrix over its axis, entry by entry, as in recurrences."""

    def of(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        """The form of an operation; UNKNOWN after a complaint."""
        if not (self._are_numbers(node, findings) and self._are_real(node, findings)):
            return UNKNOWN
        form = self._of(node, findings)
        if form.kind != "float" or node.op in ("real", "imag"):
            return replace(form, is_complex=False)
        return replace(form, is_complex=any(f.form.is_complex for f in findings))

    def _of(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        if node.op in ("part", "outer", "eye", "solve"):
            return self._of_matrices(node, findings)
        if node.op in ("matmul", "diag", "softmax"):
            return self._of_axes(node, findings)
        if node.op in VECTOR_FUNCTIONS:
            return self._of_vectors(node, findings)
        if node.op in _ELEMENTWISE:
            return self._elementwise(node, findings)
        if node.op in _COMPARISONS and node.floating:
            return self._compared(node, findings)
        at = next(o for o, f in zip(node.operands, findings, strict=True) if f.form.kind == "float")
        name = WORD_OF.get(node.op, node.op)
        message = f"`{name}` is exact, and this is {FLOAT}"
        help_ = "compare and round positions, sizes and int inputs; `max(x, 0)` and the like take any number"
        self._complain("A401", message, at.span, "floating point", help=help_)
        return UNKNOWN

    def _are_numbers(self, node: program.Operation, findings: Sequence[Finding]) -> bool:
        good = True
        for operand, f in zip(node.operands, findings, strict=True):
            if not (f.form.is_number or f.form.kind == "float"):
                message = f"`{WORD_OF.get(node.op, node.op)}` needs numbers, and this is {f.form}"
                help_ = as_number(f.form, operand.span.text)
                self._complain("A310", message, operand.span, str(f.form), help=help_)
                good = False
        return good

    def _are_real(self, node: program.Operation, findings: Sequence[Finding]) -> bool:
        """Whether complex operands stand where there may be some."""
        at = next(((o, f.form) for o, f in zip(node.operands, findings, strict=True) if f.form.is_complex), None)
        is_exact = node.op not in _ELEMENTWISE | VECTOR_FUNCTIONS | {"matmul", "softmax"}
        if at is None or node.op in _COMPLEX or is_exact:
            return True
        operand, form = at
        message = f"`{WORD_OF.get(node.op, node.op)}` needs real numbers, and this is {form}"
        help_ = "take a part of it, `real(z)` or `imag(z)`, or `real(z * conj(z))`, the square of its absolute value"
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
                message = f"{vectors[0][1]} and {form} do not go together"
                help_ = _turned(vectors[0][0], operand) if form.axes == vectors[0][1].axes[::-1] else ""
                help_ = help_ or "a number goes with any vector, two vectors are over one axis"
                also = (Label(vectors[0][0].span, str(vectors[0][1])),)
                self._complain("A314", message, operand.span, str(form), also=also, help=help_)
                return UNKNOWN
        return vectors[0][1] if vectors else FLOAT

    def _compared(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        """A comparison of numbers, where floating-point ones are compared: in `keep`."""
        for operand, f in zip(node.operands, findings, strict=True):
            if f.form.axes:
                message = f"`{WORD_OF[node.op]}` compares numbers, and this is {f.form}"
                self._complain("A310", message, operand.span, str(f.form), help=as_number(f.form, operand.span.text))
                return UNKNOWN
        return BOOL

    def _of_axes(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        """`a @ b`, `diag(x)`, `softmax(x)`."""
        forms = [f.form for f in findings]
        if node.op == "matmul":
            return self._product(node, *forms)
        if len(forms[0].axes) != 1:
            help_ = f"a vector: `{node.op}(x)`"
            message = f"`{node.op}` needs a vector, and this is {forms[0]}"
            self._complain("A314", message, node.operands[0].span, str(forms[0]), help=help_)
            return UNKNOWN
        return floating(forms[0].axes * 2) if node.op == "diag" else forms[0]

    def _product(self, node: program.Operation, left: ExprForm, right: ExprForm) -> ExprForm:
        """Over the axis that both have: where they meet, or else the only one."""
        shared = [axis for axis in left.axes if axis in right.axes]
        if left.axes and right.axes and left.axes[-1] == right.axes[0]:
            return floating(left.axes[:-1] + right.axes[1:])
        if len(shared) == 1 and left.axes.count(shared[0]) == right.axes.count(shared[0]) == 1:
            return floating(tuple(a for a in left.axes + right.axes if a != shared[0]))
        message = f"`@` of {left} and {right}"
        help_ = "it adds up over an axis that both have: `k @ S` over `dk`, `S @ v` over `dv`"
        self._complain("A314", message, node.span, "no axis to add up over", help=help_)
        return UNKNOWN

    def _of_matrices(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        """`part(x, i, n)`, `outer(a, b)`, `eye(n)`, `solve(A, b)`."""
        axes = [f.form.axes for f in findings]
        wanted = {"part": (1, 0, 0), "outer": (1, 1), "eye": (0,), "solve": (2, 1)}[node.op]
        for operand, form, rank in zip(node.operands, findings, wanted, strict=True):
            if len(form.form.axes) != rank:
                what = ("a number", "a vector", "a matrix")[rank]
                message = f"`{node.op}` needs {what} here, and this is {form.form}"
                self._complain("A314", message, operand.span, str(form.form), help=_HOW[node.op])
                return UNKNOWN
        match node.op:
            case "part":
                return self._part(node, findings)
            case "outer":
                return floating(axes[0] + axes[1])
            case "eye":
                return self._eye(node, findings[0])
        if axes[0] != axes[1] * 2:
            message = f"`solve` of {findings[0].form} and {findings[1].form}"
            self._complain("A314", message, node.span, "over different axes", help=_HOW["solve"])
            return UNKNOWN
        return floating(axes[1])

    def _part(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        """The i-th of n parts, both constants."""
        for operand, f in zip(node.operands[1:], findings[1:], strict=True):
            if not isinstance(f.constant, int):
                message = "`part` takes constants: which part, and of how many"
                self._complain("A402", message, operand.span, "not a constant", help=_HOW["part"])
                return UNKNOWN
        number, of = findings[1].constant, findings[2].constant
        assert isinstance(number, int)
        assert isinstance(of, int)
        if of < 1:
            message = f"there are no {of} parts"
            self._complain("A312", message, node.operands[2].span, "not above 0", help=_HOW["part"])
            return UNKNOWN
        if not 0 <= number < of:
            message = f"the part {number} of {of} is out of range"
            help_ = f"the parts are 0 to {of - 1}"
            self._complain("A312", message, node.operands[1].span, "no such part", help=help_)
            return UNKNOWN
        return floating((f"{findings[0].form.axes[0]}/{of}",))

    def _eye(self, node: program.Operation, finding: Finding) -> ExprForm:
        size = node.operands[0]
        if isinstance(size, program.Size):
            return floating((size.name, size.name))
        if isinstance(finding.constant, int) and finding.constant > 0:
            return floating((finding.constant, finding.constant))
        message = "`eye` takes a size by its name, or a number"
        self._complain("A314", message, size.span, "which axis?", help=_HOW["eye"])
        return UNKNOWN

    def _of_vectors(self, node: program.Operation, findings: Sequence[Finding]) -> ExprForm:
        forms = [f.form for f in findings]
        for operand, form in zip(node.operands, forms, strict=True):
            if len(form.axes) != 1:
                message = f"`{node.op}` needs a vector, and this is {form}"
                help_ = "`q`, `k`, and a row of a real input such as `table[i]` are vectors"
                self._complain("A314", message, operand.span, str(form), help=help_)
                return UNKNOWN
        if node.op != "dot":
            return floating(forms[0].axes)
        if forms[0].axes != forms[1].axes:
            message = f"the product of {forms[0]} and {forms[1]}"
            also = (Label(node.operands[0].span, str(forms[0])),)
            help_ = "take two vectors over one axis, such as `q` and `k`"
            self._complain("A314", message, node.operands[1].span, str(forms[1]), also=also, help=help_)
            return UNKNOWN
        return FLOAT


def _turned(*operands: program.Expr) -> str:
    """The remedy where an outer product has the axes of the other operand the other way round; empty for none."""
    for node in operands:
        if isinstance(node, program.Operation) and node.op == "outer":
            rows, columns = (operand.span.text for operand in node.operands)
            return f"the axes are the other way round: write `outer({columns}, {rows})`"
    return ""
