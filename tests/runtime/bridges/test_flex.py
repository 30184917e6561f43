"""mask_mod and block_mask of patterns, checked against the reference masks and inside flex_attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from attnc import ArgumentError, ArgumentTypeError, UnsupportedError, compile_attention
from library_calls import SMALL, LibraryCall, library_call
from reference import masks as truth

MASKED = (
    *("bigbird", "block_diffusion", "blocked", "causal", "dilated_window", "document", "freeswim", "full"),
    *("lingen_temporal", "log_sparse", "long_lora", "moa", "modality_mutual", "neighborhood_1d", "neighborhood_2d"),
    *("neighborhood_3d", "power", "prefix_lm", "radial", "s2_attention", "sliding_tile", "sliding_window"),
    *("sparse_fixed", "sparse_transformer", "sqa", "streaming", "strided", "svg", "tree_verify", "videofactory"),
)
SCORED = (
    *("affine_scaled", "alibi", "fox", "gpt_oss", "graphormer", "landmark", "local_linear", "music_relative"),
    *("softcap", "softplus_lssa", "softplus_lssar", "t5"),
)
NO_TOKENS = ("attention_residual", "autoformer_lags", "davit_channel", "davit_window", "halo")
BRANCHES = ("combiner", "differential", "hierarchical", "longformer", "monarch", "monarch_rt")
CHOSEN = ("moba", "native_sparse", "deepseek_sparse", "xattention", "token_sparse")


def small_call(name: str, n: int = 77) -> LibraryCall:
    return library_call(name, n, {} if name == "bigbird" else SMALL.get(name))


def dense_mask(call: LibraryCall) -> torch.Tensor:
    """Return the visible pairs of a call by `mask`, shaped (batch or 1, heads, queries, keys)."""
    heads = [call.attention.mask(call.n, head=h, heads=call.heads, **call.inputs) for h in range(call.heads)]
    return torch.stack([mask if mask.dim() == 3 else mask[None] for mask in heads], 1)


def states(mask: BlockMask, like: BlockMask) -> list[torch.Tensor]:
    """Return the dense blocks and the counts of partial and full blocks per row and column, as wide as `like`."""
    masks = (mask.to_dense(), mask.kv_num_blocks, mask.full_kv_num_blocks, mask.q_num_blocks, mask.full_q_num_blocks)
    like_masks = (
        like.to_dense(),
        like.kv_num_blocks,
        like.full_kv_num_blocks,
        like.q_num_blocks,
        like.full_q_num_blocks,
    )
    return [a.expand_as(b) for a, b in zip(masks, like_masks, strict=True) if a is not None and b is not None]


def same_blocks(mask: BlockMask, other: BlockMask) -> bool:
    states_found, wanted = states(mask, other), states(other, other)
    return len(states_found) == len(wanted) == 5 and all(
        torch.equal(a, b) for a, b in zip(states_found, wanted, strict=True)
    )


@pytest.mark.parametrize("name", MASKED)
def test_library(name: str) -> None:
    """mask_mod agrees with `mask`, and block_mask equals what create_block_mask makes from mask_mod."""
    call = small_call(name)
    wanted = dense_mask(call)
    mod = call.attention.mask_mod(call.n, heads=call.heads, device="cpu", **call.inputs)
    assert torch.equal(create_mask(mod, len(wanted), call.heads, call.n, call.n, device="cpu"), wanted)
    for block in (16, (32, 8)):
        mask = call.attention.block_mask(call.n, heads=call.heads, block_size=block, device="cpu", **call.inputs)
        torch_mask = create_block_mask(mod, len(wanted), call.heads, call.n, call.n, device="cpu", BLOCK_SIZE=block)
        assert same_blocks(mask, torch_mask)


@pytest.mark.parametrize("name", SCORED)
def test_scores_are_not_dropped_silently(name: str) -> None:
    call = small_call(name)
    for ask in (call.attention.mask_mod, call.attention.block_mask):
        with pytest.raises(
            UnsupportedError, match="of its own, which a mask would drop; call it, or pass relation_only"
        ):
            ask(call.n, heads=call.heads, **call.inputs)
    mod = call.attention.mask_mod(call.n, heads=call.heads, device="cpu", relation_only=True, **call.inputs)
    wanted = dense_mask(call)
    assert torch.equal(create_mask(mod, len(wanted), call.heads, call.n, call.n, device="cpu"), wanted)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (NO_TOKENS, "are not tokens of k; call it instead"),
        (BRANCHES, "joins several attentions, which one mask cannot describe"),
        (CHOSEN, r"depend on the content of each call, a mask of pairs does not; call it, or use `mask\("),
        (("gated_delta_net", "retention"), "is a recurrence, which has no pairs of queries and keys: no mask_mod"),
        (("hybrid_window_linear",), "has a branch with a state"),
    ],
)
def test_refusals(names: tuple[str, ...], message: str) -> None:
    for name in names:
        params = SMALL.get(name, {})
        with pytest.raises(UnsupportedError, match=message):
            compile_attention(name, **params).mask_mod(96, heads=4, relation_only=True)


def test_against_the_papers_masks() -> None:
    """The oracle is not our own mask: tests/stdlib_patterns/reference/masks.py builds masks from the papers."""
    cases: list[tuple[str, Mapping[str, Any], Any]] = [
        ("dilated_window", {"window": 5, "dilation": 3}, truth.dilated_window(61, 5, 3)),
        ("strided", {"stride": 7, "local": 4}, truth.strided(61, 7, 4)),
        ("power", {"window": 2, "block": 4}, truth.power(61, 2, 4)),
    ]
    for name, params, wanted in cases:
        mod = compile_attention(name, **params).mask_mod(61, device="cpu")
        assert np.array_equal(create_mask(mod, 1, 1, 61, 61, device="cpu")[0, 0].numpy(), wanted)


def test_fewer_queries_than_keys() -> None:
    """Under `align end`, query row 0 has the position after the keys that were already in the cache."""
    cases: list[tuple[str, dict[str, Any]]] = [
        ("sliding_window", {"window": 9, "sinks": 2}),
        ("power", {"window": 2, "block": 4}),
    ]
    for name, params in cases:
        attend = compile_attention(name, **params)
        mod = attend.mask_mod(33, 77, device="cpu")
        assert torch.equal(create_mask(mod, 1, 1, 33, 77, device="cpu")[0, 0], attend.mask(33, 77))
        torch_mask = create_block_mask(mod, 1, 1, 33, 77, device="cpu", BLOCK_SIZE=16)
        assert same_blocks(attend.block_mask(33, 77, block_size=16, device="cpu"), torch_mask)


DOCUMENTED = """pattern in_documents
    align end
    documents doc
    input doc: int[batch, token]
    input mark: int[batch, token]
    input own: bool[batch, query]
    visible k <= q and (q - k < 5 or mark[k] == mark[q] or own[q] or k >= keys - 2 or k < queries // 2)
"""


@pytest.mark.parametrize("n_q", [1, 40, 61])
def test_documents(n_q: int) -> None:
    """Positions, sizes and tokens are counted within each document."""
    attend, random = compile_attention(DOCUMENTED), np.random.default_rng(5)
    doc = torch.from_numpy(np.sort(random.integers(0, 6, (2, 61)), axis=1))
    mark = torch.from_numpy(random.integers(0, 4, (2, 61)))
    own_mark = torch.from_numpy(random.random((2, n_q)) < 0.2)
    inputs: dict[str, Any] = {"doc": doc, "mark": mark, "own": own_mark}
    mod = attend.mask_mod(n_q, 61, **inputs)
    wanted = attend.mask(n_q, 61, **inputs)
    assert torch.equal(create_mask(mod, 2, 1, n_q, 61, device="cpu")[:, 0], wanted)
    torch_mask = create_block_mask(mod, 2, 1, n_q, 61, device="cpu", BLOCK_SIZE=8)
    assert same_blocks(attend.block_mask(n_q, 61, block_size=8, **inputs), torch_mask)


def test_packed_sequences() -> None:
    attend = compile_attention("sliding_window", window=7, sinks=1)
    lengths = torch.tensor([0, 3, 3, 40, 61])
    mod = attend.mask_mod(61, cu_seqlens=lengths)
    mask = create_mask(mod, 1, 1, 61, 61, device="cpu")[0, 0]
    wanted = torch.zeros(61, 61, dtype=torch.bool)
    for a, b in zip(lengths[:-1].tolist(), lengths[1:].tolist(), strict=True):
        wanted[a:b, a:b] = attend.mask(b - a)
    assert torch.equal(mask, wanted)
    assert same_blocks(
        attend.block_mask(61, cu_seqlens=lengths, block_size=16),
        create_block_mask(mod, 1, 1, 61, 61, device="cpu", BLOCK_SIZE=16),
    )


EXACT = {
    "divisions": "visible (q - 3) // 4 - (k - 5) % 7 >= (3 * k - q) // (k % 3 + 1) % 5",
    "guarded": "visible k > 0 and q % k == 0 or k == 0 and (3 if q == 0 else 12 // q) > 2",
    "powers": "visible 2 ** (k % 5) < q + 3 and k % 3 ** (q % 4) == 0 and (k % 3) ** (q % 4) < 5",
    "functions": "visible isqrt(q + k) < bitlen(bitand(q, k)) or xor(q, k) < 7 or min(q, k) == max(bitor(q, 2) - 8, 3)",
    "choices": "visible (q if k % 2 == 0 else k) % 3 == 0 and not (q < k and power_of_two(k))",
    "by row": "visible k <= max(j * j for j in 0 .. q + 1 if j * j <= q)",
    "by key": "visible q >= sum(j % 3 for j in 0 .. k)",
    "by head": "visible abs(q - k) <= sum(j for j in 0 .. head + 1) or kv_head == 1 and k == 0",
    "rounded": "visible abs(q - k) <= floor(sqrt(q + 1) * 1.5)",
    "logarithms": "visible q - k <= floor(log(abs(q - k) + 2) * 3)",
}


@pytest.mark.parametrize("name", EXACT)
def test_expressions(name: str) -> None:
    """Every kind of exact expression, including aggregates and rounded numbers, against the oracle's own mask."""
    attend = compile_attention(f"pattern p\n    align start\n    {EXACT[name]}\n")
    mod = attend.mask_mod(70, heads=4, kv_heads=2, device="cpu")
    wanted = torch.stack([attend.mask(70, head=h, heads=4, kv_heads=2) for h in range(4)])
    assert torch.equal(create_mask(mod, 1, 4, 70, 70, device="cpu")[0], wanted)
    torch_mask = create_block_mask(mod, 1, 4, 70, 70, device="cpu", BLOCK_SIZE=16)
    assert same_blocks(attend.block_mask(70, heads=4, kv_heads=2, block_size=16, device="cpu"), torch_mask)


def test_relations_that_are_not_pointwise_are_refused() -> None:
    long = compile_attention(
        "pattern p\n    align start\n    visible any(q % (j + 1) == k % (j + 2) for j in 0 .. 90)\n"
    )
    with pytest.raises(UnsupportedError, match="`any` over 64 terms or more that read the query and the key"):
        long.mask_mod(70)
    wide = compile_attention("pattern p\n    align start\n    visible (q + 1) ** 20 % 3 == k % 3\n")
    with pytest.raises(UnsupportedError, match="numbers that may not fit in 64 bits"):
        wide.block_mask(70)


def test_heads_must_be_known() -> None:
    with pytest.raises(ArgumentError, match="pass the number of query heads, heads="):
        compile_attention("long_lora").mask_mod(64)


@pytest.mark.parametrize(
    ("size", "error"), [(0, ArgumentError), (1.5, ArgumentTypeError), ((1, 2, 3), ArgumentTypeError)]
)
def test_block_sizes(size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="block_size is"):
        compile_attention("causal").block_mask(64, block_size=size)


def test_many_distinct_tiles_are_resolved_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnc.compiler.planning import runs
    from attnc.runtime.executors.flex import flex

    monkeypatch.setattr(runs, "MAX_CLASS_ELEMENTS", 4 * 256)
    monkeypatch.setattr(flex, "MAX_CLASS_ELEMENTS", 4 * 256)
    call = small_call("document", 200)
    mod = call.attention.mask_mod(200, **call.inputs)
    torch_mask = create_block_mask(mod, len(dense_mask(call)), 1, 200, 200, device="cpu", BLOCK_SIZE=16)
    assert same_blocks(call.attention.block_mask(200, block_size=16, **call.inputs), torch_mask)


@pytest.mark.parametrize("name", ["sliding_window", "document", "radial", "neighborhood_2d", "power"])
def test_compiled_flex_attention(name: str) -> None:
    """Compiled flex_attention with our BlockMask gives the pattern's output."""
    call = small_call(name, 141)
    batch, draw = len(dense_mask(call)), torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(batch, call.heads, call.n, 16, generator=draw) for _ in range(3))
    mask = call.attention.block_mask(call.n, heads=call.heads, device="cpu", **call.inputs)
    torch.compiler.reset()
    out = torch.compile(flex_attention)(q, k, v, block_mask=mask)
    torch.testing.assert_close(out, call.attention(q, k, v, **call.inputs))


