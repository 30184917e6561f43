"""The plainest library patterns against masks written by hand, their gradients against torch, and every file's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from attnc import compile_attention
from attnc.runtime.library import ModuleLoader, library_files, library_names, recurrence_names
from attnc.spec.load import check_source
from attnc.spec.reading.text import decode

Reference = Callable[..., NDArray[np.bool_]]


def full(n: int) -> NDArray[np.bool_]:
    return np.ones((n, n), dtype=bool)


def causal(n: int) -> NDArray[np.bool_]:
    return np.tril(np.ones((n, n), dtype=bool))


def sliding_window(n: int, window: int, sinks: int = 0) -> NDArray[np.bool_]:
    mask = np.zeros((n, n), dtype=bool)
    for i in range(n):
        mask[i, max(0, i - window + 1) : i + 1] = True
        mask[i, : min(sinks, i + 1)] = True
    return mask


def blocked(n: int, block: int) -> NDArray[np.bool_]:
    mask = np.zeros((n, n), dtype=bool)
    for start in range(0, n, block):
        mask[start : start + block, start : start + block] = True
    return mask


def prefix_lm(n: int, prefix: int) -> NDArray[np.bool_]:
    mask = causal(n)
    mask[:, :prefix] = True
    return mask


def document(n: int, ids: list[int]) -> NDArray[np.bool_]:
    mask = np.zeros((n, n), dtype=bool)
    for i in range(n):
        for j in range(i + 1):
            mask[i, j] = ids[i] == ids[j]
    return mask


CASES: list[tuple[str, dict[str, Any], dict[str, Any], Callable[[int], NDArray[np.bool_]]]] = [
    ("full", {}, {}, full),
    ("causal", {}, {}, causal),
    ("sliding_window", {"window": 9}, {}, lambda n: sliding_window(n, 9)),
    ("sliding_window", {"window": 1}, {}, lambda n: sliding_window(n, 1)),
    ("sliding_window", {"window": 5, "sinks": 3}, {}, lambda n: sliding_window(n, 5, 3)),
    ("sliding_window", {"preset": "streaming"}, {}, lambda n: sliding_window(n, 2000, 4)),
    ("blocked", {"block": 12}, {}, lambda n: blocked(n, 12)),
]


@pytest.mark.parametrize("n", [1, 31, 129])
@pytest.mark.parametrize(("name", "params", "inputs", "reference"), CASES)
def test_the_mask_is_the_definition(
    name: str, params: dict[str, Any], inputs: dict[str, Any], reference: Callable[[int], NDArray[np.bool_]], n: int
) -> None:
    attend = compile_attention(name, **params)
    np.testing.assert_array_equal(attend.mask(n, **inputs).numpy(), reference(n))


@pytest.mark.parametrize("n", [1, 31, 129])
def test_prefix_lm_has_a_prefix_for_each_batch_entry(n: int) -> None:
    prefixes = [0, 1, n // 2, n]
    masks = compile_attention("prefix_lm").mask(n, prefix=torch.tensor(prefixes))
    for mask, prefix in zip(masks, prefixes, strict=True):
        np.testing.assert_array_equal(mask.numpy(), prefix_lm(n, prefix))


def test_document_isolates() -> None:
    ids = [3, 3, 3, 0, 7, 7, 7, 7, 7, 1, 1]
    (mask,) = compile_attention("document").mask(len(ids), doc=torch.tensor([ids]))
    np.testing.assert_array_equal(mask.numpy(), document(len(ids), ids))


@pytest.mark.parametrize(("name", "params", "inputs", "reference"), CASES)
def test_output_and_gradients_are_those_of_masked_softmax(
    name: str, params: dict[str, Any], inputs: dict[str, Any], reference: Callable[[int], NDArray[np.bool_]]
) -> None:
    n = 70
    q, k, v = (torch.randn(2, 4, n, 16, requires_grad=True) for _ in range(3))
    weight = torch.randn(2, 4, n, 16)
    out = compile_attention(name, **params)(q, k, v, **inputs)
    mask = torch.from_numpy(reference(n))
    plain = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    torch.testing.assert_close(out.double(), plain, atol=2e-6, rtol=0)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((plain * weight).sum(), (q, k, v))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other.double(), atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(library_files()))
def test_a_file_checks_without_a_word_and_names_its_source(name: str) -> None:
    path = library_files()[name]
    source = decode(path.read_bytes(), path.name)
    assert check_source(source, ModuleLoader(None)) == ()
    if name in library_names():
        assert f"{'recurrence' if name in recurrence_names() else 'pattern'} {name}" in source.text
        assert "Source:" in source.text


GRID = {"frames": 4, "height": 32, "width": 64}
NEEDED: dict[str, dict[str, Any]] = {
    "biformer": {"height": 8, "width": 8},
    "combiner": {"segment": 64},
    "davit_window": {"height": 8, "width": 8},
    "freeswim": GRID,
    "halo": {"height": 8, "width": 8},
    "hierarchical": {"group": 64},
    "lingen_ma": GRID,
    "lingen_temporal": GRID,
    "log_sparse": {"segment": 16, "window": 64},
    "longformer": {"dilation": [1, 2]},
    "mhs_vm": {"height": 8, "width": 8},
    "monarch": {"rows": 16, "cols": 16},
    "monarch_rt": {"frames": 4, "height": 8, "width": 8},
    "mminference_grid": {"strides": [8, 16]},
    "moa": {"alpha": [0, 64], "beta": [0.5, 0]},
    "neighborhood_2d": {"height": 8, "width": 8},
    "neighborhood_3d": {**GRID, "window": 3},
    "radial": {"frames": 4, "per_frame": 64},
    "sliding_tile": {**GRID, "tile": 4, "kernel": 4},
    "spatial_mamba": {"height": 8, "width": 8},
    "svg": {"frames": 4, "per_frame": 64},
    "videofactory": GRID,
    "vmoba": GRID,
    "vmoba_threshold": GRID,
    "vsa": GRID,
}
"""Parameters without a default."""


@pytest.mark.parametrize("name", library_names())
def test_a_copy_compiles_by_path(name: str, tmp_path: Any) -> None:
    copy, given = tmp_path / f"{name}.attn", NEEDED.get(name, {})
    copy.write_bytes(library_files()[name].read_bytes())
    assert compile_attention(copy, **given).name == name
    assert compile_attention(f"{copy}:{name}", **given).name == name
