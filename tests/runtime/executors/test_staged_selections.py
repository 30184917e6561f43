"""Selections that read each other: families over several ranges, units of separate sizes, few candidates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import ArgumentError, compile_attention
from attnc.runtime.executors.selections import choose, few
from attnc.spec.errors import SpecError
from attnc.spec.meaning.evaluate import Evaluator

pytestmark = pytest.mark.usefixtures("one_thread", "gathered")


def draw_qkv(n_q: int, n_k: int) -> list[Tensor]:
    return [torch.randn(1, heads, n, 4, dtype=torch.float64) for heads, n in ((2, n_q), (1, n_k), (1, n_k))]


TEXTS: dict[str, str] = {
    "a family over two ranges": """
    select near[c in 1 .. 3, d in 0 .. 2]
        score  dot(q, k) * c + d * k
        from   k % 2 == d and k <= q
        keep   rank < c
    visible k in near[1, 0] or k in near[2, 1] or k in near[q % 2 + 1, 0]""",
    "units of each member's own": """
    let sizes(s) = 6 - 2 * s
    select stage[s in 0 .. 3]
        over   c = k // sizes(s)
        score  dot(q, mean(c.k))
        from   s == 0 or c in stage[s - 1]
        keep   rank < 4
    visible k in stage[2] or k in stage[0] and k % 2 == 0""",
    "units that lie in those of another member": """
    select stage[s in 0 .. 3]
        per    a = q // 3
        over   c = k // 2 ** (2 - s)
        score  dot(mean(a.q), mean(c.k))
        from   s == 0 or c in stage[s - 1]
        keep   rank < 3
    visible k in stage[2]""",
    "families that ask each other": """
    let at(c, t) = c.start + sum(4 // 2 ** x for x in 0 .. t if c in right[x])
    select right[t in 0 .. 3]
        per    a = q // 5
        over   c = k // 8
        score  dot(mean(a.q), k[at(c, t) + 4 // 2 ** t] - k[at(c, t)])
        from   c.size == 8 and (t < 2 or c in kept[0])
        keep   score > 0
    select kept[s in 0 .. 2]
        per    a = q // 5
        over   c = k // 8
        score  dot(mean(a.q), k[at(c, 2 + s)]) * count(c in right[x] for x in 0 .. 2 + s)
        from   c.size == 8 and (any(c in right[x] for x in 0 .. 2) or not all(c in right[x] for x in 0 .. 2))
        keep   rank < 3 - s
    visible k in kept[1]""",
    "sums of scores over members": """
    input  bias: real[batch, query, 3]
    select step[t in 0 .. 3]
        score  dot(q, k) + sum(bias[q, x] for x in 0 .. t if k in step[x])
        from   k % (t + 1) == 0
        keep   rank < 5 - t
    visible k in step[2]""",
    "places with several names": """
    select spans
        over   s in 1 .. 3, phase in 0 .. 3
        covers k % (2 * s) == phase
        score  dot(q, k[phase]) * s
        from   phase < 2 * s
        keep   rank < 2
    visible k in spans and k <= q""",
    "a mixture of places with several names": """
    select spans
        per    q
        over   s in 0 .. 2, i in 1 .. 4
        covers 3 * i <= k < 3 * i + 2 + s
        score  dot(q, k[3 * i]) * (s + 1)
        keep   rank < 2
    branch read[x in spans]
        visible k in x
    combine sum(x.score * read[x] for x in spans)""",
}


@pytest.mark.parametrize("lists", [True, False], ids=["few listed", "none listed"])
@pytest.mark.parametrize(("n_q", "n_k"), [(19, 19), (7, 26)])
@pytest.mark.parametrize("name", TEXTS)
def test_selections_agree_with_the_evaluator(
    name: str, n_q: int, n_k: int, lists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not lists:
        monkeypatch.setattr(choose, "few", lambda candidates: None)
    attend = compile_attention(f"pattern p\n    align end{TEXTS[name]}\n")
    q, k, v = (x.requires_grad_() for x in draw_qkv(n_q, n_k))
    inputs: dict[str, Any] = {}
    if "bias" in TEXTS[name]:
        inputs["bias"] = torch.randn(1, n_q, 3, dtype=torch.float64)
    counts = {"queries": n_q, "keys": n_k, "heads": 2, "kv_heads": 1, "dk": 4, "dv": 4}
    oracle = Evaluator(attend.bound, inputs={key: x.tolist() for key, x in inputs.items()}, **counts)
    wanted = torch.tensor(oracle.attend(*(x.tolist() for x in (q, k, v)))[0], dtype=torch.float64)
    outs = [run(q, k, v, **inputs) for run in (attend, attend.reference)]
    for out in outs:
        torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(wanted)
    grads = [torch.autograd.grad((out * weights).sum(), (q, k, v), allow_unused=True) for out in outs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


REFUSED: dict[str, tuple[str, str]] = {
    """
    select left[s in 0 .. 3]
        score  dot(q, k)
        from   k in right[s]
        keep   rank < 4
    select right[s in 0 .. 3]
        score  dot(q, k)
        from   k in left[s]
        keep   rank < 4
    visible k in left[2]""": ("A205", "in a cycle: `left[2]` → `right[2]` → `left[2]`"),
    """
    select step[s in 0 .. 3]
        score  dot(q, k) * max((2 if k in step[x] else 1) for x in 0 .. s)
        keep   rank < 4
    visible k in step[2]""": ("A701", "`max` over members of a family that read each other is not supported yet"),
    """
    select step[s in 0 .. 3]
        per    a = q // (s + 1)
        score  dot(mean(a.q), k)
        from   s == 0 or k in step[s - 1]
        keep   rank < 4
    visible k in step[2]""": ("A701", "a unit of queries that differs from member to member is not supported yet"),
    """
    select step[s in 0 .. 3, t in 0 .. 2]
        score  dot(q, k)
        from   s == 0 or k in step[s - 1, t + 1]
        keep   rank < 4
    visible k in step[2, 1]""": ("A701", "a read of `step` at a member other than 0 to 5 is not supported yet"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_errors(text: str) -> None:
    code, message = REFUSED[text]
    with pytest.raises(SpecError) as caught:
        compile_attention(f"pattern p\n    align end{text}\n")
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, diagnostic.help != "") == (code, True)
    assert message in diagnostic.message


def test_members_are_named_by_their_indices() -> None:
    attend = compile_attention("hip", stages=[4, 2], kept=[8, 4], strides=[1, 1], rows=4, sinks=0, window=4)
    selections = attend.chosen(*draw_qkv(30, 30))
    assert {"right[0, 0]", "right[0, 1]", "right[1, 0]", "stage[0]", "stage[1]"} <= selections.keys()
    assert selections["right[1, 0]"].shape == (1, 2, 8, 15)


def test_only_scores_of_candidates_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has 4 of 64 blocks as candidates: no other score is computed, and the selection is unchanged."""
    text = """pattern p
    align end
    select first
        score  dot(q, k)
        keep   rank < 4
    select second
        score  dot(q, k) * 2
        from   k in first
        keep   rank < 2
    visible k in second
"""
    attend = compile_attention(text)
    q, k, v = draw_qkv(64, 64)
    sizes = []
    real_scored = few.scored

    def scored(*arguments: Any) -> Tensor:
        sizes.append(real_scored(*arguments).shape)
        return real_scored(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(choose, "scored", scored)
        listed = attend.chosen(q, k, v)["second"]
    assert sizes == [(2, 64, 4)]
    monkeypatch.setattr(choose, "few", lambda candidates: None)
    assert torch.equal(attend.chosen(q, k, v)["second"], listed)


def test_the_length_of_a_list_is_a_dimension() -> None:
    """Inputs that name the dimension have as many entries as the list."""
    text = """pattern p(offsets: int[n] = [0, 2, 5])
    align   end
    input   on: bool[batch, n]
    visible any(q - k == offsets[i] and on[i] for i in n)
"""
    attend = compile_attention(text)
    mask = attend.mask(9, on=torch.tensor([[True, False, True]]))[0]
    away = torch.arange(9)[:, None] - torch.arange(9)
    assert torch.equal(mask, (away == 0) | (away == 5))
    with pytest.raises(ArgumentError, match="on"):
        attend.mask(9, on=torch.ones(1, 4, dtype=torch.bool))
