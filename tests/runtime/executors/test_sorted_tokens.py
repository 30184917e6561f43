"""`order`, units numbered by an input, families of selections, and selections among queries, against the definition."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attnc import Attention, EvaluationError, SpecError, UnsupportedError, compile_attention
from attnc.compiler.ir import Made
from attnc.runtime.call.call_shapes import sorted_array
from attnc.runtime.call.tensor_checks import sorted_by
from attnc.runtime.planning.plans import PLANNING
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.meaning.evaluate import Evaluator
from attnc.spec.source import SourceFile

pytestmark = pytest.mark.usefixtures("one_thread", "gathered")

HEADS, KV_HEADS, WIDTH = 4, 2, 3
Inputs = dict[str, Any]


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def draw_qkv(n_q: int, n_k: int | None = None, batch: int = 2) -> list[Tensor]:
    n_k = n_q if n_k is None else n_k
    return [real(batch, HEADS, n_q, WIDTH), *(real(batch, KV_HEADS, n_k, WIDTH) for _ in range(2))]


def output_by_definition(attend: Attention, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
    """Return the output that the evaluator computes from the definition."""
    call = Evaluator(
        attend.bound,
        queries=q.shape[2],
        keys=k.shape[2],
        heads=HEADS,
        kv_heads=KV_HEADS,
        dk=WIDTH,
        dv=WIDTH,
        inputs={name: x.tolist() for name, x in inputs.items()},
    )
    return torch.tensor(call.attend(q.tolist(), k.tolist(), v.tolist())[0], dtype=q.dtype)


def check(attend: Attention, qkv: list[Tensor], inputs: Inputs) -> None:
    """Check that both executors agree with the definition and have the same gradients."""
    q, k, v = (x.requires_grad_() for x in qkv)
    outs = [attend(q, k, v, **inputs), attend.reference(q, k, v, **inputs)]
    wanted = output_by_definition(attend, q.detach(), k.detach(), v.detach(), inputs)
    weights = torch.randn_like(wanted)
    grads = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in outs]
    for out in outs:
        torch.testing.assert_close(out, wanted)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- order ------------------------------------------------------------------------------------------------------------


def blocks(dims: str, kind: str = "int", extra: str = "") -> str:
    return f"""pattern sorted_blocks(block: int = 4)
    align   end
    input   h: {kind}[{dims}]
    visible order(h)[q] // block == order(h)[k] // block{extra}
"""


@pytest.mark.parametrize("extra", ["", " and k <= q", " or q == k"])
@pytest.mark.parametrize("dims", ["token", "batch, token", "head, token", "batch, kv_head, token"])
def test_blocks_in_the_order_of_an_input(dims: str, extra: str) -> None:
    sizes = {"batch": 2, "head": HEADS, "kv_head": KV_HEADS, "token": 14}
    shape = [sizes[dim] for dim in dims.split(", ")]
    attend = compile_attention(blocks(dims, extra=extra))
    check(attend, draw_qkv(14), {"h": torch.randint(0, 4, shape)})


def test_the_order_of_real_numbers() -> None:
    h = real(2, 13)
    h[:, 5] = h[:, 2]
    check(compile_attention(blocks("batch, token", "real")), draw_qkv(13), {"h": h})


def test_ids_in_8_bits() -> None:
    """Ids for which the bound, or sums with the id, overflow the id's dtype."""
    attend = compile_attention("svg2", query_clusters=300, key_clusters=200, p=0.7)
    qkv = draw_qkv(40)
    ids: Inputs = {"qc": torch.randint(-128, 127, (2, HEADS, 40)), "kc": torch.randint(0, 255, (2, KV_HEADS, 40))}
    small: Inputs = {"qc": ids["qc"].to(torch.int8), "kc": ids["kc"].to(torch.uint8)}
    torch.testing.assert_close(attend(*qkv, **small), attend.reference(*qkv, **ids))


def test_fewer_queries_than_keys() -> None:
    check(compile_attention(blocks("batch, token")), draw_qkv(5, 12), {"h": torch.randint(0, 3, (2, 12))})


def test_equal_keys_keep_their_order() -> None:
    attend = compile_attention(blocks("token"))
    h = torch.tensor([2, 1, 2, 1, 1, 0, 2, 2])
    second_block = {5, 1, 3, 4}
    visible = attend.mask(8, h=h).reshape(8, 8)
    assert [set(row.nonzero()[:, 0].tolist()) for row in visible] == [
        second_block if i in second_block else {0, 2, 6, 7} for i in range(8)
    ]


