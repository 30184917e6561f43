"""The routing patterns against references written from their papers (tests/support/routing_references.py).

What is chosen is compared by itself, not only by what comes of it: two choices may give nearly one output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cluster_references
from attnc import Attention, compile_attention
from attnc.runtime.library import routing_names
from routing_cases import (
    BY_NAME,
    DK,
    DV,
    HEADS,
    KV_HEADS,
    REFERENCES,
    Case,
    Inputs,
    agree,
    leaves_of,
    real,
    same_as_reference,
    seen_as_in_reference,
    seen_by,
)
from routing_references import (
    blocks_of,
    hybrid_forcing_choice,
    native_sparse_choice,
    tiles_of,
    vsa_choice,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def native_gate(n_q: int, n_k: int) -> Inputs:
    return {"gate": torch.rand(2, n_q, HEADS, 3, dtype=torch.float64)}


def indexer(n_q: int, n_k: int) -> Inputs:
    return {"iq": real(2, n_q, 3, 4), "ik": real(2, n_k, 4), "w": real(2, n_q, 3)}


def seer_gates(n_q: int, n_k: int) -> Inputs:
    """More rows and columns than there are blocks of 8."""
    return {"gq": real(2, HEADS, blocks_of(n_q, 8) + 2, 6), "gk": real(2, HEADS, blocks_of(n_k, 8) + 1, 6)}


def seer_gate(n_q: int, n_k: int) -> Inputs:
    return {"gate": real(2, KV_HEADS, n_q, blocks_of(n_k, 8) + 1)}


def key_bias(n_q: int, n_k: int) -> Inputs:
    return {"bias": real(2, KV_HEADS, n_k)}


def vsa_gate(n_q: int, n_k: int) -> Inputs:
    return {"gate": real(2, HEADS, n_q, DV)}


def maps_of(block: int) -> Callable[[int, int], Inputs]:
    def draw(n_q: int, n_k: int) -> Inputs:
        return {"map": torch.rand(2, HEADS, blocks_of(n_q, block), blocks_of(n_k, block)) > 0.6}

    return draw


def cache(n_q: int, n_k: int) -> Inputs:
    """Positions before `since` and after it, twice the same, and none."""
    return {"cached": torch.randint(-2, n_k + 2, (2, KV_HEADS, 9)), "since": torch.tensor([n_k - 7, n_k - 2])}


def pieces(n_q: int, n_k: int) -> Inputs:
    """Pieces of 1 to 11 keys, others in each batch entry."""
    bounds = torch.zeros(2, 2, n_k, dtype=torch.int64)
    for batch in range(2):
        start = 0
        while start < n_k:
            stop = min(start + int(torch.randint(1, 12, ())), n_k)
            bounds[0, batch, start:stop], bounds[1, batch, start:stop] = start, stop
            start = stop
    return {"begin": bounds[0], "stop": bounds[1]}


VIDEO: dict[str, Any] = {"frames": 3, "height": 5, "width": 7}


def vmoba(topk: int, layer: int, **params: Any) -> Case:
    own = {**VIDEO, "chunk": [2, 2, 3], "topk": topk, "layer": layer, **params}
    n = own["frames"] * own["height"] * own["width"]
    return Case("vmoba", n, n, own)


def vmoba_threshold(tau: float, layer: int) -> Case:
    return Case("vmoba_threshold", 105, 105, {**VIDEO, "chunk": [2, 2, 3], "tau": tau, "layer": layer})


def vsa(density: float, frames: int, height: int, width: int) -> Case:
    n = frames * height * width
    own = {"frames": frames, "height": height, "width": width, "tile": [2, 2, 3], "density": density}
    return Case("vsa", n, n, own, vsa_gate)


HIP: dict[str, Any] = {
    **{"stages": (16, 8, 4), "kept": (48, 24, 8), "strides": (2, 2, 1)},
    **{"rows": 8, "sinks": 5, "window": 16},
}
DHSA: dict[str, Any] = {"rows": 8, "topk": 17, "near": 5, "first": 3}
GRID: dict[str, Any] = {"strides": (3, 4, 7), "probe": 9}

# The second of two lengths leaves a last block short; where the first is less the queries are the last ones.
CASES = [
    *[Case("moba", n_q, 37, {"block": 8, "topk": topk}) for n_q in (37, 11) for topk in (1, 3, 9)],
    Case("moba", 5, 5, {"block": 8, "topk": 3}),
    *[
        Case("native_sparse", n_q, 45, {"block": 8, "topk": topk, "window": 11}, native_gate)
        for n_q in (45, 13)
        for topk in (3, 4, 16)
    ],
    Case("native_sparse", 6, 6, {"block": 8, "topk": 4, "window": 3}, native_gate),
    *[vmoba(2, layer) for layer in range(4)],
    *[vmoba(topk, 2) for topk in (1, 3, 31)],
    *[vmoba_threshold(0.25, layer) for layer in range(4)],
    *[vmoba_threshold(tau, 2) for tau in (0, 0.6, 0.95)],
    *[Case("deepseek_sparse", n_q, 33, {"topk": topk}, indexer) for n_q in (33, 9) for topk in (1, 5, 50)],
    *[
        Case("seer", 37, 37, {"block": 8, "threshold": threshold, "dense_rows": rows}, seer_gates)
        for threshold, rows in ((0.2, 1), (0.3, 0), (0.002, 2), (0.9, 9))
    ],
    *[
        Case("seer_decode", n_q, 37, {"block": 8, "budget": budget}, seer_gate)
        for n_q in (37, 7)
        for budget in (8, 23, 90)
    ],
    *[Case("dynamic_mask", n_q, 33, {"keys_kept": kept}, key_bias) for n_q in (33, 9) for kept in (1, 5, 50)],
    *[
        Case("minference_vertical_slash", n_q, 150, {"columns": columns, "slashes": slashes, "block": 16, "probe": 20})
        for n_q, columns, slashes in ((150, 35, 105), (43, 41, 103), (150, 7, 60), (150, 1000, 6096))
    ],
    *[
        Case("minference_vertical_slash", n_q, 37, {"columns": 2, "slashes": 3, "block": 8, "probe": probe})
        for n_q, probe in ((37, 1), (9, 9))
    ],
    *[Case("minference_blocks", n_q, 53, {"block": 8, "topk": topk}) for n_q in (53, 20) for topk in (1, 2, 100)],
    *[
        Case("anchor", n, n, {"block": 4, "group": 3, "theta": theta})
        for n, theta in ((53, 1), (53, 0.25), (48, 0), (9, 1), (53, -0.5))
    ],
    *[vsa(density, 4, 5, 6) for density in (0, 0.1, 0.5, 1)],
    vsa(0.25, 3, 3, 7),
    Case("sparse_d", 18, 18, {"block": 4}, maps_of(4)),
    Case("sparse_d", 20, 20, {"block": 4}, maps_of(4)),
    *[
        Case("token_sparse", n, n, {"window": 5, "pool": pool, "tau": tau})
        for n, pool, tau in ((29, 3, 0.1), (29, 1, 0.3), (29, 7, 0.005), (29, 3, 2), (5, 3, 0.1), (6, 9, 0.1))
    ],
    *[Case("recycled", n_q, 40, inputs=cache) for n_q in (40, 1, 6)],
    *[Case("hip", n_q, n_k, HIP) for n_q, n_k in ((77, 77), (37, 93), (1, 90), (21, 21))],
    Case("hip", 77, 77, {"stages": (8, 2), "kept": (16, 4), "strides": (3, 1), "rows": 7, "sinks": 0, "window": 9}),
    Case("hip", 29, 29, {"stages": (1,), "kept": (4,), "strides": (1,), "rows": 1, "sinks": 0, "window": 1}),
    *[Case("dhsa", n_q, 61, {**DHSA, "rows": rows}, pieces) for n_q, rows in ((61, 8), (20, 8), (20, 1), (1, 8))],
    Case("dhsa", 9, 9, {**DHSA, "topk": 50}, pieces),
    *[Case("mminference_grid", n_q, n_k, GRID) for n_q, n_k in ((53, 53), (20, 61), (9, 9), (9, 34))],
]

BRANCHES = {"native_sparse", "vsa", "hybrid_forcing"}
ONE_ATTENTION = [case for case in CASES if case.name not in BRANCHES]


def test_every_one_has_a_case() -> None:
    named = {case.name for case in CASES} | {"hybrid_forcing"} | set(cluster_references.REFERENCES) | set(BY_NAME)
    assert named == set(REFERENCES) == set(routing_names())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_output_and_gradients(case: Case, backend: str) -> None:
    same_as_reference(case, backend)


@pytest.mark.parametrize("case", ONE_ATTENTION, ids=repr)
def test_what_is_seen(case: Case) -> None:
    seen_as_in_reference(case, *case.drawn())


def choices_agree(case: Case, qkv: list[Tensor], inputs: Inputs) -> None:
    """The choices of a pattern of several branches are the reference's."""
    attend = case.compiled()
    q, k, v = qkv
    own = dict(case.params)
    if case.name == "native_sparse":
        found = {"important": native_sparse_choice(q, k, block=own["block"], topk=own["topk"])}
    else:
        unit, units = tiles_of((own["frames"], own["height"], own["width"]), own["tile"])
        found = {"chosen": vsa_choice(q, k, unit=unit, units=units, density=own["density"])}
    chosen = attend.chosen(q, k, v, **inputs)
    assert chosen.keys() == found.keys()
    for name, wanted in found.items():
        assert torch.equal(chosen[name], wanted)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in BRANCHES], ids=repr)
