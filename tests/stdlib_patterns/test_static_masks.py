"""The static patterns against masks counted out from their papers (`reference`), and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnc import Attention, SpecError, compile_attention
from attnc.runtime.accuracy import Probe, compare
from attnc.runtime.library import pattern_names
from reference import grids, masks
from reference.masks import Mask
from score_calls import SYSTEMS
from weight_calls import SYSTEMS as WEIGHTED

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A pattern with parameters, the numbers of keys to try, and the mask by (keys, batch entry, head)."""

    name: str
    lengths: tuple[int, ...]
    mask: Callable[[int, int, int], Mask]
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[int], Inputs] = lambda n: {}
    heads: int = 1
    kv_heads: int | None = None
    batch: int | None = None
    """None where no input has a batch."""

    def __repr__(self) -> str:
        given = ",".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.name}({given})".replace(" ", "")

    def compiled(self) -> Attention:
        return compile_attention(self.name, **self.params)

    def masks(self, n: int) -> Mask:
        """(batch, heads, queries, keys)."""
        return np.stack(
            [np.stack([self.mask(n, b, h) for h in range(self.heads)]) for b in range(self.batch or 1)],
        )


def simple(name: str, lengths: tuple[int, ...], mask: Callable[..., Mask], *settings: Mapping[str, Any]) -> list[Case]:
    """Cases of a pattern whose mask takes the length and its parameters by their names."""

    def case(setting: Mapping[str, Any]) -> Case:
        return Case(name, lengths, lambda n, b, h: mask(n, **setting), setting)

    return [case(setting) for setting in settings]


LINES = (1, 31, 129)

# --- causal sequences -------------------------------------------------------------------------------------------------


def sparse_transformer(stride: int) -> Case:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.sparse_transformer(n, stride, head)

    return Case("sparse_transformer", LINES, mask, {"stride": stride}, heads=3)


def sparse_fixed(segment: int, block: int, blocks: int, groups: int) -> Case:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.sparse_fixed(n, segment, block, blocks, head, groups)

    return Case("sparse_fixed", LINES, mask, {"segment": segment, "summary": block * blocks, "groups": groups}, heads=3)


