"""Emitted kernels in Triton's interpreter against the reference in fp64: output, LSE and every gradient.

Errors measured with these seeds, and with those of `test_weights.py`: at most 5e-6 in fp32 and 6e-4 in fp16,
relative to the largest entry or to 1; `local_linear` apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import UnsupportedError, compile_attention
from attnc.runtime.texts.library import pattern_names
from attnc.spec.errors import EvaluationError
from kernel_calls import check, operands, recorded, stages
from library_in_kernels import check_pattern, target_for, use
from without import TILES

STAGES = {"forward", "delta", "dq", "dkdv"}


@pytest.fixture(params=["sm_80", "sm_90"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Load tiles through pointers (sm_80) or through boxes (sm_90)."""
    name: str = request.param
    use(monkeypatch, name)
    return name


# --- the library -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*pattern_names()} - {*TILES}))
def test_library_in_half_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are loaded the other way than in `test_every_file.py`, which covers fp32."""
    use(monkeypatch, target_for(name, other=True))
    check_pattern(name, torch.float16)


# --- sizes -----------------------------------------------------------------------------------------------------------

WINDOW: Mapping[str, Any] = {"window": 40, "sinks": 4}


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("sliding_window", WINDOW),
        ("neighborhood_1d", {"window": 9}),
        ("power", {"block": 16, "window": 2}),
        ("gpt_oss", {"window": 20}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize(("n_q", "n_k"), [(97, 97), (50, 130), (1, 97), (1, 1)])
def test_lengths(name: str, params: Mapping[str, Any], n_q: int, n_k: int, target: str) -> None:
    attention = compile_attention(name, backend="triton", **params)
    if name == "neighborhood_1d":  # has as many queries as keys, and no fewer tokens than its window
        n_q = n_k = max(n_k, 9)
    heads = (2, 2) if name == "gpt_oss" else (2, 1)
    inputs = {"sink": torch.randn(2)} if name == "gpt_oss" else {}
    assert stages(check(attention, operands(n_q, n_k, heads=heads), inputs)) >= STAGES


@pytest.mark.parametrize("extents", [(5, 7), (16, 8), (9, 23), (17, 33)])
def test_pictures(extents: tuple[int, int], target: str) -> None:
    """Kernels that take the grid's extents as arguments; the extents are multiples of no tile side."""
    height, width = extents
    params: dict[str, Any] = {"window": [3, 5], "stride": [1, 2], "causal": [True, False]}
    attention = compile_attention("neighborhood_2d", backend="triton", height=height, width=width, **params)
    launches = check(attention, operands(height * width))
    assert stages(launches) >= STAGES
    assert all("size_width" in one.source.text for one in launches if one.source.stage != "delta")


