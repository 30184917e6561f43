"""Decoding steps by formulas of the length equal the general path, and leave every other call to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from attnc import compile_attention
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.lowering.specialise import alone
from attnc.compiler.planning.row_keys import find_row_keys
from attnc.runtime.api.attention import Attention
from attnc.runtime.texts.library import library_names
from attnc.spec.errors import AttncError

TEXTS = {
    "causal": "visible k <= q",
    "window": "visible 0 <= q - k < 7",
    "window and sinks": "visible 0 <= q - k < 5 or k <= q and k < 3",
    "blocks": "visible k // 4 == q // 4 and k <= q",
    "two bands": "visible 2 <= q - k < 6 or 11 <= q - k < 15 or k == q",
    "growing": "visible k <= q and q - k <= q // 3 + 1",
    "everything": "visible true",
    "even rows": "visible k <= q and (k >= q - 3 or q % 2 == 0)",
}


def attention(text: str) -> Attention:
    return compile_attention(f"pattern p\n    align end\n    {text}\n")


def without_formulas(text: str) -> Attention:
    """Return a pattern that decodes by the general path."""
    attend = attention(text)
    vars(attend._core)["direct_decoding"] = None
    return attend


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_formulas_are_the_relation(text: str) -> None:
    relation = attention(text)._core.last_rows.pattern.attend.visible
    keys = find_row_keys(relation, 4, 2)
    assert keys is not None
    for n in (1, 2, 5, 16, 33):
        wanted = exact_evaluation.mask(alone(relation, n, 0, 4, 2), (n - 1, n), (0, n))[0]
        seen = np.zeros(n, dtype=np.bool_)
        for start, stop in keys.at(n - 1, n):
            assert not seen[start:stop].any() and stop > start
            seen[start:stop] = True
        assert np.array_equal(seen, wanted), n


def test_formulas_of_the_library() -> None:
    """Every library pattern whose last row has formulas: they are its relation at many lengths."""
    found = 0
    for name in library_names():
        try:
            attend = compile_attention(name)
            rows = attend._core.last_rows.pattern
        except AttncError:
            continue
        if len(rows.nodes) != 1 or rows.nodes[0].keys is not None or rows.nodes[0].family is not None:
            continue
        relation = rows.nodes[0].visible
        keys = find_row_keys(relation, 8, 4)
        if keys is None:
            continue
        found += 1
        for n in (1, 7, 129, 700):
            wanted = exact_evaluation.mask(alone(relation, n, 0, 8, 4), (n - 1, n), (0, n))[0]
            seen = np.zeros(n, dtype=np.bool_)
            for start, stop in keys.at(n - 1, n):
                seen[start:stop] = True
            assert np.array_equal(seen, wanted), (name, n)
    assert found >= 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_steps_equal_the_general_path(text: str, dtype: torch.dtype) -> None:
    attend, general = attention(text), without_formulas(text)
    k, v = (torch.randn(2, 2, 40, 16).to(dtype) for _ in range(2))
    for n in range(1, 41):
        q = torch.randn(2, 4, 1, 16).to(dtype)
        out, lse = attend.decode(q, k, v, kv_len=n, return_lse=True)
        exact = attend.reference(q.double(), k[:, :, :n].double(), v[:, :, :n].double(), return_lse=True)
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 1e-2)
        torch.testing.assert_close(out.double(), exact[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse.double(), exact[1], atol=max(tolerance, 1e-6), rtol=tolerance)
        assert (out.dtype, out.shape) == (dtype, q.shape)
        other_out, other_lse = general.decode(q, k, v, kv_len=n, return_lse=True)
        assert lse.dtype == other_lse.dtype
        torch.testing.assert_close(out, other_out, atol=tolerance, rtol=tolerance)


def direct_steps(monkeypatch: pytest.MonkeyPatch, attend: Any) -> list[bool]:
    """Return a list that notes, for each step of a pattern, whether it ran directly."""
    steps: list[bool] = []
    direct = attend._core.direct_decoding
    run = type(direct).attend

    def noting(self: Any, *args: Any, **options: Any) -> Any:
        pair = run(self, *args, **options)
        steps.append(pair is not None)
        return pair

    monkeypatch.setattr(type(direct), "attend", noting)
    return steps


def test_which_calls_run_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention(TEXTS["window and sinks"])
    steps = direct_steps(monkeypatch, attend)
    q, (k, v) = torch.randn(2, 4, 1, 16), (torch.randn(2, 2, 40, 16) for _ in range(2))
    lengths: list[tuple[Any, bool]] = [
        (17, True),
        ([17, 17], True),
        (torch.tensor([17, 17]), True),
        (torch.tensor(17), True),
        ([17, 16], False),
    ]
    for kv_len, is_direct in lengths:
        out = attend.decode(q, k, v, kv_len=kv_len)
        assert steps.pop() is is_direct
        if is_direct:
            torch.testing.assert_close(out, attend.decode(q, k, v, kv_len=17))
            steps.pop()
    attend.decode(q.expand(2, 4, 3, 16), k, v, kv_len=17)
    assert steps.pop() is False
    spaced = torch.randn(2, 2, 40, 32)[..., ::2]
    attend.decode(q, spaced, v, kv_len=17)
    assert steps.pop() is False
    attend.decode(q, k, torch.randn(2, 2, 40, 8), kv_len=17)
    assert steps.pop() is False


@pytest.mark.parametrize("slots", [8, 9, 13])
def test_rings(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token t < 3 is in slot t, a later one in slot 3 + (t - 3) % (slots - 3)."""
    attend = attention(TEXTS["window and sinks"])
    steps = direct_steps(monkeypatch, attend)
    k, v = (torch.randn(1, 2, 40, 16) for _ in range(2))
    ring_k, ring_v = (torch.full((1, 2, slots, 16), torch.nan) for _ in range(2))
    for n in range(1, 41):
        slot = n - 1 if n <= 3 else 3 + (n - 4) % (slots - 3)
        ring_k[:, :, slot], ring_v[:, :, slot] = k[:, :, n - 1], v[:, :, n - 1]
        q = torch.randn(1, 4, 1, 16)
        out = attend.decode(q, ring_k, ring_v, kv_len=n, ring=True)
        assert steps.pop() is True
        torch.testing.assert_close(out, attend.decode(q, k, v, kv_len=n))
        steps.pop()
    short = torch.randn(1, 2, 7, 16)
    with pytest.raises(AttncError, match="7 slots"):
        attend.decode(torch.randn(1, 4, 1, 16), short, short, kv_len=20, ring=True)
    assert steps.pop() is False