def s2_attention(kv_heads: int, block: int, local: int, stride: int, offset: int = 0, dense: int = 0) -> Case:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.s2_attention(n, block, local, stride, head * kv_heads // 4, kv_heads, offset, dense)

    params = {"block": block, "local_blocks": local, "vertical_stride": stride, "offset": offset, "dense_heads": dense}
    return Case("s2_attention", LINES, mask, params, heads=4, kv_heads=kv_heads)


def moa(alpha: list[int], beta: list[str]) -> Case:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.moa(n, alpha[head], Fraction(beta[head]), 8)

    return Case("moa", LINES, mask, {"alpha": alpha, "beta": [Fraction(x) for x in beta], "block": 8}, heads=len(alpha))


def streaming(sinks: int, window: int, last: int = 0, **params: Any) -> Case:
    params = params or {"sinks": sinks, "window": window, "last": last}
    return Case("streaming", LINES, lambda n, b, h: masks.streaming(n, n, sinks, window, last), params)


def sink_lora(groups: int, heads: int, sinks: int) -> Case:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.sink_lora(n, groups, head, heads, sinks)

    lengths = tuple(groups * size for size in (1, 7, 12, 31))
    return Case("sink_lora", lengths, mask, {"groups": groups, "sinks": sinks}, heads=heads)


def long_lora(groups: int, heads: int) -> Case:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.long_lora(n, groups, head, heads)

    return Case("long_lora", tuple(groups * size for size in (1, 7, 12, 31)), mask, {"groups": groups}, heads=heads)


CASES = [
    *simple(
        "dilated_window",
        LINES,
        masks.dilated_window,
        {"window": 5, "dilation": 3},
        {"window": 1, "dilation": 7},
        {"window": 40, "dilation": 1},
        {"window": 3, "dilation": 64},
    ),
    *simple(
        "strided",
        LINES,
        masks.strided,
        {"stride": 8, "local": 8},
        {"stride": 1, "local": 1},
        {"stride": 33, "local": 2},
        {"stride": 5, "local": 64},
    ),
    *simple(
        "power",
        LINES,
        masks.power,
        {"window": 2, "block": 3},
        {"window": 1, "block": 8, "sink": 0},
        {"window": 5, "block": 1, "sink": 4},
        {"window": 1, "block": 200},
    ),
    *simple(
        "log_sparse",
        (*LINES, 200),
        masks.log_sparse,
        {"segment": 16, "window": 0},
        {"segment": 16, "window": 64},
        {"segment": 7, "window": 29},
        {"segment": 2, "window": 3},
        {"segment": 65, "window": 500},
    ),
    *map(sparse_transformer, (1, 8, 30)),
    sparse_fixed(16, 4, 1, 1),
    sparse_fixed(16, 4, 1, 3),
    sparse_fixed(24, 2, 3, 2),
    sparse_fixed(5, 5, 1, 1),
    sparse_fixed(7, 1, 1, 7),
    s2_attention(4, 4, 2, 4),
    s2_attention(2, 3, 1, 5, offset=1),
    s2_attention(4, 5, 3, 3, dense=1),
    s2_attention(4, 3, 1, 8, dense=2),
    s2_attention(2, 1, 1, 2, dense=2),
    Case(
        "s2_attention",
        LINES,
        lambda n, b, h: masks.s2_attention(n, 4, 2, 3, 0, 2),
        {"block": 4, "local_blocks": 2, "vertical_stride": 3, "homogeneous": True},
        heads=2,
    ),
    moa([16, 0, -40], ["0", "1/2", "1"]),
    moa([1, 200, -7], ["1/4", "0", "1/8"]),
    streaming(4, 9),
    streaming(0, 1, 5),
    streaming(3, 8, 40),
    streaming(128, 3968, preset="a_shape"),
    streaming(128, 3968, 100, preset="tri_shape"),
    sink_lora(4, 4, 5),
    sink_lora(3, 2, 0),
    long_lora(4, 4),
    long_lora(1, 2),
    long_lora(3, 3),
    long_lora(5, 1),
]

# --- both ways --------------------------------------------------------------------------------------------------------


def flags(n: int, batch: int) -> list[list[bool]]:
    """A few global tokens, others for each batch entry; none in the last."""
    return [[b < batch - 1 and (7 * i + b) % 11 == 3 for i in range(n)] for b in range(batch)]


def tables(n: int, block: int, heads: int) -> list[list[list[int]]]:
    """Two random blocks for each head and block, -1 and blocks seen anyway among them, and a row too many."""
    blocks = -(-n // block)
    drawn = [[(3 * i % (blocks + 1) - 1, i * i % blocks) for i in range(blocks + 1)] for _ in range(heads)]
    return [[[a if a < 0 else (a + h) % blocks, (b + h) % blocks] for a, b in row] for h, row in enumerate(drawn)]


PICTURES = [(0, 0, 0), (2, 9, 20), (0, 31, 31), (5, 11, 12), (3, 20, 400)]
TREES = [(6, [-1, 0, 0, 1, 1, 2, 5]), (0, [-1, -1, 1, 2, 0, 4, 4]), (9, [-1, 0, 1, 2, 3, 4, 5])]


def ancestors(parents: list[int]) -> torch.Tensor:
    return torch.from_numpy(masks.tree_verify(0, parents, len(parents)))


def longformer(window: int, dilation: list[int]) -> Case:
    def mask(n: int, entry: int, head: int) -> Mask:
        return masks.longformer_mask(n, window, dilation[head], flags(n, 3)[entry])

    def inputs(n: int) -> Inputs:
        return {"is_global": torch.tensor(flags(n, 3))}

    return Case("longformer", LINES, mask, {"window": window, "dilation": dilation}, inputs, len(dilation), batch=3)


def bigbird(block: int) -> Case:
    def mask(n: int, b: int, head: int) -> Mask:
        return masks.bigbird(n, block, tables(n, block, 2)[head])

    def inputs(n: int) -> Inputs:
        return {"random": torch.tensor(tables(n, block, 2))}

    return Case("bigbird", LINES, mask, {"block": block}, inputs, heads=2)


CASES += [
    longformer(4, [1, 3]),
    longformer(0, [1, 1]),
    longformer(50, [2, 5]),
    *map(bigbird, (1, 4, 13)),
    *simple("block_diffusion", (2, 30, 62, 130), masks.block_diffusion, {"block": 4}, {"block": 1}, {"block": 100}),
    Case(
        "modality_mutual",
        LINES,
        lambda n, b, h: masks.modality_mutual(n, *PICTURES[b]),
        {},
        lambda n: {
            name: torch.tensor(column)
            for name, column in zip(("image_start", "text_start", "text_end"), zip(*PICTURES, strict=True), strict=True)
        },
        batch=len(PICTURES),
    ),
    Case(
        "tree_verify",
        (16, 18),
        lambda n, b, h: masks.tree_verify(*TREES[b], n),
        {},
        lambda n: {
            "prefix": torch.tensor([prefix for prefix, _ in TREES]),
            "ancestor": torch.stack([ancestors(parents) for _, parents in TREES]),
        },
        batch=len(TREES),
    ),
]

# --- grids ------------------------------------------------------------------------------------------------------------

AXES = ("frames", "height", "width")


def neighborhood(
    extents: tuple[int, ...],
    window: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
) -> Case:
    """A case in two or three axes; a number stands for all of them, in the pattern too."""

    def by_axis(value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,) * len(extents)

    settings = list(zip(extents, *map(by_axis, (window, stride, dilation, causal)), strict=True))
    params = dict(zip(AXES[-len(extents) :], extents, strict=True))
    given = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    return Case(
        f"neighborhood_{len(extents)}d",
        (int(np.prod(extents)),),
        lambda n, b, h: grids.grid(extents, lambda axis, x: grids.neighbours(x, *settings[axis])),
        params | {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()},
    )


def line(**given: Any) -> list[Case]:
    return simple(
        "neighborhood_1d",
        (16, 31, 65),
        lambda n, **s: masks.square(n, lambda q: grids.neighbours(q, n, **s)),
        given,
    )


def sliding_tile(extents: tuple[int, int, int], tile: tuple[int, ...], kernel: tuple[int, ...]) -> Case:
    def mask(n: int, b: int, h: int) -> Mask:
        def sees(axis: int, x: int) -> list[int]:
            return grids.tile_coordinates(x, extents[axis], tile[axis], kernel[axis])

        return grids.with_text(grids.grid(extents, sees), n - int(np.prod(extents)))

    params = dict(zip(AXES, extents, strict=True)) | {"tile": list(tile), "kernel": list(kernel)}
    return Case("sliding_tile", tuple(int(np.prod(extents)) + words for words in (0, 1, 9)), mask, params)


def freeswim(extents: tuple[int, int, int], reach: tuple[int, int]) -> Case:
    def sees(axis: int, x: int) -> range:
        return grids.inward(x, extents[axis], reach[axis - 1]) if axis else range(extents[0])

    params = dict(zip(AXES, extents, strict=True)) | {"reach": list(reach)}
    return Case("freeswim", (int(np.prod(extents)),), lambda n, b, h: grids.grid(extents, sees), params)


TEMPORAL = [[True, False], [False, True]]


def svg(frames: int, per_frame: int, window: float, block: int, band: int, first_frame: bool = True) -> Case:
    """`band` is worked out by hand."""

    def mask(n: int, b: int, h: int) -> Mask:
        video = grids.svg(frames, per_frame, band, TEMPORAL[b][h], first_frame)
        return grids.with_text(video, n - frames * per_frame)

    params = {"frames": frames, "per_frame": per_frame, "window": window, "block": block, "first_frame": first_frame}
    lengths = tuple(frames * per_frame + words for words in (0, 1, 8))
    return Case("svg", lengths, mask, params, lambda n: {"temporal": torch.tensor(TEMPORAL)}, heads=2, batch=2)


def radial(frames: int, per_frame: int, decay: str, block: int, sink: bool) -> Case:
    def mask(n: int, b: int, h: int) -> Mask:
        return grids.radial(frames, per_frame, Fraction(decay), block, sink, n - frames * per_frame)

    params = {"frames": frames, "per_frame": per_frame, "decay": Fraction(decay), "block": block}
    lengths = tuple(frames * per_frame + words for words in (0, 1, 8))
    return Case("radial", lengths, mask, params | {"first_frame_sink": sink})


CASES += [
    *line(window=7),
    *line(window=4, stride=3),
    *line(window=5, stride=5),
    *line(window=3, stride=2, dilation=5),
    *line(window=4, stride=3, dilation=3, causal=True),
    *line(window=2, causal=True),
    *line(window=16),
    neighborhood((9, 11), (3, 5)),
    neighborhood((8, 13), 4, 3),
    neighborhood((7, 12), (3, 4), (2, 4), (2, 3), (True, False)),
    neighborhood((11, 5), 2, 2, 2, True),
    neighborhood((7, 7), 7),
    neighborhood((3, 5, 7), (2, 3, 5)),
    neighborhood((4, 6, 5), (4, 3, 2), (1, 2, 2), (1, 2, 1), (False, True, False)),
    neighborhood((6, 4, 6), 2, 1, 2, (True, False, False)),
    sliding_tile((4, 6, 5), (2, 3, 1), (2, 6, 3)),
    sliding_tile((3, 4, 8), (1, 2, 2), (3, 2, 6)),
    sliding_tile((2, 4, 9), (1, 2, 3), (2, 4, 6)),
    freeswim((3, 7, 9), (1, 2)),
    freeswim((1, 5, 8), (2, 0)),
    freeswim((4, 6, 6), (2, 1)),
    svg(5, 12, 1.5, 4, 16),
    svg(3, 20, 0.7, 8, 8, first_frame=False),
    svg(7, 9, 2, 1, 18),
    svg(1, 33, 1, 33, 33),
    radial(3, 192, "0.2", 16, True),
    radial(5, 130, "1/3", 16, False),
    radial(4, 67, "0.95", 10, True),
    radial(18, 8, "1", 4, False),
    radial(2, 33, "0", 33, False),
]

# --- the tests --------------------------------------------------------------------------------------------------------


def queries(case: Case, n: int) -> int:
    """As many as keys, but for a tree, whose nodes ask."""
    return len(TREES[0][1]) if case.name == "tree_verify" else n


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_mask_is_the_definition(case: Case) -> None:
    attend = case.compiled()
    for n in case.lengths:
        wanted = case.masks(n)
        for head in range(case.heads):
            found = attend.mask(
                queries(case, n), n, head=head, heads=case.heads, kv_heads=case.kv_heads, **case.inputs(n)
            ).numpy()
            expected = wanted[0, head] if case.batch is None else wanted[:, head]
            np.testing.assert_array_equal(found, expected, err_msg=f"{n} keys, head {head}")


ONE_SOFTMAX = [case for case in CASES if case.name != "longformer"]  # its outputs: test_weights.py


@pytest.mark.parametrize("case", ONE_SOFTMAX, ids=repr)
def test_output_and_gradients_are_those_of_masked_softmax(case: Case) -> None:
    n = case.lengths[len(case.lengths) // 2]
    n_q, batch, kv_heads = queries(case, n), case.batch or 1, case.kv_heads or case.heads
    q, grad = torch.randn(batch, case.heads, n_q, 8), torch.randn(batch, case.heads, n_q, 8)
    k, v = torch.randn(2, batch, kv_heads, n, 8)
    attend, inputs = case.compiled(), case.inputs(n)
    mask = torch.from_numpy(case.masks(n))

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, return_lse=True, **inputs)

    probe = Probe(q, k, v, mask, grad, torch.randn(batch, case.heads, n_q))
    errors = compare(run, probe)
    assert all(error.agrees for error in errors), errors


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "tree_verify"], ids=repr)
def test_every_query_sees_itself(case: Case) -> None:
    """A row without a key would be a reading of a paper that no paper has."""
    for n in case.lengths:
        assert case.masks(n).diagonal(axis1=-2, axis2=-1).all()


