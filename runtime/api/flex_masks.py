"""A compiled pattern for FlexAttention: mask_mod, BlockMask and score_mod of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from attnc.compiler import ir
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.ir.value_nodes import is_plain, is_scored
from attnc.compiler.passes.joined_documents import RoundedDocumentsError, join_documents
from attnc.compiler.planning.build_plan import CallShape
from attnc.runtime.api.compiled import CompiledAttention
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError
from attnc.runtime.call.tensor_checks import call_shape, finite, input_tensors
from attnc.runtime.planning.plans import relations_of

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from attnc.runtime.executors.flex.torch_tape import MaskMod, ScoreMod


NOT_TRACED = (
    "block_mask, mask_mod and score_mod are built outside of torch: build them before the compiled function and pass "
    "them to it, or leave fullgraph=True out"
)

T = TypeVar("T")


class FlexMasks:
    """FlexAttention's view of one call: the lengths, the heads, kv heads and batch (or None), and the inputs.

    `relation_only`: accept a pattern with its own score or weights, which the caller then computes.
    """

    def __init__(
        self,
        compiled: CompiledAttention,
        lengths: tuple[int, int | None],
        counts: tuple[int | None, int | None, int | None],
        inputs: Mapping[str, object],
        device: torch.device | str | None,
    ) -> None:
        self._compiled = compiled if inputs.get("cu_seqlens") is None else compiled.on_sequences()
        self._lengths = lengths
        self._counts = counts
        self._inputs = inputs
        self._requested_device = device

    @property
    def _device(self) -> torch.device | str:
        return device_of(self._requested_device, self._inputs)

    def mask_mod(self, relation_only: bool) -> MaskMod:
        """Return the mask_mod as `Attention.mask_mod` does."""
        from attnc.runtime.executors.flex.flex import make_mask_mod  # only for FlexAttention

        return _between_graphs(lambda: make_mask_mod(*self.relation("mask_mod", relation_only), self._device))

    def block_mask(self, block_size: int | tuple[int, int], relation_only: bool) -> BlockMask:
        """Return the BlockMask as `Attention.block_mask` does."""
        from attnc.runtime.executors.flex.flex import make_block_mask, read_block_size  # only for FlexAttention

        def made() -> BlockMask:
            block = read_block_size(block_size)
            return make_block_mask(*self.relation("block_mask", relation_only), block, self._device)

        return _between_graphs(made)

    def score_mod(self, scale: float | None) -> ScoreMod:
        """Return the score_mod as `Attention.score_mod` does."""
        from attnc.runtime.executors.flex.flex import make_score_mod  # only for FlexAttention

        def made() -> ScoreMod:
            pattern, shape = self.relation("score_mod", True)
            node = pattern.attend
            if not is_scored(node) or node.weights != ir.Softmax() or pattern is not self._compiled.pattern:
                raise UnsupportedError(
                    f"score_mod: `{pattern.name}` has weights, a value, scores or documents that are no score of a "
                    f"pair; call it instead"
                )
            by_name = zip(pattern.tensors, input_tensors(pattern, self._inputs), strict=True)
            real = {tensor.name: value for tensor, value in by_name if tensor.is_floating}
            return make_score_mod(pattern, shape, None if scale is None else finite(scale), real, self._device)

        return _between_graphs(made)

    def relation(self, what: str, relation_only: bool) -> tuple[ir.Pattern, CallShape]:
        """Return the pattern with the documents of the call in its relation, and the shape of the call.

        `what`: the method, for messages. Raises the errors of `Attention.mask_mod`.
        """
        compiled, (heads, kv_heads, batch) = self._compiled, self._counts
        self._refuse_pairs(what, relation_only)
        self._check_heads(what)
        sizes = compiled._sizes(*self._lengths, heads, kv_heads, self._inputs, batch=batch)
        shape = call_shape(compiled.pattern, sizes, self._inputs)
        relations_of(compiled.pattern, shape)  # raises what a call would raise
        try:
            return join_documents(compiled.pattern, shape)
        except RoundedDocumentsError:
            raise UnsupportedError(
                f"{what}: `{compiled.name}` rounds to blocks within each document; call this method once per document"
            ) from None

    def _refuse_pairs(self, what: str, relation_only: bool) -> None:
        """Raise UnsupportedError where a mask of pairs does not fully describe the computation."""
        pattern = self._compiled.pattern
        self._compiled._refuse_states(what)
        if pattern.chooses:
            raise UnsupportedError(
                f"{what}: visible pairs of `{pattern.name}` depend on the content of each call, a mask of pairs does "
                f"not; call it, or use `mask(…, q=q, k=k)` for one call"
            )
        if len(pattern.nodes) > 1 or pattern.combine is not None:
            raise UnsupportedError(
                f"{what}: `{pattern.name}` joins several attentions, which one mask cannot describe; call it, or write "
                f"each branch as a separate pattern"
            )
        node = pattern.attend
        if node.keys is not None or node.family is not None or node.stack is not None:
            raise UnsupportedError(f"{what}: the keys of `{pattern.name}` are not tokens of k; call it instead")
        if not (is_plain(node) or relation_only):
            raise UnsupportedError(
                f"{what}: `{pattern.name}` has a score, weights or a value of its own, which a mask would drop; call "
                f"it, or pass relation_only=True and compute these yourself (attend.score_mod, if it is only a score)"
            )

    def _check_heads(self, what: str) -> None:
        """Raise ArgumentError where the number of heads matters and no argument gives it."""
        pattern, heads = self._compiled.pattern, self._counts[0]
        nodes = walk(pattern.attend.visible)
        by_head = any(isinstance(n, ir.HeadIndex) and n.name in ("head", "kv_head") for n in nodes)
        counted = any(isinstance(n, ir.Extent) and n.name in ("heads", "kv_heads", "group") for n in nodes)
        if heads is None and (by_head or counted) and "head" not in self._compiled._known_counts(self._inputs):
            raise ArgumentError(f"{what}: heads of `{pattern.name}` differ; pass the number of query heads, heads=…")


def _between_graphs(build: Callable[[], T]) -> T:
    """Return the result of a function that torch.compile runs between graphs: masks are built outside of torch."""
    if not is_dynamo_compiling():
        return build()
    torch._dynamo.graph_break(msg=NOT_TRACED)
    disable: Any = torch.compiler.disable
    result: T = disable(build, reason=NOT_TRACED)()
    return result


def device_of(device: torch.device | str | None, inputs: Mapping[str, object]) -> torch.device | str:
    """Return the requested device, or the device of the inputs, or the default device of `create_block_mask`."""
    if device is not None:
        return device
    input_device = next((x.device for x in inputs.values() if isinstance(x, Tensor)), None)
    return input_device or torch.accelerator.current_accelerator() or "cpu"
