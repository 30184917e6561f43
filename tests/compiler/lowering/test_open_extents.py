"""Patterns with open extents: substituting the values gives the node of the pattern with fixed extents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from attnc.compiler.ir import fold
from attnc.compiler.ir.rewrite import substitute, walk
from attnc.compiler.kernels.attention_kernels import HeadShape, find_kernels
from attnc.compiler.kernels.targets import TARGETS
from plan_calls import from_library, lowered

HEADS, SM_90 = HeadShape(64, 64, "bfloat16"), TARGETS["sm_90"]
PICTURE: dict[str, Any] = {"height": 24, "width": 40}
VIDEO: dict[str, Any] = {"frames": 8, **PICTURE}


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("neighborhood_2d", PICTURE),
        ("neighborhood_2d", {**PICTURE, "window": [4, 9], "dilation": [2, 3], "causal": [True, False]}),
        ("neighborhood_3d", {**VIDEO, "window": [3, 5, 6], "stride": [2, 1, 3]}),
        ("halo", PICTURE),
        ("davit_window", PICTURE),
        ("videofactory", {**VIDEO, "window": [4, 8, 8]}),
        ("lingen_temporal", VIDEO),
    ],
)
def test_library(name: str, params: dict[str, Any]) -> None:
    pattern = from_library(name, **params)
    general = pattern.general
    assert general is not None
    assert general.sizes == {axis: params[axis] for axis in general.sizes}
    for node in pattern.nodes:
        opened = general.known[node.visible]
        assert {fold.extent(size) for size in general.sizes} & set(walk(opened))
        assert substitute(opened, general.numbers) is node.visible


def test_extents_needed_as_numbers_are_not_left_open() -> None:
    source = """
pattern of_tables(height: int, width: int)
    input bias: real[head, height * width]
    tokens y: height, x: width
    visible abs(q.y - k.y) <= 1 and abs(q.x - k.x) <= 2
    score scale * dot(q, k) + bias[k]
"""
    pattern = lowered(source, height=6, width=10)
    assert pattern.general is None
    assert find_kernels(pattern, HEADS, SM_90).form == "bricks"


def test_an_input_size_is_not_confused_with_an_extent_of_its_name() -> None:
    source = """
pattern named(height: int, width: int)
    input bias: real[head, {}]
    tokens y: height, x: width
    visible abs(q.y - k.y) <= 1 and abs(q.x - k.x) <= 2
    score scale * dot(q, k) + bias[0]
"""
    assert lowered(source.format("7"), height=6, width=10).general is not None
    assert lowered(source.format("height"), height=6, width=10).general is None


def test_a_changed_relation_keeps_its_numbers() -> None:
    pattern = from_library("neighborhood_2d", **PICTURE)
    seen = fold.conjunction(pattern.attend.visible, fold.less_equal(fold.place("k"), fold.place("q")))
    changed = replace(pattern, nodes=(replace(pattern.attend, visible=seen),))
    assert "size_width" in find_kernels(pattern, HEADS, SM_90).forward.text
    assert "size_width" not in find_kernels(changed, HEADS, SM_90).forward.text


def test_extents_that_are_formulas_of_parameters() -> None:
    source = """
pattern doubled(rows: int)
    tokens y: 2 * rows + 1, x: 8 * rows
    visible abs(q.y - k.y) <= 1 and abs(q.x - k.x) <= 2
"""
    texts = {find_kernels(lowered(source, rows=rows), HEADS, SM_90).forward.text for rows in (9, 10, 11, 12, 14)}
    assert len(texts) <= 2
    assert all("extent_0 = 2 * size_rows + 1" in text for text in texts)


def test_a_grid_without_parameters_has_its_numbers() -> None:
    source = """
pattern fixed
    tokens y: 9, x: 20
    visible abs(q.y - k.y) <= 1 and abs(q.x - k.x) <= 2
"""
    assert "extent_1 = 20" in find_kernels(lowered(source), HEADS, SM_90).forward.text
