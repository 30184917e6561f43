"""The kernel for arbitrary step equations, in Triton's interpreter, against the token loop in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch import Tensor

from attnc import EvaluationError, UnsupportedError, compile_attention
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.recurrences.derived import NoFormError
from attnc.compiler.recurrences.kernels.stepping import Stepping
from attnc.compiler.recurrences.kernels.tape_kernels import emit_token_by_token
from attnc.runtime.executors.recurrent import derived_recurrence
from attnc.runtime.executors.recurrent import pattern_recurrence as calls
from attnc.runtime.executors.triton import launch as launching
from attnc.runtime.executors.triton.recurrent import token_loop_on_gpu
from attnc.runtime.executors.triton.recurrent.recurrence_texts import recurrent_kernels
from attnc.runtime.planning import planners
from attnc.runtime.toolchain.compiling import CompiledBinary
from compiled_kernels import Compiler
from recurrence_draws import example

pytest.importorskip("triton")

INPUTS = """
    input hold: unit[batch, token, head]
    input rows: unit[batch, token, head, dk]
    input columns: real[batch, token, head, dv]
    input w: real[head, dk, dk]
    input several: real[batch, token, head, 3, dk]
    input at: int[token]
    input fresh: bool[batch, token]
"""

EQUATIONS = {
    "entry by entry": "step S = tanh(hold * S + outer(k, v))",
    "rows that meet": "step S = hold * S + outer(k, v - 0.1 * tanh(k @ S))",
    "columns that meet": "step S = hold * S + outer(k, normalised(v) - rms(k @ S))",
    "a normalised state": "step S = hold * S + outer(k, v) * (1 / (1 + sqrt(1 + dot(k @ S, k @ S))))",
    "an extreme": "step S = max(S * hold, outer(k, v)) - min(0.1 * S, 0.2, outer(rows, columns))",
    "a soft maximum": "step S = hold * S + outer(k, softmax(k @ S + v))",
    "functions": "let x = S - outer(k, v)\n"
    "step S = tanh(hold * sigmoid(S) * softplus(x) + silu(x) * elu(S) + relu(x) - abs(S) / (2 + cos(x)))",
    "powers": "let x = log(1 + exp(sin(S))) * 0.1 + (0.5 + abs(S)) ** 1.5 * 0.1\n"
    "step S = S * hold + outer(k, v) / (1 + S ** 2) + x",
    "a matrix": "step S = hold * S + 0.1 * (w @ tanh(S)) + outer(k, v)",
    "matrices of states": "state A: [dk, dk]\nstep A = tanh(A @ A * 0.3 + outer(k, rows))\n"
    "step S = hold * (A @ S) * 0.2 + outer(k, v)",
    "a diagonal": "step S = hold * S + 0.2 * (diag(rows) @ sin(S)) + outer(k, v)",
    "several steps": "step S = tanh(S + outer(several[j], v)) for j in 0 .. 3",
    "an entry": "step S = hold * tanh(S + outer(k, v)) + S[at] * 0.1",
    "a sum": "step S = hold * S + outer(k, v) + 0.1 * sum(tanh(S * (j + 1)) for j in 0 .. 3 if j != at)",
    "extremes along axes": "let x = max(S[i] for i in 0 .. dk) - min(S[i, j] for i in 0 .. dk, j in 0 .. dv)\n"
    "let z = k @ S\n"
    "step S = hold * S + outer(k, tanh(v - 0.1 * (x + max(z[i] * 2 for i in 0 .. dv))))",
    "sums along axes": "let x = sum(tanh(S[i, j]) ** 2 / 3 for i in 0 .. dk, j in 0 .. dv)\n"
    "step S = hold * S + outer(k, tanh(v - 0.1 * sum(S[i] for i in 0 .. dk))) / (1 + x)",
    "places": "step S = tanh(S + outer(k, v)) if t % 3 == 0 else hold * S",
    "states handed on": "state A: [dk, dv]\nstate Z: [dk, dv]\nstep Z = A\nstep A = S\n"
    "step S = hold * tanh(S) + outer(k, v) + 0.1 * Z",
    "resets": "reset fresh\nstep S = tanh(hold * S + outer(k, v))",
    "an order": "scan -t\nstep S = tanh(hold * S + outer(k, v))",
}

FROM_NOTHING = frozenset({"an order", "places", "matrices of states", "states handed on"})
"""Cases without an initial state: one needs all tokens, the others have more states than `S`."""


def source(lines: str) -> str:
    body = "".join(f"    {line.strip()}\n" for line in lines.splitlines())
    return f"recurrence r{INPUTS}    state S: [dk, dv]\n{body}    read q @ S\n"


def draw_inputs(attend: Any, tokens: int, dk: int, dv: int, heads: int = 2) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Draw q, k, v and inputs, all in fp64."""
    draw = torch.Generator().manual_seed(tokens + dk)
    sizes = {"batch": 2, "head": heads, "token": tokens, "dk": dk, "dv": dv, "n": 3}
    rows = [torch.randn(2, heads, tokens, width, generator=draw).double() for width in (dk, dk, dv)]
    inputs = {}
    for tensor in attend.pattern.tensors:
        shape = [sizes.get(str(dim), dim) for dim in tensor.dims]
        if tensor.kind == "real":
            x = torch.rand(shape, generator=draw) if tensor.refinement else torch.randn(shape, generator=draw)
            inputs[tensor.name] = -x.double() if tensor.refinement == "log_decay" else x.double()
        elif tensor.kind == "complex":
            inputs[tensor.name] = torch.complex(-torch.rand(shape, generator=draw), torch.rand(shape, generator=draw))
        else:
            tensor_input = torch.randint(0, 4 if tensor.kind == "int" else 2, shape, generator=draw)
            inputs[tensor.name] = tensor_input.bool() if tensor.kind == "bool" else tensor_input
    return rows, inputs


