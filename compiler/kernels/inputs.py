"""The addresses of the elements of a pattern's inputs, as text."""

from __future__ import annotations

from collections.abc import Callable

from attnc.compiler.ir import Tensor
from attnc.compiler.kernels.index_text import Axes, ExprText, NotInKernelsError, aligned

TOKENS = ("token", "key", "query")
LANES = ("batch", "head", "kv_head")


def address(
    tensor: Tensor, indices: tuple[ExprText, ...], call_index: Callable[[str, ExprText], ExprText]
) -> tuple[str, Axes]:
    """Return the address of an element as text, from strides `input_name_0, …`, and the axes along which it differs.

    `call_index` turns positions into indices of the call's tokens. Elements of the last dimension are adjacent, unless
    it has a stride (`strides`).
    """
    if len(indices) != len(tensor.dims):
        raise NotInKernelsError("vectors that are read from inputs")
    call_indices = [
        call_index(str(dim), text) if dim in TOKENS else text for dim, text in zip(tensor.dims, indices, strict=True)
    ]
    axes, texts = aligned(*call_indices)
    names = {i: f"{input_name(tensor)}_{i}" for i in strides(tensor)}
    terms = [f"{text.at(7)} * {names[i]}" if i in names else text.at(6) for i, text in enumerate(texts)]
    return " + ".join([input_name(tensor), *terms]), axes


def strides(tensor: Tensor) -> range:
    """Return the dimensions whose strides kernels receive: all but a last one of tokens or of a table's entries."""
    dims = tensor.dims
    return range(len(dims) - (bool(dims) and dims[-1] not in LANES))


def input_name(tensor: Tensor) -> str:
    """Return the name of a pattern's input in texts; no other name looks like it."""
    if tensor.made is None and tensor.name.isidentifier():
        return f"input_{tensor.name}"
    # The selection of a family's member has a name such as `stage[1]`.
    kind = "member_" if tensor.made is None else "made_"
    return kind + "".join(letter if letter.isalnum() else "_" for letter in tensor.name)


def size_name(size: str) -> str:
    """Return the name of a pattern's size in texts."""
    return f"size_{size}"
