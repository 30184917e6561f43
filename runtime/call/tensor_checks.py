"""Checks of a call's tensors, with typed errors that name the mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.planning.build_plan import CallShape
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.call.call_shapes import (
    REFUSED,
    TensorSizes,
    blank,
    blank_choices,
    check_counts,
    check_names,
    dtype_name,
    ids_of_documents,
    input_array,
    missing,
    names_read,
    number,
    refuse_options,
    shape_of_call,
)
from attnc.runtime.call.layouts import check_layout, layout_remedy
from attnc.runtime.fallbacks import HOST_WAIT, note

__all__ = [
    "COMPLEX",
    "FLOATS",
    "REFUSED",
    "TensorSizes",
    "as_tensor",
    "blank",
    "blank_choices",
    "call_shape",
    "check_are_tensors",
    "check_counts",
    "check_promises",
    "check_tensors",
    "completed",
    "finite",
    "ids_of_documents",
    "input_tensors",
    "missing",
    "names_read",
    "number",
    "refuse_options",
    "sorted_by",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


COMPLEX = (torch.complex64, torch.complex128)


_INPUT_DTYPES = {"int": _INTEGERS, "bool": (torch.bool,), "real": FLOATS, "complex": (*COMPLEX, *FLOATS)}


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> TensorSizes:
    """Return the sizes of q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv).

    Raises ArgumentTypeError, ArgumentError, UnsupportedError.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, tensor)
    _same("dtype", q.dtype, k.dtype, v.dtype, ArgumentTypeError)
    _same("device", q.device, k.device, v.device, ArgumentError)
    _equal("the batch", "q", q.shape[0], 0, "k", k.shape[0], 0)
    _equal("the batch", "k", k.shape[0], 0, "v", v.shape[0], 0)
    check_layout(q, k)
    _equal("the kv heads", "k", k.shape[1], 1, "v", v.shape[1], 1)
    _equal("the keys", "k", k.shape[2], 2, "v", v.shape[2], 2)
    _equal("the head dimension", "q", q.shape[3], 3, "k", k.shape[3], 3)
    heads, kv_heads = q.shape[1], k.shape[1]
    if (kv_heads == 0 and heads) or (kv_heads and heads % kv_heads):
        raise ArgumentError(
            f"q has {heads} heads (dimension 1) and k has {kv_heads}: query heads must be a multiple of kv heads"
            f"{layout_remedy(q, k)}"
        )
    if q.shape[3] == 0:
        raise ArgumentError("q has head dimension 0 (dimension 3): it must be at least 1")
    return TensorSizes(q.shape[2], k.shape[2], q.shape[0], heads, kv_heads, q.shape[3], v.shape[3], dtype_name(q.dtype))


def finite(scale: float) -> float:
    """Return a finite scale as a float. Raises ArgumentTypeError, ArgumentError."""
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ArgumentTypeError(f"scale is {type(scale).__name__}: it must be a number")
    if not abs(scale) < float("inf"):
        raise ArgumentError(f"scale is {scale}: it must be finite")
    return float(scale)


