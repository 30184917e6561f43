"""The pattern as tiles: full, partial, and empty tiles, which are never visited."""

from __future__ import annotations

from collections.abc import Sequence

from attnc.compiler.simulation.simulation import Simulation
from attnc.runtime.pictures.drawing import EMPTY, FULL, PARTIAL, Drawing, coarsening, merge_tiles, percent
from attnc.runtime.report.chart_svg import figure, hatch, label
from attnc.runtime.report.markup import Markup, SliderFrame, element, joined, px

WIDTH, HEIGHT = 520, 372
LEFT, TOP, SIDE = 24, 24, 280
KEY = 330
"""The x coordinate of the map's legend."""
BAR_TOP = 350
THIN = 24
"""The minimum number of pixels of the map's shorter side."""
MOST_TILES = 64
_HATCH = hatch(
    "report-partial",
    5,
    element("rect", class_="tile-partial", width=5, height=5),
    element("path", class_="tile-stroke", d="M0 0V5", stroke_width=1.6),
)
KINDS = (("full", FULL), ("partial", PARTIAL), ("empty", EMPTY))


def tile_rows(drawing: Drawing) -> tuple[str, ...]:
    """Return the states of the tiles, a digit each, merged until no side has more than `MOST_TILES`."""
    return tuple("".join(map(str, row)) for row in merge_tiles(drawing.tiles, _factor(drawing)).tolist())


def _factor(drawing: Drawing) -> int:
    return coarsening(max(drawing.tiles.shape), MOST_TILES)


def tile_paths(rows: Sequence[str]) -> dict[str, str]:
    """Return paths with one unit per tile: the runs of full and partial tiles, and a stroke across each partial one.

    The script draws the paths of other points by the same rule.
    """
    paths = {"full": "", "partial": "", "strokes": ""}
    for y, row in enumerate(rows):
        x = 0
        while x < len(row):
            end = x + 1
            while end < len(row) and row[end] == row[x]:
                end += 1
            if row[x] != str(EMPTY):
                paths["full" if row[x] == str(FULL) else "partial"] += f"M{x} {y}h{end - x}v1h{x - end}z"
            if row[x] == str(PARTIAL):
                paths["strokes"] += "".join(f"M{i} {y + 1}l1 -1" for i in range(x, end))
            x = end
    return {"mesh": _mesh(rows), **paths}


def _mesh(rows: Sequence[str]) -> str:
    width, height = len(rows[0]) if rows else 0, len(rows)
    return "".join(f"M0 {y}h{width}" for y in range(1, height)) + "".join(f"M{x} 0v{height}" for x in range(1, width))


def tile_frame(simulation: Simulation, drawing: Drawing | None) -> SliderFrame:
    """Return the map of a drawing, and the tile counts of the schedule."""
    return _bar_frame(simulation) | _map_frame(drawing)


def _map_frame(drawing: Drawing | None) -> SliderFrame:
    if drawing is None or not drawing.tiles.size:
        words = {f"map-{name}": "" for name in ("full", "partial", "empty", "each", "merged", "keys")}
        texts = {**words, "map-queries": "no picture at this size", "map-said": "No picture at this size."}
        nothing = {"map": {"viewBox": "0 0 1 1", "width": "0", "height": "0"}, "map-key": {"visibility": "hidden"}}
        return SliderFrame(texts, nothing)
    rows = tile_rows(drawing)
    longest = max(drawing.n_q, drawing.n_k)
    width, height = (max(SIDE * n / longest, THIN) for n in (drawing.n_k, drawing.n_q))
    counts = {name: f"{drawing.count_tiles(state):,}" for name, state in KINDS}
    factor = _factor(drawing)
    tile_text = f"tiles of {drawing.q_tile:,} × {drawing.k_tile:,}"
    merged = "" if factor == 1 else f"{factor} × {factor} tiles per square"
    queries, keys = f"{drawing.n_q:,} queries ×", f"{drawing.n_k:,} keys, one head"
    spoken = f"{queries} {keys}, in {tile_text}: " + ", ".join(f"{n} {name}" for name, n in counts.items())
    return SliderFrame(
        {
            **{f"map-{name}": f"{name} {number}" for name, number in counts.items()},
            "map-each": tile_text,
            "map-merged": merged,
            "map-queries": queries,
            "map-keys": keys,
            "map-said": f"{spoken}.",
        },
        {
            "map": {"viewBox": f"0 0 {len(rows[0])} {len(rows)}", "width": px(width), "height": px(height)},
            "map-key": {"visibility": "visible"},
        },
        tiles=rows,
    )