def test_what_branches_choose(case: Case) -> None:
    choices_agree(case, *case.drawn())


# --- equal scores -----------------------------------------------------------------------------------------------------


def small(x: Tensor) -> Tensor:
    """-1, 0 or 1: sums of products of these are exact, and many are equal."""
    return x.clamp(-1, 1).round()


EXACT = [
    Case("hip", 77, 77, HIP),
    Case("hip", 37, 93, HIP),
    *[Case("moba", n_q, 39, {"block": 4, "topk": 4}) for n_q in (39, 11)],
    *[Case("minference_blocks", n_q, 39, {"block": 4, "topk": 3}) for n_q in (39, 11)],
    Case("deepseek_sparse", 33, 33, {"topk": 5}, indexer),
    Case("dynamic_mask", 33, 33, {"keys_kept": 5}, key_bias),
    Case("seer_decode", 37, 37, {"block": 8, "budget": 16}, seer_gate),
    vmoba(2, 2, frames=4, height=4, width=4, chunk=[2, 2, 2]),
]
ROUNDED = [
    Case("seer", 37, 37, {"block": 8, "threshold": 0.25, "dense_rows": 1}, seer_gates),
    Case("anchor", 53, 53, {"block": 4, "group": 2, "theta": 0}),
    Case("minference_vertical_slash", 150, 150, {"columns": 40, "slashes": 110, "block": 16, "probe": 1}),
    Case("minference_vertical_slash", 43, 150, {"columns": 2, "slashes": 73, "block": 16, "probe": 1}),
    Case("token_sparse", 17, 17, {"window": 1, "pool": 1, "tau": 0.2}),
    vmoba_threshold(0.25, 2),
]
"""Scores that are rounded are equal where all that goes into them is 0."""


