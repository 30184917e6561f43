"""Torch features that may surround a call: autocast, forward-mode differentiation, torch.compile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.nn import Parameter
from typing_extensions import ParamSpec

from attnc.runtime.call.device_targets import pretended
from attnc.runtime.fallbacks import CAST, note

P = ParamSpec("P")
R = TypeVar("R")


def cast_for_autocast(pattern: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v in autocast's dtype where it is on, as scaled_dot_product_attention does (fp64 stays).

    `pattern`: the name under which casts are counted; casts within a graph are not.
    """
    if not torch._C._is_any_autocast_enabled():
        return q, k, v
    device = q.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    casted = cast(q), cast(k), cast(v)
    if not torch.compiler.is_compiling() and casted[0].dtype != q.dtype and not is_fake(q):
        note(pattern, CAST, f"autocast: q, k and v from {q.dtype} to {dtype}".replace("torch.", ""))
    return casted


def wide_in_interpreter(pattern: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v in fp32 where kernels run on a CPU in bf16, which Triton's interpreter cannot multiply."""
    if not q.is_cpu or q.dtype != torch.bfloat16 or is_fake(q) or pretended() is not None:
        return q, k, v
    note(pattern, CAST, "Triton's interpreter cannot multiply bfloat16: q, k and v to float32, and out back")
    return q.float(), k.float(), v.float()


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast does not change the dtypes that attnc computes in."""
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def is_forward_mode() -> bool:
    """Check whether forward-mode derivatives are being computed."""
    return forward_ad._current_level >= 0


def needs_record(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Check whether autograd must record a call."""
    return (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)) or is_forward_mode()


def is_observed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Check whether autocast, a dispatch mode, a tensor subclass or a device must see torch's operators of a call."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch.is_autocast_enabled("cpu")
        or not (_is_plain(q) and _is_plain(k) and _is_plain(v))
    )


def _is_plain(x: Tensor) -> bool:
    return (type(x) is Tensor or type(x) is Parameter) and x.is_cpu


def is_watched(*tensors: Tensor) -> bool:
    """Check whether torch observes a call: a trace, a transform, a mode, a graph under capture."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or is_forward_mode()
        or any(x.is_meta or is_fake(x) for x in tensors)
        or any(x.is_cuda and torch.cuda.is_current_stream_capturing() for x in tensors)
    )


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` hidden from torch.compile, or `function` where torch.compile was never imported.

    The parts of torch.compile take seconds to import; where they are not imported, nothing compiles.
    """
    if "torch._dynamo" not in sys.modules:
        return function
    return cast("Callable[P, R]", torch.compiler.disable(function))  # type: ignore[no-untyped-call]
