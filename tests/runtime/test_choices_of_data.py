"""Choices beside inputs: what inputs hold is new in every call, and what is not there is asked of nobody."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import EvaluationError, SpecError, compile_attention

pytestmark = pytest.mark.usefixtures("one_thread", "gathered")

BLOCKS = """    select c
        over  b = k // 3
        score dot(q, mean(b.k))
        from  b.start <= q
        keep  rank < 2
"""
TOKENS = """    select st[s in 0 .. 3]
        per   head
        score dot(k, k) * (s - 1)
        keep  rank < 4
"""


def pattern(*lines: str, align: str = "end") -> str:
    head = f"pattern p\n    align {align}\n"
    return head + "".join(line if line.endswith("\n") else f"    {line}\n" for line in lines)


def drawn(n_q: int = 12, n_k: int = 12, batch: int = 2, kind: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = ((4, n_q), (2, n_k), (2, n_k))
    return [torch.randn(batch, h, n, 3, dtype=kind, requires_grad=True) for h, n in sizes]


def agree(text: str, calls: list[tuple[list[Tensor], dict[str, Any]]]) -> None:
    """One attention gives what its reference does, and the same gradients, in one call after another."""
    attend: Any = compile_attention(text)
    for qkv, inputs in calls:
        outs = [run(*qkv, **inputs) for run in (attend, attend.reference)]
        torch.testing.assert_close(*outs)
        grads = [torch.autograd.grad(out.square().sum(), qkv, materialize_grads=True) for out in outs]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("lines", "calls"),
    [
        (
            ["input since: int[batch]", BLOCKS, "visible k in c and k >= since"],
            [{"since": torch.tensor(x)} for x in ([9, 9], [0, 2], [5, 0])],
        ),
        (
            ["input kept: int[n]", BLOCKS, "visible (k in c or k == q) and any(kept[i] == k for i in n)"],
            [{"kept": torch.tensor(x)} for x in ([0, 1], [8, 9], [11, 3])],
        ),
        (
            [
                "input h: int[token]",
                "input keep: bool[key]",
                "visible order(h)[k] // 4 == order(h)[q] // 4 and keep[k]",
            ],
            [{"h": torch.randperm(12), "keep": torch.arange(12) % m == 0} for m in (5, 1, 3)],
        ),
    ],
    ids=["since", "kept", "sorted"],
)
def test_a_later_call_knows_nothing_of_the_first_ones_inputs(lines: list[str], calls: list[dict[str, Any]]) -> None:
    agree(pattern(*lines), [(drawn(), inputs) for inputs in calls])


def test_sequences_of_one_length_know_nothing_of_each_other() -> None:
    attend: Any = compile_attention(pattern("input keep: bool[key]", BLOCKS, "visible (k in c or k == q) and keep[k]"))
    qkv, keep = drawn(batch=1), torch.tensor([True] * 3 + [False] * 6 + [True] * 3)
    given = {"keep": keep, "cu_seqlens": torch.tensor([0, 6, 12])}
    torch.testing.assert_close(attend(*qkv, **given), attend.reference(*qkv, **given))


def test_sizes_that_only_inputs_tell_are_part_of_a_plan() -> None:
    text = pattern("input map: bool[rows, cols]", "input w: real[n]", "visible map[q // 4, k // 4] and q - k < n")
    map_ = torch.rand(3, 3) < 0.6
    agree(text, [(drawn(), {"map": map_, "w": torch.randn(n)}) for n in (3, 9, 2)])
    text = pattern("input w: real[n]", TOKENS, "visible k in st[1] and q - k < n")
    agree(text, [(drawn(), {"w": torch.randn(n)}) for n in (3, 9, 2)])


def test_places_without_keys_take_none_of_the_others() -> None:
    text = """pattern p
    align end
    input kc: int[key]
    select c
        over  b = kc[k] % 4
        score 0 * b.size
        keep  rank < 2
    visible k in c and k <= q
