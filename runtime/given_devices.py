"""Inputs on another device than q, or wider than what is computed with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.runtime.call_errors import ArgumentError
from attnc.runtime.fallbacks import CAST, MOVED, note


def check_devices(pattern: Pattern, given: Mapping[str, object], tensors: Sequence[Tensor], q: Tensor) -> None:
    """Raise ArgumentError for a real input on another device than q, which gradients would not find.

    Integers and truths may be anywhere, and are copied; that is counted, and so is what of a real input is rounded.
    """
    traced = torch.compiler.is_compiling()
    for declared, x in zip(pattern.tensors, tensors, strict=True):
        if declared.is_floating and x.device != q.device:
            raise ArgumentError(
                f"the input `{declared.name}` is on {x.device} and q on {q.device}: move it, "
                f"{declared.name}.to({str(q.device)!r})"
            )
        if traced or given.get(declared.name) is not x:
            continue  # numbers of a graph, or made here of a list
        if x.device != q.device and not q.is_cuda:
            note(pattern.name, MOVED, f"the input `{declared.name}` is on {x.device.type}")
        if x.dtype == torch.float64 != q.dtype:
            note(pattern.name, CAST, f"the input `{declared.name}`: float64 to float32")


__all__ = ["check_devices"]
