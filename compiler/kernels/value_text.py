"""Floating-point formulas as Triton text, computed in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isinf, isnan

from attnc.compiler.ir import Apply, Const, Element, FloatSelect, Index, Number, Ratio, Value, is_truth
from attnc.compiler.ir.node_words import plural
from attnc.compiler.kernels.index_text import ExprText, IndexText, NotInKernelsError, aligned, fits_32_bits

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

VALUE_HELPERS: Mapping[str, str] = {
    "tanh": '''\
@triton.jit
def tanh(x):
    """tanh, by its series near 0, where the quotient would lose digits."""
    x2 = x * x
    near = x * (1.0 + x2 * (-0.33333333 + x2 * (0.13333333 + x2 * (-0.053968254 + x2 * 0.021869489))))
    far = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.25, near, far)
''',
    "softplus": '''\
@triton.jit
def softplus(x):
    """log(1 + e^x)."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
''',
    "whole_power": '''\
@triton.jit
def whole_power(x, n: tl.constexpr):
    """x ** n for n >= 2."""
    found = x
    for _ in tl.static_range(n - 1):
        found = found * x
    return found
''',
    "power": '''\
@triton.jit
def power(base, exponent):
    """base ** exponent of a base that is not negative; 0 ** 0 is 1."""
    return tl.where(exponent == 0.0, 1.0, tl.exp2(exponent * tl.log2(base)))