@pytest.mark.parametrize("name", ["sm_100", "gfx942"])
def test_other_targets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Persistent programs that take one tile after another, and tile shapes for AMD."""
    use(monkeypatch, name)
    attention = compile_attention("sliding_window", backend="triton", **WINDOW)
    check(attention, operands(160, heads=(2, 1), widths=(64, 64)))
    assert ("warp_specialize=True" in attention.source(name)["sliding_window_forward"]) == (name == "sm_100")


def test_partial_tiles_read_nothing_past_the_last_key(target: str) -> None:
    """In a partial tile neither a table nor the index into it is read past the last key."""
    text = compile_attention("graphormer", backend="triton").source("sm_90")["graphormer_forward"]
    reads = [line for line in text.splitlines() if "tl.load(input_table" in line and "visible" in line]
    assert reads
    assert all(line.count("tl.load(") == line.count("mask=visible") == 2 for line in reads)


def test_a_single_query_with_a_score(target: str) -> None:
    check(compile_attention("alibi", backend="triton"), operands(1, 97, heads=(4, 2)))


@pytest.mark.parametrize("heads", [(4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("name", ["causal", "moa"])
def test_heads(name: str, heads: tuple[int, int], target: str) -> None:
    params: dict[str, Any] = {}
    if name == "moa":
        params = {"alpha": [16, 32, 24, 8][: heads[0]], "beta": [0.25, 0.125, 0.5, 0][: heads[0]], "block": 16}
    check(compile_attention(name, backend="triton", **params), operands(40, heads=heads, batch=2))


@pytest.mark.parametrize("widths", [(40, 40), (72, 16), (96, 96), (300, 16), (16, 300), (1, 3)], ids=str)
def test_widths(widths: tuple[int, int], target: str) -> None:
    check(compile_attention("sliding_window", backend="triton", **WINDOW), operands(49, widths=widths))


def test_many_small_heads(target: str) -> None:
    """Each of many heads has one small tile."""
    check(compile_attention("causal", backend="triton"), operands(3, heads=(8, 4), batch=4))


@pytest.mark.parametrize(
    ("name", "params"),
    [("sliding_window", WINDOW), ("power", {"block": 16}), ("softcap", {"cap": 2})],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("widths", [(64, 64), (40, 72)], ids=str)
def test_half_precision(name: str, params: Mapping[str, Any], widths: tuple[int, int], target: str) -> None:
    attention = compile_attention(name, backend="triton", **params)
    check(attention, operands(97, heads=(1, 1), widths=widths, dtype=torch.float16))


# --- layouts ---------------------------------------------------------------------------------------------------------


def tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0] + 1, x.shape[1] + 1, 2 * x.shape[2], x.shape[3] + 5), torch.nan)
    return wide[1:, 1:, ::2, 3:-2].copy_(x)


def sliced_in_units(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0] + 1, x.shape[1] + 1, 2 * x.shape[2], x.shape[3] + 16), torch.nan)
    return wide[1:, 1:, ::2, 8:-8].copy_(x)


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def all_heads_alike(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


def unaligned(x: Tensor) -> Tensor:
    shifted = x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape)
    return shifted.copy_(x)


def width_major(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = [tokens_first, sliced, sliced_in_units, expanded, all_heads_alike, unaligned, width_major]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts(layout: Any, target: str) -> None:
    tensors = {name: layout(x) for name, x in operands(34, heads=(2, 2), batch=2).items()}
    check(compile_attention("sliding_window", backend="triton", **WINDOW), tensors)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_one_tensor_with_another_layout(name: str, target: str) -> None:
    tensors = operands(34, heads=(2, 2), batch=2)
    tensors[name] = width_major(tensors[name])
    check(compile_attention("causal", backend="triton"), tensors)


def test_an_expanded_gradient_of_out(target: str) -> None:
    attention = compile_attention("causal", backend="triton")
    ours, true = (
        {n: x.to(dtype).requires_grad_() for n, x in operands_of_seed().items()}
        for dtype in (torch.float32, torch.float64)
    )
    for total in (attention(*ours.values()).sum(), attention.reference(*true.values()).sum()):
        torch.autograd.backward(total)
    for name in "qkv":
        actual, grad = ours[name].grad, true[name].grad
        assert actual is not None
        assert grad is not None
        assert (actual - grad).abs().max() < 1e-5


def operands_of_seed() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return operands(40)


# --- scale, documents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("name", ["causal", "softcap"])
def test_scale(name: str, scale: float, target: str) -> None:
    check(compile_attention(name, backend="triton"), operands(40), scale=scale)


CUTS = [[0, 1, 1, 40, 66], [0, 0, 66, 66], [0, 33, 34, 35, 66]]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(
    ("name", "params"),
    [("sliding_window", WINDOW), ("neighborhood_1d", {"window": 9}), ("alibi", {})],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_packed_sequences(name: str, params: Mapping[str, Any], cuts: list[int], target: str) -> None:
    """Some sequences are empty or have one token."""
    attention = compile_attention(name, backend="triton", **params)
    launches = check(attention, operands(66, heads=(1, 1)), cu_seqlens=torch.tensor(cuts))
    assert stages(launches) >= STAGES


@pytest.mark.parametrize("n_q", [24, 90])
def test_documents(n_q: int, target: str) -> None:
    doc = torch.tensor([[0] * 7 + [1] * 40 + [2] * 43, [3] * 60 + [1] * 29 + [9]])
    attention = compile_attention("document", backend="triton")
    check(attention, operands(n_q, 90, heads=(1, 1), batch=2), {"doc": doc})


def test_documents_do_not_depend_on_each_other(target: str) -> None:
    """Tokens of other documents change no bit of a document's result."""
    attention = compile_attention("document", backend="triton")
    tensors, doc = operands(90), torch.tensor([[0] * 45 + [1] * 45])
    results_of_runs = []
    for factor in (1, 1e4):
        leaves = [torch.cat([x[:, :, :45], x[:, :, 45:] * factor], 2).requires_grad_() for x in tensors.values()]
        out = attention(*leaves, doc=doc)
        results_of_runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a[:, :, :45], b[:, :, :45]) for a, b in zip(*results_of_runs, strict=True))


BLIND = """
pattern blind
    align end
    visible k <= q - 20 and q % 3 > 0
"""


def test_rows_without_keys(target: str) -> None:
    for n_q, n_k in ((66, 66), (20, 66), (19, 19)):
        check(compile_attention(BLIND, backend="triton"), operands(n_q, n_k, heads=(1, 1)))


def test_same_bits(target: str) -> None:
    """Two equal calls give the same bits."""
    attention = compile_attention("fox", backend="triton")
    tensors, decay = operands(40, heads=(2, 2)), -torch.rand(1, 40, 2)
    results_of_runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (*tensors.values(), decay)]
        out = attention(*leaves[:3], f=leaves[3])
        results_of_runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results_of_runs, strict=True))


