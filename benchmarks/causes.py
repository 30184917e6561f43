"""Known causes of rows that are behind: tests in order, of which the first that matches names the cause.

A cause is listed here when it was found by measurement or profiling; a row without a cause says so.
"""

from __future__ import annotations

from collections.abc import Callable

from goals import Goal, Measurement

UNKNOWN = "cause not known yet"

Test = Callable[[Goal, Measurement], bool]


def _of(goals: tuple[str, ...], **wanted: object) -> Test:
    """Match rows of these goals whose entries equal the wanted values or begin with them."""

    def test(goal: Goal, measurement: Measurement) -> bool:
        return goal.key in goals and all(
            str(measurement.row.get(key, "")).startswith(str(x)) for key, x in wanted.items()
        )

    return test


def _little_to_gain(goal: Goal, measurement: Measurement) -> bool:
    """Match rows whose live tiles leave less than half of dense attention out."""
    goals = ("G9.dense", "G9.dense.backward", "G9.flex.fp32", "blocks.dense")
    return goal.key in goals and 0 < measurement.row.get("bound", 0) < 2


def _short_step(goal: Goal, measurement: Measurement) -> bool:
    """Match decode steps below two and a half milliseconds."""
    return goal.key in ("G3.sparse", "G3.dense") and measurement.row["ms"]["attnc"]["median"] < 2.5


def _grows(goal: Goal, measurement: Measurement) -> bool:
    """Match rows whose rate falls with the length: operands of 134 MB instead of 17 MB, or tokens of more work."""
    return goal.key == "G4.tokens"


def _is_close(goal: Goal, measurement: Measurement) -> bool:
    """Match rows whose fastest schedule was predicted to take at most a tenth longer than the chosen one."""
    tried = measurement.row.get("schedules")
    if goal.key != "G8.chosen" or not tried:
        return False
    fastest = min(tried, key=lambda one: one["least_ms"])
    return bool(fastest["cost"] <= 1.1 * tried[0]["cost"])


CAUSES: tuple[tuple[Test, str], ...] = (
    (
        _of(("G9.flex.bf16", "G9.flex", "blocks.flex"), dtype="bfloat16"),
        "torch's flash kernel packs keys and values anew for every tile of rows, three times for a window of 512 "
        "in tiles of 256; FlexAttention's generated kernel does less of this (CPU 2.5). No remedy in torch alone was "
        "found",
    ),
    (
        _little_to_gain,
        "the live tiles leave out less than half of dense attention, and every piece of a call has a fixed cost: "
        "25 µs (CPU 2.6), plus a merge where pieces share rows",
    ),
    (
        _short_step,
        "a step of one or two milliseconds, of which 0.7 are Python before the kernel's call (a window of 4,096 keys"
        " against a call on only these keys), and each further run of keys is a call and a merge",
    ),
    (
        _of(("blocks.bound",), pattern="s2"),
        "79 % of the call is the kernel, on runs of 64 and 128 rows, whose elements take a tenth longer than those"
        " of 512; 19 % are copies of rows and columns that are not adjacent (profiled on one thread)",
    ),
    (
        _of(("blocks.bound",), pattern="random"),
        "175 pieces, 158 of them merged: the kernel, 87 % of the call, takes 1.24 times as long per element as"
        " in one dense call, as its runs have 64 to 384 keys; copies and merges are the rest (profiled on "
        "one thread)",
    ),
    (
        _of(("weights.reference",), pattern="softplus_lssar"),
        "two passes over the keys of a row, each of which computes the scores, as does the backward; the reference "
        "computes every pair once and stores it",
    ),
    (
        _of(("G4.loop",), pattern="s5"),
        "56 % of the call is the multiplication by B and C, which the loop computes the same way (49 % of its time): "
        "only the rest can be faster (profiled on one thread)",
    ),
    (
        _grows,
        "operands of 134 MB, not 17, exceed the cache of 32 MB, and allocations of more than 32 MB are returned "
        "and requested again in every call: a fresh copy takes 1.2 ns per number, one of 13 MB 0.05 (measured)",
    ),
    (
        _of(("G5.break_even",), pattern="native_sparse"),
        "the kernel is 45 % of a call of 8,192 tokens; a quarter gathers, scatters and merges rows, and a "
        "sixth selects (profiled on one thread): dense attention of 8,192 tokens has less to do",
    ),
    (
        _of(("G5.choice",), pattern="native_sparse"),
        "each token scores one pooled key for 16 tokens, so that the selection grows with the square of the length "
        "(21, 50, 157, 508 ms from 4,096 to 32,768 tokens), the rest of the call only with the length",
    ),
    (
        _of(("G6.share.8k",), pattern="32 documents"),
        "the plan takes 3.7 ms (formerly 74); two thirds estimate packs of short documents one by one (profiled)",
    ),
    (
        _of(("G6.share.8k",)),
        "below 16,384 tokens three tile sizes are compared, once for a shape; for longer calls the first size is "
        "used, and planning takes at most a third of the time",
    ),
    (
        _of(("G6.compiled", "G6.eager"), pattern="40 documents"),
        "207 partial tiles at 8,192 tokens, all different, are evaluated pair by pair in NumPy: 70 % of "
        "the time (profiled)",
    ),
    (
        _of(("G8.median", "G8.p95"), pattern="neighborhood 9 x 9"),
        "half of the call copied bricks, taking four to six times as long as in the microbenchmark, whose "
        "copies fit the second-level cache (profiled, and fitted to these points); fewer bricks are copied at a time "
        "since then",
    ),
    (
        _is_close,
        "the fastest schedule was predicted within a tenth of the chosen one, which is less than predictions "
        "can resolve",
    ),
    (
        _of(("G8.chosen",), pattern="neighborhood 9 x 9"),
        "copies of bricks take four to six times as long as predicted: schedules that copy less were faster",
    ),
    (
        _of(("G9.dense.backward", "G9.bound.backward"), dtype="bfloat16"),
        "torch's bf16 backward loses more on short runs of keys than on long ones (CPU 2.5)",
    ),
    (
        _of(("G8.median", "G8.p95")),
        "elements cost more than in the microbenchmarks, whose operands of 1 MB stay in the second-level "
        "cache: on operands of 8 MB they take 1.05 (512 rows) to 1.46 times (32 rows) as long (measured), so that"
        " calls with few rows and keys per run are predicted too fast, and dense ones within 4 %",
    ),
)


def why(goal: Goal, measurement: Measurement) -> str:
    """Return the cause of a value that is behind."""
    return next((text for test, text in CAUSES if test(goal, measurement)), UNKNOWN)
