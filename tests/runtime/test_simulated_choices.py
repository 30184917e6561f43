"""Simulations of patterns that choose: what they expect against what is chosen, the ladder, what is refused."""

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
from attnc.runtime.cli import main
from attnc.runtime.selections.counted import deciding
from attnc.runtime.tensor_checks import TensorSizes

SHARED = """pattern shared(block: int = 16, topk: int = 3)
    select chosen
        over   b = k // block
        score  sum(dot(q, mean(b.k)) for head in group)
        keep   rank < topk
    visible k in chosen and k <= q
"""
"""Blocks behind a query may be chosen too, and show nothing."""

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


def drawn(n: int, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    return [torch.randn(1, h, n, 8) for h in (heads, kv_heads, kv_heads)]


def seen(attend: Attention, n: int) -> int:
    """Pairs that are visible in a call of random tensors."""
    q, k, v = drawn(n)
    masks = [attend.mask(n, q=q, k=k, v=v, head=head, heads=4, kv_heads=2) for head in range(4)]
    return sum(int(mask.sum()) for mask in masks)


def simulated(attend: Attention, n: int, **options: Any) -> Simulation:
    return attend.simulate(n, heads=4, kv_heads=2, head_dim=8, device="cpu", **options)


@pytest.mark.parametrize("n", [1, 15, 200, 333])
@pytest.mark.parametrize("spec", ["moba", BY_UNITS, TOGETHER], ids=["moba", "by_units", "together"])
def test_pairs_that_do_not_depend_on_the_choice(spec: str, n: int) -> None:
    """Whole places before a query are alike: as many pairs are visible whichever are chosen."""
    params: dict[str, Any] = {"block": 16, "topk": 3} if spec == "moba" else {}
    attend = compile_attention(spec, **params)
    if spec == TOGETHER and n % 16:
        n -= n % 16  # or the last block is shorter
    if n:
        assert simulated(attend, n).visible == seen(attend, n)
    assert simulated(attend, 0).predicted_ms == 0


def test_pairs_that_do(n: int = 200) -> None:
    """Where blocks differ, random ones are expected, and never more than the note says."""
    attend = compile_attention(SHARED)
    found = simulated(attend, n)
    counts = [seen(attend, n) for _ in range(12)]
    assert found.visible == pytest.approx(sum(counts) / len(counts), rel=0.03)
    (note,) = (note for note in found.notes if "at most" in note and "expected" in note)
    most = int(note.split("expected, ")[1].split(" at most")[0].replace(",", ""))
    assert max(counts) <= most
    assert found.visible is not None and found.visible < most


def test_what_content_counts_is_taken_whole() -> None:
    """A threshold may keep every candidate."""
    attend, n = compile_attention(WHOLE), 160
    found = simulated(attend, n)
    assert found.visible == 4 * n * (n + 1) // 2
    assert any("the maximum is assumed" in note for note in found.notes)


def test_lengths_beyond_the_sample() -> None:
    """Long calls are sampled by query; the pairs of moba follow from arithmetic."""
    n, block, topk = 8192, 64, 3
    attend = compile_attention("moba", block=block, topk=topk)
    exact = 4 * sum(min(q // block, topk - 1) * block + q % block + 1 for q in range(n))
    assert simulated(attend, n).visible == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize("name", ["moba", "native_sparse"])
def test_ladder(name: str, stage: Any) -> None:
    """Every rung counts what the one above does; the choice is the last, and is made in the forward."""
    attend = compile_attention(name, block=64)
    found = (
        attend.simulate(2048, heads=4, kv_heads=2, head_dim=64, device="cpu", baseline="causal", stage=stage)
        if (name == "moba")
        else attend.simulate(2048, heads=4, kv_heads=2, head_dim=64, device="cpu", stage=stage)
    )
    assert tuple(rung.name for rung in found.rungs) == CHOSEN_RUNGS
    speedups = [rung.speedup for rung in found.rungs]
    assert speedups == sorted(speedups, reverse=True)
    assert found.rung("predicted").speedup == pytest.approx(found.ideal_ms / found.predicted_ms)
    assert found.rung("attended").speedup > found.rung("listed").speedup
    chosen_later = found.rung("listed").speedup > found.rung("predicted").speedup
    assert chosen_later == (stage == "forward")
    assert all(rung.lost_to in str(found) for rung in found.rungs)


def test_refusals() -> None:
    """Patterns that are not simulated are refused in words."""
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
def test_an_input_that_says_where_places_lie(device: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"`svg2` needs the input `qc`: int\[batch, head, query\]"):
        compile_attention("svg2").simulate(100, device=device)
    with pytest.raises(ArgumentTypeError, match=r"`svg2` needs the input `kc`: int\[batch, kv_head, key\]"):
        compile_attention("svg2").simulate(100, heads=2, device=device, qc=torch.zeros(1, 2, 100, dtype=torch.int64))


def test_an_input_of_which_an_order_is_made() -> None:
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
    """Blocks of rows against all that they may choose, whatever that is: as many keys are kept as there may be."""
    attend = compile_attention(KEYS)
    found = simulated(attend, n)
    assert found.visible == seen(attend, n) == 4 * sum(min(q + 1, 24) for q in range(n))
    assert found.rung("attended").speedup == found.rung("listed").speedup
    assert found.rung("listed").lost_to == "lists nothing"
    assert found.choices[0].how.endswith("chosen tiles")
    whole = simulated(attend, 2 * n)
    assert whole.predicted_ms > found.predicted_ms


def test_several_choices_are_taken_whole() -> None:
    """Several selections are simulated as everything that they may select."""
    attend = compile_attention("minference_vertical_slash", columns=8, slashes=8, probe=16)
    found = attend.simulate(96, heads=4, kv_heads=2, head_dim=8, device="cpu")
    assert found.visible == 4 * 96 * 97 // 2
    assert any("the maximum is assumed" in note for note in found.notes)


@pytest.mark.parametrize("device", ["a100", "h100", "b200"])
@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize("name", ["moba", "native_sparse"])
def test_ladder_of_a_gpu(name: str, stage: Any, device: str) -> None:
    """Every rung counts what the one above does; pairs are those of the CPU; it says that no clock was asked."""
    attend = compile_attention(name, block=64)
    size: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 64, "stage": stage}
    found = attend.simulate(4096, device=device, **size)
    assert tuple(rung.name for rung in found.rungs) == CHOSEN_RUNGS
    speedups = [rung.speedup for rung in found.rungs]
    assert speedups == sorted(speedups, reverse=True)
    assert found.rung("predicted").speedup == pytest.approx(found.ideal_ms / found.predicted_ms)
    assert (found.rung("listed").speedup > found.rung("predicted").speedup) == (stage == "forward")
    on_cpu = attend.simulate(4096, device="cpu", **size)
    if name == "moba":
        assert found.visible == on_cpu.visible
    assert any("never held against a clock" in note for note in found.notes)
    assert found.estimated and not found.calibrated
    assert all(rung.lost_to in str(found) for rung in found.rungs)
    assert 0 < found.traffic.least <= found.traffic.held


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_single_keys_on_a_gpu(stage: Any) -> None:
    """Tiles of all that may be chosen, in each of which is asked; pairs are those that are kept."""
    n, kept, heads = 4096, 512, 4
    size: dict[str, Any] = {"heads": heads, "head_dim": 64, "stage": stage}
    given: dict[str, Any] = {**size, "bias": torch.zeros(1, heads, n)}
    found = compile_attention("dynamic_mask", keys_kept=kept).simulate(n, **given)
    open_to_all = compile_attention("full").simulate(n, **size)
    assert found.tiles.live == found.tiles.partial == open_to_all.tiles.live
    assert found.visible is not None
    assert open_to_all.visible is not None
    assert found.visible < open_to_all.visible
    assert found.ideal_ms / found.rung("attended").speedup > open_to_all.predicted_ms
    assert (found.rung("listed").speedup > found.rung("predicted").speedup) == (stage == "forward")
    assert any("assumed to be scattered" in note for note in found.notes)


def test_of_many_members_some_stand_for_others() -> None:
    """A family of as many branches as there are clusters: twice as many take twice the time, simulated or not."""
    times = []
    for clusters in (4, 8, 16, 32):
        attend = compile_attention("routing_transformer", size=128)
        given: dict[str, Any] = {name: torch.zeros(2, clusters, 64, 64) for name in ("memory_k", "memory_v")}
        given["mu"] = torch.zeros(2, clusters, 64)
        found = attend.simulate(1024, heads=2, head_dim=64, **given)
        times.append(found.ideal_ms / found.rung("attended").speedup)
    assert [after / before for before, after in pairwise(times)] == pytest.approx([2, 2, 2])
    assert any("each stands for" in note for note in found.notes)


def test_tiles_of_a_gpu_follow_from_the_sizes() -> None:
    """Where every query takes every block before its own: as many tiles as queries and keys fill."""
    n, block = 512, 128  # no more queries than are looked at
    attend = compile_attention("moba", block=block, topk=n // block)
    found = attend.simulate(n, heads=2, head_dim=64)
    (choice,) = found.choices
    rows = [n - (i + 1) * block + 1 for i in range(n // block)]  # the last row of a block sees all of it
    full = sum(-(-r // choice.q_tile) * (block // choice.k_tile) for r in rows)
    part = sum(-(-block // choice.q_tile) * (block // choice.k_tile) for _ in rows)
    assert (found.tiles.full, found.tiles.partial) == (2 * full, 2 * part)
    assert found.visible == 2 * n * (n + 1) // 2


def test_longer_and_more_chosen_takes_longer() -> None:
    """On the CPU and a GPU."""
    for device in ("cpu", "h100"):
        few, many = (compile_attention("moba", block=64, topk=topk) for topk in (2, 8))
        shape: dict[str, Any] = {"heads": 4, "head_dim": 64, "device": device}
        assert few.simulate(8192, **shape).predicted_ms < many.simulate(8192, **shape).predicted_ms
        assert few.simulate(4096, **shape).predicted_ms < few.simulate(8192, **shape).predicted_ms


def test_what_a_choice_is_made_of() -> None:
    """Counts of `moba`: a product of each row and place, and a rank; of `native_sparse` sums over its heads."""
    sizes = TensorSizes(512, 512, 2, 4, 1, 64, 64, "float32")
    (moba,) = compile_attention("moba", block=64)._pattern.selections
    found = deciding(moba, sizes, 512, 8)
    assert (found.rows, found.places, found.ordered) == (2 * 4 * 512, 2 * 4 * 512 * 8, 0)
    assert found.products == found.places
    assert found.operations == 0
    assert found.pooled == 2 * 1 * 512 * 64
    (native,) = compile_attention("native_sparse")._pattern.selections
    own = deciding(native, sizes, 512, 8)
    assert (own.rows, own.places) == (2 * 512, 2 * 512 * 8)
    assert own.products == 4 * own.places
    assert own.operations > 4 * own.places
    assert own.tests > 0
    (mass,) = compile_attention(MASS)._pattern.selections
    assert deciding(mass, sizes, 512, 8).ordered == 2 * 4 * 512 * 8


def test_inputs_whose_sizes_are_read() -> None:
    """Pooled gates say how many rows and columns there are."""
    attend = compile_attention("seer", block=16)
    assert attend.relation_inputs == {"gq", "gk"}
    gates: dict[str, Any] = {name: torch.randn(1, 2, 8, 4) for name in ("gq", "gk")}
    assert attend.simulate(128, heads=2, device="cpu", **gates).visible == 2 * 128 * 129 // 2


def test_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`simulate` with its report, `receptive`: what may be chosen."""
    page = tmp_path / "page.html"
    small = ["--device", "cpu", "--len", "1024", "--heads", "2", "--head-dim", "32"]
    assert main(["simulate", "moba", "-p", "block=64", *small]) == 0
    text = capsys.readouterr().out
    assert "the choice" in text
    assert "what it sees is chosen by content, by `chosen`" in text
    assert "break-even" in text
    assert main(["simulate", "moba", "-p", "block=64", *small, "-o", str(page)]) == 0
    assert all(f'id="ladder-{name}"' in page.read_text(encoding="utf-8") for name in CHOSEN_RUNGS)
    capsys.readouterr()
    assert main(["receptive", "moba", "-p", "block=64", "--len", "512"]) == 0
    assert "a token counts as seeing every key that may be selected" in capsys.readouterr().out
