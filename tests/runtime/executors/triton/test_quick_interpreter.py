"""The interpreter of the tests computes what Triton's own functions compute, bit for bit, and raises its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import quick_interpreter
from attnc import compile_attention
from attnc.runtime.executors.triton import planner
from kernel_calls import operands, recorded
from recurrence_draws import example

triton = pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def known_version() -> None:
    if not triton.__version__.startswith(quick_interpreter.VERSION):
        pytest.skip(f"the interpreter of Triton {triton.__version__} runs as it is")


def of_pattern(name: str, dtype: torch.dtype, **values: Any) -> list[Tensor]:
    """Return the output and the gradients of a call by kernels."""
    torch.manual_seed(1)
    leaves = [x.requires_grad_() for x in operands(70, dtype=dtype).values()]
    with recorded() as launches:
        out = compile_attention(name, backend="triton", **values)(*leaves)
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert launches
    return [out.detach(), *grads]


def of_recurrence(name: str) -> list[Tensor]:
    """Return the output, the state and the gradients of a recurrence by kernels."""
    torch.manual_seed(1)
    q, k, v, inputs = example(name, B=1, H=1, T=21, dk=6, dv=5, dtype=torch.float32)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with recorded() as launches:
        out, state = compile_attention(name, backend="triton")(*leaves, return_state=True, **inputs)
        grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)
    assert launches
    return [out.detach(), *(x.detach() for x in state.values()), *grads]


def assert_alike(call: Any, *arguments: Any, **values: Any) -> None:
    quick = call(*arguments, **values)
    with quick_interpreter.as_it_is():
        slow = call(*arguments, **values)
    assert len(quick) == len(slow)
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(quick, slow, strict=True))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sliding_window", {"window": 20, "sinks": 2}),  # ranges of tiles
        ("power", {}),  # lists of tiles, arithmetic of integers
        ("softcap", {}),  # a score and its derivative
        ("moba", {"block": 16, "topk": 2}),  # selected blocks
    ],
)
def test_patterns(name: str, values: dict[str, object], target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointers on sm_80, boxes on sm_90."""
    from attnc.compiler.kernels.targets import TARGETS

    monkeypatch.setattr(planner, "target_of", lambda device: TARGETS[target])
    assert_alike(of_pattern, name, torch.float32, **values)


def test_half_precision() -> None:
    assert_alike(of_pattern, "sliding_window", torch.float16, window=20)


@pytest.mark.parametrize("name", ["gated_delta_net", "mamba1", "retention"])
def test_recurrences(name: str) -> None:
    """Products of chunks, an associative scan, and decay alone."""
    assert_alike(of_recurrence, name)


WRONG = {
    "a shape that is no power of two": "tl.store(p, tl.sum(tl.arange(0, 3)))",
    "shapes that do not match": "tl.store(p, tl.sum(tl.arange(0, 4) + tl.arange(0, 8)))",
    "a number out of range": "tl.store(p, tl.load(p).to(tl.int8) + 1000)",
    "a pointer plus a pointer": "tl.store(p + p, 1)",
}


@pytest.mark.parametrize("line", WRONG.values(), ids=WRONG)
def test_errors_are_alike(line: str, tmp_path: Any) -> None:
    file = tmp_path / "kernel.py"
    file.write_text(f"import triton\nimport triton.language as tl\n\n@triton.jit\ndef kernel(p):\n    {line}\n")
    messages = []

    def run() -> None:
        names: dict[str, Any] = {"__name__": "kernel"}
        exec(compile(file.read_text(), str(file), "exec"), names)
        with pytest.raises(Exception) as error:
            names["kernel"][(1,)](torch.zeros(1, dtype=torch.int32))
        messages.append((type(error.value).__name__, str(error.value)))

    run()
    with quick_interpreter.as_it_is():
        run()
    assert messages[0] == messages[1]


def test_own_functions_come_back() -> None:
    from triton.language import core
    from triton.runtime import interpreter

    quick = core.block_type.__init__
    with quick_interpreter.as_it_is():
        assert core.block_type.__init__.__module__ == core.__name__
        assert "name" not in vars(core.block_type)
        assert interpreter._get_np_dtype.__module__ == interpreter.__name__
        assert interpreter.interpreter_builder.options.sanitize_overflow
    assert core.block_type.__init__ is not quick
    assert core.block_type.__init__.__module__ == quick_interpreter.__name__
