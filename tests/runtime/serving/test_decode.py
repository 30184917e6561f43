"""A few queries against a cache give the last rows of a call of all tokens, and read only keys that these rows see."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attnc import ArgumentError, ArgumentTypeError, Attention, UnsupportedError, compile_attention
from attnc.runtime.call.example_inputs import example_inputs, head_count
from attnc.runtime.call.lengths import natural_length
from attnc.runtime.executors.pattern_parts import attentions_of
from cache_calls import Kind, filled, of_last, seen_by_last
from library_calls import MULTIPLES, SMALL, made_inputs
from plan_calls import LIBRARY

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# --- the library -----------------------------------------------------------------------------------------------------

REFUSED = {
    *(
        "autoformer_lags",
        "combiner",
        "combiner_axial",
        "combiner_log_sparse",
        "combiner_mixture",
        "hierarchical",
        "monarch",
    ),
    "monarch_rt",
}
"""Patterns whose rows read other rows' queries."""

ELSEWHERE = {"attention_residual", "davit_channel", "davit_window", "halo", "landmark"}
"""Patterns whose rows read keys outside their mask."""

FAMILIES = "masks", "grids", "scores", "normalisers", "structures"
NAMES = sorted(path.stem for family in FAMILIES for path in (LIBRARY / family).glob("*.attn"))

LENGTHS = (1, 15, 16, 17, 40, 41, 63, 64, 65, 96)
"""Lengths around a page of 16 slots, windows of 40 tokens and a tile of 64 keys."""

LOOSE = {"local_linear": 1e-2}
"""Patterns whose sums are ill-conditioned, so that fp32 is far from fp64."""


def draw(heads: int, kv_heads: int, n: int, dk: int = 8, dv: int = 8, batch: int = 1) -> list[Tensor]:
    return [torch.randn(batch, h, n, d) for h, d in ((heads, dk), (kv_heads, dk), (kv_heads, dv))]


def in_fp64(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}


def lengths_of(attention: Attention, name: str) -> list[int]:
    multiple = MULTIPLES.get(name, 1)
    natural = {natural_length(attention.bound, n) for n in (30, 96)}
    if None in natural:
        return [n for n in LENGTHS if n % multiple == 0 and not (name == "neighborhood_1d" and n < 7)]
    return sorted(n for n in natural if n is not None)


