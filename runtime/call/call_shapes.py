"""Checks of a call's sizes and inputs, which become a `CallShape` or a typed error that names the mistake.

This module never imports torch: tensors are recognised where torch is loaded already, and inputs may be NumPy arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypeIs

from attnc.compiler import ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import fold
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.lowering.lower_attention import TOKENS
from attnc.compiler.lowering.specialise import CallSizes as SizesByName
from attnc.compiler.lowering.specialise import Slices, Window, specialise
from attnc.compiler.passes.before_keys import needs_tokens
from attnc.compiler.planning.build_plan import CallShape, is_ids_alone
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.fallbacks import HOST_WAIT, note
from attnc.spec.suggest import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_REAL = ("float32", "bfloat16", "float16", "float64")
_FLOATING = {"real": _REAL, "complex": ("complex64", "complex128", *_REAL)}
"""The dtypes accepted for inputs that no plan reads, by kind."""

REFUSED: Mapping[str, str] = {
    "attn_mask": "the pattern is the mask; write it as `visible`",
    "is_causal": 'causality belongs to the pattern; `visible k <= q`, or the library\'s "causal"',
    "dropout_p": "dropout on attention weights is not supported; apply dropout to the output",
    "dropout": "dropout on attention weights is not supported; apply dropout to the output",
    "enable_gqa": "grouped heads are recognised by the shapes; leave it out",
}
"""Options of other attention functions that are refused, each with advice on what to use instead."""


OPTIONS = ("scale", "return_lse", "cu_seqlens", "state", "return_state")
"""Names of the options of a call, for suggestions about misspelt names."""


@dataclass(frozen=True, slots=True)
class TensorSizes:
    """The sizes of a call before its inputs are looked at."""

    n_q: int
    n_k: int
    batch: int
    heads: int
    kv_heads: int
    dk: int
    dv: int
    dtype: str


def is_tensor(value: object) -> TypeIs[Tensor]:
    """Check whether a value is a torch tensor; without torch loaded, no value is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def check_counts(least: int, **counts: object) -> None:
    """Check that counts are integers of at least `least`. Raises ArgumentTypeError, ArgumentError."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"{name} is {value!r}: it must be a whole number")
        if value < least:
            raise ArgumentError(f"{name} is {value}: it must be at least {least}")


def refuse_options(pattern: ir.Pattern, options: Mapping[str, object]) -> None:
    """Raise UnsupportedError for options that other attention functions have and this library does not support."""
    names = {tensor.name for tensor in pattern.tensors}
    for name, value in options.items():
        if name in REFUSED and name not in names and not _is_off(value):
            raise UnsupportedError(f"{name}: {REFUSED[name]}")


def _is_off(value: object) -> bool:
    """Check whether an option is switched off: None, False or 0."""
    return value is None or (isinstance(value, bool | int | float) and not value)


def shape_of_call(pattern: ir.Pattern, sizes: TensorSizes, arguments: Mapping[str, object]) -> CallShape:
    """Return everything that a plan depends on; inputs that the relation does not read may be missing.

    Raises ArgumentError, ArgumentTypeError, UnsupportedError.
    """
    inputs = _inputs(pattern, arguments)
    named = {
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "group": sizes.heads // max(sizes.kv_heads, 1),
        "dk": sizes.dk,
        "dv": sizes.dv,
        TOKENS: sizes.n_k,
    }
    for tensor in pattern.tensors:
        if tensor.name in inputs:
            _check_dims(tensor, inputs[tensor.name].shape, sizes, named)
    check_alignment(pattern, sizes)
    _check_lengths_of_segments(pattern, sizes, named)
    _check_head_lists(pattern, sizes)
    n_k, shift = _places(pattern, sizes, named)
    return CallShape(
        n_q=sizes.n_q,
        n_k=n_k,
        batch=sizes.batch,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        dk=sizes.dk,
        dv=sizes.dv,
        dtype=sizes.dtype,
        sizes=named,
        inputs={t.name: inputs[t.name] for t in pattern.tensors if not t.is_floating and t.name in inputs},
        shift=shift,
    )


def _places(pattern: ir.Pattern, sizes: TensorSizes, named: Mapping[str, int]) -> tuple[int, int | None]:
    """Return the number of keys of a row, and the position of query 0 where keys are not tokens."""
    keys = pattern.nodes[0].keys if len(pattern.nodes) == 1 else None
    if keys is None:
        return sizes.n_k, None
    shift = sizes.n_k - sizes.n_q if pattern.align == "end" else 0
    return max(number(keys, sizes, named), 0), shift


def number(node: ir.Index, sizes: TensorSizes, named: Mapping[str, int]) -> int:
    """Return the value of an expression of sizes."""
    window = Window(0, 0, sizes.n_q, sizes.n_k, 0)
    value = specialise(node, SizesByName(named), Slices({}), window, batch=0, head=0, group=1)
    return value.value if isinstance(value, ir.Const) else int(exact_evaluation.integers(value, (0, 1), (0, 1))[0, 0])


def _completed(pattern: ir.Pattern, arguments: Mapping[str, object]) -> Mapping[str, object]:
    """Return the inputs with sorted inputs computed where they are not passed, as arrays."""
    computed = {}
    for tensor in pattern.tensors:
        value = None if tensor.made is None else arguments.get(tensor.made.of)
        if tensor.made is not None and value is not None and tensor.name not in arguments:
            computed[tensor.name] = sorted_array(np.asarray(value), tensor.made)
    return {**arguments, **computed} if computed else arguments


def sorted_array(x: NDArray[Any], made: ir.Made) -> NDArray[np.int64]:
    """Sort an input along its last dimension and return the order, ranks or starts; the twin of `call.sorted_by`."""
    x = x if x.dtype.kind == "f" else x.astype(np.int64)
    x = x % made.count if made.count else x
    order = np.argsort(x, axis=-1, kind="stable")
    if made.what == "order":
        return order
    if made.what == "starts":
        numbers = np.arange(made.count + 1, dtype=x.dtype)
        return np.asarray((x[..., None, :] < numbers[:, None]).sum(-1), dtype=np.int64)
    return np.argsort(order, axis=-1, kind="stable")


def check_names(pattern: ir.Pattern, arguments: Mapping[str, object]) -> None:
    """Raise ArgumentTypeError for a keyword that is not an input of the pattern."""
    names = [tensor.name for tensor in pattern.tensors if tensor.made is None]
    made = {tensor.name for tensor in pattern.tensors} - set(names)
    for name, value in arguments.items():
        if name not in made and name not in names and not (name in REFUSED and _is_off(value)):
            has = f"its inputs are {', '.join(f'`{n}`' for n in names)}" if names else "it has no inputs"
            raise ArgumentTypeError(
                f"`{pattern.name}` has no input `{name}`: {did_you_mean(name, (*names, *OPTIONS), has)}"
            )


def _inputs(pattern: ir.Pattern, arguments: Mapping[str, object]) -> dict[str, NDArray[Any]]:
    check_names(pattern, arguments)
    arguments = _completed(pattern, arguments)
    needed = names_read(pattern)
    wanted = [t for t in pattern.tensors if arguments.get(t.name) is not None or needed & {t.name, *map(str, t.dims)}]
    return {tensor.name: input_array(pattern, tensor, arguments.get(tensor.name)) for tensor in wanted}


def names_read(pattern: ir.Pattern) -> set[str]:
    """Return the names of inputs and sizes that the relation and the requirements read."""
    roots = [*(condition for condition, _ in pattern.requirements)]
    for item in pattern.nodes:
        roots += [item.visible] if item.keys is None else [item.visible, item.keys]
        roots += [end for loop in (item.family, item.stack) if loop is not None for end in loop[1:]]
    if pattern.recur is not None:
        roots += _read_by(pattern.recur)
    nodes = [node for root in roots for node in walk(root)]
    names = {node.tensor.name for node in nodes if isinstance(node, ir.Lookup)}
    names |= {node.name for node in nodes if isinstance(node, ir.Extent)} - _FIXED
    return names if pattern.documents is None else names | {pattern.documents.name}


def ids_of_documents(pattern: ir.Pattern) -> str | None:
    """Return the input that holds the document of each token, where the pattern uses it for nothing else."""
    documents = pattern.documents
    return documents.name if documents is not None and is_ids_alone(pattern) else None


def _read_by(recur: ir.Recur) -> list[ir.Index]:
    """Return the expressions of a recurrence that may read sizes and integer inputs."""
    values: list[ir.Index] = [cast("ir.Index", value) for value in (*(step.value for step in recur.steps), recur.read)]
    ends = [end for step in recur.steps if step.repeat is not None for end in step.repeat[1:]]
    dims = [fold.extent(dim) for state in recur.states for dim in state.dims if isinstance(dim, str)]
    return [*values, *ends, *dims, *(node for node in (recur.order, recur.reset) if node is not None)]


_FIXED = {"queries", "keys", "heads", "kv_heads", "group", "dk", "dv", TOKENS}
"""The sizes that every call has."""


def input_array(pattern: ir.Pattern, tensor: ir.Tensor, value: object) -> NDArray[Any]:
    """Return the data of an input; for a real tensor its shape alone. Raises ArgumentTypeError, ArgumentError."""
    if value is None:
        raise missing(pattern, tensor)
    if is_tensor(value) and tensor.is_floating and dtype_name(value.dtype) in _FLOATING[tensor.kind]:
        return np.broadcast_to(np.zeros((), dtype=np.float64), tuple(value.shape))  # no plan reads its data
    if is_tensor(value) and value.is_cuda:
        note(pattern.name, HOST_WAIT, f"the input `{tensor.name}` is read by the host")
    try:
        array = _as_array(value) if is_tensor(value) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(f"the input `{tensor.name}` cannot be read as a tensor: {error}") from error
    if array.dtype.kind in {"real": "iuf", "complex": "iufc"}.get(tensor.kind, ""):
        return array
    wanted = {"bool": "b", "real": "f", "complex": "c"}.get(tensor.kind, "iu")
    if array.dtype.kind not in wanted:
        raise ArgumentTypeError(f"the input `{tensor.name}` has dtype {array.dtype}: it must be {tensor.kind}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ArgumentError(f"the input `{tensor.name}` has a value above the int64 maximum")
    if tensor.name == ids_of_documents(pattern):
        return array  # read once, during planning, and large: not copied
    return _private_copy(array) if tensor.kind == "bool" else array.astype(np.int64)


def missing(pattern: ir.Pattern, tensor: ir.Tensor) -> ArgumentTypeError:
    """Return the error for an input that is not given; for a sorted input it names the input that is sorted."""
    name = tensor.name if tensor.made is None else tensor.made.of
    wanted = next(declared for declared in pattern.tensors if declared.name == name)
    return ArgumentTypeError(
        f"`{pattern.name}` needs the input `{name}`: {_type(wanted)}; give it as a keyword argument"
    )


def _private_copy(array: NDArray[Any]) -> NDArray[Any]:
    """Return a copy, unless one element is broadcast: plans outlive the call, and callers may change their arrays."""
    return array if array.ndim and not any(array.strides) else array.copy()


def blank(value: object) -> NDArray[Any] | None:
    """Return an array with the shape and kind of an input, without its data."""
    if value is None:
        return None
    if is_tensor(value):
        kind = "b" if dtype_name(value.dtype) == "bool" else "f" if value.is_floating_point() else "i"
        shape = tuple(value.shape)
    else:
        kind, shape = np.asarray(value).dtype.kind, np.asarray(value).shape
    return np.broadcast_to(np.zeros((), dtype={"b": np.bool_, "f": np.float32}.get(kind, np.int64)), shape)


def blank_choices(pattern: ir.Pattern, arguments: Mapping[str, object]) -> dict[str, object]:
    """Return the inputs with the results of selections reduced to their shapes, so that the host waits for none."""
    selection_inputs = {item.given.name for item in pattern.selections}
    return {name: blank(x) if name in selection_inputs else x for name, x in arguments.items()}


def _as_array(value: Tensor) -> NDArray[Any]:
    """Return the data of a tensor as an array; bfloat16, which NumPy lacks, becomes float32."""
    value = value.detach().cpu()
    return (value.float() if dtype_name(value.dtype) == "bfloat16" else value).numpy()


def _type(tensor: ir.Tensor) -> str:
    return f"{tensor.kind}[{', '.join(map(str, tensor.dims))}]" if tensor.dims else tensor.kind


def _check_dims(tensor: ir.Tensor, shape: tuple[int, ...], sizes: TensorSizes, named: dict[str, int]) -> None:
    fixed = {
        "batch": sizes.batch,
        "head": sizes.heads,
        "kv_head": sizes.kv_heads,
        "query": sizes.n_q,
        "key": sizes.n_k,
        "token": sizes.n_k,
    }
    if len(shape) != len(tensor.dims):
        raise ArgumentError(
            f"the input `{tensor.name}` has {len(shape)} dimensions, shape {shape}: it must be {_type(tensor)}"
        )
    for axis, (dim, size) in enumerate(zip(tensor.dims, shape, strict=True)):
        wanted = dim if isinstance(dim, int) else fixed.get(dim, named.get(dim))
        if wanted is None:
            named[str(dim)] = size
        elif size != wanted and not (dim == "batch" and size == 1):
            raise ArgumentError(
                f"the input `{tensor.name}` has size {size} in dimension {axis} (`{dim}`): it must be {wanted}"
            )


def check_alignment(pattern: ir.Pattern, sizes: TensorSizes) -> None:
    """Raise ArgumentError where a pattern does not say how these queries align with these keys."""
    n_q, n_k = sizes.n_q, sizes.n_k
    if n_q == n_k:
        return
    if pattern.align is None and pattern.needs_align:
        raise ArgumentError(
            f"q has {n_q} tokens and k has {n_k} (dimension 2), and `{pattern.name}` does not say how they align: "
            f"`align end` puts the last query at the last key (query 0 at key {n_k - n_q}), `align start` puts query "
            f"0 at key 0; write one or the other in the pattern"
        )
    if pattern.align == "end" and n_q > n_k and (reason := needs_tokens(pattern)) is not None:
        raise ArgumentError(
            f"q has {n_q} tokens and k has {n_k} (dimension 2): under `align end` the first {n_q - n_k} queries are "
            f"before key 0, and `{pattern.name}` {reason}; drop these queries: q[:, :, {n_q - n_k}:]"
        )


def _check_lengths_of_segments(pattern: ir.Pattern, sizes: TensorSizes, named: dict[str, int]) -> None:
    if not pattern.segments:
        return
    if pattern.documents is not None:
        packed = "cu_seqlens and a pattern with `tokens`" if ir.BOUNDARIES in pattern.documents.dims else ""
        both = packed or f"`{pattern.name}` has both `tokens` and `documents`"
        raise UnsupportedError(f"{both}, which is not supported yet; call it once for each sequence")
    unknown = {n.name for s in pattern.segments for _, e in s.axes for n in walk(e) if isinstance(n, ir.Extent)}
    unknown -= set(named)
    if unknown:
        named.update(_infer(pattern, sizes.n_k, unknown, named))
    total = sum(prod(_size(extent, named) for _, extent in segment.axes) for segment in pattern.segments)
    if total != sizes.n_k:
        raise ArgumentError(f"k has {sizes.n_k} tokens (dimension 2): `tokens` of `{pattern.name}` must be {total}")


def _infer(pattern: ir.Pattern, n_k: int, unknown: set[str], named: Mapping[str, int]) -> dict[str, int]:
    """Return the one length that is not passed, inferred from the number of keys."""
    (name,) = unknown
    rest, per_unit = n_k, 0
    for segment in pattern.segments:
        sizes = [_size(extent, named) for _, extent in segment.axes if not _is(extent, name)]
        if len(sizes) == len(segment.axes):
            rest -= prod(sizes)
        else:
            per_unit += prod(sizes)
    if rest < 0 or per_unit == 0 or rest % per_unit:
        raise ArgumentError(
            f"k has {n_k} tokens (dimension 2): no integer `{name}` gives the `tokens` of `{pattern.name}` this sum"
        )
    return {name: rest // per_unit}


def _is(extent: ir.Index, name: str) -> bool:
    return isinstance(extent, ir.Extent) and extent.name == name


def _size(extent: ir.Index, named: Mapping[str, int]) -> int:
    if isinstance(extent, ir.Extent):
        return named[extent.name]
    assert isinstance(extent, ir.Const)
    return extent.value


def _check_head_lists(pattern: ir.Pattern, sizes: TensorSizes) -> None:
    for name, length in pattern.head_lists:
        if length != sizes.heads:
            raise ArgumentError(
                f"the parameter `{name}` has {length} entries, one per head; q has {sizes.heads} heads (dimension 1)"
            )
