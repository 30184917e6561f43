"""torch.compile and torch.export of code that calls an Attention."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from attnc import ArgumentError, ArgumentTypeError, Attention, compile_attention
from operator_calls import (
    BY_HEAD,
    DOC,
    Layer,
    draw,
    leaves,
    results,
    same,
    window,
)

NO_ALIGN = "pattern p\n    visible k <= q\n"
SHIFT = "pattern shifted\n    input shift: int[head]\n    align end\n    visible k <= q - shift\n"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    result: Callable[..., Any] = torch.compile(function, fullgraph=True, backend="aot_eager", **options)
    return result


CASES: dict[str, tuple[Callable[[], Attention], dict[str, Any], dict[str, Any]]] = {
    "window": (window, {}, {}),
    "grouped heads, dk ≠ dv, tokens outermost": (window, {"kv_heads": 2, "dv": 12, "tokens_first": True}, {}),
    "cross lengths, bf16": (window, {"n_k": 23, "dtype": torch.bfloat16}, {}),
    "scale": (window, {}, {"scale": 0.7}),
    "documents": (lambda: compile_attention("document"), {}, {"doc": DOC}),
    "integers by head, blind rows": (lambda: compile_attention(SHIFT), {}, {"shift": torch.tensor([0, 1, 2, 5])}),
    "a parameter by head": (lambda: compile_attention(BY_HEAD, window=[1, 2, 3, 9]), {}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_eager_bit_by_bit(name: str) -> None:
    make, shape, inputs = CASES[name]
    layer, tensors = Layer(make()), draw(**shape)
    same(results(compiled(layer), tensors, **inputs), results(layer, tensors, **inputs))


def test_an_attention_itself_compiles() -> None:
    attend, tensors = window(), draw()
    assert torch.equal(compiled(attend)(*tensors), attend(*tensors))


@pytest.mark.parametrize("dynamic", [True, None])
def test_lengths_do_not_recompile(dynamic: bool | None) -> None:
    """A single graph covers all lengths; without `dynamic=True` the first length has a graph of its own."""
    layer, counter = Layer(window()), CompileCounterWithBackend("aot_eager")
    function = torch.compile(layer, fullgraph=True, backend=counter, dynamic=dynamic)
    for n in (17, 18, 40, 64, 129, 200):
        tensors = draw(n)
        same(results(function, tensors), results(layer, tensors))
    assert counter.frame_count == (1 if dynamic else 2)


def test_new_data_does_not_recompile() -> None:
    attend, counter = compile_attention("document"), CompileCounterWithBackend("aot_eager")

    def call(q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
        return attend(q, k, v, doc=doc)

    function: Callable[..., Tensor] = torch.compile(call, fullgraph=True, backend=counter)
    tensors = draw()
    for doc in (DOC, DOC * 3, DOC.clamp(max=0), torch.arange(17).repeat(2, 1)):
        assert torch.equal(function(*tensors, doc), attend(*tensors, doc=doc))
    assert counter.frame_count == 1


@pytest.mark.parametrize("inside", [True, False])
def test_compiled_under_autocast(inside: bool) -> None:
    attend, tensors = window(), draw()
    tensors[1] = tensors[1].bfloat16()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return attend(q, k, v)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        run = attend if not inside else function
        ours, expected = compiled(run)(*tensors), run(*tensors)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, expected)


def test_autocast_keeps_fp64() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert window()(*draw(dtype=torch.float64)).dtype == torch.float64


MISTAKES: dict[str, tuple[str, Callable[..., Any], str]] = {
    "rank": ("causal", lambda a, q, k, v: a(q[0], k, v), "q has 3 dimensions"),
    "heads": ("causal", lambda a, q, k, v: a(q, k[:, :3], v[:, :3]), "multiple of kv heads"),
    "dtype": ("causal", lambda a, q, k, v: a(q.double(), k, v), "differ in dtype"),
    "option": ("causal", lambda a, q, k, v: a(q, k, v, is_causal=True), "is_causal: causality belongs"),
    "scale": ("causal", lambda a, q, k, v: a(q, k, v, scale="a"), "scale is str"),
    "missing input": ("document", lambda a, q, k, v: a(q, k, v), "needs the input `doc`"),
    "misspelt input": ("document", lambda a, q, k, v: a(q, k, v, docs=q), "did you mean `doc`"),
    "a list": ("document", lambda a, q, k, v: a(q, k, v, doc=[[0] * 17] * 2), "inside torch.compile"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_compilation_reports_wrong_calls(name: str) -> None:
    spec, call, says = MISTAKES[name]
    attend = compile_attention(spec)
    with pytest.raises(Unsupported, match=says):
        compiled(lambda q, k, v: call(attend, q, k, v))(*draw())


def test_compiled_graphs_raise_typed_errors() -> None:
    with pytest.raises(ArgumentError, match=r"query 0 at key 6.*align start"):
        compiled(compile_attention(NO_ALIGN))(*draw(17, n_k=23))
    attend = compile_attention("document")
    with pytest.raises(ArgumentError, match="id 0 reappears at position 9"):
        compiled(lambda q, k, v, doc: attend(q, k, v, doc=doc))(
            *draw(), torch.tensor([[0] * 7 + [1] * 2 + [0] * 8] * 2)
        )


def test_errors_stay_typed_without_fullgraph() -> None:
    with pytest.raises(ArgumentTypeError, match="needs the input `doc`"):
        torch.compile(compile_attention("document"), backend="aot_eager")(*draw())


def test_the_dense_reference_breaks_the_graph_and_says_why() -> None:
    dense, tensors = compile_attention("causal", backend="reference"), draw()
    with pytest.raises(Unsupported, match="the dense reference builds its mask outside of torch"):
        compiled(lambda q, k, v: dense(q * 2, k, v) + 1)(*tensors)
    broken = torch.compile(lambda q, k, v: dense(q * 2, k, v) + 1, backend="aot_eager")
    torch.testing.assert_close(broken(*tensors), dense(tensors[0] * 2, *tensors[1:]) + 1)


@pytest.mark.parametrize("which", [0, 1])
def test_either_result_alone(which: int) -> None:
    attend, inputs = window(), leaves(draw(dv=12))

    def one_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, return_lse=True)[which].square()

    ours, expected = (torch.autograd.grad(f(*inputs).sum(), inputs) for f in (compiled(one_result), one_result))
    same(list(ours), list(expected))


def test_checkpointing_in_a_compiled_graph() -> None:
    layer, tensors = Layer(window()), draw()
    function = compiled(lambda q, k, v: checkpoint(layer, q, k, v, use_reentrant=False))
    same(results(function, tensors), results(layer, tensors))


# --- export -----------------------------------------------------------------------------------------------------------


OPERATORS = {"causal": torch.ops.attnc.attend.default, "alibi": torch.ops.attnc.attend_general.default}
LENGTH = torch.export.Dim("length", min=2, max=4096)
INPUTS = {"affine_scaled": ["alpha", "beta"], "document": ["doc"], "gla": ["g"]}
EXPORTED: dict[str, dict[str, Any]] = {
    "by head": {"window": [1, 2, 3, 9]},
    # a score, weights with inputs, branches, documents, a recurrence
    "alibi": {},
    "affine_scaled": {},
    "hierarchical": {"group": 4},
    "document": {},
    "retention": {},
    "gla": {},
}
LOAD = """\
IMPORT
import sys
from pathlib import Path
for folder in Path(sys.argv[1]).iterdir():
    tensors = torch.load(folder / "tensors.pt")
    if (folder / "exported.pt2").exists():
        program = torch.export.load(folder / "exported.pt2").module()
    else:
        program = torch._inductor.aoti_load_package(str(folder / "compiled.pt2"))
    results = program(*tensors)
    assert torch.equal(results, torch.load(folder / "results.pt")), folder
    print(folder.name)
