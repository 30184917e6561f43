"""Memory of calls: saved for the backward, held between calls, and predicted by plans."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.api.attention import Attention
from attnc.runtime.executors.cpu import bound_plan
from attnc.runtime.executors.cpu.bound_plan import program_of
from attnc.runtime.executors.cpu.cpu_plans import cpu_plans
from attnc.runtime.process.recent import Recent, held_bytes
from attnc.runtime.settings import SETTINGS
from library_calls import library_call
from tensor_memory import bytes_of, measured

pytestmark = pytest.mark.usefixtures("one_thread")

SCATTERED = "pattern scattered()\n    input seen: bool[query, key]\n    visible seen[q, k]\n"

Operands = tuple[Tensor, Tensor, Tensor]


def draw_qkv(
    n: int, *, batch: int = 1, heads: int = 4, kv_heads: int = 2, dk: int = 32, dv: int = 32, dtype: Any = torch.float32
) -> Operands:
    sizes = ((batch, heads, n, dk), (batch, kv_heads, n, dk), (batch, kv_heads, n, dv))
    q, k, v = (torch.randn(size).to(dtype).requires_grad_() for size in sizes)
    return q, k, v


# --- saved for the backward ------------------------------------------------------------------------------------------


def saved_tensors(call: Callable[[], Any]) -> tuple[list[Tensor], Any]:
    """Return the tensors that autograd saves in a call, and the call's result."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return saved, call()


def name_of(x: Tensor, named: Mapping[str, Tensor]) -> str:
    """Return the name of a tensor, or its dtype and shape if it has none."""
    return next((name for name, y in named.items() if y.data_ptr() == x.data_ptr()), f"{x.dtype} {tuple(x.shape)}")


def saved_by(call: Callable[[], Any], named: Mapping[str, Tensor]) -> tuple[list[str], Any]:
    """Return the names (else shapes) of the tensors that autograd saves in a call, and the call's result."""
    saved, result = saved_tensors(call)
    named = {**named, **dict(zip(("out", "lse"), result, strict=False))}
    return [name_of(x, named) for x in saved], result


N = 192

