"""Calls without gradients: a single pass that stores no state between chunks, against the token loop."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import recurrence_cases
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.recurrences.kernels.recurrence_kernels import emit, walk_stages
from attnc.compiler.recurrences.kernels.recurrence_problem import RecurrenceProblem
from attnc.compiler.recurrences.recurrence_class import RecurrenceClass
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.executors.triton.recurrent.linear_on_gpu import linear_recurrence
from attnc.runtime.toolchain.recurrence_gate import SELECTION
from kernels_ran import kernels_ran
from recurrence_cases import Result, Tensors, chunked, draw_case, error, leaves, truth

pytest.importorskip("triton")

TOKENS = 40
"""Three chunks of 16 rows, the last one partial."""
SMALL = (1, 2, 20, 12)
LIMIT = 1e-6
"""Error limit of fp32, relative to the largest exact entry."""

PREPARED = ("rows", "delta", "scalar delta", "scalar comba", "rows comba", "scalar decayed", "rows old")
FUSED = ("", "constant", "scalar", "constant before", "scalar before")


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fp32 run in a single pass too, which no device does: its results have more digits to compare than fp16."""
    monkeypatch.setattr(RecurrenceProblem, "can_walk", property(lambda problem: problem.form.can_walk))
    monkeypatch.setattr(RecurrenceProblem, "can_fuse", property(lambda problem: problem.form.can_fuse))


def by_kernels(
    name: str, tensors: Tensors, resets: Tensor | None = None, micro: int = 1, segments: int | None = 1, chunk: int = 16
) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrence_cases, "linear_recurrence", partial(linear_recurrence, segments=segments))
        return chunked(name, tensors, resets, micro, chunk)


def check(
    name: str,
    case: Tensors,
    expected: tuple[str, ...],
    resets: Tensor | None = None,
    micro: int = 1,
    segments: int = 1,
    dtype: torch.dtype = torch.float32,
    limit: float = LIMIT,
    chunk: int = 16,
) -> None:
    """Check that results are within `limit` of the token loop in fp64 and that the expected kernels run last."""
    ours = {key: x.to(dtype) for key, x in case.items()}
    expected_results = truth(name, {key: x.double() for key, x in ours.items()}, resets, micro)
    with pytest.MonkeyPatch.context() as patch:
        ran = kernels_ran(patch)
        results = by_kernels(name, ours, resets, micro, segments, chunk)
    assert tuple(ran[len(ran) - len(expected) :]) == expected
    assert not {"states", "outputs"} & set(ran)
    errors = {key: error(a, b) for key, a, b in zip(("out", "final"), results, expected_results, strict=True)}
    assert {key: size for key, size in errors.items() if not size < limit} == {}


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("name", [*PREPARED, "rows before", "constant delta", "rows old before"])
def test_prepared_rows(name: str) -> None:
    corrected = {"delta", "comba", "decayed", "old"} & set(name.split())
    expected = ("prepare", "solve", "walk") if corrected else ("prepare", "walk")
    check(name, draw_case(name, tokens=TOKENS, sizes=SMALL), expected)


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("name", FUSED)
def test_unprepared_rows(name: str) -> None:
    expected = ("weights", "fused") if "scalar" in name else ("fused",)
    check(name, draw_case(name, tokens=TOKENS, sizes=SMALL), expected)


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("tokens", [17, 65, 129])
@pytest.mark.parametrize("name", ["constant", "scalar", "rows delta"])
def test_lengths(name: str, tokens: int) -> None:
    check(name, draw_case(name, tokens=tokens, sizes=(1, 1, 6, 5)), (), chunk=64, limit=2e-6)


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("name", [*FUSED, "rows", "delta", "rows old"])
def test_resets(name: str) -> None:
    resets = torch.zeros(2, TOKENS, dtype=torch.bool)
    resets[0, [3, 16, 31]], resets[1, 20] = True, True
    check(name, draw_case(name, tokens=TOKENS, sizes=(2, 1, 8, 5)), (), resets)


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("name", ["scalar", "rows before", "scalar delta"])
def test_micro_steps(name: str) -> None:
    resets = torch.zeros(1, 20, dtype=torch.bool)
    resets[0, [3, 15]] = True
    check(name, draw_case(name, tokens=20, micro=2, sizes=(1, 1, 8, 5)), ("walk",), resets, micro=2)


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("name", ["constant", "scalar", "scalar before", "rows", "rows delta"])
def test_closed_gates(name: str) -> None:
    case = draw_case(name, tokens=TOKENS, sizes=(1, 2, 8, 5))
    if name == "constant":
        case["gate"][0] = -math.inf
    else:
        case["gate"][:, :, [0, 5, 20]] = -math.inf
    check(name, case, ())


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize(
    ("name", "joining"), [("", "joined"), ("scalar", "joined"), ("rows", "joined"), ("scalar delta", "multiplied")]
)
def test_three_segments(name: str, joining: str) -> None:
    """Segments of two, two and one chunks; their rows are always prepared."""
    check(name, draw_case(name, tokens=75, sizes=(2, 1, 12, 5)), ("segments", joining, "walk"), segments=3)


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("name", ["scalar", "rows old"])
def test_blocks_of_columns(name: str) -> None:
    check(name, draw_case(name, tokens=17, sizes=(1, 1, 40, 70)), ())


