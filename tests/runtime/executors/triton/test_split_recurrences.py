"""Linear recurrences whose batch heads are split into segments, in Triton's interpreter, against the token loop."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import recurrence_cases
from attnc.compiler.recurrences.recurrence_class import RecurrenceClass
from attnc.compiler.recurrences.segment_count import even_segments, fitting_segments
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.executors.recurrent.linear_inputs import Delta
from attnc.runtime.executors.triton.recurrent import split
from attnc.runtime.executors.triton.recurrent.linear_on_gpu import linear_recurrence
from attnc.runtime.executors.triton.recurrent.recurrence_tensors import RecurrenceTensors, problem_of
from kernels_ran import kernels_ran
from recurrence_cases import Tensors, chunked, draw_case, error, gradients, leaves, truth

pytest.importorskip("triton")

TOKENS = 75
"""Five chunks of 16 rows, the last one partial: three segments of two, two and one chunks, or two of three and two."""
SMALL = (1, 2, 12, 5)
LIMIT = 1e-6
"""Error limit of fp32, relative to the largest exact entry."""


def results(name: str, tensors: Tensors, segments: int, resets: Tensor | None = None, micro: int = 1) -> Tensors:
    """Return results and gradients by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrence_cases, "linear_recurrence", partial(linear_recurrence, segments=segments))
        return results_by_name(chunked(name, tensors, resets, micro, chunk=16), tensors)


def results_by_name(result: recurrence_cases.Result, tensors: Tensors) -> Tensors:
    more = {f"d_{key}": x for key, x in gradients(result, tensors).items()}
    return {"out": result[0], "final": result[1], **more}


def errors_above(ours: Tensors, expected: Tensors, limit: float = LIMIT) -> dict[str, float]:
    """Return the tensors whose error is above the limit."""
    errors = {key: error(ours[key], expected[key]) for key in expected}
    return {key: size for key, size in errors.items() if not size < limit}


def check(
    name: str,
    case: Tensors,
    segments: int,
    resets: Tensor | None = None,
    micro: int = 1,
    dtype: torch.dtype = torch.float32,
    limit: float = LIMIT,
) -> None:
    ours = leaves(case, dtype)
    exact = leaves({key: x.detach().double() for key, x in ours.items()})
    expected = results_by_name(truth(name, exact, resets, micro), exact)
    assert errors_above(results(name, ours, segments, resets, micro), expected, limit) == {}


@pytest.mark.parametrize("segments", [2, 3])
@pytest.mark.parametrize("name", ["scalar", "rows columns", "delta", "rows delta"])
def test_two_and_three_segments(name: str, segments: int) -> None:
    check(name, draw_case(name, tokens=TOKENS, sizes=SMALL), segments)


@pytest.mark.parametrize(
    "name",
    ["", "constant", "columns", "scalar before", "rows before", "constant delta", "scalar comba", "rows old"],
)
def test_classes(name: str) -> None:
    check(name, draw_case(name, tokens=TOKENS, sizes=SMALL), 3)


@pytest.mark.parametrize("name", ["", "constant", "rows columns", "scalar delta"])
def test_micro_steps_and_resets(name: str) -> None:
    resets = torch.zeros(2, 38, dtype=torch.bool)
    resets[0, [0, 11, 30]] = True
    check(name, draw_case(name, tokens=38, micro=2, sizes=(2, 1, 8, 5)), 3, resets, micro=2)


@pytest.mark.parametrize("name", ["scalar", "rows", "columns", "rows delta"])
def test_closed_gates(name: str) -> None:
    """One segment passes nothing on, one passes only some rows, and one is open."""
    case = draw_case(name, tokens=90, sizes=(1, 1, 8, 5))
    for key in {"gate", "gate_columns"} & case.keys():
        case[key][:, :, 70] = -math.inf
        case[key][0, 0, 40, ...].view(-1)[:3] = -math.inf
    check(name, case, 3)


@pytest.mark.parametrize("name", ["rows columns", "scalar delta"])
def test_blocks_of_columns_and_rows(name: str) -> None:
    check(name, draw_case(name, tokens=40, sizes=(1, 1, 40, 70)), 3)


@pytest.mark.parametrize("name", ["rows", "scalar delta"])
def test_half_precision(name: str) -> None:
    check(name, draw_case(name, tokens=TOKENS, sizes=(1, 1, 16, 16)), 3, dtype=torch.float16, limit=1e-2)


@pytest.mark.parametrize("name", ["rows columns", "rows comba"])
def test_same_bits_and_no_read_of_unset_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def empty_as_nan(*sizes: Any, **more: Any) -> Tensor:
        tensor = empty(*sizes, **more)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 1)

    case = leaves(draw_case(name, tokens=50, sizes=(1, 1, 12, 5)), torch.float32)
    first = results(name, case, 4)
    monkeypatch.setattr(torch, "empty", empty_as_nan)
    second = results(name, case, 4)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("name", "joining"), [("scalar", "joined"), ("scalar delta", "multiplied")])
