"""attnc as an attention implementation of Hugging Face Transformers: one registration for all models that use its
attention interface.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.attention import Attention, compile_attention
from attnc.runtime.bridges.amended import SINKS, amended
from attnc.runtime.bridges.model_masks import LayerMask, ModelMask, read_mask
from attnc.runtime.bridges.packed_batches import with_packing
from attnc.runtime.bridges.sharing import attend_to_batch
from attnc.runtime.bridges.within import Outside, outside
from attnc.runtime.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.spec.suggest import did_you_mean

KINDS = ("full_attention", "sliding_attention", "chunked_attention")
PREFIX = "attnc:"

NOT_TRACED = "attnc as an attention of Transformers runs between graphs: leave fullgraph=True out"

_REGISTERED: dict[str, Implementation] = {}


def register_transformers(
    spec: str | PathLike[str] | Attention | None = None,
    *,
    name: str | None = None,
    layers: Collection[str | int] | None = None,
    override: bool = False,
    replace: bool = False,
    **params: object,
) -> str:
    """Register a pattern with Transformers; the result is what a model takes as `attn_implementation`.

    `spec`: what `compile_attention` takes, with its options and `params`, or an `Attention`. None: each layer's own
    mask, computed by attnc. `name`: "attnc:" and the pattern's name, or "attnc:own", unless given. `layers`: where the
    pattern is in force, by what `config.layer_types` calls them or by number; other layers keep their own mask.

    A pattern must lie within the layer's own mask (causal, sliding window, chunks): what it shows besides is refused
    when the layer is first called, unless `override`. The model's scale, soft cap, sinks, grouped heads, cache, padding
    and packed sequences are taken over; dropout and what else changes attention is refused. Inputs of the pattern are
    keyword arguments of the model's call.

    Names are those of the process: another pattern under a registered name is refused, unless `replace`.

    Raises UnsupportedError (Transformers is missing, or the pattern has a state), ArgumentError, ArgumentTypeError, and
    as `compile_attention`.
    """
    interfaces = _interfaces()
    attend = _compiled(spec, params)
    if attend is not None and (attend.is_recurrence or attend.pattern.stateful):
        raise UnsupportedError(
            f"`{attend.name}` has a state, which a Transformers model does not keep for an attention layer: take a "
            f"pattern, or put the recurrence into a layer of your own"
        )
    result = _named(name, attend)
    made = Implementation(result, attend, _checked_layers(layers), override)
    before = _REGISTERED.get(result)
    if before is not None and before.says != made.says and not replace:
        raise ArgumentError(
            f"`{result}` is registered as {before}: choose another name=…, or replace=True, which changes every model "
            f"that uses it"
        )
    _REGISTERED[result] = made
    disable: Any = torch.compiler.disable
    for interface, function in zip(interfaces, (made.attention, made.mask), strict=True):
        interface.register(result, disable(function, reason=NOT_TRACED))
    return result


class Implementation:
    """An attention registered with Transformers under a name: a maker of masks, and the function that reads them."""

    def __init__(
        self, name: str, attend: Attention | None, layers: frozenset[str | int] | None, override: bool
    ) -> None:
        self._name = name
        self._attend = attend
        self._layers = layers
        self._override = override
        self._ready: dict[object, Attention] = {}

    @property
    def says(self) -> tuple[object, ...]:
        """The values that tell registrations apart."""
        attend = self._attend
        whole = None if attend is None else attend.__reduce__()[1]
        return whole, self._layers, self._override

    def __str__(self) -> str:
        return "each layer's own mask" if self._attend is None else repr(self._attend)

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Any = None,
        attention_mask: Tensor | ModelMask | None = None,
        **_: object,
    ) -> ModelMask:
        """As `transformers.masking_utils.sdpa_mask`; no mask is made. Raises as `read_mask`."""
        if isinstance(attention_mask, ModelMask):
            return attention_mask
        mask = read_mask(mask_function, attention_mask, batch_size, q_length, q_offset, kv_offset)
        if not mask.asked.causal and kv_length != q_length:
            raise UnsupportedError(
                f"{self._name}: {q_length} queries over {kv_length} keys that are not causal (cross-attention): no "
                f"pattern of tokens says which see which; use attn_implementation='sdpa' for it"
            )
        return mask

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: object,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """As `transformers.integrations.sdpa_attention.sdpa_attention_forward`: query (B, Hq, Nq, dk), key and value
        (B, Hkv, Nk, d), out (B, Nq, Hq, dv).

        Raises ArgumentError, ArgumentTypeError, UnsupportedError.
        """
        _refuse(module, dropout, options)
        mask = _mask_of(module, query, key, attention_mask, is_causal, options.get("sliding_window"))
        mask = with_packing(mask, query.shape[0], options)
        if not mask.asked.causal:
            _refuse_cross(module)
        attend = self._for_layer(module, mask.asked, query.shape[1], key.shape[1], softcap, s_aux is not None)
        inputs = self._inputs(attend, options)
        if s_aux is not None:
            inputs[SINKS] = s_aux
        scale = None if scaling is None or scaling == query.shape[-1] ** -0.5 else scaling
        out = attend_to_batch(attend, query, key, value, mask, scale, inputs)
        return out.transpose(1, 2).contiguous(), None

    def _for_layer(
        self, module: Any, asked: LayerMask, heads: int, kv_heads: int, cap: float | None, sinks: bool
    ) -> Attention:
        """The pattern of a layer, with the model's own terms. Raises ArgumentError, UnsupportedError."""
        number = getattr(module, "layer_idx", None)
        own = self._attend is None or not (self._layers is None or asked.kind in self._layers or number in self._layers)
        key = (own, asked, heads, kv_heads, cap, sinks)
        if key not in self._ready:
            attend = asked.attention if own or self._attend is None else self._attend
            if not (own or self._override):
                found = outside(attend, asked.attention.pattern.attend.visible, heads, kv_heads)
                if found is not None:
                    raise ArgumentError(self._contradicts(attend, asked, found, number))
            self._ready[key] = amended(attend, cap=cap, sinks=sinks)
        return self._ready[key]

    def _contradicts(self, attend: Attention, asked: LayerMask, found: Outside, number: object) -> str:
        layer = "a layer" if number is None else f"layer {number}"
        if found.witness is None:
            what = f"it is not decided whether `{attend.name}` stays within it ({found.why})"
        else:
            pair = found.witness.pair
            shows = "shows" if found.is_sure else "may show"
            what = (
                f"`{attend.name}` {shows} more: among {pair.length:,} tokens, in head {found.witness.head}, query "
                f"{pair.q} sees key {pair.k}"
            )
        return (
            f"{self._name}: the model's own mask in {layer} is {asked} and {what}. Register it for the layers that it "
            f"is meant for, layers=[…] ({layer} is of `{asked.kind}`), or with override=True, if the model shall see "
            f"what the pattern says"
        )

    def _inputs(self, attend: Attention, options: dict[str, Any]) -> dict[str, object]:
        """The inputs of the pattern among the keyword arguments of the model's call. Raises ArgumentTypeError."""
        names = [item.name for item in attend.bound.program.inputs if item.ranks_of is None and item.name != SINKS]
        missing = [name for name in names if options.get(name) is None]
        if missing:
            raise ArgumentTypeError(
                f"{self._name}: `{attend.name}` needs the input `{missing[0]}`, which the model does not give: "
                f"pass it to the model's call, model(…, {missing[0]}=…), if the model hands its keyword arguments on, "
                f"or take a pattern without inputs"
            )
        return {name: options[name] for name in names}


