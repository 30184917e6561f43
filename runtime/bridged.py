"""A compiled pattern in the words of FlexAttention."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from attnc.compiler import ir
from attnc.compiler.joined_documents import RoundedDocumentsError, join_documents
from attnc.compiler.planning.build_plan import CallShape
from attnc.compiler.rewrite import walk
from attnc.compiler.value_nodes import is_plain, is_scored
from attnc.runtime.call_errors import ArgumentError, UnsupportedError
from attnc.runtime.compiled import CompiledAttention
from attnc.runtime.plans import relations_of
from attnc.runtime.tensor_checks import call_shape, finite, input_tensors

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from typing_extensions import Self

    from attnc.runtime.bridges.torch_tape import MaskMod, ScoreMod


NOT_TRACED = (
    "block_mask, mask_mod and score_mod are made outside of torch: make them before the compiled function and hand "
    "them to it, or leave fullgraph=True out"
)

T = TypeVar("T")


class Bridged(CompiledAttention):
    """What other attention functions are given instead of a pattern."""

    def mask_mod(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        heads: int | None = None,
        kv_heads: int | None = None,
        batch: int | None = None,
        device: torch.device | str | None = None,
        relation_only: bool = False,
        **inputs: object,
    ) -> MaskMod:
        """FlexAttention's mask_mod of a call: a function of (batch entry, query head, row, key) to bool.

        It knows the lengths, the heads and the inputs that it was made with, those as they were then; tables that it
        reads are on `device`, that of the inputs unless given. `heads` must be given to a relation that differs between
        heads or reads their number. `relation_only`: also of a pattern with a score or weights of its own, which are
        then left to the caller. `cu_seqlens=` cuts several sequences in one as in a call.

        Raises UnsupportedError (content-chosen, recurrent, several branches, keys that are no tokens, scores of its
        own), ArgumentError, ArgumentTypeError.
        """
        from attnc.runtime.bridges.flex import make_mask_mod

        def made() -> MaskMod:
            counts = heads, kv_heads, batch
            pattern, shape = self._relation_of_call("mask_mod", n_q, n_k, counts, inputs, relation_only)
            return make_mask_mod(pattern, shape, device_of(device, inputs))

        return _between_graphs(made)

    def block_mask(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        heads: int | None = None,
        kv_heads: int | None = None,
        batch: int | None = None,
        block_size: int | tuple[int, int] = 128,
        device: torch.device | str | None = None,
        relation_only: bool = False,
        **inputs: object,
    ) -> BlockMask:
        """FlexAttention's BlockMask of a call, with `mask_mod` for its partial blocks.

        It is what `create_block_mask` makes of `mask_mod`, found from the live tiles and not from all pairs; of batch
        entries and heads it has those that differ, 1 where all are alike. `block_size`: (queries, keys), or one number.
        The rest, and what is raised: as `mask_mod`; and EvaluationError where the relation faults.
        """
        from attnc.runtime.bridges.flex import make_block_mask, read_block_size

        def made() -> BlockMask:
            block, counts = read_block_size(block_size), (heads, kv_heads, batch)
            pattern, shape = self._relation_of_call("block_mask", n_q, n_k, counts, inputs, relation_only)
            return make_block_mask(pattern, shape, block, device_of(device, inputs))

        return _between_graphs(made)

    def score_mod(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        heads: int | None = None,
        kv_heads: int | None = None,
        batch: int | None = None,
        scale: float | None = None,
        device: torch.device | str | None = None,
        **inputs: object,
    ) -> ScoreMod:
        """FlexAttention's score_mod of a call: a function of (score, batch entry, query head, row, key) to the score.

        It computes the pattern's `score` from FlexAttention's, which is `scale * dot(q, k)`, in fp32; who is seen says
        `block_mask(…, relation_only=True)`. `scale`: the one that `flex_attention` will be given, for a pattern that
        reads `dot(q, k)` or `scale` by itself. Inputs are read as they are when it runs; real ones have gradients where
        FlexAttention gives them. The rest as `mask_mod`.

        Raises UnsupportedError (besides: weights or a value of its own, documents, scores of vectors or sums over
        keys), ArgumentError, ArgumentTypeError.
        """
        from attnc.runtime.bridges.flex import make_score_mod

        def made() -> ScoreMod:
            pattern, shape = self._relation_of_call("score_mod", n_q, n_k, (heads, kv_heads, batch), inputs, True)
            node = pattern.attend
            if not is_scored(node) or node.weights != ir.Softmax() or pattern is not self._pattern:
                raise UnsupportedError(
                    f"score_mod: `{self.name}` has weights, a value, scores or documents that are no score of a pair; "
                    f"call it instead"
                )
            by_name = zip(pattern.tensors, input_tensors(pattern, inputs), strict=True)
            real = {tensor.name: given for tensor, given in by_name if tensor.is_floating}
            return make_score_mod(
                pattern, shape, None if scale is None else finite(scale), real, device_of(device, inputs)
            )

        return _between_graphs(made)

    # --- inside ---

    def _relation_of_call(
        self,
        what: str,
        n_q: int,
        n_k: int | None,
        counts: tuple[int | None, int | None, int | None],
        inputs: Mapping[str, object],
        relation_only: bool,
    ) -> tuple[ir.Pattern, CallShape]:
        """The pattern with the documents of a call as part of its relation, and the call: what bridges start from.

        `what` asks for it; `counts`: heads, kv heads and batch, as far as they are given. Raises as `mask_mod`.
        """
        heads, kv_heads, batch = counts
        own = self if inputs.get("cu_seqlens") is None else self._on_sequences()
        own._refuse_pairs(what, relation_only)
        own._check_heads(what, heads, inputs)
        sizes = own._sizes(n_q, n_k, heads, kv_heads, inputs, batch=batch)
        shape = call_shape(own._pattern, sizes, inputs)
        relations_of(own._pattern, shape)  # what a call would refuse
        try:
            return join_documents(own._pattern, shape)
        except RoundedDocumentsError:
            raise UnsupportedError(
                f"{what}: `{self.name}` rounds to blocks of each document; ask for the documents one by one"
            ) from None

    @abstractmethod
    def _on_sequences(self) -> Self:
        """The same pattern for calls with `cu_seqlens`."""

    def _refuse_pairs(self, what: str, relation_only: bool) -> None:
        """Raise UnsupportedError where a mask of pairs does not say, or not alone, what is computed."""
        pattern = self._pattern
        self._refuse_states(what)
        if pattern.chooses:
            raise UnsupportedError(
                f"{what}: what `{self.name}` sees depends on the content of each call, a mask of pairs does not; call "
                f"it, or ask `mask(…, q=q, k=k)` of one call"
            )
        if len(pattern.nodes) > 1 or pattern.combine is not None:
            raise UnsupportedError(
                f"{what}: `{self.name}` joins several attentions, which no one mask describes; call it, or write each "
                f"branch as a pattern of its own"
            )
        node = pattern.attend
        if node.keys is not None or node.family is not None or node.stack is not None:
            raise UnsupportedError(f"{what}: the keys of `{self.name}` are no tokens of k; call it instead")
        if not (is_plain(node) or relation_only):
            raise UnsupportedError(
                f"{what}: `{self.name}` has a score, weights or a value of its own, which a mask would drop; call it, "
                f"or say relation_only=True and compute these yourself (attend.score_mod, if it is a score alone)"
            )

    def _check_heads(self, what: str, heads: int | None, inputs: Mapping[str, object]) -> None:
        """Raise ArgumentError where the number of heads matters and nothing tells it."""
        nodes = walk(self._pattern.attend.visible)
        by_head = any(isinstance(n, ir.HeadIndex) and n.name in ("head", "kv_head") for n in nodes)
        counted = any(isinstance(n, ir.Extent) and n.name in ("heads", "kv_heads", "group") for n in nodes)
        if heads is None and (by_head or counted) and "head" not in self._known_counts(inputs):
            raise ArgumentError(f"{what}: heads of `{self.name}` differ; say how many query heads there are, heads=…")


def _between_graphs(made: Callable[[], T]) -> T:
    """The result of a function that torch.compile runs between graphs: masks are made from plans, outside of torch."""
    if not is_dynamo_compiling():
        return made()
    torch._dynamo.graph_break(msg=NOT_TRACED)
    disable: Any = torch.compiler.disable
    result: T = disable(made, reason=NOT_TRACED)()
    return result


def device_of(device: torch.device | str | None, inputs: Mapping[str, object]) -> torch.device | str:
    """The device asked for, or that of the inputs, or the one that `create_block_mask` takes."""
    if device is not None:
        return device
    given = next((x.device for x in inputs.values() if isinstance(x, Tensor)), None)
    return given or torch.accelerator.current_accelerator() or "cpu"
