"""Why rows are behind, where it is known: tests in order, the first that fits tells the cause.

A cause is written here when it was found by looking, not by guessing; what has none says so.
"""

from __future__ import annotations

from collections.abc import Callable

from goals import Goal, Measurement

UNKNOWN = "cause not known yet"

Test = Callable[[Goal, Measurement], bool]


def _of(goals: tuple[str, ...], **wanted: object) -> Test:
    """Rows of these goals whose entries are those, or begin with them."""

    def test(goal: Goal, found: Measurement) -> bool:
        return goal.key in goals and all(str(found.row.get(key, "")).startswith(str(x)) for key, x in wanted.items())

    return test


def _little_to_gain(goal: Goal, found: Measurement) -> bool:
    """Dense attention beside live tiles that leave less than half of its work out."""
    goals = ("G9.dense", "G9.dense.backward", "G9.flex.fp32", "blocks.dense")
    return goal.key in goals and 0 < found.row.get("bound", 0) < 2


def _short_step(goal: Goal, found: Measurement) -> bool:
    """A step of decoding below two and a half milliseconds."""
    return goal.key in ("G3.sparse", "G3.dense") and found.row["ms"]["attnc"]["median"] < 2.5


def _grows(goal: Goal, found: Measurement) -> bool:
    """Operands of 134 MB beside ones of 17 MB, or fewer tokens of more work."""
    return goal.key == "G4.tokens"


def _is_close(goal: Goal, found: Measurement) -> bool:
    """Schedules of which the one that was fastest was predicted to take at most a tenth longer."""
    tried = found.row.get("schedules")
    if goal.key != "G8.chosen" or not tried:
        return False
    fastest = min(tried, key=lambda one: one["least_ms"])
    return bool(fastest["cost"] <= 1.1 * tried[0]["cost"])


CAUSES: tuple[tuple[Test, str], ...] = (
    (
        _of(("G9.flex.bf16", "G9.flex", "blocks.flex"), dtype="bfloat16"),
        "torch's flash kernel packs keys and values anew for every tile of rows, three times for a window of 512 "
        "in tiles of 256; FlexAttention's generated kernel does less of it (CPU 2.5). No way in torch alone was "
        "found",
    ),
    (
        _little_to_gain,
        "the live tiles leave less than half of dense attention out, and a call of several pieces has its cost: "
        "25 µs a piece (CPU 2.6), and merging where pieces share rows",
    ),
    (
        _short_step,
        "a step of a millisecond or two, of which 0.7 are Python before the kernel's call (a window of 4,096 keys"
        " beside the same keys alone, known before), and each further stretch of keys is a call and a merge",
    ),
    (
        _of(("blocks.bound",), pattern="s2"),
        "79 % of it is the kernel, on stretches of 64 and 128 rows, whose elements take a tenth longer than those"
        " of 512; 19 % are copies of rows and columns that stand apart (profiled on one thread)",
    ),
    (
        _of(("blocks.bound",), pattern="random"),
        "175 pieces, 158 of them merged: the kernel, 87 % of the call, takes 1.24 times as long for an element as"
        " in one dense call, as its stretches have 64 to 384 keys; copies and merging are the rest (profiled on "
        "one thread)",
    ),
    (
        _of(("weights.reference",), pattern="softplus_lssar"),
        "two passes over the keys of a row, which compute scores anew, and so does the backward; the reference "
        "computes every pair once, and keeps it",
    ),
    (
        _of(("G4.loop",), pattern="s5"),
        "56 % of it is the multiplication by B and C, which the loop does in the same way (49 % of its time): "
        "only the rest can be faster (profiled on one thread)",
    ),
    (
        _grows,
        "operands of 134 MB, not 17: they leave the cache of 32 MB, and memory of more than 32 MB is given back "
        "and fetched anew in every call: a fresh copy takes 1.2 ns a number, one of 13 MB 0.05 (measured)",
    ),
    (
        _of(("G5.break_even",), pattern="native_sparse"),
        "the kernel is 45 % of a call of 8,192 tokens, a quarter gathers rows, puts them back and merges them, a "
        "sixth chooses (profiled on one thread): dense attention of so few tokens has less to do",
    ),
    (
        _of(("G5.choice",), pattern="native_sparse"),
        "each token scores one pooled key for 16 tokens, so that the choice grows with the square of the length "
        "(21, 50, 157, 508 ms from 4,096 to 32,768 tokens), and the rest of the call with the length",
    ),
    (
        _of(("G6.share.8k",), pattern="32 documents"),
        "the plan takes 3.7 ms, which were 74: two thirds of it cost packs of short documents one by one (profiled)",
    ),
    (
        _of(("G6.share.8k",)),
        "below 16,384 tokens tiles of three sizes are compared, once for a shape; from there on the first is "
        "taken, and planning takes a third of the time and less",
    ),
    (
        _of(("G6.compiled", "G6.eager"), pattern="40 documents"),
        "207 partial tiles at 8,192 tokens, no two of them alike, are looked at pair by pair in NumPy: 70 % of "
        "the time (profiled)",
    ),
    (
        _of(("G8.median", "G8.p95"), pattern="neighborhood 9 x 9"),
        "half of the call copied bricks together, at four to six times the rate of the microbenchmark, whose "
        "copies lie in the second-level cache (profiled, and fitted to these points); fewer are copied at a time "
        "since then",
    ),
    (
        _is_close,
        "the fastest schedule was predicted within a tenth of the chosen one, which is less than predictions "
        "are right by",
    ),
    (
        _of(("G8.chosen",), pattern="neighborhood 9 x 9"),
        "copies of bricks take four to six times as long as predicted: schedules that copy less were faster",
    ),
    (
        _of(("G9.dense.backward", "G9.bound.backward"), dtype="bfloat16"),
        "torch's bf16 backward loses more on short stretches of keys than on long ones (CPU 2.5)",
    ),
    (
        _of(("G8.median", "G8.p95")),
        "elements cost more than in the microbenchmarks, whose operands of a megabyte stay in the second-level "
        "cache: on operands of 8 MB they take 1.05 (512 rows) to 1.46 times (32 rows) as long (measured), so that"
        " calls of few rows and keys a stretch are predicted too fast, and dense ones within 4 %",
    ),
)


def why(goal: Goal, found: Measurement) -> str:
    """The cause of a value that is behind."""
    return next((text for test, text in CAUSES if test(goal, found)), UNKNOWN)