def test_the_second_mask_of_a_process_has_no_symbols() -> None:
    """Numbers in a mask are constants of the graph: as symbols they break FlexAttention's code for a CPU.

    Compiled by Inductor, two windows followed by documents failed with "index out of bounds: tmp7 <
    cur_kvSplitSize".
    """
    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    function = torch.compile(flex_attention, backend=kept, fullgraph=True)
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    documents = {"doc": torch.arange(64)[None] // 10}, {"doc": torch.arange(64)[None] // 21}
    windows: list[tuple[Any, dict[str, Any]]]
    windows = [(compile_attention("sliding_window", window=w, sinks=s), {}) for w, s in ((9, 1), (20, 3))]
    for attend, inputs in (*windows, *((compile_attention("document"), own_mark) for own_mark in documents)):
        out = function(q, k, v, block_mask=attend.block_mask(64, device="cpu", **inputs))
        torch.testing.assert_close(out, attend(q, k, v, **inputs))
    torch.compiler.reset()
    assert len(graphs) == 4
    for graph in graphs:
        symbols = [n for n in graph.graph.nodes if isinstance(n.meta.get("example_value"), torch.SymInt)]
        assert not symbols, symbols


@pytest.mark.parametrize("name", ["long_lora", "prefix_lm", "tree_verify"])
def test_eager_flex_attention(name: str) -> None:
    """Eager flex_attention with our BlockMask gives the pattern's output."""
    call = small_call(name, 60)
    batch, draw = len(dense_mask(call)), torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(batch, call.heads, call.n, 16, generator=draw) for _ in range(3))
    mask = call.attention.block_mask(call.n, heads=call.heads, block_size=16, device="cpu", **call.inputs)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask), call.attention(q, k, v, **call.inputs))


