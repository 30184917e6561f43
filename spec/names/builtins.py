"""The words the language itself defines in expressions: places, sizes, functions, dimensions."""

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
        Builtin("dot", ("a", "b")),
        Builtin("normalised", ("x",)),
        Builtin("rms", ("x",)),
        Builtin("part", ("x", "i", "n")),
        Builtin("outer", ("a", "b")),
        Builtin("eye", ("n",)),
        Builtin("solve", ("A", "b")),
    )
}
"""Functions of scores."""

VECTOR_FUNCTIONS = frozenset({"dot", "normalised", "rms", "part", "outer", "solve"})
"""Functions whose arguments are vectors: there `q` and `k` are the vectors of this query and key."""

FLOAT_FUNCTIONS = frozenset(FLOAT_BUILTINS) | {*("softmax", "diag", "merge", "conjugate_gradient")}
"""Functions of scores, weights, values and steps."""

LATER_FUNCTIONS = frozenset({"order"})
"""Exact functions that are not supported yet."""

AGGREGATES = frozenset({"sum", "mean", "max", "min", "any", "all", "count"})
"""Functions that take `for`."""

FUNCTIONS = frozenset(EXACT_FUNCTIONS) | FLOAT_FUNCTIONS | LATER_FUNCTIONS | AGGREGATES

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
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "not": "not", "and": "and", "or": "or",
}  # fmt: skip
"""How an operation is written."""
