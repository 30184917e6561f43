"""Attention to selected blocks by kernels in Triton's interpreter, against the CPU executor and dense softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import Index, fold
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.compiler.kernels.selected.selected_problem import rest_text
from attnc.compiler.planning.selected_keys import BlockKeys, find_places
from attnc.runtime.executors.cpu.autograd import differentiable
from attnc.runtime.executors.cpu.selected_blocks import SelectedBlocks
from attnc.runtime.executors.triton import launch as launching
from attnc.runtime.executors.triton import selected_on_gpu as on_gpu
from attnc.runtime.executors.triton.selected_lists import listed, tables_of
from attnc.runtime.executors.triton.selected_on_gpu import SelectedOnGpu
from attnc.runtime.toolchain import selected_gate
from compiled_kernels import Compiler

pytest.importorskip("triton")

Q, K = fold.place("q"), fold.place("k")
EVERYTHING = fold.truth(True)


@dataclass(frozen=True)
class Case:
    """A call: sizes, the keys of a block, the rows of a unit, and the condition beside the selection."""

    n_q: int = 70
    n_k: int = 70
    heads: int = 2
    kv_heads: int = 2
    by: str = "one"
    size: int = 16
    rows: int = 1
    rest: str = "causal"
    strided: bool = False
    dk: int = 16
    dv: int = 16
    batch: int = 1
    most: int | None = 3
    scale: float = 0.3

    @property
    def items(self) -> int:
        return -(-self.n_k // self.size)

    @property
    def selecting_axes(self) -> dict[str, bool]:
        """Return whether batch entries and heads select separately."""
        return {"by_batch": self.by != "alike", "by_heads": self.by != "one"}

    def places(self) -> BlockKeys:
        """Return the blocks of the case: consecutive keys, or keys at a stride."""
        item_of = fold.mod(K, fold.const(self.items)) if self.strided else fold.floordiv(K, fold.const(self.size))
        row_of = None if self.rows == 1 else fold.floordiv(Q, fold.const(self.rows))
        count = -(-self.n_q // self.rows)
        blocks = find_places(row_of, item_of, self.condition(), self.n_q, self.n_k, count, self.items)
        assert blocks is not None
        return blocks

    def condition(self) -> Index:
        """Return the condition that holds beside the selection."""
        query = fold.add(Q, fold.const(self.n_k - self.n_q))
        causal = fold.less_equal(K, query)
        window = fold.less(fold.sub(query, K), fold.const(20))
        conditions = {
            "true": EVERYTHING,
            "causal": causal,
            "window": fold.conjunction(causal, window),
            "blocks": fold.equal(fold.floordiv(query, fold.const(32)), fold.floordiv(K, fold.const(32))),
            "nothing": fold.truth(False),
        }
        return conditions[self.rest]

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Draw q, k and v."""
        draw = torch.Generator().manual_seed(seed)
        shapes = (
            (self.batch, self.heads, self.n_q, self.dk),
            (self.batch, self.kv_heads, self.n_k, self.dk),
            (self.batch, self.kv_heads, self.n_k, self.dv),
        )
        q, k, v = (torch.randn(shape, generator=draw) for shape in shapes)
        return q, k, v

    def selected(self, seed: int = 0) -> Tensor:
        """Return a selection of up to `most` blocks per row; a few rows select none."""
        draw = torch.Generator().manual_seed(seed + 1)
        rows = -(-self.n_q // self.rows)
        heads = {"one": 1, "alike": self.heads, "kv_head": self.kv_heads, "head": self.heads}[self.by]
        scores = torch.rand(self.batch, heads, rows, self.items, generator=draw)
        if self.most is not None:
            scores.masked_fill_(scores.argsort(-1).argsort(-1) >= self.most, 0)
        selection = (scores > 0.2) & (torch.rand(self.batch, heads, rows, 1, generator=draw) > 0.1)
        return selection[:, 0] if self.by == "one" else selection[0] if self.by == "alike" else selection

    def work(self, places: BlockKeys | None = None) -> SelectedOnGpu:
        """Return the work that the kernels do."""
        return SelectedOnGpu(places or self.places(), self.scale, most=self.most, name="chosen", **self.selecting_axes)


def dense_attention(case: Case, q: Tensor, k: Tensor, v: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Return out and LSE computed with a mask of all pairs."""
    selected_rows = selected[:, None] if case.by == "one" else selected[None] if case.by == "alike" else selected
    selected_rows = selected_rows.repeat_interleave(case.heads // selected_rows.shape[1], 1).repeat_interleave(
        case.rows, 2
    )[:, :, : case.n_q]
    keys = torch.arange(case.n_k)
    mask = selected_rows[:, :, :, keys % case.items if case.strided else keys // case.size]
    active = np.ones((case.n_q, case.n_k), dtype=np.bool_)
    condition = exact_evaluation.mask_at(
        case.condition(), np.arange(case.n_q), np.arange(case.n_k), active, {}, wide=True
    )
    mask = mask & torch.from_numpy(np.array(condition))
    group = case.heads // case.kv_heads
    scores = (q @ k.repeat_interleave(group, 1).transpose(2, 3) * case.scale).masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])
    return weights @ v.repeat_interleave(group, 1), lse


Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def run(function: Attend, tensors: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return out, LSE and the gradients of q, k and v through both."""
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors)
    out, lse = function(q, k, v)
    draw = torch.Generator().manual_seed(9)
    total = (out * torch.randn(out.shape, generator=draw)).sum()
    weights = torch.randn(lse.shape, generator=draw).to(lse.dtype)
    total = total + torch.where(lse == -math.inf, 0, lse * weights).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, (q, k, v))]