@pytest.mark.parametrize("name", ["constant", "scalar", "rows delta", "rows old"])
def test_half_precision(name: str) -> None:
    """Half precision is fp16; the interpreter cannot multiply bf16."""
    expected = ("walk",) if "rows" in name else ("fused",)
    check(name, draw_case(name, tokens=TOKENS, sizes=(1, 1, 32, 16)), expected, dtype=torch.float16, limit=1e-2)


def test_any_strides() -> None:
    """Rows are read in place: tokens before heads, the layout of most models."""
    case = {key: x.half() for key, x in draw_case("scalar", tokens=20, sizes=(2, 3, 16, 24)).items()}
    strided = {key: x.transpose(1, 2).contiguous().transpose(1, 2) for key, x in case.items()}
    expected, result = by_kernels("scalar", case), by_kernels("scalar", strided)
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


def shapes_of_unset_tensors(
    name: str, case: Tensors, segments: int, patch: pytest.MonkeyPatch
) -> list[tuple[int, ...]]:
    """Run a call and return the shapes of all fp32 tensors allocated unset; fill these tensors with NaN."""
    empty, shapes = torch.empty, list[tuple[int, ...]]()

    def recording_empty(*sizes: int, **more: torch.dtype | torch.device) -> Tensor:
        tensor: Tensor = empty(*sizes, **more)  # type: ignore[call-overload]
        if tensor.dtype == torch.float32:
            shapes.append(tuple(tensor.shape))
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    patch.setattr(torch, "empty", recording_empty)
    results = by_kernels(name, case, segments=segments)
    assert all(x.isfinite().all() for x in results)
    return shapes


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("name", ["scalar", "rows delta"])
def test_states_between_chunks_are_not_stored(name: str, segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = {key: x.half() for key, x in draw_case(name, tokens=75, sizes=(1, 2, 16, 16)).items()}
    shapes = shapes_of_unset_tensors(name, case, segments, monkeypatch)
    states = [shape for shape in shapes if len(shape) == 4 and shape[-2:] == (16, 16)]
    assert states == [(2, segments + 1, 16, 16)]


@pytest.mark.parametrize("name", ["scalar", "rows delta"])
def test_calls_with_gradients_store_states(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = kernels_ran(monkeypatch)
    ours = leaves(draw_case(name, tokens=20, sizes=(1, 1, 16, 16)), torch.float16)
    expected = by_kernels(name, ours)
    assert ran[-2:] == ["states", "outputs"]
    ran.clear()
    with torch.no_grad():
        result = by_kernels(name, ours)
    assert not {"states", "outputs"} & set(ran)
    assert all(error(a, b) < 2e-3 for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "dtype", "rows"),
    [("columns", torch.float16, 8), ("scalar", torch.float32, 8), ("scalar", torch.float16, 264)],
)
def test_unsupported_single_passes_store_states(
    name: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = kernels_ran(monkeypatch)
    case = {key: x.to(dtype) for key, x in draw_case(name, tokens=17, sizes=(1, 1, rows, 5)).items()}
    by_kernels(name, case)
    assert ran[-2:] == ["states", "outputs"]


def test_forward_mode_is_refused() -> None:
    q = torch.randn(1, 1, 20, 8, dtype=torch.float16)
    for tokens in (5, 20):
        with torch.autograd.forward_ad.dual_level(), pytest.raises(UnsupportedError):
            first = q[:, :, :tokens]
            dual = torch.autograd.forward_ad.make_dual(first, first)  # type: ignore[no-untyped-call]
            linear_recurrence(dual, first, first)


def problem(form: RecurrenceClass, width: int = 64, dtype: str = "bfloat16") -> RecurrenceProblem:
    return RecurrenceProblem(form, width, width, dtype, 64, TARGETS["sm_90"])


def test_which_problems_run_in_a_single_pass() -> None:
    assert walk_stages(problem(RecurrenceClass())) == ("walk", "fused")
    assert walk_stages(problem(RecurrenceClass(gate="scalar"))) == ("walk", "weights", "fused")
    assert walk_stages(problem(RecurrenceClass(resets=True), 128)) == ("walk", "weights", "fused")
    assert walk_stages(problem(RecurrenceClass(gate="scalar"), 256)) == ("walk",)
    assert walk_stages(problem(RecurrenceClass(gate="scalar", micro=2))) == ("walk",)
    assert walk_stages(problem(RecurrenceClass(gate="rows", columns=True))) == ()
    assert walk_stages(problem(RecurrenceClass(), dtype="float32")) == ()
    assert walk_stages(problem(RecurrenceClass(), 257)) == ()


def test_texts_store_no_states_in_loops() -> None:
    for form in SELECTION.values():
        for stage in {"walk", "fused"} & set(walk_stages(problem(form))):
            _, _, loop = emit(problem(form), stage).text.partition("for chunk in")
            stored = [line for line in loop.split("\n") if "tl.store" in line]
            assert [line.strip().partition(",")[0].partition(" ")[0] for line in stored] == [
                "tl.store(out_at",
                "tl.store(states",
            ]
            assert stored[0].startswith(" " * 8)
            assert stored[1].startswith(" " * 4 + "tl")
