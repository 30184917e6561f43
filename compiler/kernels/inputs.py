"""Where the elements of a pattern's inputs are, as text."""

from __future__ import annotations

from collections.abc import Callable

from attnc.compiler.ir import Tensor
from attnc.compiler.kernels.index_text import Axes, NotInKernelsError, Text, aligned

TOKENS = ("token", "key", "query")


def address(tensor: Tensor, indices: tuple[Text, ...], of_place: Callable[[str, Text], Text]) -> tuple[str, Axes]:
    """The address of an element as text, from the strides `name_0, name_1, …`; and along which sides it differs.

    Places are made indices of the call by `of_place`.
    """
    if len(indices) != len(tensor.dims):
        raise NotInKernelsError("vectors of inputs")
    placed = [
        of_place(str(dim), text) if dim in TOKENS else text for dim, text in zip(tensor.dims, indices, strict=True)
    ]
    axes, texts = aligned(*placed)
    terms = [f"{text.at(7)} * {tensor.name}_{i}" for i, text in enumerate(texts)]
    return " + ".join([tensor.name, *terms]), axes
