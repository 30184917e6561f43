"""The calls of the soak test, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, object]

PATTERNS: dict[str, dict[str, Any]] = {
    "causal": {},
    "sliding_window": {"window": 40, "sinks": 2},
    "dilated_window": {"window": 8, "dilation": 4},
    "strided": {"stride": 16, "local": 24},
    "power": {"window": 2, "block": 16},
    "blocked": {"block": 24},
    "streaming": {"sinks": 4, "window": 48},
    "neighborhood_1d": {"window": 17},
    "alibi": {},
    "prefix_lm": {},
    "document": {},
    "log_sparse": {"segment": 16, "window": 64},
    "combiner": {"segment": 16},
    "moba": {"block": 16, "topk": 3},
    "retention": {},
    "softcap": {},
}
"""Windows, strides, blocks, scores, documents, branches, a selection by content, a recurrence."""


@dataclass(frozen=True)
class CallSize:
    """The amount of work of a soak test."""

    processes: int
    patterns: int
    rounds: int
    kills: int
    calls: int
    of_patterns: int
    longest: int
    launches: int


WHOLE = CallSize(
    processes=16, patterns=16, rounds=20, kills=500, calls=10_000, of_patterns=16, longest=700, launches=1_000
)
SMALL = CallSize(processes=3, patterns=5, rounds=2, kills=40, calls=600, of_patterns=4, longest=200, launches=60)
"""The sizes for the tests."""

TIME = "10s"
"""Tuning time of a process for each bucket that is not tuned yet; at most twenty-five rounds."""


def inputs_of(attend: Any, n: int, heads: int, batch: int, dk: int, dtype: Any) -> dict[str, Any]:
    """Return example inputs of a pattern, with floating-point inputs in a dtype."""
    from attnc.runtime.call.example_inputs import example_inputs

    made = example_inputs(attend.bound, n, n, {}, batch=batch, heads=heads, sizes={"dk": dk, "dv": dk})
    return {name: x.tensor.to(dtype) if x.tensor.is_floating_point() else x.tensor for name, x in made.items()}
