"""Cases of patterns with a stateful branch, from `recurrences/`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnc import Attention, compile_attention
from attnc.runtime.texts.library import hybrid_names
from cases.case import Case, Parts, Shape, Tensors, inputs_of
from recurrence_draws import example
from reference.scans import REFERENCES

PARAMETERS = ("height", "width", "frames", "window", "layer")
GRIDS = {"lingen_ma": (2, 3, 4), "spatial_mamba": (4, 5)}


def draw(
    name: str, tokens: int = 60, grid: tuple[int, ...] | None = None, **numbers: int
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, int]]:
    dk = 1 if name == "spatial_mamba" else 6
    q, k, v, drawn_inputs = example(name, B=2, H=3, T=tokens, dk=dk, dv=5, grid=grid or GRIDS.get(name))
    numbers = {key: x for key, x in drawn_inputs.items() if not isinstance(x, Tensor)} | numbers
    inputs = {key: x.requires_grad_() for key, x in drawn_inputs.items() if isinstance(x, Tensor)}
    return [x.requires_grad_() for x in (q, k, v)], inputs, numbers


def parameters(name: str, inputs: dict[str, Tensor], numbers: dict[str, int]) -> dict[str, Any]:
    """Return the parameters of the pattern."""
    params: dict[str, Any] = {key: x for key, x in numbers.items() if key in PARAMETERS}
    if name == "log_linear":
        params["levels"] = inputs["level"].shape[-1] - 1
    return params


def arguments(name: str, tensors: list[Tensor], inputs: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the arguments of the pattern's call."""
    q, k, _ = tensors
    call_inputs: dict[str, Any] = dict(inputs)
    if name == "spatial_mamba":  # one state a channel: B and C are numbers
        call_inputs |= {"b": k[..., 0].transpose(1, 2), "c": q[..., 0].transpose(1, 2), "A": inputs["A"][:, 0]}
    return tensors, call_inputs


def ours(
    name: str, tensors: list[Tensor], inputs: dict[str, Tensor], numbers: dict[str, int]
) -> tuple[Attention, list[Tensor], dict[str, Any]]:
    """Return the pattern, and the arguments of its call."""
    return compile_attention(name, **parameters(name, inputs, numbers)), *arguments(name, tensors, inputs)


def case_of(name: str, tokens: int, grid: tuple[int, ...], **sizes: int) -> Case:
    """Return a case that compares output and gradients for random vectors."""
    tensors, inputs, numbers = draw(name, tokens, grid if name in GRIDS else None, **sizes)

    def output(operands: Tensors) -> Parts:
        out, _ = REFERENCES[name](**operands, scale=0.4, **numbers)
        return (out,)

    def call(attend: Attention, operands: Tensors) -> Parts:
        rows = [operands[key] for key in "qkv"]
        (q, k, v), call_inputs = arguments(name, rows, inputs_of(operands))
        return (attend(q, k, v, scale=0.4, **call_inputs),)

    q, k, v = tensors
    shape = Shape(q.shape[2], q.shape[2], 3, 3, 2, q.shape[3], 5)
    params = parameters(name, inputs, numbers)
    return Case(name, shape, params, lambda s: {"q": q, "k": k, "v": v, **inputs}, None, output, call)


LAYERS = {"lingen_ma": range(4)}
SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    "lingen_ma": ((1, 1, 2), (2, 3, 4), (3, 1, 5)),
    "spatial_mamba": ((1, 3), (4, 5), (3, 7)),
}
CASES = [
    case_of(name, tokens, grid, **({"layer": layer} if name in LAYERS else {}))
    for name in hybrid_names()
    if name in REFERENCES
    for tokens, grid in zip((2, 23, 40), SIZES.get(name, ((),) * 3), strict=True)
    for layer in LAYERS.get(name, (0,))
]
