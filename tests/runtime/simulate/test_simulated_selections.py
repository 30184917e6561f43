"""Simulations of patterns with selections: expected pairs against selected pairs, the ladder, errors."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import ArgumentError, ArgumentTypeError, Attention, UnsupportedError, compile_attention
from attnc.compiler.simulation.machine import MachineError
from attnc.compiler.simulation.simulation import CHOSEN_RUNGS, Simulation
from attnc.runtime.call.tensor_checks import TensorSizes
from attnc.runtime.cli import main
from attnc.runtime.executors.selections.counted import deciding

SHARED = """pattern shared(block: int = 16, topk: int = 3)
    select chosen
        over   b = k // block
        score  sum(dot(q, mean(b.k)) for head in group)
        keep   rank < topk
    visible k in chosen and k <= q
"""
"""A unit may select blocks behind its queries as well; these show no pair."""

BY_UNITS = """pattern by_units(tile: int = 16, topk: int = 2)
    select chosen
        per    a = q // tile
        over   b = k // tile
        score  dot(mean(a.q), mean(b.k))
        from   b < a
        keep   rank < topk
        always a == b
    visible k in chosen and k <= q
"""

WHOLE = """pattern whole(block: int = 16)
    select chosen
        over   b = k // block
        score  dot(q, mean(b.k))
        from   b.end <= q
        keep   score > 0.5
        always q in b
    visible k in chosen and k <= q
"""

TOGETHER = """pattern together(block: int = 16)
    select chosen
        per    head
        over   q, b = k // block
        score  dot(q, mean(b.k))
        keep   rank < 2 * queries
    visible k in chosen
"""


MASS = """pattern mass(block: int = 64)
    align end
    select chosen
        over   b = k // block
        score  dot(q, mean(b.k))
        from   b.end <= q
        keep   mass < 1
        always q in b
    visible k in chosen and k <= q
