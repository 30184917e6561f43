"""Indices that the caller passes, under `strict`: out-of-range and repeated indices are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import ArgumentError, compile_attention

pytestmark = pytest.mark.usefixtures("one_thread", "gathered")

HEADS, KV_HEADS, WIDTH = 4, 2, 3
Inputs = dict[str, Any]


def vectors(n: int) -> list[Tensor]:
    """Draw q, k and v of two batch entries."""
    return [torch.randn(2, heads, n, WIDTH, dtype=torch.float64) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def test_strict_refuses_ids_above_the_bound() -> None:
    strict = compile_attention("svg2", strict=True, query_clusters=4, key_clusters=5)
    qkv = vectors(20)
    ids: Inputs = {"qc": torch.randint(0, 4, (2, HEADS, 20)), "kc": torch.randint(0, 5, (2, KV_HEADS, 20))}
    run: Any = strict
    torch.testing.assert_close(run(*qkv, **ids), strict.reference(*qkv, **ids))
    for name, value in (("qc", 4), ("kc", -1)):
        wrong: Inputs = {**ids, name: ids[name].clone()}
        wrong[name][1, 1, 7] = value
        with pytest.raises(ArgumentError, match=rf"`{name}` of `svg2` holds {value}, and units are numbered 0 to"):
            run(*qkv, **wrong)


def test_strict_refuses_keys_out_of_range_and_repeated_keys() -> None:
    calls: dict[bool, Any] = {strict: compile_attention("recycled", strict=strict) for strict in (False, True)}
    q, k, v = vectors(20)
    cached, since = torch.arange(6).expand(2, KV_HEADS, 6).clone(), torch.tensor([18, 18])
    wanted = calls[False](q, k, v, cached=cached, since=since)
    torch.testing.assert_close(calls[True](q, k, v, cached=cached, since=since), wanted)
    twice, beyond = torch.cat([cached, cached[..., :1]], -1), torch.cat([cached, torch.full((2, KV_HEADS, 1), 20)], -1)
    for wrong, message in ((twice, "holds 0 twice"), (beyond, "holds 20, and keys are numbered 0 to 19")):
        torch.testing.assert_close(calls[False](q, k, v, cached=wrong, since=since), wanted)
        with pytest.raises(ArgumentError, match=message):
            calls[True](q, k, v, cached=wrong, since=since)


@pytest.mark.parametrize(
    ("visible", "wrong"),
    [
        (
            "any(kept[q // 8, i] == k // 8 for i in n) and k <= q",
            {(0, 0): "0 twice", (-1, 1): "-1, and blocks", (3, 1): "3"},
        ),
        (
            "any(k // 8 == kept[q // 8, i] for i in n) and k <= q",
            {(2, 2): "2 twice", (-7, 1): "-7, and blocks", (1, 9): "9"},
        ),
        ("any(kept[q // 8, i] == k for i in n)", {(19, 19): "19 twice", (20, 1): "20, and keys are numbered 0 to 19"}),
        (
            "any(kept[q // 8, i] == (k + 4) // 8 for i in n)",
            {(1, 1): "1 twice", (3, 1): "3, and keys compare only with 0 to 2"},
        ),
    ],
)
def test_strict_refuses_wrong_lists_per_query(visible: str, wrong: dict[tuple[int, int], str]) -> None:
    """Fails if lists that are indexed by the query's block are not checked."""
    text = f"pattern listed\n    input kept: int[rows, n]\n    align end\n    visible {visible}\n"
    run: Any = compile_attention(text, strict=True)
    qkv, valid = vectors(20), torch.tensor([[0, 1], [1, 0], [0, 2]])
    torch.testing.assert_close(run(*qkv, kept=valid), run.reference(*qkv, kept=valid))
    for entries, message in wrong.items():
        indices = valid.clone()
        indices[1] = torch.tensor(entries)
        with pytest.raises(ArgumentError, match=rf"`kept` of `listed` holds {message}"):
            run(*qkv, kept=indices)
        compile_attention(text)(*qkv, kept=indices)


def test_strict_checks_lists_along_their_axis() -> None:
    run: Any = compile_attention(
        "pattern across\n    input kept: int[n, rows]\n    visible any(kept[i, q // 8] == k // 8 for i in n)\n",
        strict=True,
    )
    run(*vectors(20), kept=torch.tensor([[0, 0, 0], [1, 1, 1]]))
    with pytest.raises(ArgumentError, match="holds 1 twice in one list"):
        run(*vectors(20), kept=torch.tensor([[0, 0, 1], [1, 1, 1]]))
