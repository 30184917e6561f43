"""Checks of `test_every_file.py` that do not apply to a pattern, and why; `docs/coverage.md` prints them.

Each reason is tested: the pattern refuses what the check would ask, in the words of `says`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attnc.runtime.library import hybrid_names, recurrence_names

CHECKS: Mapping[str, str] = {
    "form": "`attnc fmt` leaves the file as it is; it names itself and its source",
    "warnings": "it checks without a word, and with its defaults and presets warns of nothing",
    "mask": "who sees whom is what a reference in NumPy counts out, in all cases",
    "output": "output, what comes with it, and every gradient by the cpu executor are a dense reference's, in fp64",
    "reference": "the same by the reference executor",
    "interpreter": "the kernels in Triton's interpreter, forward and every gradient, in fp32",
    "gate": "each kernel as it is emitted now for sm_90 (bf16, heads of 64 and 128; of branches with a state those of "
    "the state; of routing patterns those that calls start) has a row that passes in `benchmarks/results`",
    "simulate": "`attnc simulate` for an H100 at the headline of the catalogue: a preset, its length or grid",
}
"""By name, in the order of the columns."""


@dataclass(frozen=True)
class Reason:
    """Why, in a few words for the table, and what the refusal says."""

    why: str
    says: str


RECURRENCE = Reason("no pairs of queries and keys", "is a recurrence, which has no pairs of queries and keys")
STATE = Reason("a branch with a state, which has no mask", "has a branch with a state")
NO_TOKENS = Reason("keys that are no tokens", "has keys that are not tokens")
OWN_KEYS = Reason("tiles in torch: keys of its own", "there are no kernels for keys of its own")
TWO_PASSES = Reason("tiles in torch: weights need all keys of a row", "weights that need all keys of a row")
VECTORS_OF_PAIRS = Reason("tiles in torch: vectors of each pair", "products of vectors that differ from pair to pair")
NO_KERNELS = Reason(
    "operations of torch: a state without kernels", "the coupled states of `titans_linear` have no kernels"
)
TILES: Mapping[str, Reason] = {
    **dict.fromkeys(("attention_residual", "autoformer_lags", "davit_channel", "davit_window", "halo"), OWN_KEYS),
    **dict.fromkeys(("landmark", "local_linear", "softplus_lssar"), TWO_PASSES),
    "music_relative": VECTORS_OF_PAIRS,
}
"""Patterns without kernels, which run as tiles in torch."""

ALONE: Mapping[str, Mapping[str, Reason]] = {
    "mask": {
        **dict.fromkeys(("attention_residual", "autoformer_lags", "davit_channel"), NO_TOKENS),
        **dict.fromkeys(("lingen_ma", "mamba_mixer"), RECURRENCE),
    },
    "interpreter": {**TILES, "landmark_retrieval": TWO_PASSES, "titans_linear": NO_KERNELS},
    "gate": {**TILES, "landmark_retrieval": TWO_PASSES, "titans_linear": NO_KERNELS},
}
"""By check and pattern."""

ALL_OF: Mapping[str, Mapping[str, Reason]] = {
    "recurrence": {"mask": RECURRENCE},
    "hybrid": {"mask": STATE},
}
"""By kind of pattern and check."""


def reason(check: str, name: str) -> Reason | None:
    """Why a check is not made of a pattern; None: it is made."""
    kinds = {"recurrence": recurrence_names(), "hybrid": hybrid_names()}
    own = next((ALL_OF[kind] for kind, names in kinds.items() if name in names), {})
    return ALONE.get(check, {}).get(name) or own.get(check)


WHOLE_PROMPT = {"W007": "chosen for a whole prompt at once, as its authors do: not for tokens one after another"}
OFF_CENTRE = {"W009": "a preset of its authors has an even window, with one key more before the query than after it"}
WARNED: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(
        (
            *("minference_blocks", "minference_vertical_slash", "mminference_grid", "routing_transformer"),
            *("token_sparse", "xattention"),
        ),
        WHOLE_PROMPT,
    ),
    **dict.fromkeys(("neighborhood_1d", "neighborhood_2d", "neighborhood_3d"), OFF_CENTRE),
}
"""Warnings that are expected, by pattern and code, and why."""


def every_reason() -> Iterator[tuple[str, str]]:
    """Checks and patterns that are named one by one."""
    for check, own in ALONE.items():
        yield from ((check, name) for name in own)