def test_which_kernels_run(name: str, joining: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = kernels_ran(monkeypatch)
    case = leaves(draw_case(name, tokens=40, sizes=(1, 1, 8, 5)), torch.float32)
    unsplit = results(name, case, 1)
    more = {"segments", joining, "adjoint_segments", f"adjoints_{joining}"}
    assert not more & set(ran)
    ran.clear()
    parts = results(name, case, 2)
    assert more < set(ran)
    assert ran.index("segments") < ran.index(joining) < ran.index("states")
    assert errors_above(parts, unsplit) == {}


def test_a_call_without_gradients() -> None:
    case = {key: x.float() for key, x in draw_case("delta", tokens=40, sizes=(1, 1, 8, 5)).items()}
    q, k, v, state = (case[key] for key in ("q", "k", "v", "state"))
    first, second = (
        linear_recurrence(q, k, v, correction=Delta(case["beta"]), state=state, chunk=16, segments=segments)
        for segments in (1, 100)
    )
    assert all(error(a, b) < LIMIT for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("programs", "chunks", "multiprocessors", "expected"),
    [
        (1, 1000, 1, 1),
        (16, 1024, 132, 8),
        (16, 63, 132, 4),
        (16, 31, 132, 1),
        (33, 1024, 132, 4),
        (34, 1024, 132, 1),
        (1, 4096, 132, 128),
        (1, 1, 132, 1),
        (200, 1024, 132, 1),
    ],
)
def test_how_many_segments_fit(programs: int, chunks: int, multiprocessors: int, expected: int) -> None:
    assert fitting_segments(programs, chunks, multiprocessors) == expected


def test_no_segment_is_empty() -> None:
    for chunks in range(1, 40):
        for requested in range(1, 45):
            segments = even_segments(requested, chunks)
            span = -(-chunks // segments)
            assert segments <= requested
            assert (segments - 1) * span < chunks <= segments * span


@pytest.mark.parametrize(
    ("form", "segments", "expected"),
    [
        (RecurrenceClass(gate="rows"), None, 16),
        (RecurrenceClass(gate="rows"), 1, 1),
        (RecurrenceClass(correction="delta"), None, 16),
        (RecurrenceClass(correction="delta"), 3, 3),
        (RecurrenceClass(correction="old"), None, 16),
    ],
)
def test_when_recurrences_are_split(
    form: RecurrenceClass, segments: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "multiprocessors", lambda _: 132)
    q = torch.zeros(1, 4, 64 * 128, 64)
    call = RecurrenceTensors(problem_of(form, q, q, torch.bfloat16, 64), 1, 4, q.shape[2], q.device)
    split.split(call, "states", segments)
    assert call.segments == expected


def test_the_interpreter_counts_one_multiprocessor() -> None:
    assert split.multiprocessors(torch.device("cpu")) == 1


def test_zero_segments_are_refused() -> None:
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ArgumentError, match="segments is 0"):
        linear_recurrence(x, x, x, segments=0)


def inputs_with_growing_errors(dtype: torch.dtype) -> Tensors:
    """Return inputs whose first head has keys and β with which each step multiplies an error by -1.04."""
    case = leaves(draw_case("delta", tokens=TOKENS, sizes=SMALL), torch.float32)
    rows = {name: case[name].detach().clone() for name in ("q", "k", "v", "state", "beta")}
    rows["k"][:, 0] = 1.02**0.5 * torch.nn.functional.one_hot(torch.tensor(1), SMALL[2])
    rows["beta"][:, 0] = 2.0
    return {name: x if name in ("state", "beta") else x.to(dtype) for name, x in rows.items()}


@pytest.mark.parametrize("recorded", [True, False])
def test_a_head_with_growing_states_is_not_split(recorded: bool) -> None:
    case = inputs_with_growing_errors(torch.float32 if recorded else torch.float16)
    results_by_segments: dict[int, list[Tensor]] = {}
    for segments in (1, 3):
        q, k, v, state, beta = (x.clone().requires_grad_(recorded) for x in case.values())
        arguments: dict[str, Any] = {"correction": Delta(beta), "state": state, "chunk": 16, "segments": segments}
        out, final = linear_recurrence(q, k, v, **arguments)
        results_by_segments[segments] = [out.detach(), final.detach()]
        if recorded:
            results_by_segments[segments] += torch.autograd.grad(out.sum() + final.sum(), (q, k, v, state, beta))
    for unsplit, split_result in zip(results_by_segments[1], results_by_segments[3], strict=True):
        assert unsplit.isfinite().all()
        assert torch.equal(unsplit[:, 0], split_result[:, 0])
        assert error(split_result[:, 1], unsplit[:, 1].double()) < (LIMIT if recorded else 1e-2)
    assert not torch.equal(results_by_segments[1][1][:, 1], results_by_segments[3][1][:, 1])