@pytest.mark.parametrize("name", sorted({*NAMES} - REFUSED))
def test_library(name: str) -> None:
    attention = compile_attention(name, **SMALL.get(name, {}))
    heads = head_count(attention.bound) or 4
    by_head = any("head" in tensor.dims for tensor in attention._pattern.tensors)
    kv_heads = heads if by_head else heads // 2
    for i, n in enumerate(lengths_of(attention, name)):
        inputs_by_name = made_inputs(name, n, heads)
        if name == "bigbird":
            inputs_by_name["random"] = torch.randint(max(n // 16, 1), (heads, -(-n // 16), 2))
        if name == "attention_residual":
            inputs_by_name["x"] = torch.randn(1, n, 3, 8)
        examples = example_inputs(
            attention.bound, n, n, inputs_by_name, heads=heads, sizes={"dk": 8, "dv": 8, "kv_head": kv_heads}
        )
        inputs = inputs_by_name | {key: example.tensor for key, example in examples.items()}
        q, k, v = draw(heads, kv_heads, n)
        true = attention.reference(q, k, v, dtype=torch.float64, **in_fp64(inputs))
        for j, n_q in enumerate(sorted({1, min(2, n), min(5, n), min(16, n)})):
            everything = torch.ones(1, kv_heads, n, dtype=torch.bool)
            visible = everything if name in ELSEWHERE else seen_by_last(attention, n, n_q, heads, kv_heads, inputs)
            kind: Kind = "pages" if (i + j) % 2 else "slots"
            cache = filled(k, v, [n], visible, kind)
            arguments = of_last(attention, inputs, n_q) | dict(cache.given)
            out = attention.decode(q[:, :, n - n_q :], cache.k, cache.v, **arguments)
            assert isinstance(out, Tensor)
            wanted = true[:, :, n - n_q :]
            error = (out.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
            assert error <= LOOSE.get(name, 2e-5), (n, n_q, kind, float(error))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_rows_that_need_other_rows_queries(name: str) -> None:
    attention = compile_attention(name, **SMALL.get(name, {}))
    q, k, v = draw(4, 4, 96)
    queries: dict[str, Any] = {"lag": [[1, 2]]} if name == "autoformer_lags" else {}
    with pytest.raises(UnsupportedError, match=r"a row needs `\w+` of other rows; call it on all tokens"):
        attention.decode(q[:, :, -1:], k, v, kv_len=96, **queries)


# --- caches ----------------------------------------------------------------------------------------------------------

WINDOW: Mapping[str, Any] = {"window": 40, "sinks": 4}
BOUNDARIES = (1, 15, 16, 17, 39, 40, 41, 43, 44, 45, 63, 64, 65, 128, 129)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["slots", "pages", "ring"])
def test_entries_of_different_lengths(kind: Kind, dtype: torch.dtype) -> None:
    """Lengths at every boundary in one batch, with dk ≠ dv and fewer kv heads than query heads."""
    attention = compile_attention("sliding_window", **WINDOW)
    q, k, v = (x.to(dtype) for x in draw(6, 2, 130, 24, 16, batch=len(BOUNDARIES)))
    for n_q in (1, 3, 16):
        lengths = [max(n, n_q) for n in BOUNDARIES]
        visible = torch.zeros(len(lengths), 2, 130, dtype=torch.bool)
        for entry, n in enumerate(lengths):
            visible[entry, :, :n] = seen_by_last(attention, n, n_q, 6, 2, {})
        cache = filled(k, v, lengths, visible, kind, slots=44 + n_q - 1 if kind == "ring" else None, first=4)
        error_of_last_row = torch.stack([q[entry, :, n - n_q : n] for entry, n in enumerate(lengths)])
        out, lse = attention.decode(error_of_last_row, cache.k, cache.v, return_lse=True, scale=0.3, **cache.given)
        assert out.dtype == dtype
        for entry, n in enumerate(lengths):
            entry_tensors = (x[entry : entry + 1, :, :n] for x in (q, k, v))
            true, of_true = attention.reference(*entry_tensors, dtype=torch.float64, return_lse=True, scale=0.3)
            tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(out[entry].double(), true[0, :, n - n_q :], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(lse[entry].double(), of_true[0, :, n - n_q :], rtol=tolerance, atol=tolerance)


def test_a_ring_turns_step_by_step() -> None:
    """Each new token is written to the slot of the oldest one, as the plan states."""
    attention = compile_attention("sliding_window", **WINDOW)
    need = attention.plan(1, 100).cache
    assert need is not None
    assert "a cache needs the first 4 and the last 40 tokens" in str(attention.plan(1, 100))
    q, k, v = draw(2, 1, 200)
    true = attention(q, k, v)
    slots = need.first + need.last
    k_cache, v_cache = (torch.full((1, 1, slots, 8), float("nan")) for _ in range(2))
    for t in range(200):
        slot = t if t < need.first else need.first + (t - need.first) % (slots - need.first)
        k_cache[:, :, slot], v_cache[:, :, slot] = k[:, :, t], v[:, :, t]
        out = attention.decode(q[:, :, t : t + 1], k_cache, v_cache, kv_len=t + 1, ring=True)
        torch.testing.assert_close(out, true[:, :, t : t + 1])


@pytest.mark.parametrize("name", ["causal", "sliding_window", "alibi", "power"])
@pytest.mark.parametrize("kind", ["slots", "pages"])
def test_chunks_of_a_prompt(name: str, kind: Kind) -> None:
    """A prompt in chunks equals the whole prompt, gradients included."""
    attention = compile_attention(name, **SMALL.get(name, {}))
    q, k, v = draw(4, 2, 130, batch=2)
    expected = attention(q, k, v)
    visible = torch.ones(2, 2, 130, dtype=torch.bool)
    ends = [0, 1, 33, 100, 130]
    chunks = []
    for a, b in pairwise(ends):
        cache = filled(k, v, [b, b], visible, kind)
        chunks.append(attention.prefill(q[:, :, a:b], cache.k, cache.v, **cache.given))
    torch.testing.assert_close(torch.cat(chunks, 2), expected, rtol=1e-5, atol=1e-5)
    with torch.enable_grad():
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attention.prefill(q[:, :, 33:], k, v, kv_len=130)
        assert isinstance(out, Tensor)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        wanted = torch.autograd.grad(attention(q, k, v)[:, :, 33:].square().sum(), leaves)
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-4)


def test_prefill_of_entries_of_different_lengths() -> None:
    attention = compile_attention("causal")
    q, k, v = draw(2, 2, 70, batch=3)
    lengths = [70, 20, 70]
    cache = filled(k, v, lengths, torch.ones(3, 2, 70, dtype=torch.bool))
    error_of_last_row = torch.stack([q[i, :, n - 20 : n] for i, n in enumerate(lengths)])
    out = attention.prefill(error_of_last_row, cache.k, cache.v, **cache.given)
    for i, n in enumerate(lengths):
        entry_tensors = [x[i : i + 1, :, :n] for x in (q, k, v)]
        torch.testing.assert_close(out[i], attention(*entry_tensors)[0, :, n - 20 :])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_split_the_keys_of_one_head(threads: int) -> None:
    attention = compile_attention("causal")
    q, k, v = draw(3, 1, 5001)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = attention.decode(q[:, :, -2:], k, v, kv_len=5001)
    finally:
        torch.set_num_threads(before)
    mask = torch.ones(2, 5001, dtype=torch.bool).tril(4999)
    by_head = k.expand(-1, 3, -1, -1), v.expand(-1, 3, -1, -1)
    wanted = F.scaled_dot_product_attention(q[:, :, -2:], by_head[0], by_head[1], attn_mask=mask)
    torch.testing.assert_close(out, wanted)


def test_other_documents_and_unused_slots_change_nothing() -> None:
    attention = compile_attention("document")
    doc = torch.tensor([[0] * 20 + [1] * 30])
    q, k, v = draw(2, 2, 50)
    first = attention.decode(q[:, :, -1:], k, v, kv_len=45, doc=doc)
    for x in (k, v):
        x[:, :, :20] = float("inf")
        x[:, :, 45:] = float("nan")
    assert torch.equal(attention.decode(q[:, :, -1:], k, v, kv_len=45, doc=doc), first)


def test_rows_without_keys() -> None:
    attention = compile_attention("pattern p\n    visible k < q - 3\n")
    q, k, v = draw(2, 1, 6)
    out, lse = attention.decode(q[:, :, :5], k, v, kv_len=5, return_lse=True)
    assert not out[:, :, :4].any()
    assert (lse[:, :, :4] == float("-inf")).all()
    torch.testing.assert_close(out[:, :, 4], v[:, :, 0].expand(-1, 2, -1))


@pytest.mark.parametrize("kind", ["slots", "pages"])
def test_decode_by_the_reference(kind: Kind) -> None:
    attention = compile_attention("gpt_oss", window=20, backend="reference")
    q, k, v = draw(2, 2, 50)
    cache = filled(k, v, [50], torch.ones(1, 2, 50, dtype=torch.bool), kind)
    sink = torch.randn(2)
    out = attention.decode(q[:, :, -3:], cache.k, cache.v, sink=sink, **cache.given)
    torch.testing.assert_close(out, attention(q, k, v, sink=sink)[:, :, -3:])


# --- regressions -----------------------------------------------------------------------------------------------------


def error_of_last_row(attention: Attention, n: int, **inputs: Any) -> float:
    """Return the distance of decode's last row from the reference's."""
    q, k, v = draw(2, 2, n)
    out = attention.decode(q[:, :, -1:], k, v, kv_len=n, **inputs)
    return float((out - attention.reference(q, k, v, **inputs)[:, :, -1:]).abs().max())


def test_inputs_of_a_score_are_read_in_each_call() -> None:
    text = "pattern p\n    input pos: int[token]\n    visible k <= q\n    score scale * dot(q, k) * pos[k]\n"
    attention = compile_attention(text)
    assert max(error_of_last_row(attention, 20, pos=torch.randint(5, (20,))) for _ in range(3)) < 1e-5


def test_sizes_of_inputs_are_read_in_each_call() -> None:
    text = "pattern p\n    input x: real[m]\n    visible k <= q and q - k < m\n    score scale * dot(q, k) + x[0]\n"
    attention = compile_attention(text)
    for m in (7, 3, 12):
        x = torch.randn(m)
        assert error_of_last_row(attention, 20, x=x) < 1e-5
        q, k, v = draw(2, 2, 20)
        torch.testing.assert_close(attention(q, k, v, x=x), attention.reference(q, k, v, x=x))


def test_combine_may_read_values() -> None:
    text = (
        "pattern p\n    branch a\n        visible k <= q\n    branch b\n        visible k <= q and q - k < 4\n"
        "    combine a + b + v[q]\n"
    )
    assert error_of_last_row(compile_attention(text), 20) < 1e-5


def test_patterns_that_read_outside_their_mask_have_no_ring() -> None:
    head = "pattern p\n    align end\n"
    elsewhere = compile_attention(f"{head}    visible 0 <= q - k < 4\n    score scale * dot(q, k[max(k - 6, 0)])\n")
    assert elsewhere.plan(1, 20).cache is None
    clauses = "    over j in 0 .. keys\n    visible 0 <= q - j < 4\n    score scale * dot(q, k[j])\n    value v[j]\n"
    over = compile_attention(f"{head}{clauses}")
    plain = compile_attention(f"{head}    visible 0 <= q - k < 4\n")
    for _ in range(2):  # the order of the two calls must not matter
        assert over.plan(1, 20).cache is None
        assert str(plain.plan(1, 20).cache) == "the last 4 tokens"


def test_empty_batch() -> None:
    attention = compile_attention("causal")
    q, k, v = (x[:0] for x in draw(2, 2, 9))
    out, lse = attention.decode(q[:, :, -1:], k, v, kv_len=[], return_lse=True)
    assert (out.shape, lse.shape) == ((0, 2, 1, 8), (0, 2, 1))
    assert attention.prefill(q[:, :, -4:], k, v, kv_len=[]).shape == (0, 2, 4, 8)


# --- errors ----------------------------------------------------------------------------------------------------------


def call(attention: Attention, n_q: int = 1, slots: int = 50, **options: Any) -> object:
    q, k, v = draw(4, 2, slots)
    return attention.decode(q[:, :, :n_q], k, v, **({"kv_len": 50} | options))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"n_q": 17}, ArgumentError, "q has 17 tokens .* decode takes 1 to 16; `prefill` takes any number"),
        ({"kv_len": 51}, ArgumentError, "kv_len of batch entry 0 is 51 and the cache has 50 slots .* pass ring=True"),
        ({"n_q": 3, "kv_len": 2}, ArgumentError, "kv_len of batch entry 0 is 2 and q has 3 tokens"),
        ({"kv_len": [50, 50]}, ArgumentError, "kv_len has 2 entries and q has batch 1"),
        ({"kv_len": 5.0}, ArgumentTypeError, "kv_len is 5.0: it must be an integer"),
        ({"kv_len": torch.tensor([5.0])}, ArgumentTypeError, "kv_len has dtype torch.float32"),
        ({"block_table": [[0], [0]]}, ArgumentError, r"block_table has shape \(2, 1\): it must be \(batch, pages"),
        ({"block_table": [[0.5]]}, ArgumentTypeError, "block_table has dtype torch.float32"),
        ({"block_table": [[0]], "kv_len": 51}, ArgumentError, "block_table has 1 columns and batch entry 0 needs 2"),
        ({"block_table": [[1]]}, ArgumentError, r"block_table\[0, 0\] is 1: k_cache has 1 pages"),
        ({"ring": True, "kv_len": 90}, ArgumentError, "ring: `causal` may need all tokens"),
        ({"ring": 1}, ArgumentTypeError, "ring is 1: it must be True or False"),
        ({"ring": True, "block_table": [[0]]}, ArgumentError, "use one or the other"),
        ({"scale": float("inf")}, ArgumentError, "scale is inf"),
        ({"return_lse": True, "window": 3}, ArgumentTypeError, "`causal` has no input `window`"),
    ],
)
def test_wrong_calls(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(compile_attention("causal"), **options)


def test_wrong_caches() -> None:
    attention = compile_attention("sliding_window", **WINDOW)
    with pytest.raises(ArgumentError, match=r"the cache has 45 slots and `sliding_window` needs 46 with 3 queries"):
        call(attention, n_q=3, slots=45, kv_len=46, ring=True)
    q, k, v = draw(4, 2, 50, batch=2)
    with pytest.raises(ArgumentError, match="k_cache and v_cache disagree"):
        attention.decode(q[:, :, :1], k, v[:, :, :49], kv_len=9)
    with pytest.raises(ArgumentError, match="q has batch 2 and k_cache 1"):
        attention.decode(q[:, :, :1], k[:1], v[:1], kv_len=9)
    with pytest.raises(ArgumentTypeError, match="k_cache is list"):
        attention.decode(q[:, :, :1], [], v, kv_len=9)  # type: ignore[call-overload]
    with pytest.raises(ArgumentError, match="k_cache has 3 dimensions"):
        attention.decode(q[:, :, :1], k[0], v, kv_len=9)
    with pytest.raises(UnsupportedError, match="ring: `fox` reads `f` by token"):
        compile_attention("fox").decode(q[:, :, :1], k, v, kv_len=9, ring=True, f=torch.ones(2, 4, 50))


def test_decode_with_gradients_raises() -> None:
    attention = compile_attention("causal")
    q, k, v = draw(2, 2, 9)
    with torch.enable_grad(), pytest.raises(UnsupportedError, match="decode has no gradient: call it under"):
        attention.decode(q[:, :, -1:].requires_grad_(), k, v, kv_len=9)


def test_other_devices_are_refused() -> None:
    attention = compile_attention("causal")
    q, k, v = (x.to("meta") for x in draw(2, 2, 9))
    with pytest.raises(UnsupportedError, match="decode on meta is not supported"):
        attention.decode(q[:, :, -1:], k, v, kv_len=9)


def test_memory_of_plans_is_bounded() -> None:
    from attnc.runtime.settings import SETTINGS

    attention = compile_attention("sliding_window", **WINDOW)
    q, k, v = draw(2, 2, 300)
    for n in range(100, 300):
        attention.decode(q[:, :, :2], k, v, kv_len=n)
    (planner,) = attentions_of(attention._core.last_rows.planner)._planners._values.values()
    assert len(planner._kept._values) <= SETTINGS.plans


# --- under autocast --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("pattern", ["causal", "softcap", "hybrid_window_linear"])
def test_autocast_casts_as_a_call_does(pattern: str, backend: Any) -> None:
    """Fails if q, k_cache and v_cache of different dtypes are refused, or if fp32 tensors are not cast."""
    params: dict[str, Any] = {"window": 8} if "window" in pattern else {}
    attend: Any = compile_attention(pattern, backend=backend, **params)
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    gates = {"g": -torch.rand(1, 20, 2), "gate": torch.rand(1, 20, 2)} if "hybrid" in pattern else {}
    state = {"state": attend.init_state(1, 2, 16, 16)} if "hybrid" in pattern else {}
    for run, queries in ((attend.decode, 4), (attend.prefill, 20)):
        if state and run == attend.decode:
            continue  # its states would come from the tokens before
        rows = q[:, :, -queries:]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(rows, k.bfloat16(), v, kv_len=20, **gates, **state)
        with torch.no_grad():
            wanted = run(rows.bfloat16(), k.bfloat16(), v.bfloat16(), kv_len=20, **gates, **state)
        out, wanted = (x[0] if isinstance(x, tuple) else x for x in (out, wanted))
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, wanted)
