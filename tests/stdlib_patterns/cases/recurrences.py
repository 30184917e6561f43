"""Cases of the library's recurrences in `recurrences/`, whose states are updated token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnc import Attention, compile_attention
from attnc.runtime.texts.library import library_files, recurrence_names
from cases.case import Case, Parts, Shape, Tensors, inputs_of
from recurrence_draws import example
from reference.scans import REFERENCES

GRIDS = {"mhs_vm"}
PARAMETERS = ("height", "width", "chunk")


class Recurrent:
    """The tensors and parameters of one call, and whether the pattern reads the scale."""

    def __init__(self, name: str, tokens: int = 70, *, heads: int = 3, grid: tuple[int, int] = (7, 10)) -> None:
        self.name = name
        token_grid = grid if name in GRIDS else None
        self.q, self.k, self.v, inputs_by_name = example(name, B=2, H=heads, T=tokens, dk=8, dv=5, grid=token_grid)
        self.inputs = {key: x for key, x in inputs_by_name.items() if isinstance(x, Tensor)}
        self.numbers = {key: x for key, x in inputs_by_name.items() if not isinstance(x, Tensor)}
        self.params = {key: self.numbers[key] for key in PARAMETERS if key in self.numbers}
        scaled = "scale" in library_files()[name].read_text(encoding="utf-8").split('"""')[2]
        self.options: dict[str, Any] = {"scale": 0.6} if scaled else {}

    def attention(self, **options: Any) -> Attention:
        return compile_attention(self.name, **self.params, **options)

    def leaves(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        tensors = [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v)]
        return tensors, {
            key: x.detach().clone().requires_grad_(x.is_floating_point()) for key, x in self.inputs.items()
        }

    def reference(self, tensors: list[Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        q, k, v = tensors
        out, states = REFERENCES[self.name](q, k, v, scale=0.6, **inputs, **self.numbers)
        if self.name == "aaren":  # the states here are the LSE and the weighted mean
            top, total, acc = states
            return out, [top + total.log(), acc / total[..., None]]
        return out, list(states)

    def ours(
        self, attend: Attention, tensors: list[Tensor], inputs: Mapping[str, Any], state: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = tensors
        return attend(q, k, v, return_state=True, state=state, **self.options, **joined(inputs))

    def final(self, states: dict[str, Tensor]) -> list[Tensor]:
        """Return the final states in the order of the reference."""
        if "x" in states and states["x"].is_complex():
            return [states["x"].real, states["x"].imag]
        if self.name == "titans_linear":
            return [states["M"], states["P"]]
        if self.name == "ttt_linear":
            return [states["W"]]
        return list(states.values())


def joined(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Join real and imaginary parts to one input."""
    parts = {name[:-3] for name in inputs if name.endswith("_re")}
    whole: dict[str, Any] = {name: torch.complex(inputs[f"{name}_re"], inputs[f"{name}_im"]) for name in parts}
    return whole | {name: x for name, x in inputs.items() if name.rsplit("_", 1)[0] not in parts}


SIZES = ((1, (1, 1)), (19, (3, 6)), (70, (7, 10)))
"""Numbers of tokens with their rows and columns."""


LEAST = {"ttt_linear": 1e-2}
"""The size below which errors are absolute: the gradient passes the norm of a vector near zero, of slope 1,000."""


def case_of(name: str, tokens: int, grid: tuple[int, int]) -> Case:
    """Return a case that compares output, states and gradients for random vectors."""
    recurrent = Recurrent(name, tokens, grid=grid)

    def output(operands: Tensors) -> Parts:
        out, states = recurrent.reference([operands[key] for key in "qkv"], inputs_of(operands))
        return (out, *states)

    def call(attend: Attention, operands: Tensors) -> Parts:
        out, states = recurrent.ours(attend, [operands[key] for key in "qkv"], inputs_of(operands))
        return (out, *recurrent.final(states))

    def drawn(shape: Shape) -> Tensors:
        return {"q": recurrent.q, "k": recurrent.k, "v": recurrent.v, **recurrent.inputs}

    n = recurrent.q.shape[2]
    shape = Shape(n, n, 3, 3, 2, 8, 5)
    return Case(name, shape, recurrent.params, drawn, None, output, call, least=LEAST.get(name, 1e-3))


CASES = [case_of(name, *size) for name in recurrence_names() if name in REFERENCES for size in SIZES]
