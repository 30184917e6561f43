"""Kernels for more queries than keys under `align end`, where positions before key 0 are negative."""

from __future__ import annotations

import pytest
import torch

from attnc import compile_attention
from beyond_keys import RELATIONS, dense, mask, results, spec
from choices_beyond_keys import CHOICES, chooser, drawn, gradients, meant

pytest.importorskip("triton")


@pytest.mark.parametrize("relation", RELATIONS)
def test_rows_before_key_0(relation: str) -> None:
    """Fails if a kernel applies its truncating `//` to a negative position."""
    attend, visible = compile_attention(spec(relation), backend="triton"), mask(relation, 21, 7)
    tensors = [torch.randn(1, 2, n, 16) for n in (21, 7, 7)]
    actual = results(lambda q, k, v: attend(q, k, v, return_lse=True), tensors)
    for ours, theirs in zip(actual, results(lambda q, k, v: dense(q, k, v, visible), tensors), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("score", ["q // 4 * k", "-abs(q - k)", "(q - k) // 3"])
def test_scores_before_key_0(score: str) -> None:
    text = f"pattern p\n    align end\n    visible q - k < 9\n    score scale * dot(q, k) + {score}\n"
    tensors = [torch.randn(1, 2, n, 16) for n in (21, 7, 7)]
    runs = [compile_attention(text, backend=backend) for backend in ("triton", "reference")]
    ours, theirs = (results(lambda q, k, v, run=run: run(q, k, v, return_lse=True), tensors) for run in runs)
    for actual, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def test_documents_begin_at_key_0() -> None:
    kernels, reference = (compile_attention("document", backend=backend) for backend in ("triton", "reference"))
    tensors, document = [torch.randn(1, 2, n, 16) for n in (20, 12, 12)], torch.arange(12)[None] // 5
    ours, theirs = (
        results(lambda q, k, v, run=run: run(q, k, v, doc=document, return_lse=True), tensors)
        for run in (kernels, reference)
    )
    for actual, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in CHOICES if name not in ("native_sparse", "flash_moba", "a family")])
def test_selections_before_key_0(name: str) -> None:
    attend = chooser(name, backend="triton")
    vectors, inputs = drawn(attend)
    out, *grads = gradients(attend, vectors, inputs)
    torch.testing.assert_close(out.double(), meant(attend, vectors, inputs), atol=1e-6, rtol=1e-5)
    exact = gradients(chooser(name, backend="reference"), *drawn(attend, torch.float64))[1:]
    for ours, theirs in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)