SCORES: list[tuple[str, dict[str, Any], float | None]] = [
    ("alibi", {}, None),
    ("softcap", {"cap": 2, "window": 40}, None),
    ("t5", {}, 1.0),
    ("t5", {"causal": True}, 0.5),
    ("graphormer", {}, None),
]


def inputs_of_score(name: str, n: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(6)
    table = {"table": torch.randn(4, 32, generator=draw)}
    distance = {"distance": torch.randint(32, (2, n, n), generator=draw)}
    return {"t5": table, "graphormer": {**table, **distance}}.get(name, {})


@pytest.mark.parametrize(("name", "params", "scale"), SCORES)
def test_score_mod(name: str, params: dict[str, Any], scale: float | None) -> None:
    """flex_attention with our score_mod and a BlockMask of the relation gives the pattern's output."""
    n, draw = 77, torch.Generator().manual_seed(3)
    attend, inputs = compile_attention(name, **params), inputs_of_score(name, n)
    q, k, v = (torch.randn(2, 4, n, 16, generator=draw) for _ in range(3))
    mod = attend.score_mod(n, heads=4, scale=scale, device="cpu", **inputs)
    mask = attend.block_mask(n, heads=4, device="cpu", relation_only=True, **inputs)
    out = flex_attention(q, k, v, score_mod=mod, block_mask=mask, scale=scale)
    torch.testing.assert_close(out, attend(q, k, v, **inputs), rtol=1e-4, atol=1e-5)


def test_score_mod_compiled() -> None:
    attend, draw = compile_attention("alibi"), torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 4, 141, 16, generator=draw) for _ in range(3))
    mask = attend.block_mask(60, 141, heads=4, device="cpu", relation_only=True)
    mod = attend.score_mod(60, 141, heads=4, device="cpu")
    torch.compiler.reset()
    out = torch.compile(flex_attention)(q[:, :, :60], k, v, score_mod=mod, block_mask=mask)
    torch.testing.assert_close(out, attend(q[:, :, :60], k, v))