def check(ours: list[Tensor], expected: list[Tensor], tolerance: float = 2e-5) -> None:
    """Check that all tensors agree."""
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), atol=tolerance, rtol=tolerance)


def by_kernels(case: Case, selected: Tensor, places: BlockKeys | None = None) -> Attend:
    """Return the attention computed by kernels."""
    return lambda q, k, v: differentiable(q, k, v, case.work(places), [selected])


def masked(case: Case, selected: Tensor) -> Attend:
    """Return the attention computed with a mask of all pairs."""
    return lambda q, k, v: dense_attention(case, q, k, v, selected)


def compare(case: Case, seed: int = 0) -> None:
    """Compare the kernels with the CPU executor and with a dense mask."""
    tensors, selected, places = case.tensors(seed), case.selected(seed), case.places()
    ours = run(by_kernels(case, selected, places), tensors)
    check(ours, run(masked(case, selected), tensors, torch.float64))
    if case.scale > 0:
        cpu = SelectedBlocks(places, case.scale, **case.selecting_axes)
        check(ours, run(lambda q, k, v: differentiable(q, k, v, cpu, [selected]), tensors))


CASES = {
    "blocks before the query": Case(),
    "a ragged last place": Case(n_q=37, n_k=37),
    "all places": Case(rest="true", most=None),
    "of batches": Case(batch=2, n_q=20, n_k=20),
    "groups share a choice": Case(heads=4, kv_heads=2),
    "by key head": Case(heads=4, kv_heads=2, by="kv_head"),
    "by head, with keys of their own": Case(by="head"),
    "by head, with shared keys": Case(heads=4, kv_heads=2, by="head", batch=2, n_q=40, n_k=40),
    "by head, one head of keys": Case(heads=3, kv_heads=1, by="head", rest="true"),
    "batches choose alike": Case(heads=4, kv_heads=2, by="alike", batch=2, n_q=20, n_k=20),
    "rows in units": Case(rows=8),
    "rows in units, by head": Case(rows=7, heads=4, by="head", rest="blocks"),
    "keys of a place apart": Case(strided=True),
    "keys apart, everything": Case(strided=True, rest="true", n_k=67, by="kv_head"),
    "keys apart, by head": Case(strided=True, heads=4, kv_heads=2, by="head"),
    "fewer queries": Case(n_q=21, n_k=90),
    "more queries": Case(n_q=90, n_k=21),
    "a window": Case(rest="window", n_q=50),
    "blocks": Case(rest="blocks"),
    "nothing": Case(rest="nothing"),
    "heads of two widths": Case(dk=24, dv=40),
    "odd widths": Case(dk=5, dv=19, by="head", heads=4),
    "wide heads": Case(dk=80, dv=8, n_q=30, n_k=30),
    "large places": Case(size=64, n_q=150, n_k=150, most=2),
    "places of a key": Case(size=1, n_q=20, n_k=20, most=5),
    "a negative scale": Case(scale=-0.5),
    "no scale": Case(scale=0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_cpu_and_to_a_mask(name: str) -> None:
    compare(CASES[name])


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 33, 64, 65, 200])
def test_lengths(tokens: int) -> None:
    compare(Case(n_q=tokens, n_k=tokens), tokens)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[KernelSource]:
    """Record the kernels that a call launches, and do not run them."""
    sources: list[KernelSource] = []
    monkeypatch.setattr(on_gpu, "launch", lambda source, *_: sources.append(source))
    return sources


