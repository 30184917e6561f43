"""The routing patterns against references written from their papers (`reference.routing`).

Selections are compared too, not only outputs: two different selections may give nearly equal outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import Attention, compile_attention
from cases.case import Case, inputs_of, real
from cases.routing import (
    DK,
    DV,
    HEADS,
    KV_HEADS,
    REFERENCES,
    ROUTED,
    VIDEO,
    Inputs,
    Routed,
    hybrid,
    indexer,
    key_bias,
    maps_of,
    native_gate,
    seer_gate,
    seer_gates,
    vmoba,
    vmoba_threshold,
)
from cases.staged_routing import HIP
from reference.routing import (
    hybrid_forcing_choice,
    native_sparse_choice,
    tiles_of,
    vsa_choice,
)
from routing_calls import seen_as_in_reference, seen_by

pytestmark = pytest.mark.usefixtures("one_thread")


BRANCHES = {"native_sparse", "vsa", "hybrid_forcing"}


def choices_agree(case: Routed, qkv: list[Tensor], inputs: Inputs) -> None:
    """Check that the selections of a pattern with several branches equal the reference's."""
    attend = case.compiled()
    q, k, v = qkv
    params = dict(case.params)
    if case.name == "native_sparse":
        selections = {"important": native_sparse_choice(q, k, block=params["block"], topk=params["topk"])}
    else:
        unit, units = tiles_of((params["frames"], params["height"], params["width"]), params["tile"])
        selections = {"chosen": vsa_choice(q, k, unit=unit, units=units, density=params["density"])}
    chosen = attend.chosen(q, k, v, **inputs)
    assert chosen.keys() == selections.keys()
    for name, wanted in selections.items():
        assert torch.equal(chosen[name], wanted)


@pytest.mark.parametrize("case", [case for case in ROUTED if case.name in BRANCHES], ids=repr)
def test_selections_of_branches(case: Routed) -> None:
    choices_agree(case, *case.drawn())


# --- equal scores -----------------------------------------------------------------------------------------------------


def small(x: Tensor) -> Tensor:
    """Round to -1, 0 or 1: sums of products of such numbers are exact, and many of them are equal."""
    return x.clamp(-1, 1).round()


EXACT = [
    Routed("hip", 77, 77, HIP),
    Routed("hip", 37, 93, HIP),
    *[Routed("moba", n_q, 39, {"block": 4, "topk": 4}) for n_q in (39, 11)],
    *[Routed("minference_blocks", n_q, 39, {"block": 4, "topk": 3}) for n_q in (39, 11)],
    Routed("landmark_retrieval", 39, 39, {"block": 3, "topk": 3}),
    Routed("deepseek_sparse", 33, 33, {"topk": 5}, indexer),
    Routed("dynamic_mask", 33, 33, {"keys_kept": 5}, key_bias),
    Routed("seer_decode", 37, 37, {"block": 8, "budget": 16}, seer_gate),
    vmoba(2, 2, frames=4, height=4, width=4, chunk=[2, 2, 2]),
]
ROUNDED = [
    Routed("seer", 37, 37, {"block": 8, "threshold": 0.25, "dense_rows": 1}, seer_gates),
    Routed("anchor", 53, 53, {"block": 4, "group": 2, "theta": 0}),
    Routed("minference_vertical_slash", 150, 150, {"columns": 40, "slashes": 110, "block": 16, "probe": 1}),
    Routed("minference_vertical_slash", 43, 150, {"columns": 2, "slashes": 73, "block": 16, "probe": 1}),
    Routed("token_sparse", 17, 17, {"window": 1, "pool": 1, "tau": 0.2}),
    vmoba_threshold(0.25, 2),
]
"""Patterns with rounded scores: scores are equal only where all of their terms are 0."""


@pytest.mark.parametrize("keys", [1, 0], ids=["small numbers", "no keys"])
@pytest.mark.parametrize("case", EXACT, ids=repr)
def test_ties_go_to_the_earlier_candidate(case: Routed, keys: int) -> None:
    (q, k, v), inputs = case.drawn()
    q, k, inputs = small(q), keys * small(k), {name: small(x) for name, x in inputs.items()}
    seen_as_in_reference(case, [q, k, v], inputs)


