"""Relations that ask for equal ids, each id one run, in kernels: no row sees a key of another id."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc import compile_attention
from kernel_calls import check, operands

TEXT = """\
pattern p
    input x: int[batch, token]
    align end
    visible k <= q
    visible x[k] == x[q]
"""


@pytest.mark.parametrize("batch", [1, 3])
def test_runs_of_equal_ids_are_apart(batch: int) -> None:
    """`make hunt`, part triton, case 9: lists of tiles held every key up to the query."""
    attend: Any = compile_attention(TEXT, backend="triton")
    ids = torch.stack([(torch.arange(70) + 11 * b) // 13 for b in range(batch)])
    check(attend, operands(70, batch=batch), {"x": ids})