# --- what is asked of a registration ---------------------------------------------------------------------------------


_GIVEN = {"batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"}
"""The arguments of a mask maker in Transformers, from 5.20 on."""


def _interfaces() -> tuple[Any, Any]:
    """The interfaces of attention and of masks. Raises UnsupportedError."""
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise UnsupportedError(
            f"Transformers with its attention interfaces is missing ({error}): pip install 'attnc[interop]'"
        ) from error
    lacks = sorted(_GIVEN - set(inspect.signature(sdpa_mask).parameters))
    if lacks:
        raise UnsupportedError(
            f"this version of Transformers does not tell masks their `{lacks[0]}`: pip install 'attnc[interop]'"
        )
    return AttentionInterface, AttentionMaskInterface


def _compiled(spec: str | PathLike[str] | Attention | None, params: dict[str, object]) -> Attention | None:
    if spec is None or isinstance(spec, Attention):
        if params:
            what = "each layer's own mask" if spec is None else f"`{spec.name}`, which is compiled"
            raise ArgumentTypeError(f"`{next(iter(params))}` is given for {what}: it has no parameters to set here")
        return spec
    compiling: Any = compile_attention
    result: Attention = compiling(spec, **params)
    return result


def _named(name: str | None, attend: Attention | None) -> str:
    """Raises ArgumentError for names that Transformers would take for something else."""
    if name is None:
        name = PREFIX + ("own" if attend is None else attend.name)
    for taken in ("flash", "sdpa", "flex_attention"):
        if taken in name:
            raise ArgumentError(
                f"name is {name!r}: Transformers takes `{taken}` in a name for its own; give another name=…"
            )
    if not name.startswith(PREFIX) or set("/|@ ") & set(name) or name == PREFIX:
        raise ArgumentError(f'name is {name!r}: it must begin with "{PREFIX}", and have no / | @ and blanks')
    return name