def test_each_sequence_is_sorted_separately() -> None:
    attend = compile_attention(blocks("batch, token"))
    q, k, v = draw_qkv(30, batch=1)
    h, cuts = torch.randint(0, 9, (1, 30)), [0, 11, 11, 29, 30]
    out = attend(q, k, v, h=h, cu_seqlens=torch.tensor(cuts))
    for a, b in pairwise(cuts):
        if a < b:
            alone = attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], h=h[:, a:b])
            torch.testing.assert_close(out[:, :, a:b], alone)


def test_documents_are_refused() -> None:
    text = blocks("batch, token").replace(
        "    align   end\n", "    input   doc: int[batch, token]\n    documents doc\n"
    )
    with pytest.raises(SpecError, match="with `documents`"):
        compile_attention(text)


def test_under_torch_compile() -> None:
    attend = compile_attention(blocks("batch, token"))
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True)
    for _ in range(3):
        qkv, h = draw_qkv(20), torch.randint(0, 9, (2, 20))
        torch.testing.assert_close(compiled(*qkv, h=h), attend(*qkv, h=h))
    torch._dynamo.reset()


def test_a_cache_of_sorted_keys() -> None:
    """Keys may be sorted in a decode step; sorted queries need each other."""
    text = """pattern near_in_order(window: int = 6)
    align   end
    input   h: int[batch, key]
    visible order(h)[k] < window and k <= q
"""
    attend = compile_attention(text)
    q, k, v = draw_qkv(16)
    h = torch.randint(0, 9, (2, 16))
    out = attend.decode(q[:, :, -2:], k, v, kv_len=16, h=h)
    torch.testing.assert_close(out, attend(q, k, v, h=h)[:, :, -2:])
    with pytest.raises(UnsupportedError, match="`h` of other rows"):
        compile_attention(blocks("batch, token")).decode(q[:, :, -1:], k, v, kv_len=16, h=h)


# --- units that an input numbers --------------------------------------------------------------------------------------

CLUSTERS = """pattern clustered(groups: int = 4, topk: int = 2)
    align   end
    input   qc: int[batch, head, query]
    input   kc: int[{dims}]
    select chosen
        per    a = qc[q] % groups
        over   b = kc[k] % groups
        score  {score}
        keep   rank < topk
    visible {visible}
"""


@pytest.mark.parametrize("dims", ["batch, kv_head, key", "key", "batch, head, key"])
@pytest.mark.parametrize(
    ("score", "visible"),
    [
        ("dot(mean(a.q), mean(b.k))", "k in chosen"),
        ("dot(mean(a.q), mean(b.k)) + log(b.size)", "k in chosen and k <= q"),
        ("max(dot(q[i], k[j]) for i in a, j in b)", "k in chosen or k == q"),
        ("0 - b.start + dot(mean(a.q), mean(b.k)) / (b.end - b.start)", "k in chosen"),
    ],
)
def test_clusters(dims: str, score: str, visible: str) -> None:
    attend = compile_attention(CLUSTERS.format(dims=dims, score=score, visible=visible))
    sizes = {"batch": 2, "head": HEADS, "kv_head": KV_HEADS, "key": 15}
    kc = torch.randint(-3, 9, [sizes[dim] for dim in dims.split(", ")])
    check(attend, draw_qkv(11, 15), {"qc": torch.randint(0, 6, (2, HEADS, 11)), "kc": kc})


BY_QUERY = """pattern by_query(groups: int = 4)
    align   end
    input   kc: int[batch, kv_head, key]
    select chosen
        over   b = kc[k] % groups
        score  {score}
        keep   rank < 2
    visible k in chosen and k <= q
"""


@pytest.mark.parametrize("score", ["dot(q, mean(b.k))", "0"])
@pytest.mark.parametrize(("n_q", "n_k"), [(15, 15), (6, 15)])
def test_each_query_selects_clusters(n_q: int, n_k: int, score: str) -> None:
    """Between clusters with equal scores the smaller number wins, whatever the order of their tokens."""
    kc = torch.randint(0, 4, (2, KV_HEADS, n_k))
    check(compile_attention(BY_QUERY.format(score=score)), draw_qkv(n_q, n_k), {"kc": kc})


