"""Ladders: published bounds, the order of rungs, monotonicity, floors, and refused arguments."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attnc import compile_attention
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import fold
from attnc.compiler.simulation import natural_tiles
from attnc.compiler.simulation.candidates import ScheduleRequest
from attnc.compiler.simulation.gpu_clocks import Extra
from attnc.compiler.simulation.gpu_ladder import simulate_gpu
from attnc.compiler.simulation.machine import MachineError, find_machine
from attnc.compiler.simulation.simulated_call import SimulatedCall, SimulatedRelation
from attnc.compiler.simulation.simulation import PASSES, Pass, Shape, Simulation
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.texts.library import pattern_names
from attnc.spec.errors import EvaluationError
from expression_trees import Tree, build
from library_calls import library_call
from relations import relations
from tiers import examples

VIDEO: dict[str, Any] = {"frames": 30, "height": 48, "width": 80, "window": [18, 24, 24]}
PICTURE: dict[str, Any] = {"height": 256, "width": 256, "window": [80, 80]}


def simulated(name: str, n: int, heads: int = 24, **params: Any) -> Simulation:
    return compile_attention(name, **params).simulate(n, heads=heads)


def speedups(simulation: Simulation) -> list[float]:
    return [rung.speedup for rung in simulation.rungs]


# --- published bounds ------------------------------------------------------------------------------------------------


def test_a_window_shared_by_256_queries() -> None:
    """GNA, 1-D, 32768 tokens, window 2048, stride 256: 16 times."""
    simulation = simulated("neighborhood_1d", 32768, heads=1, window=2048, stride=256)
    assert simulation.rung("element").speedup == simulation.rung("tile").speedup == 16
    assert simulation.tiles.partial == 0


def test_a_picture_in_tiles() -> None:
    """FLUX at 4K, 256 × 256, window 80 × 80, stride 16 × 16: 10.24 times, no partial tile."""
    simulation = simulated("neighborhood_2d", 65536, **PICTURE, stride=[16, 16])
    assert simulation.rung("tile").speedup == pytest.approx(10.24)
    assert simulation.tiles.partial == 0
    assert simulation.choices[0].order.kind == "bricks"


def test_a_video_in_tiles() -> None:
    """HunyuanVideo, 30 × 48 × 80, window 18 × 24 × 24, stride 16 × 8 × 8: 11.11 times, no partial tile."""
    simulation = simulated("neighborhood_3d", 115200, **VIDEO, stride=[16, 8, 8])
    assert simulation.rung("tile").speedup == pytest.approx(100 / 9)
    assert simulation.tiles.partial == 0


@pytest.mark.parametrize(
    ("name", "n", "params", "published"),
    [("neighborhood_2d", 65536, PICTURE, 6.1), ("neighborhood_3d", 115200, VIDEO, 3.3)],
)
def test_exact_counts_and_searched_bricks_beat_the_published_bounds(
    name: str, n: int, params: dict[str, Any], published: float
) -> None:
    """The published bounds count the worst tile for every tile (PERFORMANCE of NATTEN's simulator)."""
    attention = compile_attention(name, **params)
    simulation = attention.simulate(n, heads=24, tile=(128, 128))
    assert published < simulation.rung("tile").speedup < simulation.rung("element").speedup
    sides = simulation.choices[0].order
    assert sides.q_brick and sides.k_brick
    free = attention.simulate(n, heads=24)
    assert free.predicted_ms <= simulation.predicted_ms


# --- the ladder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [389, 1000])
@pytest.mark.parametrize("name", pattern_names())
def test_rungs_are_ordered(name: str, n: int) -> None:
    call = library_call(name, n)
    for device in ("h100", "cpu"):
        simulation = call.attention.simulate(call.n, heads=call.heads, head_dim=64, device=device, **call.inputs)
        rungs = speedups(simulation)
        assert rungs == sorted(rungs, reverse=True)
        assert all(rung > 0 for rung in rungs)
        assert all(rung.lost_to for rung in simulation.rungs)
        assert simulation.predicted_ms > 0 and simulation.dense_ms >= simulation.ideal_ms > 0
        assert simulation.tiles.full + simulation.tiles.partial == simulation.tiles.live
        if simulation.visible is not None:
            rival = (
                call.n * (call.n + 1) // 2 * call.heads if simulation.baseline == "causal" else simulation.shape.pairs
            )
            assert simulation.rung("element").speedup == pytest.approx(rival / simulation.visible)


@pytest.mark.parametrize("stage", PASSES)
@pytest.mark.parametrize("device", ["a100", "h100", "h200", "b200", "cpu"])
def test_every_machine_and_pass(device: str, stage: Pass) -> None:
    attention = compile_attention("sliding_window", window=256, sinks=3)
    n_q = 3 if stage == "decode" else 1500
    for baseline in ("full", "causal"):
        simulation = attention.simulate(n_q, 1500, heads=8, kv_heads=2, device=device, stage=stage, baseline=baseline)
        assert speedups(simulation) == sorted(speedups(simulation), reverse=True)
        assert (simulation.stage, simulation.baseline, simulation.causal) == (stage, baseline, True)
        visible = attention.mask(n_q, 1500).sum().item()
        assert simulation.visible == 8 * visible
        assert str(simulation).count("×") >= 4


def test_against_causal_attention_half_the_speedup_remains() -> None:
    attention = compile_attention("sliding_window", window=512)
    full, causal = (attention.simulate(16384, baseline=baseline) for baseline in ("full", "causal"))
    assert causal.rung("element").speedup == pytest.approx(full.rung("element").speedup / 2, rel=0.01)
    assert causal.dense_ms < 0.6 * full.dense_ms
    assert causal.predicted_ms == full.predicted_ms
    with pytest.raises(ArgumentError, match="`full` shows keys behind their queries"):
        compile_attention("full").simulate(1024, baseline="causal")


def test_causal_attention_against_itself() -> None:
    simulation = compile_attention("causal").simulate(8192, baseline="causal")
    assert simulation.rung("element").speedup == simulation.rung("tile").speedup == 1
    assert simulation.speedup == pytest.approx(1, rel=0.02)
    assert simulated("full", 8192).speedup == pytest.approx(1, rel=0.02)


def problem_of_relation(relation: Any, n: int, heads: int = 3) -> SimulatedCall:
    shape = Shape(1, heads, heads, n, n, 64, 64, "bfloat16")
    return SimulatedCall("drawn", {}, shape, 0, (SimulatedRelation(relation, n, n, 0, heads, {}),), Extra(2.0), 1, ())


@settings(max_examples=examples(60))
@given(relations(), relations(), st.integers(1, 700))
def test_a_bound_never_falls_when_the_relation_shrinks(one: Tree, other: Tree, n: int) -> None:
    """The property holds for fixed tiles and order."""
    large = build(one)
    small = fold.conjunction(large, build(other))
    try:
        masks = [exact_evaluation.mask(relation, (0, n), (0, n)) for relation in (large, small)]
    except EvaluationError:
        assume(False)
        raise
    assume(masks[1].any())
    machine, wish = find_machine("h100"), ScheduleRequest((64, 64), "natural")
    a, b = (simulate_gpu(problem_of_relation(r, n), machine, wish=wish) for r in (large, small))
    for before, after in zip(a.rungs[:3], b.rungs[:3], strict=True):
        assert after.speedup >= before.speedup * (1 - 1e-12)


def test_split_keys_keep_every_tile() -> None:
    simulation = simulate_gpu(problem_of_relation(fold.truth(True), 8192, heads=1), find_machine("h100"))
    assert simulation.tiles.live * simulation.choices[0].q_tile * simulation.choices[0].k_tile == 8192**2
    assert "split in" in simulation.choices[0].how  # 64 rows of tiles would leave half of the machine idle


MILLION = [
    "causal",
    "sliding_window",
    "power",
    "strided",
    "dilated_window",
    "neighborhood_1d",
    "sparse_fixed",
    "log_sparse",
]


@pytest.mark.parametrize("name", MILLION)
def test_a_million_tokens(name: str) -> None:
    call = library_call(name, 1 << 20)
    simulation = call.attention.simulate(call.n, heads=1)
    assert simulation.visible is not None
    assert simulation.tiles.total >= simulation.tiles.live > 0
    assert speedups(simulation) == sorted(speedups(simulation), reverse=True)


# --- heads, branches, documents --------------------------------------------------------------------------------------


def test_heads_that_differ_are_counted_apart() -> None:
    attention = compile_attention("sparse_transformer", stride=128)
    simulation = attention.simulate(2048, heads=4)
    assert simulation.visible == sum(int(attention.mask(2048, head=head, heads=4).sum()) for head in range(4))


def test_several_attentions_are_counted_together() -> None:
    attention = compile_attention("differential")
    simulation = attention.simulate(512, heads=2)
    assert simulation.visible == 2 * 2 * 512 * 513 // 2
    assert any("2 attentions" in note for note in simulation.notes)


def test_documents() -> None:
    ids = torch.tensor([[0] * 300 + [1] * 500 + [2] * 224])
    simulation = compile_attention("document").simulate(1024, heads=2, doc=ids)
    assert simulation.visible == 2 * sum(n * (n + 1) // 2 for n in (300, 500, 224))


# --- floors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1, 0.2, 0.001])
def test_the_floor_of_radial_attention(decay: float) -> None:
    """18 frames of 3840 tokens: however small the decay, neighbours, the narrowest window and the sink stay."""
    attention = compile_attention("radial", frames=18, per_frame=3840, decay=decay)
    (floor,) = attention.floors(18 * 3840)
    assert (floor.parameter, floor.least) == ("decay", Fraction(0))
    assert floor.density == pytest.approx(0.2871, abs=1e-4)
    shares = {text: count / floor.pairs for text, count in floor.causes if count}
    assert shares.keys() == {
        "first_frame_sink and k.t == 0",
        "gap <= 1",
        "abs(q.s - k.s) <= max(reach * decay, block)",
    }
    assert shares["first_frame_sink and k.t == 0"] == pytest.approx(1 / 18)
    assert shares["gap <= 1"] == pytest.approx((18 + 2 * 17) / 18**2)
    assert str(floor).startswith("the density does not fall below 28.71%, with decay = 0: `first_frame_sink")


def test_no_floor_without_a_real_parameter() -> None:
    assert compile_attention("sliding_window").floors(64) == ()
    assert compile_attention("affine_scaled").floors(64) == ()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"device": "h1000"}, MachineError, "unknown machine `h1000`"),
        ({"tile": (100, 64)}, MachineError, "power of two"),
        ({"tile": (1024, 1024)}, MachineError, "do not fit"),
        ({"order": "bricks"}, MachineError, "reads no grid of tokens"),
        ({"order": "residues"}, MachineError, "has no congruence"),
        ({"order": "random"}, ArgumentError, "order is 'random'"),
        ({"stage": "training"}, ArgumentError, "stage is 'training'"),
        ({"stage": "decode"}, MachineError, "decode takes 1 to 16 queries, got 64"),
        ({"baseline": "flash"}, ArgumentError, "baseline is 'flash'"),
        ({"heads": 0}, ArgumentError, "heads is 0"),
        ({"head_dim": -1}, ArgumentError, "head_dim is -1"),
        ({"dtype": torch.float64}, MachineError, "not in float64"),
        ({"head_dim": 4096}, MachineError, "no tile with head dimensions 4096"),
        ({"device": "cpu", "tile": (64, 64)}, ArgumentError, "tile and order are options for GPUs"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        compile_attention("causal").simulate(64, **arguments)


def test_a_pattern_without_visible_pairs() -> None:
    simulation = compile_attention("pattern blind\n    visible q < 0\n").simulate(64)
    assert speedups(simulation)[:3] == [float("inf")] * 3
    assert (simulation.visible, simulation.tiles.live) == (0, 0)
    assert "nothing to do" in str(simulation)


def test_too_many_tiles_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles without another order or repetition are sampled; the report says so, and the count is close."""
    attention = compile_attention("radial", frames=8, per_frame=1024, first_frame_sink=False)
    exact_ = attention.simulate(8192, heads=1, tile=(128, 128))
    monkeypatch.setattr(natural_tiles, "HUGE", 1)
    monkeypatch.setattr(natural_tiles, "SOME", 64)
    simulation = attention.simulate(8192, heads=1, tile=(128, 128))
    assert simulation.estimated and not exact_.estimated
    said = "estimated: there are too many tiles to count, so pairs, tiles and bounds are extrapolated from 32 rows"
    assert any(note.startswith(said) for note in simulation.notes)
    assert simulation.tiles.live == pytest.approx(exact_.tiles.live, rel=0.05)
    assert simulation.visible == pytest.approx(exact_.visible, rel=0.05)
