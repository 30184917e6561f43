"""The kernels of routing patterns that the kernel gate checks: those that calls launch, on each target."""

from __future__ import annotations

import pytest

from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.kernels.tile_shapes import tile_shape
from attnc.runtime.texts.library import ModuleLoader, find, routing_names
from attnc.runtime.toolchain.compiling import Failure
from attnc.runtime.toolchain.routing_gate import PARAMETERS, cases, judge
from attnc.spec.load import load_program

pytest.importorskip("triton")


def test_kernels_gather_queries_for_selections_of_blocks() -> None:
    sources = [source.source for source in cases(["moba"], ["sm_90"], [64])]
    assert {source.function for source in sources} == {
        f"chosen_{x}" for x in ("forward", "merge", "delta", "dq", "sum", "dkdv")
    }
    assert sum(source.stage == "forward" for source in sources) == 2


def test_kernels_read_tile_lists_for_selections_of_keys() -> None:
    functions = [case.source.function for case in cases(["deepseek_sparse"], ["sm_90"], [64])]
    assert set(functions) == {f"deepseek_sparse_{x}" for x in ("forward", "delta", "dq", "dkdv")}


def test_each_target_has_its_own_kernels() -> None:
    sources = {
        case.target: case.source for case in cases(["hip"], ["sm_90", "gfx942"], [64]) if case.stage == "forward"
    }
    for target, source in sources.items():
        assert source.tiles == tile_shape(TARGETS[target], "forward", 64, 64, "bfloat16", content=True, gathered=True)
    assert sources["sm_90"].text != sources["gfx942"].text


def test_patterns_that_run_in_torch_have_no_kernels() -> None:
    assert list(cases(["landmark_retrieval"], ["sm_90"], [16])) == []


def test_patterns_with_required_parameters_have_values() -> None:
    for name in routing_names():
        module = find(name)
        program = load_program(module.source, ModuleLoader(module.folder), name)
        missing = {parameter.name for parameter in program.parameters if parameter.default is None}
        assert missing == PARAMETERS.get(name, {}).keys(), name


def test_a_kernel_that_does_not_compile_is_reported() -> None:
    case = next(cases(["sparse_d"], ["sm_90"], [64]))
    assert judge(case, Failure("no such instruction")) == ["no such instruction"]
