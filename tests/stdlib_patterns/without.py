"""Checks of `test_every_file.py` that do not apply to a pattern, and why; `docs/coverage.md` prints them.

Each reason is tested: the pattern refuses what the check would ask, in the words of `says`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attnc.runtime.texts.library import hybrid_names, recurrence_names

CHECKS: Mapping[str, str] = {
    "form": "`attnc fmt` does not change the file, which states its name and source",
    "warnings": "the file compiles without warnings, with its defaults and with every preset",
    "mask": "the mask equals a reference in NumPy, in all cases",
    "output": "output, LSE or states, and every gradient of the cpu executor equal a dense reference's, in fp64",
    "reference": "output, LSE or states, and every gradient of the reference executor equal a dense reference's",
    "interpreter": "the kernels run in Triton's interpreter, forward and every gradient, in fp32",
    "gate": "each kernel emitted for sm_90 (bf16, heads of 64 and 128; for branches with a state the state's kernels; "
    "for routing patterns the kernels that calls start) has a passing row in `benchmarks/results`",
    "simulate": "`attnc simulate` runs for an H100 at the catalogue's headline: a preset, at its length or grid",
}
"""The checks by name, in the order of the columns."""


@dataclass(frozen=True)
class Reason:
    """Why a check does not apply: short, for the table, and as the refusal says."""

    why: str
    says: str


RECURRENCE = Reason("no pairs of queries and keys", "is a recurrence, which has no pairs of queries and keys")
STATE = Reason("a branch with a state, which has no mask", "has a branch with a state")
NO_TOKENS = Reason("keys that are not tokens", "has keys that are not tokens")
OWN_KEYS = Reason("tiles in torch: computed keys", "there are no kernels for keys that the pattern computes")
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
"""Reasons by check and pattern."""

ALL_OF: Mapping[str, Mapping[str, Reason]] = {
    "recurrence": {"mask": RECURRENCE},
    "hybrid": {"mask": STATE},
}
"""Reasons by kind of pattern and check."""


def reason(check: str, name: str) -> Reason | None:
    """Return why a check does not apply to a pattern, or None if it applies."""
    kinds = {"recurrence": recurrence_names(), "hybrid": hybrid_names()}
    kind_reasons = next((ALL_OF[kind] for kind, names in kinds.items() if name in names), {})
    return ALONE.get(check, {}).get(name) or kind_reasons.get(check)


WHOLE_PROMPT = {"W007": "selects for a whole prompt at once, as its authors do, not token by token"}
OFF_CENTRE = {"W009": "a preset of its authors has an even window, with one more key before the query than after it"}
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
"""Expected warnings by pattern and code, and why they are expected."""


def every_reason() -> Iterator[tuple[str, str]]:
    """Yield the checks and patterns that are listed one by one."""
    for check, reasons in ALONE.items():
        yield from ((check, name) for name in reasons)