"""


def draw_qkv(n: int, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    return [torch.randn(1, h, n, 8) for h in (heads, kv_heads, kv_heads)]


def visible_pairs(attend: Attention, n: int) -> int:
    """Return the number of visible pairs in a call of random tensors."""
    q, k, v = draw_qkv(n)
    masks = [attend.mask(n, q=q, k=k, v=v, head=head, heads=4, kv_heads=2) for head in range(4)]
    return sum(int(mask.sum()) for mask in masks)


def simulated(attend: Attention, n: int, **options: Any) -> Simulation:
    return attend.simulate(n, heads=4, kv_heads=2, head_dim=8, device="cpu", **options)


@pytest.mark.parametrize("n", [1, 15, 200, 333])
@pytest.mark.parametrize("spec", ["moba", BY_UNITS, TOGETHER], ids=["moba", "by_units", "together"])
def test_pairs_that_do_not_depend_on_the_selection(spec: str, n: int) -> None:
    """Every full block before a query has equally many pairs, whichever blocks are selected."""
    params: dict[str, Any] = {"block": 16, "topk": 3} if spec == "moba" else {}
    attend = compile_attention(spec, **params)
    if spec == TOGETHER and n % 16:
        n -= n % 16  # otherwise the last block is shorter
    if n:
        assert simulated(attend, n).visible == visible_pairs(attend, n)
    assert simulated(attend, 0).predicted_ms == 0


def test_pairs_that_depend_on_the_selection(n: int = 200) -> None:
    """If blocks differ, the simulation expects a random selection, and its note states the maximum."""
    attend = compile_attention(SHARED)
    simulation = simulated(attend, n)
    counts = [visible_pairs(attend, n) for _ in range(12)]
    assert simulation.visible == pytest.approx(sum(counts) / len(counts), rel=0.03)
    (note,) = (note for note in simulation.notes if "at most" in note and "expected" in note)
    maximum = int(note.split("expected, ")[1].split(" at most")[0].replace(",", ""))
    assert max(counts) <= maximum
    assert simulation.visible is not None and simulation.visible < maximum


def test_selections_by_content_assume_every_candidate() -> None:
    """A threshold may keep every candidate."""
    attend, n = compile_attention(WHOLE), 160
    simulation = simulated(attend, n)
    assert simulation.visible == 4 * n * (n + 1) // 2
    assert any("the maximum is assumed" in note for note in simulation.notes)


def test_lengths_beyond_the_sample() -> None:
    """Long calls are sampled by query; the pairs of moba follow from arithmetic."""
    n, block, topk = 8192, 64, 3
    attend = compile_attention("moba", block=block, topk=topk)
    exact = 4 * sum(min(q // block, topk - 1) * block + q % block + 1 for q in range(n))
    assert simulated(attend, n).visible == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize("name", ["moba", "native_sparse"])
def test_ladder_on_a_cpu(name: str, stage: Any) -> None:
    """Each rung includes the costs of the rung above; the selection comes last and is part of the forward alone."""
    attend = compile_attention(name, block=64)
    simulation = (
        attend.simulate(2048, heads=4, kv_heads=2, head_dim=64, device="cpu", baseline="causal", stage=stage)
        if (name == "moba")
        else attend.simulate(2048, heads=4, kv_heads=2, head_dim=64, device="cpu", stage=stage)
    )
    assert tuple(rung.name for rung in simulation.rungs) == CHOSEN_RUNGS
    speedups = [rung.speedup for rung in simulation.rungs]
    assert speedups == sorted(speedups, reverse=True)
    assert simulation.rung("predicted").speedup == pytest.approx(simulation.ideal_ms / simulation.predicted_ms)
    assert simulation.rung("attended").speedup > simulation.rung("listed").speedup
    chosen_later = simulation.rung("listed").speedup > simulation.rung("predicted").speedup
    assert chosen_later == (stage == "forward")
    assert all(rung.lost_to in str(simulation) for rung in simulation.rungs)


def test_refusals() -> None:
    """Patterns that cannot be simulated are refused with a reason."""
    with pytest.raises(UnsupportedError, match="cannot be simulated on a CPU yet"):
        compile_attention("token_sparse").simulate(256, heads=2, device="cpu")
    with pytest.raises(UnsupportedError, match="simulation of decode is not supported yet for `moba`"):
        compile_attention("moba").simulate(1, 1024, device="cpu", stage="decode")
    with pytest.raises(UnsupportedError, match="simulation of decode is not supported yet for `moba`"):
        compile_attention("moba").simulate(1, 1024, stage="decode")
    with pytest.raises(ArgumentError, match="causal attention is not a valid baseline"):
        compile_attention("vmoba", frames=4, height=8, width=8).simulate(256, device="cpu", baseline="causal")
    with pytest.raises(ArgumentError, match="tile and order are options for GPUs"):
        compile_attention("moba").simulate(1024, device="cpu", tile=(64, 64))
    with pytest.raises(ArgumentError, match="the kernels of selected keys have their own"):
        compile_attention("moba").simulate(1024, tile=(64, 64))
    with pytest.raises(MachineError, match="not in float64"):
        compile_attention("moba").simulate(1024, dtype=torch.float64)


@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_inputs_that_define_blocks_are_required(device: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"`svg2` needs the input `qc`: int\[batch, head, query\]"):
        compile_attention("svg2").simulate(100, device=device)
    with pytest.raises(ArgumentTypeError, match=r"`svg2` needs the input `kc`: int\[batch, kv_head, key\]"):
        compile_attention("svg2").simulate(100, heads=2, device=device, qc=torch.zeros(1, 2, 100, dtype=torch.int64))


def test_inputs_that_define_an_order_are_required() -> None:
    with pytest.raises(ArgumentTypeError, match=r"`ssa_random` needs the input `place`: real\[batch, token\]"):
        compile_attention("ssa_random").simulate(64)


# --- single keys, GPUs -----------------------------------------------------------------------------------------------

KEYS = """pattern keys(kept: int = 24)
    align end
    select chosen
        over   k
        score  dot(q, k)
        from   k <= q
        keep   rank < kept
    visible k in chosen