@pytest.mark.parametrize("case", [*EXACT, *ROUNDED], ids=repr)
def test_all_equal_scores_select_the_earlier_candidates(case: Routed) -> None:
    (q, k, v), inputs = case.drawn()
    q, k, inputs = torch.zeros_like(q), torch.zeros_like(k), {name: torch.zeros_like(x) for name, x in inputs.items()}
    seen_as_in_reference(case, [q, k, v], inputs)


@pytest.mark.parametrize("case", [case for case in ROUTED if case.name in ("native_sparse", "vsa")], ids=repr)
def test_ties_of_branches_go_to_the_earlier_block(case: Routed) -> None:
    (q, k, v), inputs = case.drawn()
    choices_agree(case, [q, torch.zeros_like(k), v], inputs)


def test_equal_keys_keep_the_own_chunk() -> None:
    """No chunk has a share if no score is above the least: the own chunk is selected, and at least one more.

    Keys are 0, since sums of products of other keys are rounded differently from chunk to chunk on some processors.
    """
    case = vmoba_threshold(0.25, 2)
    attend = case.compiled()
    (q, k, v), _ = case.drawn()
    k = torch.zeros_like(k)
    seen = seen_by(case, [q, k, v], {})
    assert bool(seen.diagonal(dim1=-2, dim2=-1).all())
    assert bool((seen.sum(-1) > 2 * 2 * 3).all())
    assert not bool(attend(q, k, v).isnan().any())


# --- causality --------------------------------------------------------------------------------------------------------

CAUSAL: dict[str, tuple[dict[str, Any], Callable[[int, int], Inputs]]] = {
    "moba": ({"block": 16, "topk": 3}, lambda n_q, n_k: {}),
    "native_sparse": ({"block": 8, "topk": 4, "window": 20}, native_gate),
    "deepseek_sparse": ({"topk": 24}, indexer),
    "seer_decode": ({"block": 8, "budget": 24}, seer_gate),
    "dynamic_mask": ({"keys_kept": 24}, key_bias),
}
TOKENS = {"native_sparse": 1, "deepseek_sparse": 1, "seer_decode": 2, "dynamic_mask": 2}
"""The dimension of a pattern's inputs that counts tokens."""


def with_other_futures(name: str) -> list[tuple[int, list[Tensor], Inputs, list[Tensor], Inputs]]:
    """Return numbers t, arguments of a call of 200 tokens, and arguments that differ from token t on."""
    n, (_, inputs) = 200, CAUSAL[name]

    def drawn() -> tuple[list[Tensor], Inputs]:
        qkv = [torch.randn(2, heads, n, 16) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        return qkv, {key: x.float() for key, x in inputs(n, n).items()}

    def changed(t: int, before: Tensor, after: Tensor, dim: int) -> Tensor:
        return torch.cat([before.narrow(dim, 0, t), after.narrow(dim, t, n - t)], dim)

    pairs_of_calls = []
    for _ in range(2):
        (qkv, first_inputs), (others, other) = drawn(), drawn()
        for t in (1, 7, 16, 63, 100, 128, 199):
            then = [changed(t, x, y, 2) for x, y in zip(qkv, others, strict=True)]
            inputs_then = {key: changed(t, x, other[key], TOKENS[name]) for key, x in first_inputs.items()}
            pairs_of_calls.append((t, qkv, first_inputs, then, inputs_then))
    return pairs_of_calls


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_change_no_bit(name: str, backend: str) -> None:
    attend = compile_attention(name, **CAUSAL[name][0])
    run: Any = attend if backend == "cpu" else attend.reference
    for t, qkv, inputs, then, inputs_then in with_other_futures(name):
        before, after = run(*qkv, **inputs), run(*then, **inputs_then)
        torch.testing.assert_close(after[:, :, :t], before[:, :, :t])
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t:], before[:, :, t:])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_last_key_that_only_its_own_query_sees_changes_no_bit(backend: str) -> None:
    """Rows of a tile share the keys that are gathered for it."""
    attend = compile_attention("dynamic_mask", keys_kept=24)
    run: Any = attend if backend == "cpu" else attend.reference
    for _ in range(6):
        q, k, v = (torch.randn(2, heads, 200, 16) for heads in (HEADS, KV_HEADS, KV_HEADS))
        bias = torch.randn(2, KV_HEADS, 200)
        outs = []
        for last in (-9.0, 9.0):
            bias[..., -1] = last
            outs.append(run(q, k, v, bias=bias)[:, :, :-1])
        torch.testing.assert_close(*outs)
        assert torch.equal(*outs)


