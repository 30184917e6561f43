"""Masks of `scaled_dot_product_attention`: made of a pattern, and a pattern made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.compiler.lowering.specialise import reads_batch, reads_head
from attnc.compiler.planning.build_plan import Relations
from attnc.runtime.attention import Attention, compile_attention
from attnc.runtime.bridged import device_of
from attnc.runtime.bridges.given_attention import GivenAttention
from attnc.runtime.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.reference import dense_mask
from attnc.runtime.tensor_checks import FLOATS


def sdpa_mask(
    attention: Attention,
    n_q: int,
    n_k: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    batch: int | None = None,
    device: torch.device | str | None = None,
    relation_only: bool = False,
    **inputs: object,
) -> Tensor:
    """A pattern as the `attn_mask` of `scaled_dot_product_attention`: (batch or 1, heads or 1, Nq, Nk), all pairs.

    Without `dtype` bool, true where a query sees a key; with a floating one additive, 0 there and -inf elsewhere. It
    has the batch entries and heads that differ. A row that sees nothing is all false, or all -inf; SDPA gives it
    output 0 and gradients 0, as attnc does. The rest, and what is raised: as `Attention.mask_mod`, and EvaluationError
    where the relation faults.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ArgumentTypeError(f"dtype is {dtype}: it must be a floating dtype, or None for a bool mask")
    counts = heads, kv_heads, batch
    pattern, shape = attention._relation_of_call("sdpa_mask", n_q, n_k, counts, inputs, relation_only)
    relation = pattern.attend.visible
    mask = dense_mask(Relations(pattern, shape)).to(device_of(device, inputs))
    mask = mask if reads_batch(pattern, relation) else mask[:1]
    mask = mask if reads_head(relation) else mask[:, :1]
    if dtype is None:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def from_sdpa_mask(mask: object, *, hidden: float = -torch.inf) -> GivenAttention:
    """An attention that does what `scaled_dot_product_attention` does with an `attn_mask`, exactly.

    `mask` is bool, true where a query sees a key, or floating, added to the scores; of 2 to 4 dimensions, the last ones
    of (batch, heads, Nq, Nk), each of which may be 1. Of a floating mask what is at most `hidden` is not seen: -inf, or
    the least number of the dtype where a library writes that; the rest is a bias, with a gradient if `mask` requires
    one: then make the attention anew in each step. A bias of zeros that needs no gradient is left out.

    Raises ArgumentTypeError, ArgumentError.
    """
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.dtype in FLOATS):
        what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentTypeError(f"mask is {what}: it must be a tensor of bool, or of a floating dtype")
    if not 2 <= mask.dim() <= 4:
        raise ArgumentError(
            f"mask has {mask.dim()} dimensions, shape {tuple(mask.shape)}: it must have 2 to 4, the last ones of "
            f"(batch, heads, queries, keys)"
        )
    whole = mask[(None,) * (4 - mask.dim())]
    dims = [dim for dim, size in zip(_DIMS, whole.shape, strict=True) if size != 1]
    squeezed = whole.reshape([size for size in whole.shape if size != 1])
    seen = squeezed if mask.dtype == torch.bool else squeezed.detach() > hidden
    given = {"seen": seen}
    if mask.dtype != torch.bool:
        bias = torch.where(seen, squeezed, 0)
        if mask.requires_grad or bool(bias.any()):
            given["bias"] = bias
    return GivenAttention(compile_attention(_text(dims, "bias" in given)), given)


_DIMS = ("batch", "head", "query", "key")


def _text(dims: list[str], biased: bool) -> str:
    named = f"[{', '.join(dims)}]" if dims else ""
    at = f"[{', '.join({'query': 'q', 'key': 'k'}[dim] for dim in dims if dim in ('query', 'key'))}]"
    read = at if at != "[]" else ""
    lines = [
        "pattern sdpa_mask",
        '    """A mask of scaled_dot_product_attention."""',
        "    align   start",
        f"    input   seen: bool{named}",
        *([f"    input   bias: real{named}"] if biased else []),
        f"    visible seen{read}",
        *([f"    score   scale * dot(q, k) + bias{read}"] if biased else []),
    ]
    return "\n".join(lines) + "\n"