def forward_and_backward(case: Case, seed: int = 0) -> None:
    """Run forward and backward and ignore their results."""
    run(by_kernels(case, case.selected(seed)), case.tensors(seed))


@pytest.mark.parametrize("case", [Case(), Case(rest="window", heads=4, by="head"), Case(strided=True, rows=4)])
def test_new_lengths_and_selections_add_no_binary(case: Case, started: list[KernelSource]) -> None:
    for tokens in range(17, 200):
        forward_and_backward(replace(case, n_q=tokens, n_k=tokens), tokens)
        forward_and_backward(replace(case, n_q=tokens, n_k=tokens + 33, most=None), tokens)
    assert sorted(source.stage for source in {x.digest: x for x in started}.values()) == [
        *("delta", "dkdv", "dq", "forward", "merge", "sum"),
    ]


def test_many_selections_in_succession() -> None:
    case, digests = Case(n_q=40, n_k=50, heads=4, kv_heads=2, by="kv_head"), set()
    with launching.started_by(lambda source, *_: digests.add(source.digest)):
        forward_and_backward(case)
    places = case.places()
    for seed in range(12):
        tensors, selected = case.tensors(seed), case.selected(seed)
        check(run(by_kernels(case, selected, places), tensors), run(masked(case, selected), tensors, torch.float64))
    with launching.started_by(lambda source, *_: digests.add(source.digest)):
        forward_and_backward(case, 50)
    assert len(digests) == 6


REFUSED = ("nonzero", "_local_scalar_dense", "bincount", "masked_select", "unique", "equal", "is_nonzero", "item")


