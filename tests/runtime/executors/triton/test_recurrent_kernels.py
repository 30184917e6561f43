"""Linear recurrence kernels in Triton's interpreter against the token loop, and their machine code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import recurrence_cases
from attnc.compiler.recurrences.kernels.recurrence_kernels import emit, stages
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.executors.recurrent.linear_inputs import Delta, RankOne
from attnc.runtime.executors.triton.recurrent.linear_on_gpu import linear_recurrence
from attnc.runtime.executors.triton.recurrent.recurrence_tensors import problem_of
from attnc.runtime.toolchain import library_gate
from attnc.runtime.toolchain.recurrence_gate import SELECTION, cases, judge
from compiled_kernels import Compiler
from kernels_ran import kernels_ran
from recurrence_cases import CLASSES, REGIMES, Result, Tensors, chunked, draw_case, error, gradients, leaves, truth

pytest.importorskip("triton")

SMALL = (1, 2, 20, 12)
REGIME_CLASSES = ("scalar", "rows", "rows columns", "scalar delta", "rows delta before", "rows old")
LIMIT = 1e-6
"""Error limit of fp32, relative to the largest exact entry."""


def by_kernels(name: str, tensors: Tensors, resets: Tensor | None = None, micro: int = 1, chunk: int = 16) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrence_cases, "linear_recurrence", linear_recurrence)
        return chunked(name, tensors, resets, micro, chunk)


def check(
    name: str,
    case: Tensors,
    resets: Tensor | None = None,
    micro: int = 1,
    chunk: int = 16,
    dtype: torch.dtype = torch.float32,
    limit: float = LIMIT,
) -> None:
    """Check that results and gradients are within `limit` of the token loop in fp64.

    A gradient that cancels may exceed the limit by twice the error that the token loop itself has in that dtype.
    """
    ours = leaves(case, dtype)
    exact = leaves({key: x.detach().double() for key, x in ours.items()})
    actual, expected = by_kernels(name, ours, resets, micro, chunk), truth(name, exact, resets, micro)
    errors = {"out": error(actual[0], expected[0]), "final": error(actual[1], expected[1])}
    d_actual, d_expected = gradients(actual, ours), gradients(expected, exact)
    errors |= {f"d_{key}": error(d_actual[key], d_expected[key]) for key in d_actual}
    off = {key: size for key, size in errors.items() if not size < limit}
    if off and all(key.startswith("d_") for key in off):
        loop_leaves = leaves(case, dtype)
        d_loop = gradients(truth(name, loop_leaves, resets, micro), loop_leaves)
        off = {
            key: size for key, size in off.items() if not size < limit + 2 * error(d_loop[key[2:]], d_expected[key[2:]])
        }
    assert off == {}
    assert all(x.dtype == dtype for x in d_actual.values())


@pytest.mark.parametrize("name", CLASSES)
def test_classes(name: str) -> None:
    check(name, draw_case(name, tokens=37, sizes=SMALL))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", REGIME_CLASSES)
def test_regimes(name: str, regime: str) -> None:
    check(name, draw_case(name, regime, tokens=160, sizes=(1, 1, 18, 5)), chunk=64, limit=1.5e-6)


@pytest.mark.parametrize("name", ["constant", "rows columns", "scalar before", "scalar delta", "rows old"])
@pytest.mark.parametrize("micro", [2, 3])
def test_micro_steps_and_resets(name: str, micro: int) -> None:
    resets = torch.zeros(2, 20, dtype=torch.bool)
    resets[0, [0, 7, 8]], resets[1, 15] = True, True
    check(name, draw_case(name, tokens=20, micro=micro, sizes=(2, 1, 8, 5)), resets, micro)


@pytest.mark.parametrize("name", ["", "columns", "scalar before", "rows before", "delta", "rows decayed"])
def test_resets(name: str) -> None:
    resets = torch.zeros(2, 40, dtype=torch.bool)
    resets[0, [3, 16, 31]], resets[1, 20] = True, True
    check(name, draw_case(name, tokens=40, sizes=(2, 1, 8, 5)), resets)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 257])
@pytest.mark.parametrize("name", ["scalar", "rows delta"])
def test_lengths(name: str, tokens: int) -> None:
    check(name, draw_case(name, tokens=tokens, sizes=(1, 1, 6, 5)), chunk=64, limit=2e-6)


def check_without_gradients(
    name: str, case: Tensors, resets: Tensor | None, micro: int, patch: pytest.MonkeyPatch
) -> list[str]:
    """Check results of a call without gradients, and return the kernels that ran."""
    ran = kernels_ran(patch)
    ours = {key: x.float() for key, x in case.items()}
    actual, expected = (
        by_kernels(name, ours, resets, micro),
        truth(name, {k: x.double() for k, x in ours.items()}, resets, micro),
    )
    assert max(error(a, b) for a, b in zip(actual, expected, strict=True)) < LIMIT
    return ran


@pytest.mark.parametrize("name", CLASSES)
def test_few_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_without_gradients(name, draw_case(name, tokens=5, sizes=(2, 2, 20, 12)), None, 1, monkeypatch) == [
        "step"
    ]


@pytest.mark.parametrize("name", ["constant", "rows columns", "scalar before", "scalar delta", "rows old"])
def test_few_micro_steps_and_resets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resets = torch.zeros(2, 5, dtype=torch.bool)
    resets[0, [0, 3]], resets[1, 2] = True, True
    assert check_without_gradients(
        name, draw_case(name, tokens=5, micro=3, sizes=(2, 2, 8, 5)), resets, 3, monkeypatch
    ) == ["step"]


def test_closed_gates_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw_case("rows", tokens=4, sizes=(1, 1, 8, 5))
    case["gate"][:, :, 2] = -float("inf")
    assert check_without_gradients("rows", case, None, 1, monkeypatch) == ["step"]
    assert (
        check_without_gradients("rows", draw_case("rows", tokens=17, sizes=(1, 1, 8, 5)), None, 1, monkeypatch)[0]
        == "prepare"
    )


def test_no_tokens() -> None:
    case = leaves(draw_case("scalar delta", tokens=0, sizes=SMALL), torch.float32)
    out, final = by_kernels("scalar delta", case)
    assert out.shape == (1, 2, 0, 12)
    assert torch.equal(final, case["state"])


@pytest.mark.parametrize(("name", "sizes"), [("rows comba", (1, 1, 256, 40)), ("scalar old", (1, 1, 40, 200))])
def test_wide_heads(name: str, sizes: tuple[int, int, int, int]) -> None:
    check(name, draw_case(name, tokens=20, sizes=sizes))


@pytest.mark.parametrize("name", ["scalar", "rows delta", "rows columns before", "rows old"])
def test_half_precision(name: str) -> None:
    check(name, draw_case(name, tokens=40, sizes=(1, 1, 32, 16)), chunk=32, dtype=torch.float16, limit=1e-2)


def test_any_strides() -> None:
    case = draw_case("rows decayed", tokens=20, sizes=(2, 3, 12, 5))
    plain, strided = leaves(case, torch.float32), {}
    for key, x in plain.items():
        base = torch.zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 3) if x.ndim == 4 else x.detach().clone()
        strided[key] = base.transpose(1, 2)[..., 1 : 1 + x.shape[3]].copy_(x.detach()) if x.ndim == 4 else base
    expected, result = by_kernels("rows decayed", plain), by_kernels("rows decayed", strided)
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


def test_same_bits_and_no_read_of_unset_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def empty_as_nan(*sizes: Any, **more: Any) -> Tensor:
        tensor = empty(*sizes, **more)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 1)

    case = draw_case("rows old", tokens=20, micro=3, sizes=(1, 1, 12, 5))
    resets = torch.zeros(1, 20, dtype=torch.bool)
    results = []
    for _ in range(2):
        ours = leaves(case, torch.float32)
        mine = by_kernels("rows old", ours, resets, 3)
        results.append([*mine, *gradients(mine, ours).values()])
        monkeypatch.setattr(torch, "empty", empty_as_nan)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_closed_gate_has_no_gradient() -> None:
    ours = leaves(draw_case("rows", "-inf", tokens=160, sizes=(1, 1, 16, 16)), torch.float32)
    gate_grad = gradients(by_kernels("rows", ours, chunk=64), ours)["gate"]
    assert (gate_grad[:, :, [77, 128, 150]] == 0).all()


def test_results_have_the_inputs_dtypes() -> None:
    case = leaves(draw_case("scalar delta", tokens=17, sizes=SMALL), torch.float16)
    case["gate"] = case["gate"].detach().float().requires_grad_()
    out, final = by_kernels("scalar delta", case)
    assert (out.dtype, final.dtype) == (torch.float16, torch.float32)
    assert {key: x.dtype for key, x in gradients((out, final), case).items()} == {
        key: x.dtype for key, x in case.items()
    }


def drawn(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"q": torch.zeros(1, 1, 4, 8, dtype=torch.float64)}, UnsupportedError, "float64; convert to float32"),
        ({"micro": 65, "chunk": 128, "k": drawn(1, 1, 260, 8), "v": drawn(1, 1, 260, 5)}, UnsupportedError, "up to 64"),
        ({"gate": drawn(1, 1, 5)}, ArgumentError, "gate: expected shape"),
        ({"k": torch.zeros(1, 1, 4, 8, dtype=torch.int64)}, ArgumentTypeError, "k: expected real numbers"),
    ],
)
def test_refusals(more: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"q": drawn(1, 1, 4, 8), "k": drawn(1, 1, 4, 8), "v": drawn(1, 1, 4, 5)} | more
    with pytest.raises(kind, match=message):
        linear_recurrence(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_second_derivatives_raise() -> None:
    ours = leaves(draw_case("scalar", tokens=5, sizes=(1, 1, 4, 4)), torch.float32)
    out, _ = by_kernels("scalar", ours)
    (first,) = torch.autograd.grad(out.sum(), ours["q"], create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(first.sum(), ours["q"])


def test_kernel_texts_contain_only_what_their_class_needs() -> None:
    def texts(**more: Any) -> str:
        q = torch.zeros(1, 1, 64, 64)
        form = recurrence_form(**more)
        problem = problem_of(form, q, q, torch.float32, 64)
        lines = (line for stage in stages(form) for line in emit(problem, stage).text.split("\n"))
        return "\n".join(line for line in lines if not line.lstrip().startswith(("#", '"""')))

    plain = texts()
    assert not any(word in plain for word in ("exp(", "gate", "resets", "beta", "inverse", "% 1", "for level"))
    assert "resets" in texts(resets=True)
    assert "for level" not in texts(gate="scalar", correction="delta")
    assert "inverse_of_blocks" in texts(correction="delta")