def test_scores_without_a_score_mod_are_refused() -> None:
    real: dict[str, Any] = {"f": -torch.rand(1, 9, 4)}
    with pytest.raises(UnsupportedError, match="score_mod: `fox` has a score of vectors or of sums over keys"):
        compile_attention("fox").score_mod(9, heads=4, **real)
    with pytest.raises(UnsupportedError, match="score_mod: `gpt_oss` has weights"):
        compile_attention("gpt_oss").score_mod(9, heads=4)
    table: dict[str, Any] = {"table": torch.randn(4, 32)}
    with pytest.raises(UnsupportedError, match="the score of `t5` reads more than `scale \\* dot"):
        compile_attention("t5").score_mod(9, heads=4, **table)
    with pytest.raises(ArgumentError, match="scale is 0"):
        compile_attention("t5").score_mod(9, heads=4, scale=0, **table)


def test_long_sequences_resolve_only_border_blocks() -> None:
    """For half a million tokens no pair is evaluated, and hardly any block."""
    mask = compile_attention("sliding_window", window=4096).block_mask(1 << 19, device="cpu")
    full, partial = mask.full_kv_num_blocks, mask.kv_num_blocks
    assert full is not None
    assert (int(full.sum()), int(partial.sum())) == (31 * 4096 - 31 * 32 // 2, 4096 + 4096 - 32)
