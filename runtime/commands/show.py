"""`attnc show`: the picture of a pattern, its row counts and exact density."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from attnc.runtime.attention import Attention
from attnc.runtime.commands import console
from attnc.runtime.commands.patterns import (
    SHORT,
    add_grid,
    add_inputs,
    add_pattern,
    compiled,
    given_inputs,
    natural_length,
    value_json,
)
from attnc.runtime.pictures.draw import make_drawing, to_svg, to_text
from attnc.runtime.pictures.drawing import FULL, PARTIAL, Drawing, percent

FIRST_ROWS = 8


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `show`."""
    add_pattern(parser)
    add_grid(parser)
    parser.add_argument(
        "--len", dest="n_q", metavar="N", type=int, help=f"queries (default {SHORT}, or what the tokens say)"
    )
    parser.add_argument("--keys", dest="n_k", metavar="N", type=int, help="keys (default: as many as queries)")
    parser.add_argument("--head", metavar="H", type=int, default=0, help="the head to draw (default 0)")
    parser.add_argument("--tile", metavar="N", type=int, help="side of a tile (default: by the length, at most 128)")
    add_inputs(parser)
    parser.add_argument("-o", dest="out", metavar="FILE.svg", type=Path, help="write the picture to a file instead")


def run(args: argparse.Namespace) -> int:
    """Draw."""
    _check(args)
    attention = compiled(args)
    n_q = args.n_q or natural_length(attention.bound) or SHORT
    n_k = args.n_k or n_q
    inputs = given_inputs(attention.bound, args.inputs, n_q, n_k)
    drawing = make_drawing(attention, n_q, n_k, inputs, head=args.head, tile=args.tile)
    if args.out is not None:
        args.out.write_text(to_svg(drawing), encoding="utf-8")
    if args.json:
        console.print_json(_as_json(attention, drawing, args))
    elif args.out is not None:
        print(f"{args.out}: {_in_short(drawing)}")
    else:
        color, unicode = console.has_color(sys.stdout), console.has_unicode(sys.stdout)
        print(to_text(drawing, console.columns(), color, unicode=unicode))
    return console.FINE


def _check(args: argparse.Namespace) -> None:
    for option, value, least in (
        ("--len", args.n_q, 1),
        ("--keys", args.n_k, 1),
        ("--tile", args.tile, 1),
        ("--head", args.head, 0),
    ):
        if value is not None and value < least:
            raise console.UsageError(f"{option} {value}: give a whole number, at least {least}")
    if args.out is not None and args.out.suffix != ".svg":
        raise console.UsageError(f"-o {args.out}: the picture is an SVG; give a name that ends in .svg")


def _in_short(drawing: Drawing) -> str:
    said = f"{percent(drawing.density)} visible, {drawing.pairs_text}; {drawing.rows_text} keys per row"
    return "; ".join([said, *drawing.notes])


def _as_json(attention: Attention, drawing: Drawing, args: argparse.Namespace) -> dict[str, object]:
    return {
        "pattern": attention.name,
        "params": {name: value_json(value) for name, value in attention.bound.values.items()},
        "queries": drawing.n_q,
        "keys": drawing.n_k,
        "head": args.head,
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
        "notes": list(drawing.notes),
        "file": None if args.out is None else str(args.out),
    }
