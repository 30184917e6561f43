"""Calls of recurrences: documents, resets, scan orders, states passed between calls, errors."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import ArgumentError, ArgumentTypeError, UnsupportedError, compile_attention
from command_calls import run

DECAY = """recurrence decaying
    input g: log_decay[batch, token, head]
    {}
    state S: [dk, dv]
    step  S = exp(g) * S + outer(k, v)
    read  q @ S
"""
BEFORE = """recurrence before
    input w: log_decay[batch, token, head, dk]
    {}
    state S: [dk, dv]
    read  q @ S
    step  S = exp(w) * S + outer(k, v)
"""


def draw(n: int, *, batch: int = 2, heads: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(batch, heads, n, d, dtype=dtype) for d in (6, 6, 4)]


def gates(n: int, *shape: int, batch: int = 2, heads: int = 3) -> Tensor:
    return torch.nn.functional.logsigmoid(torch.randn(batch, n, heads, *shape, dtype=torch.float64))


def pieces(cuts: list[int]) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def tokens_of(inputs: dict[str, Any], tokens: slice) -> dict[str, Any]:
    return {name: x[:, tokens] for name, x in inputs.items()}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("spec", "name", "shape"), [(DECAY, "g", ()), (BEFORE, "w", (6,))], ids=["after", "before"])
def test_documents_equal_separate_calls(spec: str, name: str, shape: tuple[int, ...], backend: Any) -> None:
    """Documents by ids, by a reset input, and packed; a read before the write sees nothing of the document before."""
    cuts = [0, 7, 8, 70, 135]
    q, k, v = draw(135)
    gate = gates(135, *shape)
    inputs: dict[str, Any] = {name: gate}
    alone = compile_attention(spec.format(""), backend=backend)
    want = torch.cat([alone(q[:, :, s], k[:, :, s], v[:, :, s], **tokens_of(inputs, s)) for s in pieces(cuts)], 2)
    ids = torch.repeat_interleave(torch.tensor([5, 1, 3, 2]), torch.tensor([7, 1, 62, 65]))
    by_id = compile_attention(spec.format("input doc: int[batch, token]\n    documents doc"), backend=backend)
    fresh = torch.zeros(135, dtype=torch.bool)
    fresh[cuts[:-1]] = True
    by_reset = compile_attention(spec.format("input fresh: bool[batch, token]\n    reset fresh"), backend=backend)
    results = [
        by_id(q, k, v, doc=ids.expand(2, -1), **inputs),
        by_reset(q, k, v, fresh=fresh.expand(2, -1), **inputs),
        alone(q, k, v, cu_seqlens=torch.tensor(cuts), **inputs),
    ]
    for out in results:
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("scan -t", "exp(g) * S + outer(k, v)"),
        ("", "exp(g) * S + outer(t * k, v / queries)"),
        ("reset t % 5 == 0", "S + exp(g) * outer(k, v)"),
    ],
    ids=["order", "place", "reset"],
)
def test_positions_count_within_each_document(line: str, step: str, backend: Any) -> None:
    """Batch entries may differ in their documents."""
    lines = (
        f"recurrence placed\n    input g: log_decay[batch, token, head]\n    {{}}\n    {line}\n    state S: [dk, dv]\n"
    )
    lines += f"    step S = {step}\n    read q @ S\n"
    alone = compile_attention(lines.format(""), backend=backend)
    q, k, v = draw(40)
    inputs: dict[str, Any] = {"g": gates(40)}
    cuts = [[0, 7, 8, 40], [0, 22, 40, 40]]
    ids = torch.stack([torch.bucketize(torch.arange(40), torch.tensor(ends[1:-1]), right=True) for ends in cuts])
    by_id = compile_attention(lines.format("input doc: int[batch, token]\n    documents doc"), backend=backend)
    out, last = by_id(q, k, v, doc=ids, return_state=True, **inputs)
    for b, ends in enumerate(cuts):
        for s in pieces(ends)[: 3 - b]:
            only_it = {name: x[b : b + 1] for name, x in tokens_of(inputs, s).items()}
            tensors = (x[b : b + 1, :, s] for x in (q, k, v))
            want, state = alone(*tensors, return_state=True, **only_it)
            torch.testing.assert_close(out[b : b + 1, :, s], want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(last["S"][b : b + 1], state["S"], rtol=1e-12, atol=1e-12)
    with pytest.raises(ArgumentError, match="each document starts from new states"):
        by_id(q, k, v, doc=ids, state=last, **inputs)
    with pytest.raises(ArgumentError, match="contiguous"):
        by_id(q, k, v, doc=torch.arange(40)[None] % 2, **inputs)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_positions_continue_between_calls(backend: Any) -> None:
    lines = "input fresh: bool[batch, token]\n    reset fresh and t != 12 or t % 9 == 0"
    attend = compile_attention(DECAY.format(lines).replace("outer(k, v)", "outer(k, t * v)"), backend=backend)
    q, k, v = draw(40)
    inputs: dict[str, Any] = {"g": gates(40), "fresh": torch.arange(40).expand(2, -1) % 12 == 0}
    expected, last = attend(q, k, v, return_state=True, **inputs)
    state, outs = attend.init_state(2, 3, 6, 4, dtype=torch.float64), []
    for s in pieces([0, 1, 13, 14, 40]):
        out, state = attend.step(q[:, :, s], k[:, :, s], v[:, :, s], state, **tokens_of(inputs, s))
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), expected, rtol=1e-12, atol=1e-12)
    assert state["t"].tolist() == last["t"].tolist() == [40, 40]
    apart = {"S": state["S"], "t": torch.tensor([0, 7])}
    together = attend(q, k, v, state=apart, **inputs)
    for b, start in enumerate((0, 7)):
        entry_state = {"S": state["S"][b : b + 1], "t": torch.tensor([start])}
        entry_inputs: dict[str, Any] = {name: x[b : b + 1] for name, x in inputs.items()}
        alone = attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], state=entry_state, **entry_inputs)
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-12, atol=1e-12)
    for wrong in (torch.tensor([0.5, 0]), torch.tensor([0, -1])):
        with pytest.raises(ArgumentError, match="whole numbers from 0"):
            attend(q, k, v, state={**state, "t": wrong}, **inputs)
    backwards = compile_attention(DECAY.format("scan -t"), backend=backend)
    with pytest.raises(UnsupportedError, match="all of them in one call"):
        backwards(q, k, v, g=inputs["g"], state={"S": state["S"]})


def test_documents_differ_by_batch_entry() -> None:
    attend = compile_attention(DECAY.format("input doc: int[batch, token]\n    documents doc"))
    alone = compile_attention(DECAY.format(""))
    q, k, v = draw(20)
    g, doc = gates(20), torch.zeros(2, 20, dtype=torch.int64)
    doc[1, 11:] = 1
    out = attend(q, k, v, g=g, doc=doc)
    torch.testing.assert_close(out[:1], alone(q[:1], k[:1], v[:1], g=g[:1]))
    late = alone(*(x[1:, :, 11:] for x in (q, k, v)), g=g[1:, 11:])
    torch.testing.assert_close(out[1:, :, 11:], late)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_scan_orders(backend: Any) -> None:
    """A backward scan equals a call on flipped tokens; by head, every other head scans backwards."""
    q, k, v = draw(70)
    g = gates(70)
    plain = compile_attention(DECAY.format(""), backend=backend)
    back = compile_attention(DECAY.format("scan -t"), backend=backend)
    flipped = plain(*(x.flip(2) for x in (q, k, v)), g=g.flip(1)).flip(2)
    torch.testing.assert_close(back(q, k, v, g=g), flipped, rtol=1e-12, atol=1e-12)
    by_head = compile_attention(DECAY.format("scan t if head % 2 == 0 else -t"), backend=backend)
    out = by_head(q, k, v, g=g)
    torch.testing.assert_close(out[:, ::2], plain(q, k, v, g=g)[:, ::2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[:, 1], flipped[:, 1], rtol=1e-12, atol=1e-12)
    routed = compile_attention(DECAY.format("input place: int[token]\n    scan place"), backend=backend)
    order = torch.randperm(70)
    in_order = routed(q, k, v, g=g, place=order)
    expected = plain(*(x[:, :, order.argsort()] for x in (q, k, v)), g=g[:, order.argsort()])
    torch.testing.assert_close(in_order, expected[:, :, order], rtol=1e-12, atol=1e-12)
    with pytest.raises(ArgumentError, match="two tokens the same place"):
        routed(q, k, v, g=g, place=torch.zeros(70, dtype=torch.int64))


def test_resets_with_an_order_per_head() -> None:
    lines = "input fresh: bool[batch, token]\n    reset fresh\n    scan t if head % 2 == 0 else -t"
    ours, expected = (compile_attention(DECAY.format(lines), backend=b) for b in ("auto", "reference"))
    q, k, v = draw(70)
    inputs: dict[str, Any] = {"g": gates(70), "fresh": torch.rand(2, 70) < 0.1}
    torch.testing.assert_close(ours(q, k, v, **inputs), expected(q, k, v, **inputs), rtol=1e-12, atol=1e-12)


def test_states_pass_between_calls() -> None:
    attend = compile_attention("gated_delta_net")
    q, k, v = draw(9)
    k = torch.nn.functional.normalize(k, dim=-1)
    g, beta = gates(9), torch.rand(2, 9, 3, dtype=torch.float64)
    expected, last = attend(q, k, v, g=g, beta=beta, return_state=True)
    state = attend.init_state(2, 3, 6, 4, dtype=torch.float64)
    assert {name: tuple(x.shape) for name, x in state.items()} == {"S": (2, 3, 6, 4)}
    outs = []
    for t in range(9):
        s = slice(t, t + 1)
        out, state = attend.step(q[:, :, s], k[:, :, s], v[:, :, s], state, g=g[:, s], beta=beta[:, s])
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state["S"], last["S"], rtol=1e-12, atol=1e-12)
    narrow, of_it = attend(*(x.bfloat16() for x in (q, k, v)), g=g.float(), beta=beta.float(), return_state=True)
    assert (narrow.dtype, of_it["S"].dtype) == (torch.bfloat16, torch.float32)
    slots = compile_attention("gsa").init_state(1, 2, 6, 4, slots=5)
    assert {name: tuple(x.shape) for name, x in slots.items()} == {"K": (1, 2, 6, 5), "V": (1, 2, 5, 4)}


def test_errors_of_wrong_calls() -> None:
    attend, (q, k, v), g = compile_attention("gla"), draw(5), gates(5, 6)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (
            ArgumentError,
            r"as log_decay it must be at most 0; pass the logarithms of factors .* g\.log\(\)",
            {"g": g.exp()},
        ),
        (ArgumentError, "as log_decay it must be at most 0$", {"g": g + 3}),
        (ArgumentError, "has the states S, but `state` has T; pass exactly", {"g": g, "state": {"T": g}}),
        (ArgumentTypeError, "pass a dictionary with a tensor for each state", {"g": g, "state": g}),
        (ArgumentError, r"state\['S'\] is \(2, 3\)", {"g": g, "state": {"S": torch.zeros(2, 3)}}),
        (ArgumentTypeError, "needs the input `g`", {}),
        (UnsupportedError, "has no LSE", {"g": g, "return_lse": True}),
    ]
    for error, says, arguments in wrong:
        with pytest.raises(error, match=says):
            attend(q, k, v, **arguments)
    with pytest.raises(ArgumentError, match="needs equal numbers; to continue after earlier tokens, pass `state`"):
        attend(q[:, :, :1], k, v, g=g)
    with pytest.raises(ArgumentError, match=r"pass the factors instead of their logarithms: f\.exp\(\)"):
        compile_attention("hgrn2")(q, k, v, f=g)
    with pytest.raises(ArgumentError, match="the state `K` has a dimension `slots`: pass its size"):
        compile_attention("gsa").init_state(1, 2, 6, 4)
    pattern = compile_attention("causal")
    for call in (
        lambda: pattern(q, k, v, return_state=True),
        lambda: pattern.init_state(1, 1, 1, 1),
        pattern.derivation,
    ):
        with pytest.raises(UnsupportedError, match="`causal` is a pattern, which has no state"):
            call()


def test_arguments_of_pairwise_attention_are_refused() -> None:
    attend, (q, k, v) = compile_attention("retention"), draw(4)
    calls: list[Callable[[], object]] = [
        lambda: attend.mask(4),
        lambda: attend.plan(4),
        attend.growth,
        lambda: attend.floors(4),
        lambda: attend.decode(q[:, :, :1], k, v, kv_len=4),
        lambda: attend.prefill(q, k, v, kv_len=4),
    ]
    for call in calls:
        with pytest.raises(UnsupportedError, match="`retention` is a recurrence, which has no pairs"):
            call()
    assert attend.is_recurrence
    assert not attend.has_mask
    with pytest.raises(UnsupportedError, match="recurrences have no kernels for device"):
        attend(*(x.to("meta") for x in (q, k, v)), return_state=True)


def test_resets_of_each_head_under_decays_of_each_head() -> None:
    attend = compile_attention(
        "recurrence r\n    state S: [dk, dv]\n    reset (t + head) % 5 == 0\n"
        "    step S = (1 - 2 ** (-5 - head)) * S + outer(k, v)\n    read q @ S\n"
    )
    q, k, v = draw(12)
    torch.testing.assert_close(attend(q, k, v), attend.reference(q, k, v), rtol=1e-10, atol=1e-10)


GROWING = {
    "twice": "step S = 2 * S + outer(k, v)",
    "minus a half": "step S = (outer(k, v) - S) / 2",
    "by head": "step S = (0.5 + head) * S + outer(k, v)",
    "corrected": "step S = 1.5 * S\n    step S = S - 0.5 * outer(k, k @ S) + outer(k, v)",
}


@pytest.mark.parametrize("name", GROWING)
def test_factors_above_1(name: str) -> None:
    text = f"recurrence r\n    state S: [dk, dv]\n    {GROWING[name]}\n    read q @ S\n"
    attend = compile_attention(text)
    q, k, v = (x.requires_grad_() for x in draw(12))
    ours, expected = attend(q, k, v), attend.reference(q, k, v)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (ours, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    compile_attention(text, strict=True)(q, k, v)


def test_arbitrary_factors_with_a_nonzero_initial_state() -> None:
    """A state with a nonzero initial value has no chunked form with both an arbitrary factor and a correction."""
    lines = GROWING["corrected"]
    text = f"recurrence r\n    state S: [dk, dv] = 1\n    {lines}\n    read q @ S\n"
    q, k, v = draw(12)
    torch.testing.assert_close(compile_attention(text)(q, k, v), compile_attention(text).reference(q, k, v))
    with pytest.raises(UnsupportedError, match="above 1, or below 0"):
        compile_attention(text, strict=True)(q, k, v)


def test_a_running_maximum() -> None:
    """The online softmax of a learned query, written with its running maximum, sum and weighted values."""
    attend = compile_attention(
        """recurrence online
    learned w: real[head, dk]
    input   fresh: int[token]
    reset   fresh != 0
    let   s = scale * dot(w, k)
    state m: real = -inf
    state u: real
    state S: [dv]
    let   most = max(m, s)
    step  u = exp(m - most) * u + exp(s - most)
    step  S = exp(m - most) * S + exp(s - most) * v
    step  m = most
    read  S / u
