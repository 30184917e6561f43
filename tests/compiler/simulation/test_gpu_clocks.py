"""Clocks and resources of tiles by formulas, against figures read from Triton's machine code for equal tiles."""

from __future__ import annotations

import pytest

from attnc.compiler.ir import Index, fold
from attnc.compiler.kernels.kernel_source import TileShape
from attnc.compiler.simulation import gpu_clocks
from attnc.compiler.simulation.gpu_clocks import (
    BITMASK,
    Extra,
    HeadSizes,
    Kernel,
    TileModel,
    given_shape,
    resources,
    tile_shapes,
)
from attnc.compiler.simulation.machine import Machine, MachineError, find_machine
from attnc.compiler.simulation.mask_cost import mask_operations

H100, A100, B200 = (find_machine(name) for name in ("h100", "a100", "b200"))


@pytest.fixture(autouse=True)
def formulas_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the measured figures of attnc's own kernels (`test_compiled_figures.py`)."""
    monkeypatch.setattr(gpu_clocks, "find_figures", lambda *arguments: None)


# d, q tile, k tile, warps, stages; clocks of mma, xu, alu, fma, issue; registers, shared KiB, programs
READ = [
    (64, 64, 64, 4, 3, 256, 272, 124, 120, 277, 107, 56, 3),
    (64, 128, 64, 4, 3, 512, 544, 232, 224, 491, 190, 64, 2),
    (64, 128, 128, 8, 3, 1024, 1056, 436, 372, 872, 154, 112, 1),
    (128, 64, 64, 4, 3, 512, 272, 132, 168, 336, 142, 112, 2),
    (128, 128, 64, 8, 3, 1024, 544, 248, 304, 660, 139, 128, 1),
    (128, 64, 128, 4, 2, 1024, 528, 252, 264, 527, 205, 144, 1),
    (128, 128, 128, 8, 2, 2048, 1056, 472, 464, 1006, 195, 160, 1),
    (256, 64, 64, 4, 2, 1024, 272, 170, 264, 477, 240, 160, 1),
    (256, 128, 64, 8, 2, 2048, 544, 280, 464, 884, 211, 192, 1),
]


@pytest.mark.parametrize("row", READ, ids=lambda row: f"d{row[0]}-{row[1]}x{row[2]}-w{row[3]}")
def test_forward_tiles(row: tuple[int, ...]) -> None:
    d, q_tile, k_tile, warps, stages, mma, xu, alu, fma, issue, registers, shared, programs = row
    shape, heads = TileShape(q_tile, k_tile, warps, stages), HeadSizes(d, d, "bfloat16")
    clocks = TileModel(H100, "forward", shape, heads, Extra()).full
    assert clocks.products == mma
    # exponentials of row maxima are counted once a tile in Triton, and for each warp here: 1 % of them
    assert clocks.exps == pytest.approx(xu, rel=0.06)
    assert clocks.alu == pytest.approx(alu, rel=0.35)
    assert clocks.fma == pytest.approx(fma, rel=0.20)
    assert clocks.issue == pytest.approx(issue, rel=0.20)
    figures = resources(H100, "forward", shape, heads)
    assert figures.registers == pytest.approx(registers, rel=0.25)
    assert figures.shared_kib == pytest.approx(shared, abs=8)
    assert 1 <= figures.programs <= programs


# tiles that were seen to spill, and tiles that were seen not to
SPILLS: list[tuple[str, Kernel, int, TileShape, bool]] = [
    ("h100", "dkdv", 64, TileShape(128, 64, 4, 2), False),
    ("h100", "dkdv", 64, TileShape(64, 64, 4, 2), True),
    ("h100", "dkdv", 64, TileShape(128, 128, 8, 2), False),
    ("h100", "dkdv", 128, TileShape(64, 128, 8, 2), True),
    ("h100", "dkdv", 128, TileShape(128, 128, 8, 2), False),
    ("h100", "dq", 64, TileShape(128, 64, 4, 2), True),
    ("h100", "dq", 128, TileShape(64, 64, 4, 2), True),
    ("h100", "dq", 128, TileShape(128, 64, 4, 2), False),
    ("a100", "forward", 64, TileShape(128, 128, 4, 2), False),
    ("a100", "forward", 64, TileShape(128, 128, 8, 3), True),
    ("a100", "forward", 128, TileShape(128, 64, 4, 2), False),
    ("a100", "forward", 128, TileShape(128, 64, 8, 2), True),
    ("b200", "forward", 128, TileShape(128, 128, 8, 2), True),
]


