"""The words the language itself defines in expressions: places, sizes, functions, dimensions; and what others say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Builtin:
    """An exact function. `variadic`: the last parameter may be given again and again."""

    name: str
    parameters: tuple[str, ...]
    variadic: bool = False


EXACT_FUNCTIONS: dict[str, Builtin] = {
    f.name: f
    for f in (
        Builtin("abs", ("x",)),
        Builtin("min", ("a", "b"), variadic=True),
        Builtin("max", ("a", "b"), variadic=True),
        Builtin("clamp", ("x", "low", "high")),
        Builtin("floor", ("x",)),
        Builtin("ceil", ("x",)),
        Builtin("isqrt", ("n",)),
        Builtin("bitlen", ("n",)),
        Builtin("bitand", ("a", "b")),
        Builtin("bitor", ("a", "b")),
        Builtin("xor", ("a", "b")),
        Builtin("power_of_two", ("n",)),
        Builtin("sqrt", ("x",)),
        Builtin("exp", ("x",)),
        Builtin("log", ("x",)),
        Builtin("log2", ("x",)),
    )
}
"""Functions that a relation may call; the transcendental ones inside `floor` and `ceil` only."""

TRANSCENDENTAL = frozenset({"sqrt", "exp", "log", "log2"})
INTEGER_FUNCTIONS = frozenset({"isqrt", "bitlen", "bitand", "bitor", "xor", "power_of_two"})

FLOAT_BUILTINS: dict[str, Builtin] = {
    f.name: f
    for f in (
        *(Builtin(name, ("x",)) for name in ("tanh", "sigmoid", "softplus", "relu", "elu", "silu", "sin", "cos")),
        Builtin("logaddexp", ("a", "b")),
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
"""Functions of scores."""

VECTOR_FUNCTIONS = frozenset({"dot", "normalised", "rms", "part", "outer", "solve", "diag"})
"""Functions whose arguments are vectors: there `q` and `k` are the vectors of this query and key."""

COMPLEX_FUNCTIONS = frozenset({"real", "imag", "conj"})
"""Functions of complex numbers, which recurrences alone have."""

FLOAT_FUNCTIONS = frozenset(FLOAT_BUILTINS) | {*("softmax", "merge", "conjugate_gradient")}
"""Functions of scores, weights, values and steps."""

LATER_FUNCTIONS = {
    "token": ("A701", "write the position of the coordinates: `y * width + x`"),
}
"""Functions that are not there yet: a code, and what to do instead."""

AGGREGATES = frozenset({"sum", "mean", "max", "min", "any", "all", "count"})
"""Functions that take `for`."""

_SPECIAL_CALLS = {
    "softmax": "softmax(score)",
    "merge": "merge(near, far)",
    "order": "order(h)[k]",
    "conjugate_gradient": "conjugate_gradient(8)",
    **{name: f"{name}(… for i in low .. high)" for name in AGGREGATES - EXACT_FUNCTIONS.keys()},
}


def call_of(name: str) -> str:
    """How a function of the language is called."""
    builtin = EXACT_FUNCTIONS.get(name) or FLOAT_BUILTINS.get(name)
    return f"{name}({', '.join(builtin.parameters)})" if builtin else _SPECIAL_CALLS.get(name, f"{name}(…)")


FUNCTIONS = frozenset(EXACT_FUNCTIONS) | (FLOAT_FUNCTIONS - COMPLEX_FUNCTIONS) | {"order"} | AGGREGATES
"""Functions that every expression may call, and that are suggested for an unknown name."""

POSITIONS = frozenset({"q", "k"})
HEAD_INDICES = frozenset({"head", "kv_head", "batch"})
SIZES = frozenset({"queries", "keys", "heads", "kv_heads", "group", "dk", "dv"})
REBINDABLE = frozenset({"q", "k", "head"})
"""Places that a `for` may bind anew."""

RESERVED_NAMES = frozenset(
    {*("q", "k", "head", "kv_head", "batch", "heads", "kv_heads"), *("queries", "keys", "dk", "dv", "scale", "visible")}
)
"""Names in expressions that nothing else may take."""

FLOAT_NAMES = frozenset({"scale", "score", "inf", "v"})
"""Names whose values are floating point: not for relations."""

SELECTION_NAMES = frozenset({"rank", "mass"})
"""Names with a meaning in `keep` alone."""

FIXED_DIMENSIONS = frozenset({"batch", "head", "kv_head", "dk", "dv", "query", "key", "token"})
IMPLIED_DIMENSIONS = frozenset({"batch", "head", "kv_head"})
"""Dimensions whose index is never written."""

TOKEN_DIMENSIONS = frozenset({"token", "query", "key"})
"""Dimensions whose index a recurrence does not write: it is the token."""

CALL_NAMES = frozenset(
    {
        *("scale", "return_lse", "cu_seqlens", "state", "return_state", "preset", "backend", "strict"),
        *("deterministic", "tune", "device", "head", "q", "k", "v", "spec", "self"),
    }
)
"""Names that no input or parameter may take: the calling conventions use them."""

KINDS = frozenset({"int", "real", "bool", "complex"})
REFINEMENTS = frozenset({"unit", "log_decay", "positive"})

WORD_OF = {
    "neg": "-", "add": "+", "sub": "-", "mul": "*", "div": "/", "share": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "matmul": "@",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "not": "not", "and": "and", "or": "or",
}  # fmt: skip
"""How an operation is written."""

_LENGTHS = "lengths are `queries` and `keys`; the keys that a query sees, `count(visible for k)`"
_QUERY = "the position of the query is `q`"
_KEY = "the position of the key is `k`"
_WIDTH = "the width of `q` and `k` is `dk`, that of `v` is `dv`; `scale` is `1 / sqrt(dk)` unless a call gives it"
_OWN = "functions stand by themselves: `sin(x)`, `dot(q, k)`"

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
    "None": "what has no value is left out; without a default a parameter must be given",
    "round": "write `floor(x + 1/2)`",
    "int": "write `floor(x)`",
    "where": "write `a if condition else b`",
    "pow": "write `a ** b`",
    "norm": "write `sqrt(dot(x, x))`",
    "causal": "write `k <= q`",
    "range": "a range is written `for i in low .. high`",
    "arange": "a range is written `for i in low .. high`",
    **dict.fromkeys(("len", "N", "n", "L", "T", "length", "seq_len", "q_len", "kv_len"), _LENGTHS),
    **dict.fromkeys(("i", "q_idx", "query", "row"), _QUERY),
    **dict.fromkeys(("j", "kv_idx", "k_idx", "key", "column"), _KEY),
    **dict.fromkeys(("math", "torch", "np", "numpy", "jnp"), _OWN),
    **dict.fromkeys(("d", "D", "dim", "d_k", "d_head", "head_dim"), _WIDTH),
    "b": "the sequence of the batch is `batch`",
    "h": "the head at hand is `head`",
}
"""The built-in name for a name of papers and other languages."""

TYPE_HINTS = {
    **dict.fromkeys(("float", "double", "number", "float32", "rational"), "did you mean `real`?"),
    **dict.fromkeys(("integer", "long", "int32", "int64", "index"), "did you mean `int`?"),
    "boolean": "did you mean `bool`?",
    "list": "a list says what it holds, and how many: `int[3]`",
    "tensor": "a tensor says what it holds, and its dimensions: `real[batch, token]`",
    "Tensor": "a tensor says what it holds, and its dimensions: `real[batch, token]`",
}
"""The built-in type for a type of other languages."""
