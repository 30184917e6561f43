"""Simulated recurrences: work against the executor's own products, ladders, chunks, splits, refusals."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from itertools import pairwise, product
from typing import Any, Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from attnc import compile_attention
from attnc.compiler.planning.rates import AMX
from attnc.compiler.recurrences.recurrence_class import Corrected, RecurrenceClass
from attnc.compiler.simulation.machine import MachineError, find_machine, machine_names
from attnc.compiler.simulation.recurrent.chunk_work import (
    PassForm,
    backward,
    forward,
    levels,
    squares,
)
from attnc.compiler.simulation.recurrent.cpu_chunks import chunk_on_cpu, chunk_times
from attnc.compiler.simulation.recurrent.pass_plans import KERNELS, backward_plans, plans
from attnc.compiler.simulation.recurrent.recurrence_call import PassPart, call_of, own_sizes
from attnc.compiler.simulation.recurrent.recurrence_simulation import RUNGS, RecurrenceSimulation
from attnc.compiler.simulation.simulation import PASSES, Pass, Shape
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError
from attnc.runtime.cli import main
from attnc.runtime.executors.recurrent import chunk_forms, decays
from attnc.runtime.executors.recurrent import pattern_recurrence as calls
from attnc.runtime.executors.recurrent.linear import linear_recurrence
from attnc.runtime.executors.recurrent.linear_inputs import Delta, RankOne
from attnc.runtime.texts.library import recurrence_names
from recurrence_draws import example

PARAMETERS: dict[str, dict[str, Any]] = {
    "lingen_ma": {"frames": 4, "height": 16, "width": 32},
    "mhs_vm": {"height": 32, "width": 64},
    "spatial_mamba": {"height": 32, "width": 64},
}
TOKENS = 2048

CLASSES_IN_CHUNKS = ("retention", "mamba2_ssd", "delta_net", "gated_delta_net", "comba")
MOST_SLOWER = {"forward": 1.09, "backward": 1.24}

Gate = Literal["none", "scalar", "rows", "columns"]
Correction = Literal["none", "delta", "rank one"]
GATES: tuple[Gate, ...] = ("none", "scalar", "rows", "columns")
CORRECTIONS: tuple[Correction, ...] = ("none", "delta", "rank one")
CORRECTED: dict[Correction, Corrected] = {"none": "none", "delta": "comba", "rank one": "old"}
CLASSES: list[tuple[Gate, Correction]] = [
    (gate, correction) for gate, correction in product(GATES, CORRECTIONS) if gate != "columns" or correction == "none"
]


def form_of(rows: int, columns: int, gate: Gate, correction: Correction, micro: int = 1) -> PassForm:
    """Return a pass over a state of `rows` × `columns` with one read a token."""
    corrected = CORRECTED[correction]
    if gate == "columns":
        kind = RecurrenceClass(columns=True, correction=corrected, micro=micro)
    else:
        kind = RecurrenceClass(gate=gate, correction=corrected, micro=micro)
    return PassForm("S", "", rows, columns, kind, 1)


def simulated(name: str, tokens: int = TOKENS, **options: Any) -> RecurrenceSimulation:
    simulation = compile_attention(name, **PARAMETERS.get(name, {})).simulate(tokens, **options)
    assert isinstance(simulation, RecurrenceSimulation)
    return simulation


# --- the work of a chunk ---------------------------------------------------------------------------------------------


def executed(gate: Gate, correction: Correction, length: int, rows: int, width: int) -> tuple[int, int]:
    """Count the operations of the executor's matrix products over one chunk, forward and backward."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, 1, length, *shape, dtype=torch.float64)

    q, k, read, left = (draw(rows).requires_grad_() for _ in range(4))
    v = draw(width).requires_grad_()
    gates = {"none": {}, "scalar": {"gate": -draw().abs()}, "rows": {"gate": -draw(rows).abs()}}
    gate_inputs: dict[str, Any] = {**gates.get(gate, {"gate_columns": -draw(width).abs()}), "chunk": length}
    if correction != "none":
        gate_inputs["correction"] = (
            Delta(draw().sigmoid(), read) if correction == "delta" else RankOne(left, read, "old")
        )
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, out_shape=None, **__: bmm_flop(a, b)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as backward_counter:
        out, _ = linear_recurrence(q, k, v, **gate_inputs)
    with FlopCounterMode(display=False, custom_mapping=in_place) as back:
        out.sum().backward()  # type: ignore[no-untyped-call]
    return backward_counter.get_total_flops(), back.get_total_flops()


