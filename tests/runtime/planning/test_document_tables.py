"""Rounded functions of positions in calls with documents: their tables are as long as the longest document needs."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from attnc import compile_attention

ROOT = """
pattern root
    visible k <= q and k >= q - floor(sqrt(abs(q) + 1))
"""
STARTS = [0, 3, 3, 17, 40, 47]


def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute each document separately, in fp64."""
    outputs = []
    for start, stop in pairwise(STARTS):
        if start == stop:
            continue
        rows = range(stop - start)
        visible = torch.tensor([[r - math.isqrt(r + 1) <= c <= r for c in rows] for r in rows])
        document_tensors = [x[:, :, start:stop].double() for x in (q, k, v)]
        score = (document_tensors[0] @ document_tensors[1].mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
        outputs.append(torch.softmax(score, -1) @ document_tensors[2])
    return torch.cat(outputs, 2)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_square_root_of_positions_in_documents(backend: Literal["auto", "reference"]) -> None:
    """The table was sized for the first document, of three tokens, and the call failed with A901."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, STARTS[-1], 8) for _ in range(3))
    attend = compile_attention(ROOT, backend=backend)
    out = attend(q, k, v, cu_seqlens=torch.tensor(STARTS))
    assert torch.allclose(out.double(), expected(q, k, v), atol=1e-5)


def test_documents_of_an_input() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, STARTS[-1], 8) for _ in range(3))
    doc = torch.bucketize(torch.arange(STARTS[-1]), torch.tensor(STARTS[1:]), right=True)[None]
    attend = compile_attention(ROOT.replace("root\n", "root\n    input doc: int[batch, token]\n    documents doc\n"))
    assert torch.allclose(attend(q, k, v, doc=doc).double(), expected(q, k, v), atol=1e-5)
