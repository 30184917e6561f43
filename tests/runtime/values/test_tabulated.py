"""Reductions inside loops: computed once per value of their variable, and shared by the selections of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import EvaluationError, compile_attention
from attnc.runtime.values import block_values, table_products, tabulated
from attnc.runtime.values.block_values import BlockValues

HEADS, TOKENS, DIM, LAST = 2, 40, 8, 5

HEAT = """
    let raw(j) = sum(exp(0.1 * dot(q[i], k[j])) for i in keys - 5 .. keys)
    let heat(j) = sum(raw(x) for x in j - 3 .. j + 4 if 0 <= x < keys)
"""

CHOSEN = f"""use ranks (top)

pattern heated
    require queries == keys{HEAT}
    select warm
        per    head
        score  heat(k)
        keep   top(9)
    select cold
        per    head
        score  - heat(k) * sum(heat(x) for x in 0 .. keys)
        keep   top(4)
    visible (k in warm or k in cold or k == q) and k <= q
"""

SCORED = f"""pattern heated
    require queries == keys{HEAT}
    visible k <= q
    score   scale * dot(q, k) + 0.01 * heat(k)
"""


def draw() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, TOKENS, DIM, dtype=torch.float64) for _ in range(3)]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the inner products that are computed."""
    counts: list[int] = []
    product = table_products.product

    def counting(*sides: Tensor) -> Tensor:
        result = product(*sides)
        counts.append(result.numel())
        return result

    with monkeypatch.context() as patch:
        patch.setattr(block_values, "product", counting)
        yield counts


def heat(q: Tensor, k: Tensor) -> Tensor:
    """Return the heat of each key, (batch, heads, keys), by its definition."""
    raw = torch.exp(0.1 * q[:, :, -LAST:] @ k.transpose(-1, -2)).sum(2)
    sums = [raw[..., max(j - 3, 0) : j + 4].sum(-1) for j in range(k.shape[2])]
    return torch.stack(sums, -1)


def test_a_reduction_is_computed_once_for_all_selections(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw()
    attend = compile_attention(CHOSEN)
    with counted(monkeypatch) as counts:
        chosen = attend.chosen(q, k, v)
    assert sum(counts) == HEADS * TOKENS * LAST
    scores = heat(q, k)
    for name, best in (("warm", scores.topk(9).indices), ("cold", (-scores).topk(4).indices)):
        wanted = torch.zeros(1, HEADS, TOKENS, dtype=torch.bool).scatter_(-1, best, True)
        assert torch.equal(chosen[name].reshape(1, HEADS, -1, TOKENS)[:, :, 0], wanted), name


def test_other_tensors_get_tables_of_their_own() -> None:
    attend = compile_attention(CHOSEN)
    q, k, v = draw()
    first = attend.chosen(q, k, v)["warm"]
    assert not torch.equal(attend.chosen(q, -k, v)["warm"], first)
    assert torch.equal(attend.chosen(q, k, v)["warm"], first)


def wanted_scored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = DIM**-0.5 * q @ k.transpose(-1, -2) + 0.01 * heat(q, k)[:, :, None]
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    out: Tensor = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return out


def test_gradients_pass_through_tables() -> None:
    leaves = [x.requires_grad_() for x in draw()]
    out = compile_attention(SCORED)(*leaves)
    wanted = wanted_scored(*leaves)
    change = torch.randn_like(out)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    for found, true in zip(*(torch.autograd.grad(x, leaves, change) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(found, true, rtol=0, atol=1e-11)


def test_results_with_gradients_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that carries the graph of one block would be read by another block after its graph is freed."""
    shared: list[Any] = []
    tables_of = tabulated._shared_tables

    def recorded(values: BlockValues) -> Any:
        shared.append(tables_of(values))
        return shared[-1]

    monkeypatch.setattr(tabulated, "_shared_tables", recorded)
    q, k, v = draw()
    attend = compile_attention(SCORED)
    with torch.no_grad():
        attend(q, k, v)
    assert shared and None not in shared
    shared.clear()
    torch.autograd.grad(attend(q.requires_grad_(), k, v).sum(), q)
    assert None in shared


@pytest.mark.parametrize("first", [0, 7])
def test_a_fault_is_reported_as_without_a_table(first: int) -> None:
    text = f"""use ranks (top)

pattern faulty
    require queries == keys
    let raw(j) = sum(dot(q[i], k[j]) for i in 0 .. 3)
    select warm
        per    head
        score  sum(raw(x) for x in k - {first} .. k + 2)
        keep   top(3)
    visible k in warm and k <= q
"""
    q, k, v = draw()
    with pytest.raises(EvaluationError, match=f"`k` is read at position {-first or TOKENS}, which has no token"):
        compile_attention(text)(q, k, v)
