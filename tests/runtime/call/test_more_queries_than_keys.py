"""More queries than keys under `align end`: the first queries stand before key 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc import ArgumentError, compile_attention
from attnc.runtime.api.compiled import Backend
from attnc.runtime.executors.cpu import masked
from beyond_keys import RELATIONS, dense, mask, results, spec
from choices_beyond_keys import CHOICES, N_K, N_Q, chooser, drawn, gradients, meant

SIZES = [(20, 7), (37, 33), (5, 0)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_rows_before_key_0(relation: str, backend: Backend, sizes: tuple[int, int]) -> None:
    """Fails if a call with more queries than keys is refused."""
    n_q, n_k = sizes
    attend, visible = compile_attention(spec(relation), backend=backend), mask(relation, n_q, n_k)
    tensors = [torch.randn(2, 2, n, 16) for n in (n_q, n_k, n_k)]
    actual = results(lambda q, k, v: attend(q, k, v, return_lse=True), tensors)
    if n_k:
        for ours, theirs in zip(actual, results(lambda q, k, v: dense(q, k, v, visible), tensors), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    else:
        assert not any(x.any() for x in (actual[0], *actual[2:]))
        assert (actual[1] == -torch.inf).all()
    assert torch.equal(attend.mask(n_q, n_k), visible)


@pytest.mark.parametrize("relation", RELATIONS)
def test_plans_and_block_masks(relation: str) -> None:
    attend, visible = compile_attention(spec(relation)), mask(relation, 300, 140)
    assert attend.plan(300, 140).visible == visible.sum()
    block_mask = attend.block_mask(300, 140)
    rows, keys = torch.arange(300)[:, None], torch.arange(140)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(block_mask.mask_mod(zero, zero, rows, keys).expand(300, 140), visible)
    padded = torch.zeros(384, 256, dtype=torch.bool)
    padded[:300, :140] = visible
    live = padded.reshape(3, 128, 2, 128).any(3).any(1)
    assert torch.equal(block_mask.to_dense()[0, 0].bool() & live, live)


def test_documents_begin_at_key_0() -> None:
    document = torch.arange(12) // 5
    q, k, v = (torch.randn(1, 2, n, 8) for n in (20, 12, 12))
    out = compile_attention("document")(q, k, v, doc=document[None])
    assert not out[:, :, :8].any()
    torch.testing.assert_close(out[:, :, 8:], compile_attention("document")(q[:, :, 8:], k, v, doc=document[None]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("input seg: int[token]\n    visible seg[q] == seg[k]", "reads `seg` there"),
        ("visible k <= q\n    score dot(q, k) + dot(q, k[q])", "reads `k` there"),
        (
            "branch a\n        visible k <= q\n    branch b\n        visible true\n    combine a + b * dot(v[q], v[q])",
            "reads `v` there",
        ),
        ("tokens y: 3, x: 4\n    visible abs(q.x - k.x) <= 1", "has coordinates for its tokens alone"),
    ],
)
def test_relations_without_a_meaning_before_key_0(text: str, says: str) -> None:
    inputs = {"seg": torch.zeros(12, dtype=torch.int64)} if "seg" in text else {}
    attend: Any = compile_attention(f"pattern p\n    align end\n    {text}\n")
    q, k, v = (torch.randn(1, 1, n, 8) for n in (14, 12, 12))
    with pytest.raises(ArgumentError, match=f"the first 2 queries are before key 0, and `p` {says}"):
        attend(q, k, v, **inputs)


@pytest.mark.parametrize(("backend", "many"), [("cpu", False), ("cpu", True), ("reference", False)])
@pytest.mark.parametrize("name", CHOICES)
def test_selections_before_key_0(name: str, backend: Backend, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if selections by content or units of keys are refused for rows before key 0."""
    if many:
        monkeypatch.setattr(masked, "WORK", 0)
    attend = chooser(name, backend=backend)
    vectors, inputs = drawn(attend)
    out, *grads = gradients(attend, vectors, inputs)
    torch.testing.assert_close(out.double(), meant(attend, vectors, inputs), atol=1e-6, rtol=1e-5)
    wide, more = drawn(attend, torch.float64)
    exact = gradients(chooser(name, backend="reference"), wide, more)[1:]
    for ours, theirs in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)
    if name in ("blocks of the past", "one choice for each head", "units as keys", "moba", "flash_moba"):
        assert not out[:, :, : N_Q - N_K].any() and not grads[0][:, :, : N_Q - N_K].any()


def test_rows_before_key_0_without_a_selection_have_no_lse() -> None:
    attend = chooser("moba")
    (q, k, v), _ = drawn(attend)
    _, lse = attend(q, k, v, return_lse=True)
    assert (lse[:, :, : N_Q - N_K] == -torch.inf).all() and lse[:, :, N_Q - N_K :].isfinite().all()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            "per a = q // 4\n        over b = k // 4\n        score dot(mean(a.q), mean(b.k))",
            "selects `s` for units of",
        ),
        ("score dot(q, k) + dot(k[q], k)", "reads `k` there"),
        ("over b = k // 4\n        score sum(dot(k[j], mean(b.k)) for j in q .. q + 2)", "reads `k` there"),
    ],
)
def test_selections_without_a_meaning_before_key_0(lines: str, says: str) -> None:
    text = f"select s\n        {lines}\n        keep rank < 2\n    visible k in s"
    attend = compile_attention(f"pattern p\n    align end\n    {text}\n")
    q, k, v = (torch.randn(1, 1, n, 8) for n in (14, 12, 12))
    with pytest.raises(ArgumentError, match=f"are before key 0, and `p` {says}") as refused:
        attend(q, k, v)
    assert str(refused.value).endswith("drop these queries: q[:, :, 2:]")


def test_a_state_has_no_meaning_before_key_0() -> None:
    attend = compile_attention("hybrid_window_linear")
    q, k, v = (torch.randn(1, 1, n, 8) for n in (14, 12, 12))
    with pytest.raises(ArgumentError, match="q has 14 tokens and k has 12"):
        attend(q, k, v, g=-torch.rand(1, 12, 1), gate=torch.rand(1, 14, 1))