@pytest.mark.parametrize("keys", [1, 0], ids=["small numbers", "no keys"])
@pytest.mark.parametrize("case", EXACT, ids=repr)
def test_the_earlier_of_equals(case: Case, keys: int) -> None:
    (q, k, v), inputs = case.drawn()
    q, k, inputs = small(q), keys * small(k), {name: small(x) for name, x in inputs.items()}
    seen_as_in_reference(case, [q, k, v], inputs)


@pytest.mark.parametrize("case", [*EXACT, *ROUNDED], ids=repr)
def test_the_earlier_where_all_are_equal(case: Case) -> None:
    (q, k, v), inputs = case.drawn()
    q, k, inputs = torch.zeros_like(q), torch.zeros_like(k), {name: torch.zeros_like(x) for name, x in inputs.items()}
    seen_as_in_reference(case, [q, k, v], inputs)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("native_sparse", "vsa")], ids=repr)
def test_the_earlier_of_equals_of_branches(case: Case) -> None:
    (q, k, v), inputs = case.drawn()
    choices_agree(case, [q, torch.zeros_like(k), v], inputs)


def test_equal_keys_are_not_the_own_ones() -> None:
    """No chunk has a share where no score is above the least: the own one is taken, and one more at least."""
    case = vmoba_threshold(0.25, 2)
    attend = case.compiled()
    (q, k, v), _ = case.drawn()
    k = torch.ones_like(k)
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
"""Which dimension of a pattern's inputs counts tokens."""


