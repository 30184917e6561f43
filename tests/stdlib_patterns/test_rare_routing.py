"""Routing by anchors, predicted maps, buckets, routers and noise against references (`reference/`, a file for each)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnc import UnsupportedError, compile_attention
from attnc.runtime.texts.library import ModuleLoader, library_files
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.meaning.evaluate import Evaluator
from attnc.spec.reading.source_text import decode
from cases.case import real
from cases.rare_routing import FIXED, RARE
from cases.routing import DK, HEADS, KV_HEADS, Inputs, Routed
from reference.attention import products, scale_of
from reference.flash_moba import mixed_keys
from reference.rectified import critical_blocks, gainful_blocks
from reference.routing import blocks_of, means, moba
from routing_calls import seen_by

pytestmark = pytest.mark.usefixtures("one_thread")


MEANT = [case for case in RARE if case.n_k <= 43 and case.params.get("topk") != 9]


def leaves_of(qkv: list[Tensor], inputs: Inputs) -> list[Tensor]:
    return [x.requires_grad_() for x in [*qkv, *inputs.values()] if x.is_floating_point()]


@pytest.mark.parametrize("case", RARE, ids=repr)
def test_output_and_gradients_in_single_precision(case: Routed) -> None:
    (q, k, v), inputs = case.drawn()
    exact = leaves_of([q, k, v], {name: x for name, x in inputs.items() if name not in FIXED})
    wanted = case.reference(q, k, v, inputs)[1]
    attend = case.compiled()
    narrow_inputs: Inputs = {name: _single(x) for name, x in inputs.items()}
    near = [_single(x) for x in (q, k, v)]
    actual = attend(near[0], near[1], near[2], **narrow_inputs)
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    leaves = leaves_of(near, {name: x for name, x in narrow_inputs.items() if name not in FIXED})
    torch.testing.assert_close(actual.double(), wanted, rtol=2e-5, atol=2e-5)
    theirs = torch.autograd.grad((wanted * weights).sum(), exact, allow_unused=True, materialize_grads=True)
    ours = torch.autograd.grad((actual * weights.float()).sum(), leaves, allow_unused=True, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def _single(x: Tensor) -> Tensor:
    """Cast to fp32; real numbers that decide no ties keep their order."""
    return x.detach().float().requires_grad_() if x.is_floating_point() else x


@pytest.mark.parametrize("case", MEANT, ids=repr)
def test_the_evaluator_agrees(case: Routed) -> None:
    """The evaluator computes a row at a time from the pattern's text."""
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


# --- selections alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in RARE if case.name == "rectified"], ids=repr)
def test_blocks_that_rectified_selects(case: Routed) -> None:
    (q, k, v), inputs = case.drawn()
    block, n = case.params["block"], blocks_of(case.n_q, case.params["block"])
    unit = torch.arange(case.n_q) // block
    p = torch.softmax(scale_of(q) * products(means(q, unit, n), means(k, unit, n)), -1)
    settings = {name: case.params[name] for name in ("drop", "first")}
    chosen = case.compiled().chosen(q, k, v, **inputs)
    assert chosen.keys() == {"critical", "gainful"}
    assert torch.equal(chosen["critical"], critical_blocks(p, **inputs, share=case.params["p"], **settings))
    assert torch.equal(chosen["gainful"], gainful_blocks(q, k, block))


@pytest.mark.parametrize("case", [case for case in RARE if case.name == "superlinear"], ids=repr)
def test_keys_that_superlinear_reads(case: Routed) -> None:
    """A query sees its window and the spans of its anchors: the union of the keys of its reads."""
    (q, k, v), inputs = case.drawn()
    seen, _ = case.reference(q, k, v, inputs)
    grads = []
    for b in range(2):
        values = v.detach().clone().requires_grad_()
        out = case.compiled()(q, k, values, **inputs)
        rows = [torch.autograd.grad(out[b, 0, row].sum(), values, retain_graph=True)[0] for row in range(case.n_q)]
        grads.append(torch.stack([row[b, 0].abs().sum(-1) > 0 for row in rows]))
    assert torch.equal(torch.stack(grads), seen[:, 0])


# --- single properties ------------------------------------------------------------------------------------------------


def test_flash_moba_without_a_filter_is_moba() -> None:
    q, k, v = real(2, HEADS, 37, DK), real(2, KV_HEADS, 37, DK), real(2, KV_HEADS, 37, 3)
    attend = compile_attention("flash_moba", block=8, topk=3)
    _, wanted = moba(q, k, v, block=8, topk=3)
    torch.testing.assert_close(attend(q, k, v, filter=torch.zeros(KV_HEADS, 3, DK, dtype=torch.float64)), wanted)
    mixed = mixed_keys(k, filter := real(KV_HEADS, 3, DK))
    torch.testing.assert_close(attend(q, k, v, filter=filter), compile_attention("moba", block=8, topk=3)(q, mixed, v))


