"""Kernel texts for readers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnc.compiler.ir import Pattern
from attnc.compiler.kernels.attention_kernels import HeadShape
from attnc.compiler.kernels.decode_kernels import ROW_TILES, find_decode
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.targets import Target
from attnc.compiler.passes.last_rows import OtherRowsError, last_rows
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.executors.triton.planner import gpu_planner
from attnc.runtime.planning.plans import Planner


def _decode(pattern: Pattern, heads: HeadShape, target: Target) -> dict[str, str]:
    """Return the texts of a decoding step of few rows against a paged cache, if it has kernels."""
    try:
        kernels = find_decode(last_rows(pattern), heads, target, "pages")
    except (NotInKernelsError, OtherRowsError):
        return {}
    return {source.function: source.text for source in (kernels.decode(ROW_TILES[0]), kernels.merge)}


def sources(
    planners: Sequence[tuple[str, Planner]], target: Target, head_dim: int, dtype: torch.dtype
) -> dict[str, str]:
    """Return the texts of all attentions that have kernels, by name. Raises UnsupportedError if none has."""
    heads = HeadShape(head_dim, head_dim, str(dtype).removeprefix("torch."))
    texts_by_name: dict[str, str] = {}
    without: list[str] = []
    for name, planner in planners:
        prefix = f"{name}." if len(planners) > 1 else ""
        try:
            texts = gpu_planner(planner).kernels(heads, target, square=True).sources
        except NotInKernelsError as error:
            without.append(f"`{name}`: there are no kernels for {error}")
            continue
        texts_by_name.update((f"{prefix}{kernel}", text) for kernel, text in texts.items())
        if len(planners) == 1:
            texts_by_name.update(_decode(planner.pattern, heads, target))
    if not texts_by_name:
        raise UnsupportedError(f"{'; '.join(without)}; on a GPU it runs as tiles in torch")
    return texts_by_name
