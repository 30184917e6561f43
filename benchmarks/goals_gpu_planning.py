"""The goals for a GPU before a call: lists of tiles, compiling, predictions (PERFORMANCE 8, G6 to G8)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmark_part import Row
from goals import Goal, Measurement, Rows
from measures import each, error, kendall, median, single

# --- lists -----------------------------------------------------------------------------------------------------------

PLANS = ("gpu-plan-grids", "gpu-plan-lines")
MILLION = 1 << 20
LONG, SHORT = 32768, 8192


def _affine(row: Row) -> bool:
    return bool(row["affine"])


def _listed(row: Row) -> bool:
    return not row["affine"]


def _entry(key: str) -> Callable[[Row], float | None]:
    return lambda row: None if row.get(key) is None else float(row[key])


def _profiled(row: Row) -> float | None:
    return float(row["other_kernels"]) if row["profiled"] else None


def _of_forward(row: Row) -> float | None:
    planning, forward = median(row), median(row, "attnc_forward")
    return None if planning is None or forward is None else 100 * planning / forward


def _over(rival: str) -> Callable[[Row], float | None]:
    """Return how many times as long the making of block masks takes, from 32,768 tokens on."""

    def value(row: Row) -> float | None:
        ours, theirs = median(row), median(row, rival)
        if ours is None or theirs is None or row["n"] < LONG:
            return None
        return theirs / ours

    return value


def _growth(rows: Rows) -> list[Measurement]:
    """Return the bytes per live tile at the longest length over those at the shortest, by pattern."""
    groups: dict[str, list[Row]] = {}
    for part_rows in rows.values():
        for row in part_rows:
            if not row["affine"] and row["list_bytes"]:
                groups.setdefault(row["case"], []).append(row)
    measurements = []
    for case, these in groups.items():
        first, *rest = sorted(these, key=lambda row: int(row["n"]))
        if rest:
            each_tile = [row["list_bytes"] / row["live_tiles"] for row in (first, rest[-1])]
            measurements.append(Measurement(case, each_tile[1] / each_tile[0], rest[-1]))
    return measurements


def _waits(rows: Rows) -> list[Measurement]:
    """Return 1 for every pattern whose observed steps waited for nothing, else 0."""
    watched = (row for part_rows in rows.values() for row in part_rows if row["watched"])
    return [Measurement(row["key"], float(not row["waits"]), row) for row in watched]


_plan = partial(
    Goal, where="gpu", suite="plan", floor=None, least=False, unit="%", source="PERFORMANCE 8, G6", parts=PLANS
)
PLAN = (
    _plan(
        key="G6.bytes",
        asks="bytes of lists where tiles follow from arithmetic",
        target=0,
        read=each(_entry("list_bytes"), _affine),
        how="most",
        unit="bytes",
    ),
    _plan(
        key="G6.kernels",
        asks="kernels besides attention's in the first call of a shape, where tiles follow from arithmetic",
        target=0,
        read=each(_profiled, _affine),
        how="most",
        unit="",
    ),
    _plan(
        key="G6.share",
        asks="share of a new shape's list in the forward, from 32,768 tokens on",
        target=2,
        read=each(_of_forward, lambda row: _listed(row) and LONG <= row["n"] < MILLION),
        how="most",
    ),
    _plan(
        key="G6.share.8K",
        asks="share of a new shape's list in the forward at 8,192 tokens",
        target=5,
        read=each(_of_forward, lambda row: _listed(row) and bool(row["n"] == SHORT)),
        how="most",
    ),
    _plan(
        key="G6.memory",
        asks="bytes per live tile at the longest length over those at 8,192 tokens: memory follows the live tiles",
        target=1.5,
        read=_growth,
        how="most",
        unit="×",
    ),
    _plan(
        key="G6.flex",
        asks="times the speed of create_block_mask, compiled, from 32,768 tokens on",
        target=20,
        read=each(_over("flex_mask")),
        least=True,
        how="least",
        unit="×",
    ),
    _plan(
        key="G6.flex.eager",
        asks="times the speed of create_block_mask, not compiled, from 32,768 tokens on",
        target=100,
        read=each(_over("flex_mask_eager")),
        least=True,
        how="least",
        unit="×",
    ),
    _plan(
        key="G6.million",
        asks="time to list the tiles of a million tokens",
        target=50,
        read=each(median, lambda row: bool(row["n"] == MILLION)),
        how="most",
        unit="ms",
    ),
    _plan(
        key="G6.million.memory",
        asks="size of the lists of a million tokens",
        target=64 << 20,
        read=each(_entry("list_bytes"), lambda row: bool(row["n"] == MILLION)),
        how="most",
        unit="bytes",
    ),
    _plan(
        key="G6.waits",
        asks="share of patterns with selections that train without the host waiting for the device",
        target=100,
        read=_waits,
        least=True,
        how="share",
        parts=("gpu-steps",),
        suite="routing",
    ),
)

# --- compiling -------------------------------------------------------------------------------------------------------


def _seconds(name: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        ms = median(row, name)
        return None if ms is None else ms / 1e3

    return value


def _ratio(ours: str, theirs: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        numerator, other = median(row, ours), median(row, theirs)
        return None if numerator is None or other is None else numerator / other

    return value


def _in(direction: str) -> Callable[[Row], bool]:
    return lambda row: bool(row["direction"] == direction)


def _recompiled(rows: Rows) -> list[Measurement]:
    return [
        Measurement(row["key"], row["recompiled"]["attnc"], row) for part_rows in rows.values() for row in part_rows
    ]


def _tuned(rows: Rows) -> list[tuple[Row, str, list[Row]]]:
    """Return the rows of tuning, with each knob and its candidates."""
    tuned_rows = []
    for part_rows in rows.values():
        for row in part_rows:
            trials = row.get("trials", ())
            for knob in dict.fromkeys(trial["knob"] for trial in trials):
                tuned_rows.append((row, knob, [trial for trial in trials if trial["knob"] == knob]))
    return tuned_rows


def _tried(rows: Rows) -> list[Measurement]:
    return [Measurement(f"{row['key']}, {knob}", len(trials), row) for row, knob, trials in _tuned(rows)]


def _near_best(rows: Rows) -> list[Measurement]:
    """Return 1 if the model's own choice is within 5 % of the best candidate, else 0."""
    measurements = []
    for row, knob, trials in _tuned(rows):
        fastest = min(trial["median"] for trial in trials)
        model_median = next(trial["median"] for trial in trials if trial["option"] == "model")
        measurements.append(Measurement(f"{row['key']}, {knob}", float(model_median <= 1.05 * fastest), row))
    return measurements