def with_other_futures(name: str) -> list[tuple[int, list[Tensor], Inputs, list[Tensor], Inputs]]:
    """Numbers t, arguments of a call of 200 tokens, and such as are the same before token t and others from there."""
    n, (_, inputs) = 200, CAUSAL[name]

    def drawn() -> tuple[list[Tensor], Inputs]:
        qkv = [torch.randn(2, heads, n, 16) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        return qkv, {key: x.float() for key, x in inputs(n, n).items()}

    def changed(t: int, before: Tensor, after: Tensor, dim: int) -> Tensor:
        return torch.cat([before.narrow(dim, 0, t), after.narrow(dim, t, n - t)], dim)

    found = []
    for _ in range(2):
        (qkv, given), (others, other) = drawn(), drawn()
        for t in (1, 7, 16, 63, 100, 128, 199):
            then = [changed(t, x, y, 2) for x, y in zip(qkv, others, strict=True)]
            inputs_then = {key: changed(t, x, other[key], TOKENS[name]) for key, x in given.items()}
            found.append((t, qkv, given, then, inputs_then))
    return found


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CAUSAL)
def test_what_comes_later_changes_no_bit(name: str, backend: str) -> None:
    attend = compile_attention(name, **CAUSAL[name][0])
    run: Any = attend if backend == "cpu" else attend.reference
    for t, qkv, given, then, inputs_then in with_other_futures(name):
        before, after = run(*qkv, **given), run(*then, **inputs_then)
        torch.testing.assert_close(after[:, :, :t], before[:, :, :t])
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t:], before[:, :, t:])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_last_key_that_only_its_own_query_sees_changes_no_bit(backend: str) -> None:
    """Rows of a tile share the keys that are fetched for it."""
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
def test_what_comes_later_changes_no_choice(name: str) -> None:
    attend = compile_attention(name, **CAUSAL[name][0])
    for t, (q, k, v), given, (other_q, other_k, other_v), inputs_then in with_other_futures(name):
        before = attend.chosen(q, k, v, **given)
        after = attend.chosen(other_q, other_k, other_v, **inputs_then)
        assert before.keys() == after.keys()
        for key, chosen in before.items():
            assert torch.equal(after[key][..., :t, :], chosen[..., :t, :])


# --- sizes at the edge ------------------------------------------------------------------------------------------------


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


# --- where one thing is at stake --------------------------------------------------------------------------------------


def test_vmoba_counts_the_own_chunk() -> None:
    """k · S pairs of a query and a chunk are taken per head, the own chunk of every query among them."""
    case = Case("vmoba", 105, 105, {**VIDEO, "chunk": [2, 2, 3], "topk": 2, "layer": 2})
    seen_as_in_reference(case, *case.drawn())