''',
}
"""Texts of the functions that a kernel may call, by name."""


@dataclass(frozen=True, slots=True)
class TritonCall:
    """The text of an operation in Triton, with `{0}`, `{1}`, … for its operands.

    `helper`: the function of `VALUE_HELPERS` that it calls. `is_nested`: operands need parentheses where they are more
    than a name or a call.
    """

    text: str
    helper: str | None = None
    is_nested: bool = False

    @property
    def binds(self) -> int:
        """The precedence of the text: a choice and a helper's call bind as names do."""
        return 9 if self.text.startswith(("tl.where", f"{self.helper}(")) else 5


TRITON_CALLS = {
    "sqrt": TritonCall("tl.sqrt({0})"),
    "exp": TritonCall("tl.exp({0})"),
    "log": TritonCall("tl.log({0})"),
    "log2": TritonCall("tl.log2({0})"),
    "sin": TritonCall("tl.sin({0})"),
    "cos": TritonCall("tl.cos({0})"),
    "erf": TritonCall("tl.erf({0})"),
    "sigmoid": TritonCall("tl.sigmoid({0})"),
    "abs": TritonCall("tl.abs({0})"),
    "tanh": TritonCall("tanh({0})", "tanh"),
    "softplus": TritonCall("softplus({0})", "softplus"),
    "relu": TritonCall("tl.maximum({0}, 0.0)"),
    "silu": TritonCall("({0}) * tl.sigmoid({0})", is_nested=True),
    "elu": TritonCall("tl.where({0} > 0.0, {0}, tl.exp({0}) - 1.0)", is_nested=True),
    "sign": TritonCall("tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, 0.0))", is_nested=True),
    "clamp": TritonCall("tl.minimum(tl.maximum({0}, {1}), {2})"),
    "logaddexp": TritonCall("tl.maximum({0}, {1}) + softplus(-tl.abs({0} - {1}))", "softplus", is_nested=True),
    "share": TritonCall("tl.where({1} == 0.0, 0.0, {0} / tl.where({1} == 0.0, 1.0, {1}))", is_nested=True),
    "if_at_least": TritonCall("tl.where({0} >= {1}, {2}, {3})"),
    "chain": TritonCall("tl.where({0} == 0.0, 0.0, {0} * {1})", is_nested=True),
}
"""The calls of operations that have no sign, by name."""

MOST_WHOLE = 64
"""Powers with whole exponents up to this are computed as products."""

_SIGNS = {"add": ("+", 5), "sub": ("-", 5), "mul": ("*", 7), "div": ("/", 7)}


@dataclass
class ValueText:
    """A writer of floating-point formulas.

    `names` has the texts of atoms, `exact` writes exact expressions, and `read` returns the texts of inputs' elements.
    Values in `grouped` are put in parentheses, so that they are computed before other summands.
    """

    names: Mapping[Value, ExprText]
    exact: IndexText
    read: Callable[[Element, tuple[ExprText, ...]], ExprText]
    helpers: dict[str, None] = field(default_factory=dict)
    grouped: frozenset[Value] = frozenset()
    _known: dict[Value, ExprText] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._wide = self.exact.wide()

    def forget(self) -> None:
        """Forget all texts, because the loads of the next texts have other masks."""
        self._known.clear()
        self.exact.forget()
        self._wide.forget()

    def of(self, node: Value) -> ExprText:
        """Return the text of a number. Raises NotInKernelsError."""
        if node not in self._known:
            text = self._write(node)
            self._known[node] = ExprText(f"({text.text})", text.axes) if node in self.grouped else text
        return self._known[node]

    def integer(self, node: Index) -> ExprText:
        """Return the text of an integer, with 64 bits if 32 may be too few."""
        return (self.exact if fits_32_bits(node) else self._wide).of(node)

    def truth(self, node: Index) -> ExprText:
        """Return the text of a condition, whose integers have 64 bits if 32 may be too few."""
        assert is_truth(node)
        return (self.exact if fits_32_bits(node) else self._wide).of(node)

    def _write(self, node: Value) -> ExprText:  # noqa: C901  one case a node kind
        if node in self.names:
            return self.names[node]
        match node:
            case Number(value=value):
                return _constant(value)
            case Ratio(num=num, den=den):
                return self._ratio(num, den)
            case Element(indices=indices):
                return self.read(node, tuple(map(self.integer, indices)))
            case FloatSelect(condition=condition, then=then, otherwise=otherwise):
                axes, parts = aligned(self.truth(condition), self.of(then), self.of(otherwise))
                return ExprText(f"tl.where({', '.join(part.text for part in parts)})", axes)
            case Apply(op="pow"):
                return self._power(node)
            case Apply(op="min" | "max" as op, operands=operands):
                axes, parts = aligned(*map(self.of, operands))
                text = parts[0].text
                for part in parts[1:]:
                    text = f"tl.{op}imum({text}, {part.text})"
                return ExprText(text, axes)
            case Apply(op="neg", operands=(operand,)):
                inner = self.of(operand)
                return ExprText(f"-{inner.at(8)}", inner.axes, 6)
            case Apply(op=op, operands=operands):
                return self._applied(op, operands)
        raise NotInKernelsError(plural(node))

    def _applied(self, op: str, operands: tuple[Value, ...]) -> ExprText:
        axes, parts = aligned(*map(self.of, operands))
        if op in _SIGNS:
            sign, binds = _SIGNS[op]
            # `score + (x - y)` is not `(score + x) - y`: a score that is added to a large x loses its digits.
            return ExprText(f"{parts[0].at(binds)} {sign} {parts[1].at(binds + 1)}", axes, binds)
        call = TRITON_CALLS.get(op)
        if call is None:
            raise NotInKernelsError(op)
        if call.helper is not None:
            self.helpers[call.helper] = None
        text = call.text.format(*(part.at(9) if call.is_nested else part.text for part in parts))
        return ExprText(text, axes, call.binds)

    def _ratio(self, num: Index, den: Index) -> ExprText:
        if isinstance(num, Const) and isinstance(den, Const):
            return _constant(num.value / den.value)
        dividend = self.integer(num)
        num_text = (
            ExprText(f"{dividend.at(9)}.to(tl.float32)", dividend.axes)
            if not isinstance(num, Const)
            else _constant(num.value)
        )
        if isinstance(den, Const) and den.value == 1:
            return num_text
        den_text = self.integer(den)
        divisor = ExprText(f"{den_text.at(9)}.to(tl.float32)", den_text.axes)
        if isinstance(den, Const):
            divisor = _constant(float(den.value))
        axes, (a, b) = aligned(num_text, divisor)
        return ExprText(f"{a.at(7)} / {b.at(8)}", axes, 7)

    def _power(self, node: Apply) -> ExprText:
        base, exponent = node.operands
        whole = _whole_constant(exponent)
        inner = self.of(base)
        if whole is not None and 2 <= whole <= MOST_WHOLE:
            self.helpers["whole_power"] = None
            return ExprText(f"whole_power({inner.text}, {whole})", inner.axes)
        axes, (a, b) = aligned(inner, self.of(exponent))
        self.helpers["power"] = None
        return ExprText(f"power({a.text}, {b.text})", axes)


def _whole_constant(node: Value) -> int | None:
    """Return the value of a constant that is a whole number; None for any other value."""
    if isinstance(node, Number) and node.value == int(node.value):
        return int(node.value)
    if isinstance(node, Ratio) and isinstance(node.num, Const) and node.den is not None:
        den = node.den.value if isinstance(node.den, Const) else 0
        return node.num.value if den == 1 else None
    return None


def _constant(value: float) -> ExprText:
    if isinf(value) or isnan(value):
        return ExprText(f'float("{value}")')
    return ExprText(repr(float(value)), binds=9 if value >= 0 else 6)
