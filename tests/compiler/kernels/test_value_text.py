"""Triton text of floating-point formulas: in fp32 within 2e-6, relative, of the value in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from attnc.compiler.ir import Index, Tensor, Value, fold, intern
from attnc.compiler.ir.value_nodes import (
    apply,
    dot,
    element,
    number,
    ratio,
    scale,
    vector,
)
from attnc.compiler.kernels.index_text import COLUMNS, HELPERS, ROWS, ExprText, IndexText, NotInKernelsError
from attnc.compiler.kernels.value_text import VALUE_HELPERS, ValueText
from fake_triton import evaluate

Double = NDArray[np.float64]

X, Y = dot(vector("q"), vector("k")), scale()
"""Two atoms of the formulas."""

NEAR = np.concatenate([np.linspace(-1, 1, 2001), np.geomspace(1e-12, 1, 200), -np.geomspace(1e-12, 1, 200)])
FAR = np.concatenate([np.linspace(-30, 30, 3001), np.linspace(-100, 100, 401)])
POSITIVE = np.concatenate([np.geomspace(1e-6, 1e4, 800), np.linspace(0.5, 2, 501)])


def computed(node: Value, x: Double, y: Double) -> tuple[NDArray[np.float32], Double, Double]:
    """Return the value of the text, and the atoms rounded to fp32."""
    exact = IndexText({fold.place("q"): ExprText("query", ROWS), fold.place("k"): ExprText("key", COLUMNS)}, _none)
    texts = ValueText({X: ExprText("x", ROWS), Y: ExprText("y", ROWS)}, exact, _none)
    text = texts.of(node)
    helpers = [HELPERS[n] for n in exact.helpers] + [VALUE_HELPERS[n] for n in texts.helpers]
    if "softplus" in texts.helpers and VALUE_HELPERS["softplus"] not in helpers:
        helpers.append(VALUE_HELPERS["softplus"])
    narrow = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
    return evaluate(text.text, narrow, helpers), narrow["x"].astype(np.float64), narrow["y"].astype(np.float64)


def _none(node: object, indices: object) -> ExprText:
    raise NotInKernelsError("inputs")


def softplus(x: Double) -> Double:
    result: Double = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    return result


def sigmoid(x: Double) -> Double:
    result: Double = 1 / (1 + np.exp(-x))
    return result


def elu(x: Double) -> Double:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


Of = Callable[[Double, Double], Double]

FORMULAS: list[tuple[str, tuple[Value, ...], Of, Double]] = [
    ("tanh", (X,), lambda x, y: np.tanh(x), NEAR),
    ("tanh", (X,), lambda x, y: np.tanh(x), FAR),
    ("sigmoid", (X,), lambda x, y: sigmoid(x), FAR),
    ("relu", (X,), lambda x, y: np.maximum(x, 0), FAR),
    ("silu", (X,), lambda x, y: x * sigmoid(x), FAR),
    ("abs", (X,), lambda x, y: np.abs(x), FAR),
    ("sign", (X,), lambda x, y: np.sign(x), FAR),
    ("sqrt", (X,), lambda x, y: np.sqrt(x), POSITIVE),
    ("log", (X,), lambda x, y: np.log(x), POSITIVE),
    ("log2", (X,), lambda x, y: np.log2(x), POSITIVE),
    ("exp", (X,), lambda x, y: np.exp(x), NEAR * 20),
    ("sin", (X,), lambda x, y: np.sin(x), NEAR),
    ("cos", (X,), lambda x, y: np.cos(x), NEAR),
    ("erf", (X,), lambda x, y: np.vectorize(math.erf)(x), FAR),
    ("neg", (X,), lambda x, y: -x, FAR),
    ("add", (X, Y), lambda x, y: x + y, POSITIVE),
    ("sub", (X, apply("sub", X, Y)), lambda x, y: y, NEAR),
    ("mul", (X, apply("add", X, Y)), lambda x, y: x * (x + y), POSITIVE),
    ("div", (X, apply("mul", X, Y)), lambda x, y: 1 / y, POSITIVE),
    ("min", (X, Y), np.minimum, FAR),
    ("max", (X, Y, number(0.5)), lambda x, y: np.maximum(np.maximum(x, y), 0.5), FAR),
    ("clamp", (X, number(-2.0), number(3.0)), lambda x, y: np.clip(x, -2, 3), FAR),
    ("logaddexp", (X, Y), np.logaddexp, POSITIVE),
    ("pow", (X, number(2.0)), lambda x, y: x**2, FAR),
    ("pow", (X, ratio(fold.const(7), fold.const(1))), lambda x, y: x**7, FAR),
    ("pow", (X, number(0.5)), lambda x, y: x**0.5, POSITIVE),
]

ABSOLUTE: list[tuple[str, tuple[Value, ...], Of, Double]] = [
    ("softplus", (X,), lambda x, y: softplus(x), FAR),
    ("elu", (X,), lambda x, y: elu(x), FAR),
    ("logaddexp", (X, Y), np.logaddexp, FAR),
]
"""Functions that lose digits where their value is small next to 1; a term of a score needs no more digits."""


@pytest.mark.parametrize(("op", "operands", "of", "x"), FORMULAS, ids=[row[0] for row in FORMULAS])
def test_relative(op: str, operands: tuple[Value, ...], of: Of, x: Double) -> None:
    found, x, y = computed(apply(op, *operands), x, x[::-1].copy())
    true = of(x, y)
    scale_of = np.abs(x) + np.abs(y) if op == "sub" else np.abs(true)
    small = 1e-30 if op not in {"log", "log2"} else 0.05
    assert found.dtype == np.float32
    assert (np.abs(found - true) <= 2e-6 * np.maximum(scale_of, small)).all()


@pytest.mark.parametrize(("op", "operands", "of", "x"), ABSOLUTE, ids=[row[0] for row in ABSOLUTE])
def test_absolute(op: str, operands: tuple[Value, ...], of: Of, x: Double) -> None:
    found, x, y = computed(apply(op, *operands), x, x[::-1].copy())
    true = of(x, y)
    assert (np.abs(found - true) <= 2e-6 * np.maximum(np.abs(true), 1)).all()


def test_powers_with_a_varying_base_or_exponent() -> None:
    """base ** exponent is exp2 of a product: its relative error grows with that product."""
    x, y = np.geomspace(1e-3, 1e3, 400), np.linspace(-4, 4, 400)
    found, x, y = computed(apply("pow", X, Y), x, y)
    true = x**y
    assert (np.abs(found - true) <= 2e-7 * (8 + np.abs(y * np.log2(x))) * true).all()


def test_powers_of_zero() -> None:
    found, _, _ = computed(apply("pow", X, Y), np.array([0.0, 0.0, 0.0]), np.array([0.0, 0.5, 3.0]))
    assert found.tolist() == [1, 0, 0]


def test_bracketed_operands_are_computed_first() -> None:
    """Without brackets, `0.3 + x - y` of large x and y loses the digits of 0.3, and `1e30 * x * y` overflows."""
    x = 1e6 + np.arange(8) / 2
    found, near, far = computed(apply("add", number(0.3), apply("sub", X, Y)), x, np.full(8, 1e6))
    assert np.allclose(found, 0.3 + near - far, rtol=1e-6, atol=0)
    found, near, far = computed(apply("mul", number(1e30), apply("mul", X, Y)), np.full(8, 1e30), np.full(8, 1e-30))
    assert np.allclose(found, near * far * 1e30, rtol=1e-6, atol=0)


def test_quotients_of_integers() -> None:
    gap: Index = fold.sub(fold.place("q"), fold.place("k"))
    exact = IndexText({fold.place("q"): ExprText("query", ROWS), fold.place("k"): ExprText("key", COLUMNS)}, _none)
    text = ValueText({}, exact, _none).of(ratio(gap, fold.const(7)))
    q, k = np.arange(40, dtype=np.int32), np.arange(30, dtype=np.int32)
    quotients = evaluate(text.text, {"query": q, "key": k}, [])
    assert np.allclose(quotients, (q[:, None] - k) / 7, rtol=2e-7, atol=0)


def test_offsets_of_inputs_and_large_integers_are_computed_in_64_bits() -> None:
    """Offsets that fit into 32 bits stay in 32 bits, so that the library's kernels keep their texts."""
    exact = IndexText({fold.place("q"): ExprText("query", ROWS), fold.place("k"): ExprText("key", COLUMNS)}, _none)

    def read(node: object, indices: tuple[ExprText, ...]) -> ExprText:
        return ExprText(f"tl.load(table + {indices[0].text})", indices[0].axes)

    texts = ValueText({}, exact, read)
    table = intern(Tensor("table", "real", ("entries",)))
    q, k = fold.place("q"), fold.place("k")
    assert texts.of(element(table, (fold.sub(q, k),))).text == "tl.load(table + query[:, None] - key[None, :])"
    assert "int64" in texts.of(element(table, (fold.add(fold.times(q, 70_000), k),))).text
    assert "int64" in texts.of(ratio(fold.mul(q, k), fold.const(1))).text
    assert "int64" not in texts.of(ratio(fold.sub(q, k), fold.const(3))).text
