"""The operators under what looks at operators: torch.compile, export, autocast, checkpointing, the FLOP counter."""

from __future__ import annotations

import functools
import gc
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from attnc import ArgumentError, ArgumentTypeError, Attention, SpecError, UnsupportedError, compile_attention
from attnc.runtime import identity, planners
from attnc.runtime.call import Sizes
from attnc.runtime.cpu import executor
from attnc.runtime.cpu.program import Recent
from attnc.runtime.planners import planner_of

ATTEND = torch.ops.attnc.attend.default
ATTEND_BACKWARD = torch.ops.attnc.attend_backward.default
NO_ALIGN = "pattern p\n    visible k <= q\n"
BY_HEAD = "pattern by_head(window: int[head])\n    align end\n    visible 0 <= q - k < window\n"
SHIFT = "pattern shifted\n    input shift: int[head]\n    align end\n    visible k <= q - shift\n"
SCATTERED = "pattern scattered\n    input x: int[token]\n    visible x[q] == x[k]\n"
DOC = torch.tensor([[0] * 7 + [1] * 10, [0] * 2 + [1] * 15])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def window() -> Attention:
    return compile_attention("sliding_window", window=5, sinks=1)


def text_of(attend: Attention) -> str:
    return attend._planner.text


def draw(
    n: int = 17,
    *,
    n_k: int | None = None,
    kv_heads: int = 4,
    dv: int = 8,
    tokens_first: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """q, k and v: batch 2, 4 query heads, dk 8."""
    shapes = ((4, n, 8), (kv_heads, n_k or n, 8), (kv_heads, n_k or n, dv))
    return [
        torch.randn(2, length, h, d, dtype=dtype).transpose(1, 2)
        if tokens_first
        else torch.randn(2, h, length, d, dtype=dtype)
        for h, length, d in shapes
    ]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def loss(out: Tensor, lse: Tensor) -> Tensor:
    """Of both; rows that see nothing have no finite LSE."""
    return out.float().square().sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()


def results(function: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor], **given: Any) -> list[Tensor]:
    """out, lse and the gradients of q, k and v through both."""
    inputs = leaves(tensors)
    pair = function(*inputs, **given)
    return [*pair, *torch.autograd.grad(loss(*pair), inputs)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a, b)


class Layer(nn.Module):
    """An Attention as a model holds it."""

    def __init__(self, attend: Attention) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        out, lse = self.attend(q * 2, k, v, return_lse=True, **given)
        return out + 1, lse


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    result: Callable[..., Any] = torch.compile(function, fullgraph=True, backend="aot_eager", **options)
    return result


