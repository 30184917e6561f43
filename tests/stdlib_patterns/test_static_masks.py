"""The static patterns beyond their masks: fp32 results, identities, and refused parameters and calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnc import Attention, SpecError, compile_attention
from attnc.runtime.verifying.accuracy import Probe, compare
from cases import grids
from cases.masks import MASKED, Masked
from reference import masks

ALL = [*MASKED, *grids.MASKED]
FIRST = [next(one for one in ALL if one.name == name) for name in dict.fromkeys(one.name for one in ALL)]


@pytest.mark.parametrize("case", [one for one in FIRST if one.name != "longformer"], ids=repr)
def test_output_and_gradients_are_those_of_masked_softmax_in_32_bits(case: Masked) -> None:
    n = case.lengths[len(case.lengths) // 2]
    n_q, batch, kv_heads = case.queries(n), case.batch or 1, case.kv_heads or case.heads
    q, grad = torch.randn(batch, case.heads, n_q, 8), torch.randn(batch, case.heads, n_q, 8)
    k, v = torch.randn(2, batch, kv_heads, n, 8)
    attend, inputs = compile_attention(case.name, **case.params), case.inputs(n)
    mask = torch.from_numpy(case.masks(n))

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, return_lse=True, **inputs)

    probe = Probe(q, k, v, mask, grad, torch.randn(batch, case.heads, n_q))
    errors = compare(run, probe)
    assert all(error.agrees for error in errors), errors


@pytest.mark.parametrize("case", [one for one in ALL if one.name != "tree_verify"], ids=repr)
def test_every_query_sees_itself(case: Masked) -> None:
    """No published pattern has a row without a key."""
    for n in case.lengths:
        assert case.masks(n).diagonal(axis1=-2, axis2=-1).all()


# --- parts of a call --------------------------------------------------------------------------------------------------


def test_the_last_rows_of_tri_shape_are_counted_from_the_end() -> None:
    actual = compile_attention("streaming", sinks=2, window=3, last=4).mask(9, 40).numpy()
    np.testing.assert_array_equal(actual, masks.streaming(9, 40, 2, 3, 4))


# --- identities -------------------------------------------------------------------------------------------------------


def same(one: Attention, other: Attention, n: int, **inputs: Any) -> None:
    np.testing.assert_array_equal(one.mask(n, **inputs).numpy(), other.mask(n).numpy())


@pytest.mark.parametrize("n", [24, 48])
def test_a_neighborhood_whose_stride_is_its_window_is_blocked(n: int) -> None:
    for window in (2, 3, 8):
        same(compile_attention("neighborhood_1d", window=window, stride=window), blocked(window), n)


def blocked(block: int) -> Attention:
    return compile_attention("blocked", block=block)


def test_a_neighborhood_as_wide_as_the_line_is_full() -> None:
    same(compile_attention("neighborhood_1d", window=30), compile_attention("full"), 30)
    same(compile_attention("neighborhood_2d", height=5, width=6, window=[5, 6]), compile_attention("full"), 30)


@pytest.mark.parametrize("window", [31, 64])
def test_a_neighborhood_longer_than_its_axis_takes_the_whole_axis(window: int) -> None:
    same(compile_attention("neighborhood_1d", window=window), compile_attention("full"), 30)
    long = compile_attention("neighborhood_3d", frames=2, height=3, width=9, window=[5, 3, 5])
    same(long, compile_attention("neighborhood_3d", frames=2, height=3, width=9, window=[2, 3, 5]), 54)
    apart = compile_attention("neighborhood_1d", window=window, dilation=2).mask(9)
    assert torch.equal(apart, (torch.arange(9)[:, None] - torch.arange(9)) % 2 == 0)


def test_a_causal_neighborhood_is_a_causal_window() -> None:
    window = compile_attention("sliding_window", window=5)
    same(compile_attention("neighborhood_1d", window=5, causal=True), window, 41)
    same(compile_attention("dilated_window", window=5, dilation=1), window, 41)
    same(compile_attention("streaming", sinks=0, window=5), window, 41)


def test_neighborhoods_of_fewer_axes() -> None:
    flat = compile_attention("neighborhood_1d", window=5, stride=2, dilation=3)
    video = compile_attention(
        "neighborhood_3d", frames=2, height=2, width=20, window=[2, 2, 5], stride=[1, 1, 2], dilation=[1, 1, 3]
    )
    tall = compile_attention("neighborhood_2d", height=4, width=20, window=[4, 5], stride=[1, 2], dilation=[1, 3])
    same(video, tall, 80)
    np.testing.assert_array_equal(tall.mask(80).numpy()[:20, 60:], flat.mask(20).numpy())


@pytest.mark.parametrize("window", [2, 3, 4])
def test_sliding_tiles_of_one_token_are_a_neighborhood(window: int) -> None:
    size: dict[str, Any] = {"frames": 4, "height": 5, "width": 6}
    tiles = compile_attention("sliding_tile", **size, tile=1, kernel=window)
    same(tiles, compile_attention("neighborhood_3d", **size, window=window), 120)


def test_freeswim_is_a_neighborhood_of_all_frames() -> None:
    size: dict[str, Any] = {"frames": 2, "height": 6, "width": 7}
    swim = compile_attention("freeswim", **size, reach=[1, 2])
    same(swim, compile_attention("neighborhood_3d", **size, window=[2, 3, 5]), 84)


def test_longformer_looking_back_is_the_dilated_window() -> None:
    n = 50
    both = compile_attention("longformer", window=4, dilation=[3]).mask(n, is_global=torch.zeros(1, n).bool())[0]
    back = compile_attention("dilated_window", window=5, dilation=3).mask(n)
    assert torch.equal(both.tril(), back)
    assert torch.equal(both, both.T)


def test_strided_is_both_heads_of_the_sparse_transformer() -> None:
    split = compile_attention("sparse_transformer", stride=6)
    both = compile_attention("strided", stride=6, local=6).mask(40)
    assert torch.equal(both, split.mask(40, head=0, heads=2) | split.mask(40, head=1, heads=2))


def test_the_heads_of_s2_attention_cover_the_past() -> None:
    attend = compile_attention("s2_attention", block=4, local_blocks=1, vertical_stride=8)
    union = torch.stack([attend.mask(90, head=h, heads=8) for h in range(8)]).any(0)
    assert torch.equal(union, compile_attention("causal").mask(90))


def test_a_band_of_moa_without_growth_is_streaming_in_blocks() -> None:
    attend = compile_attention("moa", alpha=[1], beta=[0], block=1)
    same(attend, compile_attention("streaming", sinks=1, window=1), 40)


def test_one_group_of_long_lora_is_causal() -> None:
    attend = compile_attention("long_lora", groups=1)
    assert torch.equal(attend.mask(24, head=0, heads=2), compile_attention("causal").mask(24))


def test_a_chain_of_drafts_is_causal() -> None:
    nodes, prefix = 6, 11
    chain = torch.ones(1, nodes, nodes).tril().bool()
    (mask,) = compile_attention("tree_verify").mask(
        nodes, nodes + prefix, prefix=torch.tensor([prefix]), ancestor=chain
    )
    assert torch.equal(mask, compile_attention("causal").mask(nodes, nodes + prefix))


# --- refused parameters and calls -------------------------------------------------------------------------------------

GRID = {"height": 8, "width": 8}
VIDEO = {"frames": 6, "height": 8, "width": 8}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("dilated_window", {"window": 0}, "window >= 1"),
    ("dilated_window", {"dilation": 0}, "dilation >= 1"),
    ("strided", {"stride": 0}, "stride >= 1"),
    ("strided", {"local": 0}, "local >= 1"),
    ("power", {"window": 0}, "window >= 1"),
    ("power", {"block": 0}, "block >= 1"),
    ("power", {"sink": -1}, "sink >= 0"),
    ("neighborhood_1d", {"window": 1}, "window >= 2"),
    ("neighborhood_1d", {"window": 3, "stride": 4}, "stride <= window"),
    ("neighborhood_1d", {"dilation": 0}, "dilation >= 1"),
    ("neighborhood_2d", {**GRID, "window": [7, 1]}, "window[i] >= 2"),
    ("neighborhood_2d", {**GRID, "stride": [8, 1]}, "stride[i] <= window[i]"),
    ("neighborhood_3d", {**VIDEO, "window": 3, "dilation": 0}, "dilation[i] >= 1"),
    ("sliding_tile", {**VIDEO, "tile": [4, 4, 4], "kernel": 4}, "frames % tile[0] == 0"),
    ("sliding_tile", {**VIDEO, "tile": 2, "kernel": [2, 3, 2]}, "kernel[i] % tile[i] == 0"),
    ("sliding_tile", {**VIDEO, "tile": 2, "kernel": 8}, "kernel[0] <= frames"),
    ("log_sparse", {"segment": 1, "window": 8}, "segment >= 2"),
    ("s2_attention", {"block": 0}, "block >= 1"),
    ("s2_attention", {"vertical_stride": 0}, "vertical_stride >= 1"),
    ("s2_attention", {"local_blocks": 0}, "local_blocks >= 1"),
    ("moa", {"alpha": [1], "beta": [0], "block": 0}, "block >= 1"),
    ("sparse_transformer", {"stride": 0}, "stride >= 1"),
    ("sparse_fixed", {"segment": 64, "summary": 32, "groups": 3}, "summary * groups <= segment"),
    ("longformer", {"window": -1, "dilation": [1]}, "window >= 0"),
    ("bigbird", {"block": 0}, "block >= 1"),
    ("streaming", {"window": 0}, "window >= 1"),
    ("streaming", {"last": -1}, "last >= 0"),
    ("long_lora", {"groups": 0}, "groups >= 1"),
    ("block_diffusion", {"block": 0}, "block >= 1"),
    ("freeswim", {**VIDEO, "reach": [-1, 0]}, "reach[0] >= 0"),
    ("freeswim", {**VIDEO, "reach": 4}, "2 * reach[0] + 1 <= height"),
    ("svg", {"frames": 2, "per_frame": 63}, "window * per_frame >= block"),
    ("radial", {"frames": 2, "per_frame": 63, "decay": -1}, "decay >= 0"),
]


@pytest.mark.parametrize(("name", "params", "words"), REFUSED)
def test_a_bad_parameter_is_named(name: str, params: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        compile_attention(name, **params)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "A805"
    assert f"`{name}` requires" in diagnostic.message and words in diagnostic.message


REFUSED_CALLS: list[tuple[str, dict[str, Any], int, dict[str, Any], str]] = [
    ("s2_attention", {"dense_heads": 2}, 20, {}, "dense_heads <= kv_heads"),
    ("moa", {"alpha": [1, 1], "beta": [0, 1.5]}, 20, {}, "0 <= beta <= 1"),
    ("longformer", {"dilation": [1, 0]}, 20, {"is_global": torch.zeros(1, 20).bool()}, "dilation >= 1"),
    ("bigbird", {"block": 8}, 20, {"random": torch.zeros(1, 2, 3).int()}, "rows * block >= queries"),
    ("long_lora", {"groups": 4}, 21, {}, "keys % groups == 0"),
    ("block_diffusion", {}, 21, {}, "keys % 2 == 0"),
    (
        "tree_verify",
        {},
        4,
        {"prefix": torch.tensor([1]), "ancestor": torch.ones(1, 3, 3).bool()},
        "queries <= nodes",
    ),
]


@pytest.mark.parametrize(("name", "params", "n", "inputs", "words"), REFUSED_CALLS)
def test_a_bad_call_is_named(name: str, params: dict[str, Any], n: int, inputs: dict[str, Any], words: str) -> None:
    attend = compile_attention(name, **params)
    with pytest.raises(SpecError) as caught:
        attend.mask(n, **inputs)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "A805" and words in diagnostic.message
