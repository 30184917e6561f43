"""Routing by anchors, predicted maps, buckets, routers and noise against references (`reference/`, a file for each)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import UnsupportedError, compile_attention
from attnc.runtime.library import ModuleLoader, library_files
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.meaning.evaluate import Evaluator
from attnc.spec.reading.text import decode
from reference.flash_moba import mixed_keys
from reference.rectified import critical_blocks, gainful_blocks
from routing_cases import (
    BY_NAME,
    DK,
    HEADS,
    KV_HEADS,
    Case,
    Inputs,
    leaves_of,
    real,
    same_as_reference,
    seen_as_in_reference,
    seen_by,
)
from routing_references import blocks_of, means, moba
from score_references import products, scale_of

pytestmark = pytest.mark.usefixtures("one_thread")


def beside(block: int) -> Callable[[int, int], Inputs]:
    """Blocks beside each other in a row of two, of more blocks than there are."""

    def draw(n_q: int, n_k: int) -> Inputs:
        rows, cols = torch.arange(blocks_of(n_q, block) + 1), torch.arange(blocks_of(n_k, block) + 2)
        return {"neighbour": rows[:, None] // 2 == cols // 2}

    return draw


def searches(n_q: int, n_k: int) -> Inputs:
    return {"search": real(2, HEADS, n_q, DK)}


def predicted(n_q: int, n_k: int) -> Inputs:
    return {"coef": real(2, HEADS, n_q, 3).softmax(-1), "basis": real(n_k, 3).abs()}


def buckets(count: int) -> Callable[[int, int], Inputs]:
    def draw(n_q: int, n_k: int) -> Inputs:
        return {
            "merged": torch.randint(1, 9, (2, KV_HEADS, n_k)),
            "qbucket": torch.randint(0, count, (2, HEADS, n_q)),
            "kbucket": torch.randint(0, count, (2, KV_HEADS, n_k)),
        }

    return draw


def requests(n_q: int, n_k: int) -> Inputs:
    return {"full": torch.tensor([True, False])}


def filters(width: int) -> Callable[[int, int], Inputs]:
    return lambda n_q, n_k: {"filter": real(KV_HEADS, width, DK)}


def noise(much: float) -> Callable[[int, int], Inputs]:
    return lambda n_q, n_k: {"place": torch.arange(n_k) + much * real(2, n_k)}


def pictures(n_q: int, n_k: int) -> Inputs:
    """Text, a picture, text: other places for each batch entry."""
    at = torch.arange(n_k)
    vision = torch.stack([(at % 11 > 3) & (at % 11 < 8), (at >= 5) & (at < 20)])
    return {"vision": vision, "visuals": vision.cumsum(1)}


WINDOWS: dict[str, Any] = {"window": [6, 3, 0, 9], "sinks": [1, 4, 2, 0]}

CASES = [
    *[
        Case("rectified", n, n, {"block": 8, "drop": drop, "p": p, "first": first}, beside(8))
        for n, drop, p, first in ((40, 0.75, 0.3, 0), (43, 0.5, 0.6, 2), (61, 1, 0, 0), (9, 0.1, 0.9, 1))
    ],
    *[
        Case("superlinear", n_q, n_k, {"near": near, "topk": topk, "back": back, "ahead": ahead}, searches)
        for n_q, n_k, near, topk, back, ahead in (
            (41, 41, 1, 2, 0.5, 0.25),
            (7, 41, 1, 2, 1, 0),
            (37, 37, 2, 1, 0.2, 0.3),
            (53, 53, 1, 9, 0, 0),
            (3, 3, 1, 2, 1, 0),
        )
    ],
    *[Case("sparsifiner", n, n, {"rho": rho}, predicted) for n, rho in ((37, 0.25), (17, 0.1), (9, 1), (33, 0))],
    *[Case("temp_cache", n_q, n_k, {}, buckets(count)) for n_q, n_k, count in ((37, 37, 4), (11, 45, 3), (19, 7, 2))],
    *[
        Case("flux", n_q, n_k, {"sinks": sinks, "window": window, "block": block}, requests)
        for n_q, n_k, sinks, window, block in ((37, 37, 4, 8, 4), (11, 45, 0, 6, 3), (21, 21, 5, 7, 1))
    ],
    *[
        Case("flash_moba", n_q, n_k, {"block": block, "topk": topk}, filters(width))
        for n_q, n_k, block, topk, width in ((37, 37, 8, 3, 3), (11, 37, 4, 4, 5), (5, 5, 8, 3, 1), (61, 61, 8, 1, 4))
    ],
    *[
        Case("ssa_random", n_q, n_k, {"window": w}, noise(much))
        for n_q, n_k, w, much in ((37, 37, 8, 3.0), (11, 45, 4, 99.0))
    ],
    Case("ssa_random", 61, 61, {"window": 16}, noise(0.0)),
    *[
        Case("mminference_boundary", n_q, n_k, {**WINDOWS, "split_keys": split}, pictures)
        for n_q, n_k in ((37, 37), (13, 41), (5, 5))
        for split in (True, False)
    ],
]
MEANT = [case for case in CASES if case.n_k <= 43 and case.params.get("topk") != 9]
BRANCHES = {"rectified", "superlinear"}


def test_every_one_has_a_case() -> None:
    assert {case.name for case in CASES} == set(BY_NAME)


FIXED = ["coef", "basis", "place"]
"""Inputs that are only chosen by."""


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_output_and_gradients(case: Case, backend: str) -> None:
    same_as_reference(case, backend, fixed=FIXED)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_output_and_gradients_in_single_precision(case: Case) -> None:
    (q, k, v), inputs = case.drawn()
    exact = leaves_of([q, k, v], {name: x for name, x in inputs.items() if name not in FIXED})
    wanted = case.reference(q, k, v, inputs)[1]
    attend = case.compiled()
    given: Inputs = {name: _single(x) for name, x in inputs.items()}
    near = [_single(x) for x in (q, k, v)]
    found = attend(near[0], near[1], near[2], **given)
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    leaves = leaves_of(near, {name: x for name, x in given.items() if name not in FIXED})
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)
    theirs = torch.autograd.grad((wanted * weights).sum(), exact, allow_unused=True, materialize_grads=True)
    ours = torch.autograd.grad((found * weights.float()).sum(), leaves, allow_unused=True, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def _single(x: Tensor) -> Tensor:
    """Real numbers that decide about no equals keep their order in fp32."""
    return x.detach().float().requires_grad_() if x.is_floating_point() else x


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in BRANCHES], ids=repr)
def test_what_is_seen(case: Case) -> None:
    seen_as_in_reference(case, *case.drawn())


@pytest.mark.parametrize("case", MEANT, ids=repr)
def test_the_language_means_it(case: Case) -> None:
    """The evaluator, which computes a row at a time from the text."""
    (q, k, v), inputs = case.drawn()
    wanted = case.reference(q, k, v, inputs)[1]
    file = library_files()[case.name]
    program = load_program(decode(file.read_bytes(), file.name), ModuleLoader(None), case.name)
    evaluator = Evaluator(
        bind(program, case.params),
        queries=case.n_q,
        keys=case.n_k,
        heads=HEADS,
        kv_heads=KV_HEADS,
        inputs={name: x.tolist() for name, x in inputs.items()},
        dk=DK,
        dv=v.shape[-1],
    )
    out, _ = evaluator.attend(q.tolist(), k.tolist(), v.tolist())
    torch.testing.assert_close(torch.tensor(out, dtype=torch.float64), wanted, rtol=1e-9, atol=1e-9)


# --- choices by themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.name == "rectified"], ids=repr)
def test_what_rectified_chooses(case: Case) -> None:
    (q, k, v), inputs = case.drawn()
    block, n = case.params["block"], blocks_of(case.n_q, case.params["block"])
    unit = torch.arange(case.n_q) // block
    p = torch.softmax(scale_of(q) * products(means(q, unit, n), means(k, unit, n)), -1)
    own = {name: case.params[name] for name in ("drop", "first")}
    chosen = case.compiled().chosen(q, k, v, **inputs)
    assert chosen.keys() == {"critical", "gainful"}
    assert torch.equal(chosen["critical"], critical_blocks(p, **inputs, share=case.params["p"], **own))
    assert torch.equal(chosen["gainful"], gainful_blocks(q, k, block))


@pytest.mark.parametrize("case", [case for case in CASES if case.name == "superlinear"], ids=repr)
def test_what_superlinear_reads(case: Case) -> None:
    """A query sees its window and the spans of its anchors: the union of what its reads have."""
    (q, k, v), inputs = case.drawn()
    seen, _ = case.reference(q, k, v, inputs)
    grads = []
    for b in range(2):
        values = v.detach().clone().requires_grad_()
        out = case.compiled()(q, k, values, **inputs)
        rows = [torch.autograd.grad(out[b, 0, row].sum(), values, retain_graph=True)[0] for row in range(case.n_q)]
        grads.append(torch.stack([row[b, 0].abs().sum(-1) > 0 for row in rows]))
    assert torch.equal(torch.stack(grads), seen[:, 0])


# --- where one thing is at stake --------------------------------------------------------------------------------------


def test_flash_moba_without_a_filter_is_moba() -> None:
    q, k, v = real(2, HEADS, 37, DK), real(2, KV_HEADS, 37, DK), real(2, KV_HEADS, 37, 3)
    attend = compile_attention("flash_moba", block=8, topk=3)
    _, wanted = moba(q, k, v, block=8, topk=3)
    torch.testing.assert_close(attend(q, k, v, filter=torch.zeros(KV_HEADS, 3, DK, dtype=torch.float64)), wanted)
    mixed = mixed_keys(k, filter := real(KV_HEADS, 3, DK))
    torch.testing.assert_close(attend(q, k, v, filter=filter), compile_attention("moba", block=8, topk=3)(q, mixed, v))


def test_flash_moba_gathers_queries() -> None:
    """The mixed keys are made once, and then it runs as MoBA does."""
    for device in ("cpu", "cuda"):
        assert compile_attention("flash_moba").plan(2048, heads=4, device=device).schedule == "gathered queries"


def test_a_module_learns_the_filter() -> None:
    module = compile_attention("flash_moba", block=8, topk=2).module(
        heads=HEADS, kv_head=KV_HEADS, dk=DK, dv=3, width=3
    )
    q, k, v = (torch.randn(1, heads, 20, d) for heads, d in ((HEADS, DK), (KV_HEADS, DK), (KV_HEADS, 3)))
    module(q, k, v).square().sum().backward()
    (found,) = [parameter.grad for parameter in module.parameters()]
    assert found is not None
    assert bool((found != 0).any())


def test_a_key_merged_twice_is_two_keys() -> None:
    q, k, v = real(1, 2, 5, DK), real(1, 2, 9, DK), real(1, 2, 9, 3)
    times = torch.tensor([1, 2, 1, 3, 1, 1, 2, 1, 1])
    alone: Inputs = {
        "qbucket": torch.zeros(1, 2, 5, dtype=torch.long),
        "kbucket": torch.zeros(1, 2, 9, dtype=torch.long),
    }
    found = compile_attention("temp_cache")(q, k, v, merged=times.expand(1, 2, 9), **alone)
    many = [x.repeat_interleave(times, 2) for x in (k, v)]
    torch.testing.assert_close(found, compile_attention("full")(q, *many))


@pytest.mark.parametrize("case", [case for case in CASES if case.name == "flux"], ids=repr)
def test_full_requests_are_causal(case: Case) -> None:
    (q, k, v), _ = case.drawn()
    seen = seen_by(case, [q, k, v], {"full": torch.tensor([True, True])})
    assert bool((seen == compile_attention("causal").mask(case.n_q, case.n_k)).all())


def test_without_noise_random_windows_are_blocks() -> None:
    (q, k, v), _ = (case := Case("ssa_random", 40, 40, {"window": 8})).drawn()
    still = {"place": torch.arange(40.0).expand(2, 40)}
    assert bool((seen_by(case, [q, k, v], still).sum(-1) == torch.arange(40) % 8 + 1).all())


@pytest.mark.parametrize("name", ["flux", "flash_moba", "superlinear", "temp_cache", "mminference_boundary"])
def test_decoding_is_the_last_row(name: str) -> None:
    case = next(case for case in CASES if case.name == name and case.n_q == case.n_k)
    (q, k, v), inputs = case.drawn()
    attend = case.compiled()
    whole = attend(q, k, v, **inputs)
    last = {name: x[:, :, -1:] if name in ("qbucket", "search") else x for name, x in inputs.items()}
    with torch.no_grad():
        found = attend.decode(q[:, :, -1:], k, v, kv_len=case.n_k, **last)
    torch.testing.assert_close(found, whole[:, :, -1:], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["rectified", "ssa_random"])
def test_what_is_not_served(name: str) -> None:
    """Films, whose blocks of queries choose together, and orders that are drawn for training."""
    case = next(case for case in CASES if case.name == name and case.n_q == case.n_k)
    (q, k, v), inputs = case.drawn()
    with pytest.raises(UnsupportedError, match=name):
        case.compiled().decode(q[:, :, -1:], k, v, kv_len=case.n_k, **inputs)


@pytest.mark.parametrize("name", sorted({*BY_NAME} - {"superlinear"}))
def test_it_is_simulated_as_it_is_set(name: str) -> None:
    """With its defaults; of branches for each place that a row chose nothing is said yet."""
    attend = compile_attention(name)
    case = next(case for case in CASES if case.name == name)
    own = {"rectified": beside(128)(1024, 1024), "flash_moba": {"filter": torch.zeros(KV_HEADS, 3, 64)}}
    inputs = own.get(name) or case.inputs(1024, 1024)
    found = attend.simulate(1024, heads=HEADS, kv_heads=KV_HEADS, head_dim=64, device="cpu", batch=2, **inputs)
    assert found.rungs[0].name == "element"
    assert found.predicted_ms > 0


def test_what_is_read_span_by_span_is_not_simulated() -> None:
    with pytest.raises(UnsupportedError, match=r"`read` of `superlinear` .* not simulated yet"):
        compile_attention("superlinear").simulate(
            1024, heads=4, head_dim=64, device="cpu", search=torch.zeros(1, 4, 1024, 64)
        )