# --- torch.compile ---------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[[], Attention], dict[str, Any], dict[str, Any]]] = {
    "window": (window, {}, {}),
    "grouped heads, dk ≠ dv, tokens outermost": (window, {"kv_heads": 2, "dv": 12, "tokens_first": True}, {}),
    "cross lengths, bf16": (window, {"n_k": 23, "dtype": torch.bfloat16}, {}),
    "scale": (window, {}, {"scale": 0.7}),
    "documents": (lambda: compile_attention("document"), {}, {"doc": DOC}),
    "integers by head, blind rows": (lambda: compile_attention(SHIFT), {}, {"shift": torch.tensor([0, 1, 2, 5])}),
    "a parameter by head": (lambda: compile_attention(BY_HEAD, window=[1, 2, 3, 9]), {}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_is_eager_to_the_bit(name: str) -> None:
    make, shape, given = CASES[name]
    layer, tensors = Layer(make()), draw(**shape)
    same(results(compiled(layer), tensors, **given), results(layer, tensors, **given))


def test_an_attention_itself_compiles() -> None:
    attend, tensors = window(), draw()
    assert torch.equal(compiled(attend)(*tensors), attend(*tensors))


@pytest.mark.parametrize("dynamic", [True, None])
def test_lengths_do_not_recompile(dynamic: bool | None) -> None:
    """One graph for all lengths; without `dynamic=True` a first one for the first length alone."""
    layer, counter = Layer(window()), CompileCounterWithBackend("aot_eager")
    function = torch.compile(layer, fullgraph=True, backend=counter, dynamic=dynamic)
    for n in (17, 18, 40, 64, 129, 200):
        tensors = draw(n)
        same(results(function, tensors), results(layer, tensors))
    assert counter.frame_count == (1 if dynamic else 2)


def test_new_data_does_not_recompile() -> None:
    attend, counter = compile_attention("document"), CompileCounterWithBackend("aot_eager")

    def call(q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
        return attend(q, k, v, doc=doc)

    function: Callable[..., Tensor] = torch.compile(call, fullgraph=True, backend=counter)
    tensors = draw()
    for doc in (DOC, DOC * 3, DOC.clamp(max=0), torch.arange(17).repeat(2, 1)):
        assert torch.equal(function(*tensors, doc), attend(*tensors, doc=doc))
    assert counter.frame_count == 1


@pytest.mark.parametrize("inside", [True, False])
def test_compiled_under_autocast(inside: bool) -> None:
    attend, tensors = window(), draw()
    tensors[1] = tensors[1].bfloat16()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return attend(q, k, v)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        run = attend if not inside else function
        ours, theirs = compiled(run)(*tensors), run(*tensors)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_fp64_is_left_alone_by_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert window()(*draw(dtype=torch.float64)).dtype == torch.float64


MISTAKES: dict[str, tuple[str, Callable[..., Any], str]] = {
    "rank": ("causal", lambda a, q, k, v: a(q[0], k, v), "q has 3 dimensions"),
    "heads": ("causal", lambda a, q, k, v: a(q, k[:, :3], v[:, :3]), "multiple of kv heads"),
    "dtype": ("causal", lambda a, q, k, v: a(q.double(), k, v), "differ in dtype"),
    "option": ("causal", lambda a, q, k, v: a(q, k, v, is_causal=True), "is_causal: causality belongs"),
    "scale": ("causal", lambda a, q, k, v: a(q, k, v, scale="a"), "scale is str"),
    "missing input": ("document", lambda a, q, k, v: a(q, k, v), "needs the input `doc`"),
    "misspelt input": ("document", lambda a, q, k, v: a(q, k, v, docs=q), "did you mean `doc`"),
    "a list": ("document", lambda a, q, k, v: a(q, k, v, doc=[[0] * 17] * 2), "inside torch.compile"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_while_compiling(name: str) -> None:
    spec, call, says = MISTAKES[name]
    attend = compile_attention(spec)
    with pytest.raises(Unsupported, match=says):
        compiled(lambda q, k, v: call(attend, q, k, v))(*draw())


def test_mistakes_in_lengths_and_data_are_typed_when_a_compiled_graph_runs() -> None:
    with pytest.raises(ArgumentError, match=r"query 0 at key 6.*align start"):
        compiled(compile_attention(NO_ALIGN))(*draw(17, n_k=23))
    attend = compile_attention("document")
    with pytest.raises(ArgumentError, match="id 0 comes back at position 9"):
        compiled(lambda q, k, v, doc: attend(q, k, v, doc=doc))(
            *draw(), torch.tensor([[0] * 7 + [1] * 2 + [0] * 8] * 2)
        )


def test_without_fullgraph_mistakes_stay_typed() -> None:
    with pytest.raises(ArgumentTypeError, match="needs the input `doc`"):
        torch.compile(compile_attention("document"), backend="aot_eager")(*draw())


def test_the_dense_reference_breaks_the_graph_and_says_why() -> None:
    dense, tensors = compile_attention("causal", backend="reference"), draw()
    with pytest.raises(Unsupported, match="the dense reference makes its mask outside of torch"):
        compiled(lambda q, k, v: dense(q * 2, k, v) + 1)(*tensors)
    broken = torch.compile(lambda q, k, v: dense(q * 2, k, v) + 1, backend="aot_eager")
    torch.testing.assert_close(broken(*tensors), dense(tensors[0] * 2, *tensors[1:]) + 1)


# --- the operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "shape", "inputs"),
    [
        ("causal", {}, []),
        ("causal", {"kv_heads": 2, "dv": 12, "tokens_first": True, "dtype": torch.bfloat16}, []),
        ("document", {"dv": 3}, [DOC]),
    ],
)
def test_opcheck(spec: str, shape: dict[str, Any], inputs: list[Tensor]) -> None:
    attend = compile_attention(spec)
    tensors = draw(**shape)
    opcheck(ATTEND, (*leaves(tensors), inputs, text_of(attend), None))
    out, lse = ATTEND(*tensors, inputs, text_of(attend), 0.5)
    for grad_lse in (None, torch.randn_like(lse)):
        opcheck(ATTEND_BACKWARD, (torch.randn_like(out), grad_lse, *tensors, out, lse, inputs, text_of(attend), 0.5))


@pytest.mark.parametrize("n", [0, 1, 6])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_fake_tensors_have_the_strides_of_real_ones(batch: int, n: int) -> None:
    """Whatever the order of dimensions in q, k and v; sizes of 0 and 1 included."""
    text = text_of(window())
    orders = [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3), (3, 1, 2, 0)]
    for (q_order, k_order), heads, d in product(product(orders, orders), (1, 4), (8, 5)):

        def laid(order: tuple[int, ...], width: int, heads: int = heads) -> Tensor:
            shape = (batch, heads, n, width)
            back = [order.index(i) for i in range(4)]
            return torch.randn([shape[i] for i in order]).permute(back)

        q, k, v = laid(q_order, 8), laid(k_order, 8), laid(q_order, d)
        real = ATTEND(q, k, v, [], text, None)
        grads = ATTEND_BACKWARD(torch.randn_like(real[0]), None, q, k, v, *real, [], text, None)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in (q, k, v, *real)]
            fake = ATTEND(*fakes[:3], [], text, None)
            fake_grads = ATTEND_BACKWARD(torch.empty_like(fake[0]), None, *fakes, [], text, None)
        for a, b in zip((*real, *grads), (*fake, *fake_grads), strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_meta_tensors_give_shapes_and_other_devices_a_typed_error() -> None:
    attend = window()
    q, k, v = (t.to("meta") for t in draw(kv_heads=2, dv=12))
    out, lse = attend(q, k, v, return_lse=True)
    assert (out.shape, lse.shape, out.device.type) == ((2, 4, 17, 12), (2, 4, 17), "meta")
    with FakeTensorMode(), pytest.raises(UnsupportedError, match=r'q is on cuda:0.*backend="reference"'):
        attend(*(torch.empty(1, 1, 4, 8, device="cuda") for _ in range(3)))


def test_the_operator_differentiates_like_the_call() -> None:
    attend, tensors = window(), draw(kv_heads=2)
    same(
        results(lambda q, k, v: ATTEND(q, k, v, [], text_of(attend), None), tensors),
        results(lambda q, k, v: attend(q, k, v, return_lse=True), tensors),
    )


def test_the_operator_obeys_autocast() -> None:
    attend, (q, k, v) = window(), draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = ATTEND(q, k.bfloat16(), v, [], text_of(attend), None)
        assert torch.equal(out, attend(q, k, v))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_only_operands_results_and_inputs_are_saved() -> None:
    attend, inputs = compile_attention("document"), leaves(draw())
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, lse = attend(*inputs, return_lse=True, doc=DOC)
    assert sorted(x.data_ptr() for x in saved) == sorted(x.data_ptr() for x in (*inputs, out, lse, DOC))


def test_inputs_changed_before_the_backward_are_noticed() -> None:
    inputs, doc = leaves(draw()), DOC.clone()
    out = compile_attention("document")(*inputs, doc=doc)
    doc.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), inputs)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_operator", [True, False])
