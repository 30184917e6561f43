"""The rivals' calls, with rivals played by slow tensors: layouts, words and masks are as their authors take them."""

from __future__ import annotations

import sys
from itertools import product
from types import ModuleType
from typing import Any

import gpu_cases
import gpu_masks
import gpu_recurrence
import pytest
import torch
from baselines import (
    fla,
    flash_attention,
    flashinfer,
    flex,
    lightning,
    mamba,
    natten,
    nsa_triton,
    published,
    sdpa,
    versions,
)
from baselines.rival import Absent, Mask, causal, full
from benchmark_part import Setting
from gpu_parts import operands
from torch import Tensor

TOY = Setting("cpu", toy=True)
TIGHT = 2e-6


def module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """A module that can be imported, its parents too."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[i - 1]))
    for key, function in functions.items():
        setattr(sys.modules[name], key, function)


def attended(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Return attention over (batch, heads, tokens, width), with grouped heads."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    out: Tensor = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return out


def swapped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and heads in each other's place."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def worst(run: Any, mask: Mask, leaves: tuple[Tensor, Tensor, Tensor]) -> float:
    return max(gpu_masks.sampled_errors(run, mask, leaves, gradients=True).values())


def test_none_is_here_but_torch() -> None:
    found = versions.versions()
    assert found["SDPA"] == found["FlexAttention"] == torch.__version__
    assert {"NATTEN", "FlashInfer", "NSA-Triton", "FlashAttention", "flash-linear-attention"} <= found.keys()


@pytest.mark.parametrize("kernel", sdpa.HERE["cpu"])
@pytest.mark.parametrize("make", [full, causal])
def test_sdpa(kernel: str, make: Any) -> None:
    run = sdpa.attend(kernel, "cpu", causal=make is causal)
    assert not isinstance(run, Absent)
    assert worst(run, make(40), operands(TOY, 40, torch.float32, heads=(4, 2), d=16)) < TIGHT


def test_sdpa_without_a_kernel() -> None:
    assert isinstance(sdpa.attend("cudnn", "cpu", causal=True), Absent)


def test_flex_uncompiled_gives_the_mask() -> None:
    mask = gpu_cases.neighborhood((8, 8), (4, 4), (2, 2))
    leaves = operands(TOY, 64, torch.float32, heads=(2, 2), d=16)
    run = flex.attend(flex.block_mask(mask, "cpu", compiled=False, block=16), "cpu", tuned=True, compiled=False)
    assert max(gpu_masks.sampled_errors(run, mask, leaves, gradients=False).values()) < TIGHT
    assert flex.trained("cpu") is not None and flex.trained("cuda") is None


@pytest.mark.parametrize("stride", [1, 2])
def test_natten_is_given_grids_with_heads_last(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = gpu_cases.neighborhood((4, 4, 4), (2, 2, 2), (stride,) * 3)

    def na3d(
        q: Tensor, k: Tensor, v: Tensor, *, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any
    ) -> Tensor:
        assert q.shape == (1, 4, 4, 4, 2, 16)
        assert (dilation, is_causal) == ((1, 1, 1), (False, False, False))
        near = [[_starts(i, 4, w, s) for i in range(4)] for w, s in zip(kernel_size, stride, strict=True)]
        places = list(product(range(4), repeat=3))
        seen = torch.tensor(
            [
                [
                    all(0 <= b - near[a][x] < kernel_size[a] for a, (x, b) in enumerate(zip(p, r, strict=True)))
                    for r in places
                ]
                for p in places
            ]
        )
        out = attended(*swapped(q.flatten(1, 3), k.flatten(1, 3), v.flatten(1, 3)), seen)
        return out.transpose(1, 2).reshape(1, 4, 4, 4, 2, 16)

    module(monkeypatch, "natten", na3d=na3d)
    run = natten.attend(mask, "cuda")
    assert not isinstance(run, Absent)
    assert worst(run, mask, operands(TOY, 64, torch.float32, heads=(2, 2), d=16)) < TIGHT
    assert isinstance(natten.attend(causal(8), "cuda"), Absent)


def _starts(x: int, length: int, window: int, stride: int) -> int:
    """Where NATTEN's window begins: shifted until it lies inside."""
    first = min(x // stride * stride + stride // 2, length - 1) - window // 2
    return max(0, min(first, length - window))


def test_flash_attention_is_given_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
        n = q.shape[1]
        gap = torch.arange(n)[:, None] - torch.arange(n)
        left, right = window_size
        seen = ((gap <= left) | (left < 0)) & ((-gap <= right) | (right < 0)) & ((gap >= 0) | (not causal))
        return attended(*swapped(q, k, v), seen).transpose(1, 2)

    module(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    window = gpu_cases.WINDOWS[4]
    for mask in (full(64), causal(64), window.mask(TOY, {})):
        run = flash_attention.attend(mask, "cuda")
        assert not isinstance(run, Absent)
        assert worst(run, mask, operands(TOY, 64, torch.float32, heads=(4, 2), d=16)) < TIGHT
    assert isinstance(flash_attention.attend(gpu_cases.WINDOWS[3].mask(TOY, {}), "cuda"), Absent)


def test_flash_attention_decodes_what_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_with_kvcache(q: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, causal: bool) -> Tensor:
        seen = (torch.arange(k.shape[1]) < cache_seqlens[:, None])[:, None, None]
        return attended(*swapped(q, k, v), seen).transpose(1, 2)

    module(monkeypatch, "flash_attn", flash_attn_with_kvcache=flash_attn_with_kvcache)
    q, k, v, lengths = _cache()
    run = flash_attention.decode(lengths)
    assert not isinstance(run, Absent)
    torch.testing.assert_close(run(q, k, v), _decoded(q, k, v, lengths))


class Wrapper:
    """FlashInfer's, by its documentation."""

    def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool) -> None:
        assert workspace.dtype == torch.uint8 and layout == "HND"
        assert not use_tensor_cores

    def plan(self, first: Tensor, indices: Tensor, last: Tensor, *sizes: int, **words: Any) -> None:
        assert sizes == (4, 2, 16, flashinfer.PAGE)
        assert words["pos_encoding_mode"] == "NONE"
        self.first, self.indices, self.last = first.tolist(), indices.long(), last.tolist()

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        found = []
        for i, last in enumerate(self.last):
            own = [x[self.indices[self.first[i] : self.first[i + 1]]].transpose(0, 1).flatten(1, 2) for x in cache]
            used = own[0].shape[1] - flashinfer.PAGE + last
            k, v = (x[None, :, :used] for x in own)
            found.append(attended(q[i][None, :, None], k, v, torch.ones(1, used, dtype=torch.bool))[0, :, 0])
        return torch.stack(found)


def test_flashinfer_reads_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    q, k, v, lengths = _cache()
    run = flashinfer.decode(q, k, lengths)
    assert not isinstance(run, Absent)
    torch.testing.assert_close(run(q, k, v), _decoded(q, k, v, lengths))


def _cache() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    k, v = (torch.randn(3, 2, 4 * flashinfer.PAGE, 16) for _ in range(2))
    return torch.randn(3, 4, 1, 16), k, v, torch.tensor([64, 17, 32], dtype=torch.int32)


def _decoded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return attended(q, k, v, (torch.arange(k.shape[2]) < lengths[:, None])[:, None, None])


def test_blocks_are_given_as_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    n, block, topk = 40, 8, 3
    taken = torch.rand(2, n, n // block) < 0.3
    own = torch.arange(n)[:, None] // block == torch.arange(n // block)
    taken = (taken & (torch.arange(n)[:, None] // block > torch.arange(n // block))) | own
    taken &= taken.cumsum(-1) <= topk
    taken |= own & (taken.sum(-1, keepdim=True) < topk)
    places = nsa_triton.places(taken, topk)
    assert places.shape == (2, n, topk) and bool((places[:, :block, 1:] == -1).all())
    visible = taken.repeat_interleave(block, -1) & torch.ones(n, n, dtype=torch.bool).tril()
    visible = visible.repeat_interleave(2, 0)

    def seen(places: Tensor) -> Tensor:
        at = torch.arange(n) // block
        some = (places[..., None] == at).any(-2) & torch.ones(n, n, dtype=torch.bool).tril()
        return some.repeat_interleave(2, 0)

    def topk_sparse_attention(q: Tensor, k: Tensor, v: Tensor, topk_idx: Tensor, size: int, ends: Tensor) -> Tensor:
        assert size == block and ends.tolist() == [0, n] and topk_idx.dtype == torch.int32
        return attended(*swapped(q[None], k[None], v[None]), seen(topk_idx))[0].transpose(0, 1)

    def parallel_nsa(
        q: Tensor, k: Tensor, v: Tensor, *, block_indices: Tensor, block_counts: int, block_size: int
    ) -> Tensor:
        assert (block_counts, block_size) == (topk, block)
        own = seen(block_indices[0].transpose(0, 1))
        return attended(*swapped(q, k, v), own).transpose(1, 2)

    module(monkeypatch, nsa_triton.MODULE, topk_sparse_attention=topk_sparse_attention)
    module(monkeypatch, "fla.ops.nsa", parallel_nsa=parallel_nsa)
    leaves = operands(TOY, n, torch.float32, heads=(4, 2), d=16)
    true = attended(*leaves, visible)
    for run in (nsa_triton.attend(places, block, "cuda"), fla.blocks(places.transpose(0, 1)[None], block)):
        assert not isinstance(run, Absent)
        torch.testing.assert_close(run(*leaves), true)


def looped(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """S ← exp(decay) S + k ⊗ v, read by q; rows (batch, tokens, heads, width), decay (batch, tokens, heads)."""
    state = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, None, None].exp() + k[:, t, ..., None] * v[:, t, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(out, 1)


def chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, g: Tensor | None = None, g_gamma: Tensor | None = None
) -> tuple[Tensor, None]:
    decay = g if g is not None else g_gamma
    assert decay is not None
    return looped(q * scale, k, v, decay.expand(q.shape[:3])), None


@pytest.mark.parametrize("system", gpu_recurrence.OWN, ids=lambda one: one.name)
def test_recurrences_beside_their_authors(system: gpu_recurrence.System, monkeypatch: pytest.MonkeyPatch) -> None:
    def lightning_attn_func(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        rows = swapped(q, k, v)
        return looped(*rows, -slopes.expand(rows[0].shape[:3])).transpose(1, 2)

    def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk_size: int) -> Tensor:
        return looped(c, b, x * dt[..., None], dt * a)

    module(monkeypatch, "fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    module(monkeypatch, "lightning_attn.ops", lightning_attn_func=lightning_attn_func)
    module(monkeypatch, mamba.MODULE, mamba_chunk_scan_combined=scan)
    given = system.draw(TOY, (2, 12, 2, 16), torch.float32)
    true = system.called("reference")(given)
    rivals = system.rivals(given)
    if system.name == "lightning":
        own = lightning.attend(system.decay(2, "cpu"), "cuda")
        assert not isinstance(own, Absent)
        rivals["lightning"] = lambda given: gpu_recurrence.heads_first(own, given)
    assert len(rivals) == 2
    for run in rivals.values():
        assert not isinstance(run, Absent)
        torch.testing.assert_close(run(given), true)


def test_published_rows_say_where_they_are_from() -> None:
    assert all(one.value > 0 and one.source and one.machine and one.configuration for one in published.PUBLISHED)
    (one,) = published.figures("top-16", "forward", 32768)
    assert (one.value, one.row()["published"]) == (12.4, "NSA-Triton")
    names = {case.name for case in (*gpu_cases.BLOCK_SPARSE, *gpu_cases.WINDOWS)}
    assert {x.case for x in published.PUBLISHED if x.source == published.NATTEN} <= names