def test_64_bit_range_ends(target: str) -> None:
    attention = compile_attention("moa", backend="triton", alpha=[64, 16], beta=[0.25, 0.125], block=16)
    assert "to(tl.int64)" in attention.source("sm_90")["moa_dkdv"]
    assert stages(check(attention, operands(130, 130, heads=(2, 1)))) >= STAGES
    text = "pattern far\n    align end\n    visible k <= q and (q * 4096 > 200000 or k < 9)\n"
    far = compile_attention(text, backend="triton")
    assert "to(tl.int64)" in far.source("sm_90")["far_dkdv"]
    assert stages(check(far, operands(130, 130, heads=(2, 1)))) >= STAGES


def test_64_bit_numbers_run_as_tiles_in_torch() -> None:
    attention = compile_attention("sliding_window", window=20, backend="triton")
    q, k, v = (torch.randn(1, 2, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with recorded() as launches:
        out = attention(q, k, v)
    assert not launches
    assert torch.allclose(out, attention.reference(q, k, v), atol=1e-12)
    with pytest.raises(UnsupportedError, match="no kernels for numbers of float64"):
        compile_attention("sliding_window", window=20, backend="triton", strict=True)(q, k, v)


CLASHING = """\
pattern clashing
    input row: int[batch]
    input heads_: real[head]
    input tile: real[batch, token]
    input lane: int[batch, query, key]
    input words: real[head, entries]
    align end
    visible k <= q or k < row
    score   scale * dot(q, k) * heads_ + tile[k] + words[lane[q, k]]
"""


def test_inputs_may_share_names_with_kernel_variables(target: str) -> None:
    attention = compile_attention(CLASHING, backend="triton")
    torch.manual_seed(3)
    inputs = {
        "row": torch.tensor([9]),
        "heads_": torch.rand(2),
        "tile": torch.randn(1, 40),
        "lane": torch.randint(5, (1, 40, 40)),
        "words": torch.randn(2, 5),
    }
    assert stages(check(attention, operands(40, heads=(2, 1)), inputs)) >= STAGES


LISTED = """\
pattern listed
    input words: real[head, entries]
    input lane: int[batch, query, key]
    align end
    visible k <= q and power_of_two(q - k + 1)
    score   scale * dot(q, k) + words[lane[q, k]]
"""


def test_inputs_by_pair_in_listed_tiles(target: str) -> None:
    attention = compile_attention(LISTED, backend="triton")
    torch.manual_seed(3)
    inputs: dict[str, Any] = {"words": torch.randn(2, 5), "lane": torch.randint(5, (1, 70, 70))}
    tensors = operands(70, heads=(2, 1))
    q, k, v = tensors.values()
    with torch.no_grad(), recorded() as launches:
        out = attention(q, k, v, **inputs)
    assert stages(launches) == {"forward"}
    assert torch.allclose(out, attention.reference(q, k, v, **inputs), atol=1e-5)
    assert not stages(check(attention, tensors, inputs))  # no kernels for their gradients: tiles in torch


NEAR = """\
pattern near
    input table: real[head, 20]
    align end
    visible 0 <= q - k < 20
    score   scale * dot(q, k) + table[q - k]
"""


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 3, 3, 41, 70])])
def test_tables_cover_the_distances_that_occur(cu_seqlens: Tensor | None, target: str) -> None:
    attention = compile_attention(NEAR, backend="triton")
    torch.manual_seed(3)
    inputs: dict[str, Any] = {"table": torch.randn(2, 20)}
    more: dict[str, Any] = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    assert stages(check(attention, operands(70, heads=(2, 1)), {**inputs, **more})) >= STAGES
    with pytest.raises(EvaluationError, match="`table` is read at 20"):
        text = NEAR.replace("< 20", "< 21")
        q, k, v = operands(70, heads=(2, 1)).values()
        compile_attention(text, backend="triton")(q, k, v, **inputs)


def test_gated_softmax_of_float64_runs_as_tiles_in_torch() -> None:
    """`make hunt`, part triton, case 6: real inputs were missing when a pattern ran as tiles in torch."""
    text = (
        "pattern gated\n    input gate: unit[batch, head, query]\n    align end\n    visible k <= q\n"
        "    weights gate[q] * softmax(score)\n"
    )
    attend = compile_attention(text, backend="triton")
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    gate = torch.rand(1, 2, 9, dtype=torch.float64, requires_grad=True)
    ours, exact = attend(q, k, v, gate=gate), attend.reference(q, k, v, gate=gate)
    torch.testing.assert_close(ours, exact)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v, gate)) for out in (ours, exact)]
    torch.testing.assert_close(*grads)