def test_second_derivatives_are_refused(through_operator: bool) -> None:
    attend, (q, k, v) = window(), leaves(draw())
    out = ATTEND(q, k, v, [], text_of(attend), None)[0] if through_operator else attend(q, k, v)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(grad.sum(), q)


def test_transforms_of_a_call() -> None:
    """First derivatives are taken, also under outer autograd; nothing else is, and nothing is lost without a word."""
    attend, (q, k, v) = window(), draw(dtype=torch.float64)

    def total(q: Tensor) -> Tensor:
        return loss(*attend(q, k, v, return_lse=True))

    (leaf,) = leaves([q])
    (want,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(q), want)
    grad = torch.func.grad(total)(leaf)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(grad.sum(), leaf)
    for refused, says in (
        (lambda: torch.func.grad(lambda x: torch.func.grad(total)(x).sum())(q), "second derivatives"),
        (lambda: torch.func.vmap(total)(q[None]), "vmap"),
        (lambda: torch.func.jvp(total, (q,), (q,)), "forward-mode"),
    ):
        with pytest.raises(UnsupportedError, match=says):
            refused()
    with forward_ad.dual_level():
        assert torch.equal(attend(q, k, v), attend(q, k, v))
        with pytest.raises(UnsupportedError, match="forward-mode"):
            attend(forward_ad.make_dual(q, q), k, v)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.vmap(f)(x[None]),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    ],
)
def test_transforms_of_the_operator_are_refused(transform: Callable[..., Any]) -> None:
    text, (q, k, v) = text_of(window()), draw()
    with pytest.raises(UnsupportedError, match=r"torch\.func over the operator"):
        transform(lambda x: ATTEND(x, k, v, [], text, None)[0], q)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that grows with every run of the executor."""
    runs: list[None] = []
    forward = executor.forward

    def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
        runs.append(None)
        return forward(*arguments)

    monkeypatch.setattr(executor, "forward", counted)
    return runs


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, tensors = Layer(window()), draw()
    expected = results(layer, tensors)
    runs, inputs = count_forwards(monkeypatch), leaves(tensors)
    pair = checkpoint(layer, *inputs, use_reentrant=use_reentrant)
    torch.autograd.backward(loss(*pair))
    same([*pair, *(t.grad for t in inputs if t.grad is not None)], expected)
    assert len(runs) == 2


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing(policy: CheckpointPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return policy if operator is ATTEND else CheckpointPolicy.PREFER_RECOMPUTE

    layer, tensors = Layer(window()), draw()
    expected = results(layer, tensors)
    runs, inputs = count_forwards(monkeypatch), leaves(tensors)
    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    pair = checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)
    same([*pair, *torch.autograd.grad(loss(*pair), inputs)], expected)
    assert len(runs) == (1 if policy is CheckpointPolicy.MUST_SAVE else 2)


def test_checkpointing_in_a_compiled_graph() -> None:
    layer, tensors = Layer(window()), draw()
    function = compiled(lambda q, k, v: checkpoint(layer, q, k, v, use_reentrant=False))
    same(results(function, tensors), results(layer, tensors))


# --- what it costs ---------------------------------------------------------------------------------------------------


def flops(function: Callable[[], object]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}


def test_flops_are_those_of_the_visible_pairs() -> None:
    attend, inputs = window(), leaves(draw(40, dv=12))
    pairs = 2 * 4 * int(attend.mask(40).sum())
    forward, backward = 2 * pairs * (8 + 12), 2 * pairs * (3 * 8 + 2 * 12)
    both = {"attnc.attend": forward, "attnc.attend_backward": backward}
    assert flops(lambda: torch.autograd.grad(attend(*inputs).sum(), inputs)) == both
    with torch.no_grad():
        assert flops(lambda: attend(*inputs)) == {"attnc.attend": forward}
    total = attend(*inputs).sum()
    assert flops(lambda: torch.autograd.grad(total, inputs)) == {"attnc.attend_backward": backward}


def test_flops_of_a_pattern_whose_pairs_no_plan_counts() -> None:
    attend, x = compile_attention(SCATTERED), torch.randint(0, 1000, (3000,))
    q, k, v = (torch.randn(1, 2, 3000, 4) for _ in range(3))
    assert attend.plan(3000, heads=2, head_dim=4, x=x).visible is None
    pairs = 2 * int((x[:, None] == x).sum())
    assert flops(lambda: attend(q, k, v, x=x)) == {"attnc.attend": 2 * pairs * 8}


def test_flops_that_depend_on_data_need_data() -> None:
    attend = compile_attention("document")
    with FakeTensorMode() as mode, pytest.raises(UnsupportedError, match="depend on their data"):
        fakes = [mode.from_tensor(t) for t in draw()]
        flops(lambda: attend(*fakes, doc=mode.from_tensor(DOC)))


# --- a pattern as text -----------------------------------------------------------------------------------------------

EXACT = """\
pattern exact(part: real = 0.2, on: bool = true, table: int[2, 2] = [[1, 2], [3, 4]])
    visible q * part <= k + table[0][1] and on
