"""A torch module that holds a pattern's learned tensors as Parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from attnc.compiler import ir
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.spec.suggest import did_you_mean

if TYPE_CHECKING:
    from attnc.runtime.api.attention import Attention


class AttentionModule(nn.Module):
    """A module that owns an `Attention`'s learned tensors; a call omits them and is otherwise the same."""

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
        """Compute attention over q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv), as `Attention` does."""
        all_inputs: dict[str, Any] = {**inputs, **dict(self.named_parameters(recurse=False))}
        call: Any = self.attention
        return cast("Tensor | tuple[Tensor, Tensor]", call(q, k, v, scale=scale, return_lse=return_lse, **all_inputs))

    def extra_repr(self) -> str:
        """Return the attention's representation, for `print`."""
        return repr(self.attention)


def initial(pattern: ir.Pattern, sizes: Mapping[str, int], init: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the learned tensors of a pattern, zeros unless `init` gives them; `init` may give new sizes, too.

    Raises ArgumentTypeError for names that are neither, ArgumentError for shapes that do not match.
    """
    learned = {tensor.name: tensor for tensor in pattern.tensors if tensor.learned}
    size_names = {str(dim) for tensor in learned.values() for dim in tensor.dims if isinstance(dim, str)} - {
        *sizes,
        "head",
        "dk",
        "dv",
    }
    for name in init:
        if name not in learned and name not in size_names:
            listed = ", ".join(f"`{n}`" for n in (*learned, *sorted(size_names))) or "nothing"
            help_ = did_you_mean(name, (*learned, *size_names), f"it learns {listed}")
            raise ArgumentTypeError(f"`{pattern.name}` learns no `{name}`: {help_}")
    all_sizes = dict(sizes) | {name: _size(name, init[name]) for name in size_names & set(init)}
    return {name: _tensor(pattern, tensor, all_sizes, init.get(name)) for name, tensor in learned.items()}


def _size(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentTypeError(f"{name} is {value!r}: a size must be an integer above 0")
    return value


def _tensor(pattern: ir.Pattern, tensor: ir.Tensor, sizes: dict[str, int], value: object) -> Tensor:
    if value is None:
        missing = [str(dim) for dim in tensor.dims if isinstance(dim, str) and dim not in sizes]
        if missing:
            size = "heads" if missing[0] == "head" else missing[0]
            raise ArgumentError(
                f"`{tensor.name}` of `{pattern.name}` has a dimension `{missing[0]}`: pass its size, `{size}=…`, or "
                f"the tensor, `{tensor.name}=…`"
            )
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in tensor.dims]
        return torch.zeros(shape, dtype=torch.complex64 if tensor.kind == "complex" else torch.float32)
    fits = isinstance(value, Tensor) and (
        value.is_floating_point() or (tensor.kind == "complex" and value.is_complex())
    )
    if not isinstance(value, Tensor) or not fits:
        kind = "complex" if tensor.kind == "complex" else "floating"
        what = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentTypeError(f"{tensor.name} is {what}: it must be a {kind} tensor")
    wanted = [dim if isinstance(dim, int) else sizes.setdefault(dim, size) for dim, size in _pairs(tensor, value)]
    if list(value.shape) != wanted:
        raise ArgumentError(f"`{tensor.name}` has shape {tuple(value.shape)}: it must be {tuple(wanted)}")
    return value.detach().clone()


def _pairs(tensor: ir.Tensor, given: Tensor) -> list[tuple[str | int, int]]:
    if given.ndim != len(tensor.dims):
        raise ArgumentError(
            f"`{tensor.name}` has {given.ndim} dimensions, shape {tuple(given.shape)}: it must have {len(tensor.dims)}"
        )
    return cast("list[tuple[str | int, int]]", list(zip(tensor.dims, given.shape, strict=True)))
