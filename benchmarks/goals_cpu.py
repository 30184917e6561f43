"""The goals for a CPU: those of PERFORMANCE 8 that apply, and this repository's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmark_part import Row
from goals import Goal, Measurement, Rows
from goals_cpu_planning import COMPILE, PLAN, SIMULATOR
from measures import break_even, each, median, of_bound, over, speedup, timed

WINDOWS = ("cpu-windows-float32", "cpu-windows-bfloat16")
G3, G4, G5 = "PERFORMANCE 8, G3", "PERFORMANCE 8, G4", "PERFORMANCE 8, G5"
G9 = "PERFORMANCE 8, G9"


def _fp32(row: Row) -> bool:
    return bool(row["dtype"] == "float32")


def _bf16_window(row: Row) -> bool:
    return bool(row["dtype"] == "bfloat16" and row["pattern"].startswith("window"))


_dense = partial(
    Goal, where="cpu", suite="dense", floor=1.0, least=True, unit="×", source="PERFORMANCE 8, G1a", parts=("cpu-dense",)
)
DENSE = (
    _dense(
        key="dense.flex", asks="times compiled FlexAttention's speed, full and causal", target=1.1, read=over("flex")
    ),
    _dense(
        key="dense.sdpa",
        asks="times SDPA's speed, full and causal: no loss where the mask hides nothing",
        target=0.95,
        read=over("dense"),
        floor=None,
        source="this suite",
    ),
)

_blocks = partial(
    Goal, where="cpu", suite="block_sparse", floor=None, least=True, unit="×", source=G9, parts=("cpu-block_sparse",)
)
BLOCKS = (
    _blocks(
        key="blocks.flex",
        asks="times compiled FlexAttention's speed, forward, whole blocks",
        target=1.5,
        read=over("flex"),
        floor=1.0,
    ),
    _blocks(key="blocks.dense", asks="never slower than dense", target=1.0, read=over("dense"), how="least"),
    _blocks(
        key="blocks.bound",
        asks="share of the tile bound over dense attention that is reached, forward, fp32",
        target=80,
        read=each(of_bound, _fp32),
        how="median",
        unit="%",
    ),
)

_masks = partial(Goal, where="cpu", suite="windows", floor=None, least=True, unit="×", source=G9, parts=WINDOWS)
MASKS = (
    _masks(
        key="G9.flex", asks="times compiled FlexAttention's speed, forward", target=1.5, read=over("flex"), floor=1.0
    ),
    _masks(
        key="G9.flex.fp32",
        asks="not slower than FlexAttention on any fp32 pattern",
        target=1.0,
        read=over("flex", _fp32),
        how="least",
    ),
    _masks(
        key="G9.flex.bf16",
        asks="not slower than FlexAttention on bf16 windows",
        target=1.0,
        read=over("flex", _bf16_window),
        how="least",
    ),
    _masks(key="G9.dense", asks="never slower than dense, forward", target=1.0, read=over("dense"), how="least"),
    _masks(
        key="G9.bound",
        asks="share of the tile bound over dense attention that is reached, forward, fp32",
        target=80,
        read=each(of_bound, _fp32),
        how="median",
        unit="%",
    ),
    _masks(
        key="G9.dense.backward",
        asks="never slower than dense, with backward",
        target=1.0,
        read=over("dense"),
        how="least",
        suite="backward",
        parts=("cpu-backward",),
    ),
    _masks(
        key="G9.bound.backward",
        asks="share of the tile bound over dense attention that is reached, with backward, fp32",
        target=70,
        read=each(of_bound, _fp32),
        how="median",
        suite="backward",
        unit="%",
        parts=("cpu-backward",),
    ),
    _masks(
        key="weights.reference",
        asks="times the speed of the formula in torch over all pairs at once: scores, weights, keys, branches",
        target=1.0,
        read=over("dense"),
        how="least",
        suite="backward",
        source="this suite",
        parts=("cpu-weights",),
    ),
)


# --- decode ----------------------------------------------------------------------------------------------------------


def _beyond_visible(row: Row) -> float | None:
    """Return a step's time beyond the visible share of keys, in percent of dense attention."""
    gain = speedup(row, "dense")
    return None if gain is None else 100 * (1 / gain - row["visible"] / row["n"])


_decode = partial(
    Goal, where="cpu", suite="decode", floor=None, least=False, unit="%", source=G3, parts=("cpu-decode",)
)
DECODE = (
    _decode(
        key="G3.sparse",
        asks="time beyond the visible share of keys, relative to SDPA over the whole cache",
        target=10,
        read=each(_beyond_visible),
        how="most",
    ),
    _decode(
        key="G3.dense",
        asks="times SDPA's speed where every key is visible",
        target=1.0,
        read=over("dense", lambda row: row["visible"] == row["n"]),
        least=True,
        unit="×",
    ),
)


# --- recurrences -----------------------------------------------------------------------------------------------------


def _falls(rows: Rows) -> list[Measurement]:
    """Return by how many percent tokens per second fall from the shortest length to the longest."""
    measurements = []
    for group in _by(rows, "pattern"):
        speeds = sorted((row["n"], row["n"] / row["ms"]["attnc"]["median"], row) for row in group)
        if len(speeds) > 1:
            measurements.append(
                Measurement(speeds[-1][2]["key"], 100 * (1 - speeds[-1][1] / speeds[0][1]), speeds[-1][2])
            )
    return measurements


def _by(rows: Rows, *keys: str) -> Iterator[list[Row]]:
    """Group timed rows with equal entries."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in timed(rows):
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from groups.values()


_recurrence = partial(
    Goal, where="cpu", suite="recurrence", floor=1.0, least=True, unit="×", source=G4, parts=("cpu-recurrence",)
)
RECURRENCE = (
    _recurrence(
        key="G4.fla", asks="times the speed of flash-linear-attention's chunks in torch", target=1.5, read=over("fla")
    ),
    _recurrence(
        key="G4.loop",
        asks="times the speed of a loop over tokens",
        target=3.0,
        read=over("loop"),
        how="least",
        source="CPU 3",
    ),
    _recurrence(
        key="G4.tokens",
        asks="fall of tokens per second from 8,192 to 65,536 tokens",
        target=10,
        read=_falls,
        how="most",
        floor=None,
        least=False,
        unit="%",
    ),
)


# --- routing ---------------------------------------------------------------------------------------------------------


def _break_even(rows: Rows) -> list[Measurement]:
    measurements = []
    for group in _by(rows, "pattern", "direction"):
        gains = [(row["n"], gain) for row in group if (gain := speedup(row, "dense")) is not None]
        length = break_even(gains)
        if length is not None:
            measurements.append(Measurement(f"{group[0]['pattern']} {group[0]['direction']}", length, group[-1]))
    return measurements


def _choice(row: Row) -> float | None:
    alone, whole = median(row, "attnc, choice alone"), median(row)
    return None if alone is None or whole is None else 100 * alone / whole


_routing = partial(
    Goal, where="cpu", suite="routing", floor=None, least=False, unit="tokens", source=G5, parts=("cpu-routing",)
)
ROUTING = (
    _routing(
        key="G5.break_even",
        asks="length from which selected keys beat dense causal attention, selection included",
        target=8192,
        read=_break_even,
        how="most",
    ),
    _routing(
        key="G5.choice",
        asks="share of the call spent on the selection",
        target=25,
        read=each(_choice),
        how="most",
        unit="%",
    ),
)

GOALS: tuple[Goal, ...] = (*DENSE, *BLOCKS, *MASKS, *DECODE, *RECURRENCE, *ROUTING, *PLAN, *COMPILE, *SIMULATOR)