def test_all_static_patterns_are_here() -> None:
    shelf = {"full", "causal", "sliding_window", "blocked", "prefix_lm", "document"}
    with_scores = {system.name for system in SYSTEMS}  # held against references of their own in test_scores.py
    with_weights = {system.name for system in WEIGHTED} - {"longformer"}  # and in test_weights.py
    assert {case.name for case in CASES} == set(pattern_names()) - shelf - with_scores - with_weights


# --- parts of a call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "mask"),
    [
        ("dilated_window", {"window": 4, "dilation": 3}, masks.dilated_window),
        ("strided", {"stride": 7, "local": 5}, masks.strided),
        ("power", {"window": 2, "block": 3}, masks.power),
        ("log_sparse", {"segment": 8, "window": 20}, masks.log_sparse),
    ],
)
def test_the_last_queries_see_what_they_see_in_the_whole(
    name: str, params: dict[str, Any], mask: Callable[..., Mask]
) -> None:
    """`align end`, as for a cache."""
    found = compile_attention(name, **params).mask(5, 77).numpy()
    np.testing.assert_array_equal(found, mask(77, **params)[-5:])


def test_the_last_rows_of_tri_shape_are_counted_from_the_end() -> None:
    found = compile_attention("streaming", sinks=2, window=3, last=4).mask(9, 40).numpy()
    np.testing.assert_array_equal(found, masks.streaming(9, 40, 2, 3, 4))


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


# --- parameters and calls that make no sense --------------------------------------------------------------------------

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
    ("neighborhood_2d", {**GRID, "dilation": [1, 2]}, "window[1] * dilation[1] <= width"),
    ("neighborhood_3d", {**VIDEO}, "window[0] * dilation[0] <= frames"),
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
    (found,) = caught.value.diagnostics
    assert found.code == "A805"
    assert f"`{name}` requires" in found.message and words in found.message


REFUSED_CALLS: list[tuple[str, dict[str, Any], int, dict[str, Any], str]] = [
    ("neighborhood_1d", {"window": 7, "dilation": 3}, 20, {}, "window * dilation <= keys"),
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
    (found,) = caught.value.diagnostics
    assert found.code == "A805" and words in found.message


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("neighborhood_2d", "flux"),
        ("neighborhood_3d", "hunyuan"),
        ("neighborhood_3d", "cosmos"),
        ("sliding_tile", "hunyuan"),
        ("radial", "wan"),
        ("radial", "hunyuan"),
    ],
)
def test_the_presets_of_papers_fit_their_rules(name: str, preset: str) -> None:
    assert compile_attention(name, preset=preset).name == name