"""


def in_another_process(folder: Path, imports: str) -> set[str]:
    """Load the programs of a folder in another process, and return the names of those with equal results."""
    command = [sys.executable, "-c", LOAD.replace("IMPORT", imports), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, check=False, timeout=120, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n")) - {""}


def save(folder: Path, model: torch.nn.Module, tensors: list[Tensor]) -> None:
    torch.save(tensors, folder / "tensors.pt")
    torch.save(model(*tensors), folder / "results.pt")


def drawn_input(name: str, n: int) -> Tensor:
    if name == "doc":
        return torch.arange(n)[None].expand(2, n) // 9
    return -torch.rand(2, n, 4, 8) if name == "g" else torch.randn(2, 4, n)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an exported program for each pattern, and tensors and results at another length."""
    programs = tmp_path_factory.mktemp("exported")
    for name, parameters in EXPORTED.items():
        attend = compile_attention(BY_HEAD if name == "by head" else name, **parameters)
        inputs = INPUTS.get(name, [])

        class Model(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor, *input_tensors: Tensor) -> Tensor:
                named: dict[str, Any] = dict(zip(inputs, input_tensors, strict=True))  # noqa: B023
                out: Tensor = attend(q * 2, k, v, **named)  # noqa: B023
                return out + 1

        def drawn(n: int) -> list[Tensor]:
            return [*draw(n), *(drawn_input(input_name, n) for input_name in inputs)]  # noqa: B023

        tensors = tuple(drawn(17))
        shapes = tuple({x.shape.index(17): LENGTH} for x in tensors)
        of_inputs = (shapes[3:],) if inputs else ()
        program = torch.export.export(Model(), tensors, dynamic_shapes=(*shapes[:3], *of_inputs))
        target = OPERATORS["causal" if name in ("by head", "document") else "alibi"]
        assert [n.target for n in program.graph.nodes if "attnc" in str(n.target)] == [target]
        folder = programs / name
        folder.mkdir()
        torch.export.save(program, folder / "exported.pt2")
        save(folder, Model(), drawn(33))
    return programs


@pytest.mark.parametrize("imports", ["import torch, attnc", "import attnc, torch"])
def test_exported_models_run_in_another_process_at_another_length(imports: str, exported: Path) -> None:
    assert in_another_process(exported, imports) == {*EXPORTED}


@pytest.mark.parametrize("name", OPERATORS)
def test_graphs_without_inputs(name: str) -> None:
    """AOTInductor drops empty lists: an operator with a list then fails with "Expected List[Tensor] … NoneType"."""
    attend, tensors = compile_attention(name), draw()

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v)

    graph = torch.export.export(Model(), tuple(tensors)).graph
    (node,) = [node for node in graph.nodes if node.target is OPERATORS[name]]
    assert node.args[3] is None
    step = torch.export.export(Steps(attend), (tensors[0][:, :, :1], *tensors[1:])).graph
    assert [n.args[5] for n in step.nodes if n.target is torch.ops.attnc.decode.default] == [None]


class Steps(torch.nn.Module):
    def __init__(self, attend: Attention) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend.decode(q, k, v, kv_len=17)


@pytest.mark.slow
def test_a_package_of_aot_inductor(tmp_path: Path) -> None:
    causal, alibi, tensors = compile_attention("causal"), compile_attention("alibi"), tuple(draw())

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal(q, k, v) + alibi(q, k, v)

    (tmp_path / "package").mkdir()
    program = torch.export.export(Model(), tensors)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package" / "compiled.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(*tensors), Model()(*tensors))
    save(tmp_path / "package", Model(), [*tensors])
    assert in_another_process(tmp_path, "import attnc, torch") == {"package"}
