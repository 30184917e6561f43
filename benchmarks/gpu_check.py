"""Kernels on a GPU: are they right, the same bits every time, and how fast beside FlexAttention and SDPA?

    python benchmarks/gpu_check.py correct|repeat|edges|graph|compile|decode|forward|backward [--toy]

Each part takes less than nine minutes and writes `results/gpu-<part>.json`. On a CPU, `TRITON_INTERPRET=1` and `--toy`
run every line of ours at toy sizes in Triton's interpreter; what needs CUDA is left out there, and rows say so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import masks
import timing
import torch
import torch.nn.functional as F
from gpu_parts import L2_BYTES, TOLERANCE, Parts, errors, operands, results, run
from part import Row, Setting
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnc import compile_attention
from attnc.runtime.attention import Attention
from attnc.runtime.tuning.timer import Clock

REPEATS, ROUNDS, WARM_UP = 20, 25, 5


@dataclass(frozen=True)
class Checked:
    """A pattern that is checked, with parameters for real and toy sizes, and inputs for (batch, heads, tokens)."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    toy: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[int, int, int], dict[str, Tensor]] = lambda b, h, n: {}

    def attention(self, setting: Setting) -> Attention:
        """Compiled for kernels only."""
        return compile_attention(self.name, backend="triton", **(self.toy if setting.toy else self.params))


def _documents(b: int, h: int, n: int) -> dict[str, Tensor]:
    return {"doc": masks.document_ids(n).expand(b, n).contiguous()}


