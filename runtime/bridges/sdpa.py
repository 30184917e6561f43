"""Convert patterns to masks of `scaled_dot_product_attention`, and masks to patterns."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.compiler.lowering.specialise import reads_batch, reads_head
from attnc.compiler.planning.build_plan import Relations
from attnc.runtime.api.attention import Attention
from attnc.runtime.api.compile_attention import compile_attention
from attnc.runtime.api.flex_masks import FlexMasks, device_of
from attnc.runtime.bridges.given_attention import GivenAttention
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.call.tensor_checks import FLOATS
from attnc.runtime.executors.reference.reference import dense_mask


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
    """Return a pattern as an `attn_mask` of `scaled_dot_product_attention`: (batch or 1, heads or 1, Nq, Nk).

    The mask holds all pairs. Without `dtype` it is bool, true where a query sees a key; with a floating dtype it is
    additive, 0 for visible pairs and -inf elsewhere. Its batch size and number of heads are 1 where the relation does
    not depend on them. A row that sees nothing is all false, or all -inf; SDPA gives it output 0 and gradients 0, as
    attnc does. The other arguments and the errors are those of `Attention.mask_mod`, and EvaluationError where the
    relation cannot be evaluated.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ArgumentTypeError(f"dtype is {dtype}: it must be a floating dtype, or None for a bool mask")
    masks = FlexMasks(attention._core, (n_q, n_k), (heads, kv_heads, batch), inputs, device)
    pattern, shape = masks.relation("sdpa_mask", relation_only)
    relation = pattern.attend.visible
    mask = dense_mask(Relations(pattern, shape)).to(device_of(device, inputs))
    mask = mask if reads_batch(pattern, relation) else mask[:1]
    mask = mask if reads_head(relation) else mask[:, :1]
    if dtype is None:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def from_sdpa_mask(mask: object, *, hidden: float = -torch.inf) -> GivenAttention:
    """Return an attention with exactly the result of `scaled_dot_product_attention` with an `attn_mask`.

    `mask` is bool, true where a query sees a key, or floating, added to the scores. It has 2 to 4 dimensions, the last
    ones of (batch, heads, Nq, Nk), each of which may be 1. In a floating mask, pairs of at most `hidden` are not
    visible: -inf, or the least number of the dtype where a library writes that. The other entries are a bias, with a
    gradient if `mask` requires one; then make the attention anew in each step. A bias of zeros that needs no gradient
    is omitted.

    Raises ArgumentTypeError, ArgumentError.
    """
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.dtype in FLOATS):
        actual = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentTypeError(f"mask is {actual}: it must be a tensor of bool or of a floating dtype")
    if not 2 <= mask.dim() <= 4:
        raise ArgumentError(
            f"mask has {mask.dim()} dimensions, shape {tuple(mask.shape)}: expected 2 to 4, the last ones of "
            f"(batch, heads, queries, keys)"
        )
    mask_4d = mask[(None,) * (4 - mask.dim())]
    dims = [dim for dim, size in zip(_DIMS, mask_4d.shape, strict=True) if size != 1]
    squeezed = mask_4d.reshape([size for size in mask_4d.shape if size != 1])
    visible = squeezed if mask.dtype == torch.bool else squeezed.detach() > hidden
    inputs = {"seen": visible}
    if mask.dtype != torch.bool:
        bias = torch.where(visible, squeezed, 0)
        if mask.requires_grad or bool(bias.any()):
            inputs["bias"] = bias
    return GivenAttention(compile_attention(_pattern_text(dims, "bias" in inputs)), inputs)


_DIMS = ("batch", "head", "query", "key")


def _pattern_text(dims: list[str], biased: bool) -> str:
    dims_text = f"[{', '.join(dims)}]" if dims else ""
    index_text = f"[{', '.join({'query': 'q', 'key': 'k'}[dim] for dim in dims if dim in ('query', 'key'))}]"
    subscript = index_text if index_text != "[]" else ""
    lines = [
        "pattern sdpa_mask",
        '    """A mask of scaled_dot_product_attention."""',
        "    align   start",
        f"    input   seen: bool{dims_text}",
        *([f"    input   bias: real{dims_text}"] if biased else []),
        f"    visible seen{subscript}",
        *([f"    score   scale * dot(q, k) + bias{subscript}"] if biased else []),
    ]
    return "\n".join(lines) + "\n"
