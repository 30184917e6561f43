"""The table of what machine code says is of the kernels as they are: `python benchmarks/kernels.py --selection`."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

from attnc.compiler.attentions import alone
from attnc.compiler.kernels.attention_kernels import HeadShape, find_kernels
from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.gpu.kernel_gate import GateCase
from attnc.runtime.gpu.selection import PARAMETERS, SELECTION, cases
from plan_calls import from_library

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
TABLE = RESULTS / "kernels-triton-3.7.1.json"


def test_the_table_has_every_kernel_with_its_tiles_and_all_pass() -> None:
    """`--selection --changed` reads those again that differ."""
    told = {}
    for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"]:
        if row["kernel"] is not None:
            place = row["target"], row["head_dim"], row["pattern"], row["kernel"]
            told[place] = row["tiles"], row["warps"], row["stages"], row["verdict"]
    found = {}
    for case in cases(SELECTION, list(TARGETS), (64, 128), ("bfloat16",)):
        if isinstance(case, GateCase):
            shape = case.source.tiles
            place = case.target, case.head_dim, case.pattern, case.title
            found[place] = f"{shape.q_tile}x{shape.k_tile}", shape.warps, shape.stages, "pass"
    assert told == found


def test_bricks_are_as_large_as_tiles() -> None:
    """For every target and head, whether heads share keys or not: what is cut is what is walked."""
    seen = 0
    for name in ("monarch", "neighborhood_2d"):
        pattern = from_library(name, **PARAMETERS[name])
        for target in TARGETS.values():
            for width in (64, 128, 256):
                for grouped in (False, True):
                    node = alone(pattern, pattern.nodes[-1])
                    kernels = find_kernels(node, HeadShape(width, width, "bfloat16", grouped=grouped), target)
                    for stage, bricked in kernels.bricked.items():
                        tiles = kernels.listed(stage, False).tiles
                        sides = prod(bricked.grid.q_brick), prod(bricked.grid.k_brick)
                        assert sides == (tiles.q_tile, tiles.k_tile)
                        seen += 1
    assert seen == 2 * 4 * 3 * 2 * 3