def test_a_cluster_of_most_tokens_is_summed_once() -> None:
    attend = compile_attention("svg2", query_clusters=3, key_clusters=40, p=0.5)
    kc = torch.zeros(2, KV_HEADS, 90, dtype=torch.long)
    kc[..., ::9] = torch.arange(10)
    qkv, qc = draw_qkv(90), torch.randint(0, 3, (2, HEADS, 90))
    torch.testing.assert_close(attend(*qkv, qc=qc, kc=kc), attend.reference(*qkv, qc=qc, kc=kc))


@pytest.mark.parametrize("unit", ["kc[k]", "kc[k] // 2", "(kc[k] + 1) % 4"])
def test_numbers_without_a_bound_are_refused(unit: str) -> None:
    text = CLUSTERS.format(dims="batch, key", score="0", visible="k in chosen").replace("kc[k] % groups", unit)
    with pytest.raises(SpecError, match="below a bound"):
        compile_attention(text)


# --- families of selections, selections among queries -----------------------------------------------------------------

FAMILIES = {
    "of queries": """pattern p(topk: int = 3)
    align   end
    select near[c in 0 .. 3]
        score  dot(q, k) * (c + 1) - c * k
        from   k <= q
        keep   rank < topk - c
    visible k in near[0] or k in near[2] and q > 4
""",
    "of units": """pattern p(topk: int = 2)
    align   end
    select near[c in 1 .. 3]
        per    a = q // 4
        over   b = k // 3
        score  dot(mean(a.q), mean(b.k)) / c
        keep   rank < topk * c
    branch one[c in 1 .. 3]
        visible k in near[c] and k <= q
    combine one[1] + one[2] * near[2].size
""",
    "of heads": """pattern p(topk: int = 5)
    align   end
    input   mu: real[head, groups, dk]
    select given[c in 0 .. groups]
        per    head
        score  dot(k, mu[c])
        keep   rank < topk
    branch one[c in 0 .. groups]
        visible k in given[c] and k <= q
    combine sum(one[c] for c in 0 .. groups)
""",
    "of queries chosen": """pattern p(topk: int = 5)
    align   end
    select asked[c in 0 .. 2]
        per    head
        over   q
        score  dot(q, q) * (1 - 2 * c)
        from   q % 3 != c
        keep   rank < topk
    branch one[c in 0 .. 2]
        visible q in asked[c] and k <= q
    combine one[0] - one[1]
""",
    "of shares of queries": """pattern p(p: real = 0.6)
    align   end
    select asked
        per    batch
        over   q
        score  softmax(sum(dot(q, k[0]) for head in heads))
        keep   mass < p
    visible q in asked and k <= q
""",
    "of ranges of each query's own": """pattern p(topk: int = 3)
    align   end
    select near[c in 0 .. 2]
        over   i in q // 3 - 1 .. min(q // 2, 9 - q // 4)
        covers k == i or k == q - i
        score  dot(q, k[0]) * i + (i - 2) * (i - 2)
        keep   rank < topk
    visible k in near[0] or k in near[1] and near[0].size < 3
""",
    "in stages": """pattern p(topk: int = 8)
    align   end
    select stage[s in 0 .. 3]
        per    a = q // 4
        over   b = k // 2
        score  dot(mean(a.q), mean(b.k)) * (1 - 2 * (s % 2))
        from   b.start <= a.end and (s == 0 or b in stage[s - 1])
        keep   rank < topk // 2 ** s
    visible k in stage[2] and k <= q
""",
    "in stages of pairs": """pattern p(topk: int = 30)
    align   end
    select stage[s in 0 .. 2]
        per    head
        over   q, b = k // 2
        score  dot(q, mean(b.k)) * (1 - 2 * s)
        from   s == 0 or b in stage[s - 1]
        keep   rank < topk // (s + 1)
    visible k in stage[1]
""",
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("n_q", "n_k"), [(13, 13), (5, 13)])
def test_families(name: str, n_q: int, n_k: int) -> None:
    attend = compile_attention(FAMILIES[name])
    inputs = {"mu": real(HEADS, 3, WIDTH)} if name == "of heads" else {}
    check(attend, draw_qkv(n_q, n_k), inputs)


