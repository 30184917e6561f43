"""Refusal of calls on shards of a sequence, where one rank alone has too few keys."""

from __future__ import annotations

import sys

import torch.nn.functional as F

from attnc.runtime.call.call_errors import UnsupportedError

_CONTEXT_PARALLEL = "torch.distributed.tensor.experimental._context_parallel._attention"

IN_SHARDS = (
    "context_parallel of torch.distributed is active, so q, k and v are this rank's shard of the sequence. This "
    "is not supported yet: gather the sequence and call the pattern outside of context_parallel, or use torch's "
    "scaled_dot_product_attention inside of it"
)


def refuse_shards() -> None:
    """Raise UnsupportedError inside torch's `context_parallel`, and after its dispatcher was enabled separately."""
    module = sys.modules.get(_CONTEXT_PARALLEL)
    if module is not None and (_is_patched() or _dispatches(module)):
        raise UnsupportedError(IN_SHARDS)


def _is_patched() -> bool:
    """Check whether `context_parallel` has replaced SDPA."""
    return bool(getattr(F.scaled_dot_product_attention, "__module__", None) == _CONTEXT_PARALLEL)


def _dispatches(module: object) -> bool:
    """Check whether DTensors are dispatched to the attention of `context_parallel`."""
    dispatcher = getattr(getattr(module, "DTensor", None), "_op_dispatcher", None)
    plain, ours = getattr(module, "existing_custom_ops", None), getattr(module, "custom_ops", {})
    handlers = getattr(dispatcher, "_custom_op_handlers", plain)
    return handlers is not None and handlers is not plain and bool(ours) and all(op in handlers for op in ours)