def _bar_frame(simulation: Simulation) -> SliderFrame:
    tiles, choice = simulation.tiles, simulation.choices[0]
    counts = {"full": tiles.full, "partial": tiles.partial, "empty": max(tiles.total - tiles.live, 0)}
    total = max(sum(counts.values()), 1)
    shapes, x = {}, 0.0
    for name, number in counts.items():
        width = WIDTH * number / total
        shapes[f"tiles-{name}"] = {"x": px(x), "width": px(width)}
        x += width
    parts = [f"{name} {number:,} ({percent(number / total)})" for name, number in counts.items()]
    schedule = f"the {choice.kernel} kernel's tiles of {choice.q_tile}×{choice.k_tile}, all heads, in {choice.order}"
    return SliderFrame({"tiles-title": schedule, "tiles-counts": ", ".join(parts)}, shapes)


def draw_tiles(frame: SliderFrame, *, has_map: bool = True) -> Markup:
    """Draw the map, its legend, and the bar of the schedule's tiles; only the bar if no point has a drawing."""
    cut = 0 if has_map else BAR_TOP - 8
    chart = figure(
        "tiles-chart",
        "The pattern and its tiles",
        frame.text("desc", "map-said"),
        WIDTH,
        HEIGHT - cut,
        element("defs", _HATCH),
        *(_map(frame) if has_map else []),
        element("g", *_bar(frame), transform=f"translate(0 {-cut})"),
    )
    # These texts may be long: HTML wraps lines, an SVG cuts them off at its edge.
    return joined([chart, frame.text("p", "tiles-title", class_="strong"), frame.text("p", "tiles-counts")])


def _map(frame: SliderFrame) -> list[Markup]:
    paths = tile_paths(frame.tiles)
    layers = [
        element("rect", class_="tile-empty", width="100%", height="100%"),
        element("path", id="map-full-path", class_="tile-full", d=paths["full"]),
        element("path", id="map-partial-path", class_="tile-partial", d=paths["partial"]),
        element("path", id="map-strokes-path", class_="tile-stroke", d=paths["strokes"]),
        element("path", id="map-mesh-path", class_="tile-mesh", d=paths["mesh"]),
    ]
    axes = [
        label(LEFT, 14, "keys →", "quiet small"),
        element("text", "← queries", class_="quiet small", transform=f"translate(12 {TOP + 52}) rotate(-90)"),
    ]
    return [
        frame.shape("svg", "map", *layers, x=LEFT, y=TOP, preserveAspectRatio="none"),
        frame.text("text", "map-queries", x=KEY, y=TOP + 12),
        frame.shape("g", "map-key", *axes, *_key(frame)),
    ]


def _key(frame: SliderFrame) -> list[Markup]:
    parts = [
        frame.text("text", "map-keys", x=KEY, y=TOP + 30),
        frame.text("text", "map-each", class_="quiet small", x=KEY, y=TOP + 52),
        frame.text("text", "map-merged", class_="quiet small", x=KEY, y=TOP + 68),
    ]
    for i, (name, _) in enumerate(KINDS):
        y = TOP + 88 + 24 * i
        parts.append(element("rect", class_=f"tile-{name} swatch", x=KEY, y=y, width=14, height=14))
        if name == "partial":
            parts.append(element("path", class_="tile-stroke", d=f"M{KEY} {y + 14}l14 -14"))
        parts.append(frame.text("text", f"map-{name}", x=KEY + 22, y=y + 12))
    return parts


def _bar(frame: SliderFrame) -> list[Markup]:
    return [
        frame.shape("rect", "tiles-full", class_="tile-full", y=BAR_TOP, height=16),
        frame.shape("rect", "tiles-partial", fill="url(#report-partial)", y=BAR_TOP, height=16),
        frame.shape("rect", "tiles-empty", class_="tile-empty", y=BAR_TOP, height=16),
    ]
