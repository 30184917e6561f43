"""Kernel launches: texts as functions that Triton compiles, the arguments of a kernel by name, and collected launches.

The text of a kernel comes from the emitter and is never read from disk.
"""

from __future__ import annotations

import linecache
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from attnc.compiler.kernels.kernel_source import VECTOR, KernelArgument, KernelSource
from attnc.compiler.kernels.targets import Target
from attnc.runtime.call.device_targets import pretending
from attnc.runtime.disk.triton import guard_triton
from attnc.runtime.process.recent import Recent
from attnc.runtime.settings import SETTINGS

_log = logging.getLogger(__name__)

_FUNCTIONS: Recent[Any] = Recent(SETTINGS.kernels)
"""Functions by the digest of their text; each holds the binaries that Triton has compiled for it."""

Start = Callable[[KernelSource, tuple[int, int], Sequence[object]], None]
"""A function (kernel, grid, arguments) that performs a launch."""


def launch(
    source: KernelSource,
    programs: int,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, int | float],
    parts: int | None = None,
) -> None:
    """Launch `programs` programs of a kernel, times its parts.

    Strides come from the tensors, in units of 16 bytes for q, k, v and similar tensors.
    """
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
    _START.get()(source, (programs, parts or source.parts), arguments)


def _start(source: KernelSource, grid: tuple[int, int], arguments: Sequence[object]) -> None:
    function_of(source)[grid](*arguments, **source.options)


_START: ContextVar[Start] = ContextVar("how kernels are started", default=_start)


@contextmanager
def started_by(start: Start) -> Iterator[None]:
    """Pass kernels to `start` inside the block instead of running them."""
    token = _START.set(start)
    try:
        yield
    finally:
        _START.reset(token)


def _stride(name: str, tensors: Mapping[str, Tensor]) -> int:
    tensor, _, dim = name.rpartition("_")
    source_tensor = tensors[tensor]
    if dim.isdigit():
        return source_tensor.stride(int(dim)) if source_tensor.shape[int(dim)] > 1 else 0
    return source_tensor.stride(("batch", "head", "token").index(dim)) * source_tensor.element_size() // VECTOR


def _described(tensor: Tensor, argument: KernelArgument) -> object:
    """Return a tensor's descriptor; if the argument requires it, tokens form a grid, and batch and heads one side."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # optional

    batch, head, token = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    sides = [batch, head]
    if argument.folded:
        assert lies_evenly(tensor)
        sides = [(batch[0] * head[0], head[1] if head[0] > 1 else batch[1])]
    sides += [(extent, stride * token[1]) for extent, stride in argument.axes] or [token]
    shape = [size for size, _ in sides]
    unused = -(-tensor.numel() // VECTOR) * VECTOR  # stride of a side of size 1: any multiple of 16 bytes
    strides = [stride if size > 1 else unused for size, stride in sides]
    return TensorDescriptor(tensor, [*shape, tensor.shape[3]], [*strides, 1], list(argument.box))


def lies_evenly(x: Tensor) -> bool:
    """Check whether the heads of all batch entries are evenly spaced, so that they form one side of a box."""
    return 1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1)


# --- functions -------------------------------------------------------------------------------------------------------


def function_of(source: KernelSource) -> Any:
    """Return the kernel function of a text; equal texts share one function."""
    return _FUNCTIONS.get(source.digest, lambda: _made(source))


def _made(source: KernelSource) -> Any:
    guard_triton()
    _log.debug("%s, text %s: created; Triton compiles it at its first launch", source.function, source.digest)
    name = f"<attnc {source.function} {source.digest}>"
    module = ModuleType(f"attnc_kernel_{source.digest}")
    module.__file__ = name
    # Triton reads the source of its functions through `inspect`, which looks here.
    lines = (len(source.text), None, source.text.splitlines(keepends=True), name)
    linecache.cache[name] = lines
    exec(compile(source.text, name, "exec"), module.__dict__)
    function = getattr(module, source.function)
    finalize(function, _forget, name, lines)
    return function


def _forget(name: str, lines: Any) -> None:
    """Remove the text of a function that was freed, unless it was created again."""
    if linecache.cache.get(name) is lines:
        del linecache.cache[name]


# --- collected launches ----------------------------------------------------------------------------------------------


def started(call: Callable[[], Tensor], target: Target) -> Mapping[str, KernelSource]:
    """Return the kernels that a call and its gradient launch on a target, by name; nothing runs."""
    kernels: dict[str, KernelSource] = {}

    def keep(source: KernelSource, *_: object) -> None:
        if source.text not in [kernel.text for kernel in kernels.values()]:
            others = sum(name.partition(".")[0] == source.function for name in kernels)
            kernels[f"{source.function}.{others + 1}" if others else source.function] = source

    with pretending(target), started_by(keep):
        out = call()
        if out.requires_grad:
            torch.autograd.backward(out.sum())
    return kernels