def run(
    attend: Any, rows: list[Tensor], inputs: dict[str, Tensor], dtype: torch.dtype, **more: Any
) -> dict[str, Tensor]:
    """Return the output, the last states, and the gradients of their weighted sum."""
    real = {name: x.to(dtype).requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    leaves = {**{name: x.to(dtype).requires_grad_() for name, x in zip("qkv", rows, strict=True)}, **real}
    begun = {name: x.to(dtype).requires_grad_() for name, x in more.items()}
    arguments = {**inputs, **real, **({"state": begun} if begun else {})}
    out, state = attend(*(leaves[name] for name in "qkv"), return_state=True, **arguments)
    results = {"out": out, **state}
    weights = torch.Generator().manual_seed(3)
    total = sum(
        (x * torch.randn(x.shape, generator=weights).to(x.dtype)).sum()
        for x in results.values()
        if x.is_floating_point()
    )
    wanted = {**leaves, **begun}
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return {**results, **{f"d{name}": x for name, x in zip(wanted, grads, strict=True)}}


def check(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 3e-6) -> None:
    """Check that no error exceeds `tolerance` times the tensor's largest entry."""
    assert ours.keys() == expected.keys()
    off = {}
    for name, exact in ((name, x.detach()) for name, x in expected.items()):
        size = float(exact.abs().max().clamp(min=1e-3))
        distance = float((ours[name].detach().double() - exact).abs().max())
        if not distance <= tolerance * size:
            off[name] = distance / size
    assert off == {}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the kernels that run."""
    names: list[str] = []
    launch = launching.launch

    def recording_launch(kernel: Any, *more: Any) -> None:
        names.append(f"{kernel.function.partition('_token_by_token_')[2]} in {kernel.parts}")
        launch(kernel, *more)

    monkeypatch.setattr(token_loop_on_gpu, "launch", recording_launch)
    return names


@pytest.fixture(params=["roomy", "tight"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let kernels hold all matrices of a token ("roomy") or not ("tight"), as kernels of large heads cannot."""
    if request.param == "tight":
        monkeypatch.setattr(Stepping, "is_tight", True)
    emit_token_by_token.cache_clear()
    yield request.param
    emit_token_by_token.cache_clear()


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("equation", EQUATIONS)
def test_equations(equation: str, kernels: list[str]) -> None:
    text = source(EQUATIONS[equation])
    attend: Any = compile_attention(text, backend="triton")
    rows, inputs = draw_inputs(attend, 21, 10, 6)
    begun = torch.randn(2, 2, 10, 6, generator=torch.Generator().manual_seed(1)).double() * 0.3
    more = {} if equation in FROM_NOTHING else {"S": begun}
    ours = run(attend, rows, inputs, torch.float32, **more)
    assert kernels == ["forward_kept in 1", "backward in 1"]
    expected = run(compile_attention(text, backend="reference"), rows, inputs, torch.float64, **more)
    check(ours, expected)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(("equation", "parts"), [("entry by entry", 2), ("rows that meet", 2), ("a soft maximum", 1)])
def test_independent_columns_are_split_between_programs(equation: str, parts: int, kernels: list[str]) -> None:
    text = source(EQUATIONS[equation])
    attend: Any = compile_attention(text, backend="triton")
    rows, inputs = draw_inputs(attend, 35, 66, 21)
    ours = run(attend, rows, inputs, torch.float32)
    assert kernels == [f"forward_kept in {parts}", f"backward in {parts}"]
    check(ours, run(compile_attention(text, backend="reference"), rows, inputs, torch.float64))


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65])
def test_lengths(tokens: int) -> None:
    attend: Any = compile_attention("yaad_linear", backend="triton")
    rows, inputs = draw_inputs(attend, tokens, 5, 3)
    expected = run(compile_attention("yaad_linear", backend="reference"), rows, inputs, torch.float64)
    check(run(attend, rows, inputs, torch.float32), expected)


