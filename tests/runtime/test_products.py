"""Inner products with vectors that lanes choose from a table, against each vector gathered; values, gradients, bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.runtime import block_values
from attnc.runtime.table_products import TableReads, looked_up

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


def of_lanes(array: Any, lanes: tuple[int, ...]) -> Any:
    return array.reshape((1,) * (len(lanes) - array.ndim) + array.shape)


def operands(name: str, alive: Any) -> tuple[Tensor, TableReads, Tensor]:
    made = torch.Generator().manual_seed(0)
    lanes, chosen, sizes = CASES[name]
    indices = [np.clip(of_lanes(x, lanes), 0, n - 1) for x, n in zip(chosen, sizes, strict=True)]
    table, vectors = (torch.randn(*size, WIDTH, generator=made, dtype=torch.float64) for size in (sizes, lanes))
    return table.requires_grad_(), TableReads(indices, of_lanes(alive, lanes)), vectors.requires_grad_()


def gathered(table: Tensor, places: TableReads, vectors: Tensor) -> Tensor:
    chosen = table[tuple(torch.from_numpy(np.ascontiguousarray(index)) for index in places.indices)]
    found = (chosen * vectors).sum(-1)
    return torch.where(torch.from_numpy(places.active), found, 1)


def asked(table: Tensor, places: TableReads, vectors: Tensor) -> Tensor:
    found = looked_up(table, places, vectors)
    assert found is not None
    return found


def gradients(found: Tensor, *leaves: Tensor) -> list[Tensor]:
    by = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    return list(torch.autograd.grad(found, leaves, by))


@pytest.mark.parametrize("alive", [np.ones((1, 1, 1), np.bool_), BAND], ids=["all", "some"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_looked_up_is_what_is_gathered(name: str, alive: Any) -> None:
    table, places, vectors = operands(name, alive)
    found, wanted = asked(table, places, vectors), gathered(table, places, vectors)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(found, table, vectors), gradients(wanted, table, vectors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_again(name: str) -> None:
    given = operands(name, BAND)
    first, again = (gradients(asked(*given), given[0], given[2]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["one table", "of each head", "met by keys"])
def test_vectors_that_nobody_asks_for_poison_nothing(name: str) -> None:
    """Vectors between two that are read poison nothing."""
    table, places, vectors = operands(name, BAND & ((KEY - ROW) % 2 == 0))
    read = torch.zeros(table.shape[:-1])
    whole = np.broadcast_shapes(places.pairs, places.active.shape)
    at = [torch.from_numpy(np.broadcast_to(x, whole)[np.broadcast_to(places.active, whole)]) for x in places.indices]
    read[tuple(at)] = 1
    poisoned = torch.where(read[..., None] > 0, table, torch.nan).detach().requires_grad_()
    found, wanted = asked(poisoned, places, vectors), gathered(table, places, vectors)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(gradients(found, poisoned, vectors), gradients(wanted, table, vectors), strict=True):
        torch.testing.assert_close(a, b)


def test_what_takes_longer_is_not_looked_up() -> None:
    """A vector for each lane, a vector that each row or key alone chooses, and a table far larger than the pairs."""
    every = torch.ones(HEADS, ROWS, KEYS, WIDTH)
    all_of = np.ones((1, 1, 1), np.bool_)
    assert looked_up(torch.ones(20, WIDTH), TableReads([KEY - ROW + 8], all_of), every) is None
    query, key = torch.ones(HEADS, ROWS, 1, WIDTH), torch.ones(HEADS, 1, KEYS, WIDTH)
    assert looked_up(torch.ones(20, WIDTH), TableReads([ROW], all_of), query) is None
    assert looked_up(torch.ones(2000, WIDTH), TableReads([KEY * 150], all_of), query) is None
    assert looked_up(torch.ones(2000, WIDTH), TableReads([(ROW * 17) * (KEY * 17)], all_of), key) is None
    assert looked_up(torch.ones(20, WIDTH), TableReads([KEY - ROW + 8], ~all_of), query) is None


def test_the_reference_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays apart from what it is the oracle of."""
    calls = []

    def counted(*given: Any) -> Tensor | None:
        calls.append(given)
        return looked_up(*given)

    monkeypatch.setattr(block_values, "looked_up", counted)
    score = "dot(q, k) + dot(q, t[k - q + 4])"
    attend = compile_attention(f"pattern p\n    input t: real[9, dk]\n    visible abs(q - k) <= 4\n    score {score}\n")
    q, t = torch.randn(1, 1, 12, 16), torch.randn(9, 16)
    wanted = attend.reference(q, q, q, t=t)
    assert not calls
    torch.testing.assert_close(attend(q, q, q, t=t), wanted)
    assert calls