def recurrence_form(**more: Any) -> Any:
    from attnc.compiler.recurrences.recurrence_class import RecurrenceClass

    return RecurrenceClass(**more)


def test_corrections_are_recognised() -> None:
    q = torch.nn.functional.normalize(torch.randn(1, 1, 6, 8), dim=-1)
    beta = torch.rand(1, 1, 6)
    delta = linear_recurrence(q, q, q, correction=Delta(beta))[0]
    comba = linear_recurrence(q, q, q, correction=Delta(beta, q))[0]
    written = linear_recurrence(q, beta[..., None] * q, q, correction=RankOne(-beta[..., None] * q, q, "decayed"))[0]
    assert torch.allclose(delta, comba, atol=1e-5)
    assert torch.allclose(delta, written, atol=1e-5)


COMPILED = {
    "sm_90": ["scalar", "rows", "rows columns", "scalar delta", "rows comba", "rows old"],
    "sm_80": ["scalar delta"],
    "sm_100": ["rows columns"],
    "gfx942": ["rows comba"],
}
"""The classes compiled for each target: all for one, another for each other; `make kernels` compiles all for all."""


@pytest.mark.slow
@pytest.mark.xdist_group("compiling")
@pytest.mark.parametrize("target", COMPILED)
def test_machine_code(target: str, compiler: Compiler) -> None:
    """No stack frame, no spills, products on tensor cores."""
    gate_cases = list(cases([target], [128], forms=[SELECTION[name] for name in COMPILED[target]]))
    outcomes = compiler([(case.source, case.target) for case in gate_cases])
    judged = {
        f"{case.pattern} {case.stage}": judge(case, outcome) for case, outcome in zip(gate_cases, outcomes, strict=True)
    }
    failed = {name: reasons for name, reasons in judged.items() if reasons}
    assert failed == {}


def test_collecting_kernels_reads_no_unset_memory() -> None:
    """Collecting launches no kernel: results stay unset, here NaN, which must not look like overflow before a reset."""
    collected = {case.source.function for case in library_gate.cases(["log_linear"], ["sm_90"], (64,))}
    assert collected >= {"scalar_resets_adjoints", "scalar_resets_values", "scalar_resets_keys"}