NUMBERS_AND_VECTORS = """recurrence r
    input hold: unit[batch, token, head]
    state z: [dk]
    state n: real = 0
    state S: [dk, dv]
    step z = tanh(z + k * n)
    step n = hold * n + sqrt(1 + dot(z, k))  if t > 0 else 1
    step S = S * sigmoid(n) + outer(z, v)
    read (z * q) @ S / (1 + n * n)
"""


@pytest.mark.usefixtures("room")
def test_scalar_and_vector_states(kernels: list[str]) -> None:
    text = NUMBERS_AND_VECTORS.replace("sqrt(1 + dot(z, k))", "sigmoid(dot(z, k))")
    attend: Any = compile_attention(text, backend="triton")
    rows, inputs = draw_inputs(attend, 19, 66, 35)
    ours = run(attend, rows, inputs, torch.float32)
    assert kernels == ["forward_kept in 3", "backward in 3"]
    check(ours, run(compile_attention(text, backend="reference"), rows, inputs, torch.float64))


def test_a_tight_kernel_computes_matrices_where_they_are_read(room: str) -> None:
    attend = compile_attention("yaad_linear")
    recurrent = attend._core.parts.recurrence
    assert recurrent is not None
    kernel_list = recurrent_kernels(attend._bound, recurrent, TARGETS["sm_90"], 16, torch.float32, {})
    backward = next(kernel.text for name, kernel in kernel_list.items() if name.endswith("backward"))
    token = backward.partition("for back in")[2]
    assert token.count("tl.load(before0") == (4 if room == "tight" else 1)
    assert ("tl.load(dbegun0" in token) is (room == "tight")


