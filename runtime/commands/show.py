"""`attnc show`: draw a pattern with its row counts and exact density, or the map of its tiles."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from attnc.runtime.call.call_errors import needing_torch
from attnc.runtime.call.lengths import SHORT, natural_length
from attnc.runtime.commands import console
from attnc.runtime.commands.patterns import (
    add_grid,
    add_inputs,
    add_lengths,
    add_pattern,
    analysed,
    given_inputs,
    value_json,
)
from attnc.runtime.patterns.pattern_analysis import PatternAnalysis
from attnc.runtime.pictures.branch_svg import branches_svg
from attnc.runtime.pictures.branch_views import BranchesDrawing, has_states
from attnc.runtime.pictures.draw import make_drawing, to_svg, to_text
from attnc.runtime.pictures.drawing import FULL, PARTIAL, Drawing, percent
from attnc.runtime.pictures.terminal_text import branches_text, tile_map_text
from attnc.runtime.pictures.tile_map import TileMap, make_tile_map
from attnc.runtime.pictures.tile_svg import tile_map_svg

FIRST_ROWS = 8
LONG = 16384
"""The length of a tile map where neither the arguments nor the pattern give one."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `show`."""
    add_pattern(parser)
    add_grid(parser)
    add_lengths(parser, f" (default {SHORT}, with --tiles {LONG}, or the pattern's length)", dest="n_q")
    parser.add_argument("--head", metavar="H", type=int, default=0, help="the head to draw (default 0)")
    parser.add_argument(
        "--tile", metavar="N", type=int, help="side of a tile (default: depends on the length, at most 128)"
    )
    parser.add_argument(
        "--tiles",
        action="store_true",
        help="draw only the tiles, at the length of a real call: in token order and, for a grid, also in bricks",
    )
    add_inputs(parser)
    parser.add_argument("-o", dest="out", metavar="FILE.svg", type=Path, help="write the picture to this file instead")


def run(args: argparse.Namespace) -> int:
    """Draw the pattern and return the exit status."""
    _check(args)
    attention = analysed(args)
    otherwise = LONG if args.tiles else SHORT
    n_q = args.n_q or natural_length(attention.bound, otherwise) or otherwise
    n_k = args.n_k or n_q
    inputs = given_inputs(attention.bound, args.inputs, n_q, n_k)
    if has_states(attention) and not args.tiles:
        with needing_torch(f"a picture of `{attention.name}`, whose states are measured,"):
            from attnc.runtime.pictures.branches import make_branches  # only for pictures
        return _run_branches(args, attention, make_branches(attention, n_q, n_k, inputs, head=args.head))
    if args.tiles:
        return _run_tiles(args, attention, make_tile_map(attention, n_q, n_k, inputs, head=args.head, tile=args.tile))
    drawing = make_drawing(attention, n_q, n_k, inputs, head=args.head, tile=args.tile)
    counts = f"{percent(drawing.density)} visible, {drawing.pairs_text}; {drawing.rows_text} keys per row"
    return _output(
        args,
        attention,
        drawing,
        svg=lambda: to_svg(drawing),
        facts=_counts_json(drawing),
        in_short="; ".join([counts, *drawing.notes]),
        text=lambda unicode: to_text(drawing, console.columns(), console.has_color(sys.stdout), unicode=unicode),
    )


def _output(
    args: argparse.Namespace,
    attention: PatternAnalysis,
    drawing: Drawing | TileMap | BranchesDrawing,
    *,
    svg: Callable[[], str],
    facts: dict[str, object],
    in_short: str,
    text: Callable[[bool], str],
) -> int:
    """Write the picture if a file is named; print JSON, a line about the file, or the picture as text."""
    if args.out is not None:
        args.out.write_text(svg(), encoding="utf-8")
    if args.json:
        call = {
            "pattern": attention.name,
            "params": {name: value_json(value) for name, value in attention.bound.values.items()},
            "queries": drawing.n_q,
            "keys": drawing.n_k,
            "head": args.head,
        }
        file = None if args.out is None else str(args.out)
        console.print_json({**call, **facts, "notes": list(drawing.notes), "file": file})
    elif args.out is not None:
        print(f"{args.out}: {in_short}")
    else:
        print(text(console.has_unicode(sys.stdout)))
    return console.FINE


def _run_branches(args: argparse.Namespace, attention: PatternAnalysis, drawing: BranchesDrawing) -> int:
    """Draw the branches of a pattern that has states."""
    branches = [
        {
            "name": view.name,
            "visible": view.visible,
            "state": view.visible is None,
            "tokens_apart": view.cell,
            "left": list(view.left),
            "words": list(view.words),
        }
        for view in drawing.views
    ]
    return _output(
        args,
        attention,
        drawing,
        svg=lambda: branches_svg(drawing),
        facts={"branches": branches},
        in_short="; ".join(f"{view.name}: {view.words[0]}" for view in drawing.views),
        text=lambda unicode: branches_text(drawing, console.columns(), unicode=unicode),
    )


def _run_tiles(args: argparse.Namespace, attention: PatternAnalysis, tile_map: TileMap) -> int:
    """Draw only the tiles."""
    orders = [
        {
            "order": str(view.order),
            "tile": view.tile,
            "total": view.states.size,
            "live": view.live,
            "full": view.count(FULL),
            "partial": view.count(PARTIAL),
        }
        for view in tile_map.views
    ]
    return _output(
        args,
        attention,
        tile_map,
        svg=lambda: tile_map_svg(tile_map),
        facts={"orders": orders},
        in_short="; ".join(f"{view.order}: {view.tiles_text}" for view in tile_map.views),
        text=lambda unicode: tile_map_text(tile_map, unicode=unicode),
    )


def _check(args: argparse.Namespace) -> None:
    console.check_at_least(1, ("--len", args.n_q), ("--keys", args.n_k), ("--tile", args.tile))
    console.check_at_least(0, ("--head", args.head))
    if args.out is not None and args.out.suffix != ".svg":
        raise console.UsageError(f"-o {args.out}: the picture is an SVG; its name must end in .svg")


def _counts_json(drawing: Drawing) -> dict[str, object]:
    return {
        "visible": drawing.visible,
        "density": drawing.density,
        "row_counts": {
            "min": drawing.fewest,
            "max": drawing.most,
            "first_rows": drawing.row_counts[:FIRST_ROWS].tolist(),
        },
        "tiles": {
            "total": drawing.tiles.size,
            "live": drawing.live,
            "full": drawing.count_tiles(FULL),
            "partial": drawing.count_tiles(PARTIAL),
            "q_tile": drawing.q_tile,
            "k_tile": drawing.k_tile,
        },
    }
