"""Scores, weights, values, branches and decode steps as operators in a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from attnc import UnsupportedError, compile_attention
from attnc.runtime.call.example_inputs import example_inputs, head_count
from attnc.runtime.texts.library import pattern_names
from library_calls import SMALL, made_inputs
from operator_calls import draw, leaves, text_of

GENERAL = torch.ops.attnc.attend_general.default
DECODE = torch.ops.attnc.decode.default

NAMES = pattern_names()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    result: Callable[..., Any] = torch.compile(function, fullgraph=True, backend="aot_eager", **options)
    return result


@pytest.mark.parametrize("name", NAMES)
def test_compiled_library_equals_eager(name: str) -> None:
    """Compare output, LSE and every gradient for every pattern of the library."""
    attend = compile_attention(name, **SMALL.get(name, {}))
    heads = head_count(attend.bound) or 2
    fixed_inputs = made_inputs(name, 96, heads)
    if name == "bigbird":
        fixed_inputs["random"] = torch.randint(6, (heads, 6, 2))
    examples = example_inputs(attend.bound, 96, 96, fixed_inputs, heads=heads, sizes={"dk": 64, "dv": 64})
    inputs = fixed_inputs | {key: example.tensor for key, example in examples.items()}
    tensors = [torch.randn(1, heads, 96, 64) for _ in range(3)]
    real = {n: x for n, x in inputs.items() if x.is_floating_point()}

    def function(q: Tensor, k: Tensor, v: Tensor, inputs_of_call: dict[str, Any]) -> tuple[Tensor, ...]:
        outputs = (
            attend(q * 2, k, v, return_lse=True, **inputs_of_call)
            if attend.has_lse
            else (attend(q * 2, k, v, **inputs_of_call),)
        )
        return tuple(x.sin() for x in outputs)

    def results(run: Callable[..., tuple[Tensor, ...]]) -> list[Tensor | None]:
        qkv = leaves(tensors)
        inputs_of_call = dict(inputs) | {n: x.detach().requires_grad_() for n, x in real.items()}
        outputs = run(*qkv, inputs_of_call)
        total = sum((x.masked_fill(x.isinf() | x.isnan(), 0).sum() for x in outputs), torch.zeros(()))
        wanted = [*qkv, *(inputs_of_call[n] for n in real)]
        return [*outputs, *torch.autograd.grad(total, wanted, allow_unused=True)]

    for ours, expected in zip(results(compiled(function)), results(function), strict=True):
        if ours is None or expected is None:
            other = expected if ours is None else ours
            assert other is None or not other.any()
        else:
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_lengths_and_data_do_not_recompile() -> None:
    attend, counter = compile_attention("affine_scaled"), CompileCounterWithBackend("aot_eager")

    def call(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return attend(q, k, v, alpha=a, beta=b)

    function = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for n in (17, 18, 40, 64):
        tensors = [*draw(n), torch.randn(2, 4, n), torch.randn(2, 4, n)]
        want = attend(*tensors[:3], alpha=tensors[3], beta=tensors[4])
        torch.testing.assert_close(function(*tensors), want)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("name", "params"), [("alibi", {}), ("hierarchical", {"group": 4})])
def test_opcheck(name: str, params: dict[str, Any]) -> None:
    attend = compile_attention(name, **params)
    opcheck(GENERAL, (*leaves(draw()), [], text_of(attend), None))
    opcheck(GENERAL, (*leaves(draw(kv_heads=2)), [], text_of(attend), 0.5))


def test_opcheck_with_inputs() -> None:
    attend = compile_attention("affine_scaled")
    inputs = [torch.randn(2, 4, 17, requires_grad=True) for _ in range(2)]
    opcheck(GENERAL, (*leaves(draw()), inputs, text_of(attend), None))


def test_a_compiled_call_saves_only_operands_and_inputs() -> None:
    attend, saved = compile_attention("alibi"), list[Tensor]()

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    tensors = leaves(draw())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out, _ = GENERAL(*tensors, [], text_of(attend), None)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in tensors}
    assert out.requires_grad


def test_under_autocast() -> None:
    attend, tensors = compile_attention("alibi"), draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, expected = compiled(attend)(*tensors), attend(*tensors)
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(ours, expected)


def test_errors_of_refused_calls() -> None:
    attend, tensors = compile_attention("alibi"), leaves(draw())
    out, _ = GENERAL(*tensors, [], text_of(attend), None)
    (grad,) = torch.autograd.grad(out.sum(), tensors[:1], create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(grad.sum(), tensors[:1])
    with pytest.raises(UnsupportedError, match=r"torch\.func transforms of a pattern"):
        torch.func.grad(lambda q: attend(q, *tensors[1:]).sum())(tensors[0])


def test_fake_and_meta_tensors_give_shapes() -> None:
    attend = compile_attention("alibi")
    assert attend(*(x.to("meta") for x in draw(dv=12))).shape == (2, 4, 17, 12)
    with FakeTensorMode() as mode:
        assert attend(*(mode.from_tensor(x) for x in draw(dv=12))).shape == (2, 4, 17, 12)


def test_flops() -> None:
    """Each attention counts the FLOPs of its visible pairs; the backward also counts the forward that it repeats."""
    attend, tensors = compile_attention("alibi"), leaves(draw(40, dv=12))
    pairs = 2 * 4 * int(attend.mask(40).sum())
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(GENERAL(*tensors, [], text_of(attend), None)[0].sum(), tensors)
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    assert counts["attnc.attend_general"] == 2 * pairs * (8 + 12)
    assert counts["attnc.attend_general_backward"] == 2 * pairs * (4 * 8 + 3 * 12)


# --- decode ----------------------------------------------------------------------------------------------------------


def cache(slots: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 2, 8), torch.randn(2, 2, slots, 8), torch.randn(2, 2, slots, 8)


@pytest.mark.parametrize("name", ["sliding_window", "alibi", "gpt_oss"])
def test_steps_of_other_lengths_are_one_graph(name: str) -> None:
    attend, counter = compile_attention(name), CompileCounterWithBackend("aot_eager")
    inputs = {"sink": torch.randn(4)} if name == "gpt_oss" else {}
    q, k, v = cache()

    def step(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor, inputs_of_step: dict[str, Tensor]) -> Tensor:
        out: Tensor = attend.decode(q * 2, k, v, kv_len=kv_len, **inputs_of_step)  # type: ignore[call-overload]
        return out + 1

    function = torch.compile(step, fullgraph=True, backend=counter)
    with torch.no_grad():
        for lengths in ([2, 2], [9, 60], [64, 64], [30, 31]):
            kv_len = torch.tensor(lengths)
            assert torch.equal(function(q, k, v, kv_len, inputs), step(q, k, v, kv_len, inputs))
    assert counter.frame_count == 1


def test_rows_that_read_other_rows_are_refused_while_compiling() -> None:
    attend = compile_attention("hierarchical", group=4)
    with pytest.raises(RuntimeError, match="a cache of keys is not enough"):
        compiled(lambda q, k, v: attend.decode(q, k, v, kv_len=9))(*cache())


def test_pages_and_rings_in_a_graph() -> None:
    attend = compile_attention("sliding_window", window=5, sinks=1)
    q, k, v = cache(8)
    table = torch.tensor([[1, 0], [0, 1]])
    with torch.no_grad():
        for cache_options in ({"kv_len": torch.tensor([9, 16]), "block_table": table}, {"kv_len": 40, "ring": True}):
            ours = compiled(
                lambda *x, cache_options=cache_options: attend.decode(*x, return_lse=True, **cache_options)
            )(q[:, :, :2], k, v)
            expected = attend.decode(q[:, :, :2], k, v, return_lse=True, **cache_options)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_opcheck_of_a_step() -> None:
    text = compile_attention("sliding_window", window=5)._core.last_rows.planner.text
    opcheck(DECODE, (*cache(), torch.tensor([9, 60]), None, [], text, None, False))


def test_decode_steps_with_gradients_are_refused() -> None:
    attend = compile_attention("causal")
    q, k, v = cache()
    with pytest.raises(Unsupported, match="decode has no gradient"):
        compiled(lambda q: attend.decode(q, k, v, kv_len=9))(q.requires_grad_())


def test_an_exported_step() -> None:
    attend = compile_attention("sliding_window", window=5)

    class Step(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor) -> Tensor:
            out: Tensor = attend.decode(q, k, v, kv_len=kv_len)
            return out

    with torch.no_grad():
        program = torch.export.export(Step(), (*cache(), torch.tensor([9, 60])))
        step_tensors = *cache(), torch.tensor([4, 64])
        assert torch.equal(program.module()(*step_tensors), Step()(*step_tensors))