CHECKED = (
    Checked("full"),
    Checked("causal"),
    Checked("sliding_window", {"window": 512, "sinks": 4}, {"window": 20, "sinks": 4}),
    Checked("neighborhood_1d", {"window": 129}, {"window": 9}),
    Checked("blocked", {"block": 200}, {"block": 24}),
    Checked("prefix_lm", inputs=lambda b, h, n: {"prefix": torch.arange(b) * 7 + n // 3}),
    Checked("document", inputs=_documents),
    Checked("alibi"),
    Checked("softcap", {"cap": 20, "window": 300}, {"cap": 20, "window": 30}),
    Checked("fox", inputs=lambda b, h, n: {"f": -torch.rand(b, n, h)}),
    Checked("power", {"block": 64}, {"block": 8}),
    Checked("strided", {"stride": 64, "local": 64}, {"stride": 16, "local": 16}),
    Checked("neighborhood_2d", {"height": 32, "width": 32}, {"height": 6, "width": 8, "window": 3}),
    Checked("softplus_lssa"),
    Checked("affine_scaled", inputs=lambda b, h, n: {"alpha": torch.rand(b, h, n), "beta": torch.randn(b, h, n) / n}),
)


def main() -> int:
    """Run one part; 1 where something is wrong."""
    return run(PARTS, __doc__, "gpu")


# --- results ---------------------------------------------------------------------------------------------------------


def correct(setting: Setting) -> Iterator[Row]:
    """Outputs and gradients of every pattern against the reference in 64 bits."""
    n, dtypes = (48, [torch.float32]) if setting.toy else (1024, list(TOLERANCE))
    for case in CHECKED:
        attention = case.attention(setting)
        for dtype in dtypes:
            for d, heads in _heads(setting, dtype):
                leaves = operands(setting, n, dtype, batch=1 if setting.toy else 2, heads=heads, d=d)
                inputs = _inputs(case, setting, leaves[0])
                grad = torch.randn(leaves[0].shape, device=setting.device).to(dtype)
                ours = results(attention, leaves, grad, **inputs)
                wide = tuple(x.detach().double().requires_grad_() for x in leaves)
                exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
                found = errors(ours, results(attention.reference, wide, grad, **exact))
                ok = max(found.values()) <= TOLERANCE[dtype]
                row = {"pattern": case.name, "n": n, "d": d, "heads": heads, "dtype": str(dtype)}
                yield {**row, "errors": found, "ok": ok}


def _heads(setting: Setting, dtype: torch.dtype) -> list[tuple[int, tuple[int, int]]]:
    """Widths, and heads of queries and of keys: shared and, where kernels are few enough, each its own."""
    if setting.toy:
        return [(64, (2, 1)), (64, (2, 2))]
    shared = [(64, (8, 2)), (128, (8, 2))]
    return [*shared, (64, (4, 4)), (128, (4, 4))] if dtype == torch.bfloat16 else shared


def _inputs(case: Checked, setting: Setting, q: Tensor) -> dict[str, Tensor]:
    return {name: x.to(setting.device) for name, x in case.inputs(q.shape[0], q.shape[1], q.shape[2]).items()}


def repeat(setting: Setting) -> Iterator[Row]:
    """The same bits every time."""
    n, times = (40, 2) if setting.toy else (2048, REPEATS)
    dtype = torch.float32 if setting.toy else torch.bfloat16
    for case in CHECKED:
        length = (48 if setting.toy else 1024) if case.name == "neighborhood_2d" else n
        attention = case.attention(setting)
        leaves = operands(setting, length, dtype)
        inputs, grad = _inputs(case, setting, leaves[0]), torch.randn(leaves[0].shape, device=setting.device)
        first = results(attention, leaves, grad, **inputs)
        same = all(
            torch.equal(a, b)
            for _ in range(times - 1)
            for a, b in zip(first, results(attention, leaves, grad, **inputs), strict=True)
        )
        yield {"pattern": case.name, "n": length, "times": times, "ok": same}


def edges(setting: Setting) -> Iterator[Row]:
    """Very many heads, and tensors whose offsets pass 2^31 elements."""
    attention = compile_attention("sliding_window", backend="triton", window=20)
    batch, heads = (3, 2) if setting.toy else (32_769, 2)
    dtype = torch.float32 if setting.toy else torch.bfloat16
    leaves = operands(setting, 17, dtype, batch=batch, heads=(heads, heads), d=16)
    grad = torch.randn(leaves[0].shape, device=setting.device)
    ours = results(attention, leaves, grad)
    wide = tuple(x.detach().double().requires_grad_() for x in leaves)
    found = errors(ours, results(attention.reference, wide, grad))
    ok = max(found.values()) <= TOLERANCE[dtype]
    yield {"what": "batch × heads", "lanes": batch * heads, "errors": found, "ok": ok}
    yield _far(setting, attention, dtype)


def _far(setting: Setting, attention: Attention, dtype: torch.dtype) -> Row:
    """A view whose last head lies past 2^31 elements, against the same numbers elsewhere."""
    apart = 1 << 12 if setting.toy else (1 << 31) + (1 << 20)
    n, d = (40, 16) if setting.toy else (1000, 64)
    memory = torch.zeros(apart + n * d, dtype=dtype, device=setting.device)
    view = memory.as_strided((1, 2, n, d), (2 * apart, apart, d, 1))
    own = torch.randn(1, 2, n, d, device=setting.device).to(dtype)
    view.copy_(own)
    with torch.no_grad():
        same = torch.equal(attention(view, view, view), attention(own, own, own))
    return {"what": "offsets", "elements": apart, "ok": same}


# --- graphs and compilers --------------------------------------------------------------------------------------------


def graph(setting: Setting) -> Iterator[Row]:
    """Forward and backward captured in a CUDA graph, and replayed on other numbers."""
    for case in CHECKED[1:8]:
        attention = case.attention(setting)
        dtype = torch.float32 if setting.toy else torch.bfloat16
        leaves = operands(setting, 40 if setting.toy else 1024, dtype)
        inputs, grad = _inputs(case, setting, leaves[0]), torch.randn(leaves[0].shape, device=setting.device)
        replayed = _captured(setting, lambda: results(attention, leaves, grad, **inputs))  # noqa: B023  used at once
        with torch.no_grad():
            for x in leaves:
                x.copy_(torch.randn_like(x))
        found = [x.clone() for x in replayed()]
        same = all(torch.equal(a, b) for a, b in zip(found, results(attention, leaves, grad, **inputs), strict=True))
        yield {"pattern": case.name, "captured": setting.cuda, "ok": same}


def _captured(setting: Setting, run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """A replay of what was captured; without CUDA a run."""
    if not setting.cuda:
        return run
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        results_ = run()

    def replay() -> list[Tensor]:
        recorded.replay()
        return results_

    return replay


def compiled(setting: Setting) -> Iterator[Row]:
    """Under torch.compile(fullgraph=True), the same bits."""
    for case in CHECKED[1:8]:
        attention = case.attention(setting)
        dtype = torch.float32 if setting.toy else torch.bfloat16
        leaves = operands(setting, 40 if setting.toy else 1024, dtype)
        inputs, grad = _inputs(case, setting, leaves[0]), torch.randn(leaves[0].shape, device=setting.device)
        torch._dynamo.reset()
        # kernels in the interpreter are not compiled
        whole: Any = torch.compile(attention, fullgraph=True) if setting.cuda else attention
        found = zip(results(whole, leaves, grad, **inputs), results(attention, leaves, grad, **inputs), strict=True)
        yield {"pattern": case.name, "compiled": setting.cuda, "ok": all(torch.equal(a, b) for a, b in found)}


# --- decode ----------------------------------------------------------------------------------------------------------


def decode(setting: Setting) -> Iterator[Row]:
    """A step against caches by slot and by page: right, captured in a CUDA graph with other lengths, and how fast."""
    dtypes = [torch.float32] if setting.toy else list(TOLERANCE)
    for case in CHECKED[1:3]:
        for dtype in dtypes:
            yield _decoded(setting, case, dtype)
    if setting.cuda:
        for batch in (1, 8, 32):
            for n in (1024, 4096, 16384, 65536):
                yield _decode_timing(setting, batch, n)


def _decoded(setting: Setting, case: Checked, dtype: torch.dtype) -> Row:
    """The last rows against the reference, from slots and from pages, and replayed for other lengths."""
    n, page, batch, d = (64, 16, 2, 16) if setting.toy else (4096, 64, 4, 128)
    attention = case.attention(setting)
    q, k, v = (x.detach() for x in operands(setting, n, dtype, batch=batch, d=d))
    lengths = torch.arange(batch, dtype=torch.int32, device=setting.device) * 3 + n // 2
    table = torch.randperm(batch * n // page, device=setting.device).reshape(batch, -1).to(torch.int32)
    pages = []
    for x in (k, v):
        own = torch.empty(table.numel(), x.shape[1], page, d, dtype=dtype, device=setting.device)
        own[table.long()] = x.reshape(*x.shape[:2], -1, page, d).movedim(2, 1)
        pages.append(own)
    last = q[:, :, :3].contiguous()

    def step() -> list[Tensor]:
        with torch.no_grad():
            by_slot = attention.decode(last, k, v, kv_len=lengths)
            by_page = attention.decode(last, pages[0], pages[1], kv_len=lengths, block_table=table)
        return [by_slot, by_page]

    replay = _captured(setting, step)
    found: dict[str, float] = {}
    for more in (0, 7, n // 2 - 20):
        lengths += more
        for name, out in zip(("slots", "pages"), replay(), strict=True):
            for i, length in enumerate(lengths.tolist()):
                own_k, own_v = (x[i : i + 1, :, :length].double() for x in (k, v))
                rows = torch.zeros(1, q.shape[1], length, d, dtype=torch.float64, device=setting.device)
                rows[:, :, -3:] = last[i].double()
                true = attention.reference(rows, own_k, own_v)[0, :, -3:]
                gap = ((out[i].double() - true).abs().max() / true.abs().max().clamp(min=1)).item()
                found[name] = max(found.get(name, 0.0), math.inf if math.isnan(gap) else gap)
    ok = max(found.values()) <= TOLERANCE[dtype]
    return {"pattern": case.name, "n": n, "dtype": str(dtype), "captured": setting.cuda, "errors": found, "ok": ok}


def _decode_timing(setting: Setting, batch: int, n: int) -> Row:
    """Causal and a window, beside SDPA over the same keys, and what share of the memory's speed that is."""
    heads, kv_heads, d, dtype = 32, 8, 128, torch.bfloat16
    q = torch.randn(batch, heads, 1, d, device=setting.device, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, n, d, device=setting.device, dtype=dtype) for _ in range(2))
    lengths = torch.full((batch,), n, dtype=torch.int32, device=setting.device)
    causal = compile_attention("causal", backend="triton")
    window = compile_attention("sliding_window", window=1024, backend="triton")
    runs: dict[str, Callable[[], Tensor]] = {
        "attnc": lambda: causal.decode(q, k, v, kv_len=lengths),
        "attnc_window": lambda: window.decode(q, k, v, kv_len=lengths),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "copy": k.clone,
    }
    with torch.no_grad():
        difference = (runs["attnc"]().float() - runs["sdpa"]().float()).abs().max().item()
        times = {name: _milliseconds(setting, run, (), backward=False) for name, run in runs.items()}
    copied = 2 * k.numel() * k.element_size() / times["copy"]
    read = (k.numel() + v.numel()) * k.element_size() / times["attnc"]
    row: Row = {"pattern": "causal", "batch": batch, "n": n, "difference": difference, "ok": difference < 4e-2}
    return {**row, **{f"{name}_ms": one for name, one in times.items()}, "share_of_copy_speed": read / copied}


# --- timings ---------------------------------------------------------------------------------------------------------


def _timed(device: str) -> tuple[masks.Case, ...]:
    """The patterns that are timed, by length."""
    window = [
        masks.Case(f"window {w}", masks.compiled("sliding_window", window=w, backend="triton"), masks.window(w, 0))
        for w in (512, 4096)
    ]
    causal = masks.Case("causal", masks.compiled("causal", backend="triton"), lambda n: lambda b, h, q, k: q >= k)
    power = masks.Case("power 256, 5", masks.compiled("power", backend="triton"), masks.power(256, 5))
    document = masks.Case(
        "document", masks.compiled("document", backend="triton"), lambda n: _same_document(n, device), _document_ids
    )
    picture = masks.Case("neighborhood 13 x 13", _neighborhood_2d, masks.neighborhood)
    return (causal, *window, document, power, picture)


def _document_ids(n: int) -> dict[str, Any]:
    return {"doc": masks.document_ids(n)}


def _same_document(n: int, device: str) -> masks.MaskMod:
    doc = masks.document_ids(n)[0].to(device)
    return lambda b, h, q, k: (doc[q] == doc[k]) & (q >= k)


def _neighborhood_2d(n: int) -> Attention:
    height, width = masks.grid_of(n)
    window = min(masks.NEIGHBORS, height, width)
    return compile_attention("neighborhood_2d", height=height, width=width, window=window, backend="triton")


def _timings(setting: Setting, *, backward: bool) -> Iterator[Row]:
    lengths = (64,) if setting.toy else (4096, 16384)
    for n in lengths:
        for case in _timed(setting.device):
            for d in (16,) if setting.toy else (64, 128):
                yield _timing(setting, case, n, d, backward=backward)


def forward(setting: Setting) -> Iterator[Row]:
    """Forward beside compiled FlexAttention and causal SDPA."""
    return _timings(setting, backward=False)


def backward(setting: Setting) -> Iterator[Row]:
    """Backward alone."""
    return _timings(setting, backward=True)


def _timing(setting: Setting, case: masks.Case, n: int, d: int, *, backward: bool) -> Row:
    dtype = torch.float32 if setting.toy else torch.bfloat16
    heads = (1, 1) if setting.toy else (16, 16)
    q, k, v = operands(setting, n, dtype, heads=heads, d=d)
    inputs = {name: x.to(setting.device) for name, x in case.inputs(n).items()}
    attention = case.attention(n)
    runs: dict[str, Callable[[], Tensor]] = {"attnc": lambda: attention(q, k, v, **inputs)}
    if setting.cuda:
        mask = create_block_mask(case.mask_mod(n), None, None, n, n, device=setting.device)
        flex = torch.compile(flex_attention, dynamic=False)
        runs["flex"] = lambda: flex(q, k, v, block_mask=mask)
        runs["sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    row: Row = {"pattern": case.name, "n": n, "d": d, "dtype": str(dtype), "backward": backward}
    times = {name: _milliseconds(setting, run, (q, k, v), backward=backward) for name, run in runs.items()}
    row |= {f"{name}_ms": one for name, one in times.items()}
    if "flex" in runs:
        row["difference"] = (runs["attnc"]().float() - runs["flex"]().float()).abs().max().item()
        row["ok"] = row["difference"] < TOLERANCE[dtype]
        row |= {f"{name}_over_attnc": one / times["attnc"] for name, one in times.items() if name != "attnc"}
    return row


def _milliseconds(setting: Setting, run: Callable[[], Tensor], leaves: tuple[Tensor, ...], *, backward: bool) -> float:
    """The median, by CUDA events, with an L2 that holds nothing of the run."""
    out = run()
    grad = torch.randn_like(out)

    def step() -> object:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True) if backward else run()

    if not setting.cuda:
        return timing.once(step)
    clock = Clock(torch.device(setting.device), L2_BYTES)
    for _ in range(WARM_UP):
        step()
    return statistics.median(clock.milliseconds(step) for _ in range(ROUNDS))


PARTS: Parts = {
    "correct": correct,
    "repeat": repeat,
    "edges": edges,
    "graph": graph,
    "compile": compiled,
    "decode": decode,
    "forward": forward,
    "backward": backward,
}

if __name__ == "__main__":
    raise SystemExit(main())