@pytest.mark.parametrize(("name", "kernel", "d", "shape", "fits"), SPILLS)
def test_tiles_that_fit_the_registers(name: str, kernel: Kernel, d: int, shape: TileShape, fits: bool) -> None:
    figures = resources(find_machine(name), kernel, shape, HeadSizes(d, d, "bfloat16"))
    assert (figures.programs > 0) == fits
    assert (figures.reason is None) == fits


@pytest.mark.parametrize("machine", [A100, H100, B200], ids=lambda m: m.name)
@pytest.mark.parametrize("d", [16, 64, 128, 256])
def test_every_machine_has_tiles_for_every_kernel(machine: Machine, d: int) -> None:
    kernels: tuple[Kernel, ...] = ("forward", "dq", "dkdv")
    for kernel in kernels:
        shapes = tile_shapes(machine, kernel, HeadSizes(d, d, "bfloat16"))
        assert shapes
        assert all(resources(machine, kernel, s, HeadSizes(d, d, "bfloat16")).programs for s in shapes)


@pytest.mark.parametrize(
    ("tiles", "said"),
    [
        ((100, 64), "a q tile of 100 is not supported: use a power of two from 16 to 1024"),
        ((64, 8), "a k tile of 8"),
        ((0, 64), "a q tile of 0"),
        ((1024, 1024), "tiles of 1024×1024 with head dimensions 128 and 128 in bfloat16 do not fit h100-sxm"),
    ],
)
def test_impossible_tiles(tiles: tuple[int, int], said: str) -> None:
    with pytest.raises(MachineError, match=said):
        given_shape(H100, "forward", HeadSizes(128, 128, "bfloat16"), *tiles)


def test_a_head_that_no_tile_fits() -> None:
    with pytest.raises(MachineError, match=r"no tile with head dimensions 4096 and 4096 in bfloat16 fits .* of h100"):
        tile_shapes(H100, "forward", HeadSizes(4096, 4096, "bfloat16"))


Q, K = fold.place("q"), fold.place("k")
GAP = fold.sub(Q, K)

# alu clocks that the mask adds to a tile of 128 × 64; an operation on every element takes 128
MASKS: list[tuple[str, Index, int]] = [
    ("causal", fold.less_equal(K, Q), 492 - 232),
    ("window", fold.conjunction(fold.less_equal(K, Q), fold.less(GAP, fold.const(99))), 758 - 232),
]


@pytest.mark.parametrize(("name", "relation", "clocks"), MASKS, ids=[name for name, *_ in MASKS])
def test_a_mask_costs_as_much_as_its_expression(name: str, relation: Index, clocks: int) -> None:
    assert mask_operations(relation) * 128 == pytest.approx(clocks, rel=0.1)


def test_a_mask_costs_no_more_than_a_bitmask() -> None:
    dear = fold.conjunction(*(fold.equal(fold.mod(GAP, fold.const(d)), fold.const(1)) for d in (3, 5, 7, 11)))
    assert mask_operations(dear) == BITMASK
    assert mask_operations(fold.truth(True)) == 1.0


def test_partial_tiles_take_longer() -> None:
    model = TileModel(H100, "forward", TileShape(128, 64, 4, 3), HeadSizes(64, 64, "bfloat16"), Extra(mask=4.0))
    assert model.partial.alu > model.full.alu
    assert model.predicted(model.partial) > model.predicted(model.full)
    assert model.full.bound < model.full.serial
