"""Declaration of attnc's operators to torch, so that exported models load; a first call imports the kernels.

`import attnc` imports this module once torch is imported (`attnc.after_torch`), so it must stay fast: a schema for
each operator, and for each dispatch key a function that finds the kernel in `KERNELS` of the operator's module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch.library import Library, register_fake

FAKE = "fake"
"""The key of an operator's fake kernel in `KERNELS`, alongside torch's dispatch keys."""


class Operator(NamedTuple):
    """An operator: the module of its kernels, its arguments and results, its tags, and the keys that have a kernel."""

    module: str
    schema: str
    tags: tuple[torch.Tag, ...]
    keys: tuple[str, ...]


_PT2 = (torch.Tag.pt2_compliant_tag,)
# Results have the layout of their arguments, so a compiler must pass on the strides that it traced.
_STRIDES = (*_PT2, torch.Tag.needs_exact_strides)
_DEVICES = ("CPU", "CUDA")
_AUTOCAST = ("AutocastCPU", "AutocastCUDA")
_CACHED = (
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_len, Tensor? block_table, Tensor[]? inputs, "
    "str pattern, float? scale, bool ring) -> (Tensor, Tensor)"
)

OPERATORS = {
    "attend": Operator(
        "attnc.runtime.operators.attend",
        "(Tensor q, Tensor k, Tensor v, Tensor[]? inputs, str pattern, float? scale) -> (Tensor, Tensor)",
        _STRIDES,
        (*_DEVICES, "Autograd", *_AUTOCAST, "FuncTorchBatched"),
    ),
    "attend_backward": Operator(
        "attnc.runtime.operators.attend",
        "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor[]? inputs, str pattern, float? scale) -> (Tensor, Tensor, Tensor)",
        _STRIDES,
        (*_DEVICES, "Autograd", "FuncTorchBatched"),
    ),
    "attend_general": Operator(
        "attnc.runtime.operators.attend_general",
        "(Tensor q, Tensor k, Tensor v, Tensor[]? inputs, str pattern, float? scale) -> (Tensor, Tensor)",
        _PT2,
        (*_DEVICES, "Autograd", *_AUTOCAST),
    ),
    "attend_general_backward": Operator(
        "attnc.runtime.operators.attend_general",
        "(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor[]? inputs, "
        "str pattern, float? scale) -> Tensor[]",
        _PT2,
        _DEVICES,
    ),
    "decode": Operator("attnc.runtime.operators.cached", _CACHED, _PT2, (*_DEVICES, "Autograd")),
    "prefill": Operator("attnc.runtime.operators.cached", _CACHED, _PT2, (*_DEVICES, "Autograd")),
}
"""The operators of the namespace `attnc`, by name."""


@cache
def kernel(name: str, key: str) -> Callable[..., Any]:
    """Return an operator's kernel for a dispatch key, or its fake kernel; the first call imports its module."""
    kernels: dict[tuple[str, str], Callable[..., Any]] = import_module(OPERATORS[name].module).KERNELS
    return kernels[name, key]


def _imported_by_its_first_call(name: str, key: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return kernel(name, key)(*arguments)

    return call


_LIBRARY = Library("attnc", "DEF")  # type: ignore[no-untyped-call]
for _name, _operator in OPERATORS.items():
    _LIBRARY.define(_name + _operator.schema, tags=_operator.tags)  # type: ignore[no-untyped-call]
    for _key in _operator.keys:
        _LIBRARY.impl(_name, _imported_by_its_first_call(_name, _key), _key)  # type: ignore[no-untyped-call]
    register_fake(f"attnc::{_name}", _imported_by_its_first_call(_name, FAKE), lib=_LIBRARY)