def test_a_cyclic_family() -> None:
    text = FAMILIES["in stages"].replace("stage[s - 1]", "stage[1 - s]").replace("s in 0 .. 3", "s in 0 .. 2")
    text = text.replace("stage[2]", "stage[1]").replace("s == 0 or ", "")
    with pytest.raises(SpecError, match=r"in a cycle: `stage\[1\]` → `stage\[0\]` → `stage\[1\]`"):
        compile_attention(text)
    with pytest.raises(SpecError, match="in a cycle"):
        compile_attention(FAMILIES["in stages"].replace("stage[s - 1]", "stage[s]"))


def test_the_evaluator_detects_the_cycle() -> None:
    text = FAMILIES["in stages"].replace("s == 0 or b in stage[s - 1]", "s == 0 or b in stage[s]")
    bound = bind(load_program(SourceFile("p.attn", text), lambda name, asker: None), {})
    call = Evaluator(bound, queries=6, keys=6, dk=1, dv=1)
    ones = [[[[1.0]] * 6]]
    with pytest.raises(EvaluationError, match="depends on itself"):
        call.attend(ones, ones, ones)


@pytest.mark.parametrize("member", ["3", "0 - 1"])
def test_a_member_out_of_range(member: str) -> None:
    text = FAMILIES["in stages"].replace("k in stage[2]", f"k in stage[{member}]")
    with pytest.raises(SpecError, match="other than 0 to 2"):
        compile_attention(text)


def test_a_family_sized_by_a_call_cannot_read_itself() -> None:
    text = FAMILIES["in stages"].replace("s in 0 .. 3", "s in 0 .. heads").replace("k in stage[2]", "k in stage[1]")
    with pytest.raises(SpecError, match="whose range depends on sizes"):
        compile_attention(text)


def test_members_share_their_range() -> None:
    text = FAMILIES["of ranges of each query's own"].replace("min(q // 2, 9 - q // 4)", "q // 2 + c")
    with pytest.raises(SpecError, match="differs from member to member"):
        compile_attention(text)


def test_rows_of_a_family_are_stacked() -> None:
    attend = compile_attention(FAMILIES["of units"])
    selected = attend.chosen(*draw_qkv(13))["near"]
    assert selected.shape == (2, HEADS, 2 * 4, 5)


# --- training steps ---------------------------------------------------------------------------------------------------


def inputs_of_hashes() -> Inputs:
    ids = torch.randint(0, 9, (2, 1, 1, 40))
    return {"hq": ids[0].expand(1, 2, 40), "hk": ids[1], "sample": torch.randint(0, 40, (1, 1, 6))}


def inputs_of_clusters() -> Inputs:
    return {"qc": torch.randint(0, 4, (1, 2, 40)), "kc": torch.randint(0, 5, (1, 1, 40))}


def inputs_of_centroids() -> Inputs:
    mu, keys, values = torch.randn(2, 3, 8), torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 8)
    return {"mu": mu, "memory_k": keys, "memory_v": values}


STEPS: list[tuple[str, Inputs, Any]] = [
    ("xattention", {"block": 8, "stride": 4, "p": 0.5}, dict),
    ("biformer", {"height": 8, "width": 5, "regions": 3, "topk": 2}, dict),
    ("svg2", {"query_clusters": 4, "key_clusters": 5, "p": 0.4}, inputs_of_clusters),
    ("hyper_attention", {"block": 8}, inputs_of_hashes),
    ("routing_transformer", {"size": 9}, inputs_of_centroids),
]


@pytest.mark.parametrize(("name", "params", "draw"), STEPS, ids=lambda x: x if isinstance(x, str) else "")
def test_fifty_steps_reuse_one_plan(name: str, params: Inputs, draw: Any, tmp_path: Path) -> None:
    """A training step plans once for its sizes; later steps have new clusters, hashes and selections."""
    attend = compile_attention(name, **params)

    def step() -> bytes:
        q, k, v = (torch.randn(1, h, 40, 8, requires_grad=True) for h in (2, 1, 1))
        out = attend(q, k, v, **draw())
        out.sum().backward()
        return bytes(out.detach().numpy().tobytes())

    step()
    with profile(activities=[ProfilerActivity.CPU]) as later_steps:
        outs = {step() for _ in range(50)}
    later_steps.export_chrome_trace(str(tmp_path / "trace.json"))
    assert PLANNING not in (tmp_path / "trace.json").read_text(encoding="utf-8")
    assert len(outs) == 50


