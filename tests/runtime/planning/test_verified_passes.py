"""The result of every pass that returns IR is verified: a pass that breaks an invariant is caught wherever it runs."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from attnc import compile_attention
from attnc.compiler import ir
from attnc.compiler.analysis import intervals
from attnc.compiler.growth import open_relation, powers
from attnc.compiler.ir import fold, value_nodes
from attnc.compiler.ir.verify_ir import IRInvalid
from attnc.compiler.kernels import attention_kernels, content_mask_tiles, content_masks, parts
from attnc.compiler.lowering import specialise
from attnc.compiler.lowering.lower import lower
from attnc.compiler.passes import attentions
from attnc.compiler.passes.last_rows import last_rows
from attnc.compiler.planning import documents, residues
from attnc.compiler.planning.build_plan import CallShape
from attnc.compiler.simulation import natural_tiles
from attnc.runtime.call.call_shapes import TensorSizes, shape_of_call
from attnc.runtime.executors.recurrent import token_integers
from attnc.runtime.executors.selections import sequences

ROOT = Path(__file__).parents[3]
Q, K = fold.place("q"), fold.place("k")
CAUSAL = fold.less_equal(K, Q)
NEAR = fold.less(fold.sub(Q, K), fold.extent("keys"))
SUMMANDS = "pattern p\n    visible k <= q\n    weights softmax(score) + softplus(score)\n"
TWO = """\
pattern p
    branch near
        visible 0 <= q - k < 4
    branch far
        visible k <= q
    combine near + far
"""
FAMILY = """\
pattern p
    branch near[i in 0 .. 2]
        visible 0 <= q - k < 4 + i
    combine sum(near[i] for i in 0 .. 2)
