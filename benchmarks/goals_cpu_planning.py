"""The goals for a CPU before a call: planning, compiling, predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmark_part import Row
from goals import Goal, Measurement, Rows
from measures import each, error, kendall, median, over, predictions, single

G6, G7, G8 = (f"PERFORMANCE 8, G{number}" for number in (6, 7, 8))

# --- plans -----------------------------------------------------------------------------------------------------------


def _million(row: Row) -> bool:
    return bool(row["key"].startswith("plan of") and row["n"] <= 1 << 20)


def _peak(row: Row) -> float | None:
    return row.get("peak_mb")


def _of_aim(row: Row) -> float | None:
    aim, time = row.get("aim_ms"), median(row)
    return None if aim is None or time is None else 100 * time / aim


def _share(row: Row) -> float | None:
    alone, call = median(row, "attnc, plan alone"), median(row)
    return None if alone is None or call is None else 100 * alone / call


_plan = partial(Goal, where="cpu", suite="plan", floor=None, least=False, unit="%", source=G6, parts=("cpu-plan",))
PLAN = (
    _plan(
        key="G6.time",
        asks="planning time up to a million tokens",
        target=50,
        read=each(median, _million),
        how="most",
        unit="ms",
    ),
    _plan(
        key="G6.memory",
        asks="peak memory of planning up to a million tokens",
        target=64,
        read=each(_peak, _million),
        how="most",
        unit="MB",
    ),
    _plan(
        key="G6.aims",
        asks="share of the allowed planning time: 5 ms for a video of 115,200 tokens, 20 ms for 32 documents",
        target=100,
        read=each(_of_aim),
        how="most",
        source="CPU 1.2",
    ),
    _plan(
        key="G6.share.32k",
        asks="share of planning in a forward call of 32,768 tokens",
        target=2,
        read=each(_share, lambda row: row["n"] == 32768),
        how="most",
        floor=10,
    ),
    _plan(
        key="G6.share.8k",
        asks="share of planning in a forward call of 8,192 tokens",
        target=5,
        read=each(_share, lambda row: row["n"] == 8192),
        how="most",
    ),
    _plan(
        key="G6.compiled",
        asks="times the speed of compiled create_block_mask, 32,768 tokens",
        target=20,
        read=over("flex", lambda row: row["n"] == 32768),
        how="least",
        least=True,
        unit="×",
        parts=("cpu-block_masks",),
    ),
    _plan(
        key="G6.eager",
        asks="times the speed of eager create_block_mask, 8,192 tokens (more do not fit here)",
        target=100,
        read=over("flex, eager", lambda row: row["n"] == 8192),
        how="least",
        least=True,
        unit="×",
        parts=("cpu-block_masks",),
    ),
)


# --- compiling -------------------------------------------------------------------------------------------------------


def _first_calls(kind: str, direction: str) -> Callable[[Rows], list[Measurement]]:
    """Read the milliseconds of attnc's first call on `cold` or `warm` caches."""

    def read(rows: Rows) -> list[Measurement]:
        row = _named(rows, f"first call {direction}, attnc")
        return [] if row is None else [Measurement(row["key"], row["first_ms"][kind]["median"], row)]

    return read


def _first_over_flex(kind: str) -> Callable[[Rows], list[Measurement]]:
    """Read attnc's first call over FlexAttention's, in percent."""

    def read(rows: Rows) -> list[Measurement]:
        ours, theirs = (_named(rows, f"first call forward, {name}") for name in ("attnc", "flex"))
        if ours is None or theirs is None:
            return []
        ratio = ours["first_ms"][kind]["median"] / theirs["first_ms"][kind]["median"]
        return [Measurement(ours["key"], 100 * ratio, ours)]

    return read


def _recompiles(rows: Rows) -> list[Measurement]:
    row = _named(rows, "new shapes, attnc")
    return [] if row is None else [Measurement(row["key"], row["recompiles"], row)]


def _named(rows: Rows, key: str) -> Row | None:
    return next((row for part_rows in rows.values() for row in part_rows if row["key"] == key), None)