def test_plans_name_schedules_of_branches() -> None:
    assert compile_attention("svg2").plan(64, heads=2).schedule == "gathered queries"
    assert compile_attention("biformer", height=8, width=8).plan(64, heads=2).schedule == "gathered queries"
    assert compile_attention("token_sparse").plan(128, heads=2).schedule == "gathered tokens"
    sample = torch.zeros(1, 2, 6, dtype=torch.long)
    plan = compile_attention("hyper_attention", block=8).plan(64, heads=2, sample=sample)
    schedules = {name: branch.schedule for name, branch in plan.branches or ()}
    assert schedules == {"sorted": "gathered queries", "rest": "chosen tiles"}
    assert "tokens are sorted by `hq` in every call" in str(plan)


# --- families over a selection ----------------------------------------------------------------------------------------

SPANS = """pattern spans(near: int = 1, topk: int = 2, back: int = 1)
    align   end
    input   search: real[batch, head, query, dk]
    let anchor(i) = q - (i * i - 1)
    select spans
        over   i in near + 1 .. {last}
        covers anchor(i) - back * (isqrt(q) + 1) <= k <= anchor(i)
        score  dot(search[q], k[anchor(i)])
        from   anchor(i) >= 0
        keep   rank < topk
    visible k <= q
    branch alone
        visible q - k < 4
    branch read[s in spans]
        visible q - k < 4 or k in s
    {combine}
"""
COMBINED = [
    "let whole = sum(exp(s.score) for s in spans)\n"
    "    combine sum(exp(s.score) * read[s] for s in spans) / whole if spans.size > 0 else alone",
    "combine sum(read[s] * (s + spans.size) for s in spans if s > 2) + alone",
    "combine mean(merge(read[s], alone) for s in spans)",
]


LAST = ["isqrt(keys) + 2", "isqrt(q + 1) + 1"]
"""The end of the range, as a value for all queries or for each query."""


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("combine", COMBINED)
@pytest.mark.parametrize(("n_q", "n_k"), [(17, 17), (6, 17)])
def test_a_branch_for_each_selected_span(combine: str, last: str, n_q: int, n_k: int) -> None:
    attend = compile_attention(SPANS.format(combine=combine, last=last))
    search = real(2, HEADS, n_q, WIDTH).requires_grad_()
    qkv = draw_qkv(n_q, n_k)
    check(attend, qkv, {"search": search.detach()})
    outs = [run(*qkv, search=search) for run in (attend, attend.reference)]
    ours, theirs = (
        torch.autograd.grad(out.square().sum(), search, allow_unused=True, materialize_grads=True)[0] for out in outs
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("last", LAST)
def test_decode_with_selected_spans(last: str) -> None:
    attend = compile_attention(SPANS.format(combine=COMBINED[0], last=last))
    q, k, v = draw_qkv(18)
    search = real(2, HEADS, 18, WIDTH)
    out = attend(q, k, v, search=search)
    for n in (1, 3):
        step = attend.decode(q[:, :, -n:], k, v, kv_len=18, search=search[:, :, -n:])
        torch.testing.assert_close(step, out[:, :, -n:])
    with pytest.raises(UnsupportedError, match="the selections of other rows"):
        compile_attention(FAMILIES["of queries"]).decode(q[:, :, -1:], k, v, kv_len=18)


def test_a_step_with_selected_spans_plans_nothing(tmp_path: Path) -> None:
    attend = compile_attention(SPANS.format(combine=COMBINED[0], last=LAST[1]))
    assert {b.schedule for name, b in attend.plan(40, heads=2).branches or () if name != "alone"} == {"gathered tokens"}

    def step() -> None:
        q, k, v = (torch.randn(1, h, 40, 8, requires_grad=True) for h in (2, 1, 1))
        torch.autograd.grad(attend(q, k, v, search=torch.randn(1, 2, 40, 8)).sum(), (q, k, v))

    step()
    with profile(activities=[ProfilerActivity.CPU]) as later_steps:
        for _ in range(5):
            step()
    later_steps.export_chrome_trace(str(tmp_path / "trace.json"))
    assert PLANNING not in (tmp_path / "trace.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "made", [Made("x", "ranks"), Made("x", "order"), Made("x", "starts", 5), Made("x", "ranks", 5)]
)
@pytest.mark.parametrize("real", [False, True])
def test_arrays_and_tensors_sort_alike(made: Made, real: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randint(-9, 9, (2, 3, 40), generator=draw)
    x = x / 2 if real else x
    assert sorted_array(x.numpy(), made).tolist() == sorted_by(x, made).tolist()