@pytest.mark.parametrize("length", [1, 2, 8, 32])
@pytest.mark.parametrize(("gate", "correction"), CLASSES)
def test_counted_products_equal_the_executors(
    gate: Gate, correction: Correction, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor computes its smallest blocks without products; here they are products, as in the formulas."""
    for module in (decays, chunk_forms):
        monkeypatch.setattr(module, "weighted", torch.matmul)
    form = form_of(5, 7, gate, correction)
    counted = tuple(count(form, length, apart=False).total.flop for count in (forward, backward))
    assert counted == executed(gate, correction, length, 5, 7)


@pytest.mark.parametrize(("length", "least"), [(1, 1), (8, 1), (64, 1), (16, 16), (64, 16)])
def test_matrix_entries_of_each_level(length: int, least: int) -> None:
    """Pairs t > j belong to the level of the highest bit in which they differ; blocks are widened to `least`."""
    pairs = [(t, j) for t in range(length) for j in range(t)]
    blocks = {(block := 1 << ((t ^ j).bit_length() - 1), t // max(block, least)) for t, j in pairs}
    assert levels(length, least) == sum(max(block, least) ** 2 for block, _ in blocks)
    form = form_of(4, 4, "rows", "none")
    assert squares(form, length, least) == levels(length, least)


def test_triangles_before_the_states_take_one_more_product() -> None:
    """The product is W = T r, which the executor does not compute."""
    form = form_of(5, 7, "scalar", "delta")
    for count in (forward, backward):
        more = count(form, 32).total.flop - count(form, 32, apart=False).total.flop
        assert more == 2 * 32 * 32 * 5
        assert count(form, 32).serial.flop < count(form, 32, apart=False).serial.flop


def test_operation_counts_per_token() -> None:
    """Heads of 128, chunks of 64: a masked matrix takes 2 C (dk + dv) + 4 dk dv; a delta rule adds its triangle."""
    plain, delta = (form_of(128, 128, "scalar", c) for c in ("none", "delta"))
    assert forward(plain, 64).total.flop / 64 == 2 * 64 * 256 + 4 * 128 * 128
    products = 2 * 64 * (2 * 128 + 128) + 2 * 64 * 256 + 6 * 128 * 128
    assert forward(delta, 64).total.flop / 64 == products + 2 * (64**2 - 16**2) / 3


def test_exponentials() -> None:
    counted = {gate: forward(form_of(32, 16, gate, "none"), 8).local.exps for gate in ("none", "scalar")}
    assert counted == {"none": 0, "scalar": 8 * 8 + 2 * 8}
    assert forward(form_of(32, 16, "rows", "none"), 8).local.exps == 8 * 32 * (3 + 2)
    assert forward(form_of(32, 16, "columns", "none"), 8).local.exps == 8 * 16 * (3 + 2)


def test_steps_of_a_token_are_rows() -> None:
    """Twice the steps: half the tokens of a chunk, with the work of all its rows."""
    one, two = (simulated("gated_delta_product", n=steps).passes[0] for steps in (1, 2))
    assert (one.micro, two.micro) == (1, 2)
    for single, double in zip(one.costs, two.costs, strict=True):
        assert double.forward == pytest.approx(2 * single.forward)
        assert double.state_bytes == 2 * single.state_bytes


# --- ladders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recurrence_names())
def test_every_recurrence_of_the_library(name: str) -> None:
    for device, stage in product((*machine_names(), "cpu"), PASSES):
        simulation = simulated(name, 1 if stage == "decode" else TOKENS, n_k=TOKENS, device=device, stage=stage)
        assert [rung.name for rung in simulation.rungs] == list(RUNGS)
        assert all(low <= high for low, high in pairwise(simulation.times))
        assert all(
            rung.speedup * simulation.rung_ms(rung.name) == pytest.approx(simulation.ideal_ms)
            for rung in simulation.rungs
        )
        assert simulation.predicted_ms == pytest.approx(
            max(simulation.times[3], sum(pass_ladder.ms for pass_ladder in simulation.passes))
        )
        for kernel in (kernel for pass_ladder in simulation.passes for kernel in pass_ladder.kernels):
            assert kernel.memory_ms <= kernel.units_ms <= kernel.chain_ms <= kernel.ms
        assert all(rung.lost_to in str(simulation) for rung in simulation.rungs)
        assert "token by token" in str(simulation) or not simulation.reason


@pytest.mark.parametrize("name", ["retention", "gla", "gated_delta_net", "rwkv7", "gsa", "lightnet", "mamba1", "mesa"])
@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize("device", ["h100", "cpu"])
def test_more_tokens_take_longer_and_in_proportion(name: str, stage: Pass, device: str) -> None:
    lengths = [2**i for i in range(8, 21)]
    times = [simulated(name, n, stage=stage, device=device).predicted_ms for n in lengths]
    assert all(low < high for low, high in pairwise(times))
    assert times[-1] / times[-3] == pytest.approx(4, rel=0.05)
    assert simulated(name, stage=stage).growth == "O(n)"


def test_more_heads_take_longer() -> None:
    times = [simulated("gated_delta_net", 8192, heads=heads).predicted_ms for heads in (1, 4, 16, 64, 256)]
    assert all(low < high for low, high in pairwise(times))
    assert times[-1] < 256 * times[0] / 4


def test_bytes_moved() -> None:
    """Inputs and outputs once: 8 heads of 128 in bf16, a gate in fp32, beta in bf16; states of chunks in fp32."""
    simulation = simulated("gated_delta_net", 4096, heads=8)
    assert simulation.traffic.least == 8 * 4096 * (4 * 128 * 2 + 4 + 2)
    assert simulation.state_bytes == 8 * 128 * 128 * 4
    costs = {cost.chunk: cost for cost in simulation.passes[0].costs}
    assert costs[64].state_bytes == 8 * (4096 // 64) * 128 * 128 * 4
    assert simulated("gated_delta_net", 4096, heads=8, kv_heads=2).traffic.least < simulation.traffic.least
    assert costs[256].ms is None and "does not fit" in str(simulation)


def test_decoding_moves_the_state() -> None:
    few, many = (simulated("kimi_delta", 1, n_k=n, stage="decode", heads=64, batch=32) for n in (1024, 65536))
    assert few.times == many.times and few.dense_ms < many.dense_ms
    assert many.traffic.moved == 2 * many.state_bytes + many.traffic.least
    assert many.growth.startswith("O(1) a token")


# --- choices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CLASSES_IN_CHUNKS, "gla", "kimi_delta", "rwkv6", "rwkv7"])
@pytest.mark.parametrize("heads", [8, 32, 256])
@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_chunks_of_kernels_are_nearly_as_fast_as_any(name: str, heads: int, stage: Pass) -> None:
    """Kernels use chunks of 64 rows; other chunks are predicted at most 8 % faster, 24 % in backward passes.

    The faster chunks have 128 rows and half as many states; no kernel has registers for them.
    """
    pass_ladder = simulated(name, 16384, heads=heads, stage=stage).passes[0]
    assert pass_ladder.chunk == KERNELS
    fitting = {cost.chunk: cost.ms for cost in pass_ladder.costs if cost.ms is not None}
    assert pass_ladder.ms == pytest.approx(fitting[pass_ladder.chunk])
    assert pass_ladder.ms <= MOST_SLOWER[stage] * min(fitting.values())


@pytest.mark.parametrize(
    ("form", "rows"),
    [
        (form_of(64, 64, "none", "none"), 64),
        (form_of(64, 64, "rows", "rank one"), 32),
        (form_of(16, 16, "rows", "none"), 32),
        (form_of(64, 64, "none", "delta", 33), 64),
        (form_of(64, 64, "none", "delta", 65), 128),
    ],
)
def test_chunks_on_a_cpu(form: PassForm, rows: int) -> None:
    """Measured: up to 3 % between 32 rows and 64 without corrections, 13 % for rank one; never fewer than steps."""
    assert chunk_on_cpu(form, 8, "float32") == rows
    enough = [length for length in (16, 32, 64, 128) if length >= form.micro and (length <= 64 or form.micro > 64)]
    times = {length: chunk_times(form, 8, 1024, "float32", AMX, "forward", length).total for length in enough}
    assert times[rows] == min(times.values())


@pytest.mark.parametrize("name", ["retention", "gla", "rwkv7", "gated_delta_product"])
def test_the_executor_takes_the_chunks_of_the_simulation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, inputs = example(name, B=1, H=2, T=70, dk=24, dv=24, dtype=torch.float32)
    taken: list[int] = []

    def noted(*arguments: Any, chunk: int, **more: Any) -> Any:
        taken.append(chunk)
        return linear_recurrence(*arguments, chunk=chunk, **more)

    monkeypatch.setattr(calls, "linear_recurrence", noted)
    compile_attention(name)(q, k, v, **inputs)
    sizes = {"n": inputs["beta"].shape[-1]} if name == "gated_delta_product" else {}
    simulation = compile_attention(name).simulate(70, heads=2, head_dim=24, dtype=torch.float32, device="cpu", **sizes)
    assert isinstance(simulation, RecurrenceSimulation)
    assert set(taken) == {simulation.passes[0].chunk}


@pytest.mark.parametrize("name", ["retention", "gla", "gated_delta_net"])
@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_few_heads_are_split_and_many_are_not(name: str, stage: Pass) -> None:
    assert simulated(name, 65536, heads=1, stage=stage).passes[0].segments > 1
    assert simulated(name, 65536, heads=256, stage=stage).passes[0].segments == 1


def test_the_report_mentions_a_split_correction() -> None:
    said = "a head whose matrix lets states grow is walked without segments"
    assert any(said in note for note in simulated("rwkv7", 65536, heads=1).notes)
    assert not any(said in note for note in simulated("rwkv7", 65536, heads=256).notes)
    assert not any(said in note for note in simulated("gla", 65536, heads=1).notes)


def test_a_state_too_large_for_an_sm_is_refused() -> None:
    recurrent = compile_attention("gated_delta_net")._core.parts.recurrence
    assert recurrent is not None and not own_sizes(recurrent.recur)
    shape = Shape(1, 8, 8, 8192, 8192, 4096, 4096, "bfloat16")
    call = call_of(recurrent.recur, recurrent.derived, "", {}, shape, {"dk": 4096, "dv": 4096})
    assert call.parts is not None
    part, machine = call.parts[0], find_machine("h100")
    assert isinstance(part, PassPart)
    for ranked in (plans, backward_plans):
        with pytest.raises(MachineError, match=r"no chunk of `gated_delta_net` with a state .* fits"):
            ranked(call, part, machine)


def test_a_simulation_is_immutable_and_printable() -> None:
    simulation = simulated("gated_delta_net", 65536, heads=8)
    with pytest.raises(FrozenInstanceError):
        simulation.loop_ms = 0.0  # type: ignore[misc]
    text = str(simulation)
    assert simulation.passes[0].words in text and str(simulation.passes[0]) in text
    assert all(kernel.name in text for kernel in simulation.passes[0].kernels)
    assert all(f"else      {other.how}" in text for other in simulation.others)
    assert simulation.others and all(
        other.ms >= simulation.predicted_ms / MOST_SLOWER["forward"] for other in simulation.others
    )


def test_a_recurrence_beats_a_loop_and_long_dense_attention() -> None:
    simulation = simulated("gated_delta_net", 65536, heads=8)
    assert simulation.speedup > 5 and simulation.loop_ms > 5 * simulation.predicted_ms
    assert simulated("gated_delta_net", 256, heads=8).speedup < 1


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recurrence_names())
def test_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    params = [part for key, value in PARAMETERS.get(name, {}).items() for part in ("-p", f"{key}={value}")]
    assert main(["simulate", name, *params, "--len", str(TOKENS), "--heads", "4"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(name) and "growth    O(n)" in said and "break-even " in said
    assert all(f"  {rung} " in said for rung in RUNGS)


def test_json_contains_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "gsa", "--len", "4096", "--size", "slots=32", "--json", "--sweep", "len=1k..2k"]) == 0
    report = json.loads(capsys.readouterr().out)
    same = simulated("gsa", 4096, slots=32)
    assert json.loads(json.dumps(report)) == report
    assert report["predicted_ms"] == same.predicted_ms and report["token_by_token_ms"] == same.loop_ms
    assert tuple(report["rung_ms"].values()) == same.times
    assert [one["state"] for one in report["passes"]] == ["K[128, 32]", "V[32, 128]"]
    for one, expected_pass in zip(report["passes"], same.passes, strict=True):
        assert (one["chunk"], one["segments"], one["ms"]) == (
            expected_pass.chunk,
            expected_pass.segments,
            expected_pass.ms,
        )
        assert [kernel["ms"] for kernel in one["kernels"]] == [kernel.ms for kernel in expected_pass.kernels]
        assert [cost["forward"] for cost in one["costs"]] == [cost.forward for cost in expected_pass.costs]
    assert report["growth"] == "O(n)" and report["growth_law"] is None and report["floors"] == []
    assert [one["shape"]["queries"] for one in report["sweep"]] == [1024, 2048]


def test_tables_of_several_recurrences(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--len", "8192", "--compare", "gla", "--device", "h100,b200", "--sweep", "len=1k..4k"]
    assert main(["simulate", "retention", *arguments]) == 0
    said = capsys.readouterr().out
    assert "memory  states  units  chain  predicted" in " ".join(said.split("\n")).replace("   ", "  ").replace(
        "   ", "  "
    )
    assert "gla on b200" in said and "len=4,096" in said
    assert main(["simulate", "retention", "--compare", "sliding_window", "-q", "window=512"]) == 0
    said = capsys.readouterr().out
    assert "sliding_window on h100-sxm" in said and "one walk" in said


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("gla", ["--tile", "64x64"], "--tile 64x64: only for patterns without states; `gla` is a recurrence"),
        ("gla", ["--order", "bricks"], "--order bricks: only for patterns without states"),
        ("gla", ["--baseline", "both"], "--baseline both: `gla` is a recurrence"),
        ("gla", ["--input", "g=0"], "--input g=0: the inputs of a pattern with states are not simulated"),
        ("gla", ["--size", "slots=4"], "--size slots: `gla` has no state with such a size; no state has sizes of"),
        ("gsa", ["--size", "slot=4"], "--size slot: `gsa` has no state with such a size; its states have slots"),
        ("gsa", ["--size", "slots=many"], "--size slots=many: write a name and a whole number"),
        ("causal", ["--size", "slots=4"], "--size slots: `causal` has no state with such a size"),
        ("gla", ["--keys", "64"], "a recurrence takes as many keys as queries"),
        ("gla", ["--dtype", "float64"], "h100-sxm runs recurrences in float32, bfloat16, float16, not in float64"),
        ("gla", ["--device", "h1000"], "unknown machine `h1000`"),
    ],
)
def test_arguments_that_the_command_refuses(
    name: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", name, *arguments]) != 0
    assert said in capsys.readouterr().err


def test_arguments_that_a_call_refuses() -> None:
    attend, slots = compile_attention("gla"), compile_attention("gsa")
    arguments: Any
    for arguments, said in (
        ({"n_k": 64}, "n_q is 32 and n_k 64: a recurrence takes as many keys as queries"),
        ({"tile": (64, 64)}, "tile and order apply to pairs"),
        ({"stage": "training"}, "stage is 'training'"),
        ({"slots": 4}, "`gla` has no input and no size `slots`"),
        ({"g": 3}, "g is int: it must be a torch tensor"),
    ):
        with pytest.raises(ArgumentError, match=said):
            attend.simulate(32, **arguments)
    with pytest.raises(ArgumentError, match="slots is 0: a size must be an integer"):
        slots.simulate(32, slots=0)
    with pytest.raises(ArgumentError, match="n_q is 0"):
        attend.simulate(0)
    with pytest.raises(MachineError, match="decode takes 1 to 16 tokens, got 32"):
        attend.simulate(32, stage="decode")
    for refused in (attend.growth, lambda: attend.floors(4)):
        with pytest.raises(UnsupportedError, match="is a recurrence"):
            refused()


def test_sizes_of_inputs_are_accepted() -> None:
    tensor = torch.zeros(1, 32, 8, 16)
    assert simulated("gsa", 32, s=tensor).passes[0].state == "K[128, 16]"
    assert simulated("gsa", 32).notes[0] == "slots is assumed to be 64: pass `slots` to change it"