def check_are_tensors(q: object, k: object, v: object) -> None:
    """Raise ArgumentTypeError for the first argument that is not a dense tensor."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"{name} is {type(tensor).__name__}: it must be a torch tensor")
        if tensor.layout != torch.strided:
            raise ArgumentTypeError(f"{name} is {tensor.layout}: it must be a dense (strided) tensor")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 4:
        raise ArgumentError(
            f"{name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}: it must have 4, (batch, heads, "
            f"tokens, head dimension); use unsqueeze(0) for a missing batch"
        )
    if tensor.dtype not in FLOATS:
        names = ", ".join(map(dtype_name, FLOATS))
        raise ArgumentTypeError(f"{name} has dtype {dtype_name(tensor.dtype)}: it must be one of {names}")


def _same(what: str, q: object, k: object, v: object, error: type[Exception]) -> None:
    if not q == k == v:
        raise error(f"q, k and v differ in {what} ({q}, {k}, {v}): convert them to one {what}")


def _equal(what: str, a: str, size_a: int, dim_a: int, b: str, size_b: int, dim_b: int) -> None:
    if size_a != size_b:
        raise ArgumentError(
            f"{a} and {b} disagree on {what}: {a} has {size_a} (dimension {dim_a}), {b} {size_b} (dimension {dim_b})"
        )


def call_shape(pattern: ir.Pattern, sizes: TensorSizes, inputs: Mapping[str, object]) -> CallShape:
    """Return everything that a plan depends on, as `shape_of_call` does, with the rates of this machine."""
    return shape_of_call(pattern, sizes, completed(pattern, inputs))


def input_tensors(pattern: ir.Pattern, inputs: Mapping[str, object]) -> list[Tensor]:
    """Return the inputs of a call in the order of the pattern, lists and arrays as tensors; shapes are not checked.

    Raises ArgumentTypeError, ArgumentError, UnsupportedError (an option that is not an input).
    """
    refuse_options(pattern, inputs)
    check_names(pattern, inputs)
    inputs = completed(pattern, inputs)
    return [_tensor(pattern, tensor, inputs.get(tensor.name)) for tensor in pattern.tensors]


def completed(pattern: ir.Pattern, inputs: Mapping[str, object]) -> Mapping[str, object]:
    """Return the inputs of a call with sorted inputs computed where they are not passed, on their device."""
    computed = {}
    for tensor in pattern.tensors:
        value = None if tensor.made is None else inputs.get(tensor.made.of)
        if tensor.made is not None and value is not None and tensor.name not in inputs:
            computed[tensor.name] = sorted_by(as_tensor(value).detach(), tensor.made)
    return {**inputs, **computed} if computed else inputs


def sorted_by(x: Tensor, made: ir.Made) -> Tensor:
    """Sort an input along its last dimension; return the order, the ranks, or the starts of values."""
    x = x if x.is_floating_point() else x.long()
    x = x.remainder(made.count) if made.count else x
    values, order = torch.sort(x, dim=-1, stable=True)
    if made.what == "order":
        return order
    if made.what == "starts":
        numbers = torch.arange(made.count + 1, dtype=x.dtype, device=x.device)
        return torch.searchsorted(values, numbers.expand(*x.shape[:-1], made.count + 1).contiguous())
    places = torch.arange(x.shape[-1], device=x.device).expand(x.shape)
    return torch.empty_like(order).scatter_(-1, order, places)


def _tensor(pattern: ir.Pattern, tensor: ir.Tensor, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        if value is not None and torch.compiler.is_compiling():
            raise ArgumentTypeError(f"the input `{tensor.name}` must be a torch tensor inside torch.compile")
        array = np.array(input_array(pattern, tensor, value))
        wide = {"real": np.float64, "complex": np.complex128}.get(tensor.kind, array.dtype.newbyteorder("="))
        return torch.from_numpy(array.astype(wide, copy=False))
    if value.dtype not in _INPUT_DTYPES[tensor.kind]:
        raise ArgumentTypeError(
            f"the input `{tensor.name}` has dtype {dtype_name(value.dtype)}: it must be {tensor.kind}"
        )
    return value


def check_promises(pattern: ir.Pattern, tensors: Sequence[Tensor]) -> None:
    """Raise ArgumentError where a real input is not what its type promises: `unit`, `log_decay`, `positive`."""
    for item, tensor in zip(pattern.tensors, tensors, strict=True):
        if item.refinement is None or not tensor.numel():
            continue
        if tensor.is_cuda:
            note(pattern.name, HOST_WAIT, f"the input `{item.name}` is checked to be {item.refinement}")
        range_text, holds = _PROMISES[item.refinement]
        values = tensor.detach()
        if not holds(torch.stack(values.aminmax())).all():
            violated, help_ = ~holds(values), ""
            if item.refinement == "log_decay" and bool(((values >= 0) & (values <= 1)).all()):
                help_ = f"; pass the logarithms of factors between 0 and 1: {item.name}.log()"
            if item.refinement == "unit" and bool((values <= 0).all()):
                help_ = f"; pass the factors instead of their logarithms: {item.name}.exp()"
            raise ArgumentError(
                f"the input `{item.name}` holds {values[violated][0].item():g}: as {item.refinement} it must be "
                f"{range_text}{help_}"
            )


# A condition on ranges that holds for the minimum and the maximum holds for every number.
_PROMISES: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "unit": ("between 0 and 1", lambda x: (x >= 0) & (x <= 1)),
    "log_decay": ("at most 0", lambda x: x <= 0),
    "positive": ("above 0", lambda x: x > 0),
}


def as_tensor(value: object) -> Tensor:
    """Return an input as a tensor; lists and arrays are copied."""
    return value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
