"""More queries than keys under `align end`: the first queries stand before key 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc import ArgumentError, compile_attention
from attnc.runtime.compiled import Backend
from beyond_keys import RELATIONS, dense, mask, results, spec

SIZES = [(20, 7), (37, 33), (5, 0)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_rows_before_key_0(relation: str, backend: Backend, sizes: tuple[int, int]) -> None:
    """Fails where more queries than keys are refused."""
    n_q, n_k = sizes
    attend, seen = compile_attention(spec(relation), backend=backend), mask(relation, n_q, n_k)
    given = [torch.randn(2, 2, n, 16) for n in (n_q, n_k, n_k)]
    found = results(lambda q, k, v: attend(q, k, v, return_lse=True), given)
    if n_k:
        for ours, theirs in zip(found, results(lambda q, k, v: dense(q, k, v, seen), given), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    else:
        assert not any(x.any() for x in (found[0], *found[2:]))
        assert (found[1] == -torch.inf).all()
    assert torch.equal(attend.mask(n_q, n_k), seen)


@pytest.mark.parametrize("relation", RELATIONS)
def test_plans_and_block_masks(relation: str) -> None:
    attend, seen = compile_attention(spec(relation)), mask(relation, 300, 140)
    assert attend.plan(300, 140).visible == seen.sum()
    found = attend.block_mask(300, 140)
    rows, keys = torch.arange(300)[:, None], torch.arange(140)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(found.mask_mod(zero, zero, rows, keys).expand(300, 140), seen)
    padded = torch.zeros(384, 256, dtype=torch.bool)
    padded[:300, :140] = seen
    live = padded.reshape(3, 128, 2, 128).any(3).any(1)
    assert torch.equal(found.to_dense()[0, 0].bool() & live, live)


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
        ("tokens y: 3, x: 4\n    visible abs(q.x - k.x) <= 1", "has coordinates for its tokens alone"),
    ],
)
def test_what_has_no_meaning_before_key_0(text: str, says: str) -> None:
    inputs = {"seg": torch.zeros(12, dtype=torch.int64)} if "seg" in text else {}
    attend: Any = compile_attention(f"pattern p\n    align end\n    {text}\n")
    q, k, v = (torch.randn(1, 1, n, 8) for n in (14, 12, 12))
    with pytest.raises(ArgumentError, match=f"the first 2 queries stand before key 0, and `p` {says}"):
        attend(q, k, v, **inputs)


def test_a_choice_by_content_has_no_meaning_before_key_0() -> None:
    with pytest.raises(ArgumentError, match="`moba` chooses by content what its queries see"):
        compile_attention("moba")(*[torch.randn(1, 1, n, 8) for n in (14, 12, 12)])