KEEPS: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any], list[str]]] = {
    "plain": ("causal", {}, {}, []),
    "pieces": ("sliding_window", {"window": 40, "sinks": 4}, {}, []),
    "classes": ("dilated_window", {"window": 40, "dilation": 3}, {}, []),
    "bricks": ("neighborhood_2d", {"height": 12, "width": 16, "window": [3, 5]}, {}, []),
    "documents": ("document", {}, {"doc": torch.arange(N)[None] // 50}, ["doc"]),
    "packed": ("causal", {}, {"cu_seqlens": torch.tensor([0, 70, N])}, ["cu_seqlens"]),
    "mask": (SCATTERED, {}, {"seen": torch.arange(N * N).reshape(N, N) % 7 < 3}, ["seen"]),
    "bias": ("alibi", {}, {}, []),
    "score": ("softcap", {"cap": 2, "window": 40}, {}, []),
    "learned": ("music_relative", {}, {"E": torch.randn(4, N, 32, requires_grad=True)}, ["E"]),
    "extra logit": ("gpt_oss", {"window": 40}, {"sink": torch.randn(4, requires_grad=True)}, ["sink"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KEEPS)
def test_saved_are_q_k_v_out_and_lse(kind: str, dtype: torch.dtype) -> None:
    """Inputs are saved too; nothing else is alive after a call, whoever may hold it."""
    name, params, inputs, more = KEEPS[kind]
    attend, (q, k, v) = compile_attention(name, **params), draw_qkv(N, dtype=dtype)

    def call() -> Any:
        return attend(q, k, v, return_lse=True, **inputs)

    call()
    saved, (out, lse) = saved_by(call, {"q": q, "k": k, "v": v, **inputs})
    assert saved == ["q", "k", "v", "out", "lse", *more]
    memory = measured(call)
    assert memory.kept == bytes_of(out, lse)


def _saved_bytes(call: Callable[[], Any], operands: Mapping[str, Tensor]) -> tuple[int, set[str]]:
    """Return the bytes that the result and autograd hold beyond the operands, and the names of the saved tensors."""
    saved, result = saved_tensors(call)
    given_pointers = {x.untyped_storage().data_ptr() for x in operands.values()}
    memory = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in (*saved, result)}
    names = {name_of(x, operands) for x in saved}
    return sum(x.nbytes() for pointer, x in memory.items() if pointer not in given_pointers), names


BRANCHES = """pattern two
    branch near
        visible k <= q and q - k < 20
    branch far
        visible k <= q - 20
    combine near + far
"""
LSE, OUT = "torch.float32 (1, 2, 192)", "torch.float32 (1, 2, 192, 16)"
CHOSEN, HEADS = "torch.bool (1, 2, 192, 1)", "torch.int64 (384,)"
SCALED, RESETS = OUT, "torch.float32 (1, 1, 1, 1)"
BETWEEN, FINAL = "torch.float32 (2, 4, 16, 16)", "torch.float32 (1, 2, 16, 16)"
OTHERS: dict[str, tuple[str, Mapping[str, Any], set[str]]] = {
    "weights": ("pattern p\n    visible k <= q\n    weights sigmoid(score)\n", {}, {"q", "k", "v"}),
    "branches": (BRANCHES, {}, {"q", "k", "v", OUT, LSE, HEADS}),
    "selection": ("moba", {}, {"q", "k", "v", OUT, LSE, CHOSEN}),
    "selections": ("anchor", {}, {"q", "k", "v", OUT, LSE}),
    "choice of few tokens": ("moba", {}, {"q", "k", "v", OUT, LSE, "torch.bool (1, 2, 192, 192)"}),
    "recurrence": ("gla", {"g": -torch.rand(1, N, 2, 16)}, {SCALED, "k", "v", "g", RESETS, BETWEEN, FINAL}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_nothing_is_held_besides_saved_tensors(kind: str, request: pytest.FixtureRequest) -> None:
    name, inputs, wanted = OTHERS[kind]
    if kind in ("selection", "selections"):
        request.getfixturevalue("gathered")
    attend, (q, k, v) = compile_attention(name), draw_qkv(N, heads=2, dk=16, dv=16)
    operands = {"q": q, "k": k, "v": v, **inputs}

    def call() -> Any:
        return attend(q, k, v, **inputs)

    call()
    saved_bytes, names = _saved_bytes(call, operands)
    assert names == wanted
    assert measured(call).kept == saved_bytes


def test_large_scores_also_save_the_shift_of_their_rows() -> None:
    attend, (q, k, v) = compile_attention("softcap", cap=100), draw_qkv(N)
    q = (q * 40).detach().requires_grad_()
    saved, (out, lse) = saved_by(lambda: attend(q, k, v, return_lse=True), {"q": q, "k": k, "v": v})
    rows = f"torch.float32 {tuple(lse.shape)}"
    assert saved == ["q", "k", "v", "out", rows, rows]
    out.sum().backward()


def test_weight_formulas_save_no_result_and_recompute_it() -> None:
    attend, (q, k, v) = compile_attention("pattern p\n    visible k <= q\n    weights sigmoid(score)\n"), draw_qkv(N)
    attend(q, k, v)
    saved, _ = saved_by(lambda: (attend(q, k, v),), {"q": q, "k": k, "v": v})
    assert saved == ["q", "k", "v"]


def test_a_call_keeps_only_its_unrequested_lse_besides_out() -> None:
    attend, (q, k, v) = compile_attention("sliding_window", window=40), draw_qkv(N)
    attend(q, k, v)
    memory = measured(lambda: attend(q, k, v))
    assert memory.kept == bytes_of(memory.result) + 4 * 4 * N
    with torch.no_grad():
        memory = measured(lambda: attend(q, k, v))
    assert memory.kept == bytes_of(memory.result)


def test_a_plan_ignores_later_writes_to_its_inputs() -> None:
    attend, n = compile_attention(SCATTERED), 3000
    q, k, v = (x.detach() for x in draw_qkv(n, heads=1, kv_heads=1, dk=8, dv=8))
    mask = torch.rand(n, n) < 0.1
    before = mask.clone()
    plan = attend.plan(n, seen=mask)
    assert any(piece.mask == "exact" for piece in plan.groups[0].pieces)
    wanted = attend(q, k, v, seen=mask)
    mask.copy_(torch.rand(n, n) < 0.1)
    assert torch.equal(attend(q, k, v, seen=before), wanted)


# --- kept between calls ----------------------------------------------------------------------------------------------


def test_a_cache_is_bounded_in_bytes_and_drops_the_oldest() -> None:
    memory: Recent[bytes] = Recent(10, 100, len)
    for size in (40, 30, 20):
        memory.get(size, lambda size=size: bytes(size))  # type: ignore[misc]
    memory.get(40, lambda: bytes(1))
    assert memory.weight == 90
    memory.get(35, lambda: bytes(35))
    assert list(memory._values) == [20, 40, 35]
    assert memory.weight == 95
    memory.get(500, lambda: bytes(500))
    assert (list(memory._values), memory.weight) == ([500], 500)


def test_masks_of_all_plans_are_bounded_and_shared_between_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Recent(4096, 1 << 22, bound_plan._bytes_of_mask)
    monkeypatch.setattr(bound_plan, "_MASKS", memory)
    attend = compile_attention("sliding_window", window=100)
    for n in range(500, 1500, 100):
        attend(*draw_qkv(n))
    distinct = {id(x.additive) for x in memory._values.values()}
    made = [mask for n in range(500, 1500, 100) for mask in attend.plan(n, heads=4, kv_heads=2, head_dim=32).masks]
    assert len(distinct) < len(made)
    for window in range(100, 600, 20):
        other, (q, k, v) = compile_attention("sliding_window", window=window), draw_qkv(700, dk=8, dv=8)
        assert torch.allclose(other(q, k, v), other.reference(q, k, v), atol=1e-5)
        assert memory.weight <= 1 << 22
    assert memory.weight == sum(map(bound_plan._bytes_of_mask, memory._values.values())) > 1 << 21


def test_masks_with_equal_bits_but_other_shapes_differ() -> None:
    from attnc.compiler.planning.cpu_plan import GridMask

    bits = np.arange(24) % 5 < 2
    shapes = [(4, 6), (6, 4), (3, 8), (2, 12)]
    assert len({bound_plan._contents(GridMask((bits.reshape(shape),))) for shape in shapes}) == len(shapes)
    assert bound_plan._contents(GridMask((np.ones((1, 9), bool),))) != bound_plan._contents(
        GridMask((np.ones((1, 8), bool),))
    )


def _allocated_by(make: Callable[[], object]) -> tuple[int, object]:
    """Return the bytes that Python and NumPy hold after `make`, and the value that it returned."""
    gc.collect()
    tracemalloc.start()
    try:
        value = make()
        gc.collect()
        return tracemalloc.get_traced_memory()[0], value
    finally:
        tracemalloc.stop()


def test_estimated_sizes_of_layouts_and_plans() -> None:
    attend = compile_attention("bigbird", block=16)
    inputs: dict[str, Any] = {"random": torch.randint(32, (2, 32, 3))}
    bytes_of_plan, plan = _allocated_by(lambda: attend.plan(512, heads=2, head_dim=8, **inputs))
    assert isinstance(plan, Plan)
    assert 0.4 * bytes_of_plan < plan.nbytes < 2.5 * bytes_of_plan
    q, k, v = (x.detach() for x in draw_qkv(512, heads=2, dk=8, dv=8))
    program = program_of(plan)
    layout_bytes, bound = _allocated_by(lambda: program.bound((q, q, q[..., 0], q, q), (k, v), (k, v)))
    assert 0.5 * layout_bytes < bound_plan._bytes_of_layout(bound) < 2 * layout_bytes  # type: ignore[arg-type]


def test_a_plan_drops_data_that_only_planning_needs() -> None:
    call = library_call("tree_verify", 1024)
    plan_bytes, plan = _allocated_by(lambda: call.attention.plan(call.n, heads=call.heads, **call.inputs))
    assert isinstance(plan, Plan)
    assert plan_bytes < 2 * 1024**2, (
        "the relation reads a bool for each pair; tables of bounds take nine bytes for each"
    )
    assert plan.nbytes >= 1024**2


def test_held_bytes_counts_nested_arrays_and_tensors_once() -> None:
    x = torch.zeros(100)
    assert held_bytes({"a": [x, (x[:1],)], "b": np.zeros(7), "c": "text"}) == 400 + 400 + 56
    assert held_bytes([x, x, (x,)]) == 400
    assert held_bytes(compile_attention("causal").pattern) == 0


def test_plans_programs_and_layouts_stay_within_their_bounds() -> None:
    attend = compile_attention(SCATTERED)
    for n in range(1600, 2600, 50):
        attend.plan(n, seen=torch.rand(n, n) < 0.2)
    planner = cpu_plans(attend._core.planner)
    assert planner._by_shape.weight <= SETTINGS.plan_bytes
    assert planner._by_shape.weight == sum(plan.nbytes for plan in planner._by_shape._values.values())
    assert len(planner._by_shape._values) < 32
    for memory, bound in ((bound_plan._LAYOUTS, SETTINGS.layout_bytes), (bound_plan._PROGRAMS, SETTINGS.plan_bytes)):
        assert memory.weight <= bound


# --- memory predicted by plans ---------------------------------------------------------------------------------------


def _documents(n: int) -> dict[str, Tensor]:
    return {"doc": torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3]).repeat_interleave(n // 10)[None]}


GRID = {"height": 64, "width": 64, "window": [7, 7]}
TOLD: dict[str, tuple[str, Mapping[str, Any], int, Mapping[str, Any]]] = {
    "causal": ("causal", {}, 1000, {}),
    "batch": ("causal", {}, 700, {"batch": 2}),
    "own keys": ("causal", {}, 1000, {"kv_heads": 4}),
    "dv < dk": ("causal", {}, 1000, {"dv": 16}),
    "dk < dv": ("causal", {}, 1000, {"dk": 16}),
    "window": ("sliding_window", {"window": 64, "sinks": 4}, 1000, {}),
    "long window": ("sliding_window", {"window": 256}, 4000, {}),
    "dilated": ("dilated_window", {"window": 40, "dilation": 3}, 2000, {}),
    "bricks": ("neighborhood_2d", GRID, 4096, {}),
    "documents": ("document", {}, 2000, {}),
    "strided": ("strided", {"stride": 64, "local": 64}, 2000, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", TOLD)
def test_a_plan_predicts_the_memory_of_a_call(kind: str, dtype: torch.dtype) -> None:
    name, params, n, sizes = TOLD[kind]
    attend, (q, k, v) = compile_attention(name, **params), draw_qkv(n, dtype=dtype, **sizes)
    inputs: dict[str, Any] = _documents(n) if name == "document" else {}

    def forward() -> Any:
        return attend(q, k, v, return_lse=True, **inputs)

    torch.autograd.grad(forward()[0].sum(), (q, k, v))
    forward_memory = measured(forward)
    out, lse = forward_memory.result
    grad_out = torch.randn_like(out)
    back = measured(lambda: torch.autograd.grad(out, (q, k, v), grad_out))
    predicted = _plan_of(attend, (q, k, v), inputs).memory
    assert predicted is not None
    assert predicted.saved == bytes_of(q, k, v, out, lse)
    _check_prediction(forward_memory.peak - bytes_of(out, lse), predicted.forward)
    _check_prediction(back.peak - bytes_of(*back.result), predicted.backward)


def _plan_of(attend: Attention, operands: Operands, inputs: Mapping[str, Tensor]) -> Plan:
    return cpu_plans(attend._core.planner).plan_of(*operands, list(inputs.values()))


def _check_prediction(measured_bytes: int, predicted_bytes: int) -> None:
    assert measured_bytes <= predicted_bytes <= 1.5 * measured_bytes, (
        f"{measured_bytes} bytes at most, and the plan predicts {predicted_bytes}"
    )


def test_plans_print_their_memory() -> None:
    text = str(compile_attention("causal").plan(1000, heads=4, head_dim=32))
    assert "\nmemory: saves 1.97 MiB; takes 546 KiB forward, 1.49 MiB backward\n" in text
    assert "memory" not in str(compile_attention("softcap").plan(100))


def test_keys_are_packed_only_where_there_are_matrix_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing takes memory in bfloat16 on processors with AMX; fp32 takes the same memory on every processor."""
    forward_bytes: dict[tuple[bool, torch.dtype], int] = {}
    for tiles in (True, False):
        monkeypatch.setattr("attnc.runtime.executors.cpu.cpu_memory.has_matrix_tiles", lambda tiles=tiles: tiles)
        for dtype in (torch.float32, torch.bfloat16):
            plan = compile_attention("causal").plan(512, heads=2, head_dim=64, dtype=dtype)
            assert plan.memory is not None
            forward_bytes[tiles, dtype] = plan.memory.forward
    assert forward_bytes[True, torch.bfloat16] > forward_bytes[False, torch.bfloat16]
    assert forward_bytes[True, torch.float32] == forward_bytes[False, torch.float32]
