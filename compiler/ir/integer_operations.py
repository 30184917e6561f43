"""The operations of integers of the IR, and their values on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.spec.exact_operations import EXACT_FUNCTIONS, EXACT_OPERATIONS, ExactOperation

INTEGER_FUNCTIONS = {
    name: function
    for name, function in EXACT_FUNCTIONS.items()
    if function.takes == "integers" and function.gives == "int"
}
"""Functions without rules of algebra: their nodes are folded where the operands are constants."""

INTEGER_OPERATIONS: Mapping[str, ExactOperation] = {
    **{name: EXACT_OPERATIONS[name] for name in ("mul", "floordiv", "mod", "pow", "min", "max", "abs")},
    **INTEGER_FUNCTIONS,
}
"""All operations of `ir.Arith`."""


def on_arrays(op: str, *operands: NDArray[Any]) -> NDArray[Any]:
    """Return the values of a function of integers, on int64 or on Python integers in its domain."""
    kind: Any = np.result_type(*operands)
    vectorised = _VECTORISED.get(op)
    if vectorised is not None and kind.kind != "O":
        return np.asarray(vectorised(*operands))
    evaluate = np.frompyfunc(INTEGER_FUNCTIONS[op].evaluate, len(operands), 1)
    return np.asarray(evaluate(*operands), dtype=kind)


def bit_length(n: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bit lengths of n ≥ 0, exactly: frexp is exact up to 2^53, and is given 32 bits at a time."""
    high = n >> 32
    lengths = np.frexp(np.where(high > 0, high, n).astype(np.float64))[1].astype(np.int64)
    return np.asarray(lengths + np.where(high > 0, 32, 0))


def _root(n: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ⌊√n⌋ of n ≥ 0; the root in binary64 is off by at most 1."""
    root = np.minimum(np.sqrt(n.astype(np.float64)).astype(np.int64), _MOST_ROOT)
    root = root - (root * root > n)
    return np.asarray(root + (n - root * root > 2 * root))


_MOST_ROOT = 3_037_000_499
"""⌊√(2^63 - 1)⌋."""

_VECTORISED: Mapping[str, Callable[..., NDArray[Any]]] = {
    "isqrt": _root,
    "bitlen": bit_length,
    "bitand": np.bitwise_and,
    "bitor": np.bitwise_or,
    "xor": np.bitwise_xor,
}
"""Functions that are computed for all lanes at once; other functions are computed lane by lane."""
