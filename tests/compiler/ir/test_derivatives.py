"""Derivatives of scores: functions against sympy, formulas against autograd, and points where autograd gives NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir import fold
from attnc.compiler.ir.derivatives import Derivative, derivatives
from attnc.compiler.ir.print_ir import print_value
from attnc.compiler.ir.value_nodes import (
    apply,
    dot,
    element,
    number,
    scale,
    select,
    vector,
)
from attnc.compiler.lowering.specialise import CallSizes, Slices, Window
from attnc.runtime.values.block_values import BlockValues
from attnc.runtime.values.pair_blocks import Operands, PairBlock

Q = fold.place("q")
X, Y = (element(ir.intern(ir.Tensor(name, "real", ("query",))), (Q,)) for name in ("x", "y"))

Formula = Callable[..., sympy.Expr]

MEANINGS: dict[str, Formula] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "chain": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "pow": lambda a, b: a**b,
    "abs": sympy.Abs,
    "sign": sympy.sign,
    "min": sympy.Min,
    "max": sympy.Max,
    "clamp": lambda a, low, high: sympy.Min(sympy.Max(a, low), high),
    "sqrt": sympy.sqrt,
    "exp": sympy.exp,
    "log": sympy.log,
    "log2": lambda a: sympy.log(a) / sympy.log(2),
    "tanh": sympy.tanh,
    "sigmoid": lambda a: 1 / (1 + sympy.exp(-a)),
    "softplus": lambda a: sympy.log(1 + sympy.exp(a)),
    "relu": lambda a: sympy.Max(a, 0),
    "elu": lambda a: sympy.Piecewise((a, a > 0), (sympy.exp(a) - 1, True)),
    "silu": lambda a: a / (1 + sympy.exp(-a)),
    "sin": sympy.sin,
    "cos": sympy.cos,
    "erf": sympy.erf,
    "logaddexp": lambda a, b: sympy.log(sympy.exp(a) + sympy.exp(b)),
    "if_at_least": lambda a, b, then, otherwise: sympy.Piecewise((then, a >= b), (otherwise, True)),
}
"""Each function of `ir.Apply`, as a function of tensors."""

SMOOTH = {
    "add", "sub", "mul", "div", "neg", "pow", "sqrt", "exp", "log", "tanh", "sigmoid", "softplus", "silu", "sin", "cos",
    "logaddexp",
}  # fmt: skip
FORMULAS = [op for op in MEANINGS if op not in ("chain", "sign", "if_at_least")]

POINTS = [(sympy.Rational(a, 7), sympy.Rational(b, 5)) for a, b in ((3, 4), (17, 1), (5, 12), (40, 3), (1, 30))]


def applied(op: str) -> ir.Value:
    match op:
        case "add" | "sub" | "mul" | "div" | "pow" | "min" | "max" | "logaddexp":
            return apply(op, X, Y)
        case "clamp":
            return apply(op, X, number(0.75), Y)
        case _:
            return apply(op, X)


def in_sympy(node: ir.Value) -> sympy.Expr:
    match node:
        case ir.Number():
            return sympy.Rational(node.value)
        case ir.Element():
            return sympy.Symbol(node.tensor.name, positive=True)
        case ir.Apply():
            return MEANINGS[node.op](*map(in_sympy, node.operands))
        case _:
            raise AssertionError(node)


@pytest.mark.parametrize("op", FORMULAS)
def test_a_function_has_the_derivative_that_sympy_finds(op: str) -> None:
    value = applied(op)
    for derivative in derivatives(value):
        truth = sympy.diff(in_sympy(value), in_sympy(derivative.atom))
        ours = in_sympy(derivative.by)
        if op in SMOOTH:
            assert sympy.simplify((truth - ours).rewrite(sympy.exp)) == 0, (truth, ours)
        for point in POINTS:
            substitution = dict(zip(sympy.symbols("x y", positive=True), point, strict=True))
            gap = sympy.N((truth.subs(substitution) - ours.subs(substitution)).doit(), 40)
            # log2 and erf contain a constant in binary64
            assert abs(gap) < (1e-15 if op in ("log2", "erf") else 1e-35), (op, point, gap)


def test_every_function_of_numbers_has_a_derivative() -> None:
    for op in FORMULAS:
        value = applied(op)
        assert value not in [derivative.atom for derivative in derivatives(value)], op


def test_negative_arguments() -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)  # the sample contains 0, a kink
    for op, slope in {
        "abs": x.sign(),
        "relu": (x > 0).double(),
        "elu": torch.where(x > 0, 1, x.exp()),
        "softplus": x.sigmoid(),
        "tanh": 1 - x.tanh() ** 2,
    }.items():
        (derivative,) = derivatives(apply(op, X))
        torch.testing.assert_close(evaluated(derivative.by, x=x), slope, rtol=1e-14, atol=0)


# --- formulas --------------------------------------------------------------------------------------------------------


def values_of(**inputs: Tensor) -> BlockValues:
    (count,) = {len(x) for x in inputs.values()}
    empty = [torch.zeros(1, count, 4, dtype=torch.float64)]
    operands = Operands(empty, empty, empty, inputs, CallSizes({}), Slices({}), 0.5, torch.float64, {})
    rows, keys = np.arange(count), np.zeros(1, dtype=np.int64)
    return BlockValues(
        operands, PairBlock(0, (0,), Window(0, 0, count, count, 0), rows, keys, np.ones((1, count, 1), np.bool_))
    )


def evaluated(node: ir.Value, **inputs: Tensor) -> Tensor:
    result = values_of(**inputs).of(node)
    (count,) = {len(x) for x in inputs.values()}
    return result.expand(1, count, 1)[0, :, 0]


def taken(derivative: Derivative, **inputs: Tensor) -> Tensor:
    """Evaluate a derivative, 0 where its condition does not hold."""
    result, here = values_of(**inputs).where(derivative.where)
    return torch.where(here, result.of(derivative.by), 0).expand(1, len(inputs["x"]), 1)[0, :, 0].detach()


UNARY = ["neg", "abs", "tanh", "sigmoid", "softplus", "relu", "elu", "silu", "sin", "cos", "exp", "erf"]
BINARY = ["add", "sub", "mul", "min", "max", "logaddexp"]
EVEN = fold.equal(fold.mod(Q, fold.const(2)), fold.const(0))


def extended(parts: st.SearchStrategy[ir.Value]) -> st.SearchStrategy[ir.Value]:
    positive = parts.map(lambda v: apply("add", number(0.25), apply("mul", v, v)))
    return st.one_of(
        st.builds(apply, st.sampled_from(UNARY), parts),
        st.builds(apply, st.sampled_from(BINARY), parts, parts),
        st.builds(apply, st.sampled_from(["sqrt", "log", "log2"]), positive),
        st.builds(lambda a, b: apply("div", a, b), parts, positive),
        st.builds(lambda a: apply("pow", a, number(3.0)), parts),
        st.builds(lambda a, b: apply("pow", a, apply("tanh", b)), positive, parts),
        st.builds(lambda a: apply("clamp", a, number(-0.6), number(0.7)), parts),
        st.builds(lambda a, b: select(EVEN, a, b), parts, parts),
    )


formulas = st.recursive(st.one_of(st.sampled_from([X, Y, scale()]), st.just(number(1.5))), extended, max_leaves=12)


@given(formulas, st.integers(0, 1 << 20))
def test_a_formula_has_the_gradient_that_autograd_finds(formula: ir.Value, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    inputs = {n: torch.randn(6, generator=made, dtype=torch.float64).requires_grad_() for n in ("x", "y")}
    whole = evaluated(formula, **inputs)
    found = {f.atom: taken(f, **inputs) for f in derivatives(formula)}
    if not whole.requires_grad:
        assert not found
        return
    truth = torch.autograd.grad(whole.sum(), [inputs["x"], inputs["y"]], allow_unused=True)
    for atom, gradient in zip((X, Y), _zeros_for_none(truth), strict=True):
        ours = found.get(atom, torch.zeros(6)).double()
        usual = gradient.isfinite() & (gradient.abs() < 1e6)
        torch.testing.assert_close(ours[usual], gradient[usual].double(), rtol=1e-8, atol=1e-8)


def _zeros_for_none(gradients: Iterable[Tensor | None]) -> list[Tensor]:
    return [torch.zeros(6) if x is None else x for x in gradients]


def test_constants_cancel_exactly() -> None:
    product = dot(vector("q"), vector("k"))
    score = apply("mul", number(50.0), apply("tanh", apply("div", apply("mul", scale(), product), number(50.0))))
    (derivative,) = derivatives(score)
    assert derivative.atom is product
    assert print_value(derivative.by) == (
        "(1.0 - tanh(scale * dot(q, k) / 50.0) * tanh(scale * dot(q, k) / 50.0)) * scale"
    )
    third = apply("div", apply("mul", number(0.1), product), number(0.1))
    assert [print_value(d.by) for d in derivatives(third)] == ["1.0"]


def test_unread_atoms_have_no_derivative() -> None:
    zero = apply("sub", X, X)
    assert [print_value(d.by) for d in derivatives(zero)] == []
    assert derivatives(number(3.0)) == ()
    assert [d.atom for d in derivatives(apply("mul", Y, scale()))] == [Y]


@pytest.mark.parametrize("risky", ["log", "sqrt"])
def test_an_unselected_case_does_not_affect_the_gradient(risky: str) -> None:
    """Autograd of a `where` multiplies its 0 with an infinite slope."""
    shared = apply(risky, X)
    above = fold.less(fold.const(2), Q)
    value = apply("add", select(above, shared, Y), select(above, apply("mul", shared, Y), number(0.0)))
    x, y = torch.tensor([0.0, 0.0, 0.0, 4.0], dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)
    gradients = {d.atom: taken(d, x=x, y=y) for d in derivatives(value)}
    slope = {"log": 1 / 4, "sqrt": 1 / 4}[risky]
    assert gradients[X].tolist() == [0, 0, 0, slope + 2 * slope]
    assert gradients[Y].tolist() == [1, 1, 1, math.log(4) if risky == "log" else 2.0]


def test_the_first_of_equal_operands_gets_the_gradient() -> None:
    one = torch.ones(3, dtype=torch.float64)
    for op in ("min", "max"):
        gradients = {d.atom: evaluated(d.by, x=one, y=one).tolist() for d in derivatives(apply(op, X, Y))}
        assert gradients == {X: [1, 1, 1], Y: [0, 0, 0]}


def test_large_arguments_do_not_overflow() -> None:
    x = torch.tensor([-1e4, -800.0, 800.0, 1e4], dtype=torch.float64)
    for op, slope in {
        "sigmoid": [0.0] * 4,
        "softplus": [0, 0, 1, 1],
        "silu": [0, 0, 1, 1],
        "elu": [0, 0, 1, 1],
        "erf": [0.0] * 4,
    }.items():
        (derivative,) = derivatives(apply(op, X))
        assert evaluated(derivative.by, x=x).tolist() == slope, op
    total = apply("log", apply("add", apply("exp", X), apply("exp", Y)))
    both = {d.atom: evaluated(d.by, x=x, y=x) for d in derivatives(total)}
    for by in both.values():
        torch.testing.assert_close(by, torch.full_like(x, 0.5))