"""
GRID = "pattern p(height: int = 4, width: int = 4)\n    tokens y: height, x: width\n    visible abs(q.y - k.y) < 2\n"


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in (*(ROOT / "compiler").rglob("*.py"), *(ROOT / "runtime").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(ROOT).as_posix()}:{node.name}", node


RETURN_WHAT_A_PASS_DID = {
    "compiler/lowering/lower.py:_lower",  # verified by `lower`, and by `_general`
    "runtime/planning/branch_relations.py:_pattern_of",
    "runtime/toolchain/selection.py:pattern",
    "runtime/patterns/pattern_description.py:pattern",
    "runtime/executors/pattern_attentions.py:_pattern_of",
}


def test_every_function_that_returns_a_pattern_verifies_it() -> None:
    """Check every function of compiler and runtime whose signature returns a pattern."""
    returning = {
        name: node for name, node in functions() if node.returns and ast.unparse(node.returns)[-7:] == "Pattern"
    }
    bare = {name for name, node in returning.items() if "verified" not in map(ast.unparse, node.decorator_list)}
    assert bare == RETURN_WHAT_A_PASS_DID
    assert len(returning) == len(bare) + 11


# --- passes that return patterns: `replace` of their module gives two tensors one name --------------------------------


def broken_replace(item: Any, **changes: Any) -> Any:
    replaced = replace(item, **changes)
    if not isinstance(replaced, ir.Pattern):
        return replaced
    twice = ir.intern(ir.Tensor("twice", "int", ("key",)))
    return replace(replaced, tensors=(*replaced.tensors, twice, twice))


def pattern(name: str, **parameters: Any) -> ir.Pattern:
    return compile_attention(name, **parameters).pattern


def operands(n: int = 64, heads: int = 2) -> list[torch.Tensor]:
    return [torch.randn(1, heads, n, 16) for _ in range(3)]


PATTERNS: dict[str, tuple[str, Callable[[], object]]] = {
    "alone": ("compiler.passes.attentions", lambda: attentions.alone(pattern(TWO), pattern(TWO).nodes[0])),
    "open_inputs": ("compiler.passes.attentions", lambda: attentions.open_inputs(pattern("causal"))),
    "open_choices": ("compiler.passes.attentions", lambda: attentions.open_choices(pattern("moba"))),
    "choosing": (
        "compiler.passes.attentions",
        lambda: attentions.choosing(pattern("moba"), pattern("moba").selections[0]),
    ),
    "stateful_alone": (
        "compiler.passes.attentions",
        lambda: attentions.stateful_alone(pattern("retention"), pattern("retention").recur),  # type: ignore[arg-type]
    ),
    "packed": ("compiler.passes.attentions", lambda: attentions.packed(pattern("causal"))),
    "rows_of": ("compiler.passes.attentions", lambda: attentions.rows_of(replace(pattern("causal"), nodes=()))),
    "last_rows": ("compiler.passes.last_rows", lambda: last_rows(pattern("causal"))),
    "in_parts": ("compiler.kernels.parts", lambda: parts.in_parts(pattern(SUMMANDS))),
    "lower": ("compiler.lowering.lower", lambda: lower(compile_attention("causal").bound)),
    "join_documents": (
        "compiler.passes.joined_documents",
        lambda: compile_attention("document").mask_mod(8, doc=torch.tensor([[0] * 5 + [1] * 3])),
    ),
    "_pointwise": ("compiler.passes.pointwise", lambda: compile_attention("causal").mask_mod(8)),
    "alone of sequences": ("runtime.executors.selections.sequences", lambda: sequences.alone(pattern("document"))),
    "_held": ("runtime.patterns.layers", lambda: layer("retention")),
    "_members": ("runtime.planning.branch_relations", lambda: compile_attention(FAMILY)(*operands())),
    "_combined": ("runtime.executors.pattern_attentions", lambda: compile_attention(TWO)(*operands())),
    "_taken": ("runtime.simulate.simulating_choices", lambda: compile_attention("moba").simulate(8192)),
}


def layer(name: str) -> object:
    from attnc.runtime.patterns.layers import layer_of

    return layer_of(compile_attention(name), 16, 2, {})


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_that_a_pass_breaks_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, run = PATTERNS[name]
    run()
    monkeypatch.setattr(import_module(f"attnc.{module}"), "replace", broken_replace)
    with pytest.raises(IRInvalid, match="two tensors have the same name"):
        run()


def test_a_grid_with_open_extents_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("attnc.compiler.lowering.lower")
    bound, real_lower = compile_attention(GRID).bound, module._lower

    def broken(bound: Any, left_open: frozenset[str]) -> ir.Pattern:
        pattern_of_pass: ir.Pattern = (
            broken_replace(real_lower(bound, left_open)) if left_open else real_lower(bound, left_open)
        )
        return pattern_of_pass

    assert lower(bound).general is not None
    monkeypatch.setattr(module, "_lower", broken)
    with pytest.raises(IRInvalid, match="two tensors have the same name"):
        lower(bound)


# --- passes that return relations: `rewrite` or `substitute` of their module gives a conjunction of one ---------------


def broken(root: Any, *_: object) -> Any:
    return ir.intern(ir.Bool("and", (root,))) if ir.is_truth(root) else ir.intern(ir.Arith("sqrt", (root,)))


WINDOW = specialise.Window(0, 0, 8, 8, 0)
SLICES = specialise.Slices({})
SIZES = specialise.CallSizes({"heads": 1, "kv_heads": 1, "group": 1})


def shape() -> CallShape:
    return shape_of_call(pattern("causal"), TensorSizes(8, 8, 1, 1, 1, 16, 16, "float32"), {})


def specialised() -> ir.Index:
    return specialise.specialise(NEAR, SIZES, SLICES, WINDOW, batch=0, head=0, group=1)


RELATIONS: dict[str, tuple[str, Callable[[], object]]] = {
    "specialise": ("compiler.lowering.specialise", specialised),
    "of_any_length": ("compiler.lowering.specialise", lambda: specialise.of_any_length(NEAR)),
    "open_relation": ("compiler.growth.open_relation", lambda: open_relation.open_relation(NEAR, {}, 0, 1)),
    "at_length": ("compiler.growth.open_relation", lambda: open_relation.at_length(NEAR, 8)),
    "_replaced": ("compiler.growth.powers", lambda: powers._replaced(CAUSAL, {}, fold.truth(True))),
    "simplified": ("compiler.analysis.intervals", lambda: intervals.simplified(CAUSAL, (0, 8), (0, 8))),
    "documents._moved": ("compiler.planning.documents", lambda: documents._moved(CAUSAL, 3)),
    "_in_class": ("compiler.planning.residues", lambda: residues._in_class(CAUSAL, 2, 0, 1)),
    "natural_tiles._moved": ("compiler.simulation.natural_tiles", lambda: natural_tiles._moved(CAUSAL, 1, 2)),
    "_by_row": ("compiler.passes.pointwise", lambda: compile_attention("causal").mask_mod(8)),
    "find_mask_relation": (
        "compiler.kernels.content_masks",
        lambda: content_masks.find_mask_relation(pattern("causal")),
    ),
    "_kinds": (
        "compiler.kernels.content_mask_tiles",
        lambda: content_mask_tiles.MaskCall(pattern("causal"), shape())._kinds,
    ),
    "_open_extents": (
        "compiler.kernels.brick_ranges",
        lambda: compile_attention("neighborhood_2d", height=32, width=32).source("sm_90"),
    ),
    "_later": (
        "runtime.executors.recurrent.token_integers",
        lambda: token_integers._later(fold.mod(Q, fold.const(4)), 3),
    ),
}


@pytest.mark.parametrize("name", RELATIONS)
def test_a_relation_that_a_pass_breaks_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, run = RELATIONS[name]
    run()
    pass_module = import_module(f"attnc.{module}")
    monkeypatch.setattr(pass_module, "rewrite" if hasattr(pass_module, "rewrite") else "substitute", broken)
    with pytest.raises(IRInvalid, match=r"fewer than two|is not an operation"):
        run()


def test_an_attention_that_a_pass_breaks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    node = ir.Attend("out", fold.truth(True), value_nodes.default_score(), ir.Softmax(), value_nodes.vector("v"))
    attention_kernels.with_widths(node, (16, 16))
    wrong = value_nodes.select(broken(CAUSAL), node.score, value_nodes.number(0.0))
    monkeypatch.setattr(attention_kernels, "substitute_value", lambda *_: wrong)
    with pytest.raises(IRInvalid, match="`with_widths`"):
        attention_kernels.with_widths(node, (16, 16))


CAUGHT_ELSEWHERE = {"runtime.executors.triton.gpu_decoding"}  # tests/runtime/executors/triton/test_decode_kernels.py


def test_every_module_that_verifies_has_a_case() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("compiler", "runtime")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(
            "^from attnc.compiler.ir.verify_ir import .*(checked|verified)", path.read_text("utf-8"), re.MULTILINE
        )
    }
    cases = {module for module, _ in (*PATTERNS.values(), *RELATIONS.values())}
    assert modules == cases | CAUGHT_ELSEWHERE | {"compiler.kernels.attention_kernels"}