def _adds(row: Row) -> float | None:
    return row["adds_ms"]["attnc"] if "adds_ms" in row else None


_compile = partial(
    Goal, where="cpu", suite="compile", floor=None, least=False, unit="ms", source=G7, parts=("cpu-compile",)
)
COMPILE = (
    _compile(
        key="import",
        asks="time that `import attnc` adds to importing torch",
        target=300,
        read=each(_adds),
        how="most",
        source="this suite",
    ),
    _compile(
        key="check",
        asks="time to check a file of the library",
        target=50,
        read=each(median, lambda row: row["key"].startswith("check of")),
        how="most",
        source="this suite",
    ),
    _compile(
        key="G7.cold",
        asks="first call of a new pattern on cold caches",
        target=3000,
        read=_first_calls("cold", "forward"),
        how="one value",
    ),
    _compile(
        key="G7.cold.backward",
        asks="first call of a new pattern on cold caches, with backward",
        target=6000,
        read=_first_calls("cold", "forward+backward"),
        how="one value",
    ),
    _compile(
        key="G7.warm",
        asks="first call in a second process, beyond imports",
        target=300,
        read=_first_calls("warm", "forward"),
        how="one value",
    ),
    _compile(
        key="G7.flex.cold",
        asks="share of FlexAttention's first call, cold caches",
        target=50,
        read=_first_over_flex("cold"),
        how="one value",
        unit="%",
    ),
    _compile(
        key="G7.flex.warm",
        asks="share of FlexAttention's first call, warm caches",
        target=30,
        read=_first_over_flex("warm"),
        how="one value",
        unit="%",
    ),
    _compile(
        key="G7.recompiles",
        asks="graphs recompiled for new lengths and batches",
        target=0,
        read=_recompiles,
        how="one value",
        unit="",
    ),
)


# --- the simulator ---------------------------------------------------------------------------------------------------


def _tau(rows: Rows) -> list[Measurement]:
    return single("all points", kendall([(x, y) for _, x, y in predictions(rows)]))


def _points(rows: Rows) -> list[Measurement]:
    count = len(predictions(rows))
    return single("all points", count or None)


def _over_bound(row: Row) -> float | None:
    """Return the speedup over ideal dense attention, in percent of the tile bound."""
    return 100 * row["over_ideal"] / row["bound"] if "over_ideal" in row else None


def chosen_over_best(row: Row) -> float | None:
    """Return how far the chosen schedule, which ran twice, is from the fastest one, by the least times of both."""
    tried = row.get("schedules")
    if not tried:
        return None
    chosen = min(row["ms"]["attnc"]["low"], tried[0]["least_ms"])
    return float(chosen / min(chosen, *(trial["least_ms"] for trial in tried)))


def _chosen(row: Row) -> float | None:
    ratio = chosen_over_best(row)
    return None if ratio is None else float(ratio <= 1.05)


_simulator = partial(
    Goal, where="cpu", suite="simulator", floor=None, least=True, unit="%", source=G8, parts=("cpu-simulator",)
)
SIMULATOR = (
    _simulator(
        key="G8.points", asks="points predicted and measured", target=200, read=_points, how="one value", unit=""
    ),
    _simulator(
        key="G8.median",
        asks="absolute error of predictions",
        target=5,
        read=each(error),
        how="median",
        floor=10,
        least=False,
    ),
    _simulator(
        key="G8.p95",
        asks="absolute error of predictions",
        target=15,
        read=each(error),
        how="95th percentile",
        least=False,
    ),
    _simulator(
        key="G8.tau",
        asks="Kendall's tau of predicted and measured times",
        target=0.9,
        read=_tau,
        how="one value",
        unit="",
    ),
    _simulator(
        key="G8.bound",
        asks="speed over ideal dense attention, in percent of the tile bound, which it may exceed by 2 %",
        target=102,
        read=each(_over_bound),
        how="most",
        least=False,
    ),
    _simulator(
        key="G8.chosen",
        asks="share of chosen schedules within 5 % of the best that was tried",
        target=95,
        read=each(_chosen),
        how="share",
    ),
)
