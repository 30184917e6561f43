"""Checks of mask and score kernels on a GPU: results, repeatability, size limits, CUDA graphs, torch.compile.

On a CPU they run at toy sizes in Triton's interpreter; checks that need CUDA are left out, and rows say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import masks
import torch
from benchmark_part import Row, Setting
from gpu_parts import TOLERANCE, errors, fits, operands, replaying, results, rows, word
from torch import Tensor

from attnc import Attention, compile_attention

REPEATS = 20


@dataclass(frozen=True)
class Checked:
    """A checked pattern, with parameters for real and toy sizes, and inputs for (batch, heads, tokens)."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    toy: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[int, int, int], dict[str, Tensor]] = lambda b, h, n: {}

    def attention(self, setting: Setting) -> Attention:
        """Return the pattern compiled for kernels only."""
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


# --- results ---------------------------------------------------------------------------------------------------------


def correct(setting: Setting) -> Iterator[Row]:
    """Yield outputs and gradients of every pattern against the reference in fp64."""
    dtypes = [torch.float32] if setting.toy else list(TOLERANCE)
    todo: dict[str, Callable[[], Row]] = {}
    for case, dtype in product(CHECKED, dtypes):
        for d, heads in _heads(setting, dtype):
            key = f"{case.name} d={d} heads={heads[0]}/{heads[1]} {word(dtype)}"
            todo[key] = partial(_correct, setting, case, dtype, d, heads)
    return rows(setting, todo.items())


def _correct(setting: Setting, case: Checked, dtype: torch.dtype, d: int, heads: tuple[int, int]) -> Row:
    torch.manual_seed(0)
    n, attention = 48 if setting.toy else 1024, case.attention(setting)
    leaves = operands(setting, n, dtype, batch=1 if setting.toy else 2, heads=heads, d=d)
    inputs = _inputs(case, setting, leaves[0])
    grad = torch.randn(leaves[0].shape, device=setting.device).to(dtype)
    ours = results(attention, leaves, grad, **inputs)
    wide = tuple(x.detach().double().requires_grad_() for x in leaves)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    error_by_name = errors(ours, results(attention.reference, wide, grad, **exact))
    row: Row = {"pattern": case.name, "n": n, "d": d, "heads": heads, "dtype": word(dtype)}
    return {**row, "errors": error_by_name, "ok": fits(error_by_name, dtype)}


def _heads(setting: Setting, dtype: torch.dtype) -> list[tuple[int, tuple[int, int]]]:
    """Return widths, and numbers of query and kv heads: shared and, if kernels are few enough, equal."""
    if setting.toy:
        return [(64, (2, 1)), (64, (2, 2))]
    shared = [(64, (8, 2)), (128, (8, 2))]
    return [*shared, (64, (4, 4)), (128, (4, 4))] if dtype == torch.bfloat16 else shared


def _inputs(case: Checked, setting: Setting, q: Tensor) -> dict[str, Tensor]:
    return {name: x.to(setting.device) for name, x in case.inputs(q.shape[0], q.shape[1], q.shape[2]).items()}


def repeat(setting: Setting) -> Iterator[Row]:
    """Check that results have the same bits every time."""
    return rows(setting, [(case.name, partial(_repeat, setting, case)) for case in CHECKED[:: 3 if setting.toy else 1]])


def _repeat(setting: Setting, case: Checked) -> Row:
    n, times = (40, 2) if setting.toy else (2048, REPEATS)
    if case.name == "neighborhood_2d":
        n = 48 if setting.toy else 1024
    again, _ = _again(setting, case, n)
    first = again()
    same = all(torch.equal(a, b) for _ in range(times - 1) for a, b in zip(first, again(), strict=True))
    return {"pattern": case.name, "n": n, "times": times, "ok": same}


