"""The committed tables of kernel verdicts and of compiled figures describe the kernels that are emitted today."""

from __future__ import annotations

from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import kernel_verdicts
import kernels
import pytest

from attnc.compiler.kernels.attention_kernels import HeadShape, find_kernels
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.passes.attentions import alone
from attnc.compiler.simulation.compiled_figures import find_figures
from attnc.runtime.commands.doctor import rows
from attnc.runtime.toolchain.kernel_gate import GateCase
from attnc.runtime.toolchain.selection import PARAMETERS, SELECTION, cases
from plan_calls import from_library

RESULTS = Path(__file__).resolve().parents[4] / "benchmarks" / "results"
TABLE = RESULTS / "kernels-triton-3.7.1.json"


def test_the_verdicts_cover_every_kernel_and_pass() -> None:
    """Run `python benchmarks/kernels.py --selection --changed` to renew the rows that differ."""
    committed = {}
    for row in kernel_verdicts.read(TABLE):
        if row["kernel"] is not None:
            place = row["target"], row["head_dim"], row["pattern"], row["kernel"]
            committed[place] = row["tiles"], row["warps"], row["stages"], row["verdict"]
    emitted = {}
    for case in cases(SELECTION, list(TARGETS), (64, 128), ("bfloat16",)):
        if isinstance(case, GateCase):
            shape = case.source.tiles
            place = case.target, case.head_dim, case.pattern, case.title
            emitted[place] = f"{shape.q_tile}x{shape.k_tile}", shape.warps, shape.stages, "pass"
    assert committed == emitted


@pytest.mark.xdist_group("compiling")
def test_the_simulator_has_current_compiled_figures() -> None:
    """Run `python benchmarks/kernels.py --facts` to write `compiled_figures.json`."""
    gate_cases = kernels.causal_kernels(["sm_80", "sm_90"], [64])
    (sm_80, sm_90) = rows([case for case in gate_cases if case.stage == "forward"], 1)
    for row in (sm_80, sm_90):
        figures: dict[str, Any] = kernels.figures_of(row)
        stored = find_figures(figures["architecture"], "forward", 64, "bfloat16", tuple(figures["shape"]))
        assert stored is not None and asdict(stored) == figures["seen"]


def test_bricks_have_as_many_tokens_as_tiles() -> None:
    """A brick has the size of its kernel's tile on every target, for every head dimension, grouped heads or not."""
    checked = 0
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
                        checked += 1
    assert checked == 2 * 4 * 3 * 2 * 3
