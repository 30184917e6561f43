"""Decode kernels in Triton's interpreter: each result equals the last rows of a call of all tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import ArgumentError, ArgumentTypeError, SpecError, UnsupportedError, compile_attention
from attnc.compiler.ir import Pattern
from attnc.compiler.ir.verify_ir import IRInvalid
from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.executors.triton import gpu_decoding, planner
from attnc.runtime.executors.triton.device_cache import DeviceCache, read_device_cache
from cache_calls import Kind, filled, seen_by_last
from kernel_calls import poisoned, recorded

pytest.importorskip("triton")

LENGTHS = (1, 16, 17, 40, 41, 64, 65, 130)
"""Cache lengths around a page of 16 slots, windows of 40 tokens and a tile of 64 keys."""

CASES: list[tuple[str, Mapping[str, Any], tuple[int, int], bool]] = [
    ("causal", {}, (4, 1), False),
    ("sliding_window", {"window": 40, "sinks": 4}, (6, 2), False),
    ("blocked", {"block": 24}, (4, 2), False),
    ("moa", {"alpha": [16, 32], "beta": [0.25, 0.125], "block": 16}, (2, 1), False),
    ("softcap", {"cap": 2, "window": 40}, (4, 2), False),
    ("gpt_oss", {"window": 20}, (4, 4), False),
    ("alibi", {}, (4, 4), False),
    ("power", {"window": 2, "block": 8}, (4, 2), True),
    ("strided", {"stride": 16, "local": 16}, (4, 2), True),
    ("sparse_transformer", {"stride": 16}, (4, 2), True),
    ("document", {}, (4, 2), True),
]
"""Patterns, numbers of query and kv heads, and whether keys come from lists."""


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.setattr(planner, "target_of", lambda device: TARGETS["sm_90"])
    monkeypatch.setattr(gpu_decoding, "LEAST_KEYS", 40)  # so that even 40 keys are split between programs
    with torch.no_grad():
        yield


def inputs_of(name: str, heads: int, n: int, batch: int) -> dict[str, Any]:
    if name == "document":
        return {"doc": (torch.arange(n) // 30).expand(batch, n)}
    return {"sink": torch.randn(heads)} if name == "gpt_oss" else {}


RINGS = ("sliding_window", "blocked", "softcap", "gpt_oss")
"""Patterns whose last rows do not need all tokens."""

CALLS: list[tuple[Kind, torch.dtype]] = [("slots", torch.float32), ("ring", torch.float32), ("pages", torch.float16)]


@pytest.mark.parametrize(
    ("name", "params", "heads", "listed", "kind", "dtype"),
    [(*case, *call) for call in CALLS for case in CASES if call[0] != "ring" or case[0] in RINGS],
    ids=[f"{case[0]}-{call[0]}" for call in CALLS for case in CASES if call[0] != "ring" or case[0] in RINGS],
)
def test_last_rows(
    name: str, params: Mapping[str, Any], heads: tuple[int, int], listed: bool, kind: Kind, dtype: torch.dtype
) -> None:
    attention = compile_attention(name, backend="triton", **params)
    need = attention.plan(1, 100, heads=heads[0], kv_heads=heads[1], **inputs_of(name, heads[0], 100, 1)).cache
    assert (need is None) == (name not in RINGS)
    shapes = (heads[0], 32), (heads[1], 32), (heads[1], 24)
    q, k, v = (torch.randn(len(LENGTHS), h, 130, d).to(dtype) for h, d in shapes)
    inputs = inputs_of(name, heads[0], 130, len(LENGTHS))
    for n_q in (1, 5, 16):
        lengths = [max(n, n_q) for n in LENGTHS]
        visible = torch.zeros(len(lengths), heads[1], 130, dtype=torch.bool)
        for entry, n in enumerate(lengths):
            entry_inputs = {key: x[:1, :n] if key == "doc" else x for key, x in inputs.items()}
            visible[entry, :, :n] = seen_by_last(attention, n, n_q, *heads, entry_inputs)
        slots, first = (need.first + need.last + n_q - 1, need.first) if kind == "ring" and need else (None, 0)
        cache = filled(k, v, lengths, visible, kind, slots=slots, first=first)
        last = torch.stack([q[entry, :, n - n_q : n] for entry, n in enumerate(lengths)])
        with recorded() as launches, poisoned():
            out, lse = attention.decode(last, cache.k, cache.v, return_lse=True, scale=0.3, **inputs, **cache.given)
        careful = ["decode"] if name == "document" and n_q > 1 else []  # the rows of one step may lie in two documents
        assert [launch.source.stage for launch in launches] == ["decode", *careful, "merge"]
        assert ("listed_keys" in {a.name for a in launches[0].source.arguments}) == listed
        assert out.dtype == dtype
        for entry, n in enumerate(lengths):
            entry_inputs = {key: x[:1, :n] if key == "doc" else x.double() for key, x in inputs.items()}
            tensors = [x[entry : entry + 1, :, :n] for x in (q, k, v)]
            true, of_true = attention.reference(
                *tensors, dtype=torch.float64, return_lse=True, scale=0.3, **entry_inputs
            )
            tolerance = 2e-3 if dtype == torch.float16 else 2e-6
            assert error(out[entry], true[0, :, n - n_q :]) <= tolerance, (n, n_q)
            assert error(lse[entry], of_true[0, :, n - n_q :]) <= tolerance, (n, n_q)


def test_a_pass_that_breaks_the_terms_of_a_score_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pattern that computes a score's terms is verified, as the result of every pass is."""

    def broken(item: Any, **changes: Any) -> Any:
        replaced = replace(item, **changes)
        return replace(replaced, tensors=replaced.tensors * 2) if isinstance(replaced, Pattern) else replaced

    attention = compile_attention("gpt_oss", window=20, backend="triton")
    q, k, v = (torch.randn(1, 2, n, 16) for n in (1, 40, 40))
    attention.decode(q, k, v, kv_len=[40], sink=torch.zeros(2))
    monkeypatch.setattr(gpu_decoding, "replace", broken)
    with pytest.raises(IRInvalid, match="two tensors have the same name"):
        attention.decode(q, k, v, kv_len=[40], sink=torch.zeros(2))


