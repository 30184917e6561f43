"""The kernels of routing patterns for the gate: those that calls start, for each target its own."""

from __future__ import annotations

import pytest

from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.kernels.tile_shapes import tile_shape
from attnc.runtime.gpu.compiling import Failure
from attnc.runtime.gpu.routing_gate import PARAMETERS, cases, judge
from attnc.runtime.library import ModuleLoader, find, routing_names
from attnc.spec.load import load_program

pytest.importorskip("triton")


def test_queries_are_gathered_where_blocks_are_chosen_of_each_head_and_of_groups() -> None:
    found = [one.source for one in cases(["moba"], ["sm_90"], [64])]
    assert {one.function for one in found} == {
        f"chosen_{x}" for x in ("forward", "merge", "delta", "dq", "sum", "dkdv")
    }
    assert sum(one.stage == "forward" for one in found) == 2


def test_tiles_are_listed_where_keys_are_chosen_one_by_one() -> None:
    found = [one.source.function for one in cases(["deepseek_sparse"], ["sm_90"], [64])]
    assert set(found) == {f"deepseek_sparse_{x}" for x in ("forward", "delta", "dq", "dkdv")}


def test_each_target_has_its_own_though_a_call_was_made_for_another_before() -> None:
    found = {one.target: one.source for one in cases(["hip"], ["sm_90", "gfx942"], [64]) if one.stage == "forward"}
    for target, source in found.items():
        assert source.tiles == tile_shape(TARGETS[target], "forward", 64, 64, "bfloat16", asked=True, gathered=True)
    assert found["sm_90"].text != found["gfx942"].text


def test_what_runs_as_tiles_in_torch_has_none() -> None:
    assert list(cases(["landmark_retrieval"], ["sm_90"], [16])) == []


def test_parameters_are_given_to_those_that_need_them() -> None:
    for name in routing_names():
        own = find(name)
        program = load_program(own.source, ModuleLoader(own.folder), name)
        missing = {one.name for one in program.parameters if one.default is None}
        assert missing == PARAMETERS.get(name, {}).keys(), name


def test_a_kernel_that_does_not_compile_is_told() -> None:
    case = next(cases(["sparse_d"], ["sm_90"], [64]))
    assert judge(case, Failure("no such instruction")) == ["no such instruction"]
