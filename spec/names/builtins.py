"""Built-in names of expressions, sizes, functions and dimensions, and hints for names of other languages."""

from __future__ import annotations

from dataclasses import dataclass

from attnc.spec.exact_operations import EXACT_FUNCTIONS, EXACT_OPERATIONS
from attnc.spec.number_functions import FLOAT_ALONE


@dataclass(frozen=True, slots=True)
class Builtin:
    """A built-in function of scores. `variadic`: the last parameter may be repeated."""

    name: str
    parameters: tuple[str, ...]
    variadic: bool = False


FLOAT_BUILTINS: dict[str, Builtin] = {
    f.name: f
    for f in (
        *(Builtin(function.name, function.parameters) for function in FLOAT_ALONE.values()),
        *(Builtin(name, ("z",)) for name in ("real", "imag", "conj")),
        Builtin("dot", ("a", "b")),
        Builtin("normalised", ("x",)),
        Builtin("rms", ("x",)),
        Builtin("part", ("x", "i", "n")),
        Builtin("outer", ("a", "b")),
        Builtin("eye", ("n",)),
        Builtin("solve", ("A", "b")),
        Builtin("diag", ("x",)),
    )
}
"""Functions that scores, weights, values and steps may call."""

VECTOR_FUNCTIONS = frozenset({"dot", "normalised", "rms", "part", "outer", "solve", "diag"})
"""Functions of vectors; in their arguments `q` and `k` are the vectors of the query and the key."""

COMPLEX_FUNCTIONS = frozenset({"real", "imag", "conj"})
"""Functions of complex numbers, which only recurrences support."""

FLOAT_FUNCTIONS = frozenset(FLOAT_BUILTINS) | {*("softmax", "merge", "conjugate_gradient")}
"""Names of all functions that scores, weights, values and steps may call."""

LATER_FUNCTIONS = {
    "token": ("A701", "write the position of the coordinates: `y * width + x`"),
}
"""Functions that are not supported yet, with the code of the error and the remedy."""

AGGREGATES = frozenset({"sum", "mean", "max", "min", "any", "all", "count"})
"""Functions that take a `for`."""

_SPECIAL_CALLS = {
    "softmax": "softmax(score)",
    "merge": "merge(near, far)",
    "order": "order(h)[k]",
    "conjugate_gradient": "conjugate_gradient(8)",
    **{name: f"{name}(… for i in low .. high)" for name in AGGREGATES - EXACT_FUNCTIONS.keys()},
}


def call_of(name: str) -> str:
    """Return an example call of a function of the language."""
    builtin = EXACT_FUNCTIONS.get(name) or FLOAT_BUILTINS.get(name)
    return f"{name}({', '.join(builtin.parameters)})" if builtin else _SPECIAL_CALLS.get(name, f"{name}(…)")


FUNCTIONS = frozenset(EXACT_FUNCTIONS) | (FLOAT_FUNCTIONS - COMPLEX_FUNCTIONS) | {"order"} | AGGREGATES
"""Functions of every pattern, suggested for an unknown name."""

POSITIONS = frozenset({"q", "k"})
HEAD_INDICES = frozenset({"head", "kv_head", "batch"})
SIZES = frozenset({"queries", "keys", "heads", "kv_heads", "group", "dk", "dv"})
REBINDABLE = frozenset({"q", "k", "head"})
"""Names that a `for` may rebind."""

RESERVED_NAMES = frozenset(
    {*("q", "k", "head", "kv_head", "batch", "heads", "kv_heads"), *("queries", "keys", "dk", "dv", "scale", "visible")}
)
"""Built-in names that a declaration must not hide."""

FLOAT_NAMES = frozenset({"scale", "score", "inf", "v"})
"""Names with floating-point values, which a relation must not read."""

SELECTION_NAMES = frozenset({"rank", "mass"})
"""Names that are available only in `keep`."""

FIXED_DIMENSIONS = frozenset({"batch", "head", "kv_head", "dk", "dv", "query", "key", "token"})
IMPLIED_DIMENSIONS = frozenset({"batch", "head", "kv_head"})
"""Dimensions whose index is implied and never written."""

TOKEN_DIMENSIONS = frozenset({"token", "query", "key"})
"""Dimensions whose index is implied in a recurrence: the token."""

CALL_NAMES = frozenset(
    {
        *("scale", "return_lse", "cu_seqlens", "state", "return_state", "preset", "backend", "strict"),
        *("deterministic", "tune", "device", "head", "q", "k", "v", "spec", "self"),
    }
)
"""Names that no input or parameter may have, because calls use them as arguments."""

KINDS = frozenset({"int", "real", "bool", "complex"})
REFINEMENTS = frozenset({"unit", "log_decay", "positive"})

WORD_OF = {name: item.word for name, item in EXACT_OPERATIONS.items() if item.word} | {"share": "/", "matmul": "@"}
"""The source text of each operator."""

_LENGTHS = "the lengths are `queries` and `keys`; the number of visible keys is `count(visible for k)`"
_QUERY = "the position of the query is `q`"
_KEY = "the position of the key is `k`"
_WIDTH = "the width of `q` and `k` is `dk`, that of `v` is `dv`; `scale` is `1 / sqrt(dk)` unless a call gives it"
_PREFIX = "call functions without a module: `sin(x)`, `dot(q, k)`"

HINTS = {
    "pi": "write the number: 3.141592653589793",
    "ln": "the natural logarithm is `log`",
    "avg": "write `mean`",
    "average": "write `mean`",
    "square": "write `x ** 2`",
    "scores": "the score of this key is `score`",
    "weight": "the weight of a branch is `near.weight`",
    "True": "write `true`",
    "False": "write `false`",
    "None": "leave out what has no value; a parameter without a default must be given",
    "round": "write `floor(x + 1/2)`",
    "int": "write `floor(x)`",
    "where": "write `a if condition else b`",
    "pow": "write `a ** b`",
    "norm": "write `sqrt(dot(x, x))`",
    "causal": "write `k <= q`",
    "range": "write a range as `for i in low .. high`",
    "arange": "write a range as `for i in low .. high`",
    **dict.fromkeys(("len", "N", "n", "L", "T", "length", "seq_len", "q_len", "kv_len"), _LENGTHS),
    **dict.fromkeys(("i", "q_idx", "query", "row"), _QUERY),
    **dict.fromkeys(("j", "kv_idx", "k_idx", "key", "column"), _KEY),
    **dict.fromkeys(("math", "torch", "np", "numpy", "jnp"), _PREFIX),
    **dict.fromkeys(("d", "D", "dim", "d_k", "d_head", "head_dim"), _WIDTH),
    "b": "the index of the batch entry is `batch`",
    "h": "the index of the head is `head`",
}
"""Hints for unknown names that are common in papers and other languages."""

TYPE_HINTS = {
    **dict.fromkeys(("float", "double", "number", "float32", "rational"), "did you mean `real`?"),
    **dict.fromkeys(("integer", "long", "int32", "int64", "index"), "did you mean `int`?"),
    "boolean": "did you mean `bool`?",
    "list": "write the type and the number of the entries: `int[3]`",
    "tensor": "write the type of the entries and the dimensions: `real[batch, token]`",
    "Tensor": "write the type of the entries and the dimensions: `real[batch, token]`",
}
"""Hints for unknown types that are common in other languages."""