def _again(setting: Setting, case: Checked, n: int) -> tuple[Callable[[], list[Tensor]], tuple[Tensor, ...]]:
    """Return a call with gradients that can be repeated, and its operands."""
    attention, dtype = case.attention(setting), _dtype(setting)
    leaves = operands(setting, n, dtype)
    inputs, grad = _inputs(case, setting, leaves[0]), torch.randn(leaves[0].shape, device=setting.device)
    return lambda: results(attention, leaves, grad, **inputs), leaves


def _dtype(setting: Setting) -> torch.dtype:
    return torch.float32 if setting.toy else torch.bfloat16


def edges(setting: Setting) -> Iterator[Row]:
    """Yield calls with very many heads, and with tensors whose offsets exceed 2^31 elements."""
    attention = compile_attention("sliding_window", backend="triton", window=20)
    todo = {"batch × heads": partial(_many, setting, attention), "offsets": partial(_far, setting, attention)}
    return rows(setting, todo.items())


def _many(setting: Setting, attention: Attention) -> Row:
    batch, heads, dtype = 3 if setting.toy else 32_769, 2, _dtype(setting)
    leaves = operands(setting, 17, dtype, batch=batch, heads=(heads, heads), d=16)
    grad = torch.randn(leaves[0].shape, device=setting.device)
    ours = results(attention, leaves, grad)
    wide = tuple(x.detach().double().requires_grad_() for x in leaves)
    error_by_name = errors(ours, results(attention.reference, wide, grad))
    return {"lanes": batch * heads, "errors": error_by_name, "ok": fits(error_by_name, dtype)}


def _far(setting: Setting, attention: Attention) -> Row:
    """Compare a view whose last head is beyond 2^31 elements with a copy of its numbers."""
    apart = 1 << 12 if setting.toy else (1 << 31) + (1 << 20)
    n, d = (40, 16) if setting.toy else (1000, 64)
    memory = torch.zeros(apart + n * d, dtype=_dtype(setting), device=setting.device)
    view = memory.as_strided((1, 2, n, d), (2 * apart, apart, d, 1))
    numbers = torch.randn(1, 2, n, d, device=setting.device).to(memory.dtype)
    view.copy_(numbers)
    with torch.no_grad():
        same = torch.equal(attention(view, view, view), attention(numbers, numbers, numbers))
    return {"elements": apart, "ok": same}


# --- graphs and compilers --------------------------------------------------------------------------------------------


def graph(setting: Setting) -> Iterator[Row]:
    """Yield forward and backward captured in a CUDA graph and replayed on other numbers."""
    return rows(setting, [(case.name, partial(_graph, setting, case)) for case in _whole(setting)])


def _whole(setting: Setting) -> tuple[Checked, ...]:
    return CHECKED[2:7:4] if setting.toy else CHECKED[1:8]


def _graph(setting: Setting, case: Checked) -> Row:
    again, leaves = _again(setting, case, 40 if setting.toy else 1024)
    replayed = replaying(setting, again)
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    tensors = [x.clone() for x in replayed()]
    same = all(torch.equal(a, b) for a, b in zip(tensors, again(), strict=True))
    return {"pattern": case.name, "captured": setting.cuda, "ok": same}


def compiled(setting: Setting) -> Iterator[Row]:
    """Yield calls under torch.compile(fullgraph=True), which must give the same bits."""
    return rows(setting, [(case.name, partial(_compiled, setting, case)) for case in _whole(setting)])


def _compiled(setting: Setting, case: Checked) -> Row:
    attention = case.attention(setting)
    leaves = operands(setting, 40 if setting.toy else 1024, _dtype(setting))
    inputs, grad = _inputs(case, setting, leaves[0]), torch.randn(leaves[0].shape, device=setting.device)
    torch.compiler.reset()
    # interpreted kernels are not compiled
    whole: Any = torch.compile(attention, fullgraph=True) if setting.cuda else attention
    pairs = zip(results(whole, leaves, grad, **inputs), results(attention, leaves, grad, **inputs), strict=True)
    return {"pattern": case.name, "compiled": setting.cuda, "ok": all(torch.equal(a, b) for a, b in pairs)}
