"""Figures of compiled machine code that the simulator's predictions use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnc.compiler.kernels.kernel_source import TileShape
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.kernels.tile_shapes import tile_shape
from attnc.compiler.simulation.compiled_figures import compiled_figures_by_kernel, find_figures
from attnc.compiler.simulation.gpu_clocks import (
    Extra,
    HeadSizes,
    Kernel,
    TileModel,
    resources,
)
from attnc.compiler.simulation.machine import find_machine

STORED = Path(__file__).resolve().parents[3] / "compiler" / "simulation" / "compiled_figures.json"
H100 = find_machine("h100-sxm")


def test_the_figures_name_their_triton_version_and_are_many() -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    assert stored["triton"] == "3.7.1"
    assert len(stored["kernels"]) == len(compiled_figures_by_kernel()) >= 18


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_first_choice_of_the_plan_has_figures(target: str, kernel: Kernel, head_dim: int) -> None:
    tiles = tile_shape(TARGETS[target], kernel, head_dim, head_dim, "bfloat16")
    shape = tiles.q_tile, tiles.k_tile, tiles.warps, tiles.stages
    assert find_figures(target, kernel, head_dim, "float16", shape) is not None


def test_predictions_use_the_figures() -> None:
    heads, tiles = HeadSizes(128, 128, "bfloat16"), tile_shape(TARGETS["sm_90"], "forward", 128, 128, "bfloat16")
    seen = find_figures("sm_90", "forward", 128, "bfloat16", (tiles.q_tile, tiles.k_tile, tiles.warps, tiles.stages))
    assert seen is not None
    clocks, threads = TileModel(H100, "forward", tiles, heads, Extra()).full, 32 * tiles.warps
    assert clocks.issue == pytest.approx(seen.issued * threads / H100["issue_per_clock"])
    assert clocks.exps == pytest.approx(seen.exps * threads / H100["exp_per_clock"])
    figures = resources(H100, "forward", tiles, heads)
    assert (figures.registers, figures.shared_kib, figures.programs) == (seen.registers, seen.shared_kib, 1)


def test_formulas_for_uncompiled_tiles_are_close() -> None:
    """Formulas for tiles that were not compiled are within a third of the figures of compiled neighbours."""
    for target in ("sm_80", "sm_90"):
        for head_dim in (64, 128):
            tiles = tile_shape(TARGETS[target], "forward", head_dim, head_dim, "bfloat16")
            seen = find_figures(
                target, "forward", head_dim, "bfloat16", (tiles.q_tile, tiles.k_tile, tiles.warps, tiles.stages)
            )
            assert seen is not None
            scores, threads = tiles.q_tile * tiles.k_tile, 32 * tiles.warps
            by_formula = scores * 6.5 + 1.75 * tiles.q_tile * head_dim
            assert by_formula == pytest.approx(seen.issued * threads, rel=0.34), (target, head_dim)


def test_uncompiled_kernels_have_no_figures() -> None:
    assert find_figures("sm_90", "forward", 96, "bfloat16", (128, 128, 8, 2)) is None
    assert TileShape(256, 64, 8, 2) not in {TileShape(*key[4]) for key in compiled_figures_by_kernel()}
