"""A pattern's learned tensors as Parameters of a torch module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from attnc.compiler import ir
from attnc.runtime.call_errors import ArgumentError, ArgumentTypeError
from attnc.spec.suggest import did_you_mean

if TYPE_CHECKING:
    from attnc.runtime.attention import Attention


class AttentionModule(nn.Module):
    """An `Attention` that owns its learned tensors; it is called like one, without them."""

    def __init__(self, attention: Attention, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.attention = attention
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        **inputs: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv); see `Attention.__call__`."""
        given: dict[str, Any] = {**inputs, **dict(self.named_parameters(recurse=False))}
        call: Any = self.attention
        return cast("Tensor | tuple[Tensor, Tensor]", call(q, k, v, scale=scale, return_lse=return_lse, **given))

    def extra_repr(self) -> str:
        """What is inside, for `print`."""
        return repr(self.attention)


def initial(pattern: ir.Pattern, sizes: Mapping[str, int], init: Mapping[str, object]) -> dict[str, Tensor]:
    """The learned tensors of a pattern, zeros unless `init` gives them; `init` may also give new sizes as numbers.

    Raises ArgumentTypeError for names that are neither, ArgumentError for shapes that do not fit.
    """
    learned = {tensor.name: tensor for tensor in pattern.tensors if tensor.learned}
    own = {str(dim) for tensor in learned.values() for dim in tensor.dims if isinstance(dim, str)} - {
        *sizes,
        "head",
        "dk",
        "dv",
    }
    for name in init:
        if name not in learned and name not in own:
            listed = ", ".join(f"`{n}`" for n in (*learned, *sorted(own))) or "nothing"
            help_ = did_you_mean(name, (*learned, *own), f"it learns {listed}")
            raise ArgumentTypeError(f"`{pattern.name}` learns no `{name}`: {help_}")
    known = dict(sizes) | {name: _size(name, init[name]) for name in own & set(init)}
    return {name: _tensor(pattern, tensor, known, init.get(name)) for name, tensor in learned.items()}


def _size(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentTypeError(f"{name} is {value!r}: it is a size, a whole number above 0")
    return value


def _tensor(pattern: ir.Pattern, tensor: ir.Tensor, sizes: dict[str, int], given: object) -> Tensor:
    if given is None:
        missing = [str(dim) for dim in tensor.dims if isinstance(dim, str) and dim not in sizes]
        if missing:
            size = "heads" if missing[0] == "head" else missing[0]
            raise ArgumentError(
                f"`{tensor.name}` of `{pattern.name}` has a dimension `{missing[0]}`: give it, `{size}=…`, or "
                f"the tensor, `{tensor.name}=…`"
            )
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in tensor.dims]
        return torch.zeros(shape, dtype=torch.complex64 if tensor.kind == "complex" else torch.float32)
    fits = isinstance(given, Tensor) and (
        given.is_floating_point() or (tensor.kind == "complex" and given.is_complex())
    )
    if not isinstance(given, Tensor) or not fits:
        kind = "complex" if tensor.kind == "complex" else "floating"
        what = str(given.dtype) if isinstance(given, Tensor) else type(given).__name__
        raise ArgumentTypeError(f"{tensor.name} is {what}: it must be a {kind} tensor")
    wanted = [dim if isinstance(dim, int) else sizes.setdefault(dim, size) for dim, size in _pairs(tensor, given)]
    if list(given.shape) != wanted:
        raise ArgumentError(f"`{tensor.name}` has shape {tuple(given.shape)}: it must be {tuple(wanted)}")
    return given.detach().clone()


def _pairs(tensor: ir.Tensor, given: Tensor) -> list[tuple[str | int, int]]:
    if given.ndim != len(tensor.dims):
        raise ArgumentError(
            f"`{tensor.name}` has {given.ndim} dimensions, shape {tuple(given.shape)}: it must have {len(tensor.dims)}"
        )
    return cast("list[tuple[str | int, int]]", list(zip(tensor.dims, given.shape, strict=True)))
