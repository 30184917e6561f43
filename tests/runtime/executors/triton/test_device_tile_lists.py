"""Tile lists computed on the device from content masks, in Triton's interpreter and on tensors without values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from asking_patterns import (
    LIBRARY,
    NOT_IN_KERNELS,
    OWN,
    Asking,
    blank_shape,
    drawn_choices,
    exact_relations,
    pattern_of,
)
from attnc import UnsupportedError, compile_attention
from attnc.compiler.kernels.content_mask_tiles import MaskCall
from attnc.compiler.kernels.content_masks import find_mask_relation
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.kernels.tile_tables import tile_tables
from attnc.compiler.planning.cpu_plan import TileCounts
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.tensor_checks import completed
from attnc.runtime.executors.pattern_attentions import PatternAttentions
from attnc.runtime.executors.registry import executor_named
from attnc.runtime.executors.selections.call_selections import CallSelections
from attnc.runtime.executors.triton import mask_lists, planner, selected_on_gpu
from attnc.runtime.executors.triton.launch import started_by
from attnc.runtime.executors.triton.mask_lists import MaskLists
from attnc.runtime.executors.triton.planner import GpuPlanner
from attnc.runtime.planning.plans import PLANNING

pytest.importorskip("triton")

TILES = {"forward": (16, 32), "dq": (32, 16), "dkdv": (16, 16)}
CASES = [*LIBRARY, *OWN]
DEVICE = torch.device("cpu")


def ids(case: object) -> str:
    return f"{case.name} {case.n_q}×{case.n_k}" if isinstance(case, Asking) else str(case)


def recorded_forms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the form of every set of kernels that the planner returns from now on."""
    form_names: list[str] = []
    kernels_of = GpuPlanner.kernels_of

    def recording_kernels_of(*arguments: Any) -> Any:
        kernels = kernels_of(*arguments)
        form_names.append(kernels.form)
        return kernels

    monkeypatch.setattr(GpuPlanner, "kernels_of", recording_kernels_of)
    return form_names


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_outputs_and_gradients_agree_with_the_reference(case: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    form_names = recorded_forms(monkeypatch)
    attend = case.compiled(backend="triton")
    vectors, inputs = case.drawn()
    q, k, v = vectors
    leaves = [x.requires_grad_() for x in (*vectors, *inputs.values())]
    outs = [run(q, k, v, **inputs) for run in (attend, attend.reference)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=2e-5)
    weights = torch.randn_like(outs[0])
    grads = [
        torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True, materialize_grads=True) for out in outs
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert {*form_names} == {"content"}


def mask_call(case: Asking, inputs: Mapping[str, Tensor], choices: Mapping[str, Any]) -> MaskCall:
    pattern = pattern_of(case)
    return MaskCall(pattern, blank_shape(case, pattern, inputs, choices))


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.97, 1.0])
def test_states_are_sound(case: Asking, share: float) -> None:
    """Full tiles are visible everywhere, unlisted tiles nowhere; the lists hold all tiles that the host lists."""
    for name, states, some_seen, all_seen, host in tile_states(case, share):
        assert not (some_seen & (states < 0)).any(), f"{name}: a tile that is seen is not listed"
        assert not (~all_seen & (states > 0)).any(), f"{name}: a tile that is not all seen has no mask"
        assert host.full >= (states > 0).sum()
        assert host.full + host.partial <= (states >= 0).sum()
        if case.name in ("deepseek_sparse", "dynamic_mask"):
            assert (states == np.where(all_seen, 1, np.where(some_seen, 0, -1))).all(), "tiles of entries are exact"


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_states_from_coarse_cells_are_sound(case: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large content masks are summarised in cells of several entries; the tile states stay sound."""
    monkeypatch.setattr(mask_lists, "MOST_CELLS", 12)
    for name, states, some_seen, all_seen, _ in tile_states(case, 0.3):
        assert not (some_seen & (states < 0)).any(), f"{name}: a tile that is seen is not listed"
        assert not (~all_seen & (states > 0)).any(), f"{name}: a tile that is not all seen has no mask"


def tile_states(case: Asking, share: float) -> Iterator[tuple[str, Any, Any, Any, TileCounts]]:
    """Yield each kernel's tile states by the lists, whether some and all pairs are visible, and the host's counts."""
    _, inputs = case.drawn()
    choices = drawn_choices(case, share)
    call = mask_call(case, inputs, choices)
    relations = exact_relations(case, call.pattern, inputs, choices)
    masks = np.stack([[relations.mask(b, h, 0, case.n_q, 0, case.n_k) for h in range(4)] for b in range(case.batch)])
    for name, tiles in TILES.items():
        lists = MaskLists(call, find_mask_relation(call.pattern), TILES, DEVICE).of(name, choices)
        host = tile_tables(relations, *tiles, by_key=name == "dkdv").counts
        yield name, states_from_lists(lists, case, tiles, by_key=name == "dkdv"), *by_tile(masks, *tiles), host


def by_tile(masks: np.ndarray[Any, Any], q_tile: int, k_tile: int) -> tuple[Any, Any]:
    """Return whether some and whether all pairs of each tile are visible; a tile that an edge cuts is never full."""
    rows, columns = (-(-n // t) for n, t in zip(masks.shape[-2:], (q_tile, k_tile), strict=True))
    padded = np.zeros((*masks.shape[:2], rows * q_tile, columns * k_tile), dtype=np.bool_)
    padded[..., : masks.shape[2], : masks.shape[3]] = masks
    split = padded.reshape(*masks.shape[:2], rows, q_tile, columns, k_tile)
    return split.any((3, 5)), split.all((3, 5))


def states_from_lists(lists: Mapping[str, Tensor], case: Asking, tiles: tuple[int, int], *, by_key: bool) -> Any:
    """Return each tile's state (batch, heads, rows, columns) as a kernel reads it: -1 dead, 0 partial, 1 full."""
    rows, columns = -(-case.n_q // tiles[0]), -(-case.n_k // tiles[1])
    tile_rows, tile_columns = (columns, rows) if by_key else (rows, columns)
    states = np.full((case.batch * 4, tile_rows, tile_columns), -1)
    tables = {name: x.numpy() for name, x in lists.items()}
    for lane, group in enumerate(tables["list_of_lane"]):
        order = tables["tile_order"][group * tile_rows : (group + 1) * tile_rows]
        assert sorted(order) == list(range(tile_rows))
        lengths = []
        for row in order:
            entry, length = group * (tile_rows + 1) + row, 0
            for kind, value in (("full", 1), ("partial", 0)):
                begin, end = tables[f"{kind}_pointers"][entry : entry + 2]
                listed = tables[f"{kind}_tiles"][begin:end]
                assert (np.diff(listed) > 0).all()
                assert (states[lane, row, listed] == -1).all()
                states[lane, row, listed] = value
                length += end - begin
                assert len(tables[f"{kind}_tiles"]) > end, "kernels look one tile ahead"
            lengths.append(length)
        assert lengths == sorted(lengths, reverse=True)
    states = states.transpose(0, 2, 1) if by_key else states
    return states.reshape(case.batch, 4, rows, columns)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_making_lists_reads_nothing_from_the_device(case: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors stand for a device's tensors: an operation for which the host would wait raises an error."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _, inputs = case.drawn()
    choices = {name: x.to("meta") for name, x in drawn_choices(case, 0.5).items()}
    call = mask_call(case, inputs, choices)
    lists = MaskLists(call, find_mask_relation(call.pattern), TILES, torch.device("meta"))
    tensors = {f"{stage} {name}": x for stage in TILES for name, x in lists.of(stage, choices).items()}
    tensors |= lists.read(choices)
    assert {x.device.type for x in tensors.values()} == {"meta"}
    with pytest.raises(RuntimeError, match="meta"):
        bool(choices.popitem()[1].any())


ON_THE_DEVICE = [case for case in CASES if case.name != "hip"]
"""Patterns whose stages read each other's selected blocks on the host."""


@pytest.mark.parametrize("case", ON_THE_DEVICE, ids=ids)
def test_a_whole_call_reads_nothing_from_the_device(case: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection, tile lists, forward and backward run without a wait; only the kernels themselves are left out."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(planner, "target_of", lambda device: TARGETS["sm_90"])
    vectors, inputs = case.drawn()
    q, k, v = (x.to("meta").requires_grad_() for x in vectors)
    meta_inputs = {name: x.to("meta").requires_grad_() for name, x in inputs.items()}
    started: list[str] = []
    attentions = PatternAttentions("a call on a device", case.compiled(backend="triton").pattern, strict=False)
    with started_by(lambda source, *_: started.append(source.stage)):
        out, _ = attentions.run(CallArguments(q, k, v, meta_inputs, meta_inputs, 0.25), executor_named("triton"))
        torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert started == ["forward", "delta", "dq", "dkdv"]


STEPS = 20


@pytest.mark.slow
@pytest.mark.parametrize("case", [*LIBRARY, OWN[2]], ids=ids)
def test_later_steps_reuse_one_plan(case: Asking, tmp_path: Any) -> None:
    """The first step plans for its sizes; later steps select anew, and neither plan nor emit anything."""
    attend, n = case.compiled(backend="triton"), 60 if case.n_q > 100 else 30

    def step() -> bytes:
        vectors, step_inputs = case.drawn()
        q, k, v = (x[:1, : 2 if x.shape[1] == 4 else 1, :n, :4].clone().requires_grad_() for x in vectors)
        step_inputs = {name: _cut_input(x, case, n) for name, x in step_inputs.items()}
        attend(q, k, v, **step_inputs).sum().backward()
        with torch.no_grad():
            return b"".join(x.numpy().tobytes() for x in attend.chosen(q, k, v, **step_inputs).values())

    with profile(activities=[ProfilerActivity.CPU]) as first:
        selections = [step()]
    with profile(activities=[ProfilerActivity.CPU]) as later_steps:
        selections += [step() for _ in range(STEPS)]
    texts = []
    for trace in (first, later_steps):
        trace.export_chrome_trace(str(tmp_path / "trace.json"))
        texts.append((tmp_path / "trace.json").read_text(encoding="utf-8"))
    assert PLANNING in texts[0]
    assert PLANNING not in texts[1]
    assert len({*selections}) > 0.8 * STEPS, "the steps chose alike"


def _cut_input(x: Tensor, case: Asking, n: int) -> Tensor:
    """Return an input cut to one batch entry, n tokens and one kv head."""
    kv_heads = slice(0, 1) if case.name == "dynamic_mask" else slice(None)
    cut = x[:1]
    for dim, size in enumerate(x.shape):
        cut = cut.narrow(dim, 0, n) if size == case.n_q else cut
    return cut[:, kv_heads] if case.name == "dynamic_mask" else cut


READS_OUTSIDE = """pattern outside
    align   end
    input   map: bool[batch, query, cells]
    select chosen
        over   b = k // 16
        score  dot(q, mean(b.k))
        keep   rank < 2
    visible (k in chosen or k >= 3 and map[q, k - 3]) and k <= q
"""


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (READS_OUTSIDE, "`map` is read at positions that may be out of range"),
        (NOT_IN_KERNELS, "kernels do not compute aggregates"),
    ],
)
def test_lists_made_on_the_host_are_reported(source: str, why: str) -> None:
    attend = compile_attention(source, backend="triton")
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    inputs: dict[str, Any] = (
        {"map": torch.rand(1, 40, 40) < 0.3} if "map" in source else {"seen": torch.randint(0, 40, (1, 5))}
    )
    torch.testing.assert_close(attend(q, k, v, **inputs), attend.reference(q, k, v, **inputs), rtol=1e-4, atol=2e-5)
    told = f"tile lists made on the host in every call: {why}"
    assert any(told in reason for reason in attend.plan(40, heads=2, **inputs).reasons)
    with pytest.raises(UnsupportedError, match=f"strict: `.*` would have {told}; compile it without strict"):
        compile_attention(source, backend="triton", strict=True)(q, k, v, **inputs)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_plans_say_where_lists_are_made(case: Asking) -> None:
    plan = case.compiled(backend="triton").plan(case.n_q, case.n_k, heads=4, kv_heads=2, **case.drawn()[1])
    assert "tile lists made on the device in every call; kernels read what was selected" in plan.reasons
    assert (plan.schedule, plan.executor) == ("chosen tiles", "triton")


# --- blocks per head --------------------------------------------------------------------------------------------------

BY_HEAD = [
    ("svg2", {"p": 0.4, "query_clusters": 5, "key_clusters": 7}, {"qc": (1, 4, 45), "kc": (1, 2, 45)}),
    ("sorted", {}, {"h": (1, 2, 45)}),
]
SORTED = """pattern sorted(block: int = 8)
    align   end
    input   h: int[batch, kv_head, token]
    visible order(h)[q] // block == order(h)[k] // block and k <= q
"""


@pytest.mark.parametrize(("name", "params", "shapes"), BY_HEAD, ids=lambda x: x if isinstance(x, str) else "")
def test_sorting_reads_nothing_from_the_device(
    name: str, params: dict[str, Any], shapes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(selected_on_gpu, "target_of", lambda device: TARGETS["sm_90"])
    pattern = compile_attention(SORTED if name == "sorted" else name, backend="triton", **params).pattern
    with torch.device("meta"):
        q, k, v = (torch.empty(1, h, 45, 16, requires_grad=True) for h in (4, 2, 2))
        meta_inputs = {key: torch.empty(shape, dtype=torch.int64) for key, shape in shapes.items()}
    inputs = completed(pattern, meta_inputs)
    real = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    started: list[str] = []
    attentions = PatternAttentions("a call on a device", pattern, strict=True)
    choices = {item.name: torch.empty(1, 4, 5, 7, dtype=torch.bool, device="meta") for item in pattern.selections}
    monkeypatch.setattr(CallSelections, "_chosen", lambda self, item: choices[item.name])
    with started_by(lambda source, *_: started.append(source.stage)):
        out, _ = attentions.run(CallArguments(q, k, v, inputs, real, 0.25), executor_named("triton"))
        torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert set(started) == {"forward", "merge", "delta", "dq", "sum", "dkdv"}
