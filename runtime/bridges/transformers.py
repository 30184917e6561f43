"""attnc as an attention implementation of Hugging Face Transformers.

A single registration serves all models that use the attention interface of Transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.api.attention import Attention
from attnc.runtime.api.compile_attention import compile_attention
from attnc.runtime.bridges.amended import SINKS, amended
from attnc.runtime.bridges.model_masks import LayerMask, ModelMask, read_mask
from attnc.runtime.bridges.packed_batches import with_packing
from attnc.runtime.bridges.sharing import attend_to_batch
from attnc.runtime.bridges.within import Outside, outside
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.spec.suggest import did_you_mean

KINDS = ("full_attention", "sliding_attention", "chunked_attention")
PREFIX = "attnc:"

NOT_TRACED = "an attnc attention of Transformers breaks the graph of torch.compile: omit fullgraph=True"

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
    """Register a pattern with Transformers and return its name for `attn_implementation`.

    `spec`: a spec for `compile_attention`, with its options and `params`, or an `Attention`. None: each layer's own
    mask, computed by attnc. `name`: by default "attnc:" and the pattern's name, or "attnc:own". `layers`: the layers
    that use the pattern, by their kind in `config.layer_types` or by number; other layers keep their own mask.

    A pattern must lie within the layer's own mask (causal, sliding window, chunks): if it shows other pairs, the
    layer's first call raises, unless `override`. The model's scale, soft cap, sinks, grouped heads, cache, padding and
    packed sequences are applied; dropout and other changes to attention are not supported. Inputs of the pattern are
    keyword arguments of the model's call.

    Names are global to the process: registering a different pattern under a registered name raises, unless `replace`.

    Raises UnsupportedError (Transformers is missing, or the pattern has a state), ArgumentError, ArgumentTypeError, and
    the errors of `compile_attention`.
    """
    interfaces = _interfaces()
    attend = _compiled_pattern(spec, params)
    if attend is not None and (attend.is_recurrence or attend.pattern.stateful):
        raise UnsupportedError(
            f"`{attend.name}` has a state, which a Transformers model does not keep for an attention layer: use a "
            f"pattern without states, or put the recurrence into a layer of your own"
        )
    full_name = _checked_name(name, attend)
    implementation = Implementation(full_name, attend, _checked_layers(layers), override)
    registered = _REGISTERED.get(full_name)
    if registered is not None and registered.says != implementation.says and not replace:
        raise ArgumentError(
            f"`{full_name}` is registered already, as {registered}: use another name=…, or replace=True, which "
            f"changes every model that uses the name"
        )
    _REGISTERED[full_name] = implementation
    disable: Any = torch.compiler.disable
    for interface, function in zip(interfaces, (implementation.attention, implementation.mask), strict=True):
        interface.register(full_name, disable(function, reason=NOT_TRACED))
    return full_name


class Implementation:
    """An attention registered with Transformers under a name: a mask maker, and the function that reads its masks."""

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
        """The values by which registrations are compared."""
        attend = self._attend
        pattern = None if attend is None else attend.__reduce__()[1]
        return pattern, self._layers, self._override

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
        """Return a stand-in for the mask of `transformers.masking_utils.sdpa_mask`. Raises as `read_mask`."""
        if isinstance(attention_mask, ModelMask):
            return attention_mask
        mask = read_mask(mask_function, attention_mask, batch_size, q_length, q_offset, kv_offset)
        if not mask.layer_mask.causal and kv_length != q_length:
            raise UnsupportedError(
                f"{self._name}: {q_length} queries over {kv_length} keys without a causal mask (cross-attention) are "
                f"not supported; use attn_implementation='sdpa'"
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
        """Attend like `transformers.integrations.sdpa_attention.sdpa_attention_forward`.

        query (B, Hq, Nq, dk), key and value (B, Hkv, Nk, d), out (B, Nq, Hq, dv).

        Raises ArgumentError, ArgumentTypeError, UnsupportedError.
        """
        _refuse_options(module, dropout, options)
        mask = _mask_of_layer(module, query, key, attention_mask, is_causal, options.get("sliding_window"))
        mask = with_packing(mask, query.shape[0], options)
        if not mask.layer_mask.causal:
            _refuse_cross(module)
        attend = self._for_layer(module, mask.layer_mask, query.shape[1], key.shape[1], softcap, s_aux is not None)
        inputs = self._inputs(attend, options)
        if s_aux is not None:
            inputs[SINKS] = s_aux
        scale = None if scaling is None or scaling == query.shape[-1] ** -0.5 else scaling
        out = attend_to_batch(attend, query, key, value, mask, scale, inputs)
        return out.transpose(1, 2).contiguous(), None

    def _for_layer(
        self, module: Any, layer_mask: LayerMask, heads: int, kv_heads: int, cap: float | None, sinks: bool
    ) -> Attention:
        """Return the pattern of a layer with the model's own terms. Raises ArgumentError, UnsupportedError."""
        number = getattr(module, "layer_idx", None)
        uses_own_mask = self._attend is None or not (
            self._layers is None or layer_mask.kind in self._layers or number in self._layers
        )
        key = (uses_own_mask, layer_mask, heads, kv_heads, cap, sinks)
        if key not in self._ready:
            attend = layer_mask.attention if uses_own_mask or self._attend is None else self._attend
            if not (uses_own_mask or self._override):
                violation = outside(attend, layer_mask.attention.pattern.attend.visible, heads, kv_heads)
                if violation is not None:
                    raise ArgumentError(self._violation_text(attend, layer_mask, violation, number))
            self._ready[key] = amended(attend, cap=cap, sinks=sinks)
        return self._ready[key]

    def _violation_text(self, attend: Attention, layer_mask: LayerMask, violation: Outside, number: object) -> str:
        layer = "a layer" if number is None else f"layer {number}"
        if violation.witness is None:
            reason = f"attnc cannot decide whether `{attend.name}` stays within it ({violation.why})"
        else:
            pair = violation.witness.pair
            verb = "shows" if violation.is_sure else "may show"
            reason = (
                f"`{attend.name}` {verb} more: with {pair.length:,} tokens, in head {violation.witness.head}, query "
                f"{pair.q} sees key {pair.k}"
            )
        return (
            f"{self._name}: the model's own mask in {layer} is {layer_mask}, and {reason}. Register it with "
            f"layers=[…] for the layers that it is meant for ({layer} is a `{layer_mask.kind}` layer), or with "
            f"override=True if the pattern should override the model's mask"
        )

    def _inputs(self, attend: Attention, options: dict[str, Any]) -> dict[str, object]:
        """Return the pattern's inputs from the keyword arguments of the model's call. Raises ArgumentTypeError."""
        names = [item.name for item in attend.bound.program.inputs if item.ranks_of is None and item.name != SINKS]
        missing = [name for name in names if options.get(name) is None]
        if missing:
            raise ArgumentTypeError(
                f"{self._name}: `{attend.name}` needs the input `{missing[0]}`, which the model did not pass: "
                f"add it to the model's call, model(…, {missing[0]}=…), if the model passes its keyword arguments on, "
                f"or use a pattern without inputs"
            )
        return {name: options[name] for name in names}


