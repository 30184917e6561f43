"""More queries than keys under `align end` by kernels: positions before key 0 are negative."""

from __future__ import annotations

import pytest
import torch

from attnc import compile_attention
from beyond_keys import RELATIONS, dense, mask, results, spec
from choices_beyond_keys import CHOICES, chooser, drawn, gradients, meant

pytest.importorskip("triton")


@pytest.mark.parametrize("relation", RELATIONS)
def test_rows_before_key_0(relation: str) -> None:
    """Fails where `//` of kernels, which does not round down, is taken of a negative position."""
    attend, seen = compile_attention(spec(relation), backend="triton"), mask(relation, 21, 7)
    given = [torch.randn(1, 2, n, 16) for n in (21, 7, 7)]
    found = results(lambda q, k, v: attend(q, k, v, return_lse=True), given)
    for ours, theirs in zip(found, results(lambda q, k, v: dense(q, k, v, seen), given), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("score", ["q // 4 * k", "-abs(q - k)", "(q - k) // 3"])
def test_scores_before_key_0(score: str) -> None:
    text = f"pattern p\n    align end\n    visible q - k < 9\n    score scale * dot(q, k) + {score}\n"
    given = [torch.randn(1, 2, n, 16) for n in (21, 7, 7)]
    runs = [compile_attention(text, backend=backend) for backend in ("triton", "reference")]
    ours, theirs = (results(lambda q, k, v, run=run: run(q, k, v, return_lse=True), given) for run in runs)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_documents_begin_at_key_0() -> None:
    kernels, reference = (compile_attention("document", backend=backend) for backend in ("triton", "reference"))
    given, document = [torch.randn(1, 2, n, 16) for n in (20, 12, 12)], torch.arange(12)[None] // 5
    ours, theirs = (
        results(lambda q, k, v, run=run: run(q, k, v, doc=document, return_lse=True), given)
        for run in (kernels, reference)
    )
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in CHOICES if name not in ("native_sparse", "flash_moba", "a family")])
def test_choices_before_key_0(name: str) -> None:
    attend = chooser(name, backend="triton")
    vectors, inputs = drawn(attend)
    out, *grads = gradients(attend, vectors, inputs)
    torch.testing.assert_close(out.double(), meant(attend, vectors, inputs), atol=1e-6, rtol=1e-5)
    exact = gradients(chooser(name, backend="reference"), *drawn(attend, torch.float64))[1:]
    for ours, theirs in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)