"""


@pytest.mark.parametrize("n", [1, 20, 200, 500])
def test_single_keys(n: int) -> None:
    """Blocks of rows meet every candidate key, and every row keeps as many keys as it can."""
    attend = compile_attention(KEYS)
    simulation = simulated(attend, n)
    assert simulation.visible == visible_pairs(attend, n) == 4 * sum(min(q + 1, 24) for q in range(n))
    assert simulation.rung("attended").speedup == simulation.rung("listed").speedup
    assert simulation.rung("listed").lost_to == "lists 0% of the time"
    assert simulation.choices[0].how.endswith("chosen tiles")
    longer = simulated(attend, 2 * n)
    assert longer.predicted_ms > simulation.predicted_ms


def test_several_selections_assume_every_candidate() -> None:
    """Several selections are simulated with every candidate selected."""
    attend = compile_attention("minference_vertical_slash", columns=8, slashes=8, probe=16)
    simulation = attend.simulate(96, heads=4, kv_heads=2, head_dim=8, device="cpu")
    assert simulation.visible == 4 * 96 * 97 // 2
    assert any("the maximum is assumed" in note for note in simulation.notes)


@pytest.mark.parametrize("device", ["a100", "h100", "b200"])
@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize("name", ["moba", "native_sparse"])
def test_ladder_of_a_gpu(name: str, stage: Any, device: str) -> None:
    """Each rung includes the costs of the rung above; pairs equal the CPU's; a note says that no time was measured."""
    attend = compile_attention(name, block=64)
    size: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 64, "stage": stage}
    simulation = attend.simulate(4096, device=device, **size)
    assert tuple(rung.name for rung in simulation.rungs) == CHOSEN_RUNGS
    speedups = [rung.speedup for rung in simulation.rungs]
    assert speedups == sorted(speedups, reverse=True)
    assert simulation.rung("predicted").speedup == pytest.approx(simulation.ideal_ms / simulation.predicted_ms)
    assert (simulation.rung("listed").speedup > simulation.rung("predicted").speedup) == (stage == "forward")
    on_cpu = attend.simulate(4096, device="cpu", **size)
    if name == "moba":
        assert simulation.visible == on_cpu.visible
    assert any("never compared with a measurement" in note for note in simulation.notes)
    assert simulation.estimated and not simulation.calibrated
    assert all(rung.lost_to in str(simulation) for rung in simulation.rungs)
    assert 0 < simulation.traffic.least <= simulation.traffic.held


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_single_keys_on_a_gpu(stage: Any) -> None:
    """Kernels test each pair in tiles of all candidates; the visible pairs are the selected ones."""
    n, kept, heads = 4096, 512, 4
    size: dict[str, Any] = {"heads": heads, "head_dim": 64, "stage": stage}
    arguments: dict[str, Any] = {**size, "bias": torch.zeros(1, heads, n)}
    simulation = compile_attention("dynamic_mask", keys_kept=kept).simulate(n, **arguments)
    open_to_all = compile_attention("full").simulate(n, **size)
    assert simulation.tiles.live == simulation.tiles.partial == open_to_all.tiles.live
    assert simulation.visible is not None
    assert open_to_all.visible is not None
    assert simulation.visible < open_to_all.visible
    assert simulation.ideal_ms / simulation.rung("attended").speedup > open_to_all.predicted_ms
    assert (simulation.rung("listed").speedup > simulation.rung("predicted").speedup) == (stage == "forward")
    assert any("assumed to be scattered" in note for note in simulation.notes)


def test_some_members_represent_others() -> None:
    """A family with one branch per cluster: twice the branches take twice the time, even if some stand for others."""
    times = []
    for clusters in (4, 8, 16, 32):
        attend = compile_attention("routing_transformer", size=128)
        inputs: dict[str, Any] = {name: torch.zeros(2, clusters, 64, 64) for name in ("memory_k", "memory_v")}
        inputs["mu"] = torch.zeros(2, clusters, 64)
        simulation = attend.simulate(1024, heads=2, head_dim=64, **inputs)
        times.append(simulation.ideal_ms / simulation.rung("attended").speedup)
    assert [after / before for before, after in pairwise(times)] == pytest.approx([2, 2, 2])
    assert any("each represents" in note for note in simulation.notes)