# --- the arguments of a registration ----------------------------------------------------------------------------------


_MASK_ARGUMENTS = {"batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"}
"""The arguments of a mask maker in Transformers, from 5.20 on."""


def _interfaces() -> tuple[Any, Any]:
    """Return the interfaces of attention and of masks. Raises UnsupportedError."""
    try:
        from transformers import AttentionInterface  # optional
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # optional
    except ImportError as error:
        raise UnsupportedError(
            f"Transformers with its attention interfaces is missing ({error}): pip install 'attnc[interop]'"
        ) from error
    missing = sorted(_MASK_ARGUMENTS - set(inspect.signature(sdpa_mask).parameters))
    if missing:
        raise UnsupportedError(
            f"this version of Transformers does not pass `{missing[0]}` to mask functions: pip install 'attnc[interop]'"
        )
    return AttentionInterface, AttentionMaskInterface


def _compiled_pattern(spec: str | PathLike[str] | Attention | None, params: dict[str, object]) -> Attention | None:
    if spec is None or isinstance(spec, Attention):
        if params:
            target = "each layer's own mask" if spec is None else f"`{spec.name}`, which is compiled"
            raise ArgumentTypeError(f"`{next(iter(params))}` cannot be set for {target}: only a spec takes parameters")
        return spec
    compiling: Any = compile_attention
    result: Attention = compiling(spec, **params)
    return result