"""
    )
    q, k, v = (x.requires_grad_() for x in draw(150))
    w = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    fresh = torch.zeros(150, dtype=torch.int64)
    fresh[[0, 7, 64, 65]] = 1
    ours, expected = (call(q, k, v, w=w, fresh=fresh) for call in (attend, attend.reference))
    assert "m: running maximum of" in attend.derivation()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(x.sin().sum(), (k, v, w)) for x in (ours, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["hgrn2", "rwkv7"])
def test_factors_of_0_and_1(name: str) -> None:
    """A fully closed or fully open gate has a gradient like any other gate."""
    attend = compile_attention(name)
    q, k, v = draw(70)
    unit = torch.rand(2, 70, 3, 6, dtype=torch.float64)
    unit[:, 5:9], unit[0, 20], unit[:, 40] = 0, 1, 0
    inputs: dict[str, Any] = {"f": unit}
    if name == "rwkv7":
        a = -torch.nn.functional.normalize(torch.randn(2, 70, 3, 6, dtype=torch.float64), dim=-1)
        inputs = {"w": unit, "a": a, "b": -a, "r_k": torch.randn(3, 6, dtype=torch.float64)}
    leaves = [q, k, v, *inputs.values()]
    for x in leaves:
        x.requires_grad_()
    grads = []
    for call in (attend, attend.reference):
        out = call(q, k, v, **inputs)
        grads.append([out, *torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True, materialize_grads=True)])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    narrow = [x.detach().float().requires_grad_() for x in leaves]
    narrow_inputs: dict[str, Any] = dict(zip(inputs, narrow[3:], strict=True))
    out = attend(narrow[0], narrow[1], narrow[2], **narrow_inputs)
    narrow_grads = torch.autograd.grad(out.sin().sum(), narrow, allow_unused=True, materialize_grads=True)
    for x, y in zip(narrow_grads, grads[1][1:], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


def test_same_bits_and_pickling() -> None:
    attend, (q, k, v) = compile_attention("kimi_delta"), draw(100, dtype=torch.float32)
    inputs: dict[str, Any] = {"g": gates(100, 6).float(), "beta": torch.rand(2, 100, 3)}
    first = attend(q, k, v, **inputs)
    assert torch.equal(first, pickle.loads(pickle.dumps(attend))(q, k, v, **inputs))


def test_a_compiled_call() -> None:
    attend = compile_attention("gated_delta_net")
    tensors = [x.requires_grad_() for x in draw(33)]
    g, beta = gates(33).requires_grad_(), torch.rand(2, 33, 3, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        out: Tensor = attend(q * 0.5, k / 3, v, g=g, beta=beta)
        return out.sin().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = [*tensors, g, beta]
    ours, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, call))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_commands() -> None:
    done = run("explain", "--derivation", "rwkv6")
    assert done.status == 0
    assert "S[dk, dv]: a decay of each row" in done.out
    assert "before its steps" in done.out
    assert "token by token" in run("explain", "--derivation", "yaad_linear").out
    assert run("explain", "--derivation", "causal").status == 2
    assert run("explain", "A201", "--derivation", "gla").status == 2
    assert "share left" in run("show", "gla").out
    assert run("emit", "gla").status == 2
    assert run("same", "gla", "retention").status == 1
    assert run("receptive", "gla", "--len", "64").status == 0
    done = run("verify", "gated_delta_net")
    assert done.status == 0, done


COLUMN_DECAY = """
recurrence columns
    input g: log_decay[batch, token, head, dv]
    state S: [dk, dv]
    step S = exp(g) * S
    step S = S + 0.5 * outer(k, v - k @ S)
    read q @ S
"""


def test_a_decay_by_value_column_with_a_correction_runs_token_by_token(tmp_path: Path) -> None:
    """This recurrence was refused with "each column would need a triangle of its own"."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    g = -torch.rand(1, 20, 2, 8)
    attend = compile_attention(COLUMN_DECAY)
    state, outs = torch.zeros(1, 2, 8, 8, dtype=torch.float64), []
    for t in range(20):
        key, value = k[:, :, t].double(), v[:, :, t].double()
        state = state * g[:, t].double().exp()[:, :, None]
        state = state + 0.5 * key[..., None] * (value - (key[:, :, None] @ state)[:, :, 0])[:, :, None]
        outs.append((q[:, :, t, None].double() @ state)[:, :, 0])
    assert torch.allclose(attend(q, k, v, g=g).double(), torch.stack(outs, 2), atol=1e-5)
    file = tmp_path / "columns.attn"
    file.write_text(COLUMN_DECAY, encoding="utf-8")
    derivation = " ".join(run("explain", "--derivation", str(file)).out.split())
    assert "a decay of `S` by value column together with a correction" in derivation