def error(x: Tensor, true: Tensor) -> float:
    assert torch.equal(x == float("-inf"), true == float("-inf"))
    gap = torch.where(true == float("-inf"), 0, x.double() - true)
    return float(gap.abs().max() / true[true > float("-inf")].abs().max().clamp(min=1))


@pytest.mark.parametrize("splits", [1, 2, 7, 256])
def test_any_number_of_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be more splits than keys: empty splits contribute nothing."""
    monkeypatch.setattr(gpu_decoding, "_splits", lambda device, programs, capacity: splits)
    attention = compile_attention("sliding_window", window=40, sinks=4, backend="triton")
    q, k, v = (torch.randn(1, h, 300, 16) for h in (2, 1, 1))
    out = attention.decode(q[:, :, -3:], k, v, kv_len=300)
    torch.testing.assert_close(out, attention.reference(q, k, v)[:, :, -3:])


def test_heads_of_a_group_fill_several_tiles_of_rows() -> None:
    attention = compile_attention("causal", backend="triton")
    q, k, v = (torch.randn(1, h, 90, 16) for h in (10, 1, 1))
    out = attention.decode(q[:, :, -9:], k, v, kv_len=90)  # 90 rows
    torch.testing.assert_close(out, attention.reference(q, k, v)[:, :, -9:])


def test_new_lengths_compile_no_kernels() -> None:
    attention = compile_attention("sliding_window", window=40, backend="triton")
    q, k, v = (torch.randn(1, h, 200, 16) for h in (2, 1, 1))
    digests = set()
    for n in range(50, 100):
        with recorded(run=False) as launches:
            attention.decode(q[:, :, -1:], k, v, kv_len=n)
        digests |= {launch.source.digest for launch in launches}
    assert len(digests) == 2


def test_errors_of_unsupported_calls_name_a_remedy() -> None:
    q, k, v = (torch.randn(1, 2, 50, 16) for _ in range(3))
    attention = compile_attention("fox", backend="triton")
    with pytest.raises(UnsupportedError, match=r"decode of `fox` by kernels is not supported for .*; call `prefill`"):
        attention.decode(q[:, :, -1:], k, v, kv_len=50, f=torch.ones(1, 2, 50))
    causal = compile_attention("causal", backend="triton")
    with pytest.raises(
        UnsupportedError, match="pages of 10 tokens are not supported by kernels: the page size must be a power of two"
    ):
        pages = k.reshape(5, 2, 10, 16), v.reshape(5, 2, 10, 16)
        causal.decode(q[:, :, -1:], *pages, kv_len=50, block_table=torch.arange(5)[None])
    with pytest.raises(ArgumentError, match="kv_len of batch entry 0 is 51"):
        causal.decode(q[:, :, -1:], k, v, kv_len=51)


# --- regressions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["slots", "pages"])
@pytest.mark.parametrize("widths", [(5, 5), (16, 7)], ids=str)
def test_head_dimensions_that_a_call_pads(widths: tuple[int, int], kind: str) -> None:
    """Fails if a cache is refused because its rows do not start at a multiple of 16 bytes."""
    q, k, v = (torch.randn(2, 4, 48, width) for width in (widths[0], *widths))
    attention, reference = (compile_attention("causal", backend=backend) for backend in ("triton", "reference"))
    table = torch.arange(6).reshape(2, 3) if kind == "pages" else None
    caches = (k, v) if table is None else [x.reshape(2, 4, 3, 16, -1).transpose(1, 2).flatten(0, 1) for x in (k, v)]
    out, lse = attention.decode(q[:, :, -2:], *caches, kv_len=48, block_table=table, return_lse=True)
    wanted, of_wanted = reference(q, k, v, return_lse=True)
    torch.testing.assert_close(out, wanted[:, :, -2:])
    torch.testing.assert_close(lse, of_wanted[:, :, -2:])


def test_query_rows_of_any_stride() -> None:
    odd = torch.randn(1, 2, 50, 17)[..., :16]
    contiguous = odd.contiguous()
    run = compile_attention("causal", backend="triton").decode
    torch.testing.assert_close(
        run(odd[:, :, -1:], odd, odd, kv_len=50), run(contiguous[:, :, -1:], contiguous, contiguous, kv_len=50)
    )


def test_calls_without_a_plan_are_checked() -> None:
    q, k, v = (torch.randn(1, 2, 41, 16) for _ in range(3))

    def decode(text: str, **inputs: Any) -> None:
        attention = compile_attention(text, backend="triton", **inputs.pop("params", {}))
        attention.decode(q[:, :, -1:], k, v, kv_len=41, **inputs)

    with pytest.raises(SpecError, match="keys % 4 == 0"):
        decode("pattern p\n    require keys % 4 == 0\n    visible k <= q\n")
    with pytest.raises(ArgumentError, match="the parameter `w` has 3 entries, one per head; q has 2 heads"):
        decode("pattern p(w: int[head])\n    visible 0 <= q - k < w\n", params={"w": [3, 5, 9]})
    pre = "pattern p\n    input pre: int[batch, token]\n    visible k <= q and k >= pre[q]\n"
    with pytest.raises(ArgumentError, match="the input `pre` has size 7 in dimension 1"):
        decode(pre, pre=torch.zeros(1, 7, dtype=torch.int64))
    sized = "pattern p\n    input x: int[m]\n    visible k <= q and q - k < m\n    score scale * dot(q, k) + x[0]\n"
    with pytest.raises(UnsupportedError, match="the size `m`"):
        decode(sized, x=torch.zeros(3, dtype=torch.int64))


def test_extra_logits_of_patterns_with_requirements_and_inputs() -> None:
    text = (
        "pattern p\n    input pre: int[batch, token]\n    learned sink: real[head]\n    require keys % 4 == 0\n"
        "    visible k <= q and k >= pre[q]\n    weights softmax(score, extra = sink)\n"
    )
    attention = compile_attention(text, backend="triton")
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    inputs: dict[str, Any] = {"pre": torch.full((1, 40), 3), "sink": torch.randn(2)}
    out = attention.decode(q[:, :, -2:], k, v, kv_len=40, **inputs)
    torch.testing.assert_close(out, attention.reference(q, k, v, **inputs)[:, :, -2:])


class OnDevice(Tensor):
    """A tensor that claims to be on a GPU and raises when its values are read."""

    is_cuda = True

    def tolist(self) -> Any:
        raise AssertionError("the host waits for the device")


def device(x: Tensor) -> Tensor:
    return x.as_subclass(OnDevice)


def test_shapes_are_checked_without_reading_the_device() -> None:
    q, k, v = (torch.randn(2, 2, 16, 16) for _ in range(3))
    table = torch.arange(4, dtype=torch.int32).reshape(2, 2)

    def read(kv_len: object, block_table: object = None, k: Tensor = k, v: Tensor = v) -> DeviceCache:
        return read_device_cache(q[:, :, :1], k, v, kv_len, block_table, ring=None)

    lengths = device(torch.tensor([9, 12]))
    assert read(lengths).known_lengths is None
    pages = torch.randn(4, 2, 8, 16)
    assert read([9, 12], device(table), pages, pages).known_lengths == (9, 12)
    assert read(torch.tensor(9), device(table), pages, pages).known_lengths == (9, 9)
    with pytest.raises(ArgumentError, match="k_cache and v_cache disagree"):
        read(lengths, v=v[:, :, :8])
    with pytest.raises(ArgumentError, match="q has batch 2 and k_cache 1"):
        read(lengths, k=k[:1], v=v[:1])
    with pytest.raises(ArgumentError, match="k_cache has 3 dimensions"):
        read(lengths, k=k[0], v=v[0])
    with pytest.raises(ArgumentTypeError, match=r"kv_len is 40\.7"):
        read([40.7, 3.2], device(table), pages, pages)
    with pytest.raises(ArgumentError, match="kv_len of batch entry 0 is 0"):
        read([0, 0], device(table), pages, pages)
    with pytest.raises(ArgumentError, match="block_table has 2 columns and batch entry 0 needs 125 pages"):
        read([1000, 3], device(table), pages, pages)
    with pytest.raises(ArgumentError, match=r"block_table has shape \(1, 4\)"):
        read(lengths, table.reshape(1, 4), pages, pages)
    with pytest.raises(ArgumentError, match=r"kv_len is torch.int64 \(3,\)"):
        read(device(torch.tensor([1, 2, 3])))