def _checked_name(name: str | None, attend: Attention | None) -> str:
    """Return the full name. Raises ArgumentError for names that Transformers would misinterpret."""
    if name is None:
        name = PREFIX + ("own" if attend is None else attend.name)
    for taken in ("flash", "sdpa", "flex_attention"):
        if taken in name:
            raise ArgumentError(
                f"name is {name!r}: Transformers takes a name with `{taken}` for its own; use another name=…"
            )
    if not name.startswith(PREFIX) or set("/|@ ") & set(name) or name == PREFIX:
        raise ArgumentError(f'name is {name!r}: it must start with "{PREFIX}" and contain no / | @ or spaces')
    return name


def _checked_layers(layers: Collection[str | int] | None) -> frozenset[str | int] | None:
    if layers is None:
        return None
    if isinstance(layers, str | int):
        raise ArgumentTypeError(f"layers is {layers!r}: pass a list, layers=[{layers!r}]")
    for layer in layers:
        if isinstance(layer, str) and layer not in KINDS:
            raise ArgumentError(
                f"layers: there is no kind `{layer}`: {did_you_mean(layer, KINDS, 'use ' + ', '.join(KINDS))}"
            )
    return frozenset(layers)


# --- the arguments of a call -----------------------------------------------------------------------------------------


def _refuse_options(module: Any, dropout: float, options: dict[str, Any]) -> None:
    """Raise UnsupportedError for options that would change attention and are not supported."""
    config = getattr(module, "config", None)
    if dropout > 0:
        raise UnsupportedError(
            f"dropout of attention weights ({dropout:g}) is not supported: set {_dropout_key(config, dropout)} to 0 in "
            f"the model's config, or call model.eval()"
        )
    if options.get("output_attentions") or getattr(config, "output_attentions", False):
        raise UnsupportedError(
            "output_attentions is not supported, because weights are never stored; use attn_implementation='eager'"
        )
    for name, description in _CHANGES.items():
        if options.get(name) is not None:
            raise UnsupportedError(
                f"`{name}`: {description} is not supported; use attn_implementation='sdpa' or 'eager'"
            )


def _dropout_key(config: object, dropout: float) -> str:
    """Return the configuration key that holds this dropout of attention weights, for a message."""
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
"""Keyword arguments of models that change an attention's result, with descriptions."""


def _refuse_cross(module: Any) -> None:
    """Raise UnsupportedError where a layer without a causal mask may attend to other tokens than its own."""
    config = getattr(module, "config", None)
    module_flags = [getattr(module, name) for name in ("is_cross_attention", "is_decoder") if hasattr(module, name)]
    may_be_cross = any(getattr(config, name, False) for name in ("is_encoder_decoder", "add_cross_attention"))
    if any(module_flags) or (may_be_cross and not module_flags):
        raise UnsupportedError(
            "cross-attention between two sequences is not supported, because a pattern relates the tokens of one: use "
            "another attn_implementation for encoder-decoder models, such as 'sdpa'"
        )


def _mask_of_layer(
    module: Any, query: Tensor, key: Tensor, attention_mask: object, is_causal: bool | None, sliding_window: object
) -> ModelMask:
    """Return the mask of a layer. Raises UnsupportedError for a mask tensor that the model made itself."""
    if isinstance(attention_mask, ModelMask):
        return attention_mask
    if attention_mask is not None:
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise UnsupportedError(
            f"attention_mask of shape {shape} defines visibility pair by pair, which is the pattern's task: pass a "
            f"mask (batch, tokens) with 0 for padding and 1 for tokens, or no mask"
        )
    if sliding_window is not None:
        raise UnsupportedError(
            f"`sliding_window` is {sliding_window}, but the model made no mask by Transformers' mask interface, so "
            f"the side of the window is unknown: use attn_implementation='sdpa'"
        )
    n_q, n_k = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if n_q != n_k:
        raise UnsupportedError(
            f"{n_q} queries over {n_k} keys, but the model made no mask by Transformers' mask interface, so the "
            f"positions of the queries are unknown: use attn_implementation='sdpa'"
        )
    return ModelMask(LayerMask(causal), n_q, 0, n_k)
