"""Where the elements of a pattern's inputs are, as text."""

from __future__ import annotations

from collections.abc import Callable

from attnc.compiler.ir import Tensor
from attnc.compiler.kernels.index_text import Axes, ExprText, NotInKernelsError, aligned

TOKENS = ("token", "key", "query")
LANES = ("batch", "head", "kv_head")


def address(
    tensor: Tensor, indices: tuple[ExprText, ...], of_place: Callable[[str, ExprText], ExprText]
) -> tuple[str, Axes]:
    """The address of an element as text, from the strides `input_name_0, …`; and along which sides it differs.

    Places are made indices of the call by `of_place`. Elements of the last dimension lie side by side (`strides`).
    """
    if len(indices) != len(tensor.dims):
        raise NotInKernelsError("vectors of inputs")
    placed = [
        of_place(str(dim), text) if dim in TOKENS else text for dim, text in zip(tensor.dims, indices, strict=True)
    ]
    axes, texts = aligned(*placed)
    names = {i: f"{input_name(tensor)}_{i}" for i in strides(tensor)}
    terms = [f"{text.at(7)} * {names[i]}" if i in names else text.at(6) for i, text in enumerate(texts)]
    return " + ".join([input_name(tensor), *terms]), axes


def strides(tensor: Tensor) -> range:
    """The dimensions whose strides kernels are told: all but a last one of tokens or of a table's entries."""
    dims = tensor.dims
    return range(len(dims) - (bool(dims) and dims[-1] not in LANES))


def input_name(tensor: Tensor) -> str:
    """Return the name of a pattern's input in texts; no other name looks like it."""
    if tensor.made is None and tensor.name.isidentifier():
        return f"input_{tensor.name}"
    kind = "member_" if tensor.made is None else "made_"  # what a member of a family chooses is called `stage[1]`
    return kind + "".join(letter if letter.isalnum() else "_" for letter in tensor.name)


def size_name(size: str) -> str:
    """Return the name of a pattern's size in texts."""
    return f"size_{size}"
