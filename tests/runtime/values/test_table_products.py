"""Dot products with vectors from a table, computed for the whole table first, against gathering each vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.runtime.values import block_values
from attnc.runtime.values.table_products import TableReads, looked_up

HEADS, ROWS, KEYS, WIDTH = 3, 7, 11, 16

HEAD = np.arange(HEADS)[:, None, None]
ROW = np.arange(ROWS)[None, :, None]
KEY = np.arange(KEYS)[None, None]
BAND = abs(ROW - KEY) <= 4

OF_QUERIES, OF_KEYS, OF_HEADS = (HEADS, ROWS, 1), (HEADS, 1, KEYS), (HEADS, 1, 1)

CASES: dict[str, tuple[tuple[int, ...], list[Any], tuple[int, ...]]] = {
    "one table": (OF_QUERIES, [KEY - ROW + 8], (20,)),
    "of each head": (OF_QUERIES, [HEAD, KEY - ROW + 8], (HEADS, 20)),
    "the head last": (OF_QUERIES, [KEY - ROW + 8, HEAD // 2], (20, 2)),
    "chosen by each head": (OF_QUERIES, [(KEY - ROW + HEAD) % 5], (5,)),
    "of each head, chosen by it": (OF_QUERIES, [HEAD, (KEY * ROW + HEAD) % 5], (HEADS, 5)),
    "met by keys": (OF_KEYS, [KEY - ROW + 8], (20,)),
    "of each head, met by keys": (OF_KEYS, [HEAD, KEY - ROW + 8], (HEADS, 20)),
    "met by heads": (OF_HEADS, [(KEY - ROW) % 3], (3,)),
    "of two indices": (OF_QUERIES, [HEAD, KEY % 3, (KEY + ROW) % 2], (HEADS, 3, 2)),
    "of each row": (OF_QUERIES, [HEAD, ROW % 2, (KEY - ROW) % 2], (HEADS, 2, 2)),
    "one vector for all heads": ((1, ROWS, 1), [HEAD, (KEY - ROW) % 3], (HEADS, 3)),
    "in a loop": ((1, *OF_QUERIES), [(KEY - ROW + np.arange(2)[:, None, None, None]) % 6], (6,)),
    "a loop of vectors": ((2, *OF_QUERIES), [HEAD[None], (KEY - ROW)[None] % 6], (HEADS, 6)),
    "one row": (OF_QUERIES, [0 * KEY], (4,)),
}


def to_rank_of(array: Any, lanes: tuple[int, ...]) -> Any:
    return array.reshape((1,) * (len(lanes) - array.ndim) + array.shape)


def operands(name: str, active: Any) -> tuple[Tensor, TableReads, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lanes, index_arrays, sizes = CASES[name]
    indices = [np.clip(to_rank_of(x, lanes), 0, n - 1) for x, n in zip(index_arrays, sizes, strict=True)]
    table, vectors = (torch.randn(*size, WIDTH, generator=generator, dtype=torch.float64) for size in (sizes, lanes))
    return table.requires_grad_(), TableReads(indices, to_rank_of(active, lanes)), vectors.requires_grad_()


def gathered_products(table: Tensor, places: TableReads, vectors: Tensor) -> Tensor:
    rows_of_table = table[tuple(torch.from_numpy(np.ascontiguousarray(index)) for index in places.indices)]
    products = (rows_of_table * vectors).sum(-1)
    return torch.where(torch.from_numpy(places.active), products, 1)


def table_products(table: Tensor, places: TableReads, vectors: Tensor) -> Tensor:
    products = looked_up(table, places, vectors)
    assert products is not None
    return products


def gradients(products: Tensor, *leaves: Tensor) -> list[Tensor]:
    by = torch.randn(products.shape, generator=torch.Generator().manual_seed(1), dtype=products.dtype)
    return list(torch.autograd.grad(products, leaves, by))


@pytest.mark.parametrize("active", [np.ones((1, 1, 1), np.bool_), BAND], ids=["all", "some"])
@pytest.mark.parametrize("name", CASES)
def test_table_products_equal_gathered_products(name: str, active: Any) -> None:
    table, places, vectors = operands(name, active)
    products, wanted = table_products(table, places, vectors), gathered_products(table, places, vectors)
    torch.testing.assert_close(products, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(products, table, vectors), gradients(wanted, table, vectors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_again(name: str) -> None:
    call = operands(name, BAND)
    first, second = (gradients(table_products(*call), call[0], call[2]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["one table", "of each head", "met by keys"])
def test_unused_nan_vectors_do_not_spread(name: str) -> None:
    """NaN in vectors that lie between two used vectors reaches no result."""
    table, places, vectors = operands(name, BAND & ((KEY - ROW) % 2 == 0))
    read = torch.zeros(table.shape[:-1])
    shape = np.broadcast_shapes(places.pairs, places.active.shape)
    indices = [
        torch.from_numpy(np.broadcast_to(x, shape)[np.broadcast_to(places.active, shape)]) for x in places.indices
    ]
    read[tuple(indices)] = 1
    poisoned = torch.where(read[..., None] > 0, table, torch.nan).detach().requires_grad_()
    products, wanted = table_products(poisoned, places, vectors), gathered_products(table, places, vectors)
    torch.testing.assert_close(products, wanted)
    for a, b in zip(gradients(products, poisoned, vectors), gradients(wanted, table, vectors), strict=True):
        torch.testing.assert_close(a, b)


def test_slower_cases_are_not_looked_up() -> None:
    """Cases: a vector per lane, vectors that a row or key alone selects, and a table far larger than the pairs."""
    every = torch.ones(HEADS, ROWS, KEYS, WIDTH)
    all_of = np.ones((1, 1, 1), np.bool_)
    assert looked_up(torch.ones(20, WIDTH), TableReads([KEY - ROW + 8], all_of), every) is None
    query, key = torch.ones(HEADS, ROWS, 1, WIDTH), torch.ones(HEADS, 1, KEYS, WIDTH)
    assert looked_up(torch.ones(20, WIDTH), TableReads([ROW], all_of), query) is None
    assert looked_up(torch.ones(2000, WIDTH), TableReads([KEY * 150], all_of), query) is None
    assert looked_up(torch.ones(2000, WIDTH), TableReads([(ROW * 17) * (KEY * 17)], all_of), key) is None
    assert looked_up(torch.ones(20, WIDTH), TableReads([KEY - ROW + 8], ~all_of), query) is None


def test_the_reference_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference gathers each vector, so it stays independent of the code that it checks."""
    calls = []

    def counted(*arguments: Any) -> Tensor | None:
        calls.append(arguments)
        return looked_up(*arguments)

    monkeypatch.setattr(block_values, "looked_up", counted)
    score = "dot(q, k) + dot(q, t[k - q + 4])"
    attend = compile_attention(f"pattern p\n    input t: real[9, dk]\n    visible abs(q - k) <= 4\n    score {score}\n")
    q, t = torch.randn(1, 1, 12, 16), torch.randn(9, 16)
    wanted = attend.reference(q, q, q, t=t)
    assert not calls
    torch.testing.assert_close(attend(q, q, q, t=t), wanted)
    assert calls