class Unsynchronised(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse operators for which the host waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not any(name.startswith(word) and not name.startswith("unique_dim_") for word in REFUSED), name
        if name.startswith(("index.", "index_put")):
            assert all(x is None or x.dtype != torch.bool for x in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["blocks before the query", "rows in units, by head", "keys apart, by head"])
def test_no_host_waits(name: str, started: list[KernelSource]) -> None:
    case = CASES[name]
    selected, tensors, places = case.selected(), case.tensors(), case.places()
    tables_of(places, case.n_q, selected.device)
    work = case.work(places)
    with Unsynchronised():  # type: ignore[no-untyped-call]
        out, lse = work.forward(*tensors, [selected])
        work.backward(torch.ones_like(out), torch.ones_like(lse), [*tensors, out, lse, selected])
    assert [source.stage for source in started] == ["forward", "merge", "delta", "dq", "sum", "dkdv"]


@pytest.mark.parametrize("at_once", [1, 4000, 20000])
@pytest.mark.parametrize("by", ["one", "kv_head", "head"])
def test_gathering_in_portions(at_once: int, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(heads=6, kv_heads=2, by=by, batch=2, n_q=30, n_k=30)
    tensors, selected = case.tensors(), case.selected()
    expected = run(by_kernels(case, selected), tensors)
    monkeypatch.setattr(on_gpu, "AT_ONCE", at_once)
    for x, y in zip(expected, run(by_kernels(case, selected), tensors), strict=True):
        assert torch.equal(x, y)


def test_selections_of_other_rows_change_no_bit() -> None:
    case = Case(n_q=64, n_k=64, rest="true", most=None)
    tensors, selected = case.tensors(), case.selected()
    other_selection = torch.rand(selected.shape, generator=torch.Generator().manual_seed(5)) > 0.5
    other_selection[:, 20] = selected[:, 20]
    first, second = (by_kernels(case, x)(*tensors) for x in (selected, other_selection))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x[:, :, 20], y[:, :, 20])


def test_rows_without_keys() -> None:
    case = Case(n_q=20, n_k=20)
    q, k, v = (x.requires_grad_() for x in case.tensors())
    selected = torch.zeros(1, 20, case.items, dtype=torch.bool)
    selected[:, 3] = True
    out, lse = by_kernels(case, selected)(q, k, v)
    assert (lse[:, :, :3] == -math.inf).all() and (out[:, :, 4:] == 0).all() and (lse[:, :, 3] > -math.inf).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(bool(x.isfinite().all()) for x in grads)
    assert (grads[0][:, :, :3] == 0).all() and (grads[1][:, :, 4:] == 0).all()


@pytest.mark.parametrize("shape", [(0, 20, 20), (1, 0, 20), (1, 20, 0)])
def test_empty_sizes(shape: tuple[int, int, int]) -> None:
    batch, n_q, n_k = shape
    case = Case(batch=batch, n_q=n_q, n_k=n_k)
    q, k, v = case.tensors()
    places = find_places(None, fold.floordiv(K, fold.const(16)), EVERYTHING, n_q, n_k, n_q, case.items)
    result = run(by_kernels(case, torch.ones(batch, n_q, case.items, dtype=torch.bool), places), (q, k, v))
    assert [x.shape for x in result] == [q.shape, q.shape[:3], q.shape, k.shape, v.shape]
    assert all(not x[x > -math.inf].any() for x in result)


def test_blocks_beyond_the_limit_are_dropped() -> None:
    case = Case(rest="true")
    selected = torch.ones(1, case.n_q, case.items, dtype=torch.bool)
    first = selected.clone()
    first[:, :, 3:] = False
    tensors = case.tensors()
    for x, y in zip(run(by_kernels(case, selected), tensors), run(by_kernels(case, first), tensors), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("by", ["one", "head"])
def test_tokens_before_heads(by: str) -> None:
    case = Case(heads=4, kv_heads=2, by=by, n_q=24, n_k=24, dk=10, dv=6)
    tensors, selected = case.tensors(), case.selected()
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    out, _ = by_kernels(case, selected)(apart[0], apart[1], apart[2])
    assert out.stride(1) < out.stride(2)
    q, k, v = (x.requires_grad_() for x in apart)
    check(run(by_kernels(case, selected), (q, k, v)), run(masked(case, selected), tensors, torch.float64))


def test_16_bit() -> None:
    case = Case(heads=4, kv_heads=2, by="kv_head", n_q=40, n_k=40)
    selected = case.selected()
    tensors = [x.half() for x in case.tensors()]
    out, lse = by_kernels(case, selected)(tensors[0], tensors[1], tensors[2])
    q, k, v = (x.double() for x in tensors)
    exact_out, exact_lse = dense_attention(case, q, k, v, selected)
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(out.double(), exact_out, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-3, rtol=2e-3)


def test_unsupported_calls() -> None:
    case = Case(n_q=4, n_k=4)
    selected = case.selected()
    q, k, v = case.tensors()
    with pytest.raises(NotInKernelsError, match="float64"):
        case.work().forward(q.double(), k.double(), v.double(), [selected])
    wide = torch.zeros(1, 2, 4, 257)
    with pytest.raises(NotInKernelsError, match="heads of width 257"):
        case.work().forward(wide, wide, wide, [selected])
    with pytest.raises(NotInKernelsError, match="isqrt"):
        rest_text(fold.less(fold.function("isqrt", K), Q))


def test_lists_hold_every_pair_once() -> None:
    case = Case(heads=4, by="head", batch=2)
    selected, places = case.selected(), case.places()
    tables = tables_of(places, case.n_q, selected.device)
    lists = listed(selected.flatten(0, 1)[:, None], tables, case.items, 8)
    pairs_listed = set()
    for lane, side, first, last in lists.tiles_of.tolist():
        for pair in range(first, min(last, first + 8)):
            pairs_listed.add((lane, int(lists.rows_of[pair]), side // 2))
    assert places.states is not None
    visible = torch.from_numpy(places.states >= 0).repeat_interleave(64, 0)[: case.n_q]
    wanted = (selected.flatten(0, 1) & visible).nonzero().tolist()
    assert pairs_listed == {tuple(pair) for pair in wanted}


COMPILED = {
    "sm_90": ("moba of groups", "clusters"),
    "sm_80": ("clusters",),
    "sm_100": ("moba of groups",),
    "gfx942": ("clusters",),
}
"""The selections compiled for each target; `make kernels` compiles all for all."""


@pytest.mark.slow
@pytest.mark.xdist_group("compiling")
@pytest.mark.parametrize("target", COMPILED)
def test_machine_code(target: str, compiler: Compiler) -> None:
    likes = {name: selected_gate.SELECTION[name] for name in COMPILED[target]}
    cases = list(selected_gate.cases([target], likes=likes))
    failures = {}
    for case, outcome in zip(cases, compiler([(case.source, case.target) for case in cases]), strict=True):
        reasons = selected_gate.judge(case, outcome)
        if reasons:
            failures[case.pattern, case.stage, case.head_dim] = reasons
    assert failures == {}