def test_flash_moba_gathers_queries() -> None:
    """The mixed keys are computed once, and then the pattern runs as MoBA does."""
    for device in ("cpu", "cuda"):
        assert compile_attention("flash_moba").plan(2048, heads=4, device=device).schedule == "gathered queries"


def test_a_module_learns_the_filter() -> None:
    module = compile_attention("flash_moba", block=8, topk=2).module(
        heads=HEADS, kv_head=KV_HEADS, dk=DK, dv=3, width=3
    )
    q, k, v = (torch.randn(1, heads, 20, d) for heads, d in ((HEADS, DK), (KV_HEADS, DK), (KV_HEADS, 3)))
    module(q, k, v).square().sum().backward()
    (gradient,) = [parameter.grad for parameter in module.parameters()]
    assert gradient is not None
    assert bool((gradient != 0).any())


def test_a_key_merged_twice_is_two_keys() -> None:
    q, k, v = real(1, 2, 5, DK), real(1, 2, 9, DK), real(1, 2, 9, 3)
    times = torch.tensor([1, 2, 1, 3, 1, 1, 2, 1, 1])
    alone: Inputs = {
        "qbucket": torch.zeros(1, 2, 5, dtype=torch.long),
        "kbucket": torch.zeros(1, 2, 9, dtype=torch.long),
    }
    actual = compile_attention("temp_cache")(q, k, v, merged=times.expand(1, 2, 9), **alone)
    many = [x.repeat_interleave(times, 2) for x in (k, v)]
    torch.testing.assert_close(actual, compile_attention("full")(q, *many))


@pytest.mark.parametrize("case", [case for case in RARE if case.name == "flux"], ids=repr)
def test_full_requests_are_causal(case: Routed) -> None:
    (q, k, v), _ = case.drawn()
    seen = seen_by(case, [q, k, v], {"full": torch.tensor([True, True])})
    assert bool((seen == compile_attention("causal").mask(case.n_q, case.n_k)).all())


def test_without_noise_random_windows_are_blocks() -> None:
    (q, k, v), _ = (case := Routed("ssa_random", 40, 40, {"window": 8})).drawn()
    still = {"place": torch.arange(40.0).expand(2, 40)}
    assert bool((seen_by(case, [q, k, v], still).sum(-1) == torch.arange(40) % 8 + 1).all())


@pytest.mark.parametrize(
    "name", ["flux", "flash_moba", "superlinear", "sparsifiner", "temp_cache", "mminference_boundary"]
)
def test_decoding_is_the_last_row(name: str) -> None:
    case = next(case for case in RARE if case.name == name and case.n_q == case.n_k)
    (q, k, v), inputs = case.drawn()
    attend = case.compiled()
    whole = attend(q, k, v, **inputs)
    last = {name: x[:, :, -1:] if name in ("coef", "qbucket", "search") else x for name, x in inputs.items()}
    with torch.no_grad():
        actual = attend.decode(q[:, :, -1:], k, v, kv_len=case.n_k, **last)
    torch.testing.assert_close(actual, whole[:, :, -1:], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["rectified", "ssa_random"])
def test_patterns_without_decode(name: str) -> None:
    """Not served: videos, whose blocks of queries select together, and orders that are drawn for training."""
    case = next(case for case in RARE if case.name == name and case.n_q == case.n_k)
    (q, k, v), inputs = case.drawn()
    with pytest.raises(UnsupportedError, match=name):
        case.compiled().decode(q[:, :, -1:], k, v, kv_len=case.n_k, **inputs)


@pytest.mark.parametrize("name", sorted({case.name for case in RARE} - {"rectified", "superlinear"}))
def test_patterns_are_simulated_with_their_defaults(name: str) -> None:
    """Defaults are simulated; branches for each selected block are not simulated on a CPU yet."""
    attend = compile_attention(name)
    case = next(case for case in RARE if case.name == name)
    extra_inputs = {"flash_moba": {"filter": torch.zeros(KV_HEADS, 3, 64)}}
    inputs = extra_inputs.get(name) or case.inputs(1024, 1024)
    simulation = attend.simulate(1024, heads=HEADS, kv_heads=KV_HEADS, head_dim=64, device="cpu", batch=2, **inputs)
    assert simulation.rungs[0].name == "element"
    assert simulation.predicted_ms > 0


def test_reads_of_spans_are_not_simulated() -> None:
    with pytest.raises(UnsupportedError, match=r"`read` of `superlinear` .* cannot be simulated on a CPU yet"):
        compile_attention("superlinear").simulate(
            1024, heads=4, head_dim=64, device="cpu", search=torch.zeros(1, 4, 1024, 64)
        )


def test_a_length_without_anchors_is_simulated() -> None:
    """The search for the break-even length tries 64 tokens, where no span exists: it ended in a KeyError."""
    simulation = compile_attention("superlinear").simulate(
        64, heads=2, head_dim=64, device="h100", search=torch.zeros(1, 2, 64, 64)
    )
    assert simulation.predicted_ms > 0