"""
    kc = torch.zeros(200, dtype=torch.long)
    kc[:10], kc[199] = 1, 1
    q, k, v = drawn(200, 200, 1)
    agree(text, [([q, k, v], {"kc": kc})])
    attend = compile_attention(text)
    later = v.detach().clone()
    later[:, :, 199] += 100
    assert torch.equal(attend(q, k, later, kc=kc)[:, :, :199], attend(q, k, v, kc=kc)[:, :, :199])
    near = pattern("input h: int[token]", "visible order(h)[q] // 4 == order(h)[k] // 4 and k < q")
    agree(near, [(drawn(1, 2), {"h": torch.tensor([0, 1])})])


@pytest.mark.parametrize(
    "visible",
    [
        "k + 3 < keys and m[0, k + 3]",
        "q > 4 and m[0, q - 5] and k <= q",
        "m[0, k] and (q > 2 and m[1, q - 3] or q == k)",
    ],
)
def test_what_a_condition_guards_is_not_read(visible: str) -> None:
    m = torch.rand(2, 12) < 0.7
    agree(pattern("input m: bool[rows, key]", f"visible {visible}"), [(drawn(), {"m": m})])


@pytest.mark.parametrize("visible", ["m[0, k - 3]", "m[2, k]", "m[0, q - 3] and k <= q", "m[rows, k]"])
def test_what_is_not_there_is_an_error(visible: str) -> None:
    attend: Any = compile_attention(pattern("input m: bool[rows, key]", f"visible {visible}"))
    qkv = drawn()
    for run in (attend, attend.reference):
        with pytest.raises(EvaluationError, match="an index outside `m`"):
            run(*qkv, m=torch.ones(2, 12, dtype=torch.bool))


def test_members_that_are_none() -> None:
    for member in ("heads - 5", "heads - 1"):
        attend: Any = compile_attention(pattern(TOKENS, f"visible k in st[{member}]"))
        for run in (attend, attend.reference):
            with pytest.raises(EvaluationError, match="an index outside `st`"):
                run(*drawn())
    agree(pattern(TOKENS, "visible heads < 3 and k in st[heads]"), [(drawn(), {})])
    with pytest.raises(SpecError, match="none of 0 to 2"):
        compile_attention(pattern(TOKENS, "visible k in st[3]"))


@pytest.mark.parametrize("visible", ["k in st and k <= q", "k in st or k == q", "q in st and k in st"])
@pytest.mark.parametrize("n_q", [12, 9, 5])
def test_keys_among_chosen_queries(visible: str, n_q: int) -> None:
    """A token that is no query is none of those that were chosen."""
    text = """pattern p
    align end
    select st
        per   head
        over  q
        score dot(q, q)
        keep  rank < 4
"""
    agree(f"{text}    visible {visible}\n", [(drawn(n_q), {})])


def test_members_that_ask_nothing() -> None:
    text = pattern(
        BLOCKS, "    branch r[i in 0 .. 2]\n", "        visible i > 0 and k in c\n", "combine sum(r[i] for i in 0 .. 2)"
    )
    agree(text, [(drawn(), {})])
    text = pattern(
        BLOCKS, "    branch r[i in 0 .. 2]\n", "        visible k in c and k % 2 == i\n", "combine r[0] + r[1]"
    )
    assert compile_attention(text).source()


def test_inputs_may_be_lists() -> None:
    text = pattern("input m: bool[rows, cols]", "input id: int[key]", "visible m[q // 3, id[k]]")
    agree(text, [(drawn(9, 9), {"m": [[True, False, True]] * 3, "id": [0, 1, 2, 0, 0, 0, 2, 2, 1]})])


@pytest.mark.parametrize(("n_q", "n_k"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sizes(n_q: int, n_k: int) -> None:
    align = "end" if n_q <= n_k else "start"
    ids = torch.randint(0, 9, (n_k,))
    texts = [
        ("kc", "input kc: int[key]", "over b = kc[k] % 4"),
        ("qc", "input qc: int[query]", "per a = qc[q] % 2"),
        ("", "let x = 1", "per head"),
    ]
    for name, line, who in texts:
        score = "dot(mean(a.q), k)" if name == "qc" else "dot(q, mean(b.k))" if name == "kc" else "dot(k, k)"
        select = f"    select c\n        {who}\n        score {score}\n        keep rank < 2\n"
        given = {name: torch.randint(0, 9, (n_q,)) if name == "qc" else ids} if name else {}
        text = pattern(*([line] if name else []), select, "visible k in c", align=align)
        agree(text, [(drawn(n_q, n_k), given)])
    if n_q <= n_k:
        text = pattern("input h: int[token]", "visible order(h)[q] // 2 == order(h)[k] // 2")
        agree(text, [(drawn(n_q, n_k), {"h": ids})])


MIXED = """pattern p
    align end
    select spans
        over   i in 0 .. 4
        covers k == q - i
        score  dot(q, k[0]) + i
        keep   score > 0
    branch alone
        visible k <= q
    branch read[s in spans]
        visible k in s
    let whole = sum(exp(s.score) for s in spans)
    let top = sum(exp(s.score) * read[s] for s in spans)
    combine {}
"""


@pytest.mark.parametrize(
    "combine",
    [
        "top / (1 + spans.size)",
        "top / (whole + 1)",
        "top / (spans.size if spans.size > 0 else 1)",
        "top / whole if 1 <= spans.size else alone",
        "alone if not spans.size > 0 else top / whole",
        "alone if spans.size == 0 or q > 3 else top / whole",
    ],
)
def test_mixtures_of_something(combine: str) -> None:
    agree(MIXED.format(combine), [(drawn(), {})])


@pytest.mark.parametrize(
    "combine",
    [
        "top / whole if spans.size == 0 else alone",
        "top / whole if spans.size >= 0 else alone",
        "top / whole if spans.size > 0 or q > 3 else alone",
        "top * whole ** -1",
        "alone * log(spans.size)",
        "top / spans.size",
        "top / (2 * whole)",
    ],
)
def test_mixtures_of_nothing(combine: str) -> None:
    with pytest.raises(SpecError, match="A225"):
        compile_attention(MIXED.format(combine))