def test_a_map_of_blocks_that_do_not_divide_the_length() -> None:
    """A map of blocks of 8 of 17 tokens: 8, 8 and 1, as blocks of 128 are of 130 tokens 128 and 2."""
    case = Case("sparse_d", 17, 17, {"block": 8}, maps_of(8))
    seen_as_in_reference(case, *case.drawn())


def hybrid(
    n_q: int, n_k: int, larger: float = 1.0, **params: Any
) -> tuple[Attention, list[Tensor], Inputs, dict[str, Any]]:
    """A pattern, the arguments of its call, and its parameters; `larger` vectors make 1e-6 beside them nothing."""
    own = {"frame": 4, "sinks": 1, "local": 7, "ratio": 0.5, "block": 4, **params}
    q, k, v = real(2, 2, n_q, 4), real(2, 2, n_k, 4), real(2, 2, n_k, 4)
    q, k = torch.cat([q[..., :-1], q[..., -1:].abs()], -1) * larger, k * larger
    inputs = {"rq": real(2, 2, n_q, 4), "rk": real(2, 2, n_k, 4), "mix": real(2, 4)}
    return compile_attention("hybrid_forcing", **own), [q, k, v], inputs, own


def agree_hybrid(n_q: int, n_k: int, larger: float = 1.0, **params: Any) -> None:
    attend, qkv, inputs, own = hybrid(n_q, n_k, larger, **params)
    leaves = leaves_of(qkv, inputs)
    q, k, v = qkv
    scale = 0.5 / larger**2
    calls: list[Any] = [attend, attend.reference]
    for run in calls:
        _, wanted = REFERENCES["hybrid_forcing"](q, k, v, scale=scale, **inputs, **own)
        agree(run(q, k, v, scale=scale, **inputs), wanted, leaves, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("n_k", "block"), [(12, 4), (12, 3), (12, 5), (24, 6), (36, 4)])
def test_hybrid_forcing_before_anything_is_evicted(n_k: int, block: int) -> None:
    """The last chunk of 12 tokens, in its own blocks."""
    agree_hybrid(12, n_k, block=block, local=10)
    attend, (q, k, v), inputs, _ = hybrid(12, n_k, block=block, local=10)
    chosen = attend.chosen(q, k, v, **inputs)
    assert chosen.keys() == {"chosen"}
    wanted = hybrid_forcing_choice(q, k, ratio=0.5, block=block)
    assert torch.equal(chosen["chosen"][:, :, -wanted.shape[2] :], wanted)


@pytest.mark.parametrize("larger", [100.0, 1.0], ids=["large", "as 1e-6 is added to means"])
def test_hybrid_forcing_of_the_last_chunk_with_all_blocks(larger: float) -> None:
    """Of 12 frames 0 and 6 to 11 are seen, 1 to 5 evicted."""
    agree_hybrid(12, 48, larger, ratio=1)


def test_hybrid_forcing_with_a_query_that_no_evicted_key_meets() -> None:
    """relu(q) is 0: what divides is 1e-6, and what is divided a mean."""
    attend, (q, k, v), inputs, own = hybrid(12, 48, ratio=1)
    q[:, :, 5] = -q[:, :, 5].abs()
    _, wanted = REFERENCES["hybrid_forcing"](q, k, v, **inputs, **own)
    torch.testing.assert_close(attend(q, k, v, **inputs), wanted, rtol=1e-5, atol=1e-5)


def test_hybrid_forcing_of_several_chunks_sees_no_later_one() -> None:
    agree_hybrid(24, 24, ratio=1)


def test_hybrid_forcing_chooses_among_what_is_not_evicted() -> None:
    """Half of the 7 blocks of the sink and the recent frames, whatever is evicted."""
    agree_hybrid(12, 48, 100.0)


def test_hybrid_forcing_counts_a_short_block() -> None:
    """Half of 2 blocks of 8 and 4 tokens is 1."""
    agree_hybrid(12, 12, block=8)