def test_values_that_are_not_finite_take_the_general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention(TEXTS["window"])
    steps = direct_steps(monkeypatch, attend)
    q, (k, v) = torch.randn(1, 2, 1, 16), (torch.randn(1, 2, 40, 16) for _ in range(2))
    v[:, :, 3] = torch.nan  # hidden from the last row
    assert attend.decode(q, k, v, kv_len=20).isfinite().all()
    assert steps.pop() is True
    v[:, :, 18, 0] = torch.inf
    assert torch.equal(attend.decode(q, k, v, kv_len=20).isinf().any(-1), torch.ones(1, 2, 1, dtype=torch.bool))
    assert steps.pop() is False


@pytest.mark.parametrize(
    ("kv_len", "message"), [(0, "kv_len"), (41, "40 slots"), (2.0, "an integer"), (True, "an integer")]
)
def test_wrong_lengths_are_named(kv_len: Any, message: str) -> None:
    attend = attention(TEXTS["causal"])
    q, (k, v) = torch.randn(1, 2, 1, 16), (torch.randn(1, 2, 40, 16) for _ in range(2))
    with pytest.raises(AttncError, match=message):
        attend.decode(q, k, v, kv_len=kv_len)


def test_steps_that_need_a_gradient_are_refused() -> None:
    attend = attention(TEXTS["causal"])
    q, (k, v) = torch.randn(1, 2, 1, 16, requires_grad=True), (torch.randn(1, 2, 40, 16) for _ in range(2))
    with pytest.raises(AttncError, match="no gradient"):
        attend.decode(q, k, v, kv_len=9)
    with torch.no_grad():
        attend.decode(q, k, v, kv_len=9)


def test_a_grid_of_tokens_is_checked_by_the_general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    attend: Any = attention("tokens y: 4, x: 5\n    visible k.y <= q.y and k <= q")
    steps = direct_steps(monkeypatch, attend)
    q, (k, v) = torch.randn(1, 2, 1, 16), (torch.randn(1, 2, 40, 16) for _ in range(2))
    attend.decode(q, k, v, kv_len=20)
    with pytest.raises(AttncError, match="`tokens` of `p` must be 20"):
        attend.decode(q, k, v, kv_len=19)
    assert steps == [False, False]
