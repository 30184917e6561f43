"""Calling a kernel: what it is given, by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from attnc.compiler.kernels.source import VECTOR, Argument, KernelSource
from attnc.runtime.gpu.modules import function_of


def launch(
    source: KernelSource,
    programs: int,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, int | float],
    parts: int | None = None,
) -> None:
    """Run so many programs of a kernel, times its parts. Strides are taken from the tensors, in units of 16 bytes for q, k, v and such."""
    if not programs:
        return
    arguments = []
    for argument in source.arguments:
        if argument.box:
            arguments.append(_described(tensors[argument.of], argument))
        elif argument.is_pointer:
            arguments.append(tensors[argument.name])
        elif argument.name in numbers:
            arguments.append(numbers[argument.name])
        else:
            arguments.append(_stride(argument.name, tensors))
    grid = (programs, parts or source.parts)
    tiles = source.tiles
    function_of(source)[grid](*arguments, num_warps=tiles.warps, num_stages=tiles.stages)


def _stride(name: str, tensors: Mapping[str, Tensor]) -> int:
    tensor, _, dim = name.rpartition("_")
    of = tensors[tensor]
    if dim.isdigit():
        return of.stride(int(dim)) if of.shape[int(dim)] > 1 else 0
    return of.stride(("batch", "head", "token").index(dim)) * of.element_size() // VECTOR


def _described(tensor: Tensor, argument: Argument) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    unused = -(-tensor.numel() // VECTOR) * VECTOR  # of a dimension of size 1: any multiple of 16 bytes
    strides = [s if n > 1 else unused for s, n in zip(tensor.stride(), tensor.shape, strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:3], 1], list(argument.box))