@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_change_no_selection(name: str) -> None:
    attend = compile_attention(name, **CAUSAL[name][0])
    for t, (q, k, v), inputs, (other_q, other_k, other_v), inputs_then in with_other_futures(name):
        before = attend.chosen(q, k, v, **inputs)
        after = attend.chosen(other_q, other_k, other_v, **inputs_then)
        assert before.keys() == after.keys()
        for key, chosen in before.items():
            assert torch.equal(after[key][..., :t, :], chosen[..., :t, :])


# --- smallest sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["moba", "native_sparse"])
@pytest.mark.parametrize(("batch", "n"), [(2, 1), (0, 1), (0, 19), (2, 0), (2, 19)])
def test_few_tokens_and_no_sequence(name: str, batch: int, n: int) -> None:
    params: dict[str, Any] = {"block": 8, "topk": 3} | ({"window": 4} if name == "native_sparse" else {})
    attend = compile_attention(name, **params)
    q, k, v = real(batch, HEADS, n, DK), real(batch, KV_HEADS, n, DK), real(batch, KV_HEADS, n, DV)
    inputs: Inputs = {"gate": torch.rand(batch, n, HEADS, 3, dtype=torch.float64)} if name == "native_sparse" else {}
    calls: list[Any] = [attend, attend.reference]
    for run in calls:
        out = run(q, k, v, **inputs)
        assert out.shape == (batch, HEADS, n, DV)
        if batch and n:
            _, wanted = REFERENCES[name](q, k, v, **inputs, **params)
            torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-11)


# --- single properties ------------------------------------------------------------------------------------------------


def test_vmoba_counts_the_own_chunk() -> None:
    """k · S pairs of a query and a chunk are selected per head, the own chunk of every query among them."""
    case = Routed("vmoba", 105, 105, {**VIDEO, "chunk": [2, 2, 3], "topk": 2, "layer": 2})
    seen_as_in_reference(case, *case.drawn())


def test_a_map_of_blocks_that_do_not_divide_the_length() -> None:
    """A map of blocks of 8 for 17 tokens has blocks of 8, 8 and 1, as blocks of 128 for 130 tokens have 128 and 2."""
    case = Routed("sparse_d", 17, 17, {"block": 8}, maps_of(8))
    seen_as_in_reference(case, *case.drawn())


def hybrid_call(case: Case) -> tuple[Attention, list[Tensor], Inputs]:
    """Return Hybrid Forcing and the arguments of a call; its output is compared in `test_every_file.py`."""
    operands = {name: x.detach() for name, x in case.operands().items()}
    return case.compiled(), [operands[name] for name in "qkv"], inputs_of(operands)


@pytest.mark.parametrize(("n_k", "block"), [(12, 4), (12, 3), (12, 5), (24, 6), (36, 4)])
def test_selections_of_hybrid_forcing_before_evictions(n_k: int, block: int) -> None:
    """The last chunk of 12 tokens selects in its own blocks."""
    attend, (q, k, v), inputs = hybrid_call(hybrid(12, n_k, block=block, local=10))
    chosen = attend.chosen(q, k, v, **inputs)
    assert chosen.keys() == {"chosen"}
    wanted = hybrid_forcing_choice(q, k, ratio=0.5, block=block)
    assert torch.equal(chosen["chosen"][:, :, -wanted.shape[2] :], wanted)


def test_hybrid_forcing_with_a_query_that_no_evicted_key_meets() -> None:
    """relu(q) is 0: the divisor is 1e-6, and the dividend a mean."""
    case = hybrid(12, 48, ratio=1)
    attend, (q, k, v), inputs = hybrid_call(case)
    q[:, :, 5] = -q[:, :, 5].abs()
    _, wanted = REFERENCES["hybrid_forcing"](q, k, v, **inputs, **case.params)
    torch.testing.assert_close(attend(q, k, v, **inputs), wanted, rtol=1e-5, atol=1e-5)