_compile = partial(
    Goal,
    where="gpu",
    suite="compile",
    floor=None,
    least=False,
    unit="s",
    source="PERFORMANCE 8, G7",
    parts=("gpu-compile",),
    how="one value",
)
COMPILE = (
    _compile(
        key="G7.cold",
        asks="first call of a new pattern, forward, on empty caches",
        target=3,
        read=each(_seconds("attnc_cold"), _in("forward")),
    ),
    _compile(
        key="G7.cold.training",
        asks="first call of a new pattern with backward, on empty caches",
        target=6,
        read=each(_seconds("attnc_cold"), _in("forward+backward")),
    ),
    _compile(
        key="G7.cold.flex",
        asks="share of FlexAttention's first call, on empty caches",
        target=0.5,
        floor=1.0,
        read=each(_ratio("attnc_cold", "flex_cold")),
        how="most",
        unit="×",
    ),
    _compile(
        key="G7.warm",
        asks="first call of the next process, beyond imports",
        target=0.3,
        read=each(_seconds("attnc_warm"), _in("forward")),
    ),
    _compile(
        key="G7.warm.flex",
        asks="share of FlexAttention's first call in the next process",
        target=0.3,
        read=each(_ratio("attnc_warm", "flex_warm")),
        how="most",
        unit="×",
    ),
    _compile(
        key="G7.recompiled",
        asks="kernels recompiled for other lengths and batches",
        target=0,
        read=_recompiled,
        unit="",
        parts=("gpu-compile-shapes",),
    ),
    _compile(
        key="G7.tried",
        asks="candidates compiled to tune a kernel",
        target=3,
        read=_tried,
        how="most",
        unit="",
        parts=("gpu-tune",),
        suite="simulator",
    ),
    _compile(
        key="G7.tuned",
        asks="share of kernels whose first choice is within 5 % of the best that was tried",
        target=90,
        read=_near_best,
        least=True,
        how="share",
        unit="%",
        parts=("gpu-tune",),
        suite="simulator",
    ),
)

# --- predictions -----------------------------------------------------------------------------------------------------

POINTS = ("gpu-simulator-forward", "gpu-simulator-backward")


def _count(rows: Rows) -> list[Measurement]:
    points = [row for part_rows in rows.values() for row in part_rows if "predicted" in row]
    return single("points", len(points) or None)


def _passed(row: Row) -> float | None:
    """Return by how many percent the speed over ideal dense attention exceeds the bound."""
    return None if "over_ideal" not in row else 100 * (row["over_ideal"] / row["bound"] - 1)


def _orders(rows: Rows) -> list[Measurement]:
    """Return Kendall's tau of predicted and measured times over the schedules of each kernel."""
    measurements = []
    for row, knob, trials in _tuned(rows):
        tau = kendall([(trial["predicted"], trial["median"]) for trial in trials])
        if tau is not None:
            measurements.append(Measurement(f"{row['key']}, {knob}", tau, row))
    return measurements


def _natten(rows: Rows) -> list[Measurement]:
    every = [row for part_rows in rows.values() for row in part_rows]
    off = [(row, 100 * abs(row["predicted_speedup"] / row["published_speedup"] - 1)) for row in every]
    return [Measurement(row["key"], value, row) for row, value in off]


_simulator = partial(
    Goal,
    where="gpu",
    suite="simulator",
    floor=None,
    least=False,
    unit="%",
    source="PERFORMANCE 8, G8",
    parts=POINTS,
)
SIMULATOR = (
    _simulator(
        key="G8.points",
        asks="points predicted and measured, some of random patterns",
        target=200,
        read=_count,
        least=True,
        how="one value",
        unit="",
    ),
    _simulator(key="G8.error", asks="error of predicted times", target=5, floor=10, read=each(error), how="median"),
    _simulator(key="G8.error.95", asks="error of predicted times", target=15, read=each(error), how="95th percentile"),
    _simulator(
        key="G8.bound",
        asks="excess of the speed over ideal dense attention over the stated bound",
        target=2,
        read=each(_passed),
        how="most",
    ),
    _simulator(
        key="G8.tau",
        asks="Kendall's tau of predicted and measured times across schedules",
        target=0.9,
        read=_orders,
        least=True,
        how="median",
        unit="",
        parts=("gpu-tune",),
    ),
    _simulator(
        key="G8.chosen",
        asks="share of kernels whose chosen schedule is within 5 % of the best that was measured",
        target=95,
        read=_near_best,
        least=True,
        how="share",
        parts=("gpu-tune",),
    ),
    _simulator(
        key="G8.natten",
        asks="distance to NATTEN's six published speedups on an H100, kernels alone",
        target=10,
        read=_natten,
        how="most",
        parts=("gpu-simulator-natten",),
    ),
)