"""


@pytest.mark.parametrize("params", [{}, {"part": 0.1, "on": False, "table": [[0, -1], [2, 3]]}])
def test_a_pattern_and_its_text_are_the_same(params: dict[str, Any]) -> None:
    attend = compile_attention(EXACT, strict=True, **params)
    bound, strict = identity.read(text_of(attend))
    assert (bound.values, strict) == (attend.bound.values, True)
    assert identity.write(bound, {}, strict) == text_of(attend)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda data: "no json", ArgumentError),
        (lambda data: "[" * 100_000, ArgumentError),
        (lambda data: json.dumps({**data, "attnc": 0}), ArgumentError),
        (lambda data: json.dumps({**data, "source": ["name"]}), ArgumentError),
        (lambda data: json.dumps({**data, "values": {"part": "1e999999999"}}), ArgumentError),
        (lambda data: json.dumps({**data, "values": {"part": None}}), ArgumentError),
        (lambda data: json.dumps({**data, "source": ["a", "import os\n"]}), SpecError),
        (lambda data: json.dumps({**data, "values": {"other": 1}}), SpecError),
    ],
)
def test_texts_that_are_none(change: Callable[[dict[str, Any]], str], error: type[Exception]) -> None:
    text = change(json.loads(text_of(compile_attention(EXACT))))
    with pytest.raises(error):
        ATTEND(*draw(), [], text, None)


def test_an_attention_that_is_alive_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = window(), window()
    text = text_of(first)
    assert text_of(second) == text
    monkeypatch.setattr(identity, "read", None)
    del first
    gc.collect()
    assert planner_of(text) is second._planner


def test_texts_of_dead_attentions_are_kept_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planners, "_read", Recent(2))
    texts = [text_of(compile_attention("sliding_window", window=900 + i)) for i in range(3)]
    gc.collect()
    assert not set(texts) & set(planners._alive)
    kept = [id(planner_of(text)) for text in texts]
    gc.collect()
    assert set(texts) & set(planners._alive) == set(texts[1:])
    assert [id(planner_of(text)) for text in texts[1:]] == kept[1:]


def test_equal_patterns_share_their_plans() -> None:
    first, second = window(), window()
    assert first.plan(64, heads=4) is second.plan(64, heads=4)
    assert compile_attention("sliding_window", window=5, sinks=1, strict=True)._planner is not first._planner


def test_plans_are_found_by_shape_dtype_and_data() -> None:
    attend = compile_attention("document")
    planner, (q, k, v) = attend._planner, draw()
    plan = planner.plan_of(q, k, v, [DOC])
    assert planner.plan_of(q * 2, k, v, [DOC.clone()]) is plan
    assert planner.plan(Sizes(17, 17, 2, 4, 4, 8, 8, "float32"), {"doc": DOC}) is plan
    for other in ((q.bfloat16(), k.bfloat16(), v.bfloat16(), DOC), (q[:1], k[:1], v[:1], DOC[:1]), (q, k, v, DOC // 2)):
        assert planner.plan_of(*other[:3], [other[3]]) is not plan
    with pytest.raises(ArgumentError, match="1 inputs and is given 0"):
        planner.plan_of(q, k, v, [])


def test_inputs_are_taken_as_tensors_lists_and_arrays() -> None:
    attend, tensors = compile_attention("document"), draw()
    expected = attend(*tensors, doc=DOC)
    for doc in (DOC.tolist(), DOC.numpy(), DOC.numpy().astype(">i2"), DOC.int()):
        assert torch.equal(attend(*tensors, doc=doc), expected)


# --- export ----------------------------------------------------------------------------------------------------------

RUN = """\
import io, sys, torch, attnc.runtime.operators
program = torch.export.load(io.BytesIO(open(sys.argv[1], "rb").read()))
tensors = torch.load(sys.argv[2])
torch.save(program.module()(*tensors), sys.argv[3])
"""


def test_an_exported_model_runs_in_another_process_at_another_length(tmp_path: Any) -> None:
    layer, tensors = Layer(compile_attention(BY_HEAD, window=[1, 2, 3, 9])), draw(33)
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(layer, tuple(draw()), dynamic_shapes=({2: length}, {2: length}, {2: length}))
    assert [n.target for n in program.graph.nodes if "attnc" in str(n.target)] == [ATTEND]
    files = [str(tmp_path / name) for name in ("model.pt2", "tensors.pt", "results.pt")]
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    (tmp_path / "model.pt2").write_bytes(buffer.getvalue())
    torch.save(tensors, files[1])
    subprocess.run([sys.executable, "-c", RUN, *files], check=True, timeout=120, env={"PYTHONPATH": ":".join(sys.path)})
    for a, b in zip(torch.load(files[2]), layer(*tensors), strict=True):
        assert torch.equal(a, b)
