"""Why rows are behind, where it is known: tests in order, the first that fits tells the cause.

A cause is written here when it was found by looking, not by guessing; what has none says so.
"""

from __future__ import annotations

from collections.abc import Callable

from goals import Found, Goal

UNKNOWN = "cause not known yet"

Test = Callable[[Goal, Found], bool]


def _of(goals: tuple[str, ...], **wanted: object) -> Test:
    """Rows of these goals whose entries are those, or begin with them."""

    def test(goal: Goal, found: Found) -> bool:
        return goal.key in goals and all(str(found.row.get(key, "")).startswith(str(x)) for key, x in wanted.items())

    return test


def _little_to_gain(goal: Goal, found: Found) -> bool:
    """Dense attention beside live tiles that leave less than half of its work out."""
    return goal.key in ("G9.dense", "G9.dense.backward", "blocks.dense") and 0 < found.row.get("bound", 0) < 2


def _short_step(goal: Goal, found: Found) -> bool:
    """A step of decoding below a millisecond."""
    return goal.key in ("G3.sparse", "G3.dense") and found.row["ms"]["attnc"]["median"] < 1


CAUSES: tuple[tuple[Test, str], ...] = (
    (
        _of(("G9.flex.bf16", "G9.flex", "blocks.flex"), dtype="bfloat16"),
        "torch's flash kernel packs keys and values anew for every tile of rows, three times for a window of 512 in "
        "tiles of 256; FlexAttention's generated kernel does less of it (CPU 2.5). No way in torch alone was found",
    ),
    (
        _little_to_gain,
        "the live tiles leave less than half of dense attention out, and a call of several pieces has its cost: 25 µs "
        "a piece (CPU 2.6), and merging where pieces share rows",
    ),
    (
        _short_step,
        "the step is shorter than what a call costs in Python before its first product",
    ),
    (
        _of(("G9.dense.backward", "G9.bound.backward"), dtype="bfloat16"),
        "torch's bf16 backward loses more on short stretches of keys than on long ones (CPU 2.5)",
    ),
    (
        _of(("G8.median", "G8.p95"), n=768),
        "a call of a few milliseconds: what lies between kernels, which the rates leave out, is much of it",
    ),
)


def why(goal: Goal, found: Found) -> str:
    """The cause of a value that is behind."""
    return next((text for test, text in CAUSES if test(goal, found)), UNKNOWN)
