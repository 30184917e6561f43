"""What a check of `test_every_file.py` cannot ask of a pattern, and why; `docs/coverage.md` prints it.

Nothing here imports torch or ours: `docs/generate.py` reads it too. Each reason is tested: the pattern refuses what the
check would ask, in the words of `says`, or what else `says` is there is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

CHECKS: Mapping[str, str] = {
    "form": "`attnc fmt` leaves the file as it is; it names itself and its source",
    "warnings": "it checks without a word, and with its defaults and presets warns of nothing",
    "mask": "who sees whom is what a reference in NumPy counts out, in all cases",
    "output": "output, what comes with it, and every gradient by the cpu executor are a dense reference's, in fp64",
    "reference": "the same by the reference executor",
    "interpreter": "the kernels in Triton's interpreter, forward and every gradient, in fp32",
    "gate": "each kernel as it is emitted now for sm_90 (bf16, heads of 64 and 128) has a row that passes in "
    "`benchmarks/results`",
    "simulate": "`attnc simulate` at its presets, or at its defaults",
}
"""By name, in the order of the columns."""


@dataclass(frozen=True)
class Reason:
    """Why, in a few words for the table, and what the refusal says."""

    why: str
    says: str


RECURRENCE = Reason("no pairs of queries and keys", "is a recurrence, which has no pairs of queries and keys")
STATE = Reason("a branch with a state", "has a branch with a state")
NO_TOKENS = Reason("keys that are no tokens", "has keys that are no tokens")
OWN_KEYS = Reason("tiles in torch: keys of its own", "there are no kernels for keys of its own")
TWO_PASSES = Reason("tiles in torch: weights need all keys of a row", "weights that need all keys of a row")
VECTORS_OF_PAIRS = Reason("tiles in torch: vectors of each pair", "products of vectors that differ from pair to pair")
NO_KERNELS = Reason("operations of torch: a state without kernels", "are of a kind that has no kernels")
KEY_BY_KEY = Reason("tiles are made of what is chosen", "is no choice among places of consecutive keys")
NOT_OF_ROWS = Reason(
    "not a softmax of keys that each row chooses", "is no softmax over keys of one sequence that each row"
)
BY_CLASS = Reason("kernels of a class, read by class", "no rows")
"""Of recurrences and of chosen places: one text serves many patterns, and `benchmarks/recurrent_kernels.py` and
`benchmarks/chosen_kernels.py` print what they read of each class."""

TILES: Mapping[str, Reason] = {
    **dict.fromkeys(("attention_residual", "autoformer_lags", "davit_channel", "davit_window", "halo"), OWN_KEYS),
    **dict.fromkeys(("landmark", "local_linear", "softplus_lssar"), TWO_PASSES),
    "music_relative": VECTORS_OF_PAIRS,
}
"""Patterns without kernels, which run as tiles in torch."""

ALONE: Mapping[str, Mapping[str, Reason]] = {
    "mask": dict.fromkeys(("attention_residual", "autoformer_lags", "davit_channel"), NO_TOKENS),
    "interpreter": {**TILES, "landmark_retrieval": TWO_PASSES, "titans_linear": NO_KERNELS},
    "gate": {**TILES, "titans_linear": NO_KERNELS},
    "simulate": {
        **dict.fromkeys(("anchor", "deepseek_sparse", "dynamic_mask", "minference_vertical_slash"), KEY_BY_KEY),
        **dict.fromkeys(("landmark_retrieval", "token_sparse"), NOT_OF_ROWS),
    },
}
"""By check and pattern."""

ALL_OF: Mapping[str, Mapping[str, Reason]] = {
    "recurrence": {"mask": RECURRENCE, "gate": BY_CLASS},
    "hybrid": {"mask": STATE, "simulate": STATE, "gate": BY_CLASS},
    "routing": {"gate": BY_CLASS},
}
"""By kind of pattern and check."""


def reason(check: str, name: str, kind: str) -> Reason | None:
    """Why a check is not made of a pattern of a kind; None: it is made."""
    return ALONE.get(check, {}).get(name) or ALL_OF.get(kind, {}).get(check)


WARNED: Mapping[str, Mapping[str, str]] = {}
"""Warnings that are expected, by pattern and code, and why: none is."""


def every_reason() -> Iterator[tuple[str, str]]:
    """Checks and patterns that are named one by one."""
    for check, own in ALONE.items():
        yield from ((check, name) for name in own)


NOT_PASSED: Mapping[str, Mapping[tuple[str, int], str]] = {
    name: {("dkdv", 64): "stack of 8 bytes", ("dkdv of groups", 64): "stack of 24 bytes"}
    for name in ("lingen_temporal", "neighborhood_3d")
}
"""Kernels, with the width of their heads, whose row does not pass the gate's rules, and what it says: they are right, and
spill a little."""