def test_tiles_on_a_gpu_follow_from_the_sizes() -> None:
    """Every query selects every block before its own, so queries and keys fill all tiles."""
    n, block = 512, 128  # no more queries than the simulation samples
    attend = compile_attention("moba", block=block, topk=n // block)
    simulation = attend.simulate(n, heads=2, head_dim=64)
    (choice,) = simulation.choices
    rows = [n - (i + 1) * block + 1 for i in range(n // block)]  # the last row of a block sees the whole block
    full = sum(-(-r // choice.q_tile) * (block // choice.k_tile) for r in rows)
    part = sum(-(-block // choice.q_tile) * (block // choice.k_tile) for _ in rows)
    assert (simulation.tiles.full, simulation.tiles.partial) == (2 * full, 2 * part)
    assert simulation.visible == 2 * n * (n + 1) // 2


def test_longer_calls_and_larger_selections_take_longer() -> None:
    """Checked on the CPU and on a GPU."""
    for device in ("cpu", "h100"):
        small_selection, large_selection = (compile_attention("moba", block=64, topk=topk) for topk in (2, 8))
        shape: dict[str, Any] = {"heads": 4, "head_dim": 64, "device": device}
        assert (
            small_selection.simulate(8192, **shape).predicted_ms < large_selection.simulate(8192, **shape).predicted_ms
        )
        assert (
            small_selection.simulate(4096, **shape).predicted_ms < small_selection.simulate(8192, **shape).predicted_ms
        )


def test_counts_of_a_selections_operations() -> None:
    """`moba` computes a dot product and a rank per row and block; `native_sparse` sums over its heads."""
    sizes = TensorSizes(512, 512, 2, 4, 1, 64, 64, "float32")
    (moba,) = compile_attention("moba", block=64)._pattern.selections
    moba_counts = deciding(moba, sizes, 512, 8)
    assert (moba_counts.rows, moba_counts.places, moba_counts.ordered) == (2 * 4 * 512, 2 * 4 * 512 * 8, 0)
    assert moba_counts.products == moba_counts.places
    assert moba_counts.operations == 0
    assert moba_counts.pooled == 2 * 1 * 512 * 64
    (native,) = compile_attention("native_sparse")._pattern.selections
    native_counts = deciding(native, sizes, 512, 8)
    assert (native_counts.rows, native_counts.places) == (2 * 512, 2 * 512 * 8)
    assert native_counts.products == 4 * native_counts.places
    assert native_counts.operations > 4 * native_counts.places
    assert native_counts.tests > 0
    (mass,) = compile_attention(MASS)._pattern.selections
    assert deciding(mass, sizes, 512, 8).ordered == 2 * 4 * 512 * 8


def test_sizes_of_inputs_are_read() -> None:
    """The shapes of pooled gates determine the numbers of rows and columns."""
    attend = compile_attention("seer", block=16)
    assert attend.relation_inputs == {"gq", "gk"}
    gates: dict[str, Any] = {name: torch.randn(1, 2, 8, 4) for name in ("gq", "gk")}
    assert attend.simulate(128, heads=2, device="cpu", **gates).visible == 2 * 128 * 129 // 2


def test_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`simulate` with its report, and `receptive`, count what may be selected."""
    page = tmp_path / "page.html"
    small = ["--device", "cpu", "--len", "1024", "--heads", "2", "--head-dim", "32"]
    assert main(["simulate", "moba", "-p", "block=64", *small]) == 0
    text = capsys.readouterr().out
    assert "the selection" in text
    assert "its visible keys are selected by content, by `chosen`" in text
    assert "break-even" in text
    assert main(["simulate", "moba", "-p", "block=64", *small, "-o", str(page)]) == 0
    assert all(f'id="ladder-{name}"' in page.read_text(encoding="utf-8") for name in CHOSEN_RUNGS)
    capsys.readouterr()
    assert main(["receptive", "moba", "-p", "block=64", "--len", "512"]) == 0
    assert "a token counts as seeing every key that may be selected" in capsys.readouterr().out
