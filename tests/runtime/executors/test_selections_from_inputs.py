"""Selections beside inputs: each call reads its own inputs, and out-of-range entries are never read."""

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


def draw_qkv(n_q: int = 12, n_k: int = 12, batch: int = 2, kind: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = ((4, n_q), (2, n_k), (2, n_k))
    return [torch.randn(batch, h, n, 3, dtype=kind, requires_grad=True) for h, n in sizes]


def assert_agrees(text: str, calls: list[tuple[list[Tensor], dict[str, Any]]]) -> None:
    """Check that one attention agrees with its reference, gradients included, in successive calls."""
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
def test_each_call_uses_its_own_inputs(lines: list[str], calls: list[dict[str, Any]]) -> None:
    assert_agrees(pattern(*lines), [(draw_qkv(), inputs) for inputs in calls])


def test_sequences_of_equal_length_do_not_share_inputs() -> None:
    attend: Any = compile_attention(pattern("input keep: bool[key]", BLOCKS, "visible (k in c or k == q) and keep[k]"))
    qkv, keep = draw_qkv(batch=1), torch.tensor([True] * 3 + [False] * 6 + [True] * 3)
    inputs = {"keep": keep, "cu_seqlens": torch.tensor([0, 6, 12])}
    torch.testing.assert_close(attend(*qkv, **inputs), attend.reference(*qkv, **inputs))


def test_sizes_of_inputs_are_part_of_a_plan() -> None:
    text = pattern("input map: bool[rows, cols]", "input w: real[n]", "visible map[q // 4, k // 4] and q - k < n")
    map_ = torch.rand(3, 3) < 0.6
    assert_agrees(text, [(draw_qkv(), {"map": map_, "w": torch.randn(n)}) for n in (3, 9, 2)])
    text = pattern("input w: real[n]", TOKENS, "visible k in st[1] and q - k < n")
    assert_agrees(text, [(draw_qkv(), {"w": torch.randn(n)}) for n in (3, 9, 2)])


def test_empty_blocks_take_no_keys_of_other_blocks() -> None:
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
    q, k, v = draw_qkv(200, 200, 1)
    assert_agrees(text, [([q, k, v], {"kc": kc})])
    attend = compile_attention(text)
    later = v.detach().clone()
    later[:, :, 199] += 100
    assert torch.equal(attend(q, k, later, kc=kc)[:, :, :199], attend(q, k, v, kc=kc)[:, :, :199])
    near = pattern("input h: int[token]", "visible order(h)[q] // 4 == order(h)[k] // 4 and k < q")
    assert_agrees(near, [(draw_qkv(1, 2), {"h": torch.tensor([0, 1])})])


@pytest.mark.parametrize(
    "visible",
    [
        "k + 3 < keys and m[0, k + 3]",
        "q > 4 and m[0, q - 5] and k <= q",
        "m[0, k] and (q > 2 and m[1, q - 3] or q == k)",
    ],
)
def test_guarded_entries_are_not_read(visible: str) -> None:
    m = torch.rand(2, 12) < 0.7
    assert_agrees(pattern("input m: bool[rows, key]", f"visible {visible}"), [(draw_qkv(), {"m": m})])


@pytest.mark.parametrize("visible", ["m[0, k - 3]", "m[2, k]", "m[0, q - 3] and k <= q", "m[rows, k]"])
def test_out_of_range_entries_are_an_error(visible: str) -> None:
    attend: Any = compile_attention(pattern("input m: bool[rows, key]", f"visible {visible}"))
    qkv = draw_qkv()
    for run in (attend, attend.reference):
        with pytest.raises(EvaluationError, match="an index outside `m`"):
            run(*qkv, m=torch.ones(2, 12, dtype=torch.bool))


def test_out_of_range_members() -> None:
    for member in ("heads - 5", "heads - 1"):
        attend: Any = compile_attention(pattern(TOKENS, f"visible k in st[{member}]"))
        for run in (attend, attend.reference):
            with pytest.raises(EvaluationError, match="an index outside `st`"):
                run(*draw_qkv())
    assert_agrees(pattern(TOKENS, "visible heads < 3 and k in st[heads]"), [(draw_qkv(), {})])
    with pytest.raises(SpecError, match="a member other than 0 to 2"):
        compile_attention(pattern(TOKENS, "visible k in st[3]"))


@pytest.mark.parametrize("visible", ["k in st and k <= q", "k in st or k == q", "q in st and k in st"])
@pytest.mark.parametrize("n_q", [12, 9, 5])
def test_keys_among_selected_queries(visible: str, n_q: int) -> None:
    """Only queries can be selected: a key token that is no query is never selected."""
    text = """pattern p
    align end
    select st
        per   head
        over  q
        score dot(q, q)
        keep  rank < 4
"""
    assert_agrees(f"{text}    visible {visible}\n", [(draw_qkv(n_q), {})])


def test_branches_without_a_selection() -> None:
    text = pattern(
        BLOCKS, "    branch r[i in 0 .. 2]\n", "        visible i > 0 and k in c\n", "combine sum(r[i] for i in 0 .. 2)"
    )
    assert_agrees(text, [(draw_qkv(), {})])
    text = pattern(
        BLOCKS, "    branch r[i in 0 .. 2]\n", "        visible k in c and k % 2 == i\n", "combine r[0] + r[1]"
    )
    assert compile_attention(text).source()


def test_inputs_may_be_lists() -> None:
    text = pattern("input m: bool[rows, cols]", "input id: int[key]", "visible m[q // 3, id[k]]")
    assert_agrees(text, [(draw_qkv(9, 9), {"m": [[True, False, True]] * 3, "id": [0, 1, 2, 0, 0, 0, 2, 2, 1]})])


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
        inputs = {name: torch.randint(0, 9, (n_q,)) if name == "qc" else ids} if name else {}
        text = pattern(*([line] if name else []), select, "visible k in c", align=align)
        assert_agrees(text, [(draw_qkv(n_q, n_k), inputs)])
    if n_q <= n_k:
        text = pattern("input h: int[token]", "visible order(h)[q] // 2 == order(h)[k] // 2")
        assert_agrees(text, [(draw_qkv(n_q, n_k), {"h": ids})])


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
def test_combinations_of_branches(combine: str) -> None:
    assert_agrees(MIXED.format(combine), [(draw_qkv(), {})])


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
def test_combinations_of_no_branches(combine: str) -> None:
    with pytest.raises(SpecError, match="A225"):
        compile_attention(MIXED.format(combine))
