"""FlexAttention functions of a compiled pattern: `mask_mod`, `block_mask` and `score_mod`."""

from __future__ import annotations

from abc import abstractmethod
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
    from typing_extensions import Self

    from attnc.runtime.executors.flex.torch_tape import MaskMod, ScoreMod


NOT_TRACED = (
    "block_mask, mask_mod and score_mod are built outside of torch: build them before the compiled function and pass "
    "them to it, or leave fullgraph=True out"
)

T = TypeVar("T")


class Bridged(CompiledAttention):
    """Methods that express a pattern for other attention functions."""

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
        """Return FlexAttention's mask_mod of a call: a function of (batch entry, query head, row, key) to bool.

        The function keeps the lengths, the heads and the inputs as they are now; the tables that it reads are on
        `device`, by default the device of the inputs. `heads` is required for a relation that differs between heads or
        reads their number. `relation_only`: accept a pattern with its own score or weights, which the caller then
        computes. `cu_seqlens=` packs several sequences, as in a call.

        Raises UnsupportedError (selected by content, recurrent, several branches, keys that are not tokens, its own
        scores), ArgumentError, ArgumentTypeError.
        """
        from attnc.runtime.executors.flex.flex import make_mask_mod  # only for FlexAttention

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
        """Return FlexAttention's BlockMask of a call, with `mask_mod` for its partial blocks.

        The result equals `create_block_mask` of `mask_mod`, but is found from the live tiles instead of all pairs; its
        batch and head dimensions are 1 where all entries or heads are equal. `block_size`: (queries, keys), or one
        number. Other arguments and errors are those of `mask_mod`; also raises EvaluationError where the relation
        faults.
        """
        from attnc.runtime.executors.flex.flex import make_block_mask, read_block_size  # only for FlexAttention

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
        """Return FlexAttention's score_mod: a function of (score, batch entry, query head, row, key) to the score.

        The function computes the pattern's `score` in fp32 from FlexAttention's score, which is `scale * dot(q, k)`;
        `block_mask(…, relation_only=True)` gives the visible pairs. `scale`: the scale passed to `flex_attention`, for
        a pattern that reads `dot(q, k)` or `scale` separately. Inputs are read when the function runs; real inputs have
        gradients where FlexAttention gives them. Other arguments are those of `mask_mod`.

        Also raises UnsupportedError for its own weights or value, documents, and scores of vectors or sums over keys;
        ArgumentError, ArgumentTypeError.
        """
        from attnc.runtime.executors.flex.flex import make_score_mod  # only for FlexAttention

        def made() -> ScoreMod:
            pattern, shape = self._relation_of_call("score_mod", n_q, n_k, (heads, kv_heads, batch), inputs, True)
            node = pattern.attend
            if not is_scored(node) or node.weights != ir.Softmax() or pattern is not self._pattern:
                raise UnsupportedError(
                    f"score_mod: `{self.name}` has weights, a value, scores or documents that are no score of a pair; "
                    f"call it instead"
                )
            by_name = zip(pattern.tensors, input_tensors(pattern, inputs), strict=True)
            real = {tensor.name: value for tensor, value in by_name if tensor.is_floating}
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
        """Return the pattern with the documents of a call in its relation, and the shape of the call.

        `what`: the method, for messages; `counts`: heads, kv heads and batch, or None. Raises the errors of `mask_mod`.
        """
        heads, kv_heads, batch = counts
        packed = self if inputs.get("cu_seqlens") is None else self._on_sequences()
        packed._refuse_pairs(what, relation_only)
        packed._check_heads(what, heads, inputs)
        sizes = packed._sizes(n_q, n_k, heads, kv_heads, inputs, batch=batch)
        shape = call_shape(packed._pattern, sizes, inputs)
        relations_of(packed._pattern, shape)  # raises what a call would raise
        try:
            return join_documents(packed._pattern, shape)
        except RoundedDocumentsError:
            raise UnsupportedError(
                f"{what}: `{self.name}` rounds to blocks within each document; call this method once per document"
            ) from None

    @abstractmethod
    def _on_sequences(self) -> Self:
        """Return the pattern's form for calls with `cu_seqlens`."""

    def _refuse_pairs(self, what: str, relation_only: bool) -> None:
        """Raise UnsupportedError where a mask of pairs does not fully describe the computation."""
        pattern = self._pattern
        self._refuse_states(what)
        if pattern.chooses:
            raise UnsupportedError(
                f"{what}: visible pairs of `{self.name}` depend on the content of each call, a mask of pairs does not; "
                f"call it, or use `mask(…, q=q, k=k)` for one call"
            )
        if len(pattern.nodes) > 1 or pattern.combine is not None:
            raise UnsupportedError(
                f"{what}: `{self.name}` joins several attentions, which one mask cannot describe; call it, or write "
                f"each branch as a separate pattern"
            )
        node = pattern.attend
        if node.keys is not None or node.family is not None or node.stack is not None:
            raise UnsupportedError(f"{what}: the keys of `{self.name}` are not tokens of k; call it instead")
        if not (is_plain(node) or relation_only):
            raise UnsupportedError(
                f"{what}: `{self.name}` has a score, weights or a value of its own, which a mask would drop; call it, "
                f"or pass relation_only=True and compute these yourself (attend.score_mod, if it is only a score)"
            )

    def _check_heads(self, what: str, heads: int | None, inputs: Mapping[str, object]) -> None:
        """Raise ArgumentError where the number of heads matters and no argument gives it."""
        nodes = walk(self._pattern.attend.visible)
        by_head = any(isinstance(n, ir.HeadIndex) and n.name in ("head", "kv_head") for n in nodes)
        counted = any(isinstance(n, ir.Extent) and n.name in ("heads", "kv_heads", "group") for n in nodes)
        if heads is None and (by_head or counted) and "head" not in self._known_counts(inputs):
            raise ArgumentError(f"{what}: heads of `{self.name}` differ; pass the number of query heads, heads=…")


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
