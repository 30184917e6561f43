"""What the report says of a GPU alone: its charts, and of rows the rivals that did not run and what was published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import reading
from document import Block, Paragraph, Table
from goals import shown
from measures import break_even, error, kendall, predictions, speedup, timed
from part import Row
from plots import Plot, Series, diagonal, level, quantile, reciprocal
from reading import Result

Chart = tuple[Plot, list[Result]] | None

SPARSE = ("gpu-windows-text", "gpu-windows-video", "gpu-blocks-video", "gpu-blocks-other")
POINTS = ("gpu-simulator-forward", "gpu-simulator-backward")
CHOSEN = ("gpu-routing-16", "gpu-routing-8", "gpu-routing-backward", "gpu-routing-moba")


def charts(results: Mapping[str, Result]) -> list[tuple[str, Chart]]:
    """By the name of the picture; None where nothing was measured for it."""
    return [
        ("gpu-density", _density(*_some(results, SPARSE))),
        ("gpu-predicted", _predicted(*_some(results, POINTS))),
        ("gpu-lengths", _lengths(*_some(results, CHOSEN))),
    ]


def _some(results: Mapping[str, Result], names: Sequence[str]) -> tuple[list[Result], list[Row]]:
    own = [results[name] for name in names if name in results]
    return own, list(timed(reading.rows({one.part: one for one in own})))


def _density(own: list[Result], rows: list[Row]) -> Chart:
    """Over our own dense kernel of the same run; the line is one over the density, the tile bounds lie below it."""
    points = [(row, gain) for row in rows if (gain := speedup(row, "attnc_dense")) is not None and row.get("density")]
    if not points:
        return None
    series = [
        Series(kind, [(row["density"], gain) for row, gain in points if row["kind"] == kind])
        for kind in dict.fromkeys(row["kind"] for row, _ in points)
    ]
    series.append(Series("tile bound", sorted({(row["density"], row["bound"]) for row, _ in points})))
    densities = [row["density"] for row, _ in points]
    note = f"{len(points)} points, forward, beside our own dense kernel; what is visible of all pairs"
    lines = {"1 / density": reciprocal(min(densities), max(densities))}
    return Plot("GPU: speed over dense attention", note, "density", "times dense's speed", series, lines), own


def _predicted(own: list[Result], rows: list[Row]) -> Chart:
    found = predictions({"": rows})
    if not found:
        return None
    errors = [x for row in rows if (x := error(row)) is not None]
    tau = kendall([(x, y) for _, x, y in found])
    middle, most = quantile(errors, 0.5), quantile(errors, 0.95)
    note = f"{len(found)} points: error {middle:.0f} % at the median, {most:.0f} % at 95 %"
    note += "" if tau is None else f"; Kendall's tau {tau:.2f}"
    series = [
        Series(stage, [(x, y) for row, x, y in found if row["direction"] == stage])
        for stage in dict.fromkeys(row["direction"] for row, _, _ in found)
    ]
    lines = {"equal": diagonal([x for _, x, _ in found])}
    title = "GPU: predicted and measured times"
    return Plot(title, note, "predicted ms", "measured ms", series, lines, square=True), own


def _lengths(own: list[Result], rows: list[Row]) -> Chart:
    """Over the best dense kernel of the run."""
    gains: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        gains.setdefault(f"{row['case']} {row['direction']}", []).append((row["n"], row["dense_over_attnc"]))
    if not gains:
        return None
    even = {name: break_even(points) for name, points in gains.items()}
    note = "break-even: " + ", ".join(f"{name} {shown(n, 'tokens')}" for name, n in even.items() if n is not None)
    series = [Series(name, points, joined=True) for name, points in gains.items()]
    lines = {"as fast": level(1, [n for points in gains.values() for n, _ in points])}
    return Plot("GPU: chosen keys over dense attention", note, "tokens", "times dense's speed", series, lines), own


def beside(rows: Sequence[Row]) -> Iterator[Block]:
    """Rivals of a part that did not run, with the reason; and published figures, which are not measurements of ours."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, reason in row.get("absent", {}).items():
            reasons.setdefault(f"{name}: {reason}", []).append(row["key"])
    if reasons:
        told = [text if len(keys) == len(rows) else f"{text} ({len(keys)} rows)" for text, keys in reasons.items()]
        yield Paragraph(f"Not run. {'; '.join(told)}.")
    shown_rows = [
        [
            row["key"],
            one["published"],
            shown(float(one["value"]), str(one["unit"])),
            one["machine"],
            one["configuration"],
            one["source"],
        ]
        for row in rows
        for one in row.get("published", ())
    ]
    if shown_rows:
        yield Table(("row", "published, not measured here", "value", "machine", "configuration", "source"), shown_rows)