def _checked_layers(layers: Collection[str | int] | None) -> frozenset[str | int] | None:
    if layers is None:
        return None
    if isinstance(layers, str | int):
        raise ArgumentTypeError(f"layers is {layers!r}: give a list, layers=[{layers!r}]")
    for layer in layers:
        if isinstance(layer, str) and layer not in KINDS:
            raise ArgumentError(f"layers: there is no `{layer}`: {did_you_mean(layer, KINDS, ', '.join(KINDS))}")
    return frozenset(layers)


# --- what is asked of a call -----------------------------------------------------------------------------------------


def _refuse(module: Any, dropout: float, options: dict[str, Any]) -> None:
    """Raise UnsupportedError for what would change attention and is not done."""
    config = getattr(module, "config", None)
    if dropout > 0:
        raise UnsupportedError(
            f"dropout of attention weights ({dropout:g}) is not supported: set {_dropout_key(config, dropout)} to 0 in "
            f"the model's config, or call model.eval()"
        )
    if options.get("output_attentions") or getattr(config, "output_attentions", False):
        raise UnsupportedError("output_attentions: weights are never made; use attn_implementation='eager' to see them")
    for name, what in _CHANGES.items():
        if options.get(name) is not None:
            raise UnsupportedError(f"`{name}`: {what} is not supported; use attn_implementation='sdpa' or 'eager'")


def _dropout_key(config: object, dropout: float) -> str:
    """The configuration key that holds this dropout of attention weights, as a message names it."""
    keys = [name for name, value in vars(config).items() if "drop" in name and value == dropout] if config else []
    keys.sort(key=lambda name: "att" not in name)  # attention_dropout, attn_pdrop, attention_probs_dropout_prob, …
    return f"`{keys[0]}`" if keys else "the dropout of attention"


_CHANGES = {
    "position_bias": "a bias that the model adds to scores",
    "cache": "a paged cache of continuous batching",
    "head_mask": "a mask of heads",
    "sinks": "sinks of a shape of the model's own",
    "indices": "a choice of keys by the model's own indexer",
    "block_indices": "a choice of blocks by the model's own indexer",
}
"""Keyword arguments of models that change an attention's result."""


def _refuse_cross(module: Any) -> None:
    """Raise UnsupportedError where a layer that is not causal may be over other tokens than its own."""
    config = getattr(module, "config", None)
    says = [getattr(module, name) for name in ("is_cross_attention", "is_decoder") if hasattr(module, name)]
    may = any(getattr(config, name, False) for name in ("is_encoder_decoder", "add_cross_attention"))
    if any(says) or (may and not says):
        raise UnsupportedError(
            "cross-attention is over the tokens of two sequences, of which a pattern says nothing: use another "
            "attn_implementation for encoder-decoder models, such as 'sdpa'"
        )


def _mask_of(
    module: Any, query: Tensor, key: Tensor, given: object, is_causal: bool | None, sliding_window: object
) -> ModelMask:
    """Return the mask of a layer. Raises UnsupportedError for a mask tensor that the model made itself."""
    if isinstance(given, ModelMask):
        return given
    if given is not None:
        shape = tuple(getattr(given, "shape", ()))
        raise UnsupportedError(
            f"attention_mask of shape {shape} says pair by pair who sees whom, which the pattern does: give a mask "
            f"(batch, tokens) of 0 for padding and 1, or none"
        )
    if sliding_window is not None:
        raise UnsupportedError(
            f"`sliding_window` is {sliding_window}, and the model made no mask by Transformers' mask interface that "
            f"says on which sides: use attn_implementation='sdpa' for it"
        )
    n_q, n_k = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if n_q != n_k:
        raise UnsupportedError(
            f"{n_q} queries over {n_k} keys, and the model made no mask by Transformers' mask interface, so that it is "
            f"not known which tokens they are: use attn_implementation='sdpa' for it"
        )
    return ModelMask(LayerMask(causal), n_q, 0, n_k)
