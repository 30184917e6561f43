"""The charts of the report, drawn from the rows of one place: a CPU or a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import suites
from benchmark_part import Row
from goals import shown
from measures import break_even, error, kendall, predictions, speedup
from plots import Plot, Series, diagonal, level, quantile, reciprocal
from reading import Result

Chart = tuple[Plot, list[Result]]
"""A plot, and the results from which it was drawn."""


def charts(results: Mapping[str, Result], where: str) -> Iterator[tuple[str, Plot, list[Result]]]:
    """Yield name, plot and sources of each chart that has points."""
    place_results = [results[part.name] for part in suites.PARTS[where] if part.name in results]
    place = where.upper()
    for name, chart in {
        "density": _density(place_results, place),
        "predicted": _predicted(place_results, place),
        "lengths": _lengths(place_results, place),
    }.items():
        if chart is not None:
            yield name, *chart


def _chosen(results: Sequence[Result], suite: Sequence[str], test: Callable[[Row], bool]) -> dict[str, list[Row]]:
    """Return timed rows of these suites that pass a test, by part; parts without such rows are left out."""
    suite_rows = {result.part: result.rows for result in results if suites.find(result.part)[1].suite in suite}
    timed_rows = {name: [row for row in rows if "ms" in row and test(row)] for name, rows in suite_rows.items()}
    return {name: rows for name, rows in timed_rows.items() if rows}


def _from(results: Sequence[Result], rows: Mapping[str, object]) -> list[Result]:
    return [result for result in results if result.part in rows]


def _gain(row: Row) -> float | None:
    """Return the speed over dense attention: the row's own `best`, else attnc's dense kernel, else torch's."""
    if "dense_over_attnc" in row:
        return float(row["dense_over_attnc"])
    dense_gain = speedup(row, "attnc_dense")
    return speedup(row, "dense") if dense_gain is None else dense_gain


def _by(points: Sequence[tuple[Row, float, float]], kind: Callable[[Row], str]) -> list[Series]:
    """Return a series for each kind of row, in order of occurrence."""
    kinds = dict.fromkeys(kind(row) for row, _, _ in points)
    return [Series(name, [(x, y) for row, x, y in points if kind(row) == name]) for name in kinds]


def _density(results: Sequence[Result], place: str) -> Chart | None:
    """Plot the forward speed over dense attention; the line is one over the density, above all tile bounds."""
    suite = ("windows", "block_sparse")
    rows = _chosen(results, suite, lambda row: bool(row.get("density") and row["direction"] == "forward"))
    points = [
        (row, float(row["density"]), gain)
        for part_rows in rows.values()
        for row in part_rows
        if (gain := _gain(row)) is not None
    ]
    if not points:
        return None
    bounds = sorted({(density, float(row["bound"])) for row, density, _ in points if "bound" in row})
    densities = [density for _, density, _ in points]
    note = f"{len(points)} points, forward; density: visible pairs over dense attention's pairs"
    lines = {"1 / density": reciprocal(min(densities), max(densities))}
    series = [*_by(points, lambda row: str(row.get("kind", row["dtype"]))), Series("tile bound", bounds)]
    plot = Plot(f"{place}: speed over dense attention", note, "density", "times dense's speed", series, lines)
    return plot, _from(results, rows)


def _predicted(results: Sequence[Result], place: str) -> Chart | None:
    """Plot predicted against measured times, with the errors of predictions and their rank correlation."""
    rows = _chosen(results, ("simulator",), lambda row: "attnc" in row.get("predicted", {}))
    points = predictions(rows)
    if not points:
        return None
    errors = [x for row, _, _ in points if (x := error(row)) is not None]
    tau = kendall([(x, y) for _, x, y in points])
    middle, upper = quantile(errors, 0.5), quantile(errors, 0.95)
    note = f"{len(points)} points: error {middle:.0f} % at the median, {upper:.0f} % at 95 %"
    note += "" if tau is None else f"; Kendall's tau {tau:.2f}"
    lines = {"equal": diagonal([x for _, x, _ in points])}
    series = _by(points, lambda row: f"{row['dtype']} {row['direction']}")
    title = f"{place}: predicted and measured times"
    return Plot(title, note, "predicted ms", "measured ms", series, lines, square=True), _from(results, rows)


def _lengths(results: Sequence[Result], place: str) -> Chart | None:
    """Plot speedups by pattern and direction over the length, with the break-even lengths."""
    rows = _chosen(results, ("routing",), lambda row: _gain(row) is not None)
    gains: dict[str, list[tuple[int, float]]] = {}
    for row in (row for part_rows in rows.values() for row in part_rows):
        name = f"{row.get('case', row.get('pattern'))} {row['direction']}"
        gains.setdefault(name, []).append((row["n"], _gain(row) or 0))
    if not gains:
        return None
    even = {name: break_even(points) or math.inf for name, points in gains.items()}
    note = "each name is followed by its break-even length"
    series = [Series(f"{name}: {shown(even[name], 'tokens')}", points, joined=True) for name, points in gains.items()]
    lines = {"as fast": level(1, [n for points in gains.values() for n, _ in points])}
    plot = Plot(f"{place}: selected keys over dense attention", note, "tokens", "times dense's speed", series, lines)
    return plot, _from(results, rows)