WITHOUT = {
    "s5": "a state is complex",
    "convs5_pointwise": "a state is complex",
    "mesa": "it solves a system with a state",
}
LIBRARY = (
    *("aaren", "comba", "delta_net", "gated_delta_net", "gated_delta_product", "gla", "gsa", "hgrn2", "kimi_delta"),
    *("lightnet", "mamba1", "mamba2_ssd", "memora_linear", "moneta_linear", "retention", "rwkv6", "rwkv7"),
    *("test_time_regression", "titans_linear", "ttt_linear", "yaad_linear"),
)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("name", LIBRARY)
def test_library_patterns_token_by_token(name: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _derive_no_passes(monkeypatch)
    q, k, v, example_inputs = example(name, B=2, H=2, T=19, dk=10, dv=6, dtype=torch.float64)
    inputs = {key: x for key, x in example_inputs.items() if isinstance(x, Tensor)}
    options = {key: x for key, x in example_inputs.items() if not isinstance(x, Tensor)}
    attend: Any = compile_attention(name, backend="triton", **options)
    ours = run(attend, [q, k, v], inputs, torch.float32)
    assert [kernel.partition(" ")[0] for kernel in kernels] == ["forward_kept", "backward"]
    reference = compile_attention(name, backend="reference", **options)
    check(ours, run(reference, [q, k, v], inputs, torch.float64), 1e-5)


@pytest.mark.parametrize("name", ["test_time_regression", "yaad_linear"])
def test_large_heads(name: str, kernels: list[str]) -> None:
    """Heads so large that the kernels spill their states, in two stretches of tokens."""
    q, k, v, example_inputs = example(name, B=1, H=1, T=18, dk=100, dv=70, dtype=torch.float64)
    inputs = {key: x for key, x in example_inputs.items() if isinstance(x, Tensor)}
    attend: Any = compile_attention(name, backend="triton")
    ours = run(attend, [q, k, v], inputs, torch.float32)
    assert kernels == ["forward_kept in 1", "backward in 1"]
    reference = compile_attention(name, backend="reference")
    check(ours, run(reference, [q, k, v], inputs, torch.float64), 1e-5)


@pytest.mark.parametrize("name", WITHOUT)
def test_unsupported_step_equations_are_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _derive_no_passes(monkeypatch)
    attend: Any = compile_attention(name, backend="triton")
    rows, inputs = draw_inputs(attend, 3, 4, 4)
    with pytest.raises(UnsupportedError, match=f"token by token, but not by a kernel: {WITHOUT[name]}"):
        run(attend, rows, inputs, torch.float32)


def _derive_no_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the planner derive no passes, and drop planners that other tests hold with passes already derived."""
    monkeypatch.setattr(planners, "_live_planners", WeakValueDictionary())
    monkeypatch.setattr(calls, "derive", _refusing)
    monkeypatch.setattr(derived_recurrence, "derive", _refusing)


def _refusing(*_: object, **__: object) -> None:
    raise NoFormError("a test")


def test_factors_above_1_run_token_by_token(kernels: list[str]) -> None:
    lines = "state S: [dk, dv] = 1\n    step S = 1.5 * S\n    step S = S - 0.5 * outer(k, k @ S) + outer(k, v)"
    text = f"recurrence r\n    {lines}\n    read q @ S\n"
    attend: Any = compile_attention(text, backend="triton")
    rows, inputs = draw_inputs(attend, 9, 4, 4)
    ours = run(attend, rows, inputs, torch.float32)
    assert kernels == ["forward_kept in 1", "backward in 1"]
    check(ours, run(compile_attention(text, backend="reference"), rows, inputs, torch.float64))


def test_out_of_range_entries() -> None:
    attend: Any = compile_attention(source(EQUATIONS["an entry"]), backend="triton")
    rows, inputs = draw_inputs(attend, 5, 3, 3)
    with pytest.raises(EvaluationError, match="the index 3 is out of range"):
        attend(*(x.float() for x in rows), **{**inputs, "at": torch.full((5,), 3)})


def test_second_derivatives_are_refused() -> None:
    attend: Any = compile_attention("yaad_linear", backend="triton")
    rows, inputs = draw_inputs(attend, 5, 3, 3)
    q, k, v = (x.float().requires_grad_() for x in rows)
    out = attend(q, k, v, **{name: x.float() for name, x in inputs.items()})
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(grad.sum(), v)


def test_16_bit_queries_and_shared_keys() -> None:
    attend: Any = compile_attention("yaad_linear", backend="triton")
    rows, inputs = draw_inputs(attend, 18, 8, 8)
    tensors = [x.bfloat16() for x in rows]
    tensors = [tensors[0], tensors[1][:, :1], tensors[2][:, :1]]
    fp32_inputs = {name: x.float() for name, x in inputs.items()}
    result = attend(*tensors, **fp32_inputs)
    reference: Any = compile_attention("yaad_linear", backend="reference")
    exact = reference(*(x.double() for x in tensors), **inputs)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), exact, atol=4e-3 * float(exact.abs().max()), rtol=0)


LEAN = ("entry by entry", "several steps", "a soft maximum", "rows that meet")
"""Patterns without products of two matrices, and without sines, whose code keeps numbers on a stack."""


COMPILED = {"sm_90": ("yaad_linear", *LEAN), "sm_80": LEAN[:1], "sm_100": LEAN[2:3], "gfx942": LEAN[3:]}
"""The patterns compiled for each target: all for one, another one for each other."""


@pytest.mark.slow
@pytest.mark.xdist_group("compiling")
@pytest.mark.parametrize("target", COMPILED)
def test_machine_code(target: str, compiler: Compiler) -> None:
    """No stack frame and no spills."""
    spills = {}
    for name in COMPILED[target]:
        text = source(EQUATIONS[name]) if name in EQUATIONS else name
        for width in (64, 128):
            attend = compile_attention(text)
            recurrent = attend._core.parts.recurrence
            assert recurrent is not None
            kernel_list = recurrent_kernels(attend._bound, recurrent, TARGETS[target], width, torch.float32, {})
            kernels = list(kernel_list.values())
            for kernel, outcome in zip(kernels, compiler([(kernel, target) for kernel in kernels]), strict=True):
                assert isinstance(outcome, CompiledBinary), outcome
                if outcome.code.stack or outcome.code.spilled:
                    spills[kernel.function, width] = outcome.code.stack, outcome.code.spilled
    assert spills == {}
