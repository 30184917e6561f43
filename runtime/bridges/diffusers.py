"""attnc in the video transformers of Hugging Face Diffusers: attention processors that compute a pattern.

A processor of Diffusers projects, normalises and rotates as its model needs, and then attends. attnc's processor runs
the model's own processor and answers its call of `scaled_dot_product_attention` with the pattern. The registry of
attention backends (`attention_dispatch`) cannot hold patterns: its names are a closed list, a backend does not get the
grid or the text, and some models do not use it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, wraps
from math import prod
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnc.runtime.api.attention import Attention
from attnc.runtime.bridges.video import Grid, Side, attend_to_video, layout_of, pattern_of_grids
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError

NOT_TRACED = "an attnc processor of Diffusers breaks the graph of torch.compile: omit fullgraph=True"


@dataclass(frozen=True)
class Model:
    """The facts about a Diffusers model that a pattern needs.

    `attentions`: prefixes of the names of its attentions over a video. `text`: where its text tokens are. `axes`: the
    axes of its latents (the argument `hidden_states`), empty where they are tokens already. `patches`: the patch sizes.
    """

    attentions: tuple[str, ...]
    text: Side | None
    axes: str
    patches: Callable[[Any], Sequence[int]]

    def attends(self, name: str, attention: Any) -> bool:
        """Whether a pattern may replace the attention of this name."""
        if getattr(attention, "is_cross_attention", False) or name.endswith("attn2"):
            return False
        return name.startswith(self.attentions)

    def grid(self, config: Any, arguments: Mapping[str, Any]) -> Grid | None:
        """Return the grid of a call, None where the arguments do not determine it. Raises ArgumentError."""
        if not self.axes:
            sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
            extents_given = [n for n in sizes if n is not None]
            return _checked_grid(extents_given) if len(extents_given) == 3 else None
        extents = dict(zip(self.axes, arguments["hidden_states"].shape, strict=True))
        return _checked_grid([extents[axis] // n for axis, n in zip("thw", self.patches(config), strict=True)])


def _patch_sizes(config: Any) -> Sequence[int]:
    return config.patch_size_t or 1, config.patch_size, config.patch_size


MODELS = {
    "WanTransformer3DModel": Model(("blocks.",), None, "bcthw", lambda config: config.patch_size),
    "HunyuanVideoTransformer3DModel": Model(
        ("transformer_blocks.", "single_transformer_blocks."), "last", "bcthw", _patch_sizes
    ),
    "CogVideoXTransformer3DModel": Model(("transformer_blocks.",), "first", "btchw", _patch_sizes),
    "LTXVideoTransformer3DModel": Model(("transformer_blocks.",), None, "", _patch_sizes),
}
"""Models whose grid and text are known; for other models the caller passes them."""


def install_diffusers(
    model: nn.Module,
    spec: str | PathLike[str] | Attention,
    *,
    grid: Sequence[int] | None = None,
    text: Side | None = None,
    attentions: Sequence[str] | None = None,
    **params: object,
) -> dict[str, Any]:
    """Put a pattern into the self-attentions of a video transformer of Diffusers.

    Returns the previous processors by name; `model.set_attn_processor` restores them.

    `spec`: a spec for `compile_attention`, with its options and `params`, or an `Attention`. The parameters that set
    the extents of its `tokens`, such as `frames, height, width` or `frames, per_frame`, follow the grid.

    `grid`: frames, height and width in tokens, after patching; by default the grid of each call, for Wan, HunyuanVideo,
    CogVideoX and LTX. `text`: where the text tokens are, "first" or "last"; known for these four models. If the pattern
    has no segment for the text, all tokens see the text, and the text sees all tokens. `attentions`: prefixes of the
    names, in `model.attn_processors`, of the attentions to replace; by default all self-attentions over the video.
    Other processors stay as they are.

    Raises UnsupportedError, ArgumentError, ArgumentTypeError, and the errors of `compile_attention`.
    """
    processors = _processors(model)
    known_model = MODELS.get(type(model).__name__)
    if text not in (None, "first", "last"):
        raise ArgumentError(f"text is {text!r}: it must be 'first' or 'last'")
    side = text if known_model is None or text is not None else known_model.text
    fixed_grid = None if grid is None else _checked_grid(grid)
    if known_model is None and fixed_grid is None:
        raise ArgumentError(
            f"{type(model).__name__} is not a known model ({', '.join(MODELS)}): pass grid=(frames, height, width) in "
            f"tokens, after patching, and text='first' or 'last' if the model has text tokens"
        )
    facts = known_model or Model(("",), None, "", _patch_sizes)
    if attentions is not None:
        facts = replace(facts, attentions=_checked_names(attentions))
    replaced = {name: processor for name, processor in processors.items() if facts.attends(*_attention(model, name))}
    if not replaced:
        condition = "" if attentions is None else f" whose name starts with {' or '.join(map(repr, attentions))}"
        raise ArgumentError(
            f"{type(model).__name__} has no self-attention{condition}: see the names in model.attn_processors"
        )
    patterns = pattern_of_grids(spec, params)
    if fixed_grid is not None:
        patterns(fixed_grid)  # raises now rather than in the first call
    shared = SharedGrid(fixed_grid, None) if fixed_grid is not None else _following(model, known_model)
    for name, processor in replaced.items():
        _attention(model, name)[1].set_processor(processor_of(patterns, _unwrapped(processor), shared, side))
    return {name: _unwrapped(processor) for name, processor in _processors(model).items()}


class SharedGrid:
    """The grid that all processors of a model share; as a forward hook it reads the grid from each call's arguments."""

    def __init__(self, extents: Grid | None, model: Model | None) -> None:
        self.extents = extents
        self._model = model

    @property
    def follows(self) -> bool:
        """Whether the grid follows each call."""
        return self._model is not None

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Read the grid of a call, as a hook of `register_forward_pre_hook`. Raises ArgumentError."""
        assert self._model is not None, "a fixed grid has no hook"
        arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        self.extents = self._model.grid(model.config, arguments)


def _following(model: nn.Module, known_model: Model | None) -> SharedGrid:
    """Return the grid that follows a model's calls; a model has one hook, however many patterns are installed."""
    for processor in _processors(model).values():
        if isinstance(processor, DiffusersProcessor) and processor.grid.follows:
            return processor.grid
    shared = SharedGrid(None, known_model)
    model.register_forward_pre_hook(shared, with_kwargs=True)
    return shared


class DiffusersProcessor:
    """An attention processor of Diffusers: the model's own processor, with its attention computed by a pattern."""

    def __init__(self, patterns: Callable[[Grid], Attention], own: Any, grid: SharedGrid, text: Side | None) -> None:
        self.own = own
        self._patterns = patterns
        self.grid = grid
        self._text: Side | None = text

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own processor. Raises ArgumentError, UnsupportedError."""
        with _Answered(self._attend) as replaced:
            out = _with_torch_backend(self.own)(attn, *args, **kwargs)
        if replaced.calls != 1:
            raise UnsupportedError(
                f"{type(self.own).__name__} called scaled_dot_product_attention {replaced.calls} times, expected "
                f'one: call the model within diffusers.attention_backend("native"), because a backend that is set on '
                f"any model applies to the whole process, and do not use context parallelism"
            )
        return out

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend like `scaled_dot_product_attention`: query, key and value (B, H, N, d)."""
        del enable_gqa  # the shapes show grouped heads
        if dropout_p or is_causal:
            raise UnsupportedError(
                f"dropout_p={dropout_p}, is_causal={is_causal}: not supported, as the pattern alone decides visibility"
            )
        tokens = query.shape[2]
        if key.shape[2] != tokens:
            raise UnsupportedError(
                f"{tokens} queries over {key.shape[2]} keys: cross-attention is not supported, only self-attention "
                f"over a grid"
            )
        grid = self.grid.extents
        if grid is None:
            raise ArgumentError(
                "the grid is not known: the model's call does not contain it, or only a part of the model was called; "
                "pass grid=(frames, height, width) in tokens, after patching, to install_diffusers"
            )
        layout = layout_of(tokens, prod(grid), self._text, attn_mask)
        return attend_to_video(self._patterns(grid), query, key, value, layout, scale)


def processor_of(
    patterns: Callable[[Grid], Attention], own: Any, grid: SharedGrid, text: Side | None
) -> DiffusersProcessor:
    """Return a processor with the signature of the model's own, from which Diffusers selects its arguments."""
    processor_class: Any = type(own)
    return _class_like(processor_class)(patterns, own, grid, text)


@cache
def _class_like(processor_class: Any) -> type[DiffusersProcessor]:
    @wraps(processor_class.__call__)
    def call(self: DiffusersProcessor, *args: Any, **kwargs: Any) -> Any:
        return DiffusersProcessor.__call__(self, *args, **kwargs)

    disable: Any = torch.compiler.disable
    return type(DiffusersProcessor.__name__, (DiffusersProcessor,), {"__call__": disable(call, reason=NOT_TRACED)})


def _with_torch_backend(processor: Any) -> Any:
    """Return the processor with torch's attention in `dispatch_attention_fn`, whichever backend is set.

    The result is a copy, because threads may share the processor and `install_diffusers` returns the original
    unchanged.
    """
    if not hasattr(processor, "_attention_backend"):
        return processor
    from diffusers.models.attention_dispatch import AttentionBackendName  # optional

    processor = copy(processor)
    processor._attention_backend = AttentionBackendName.NATIVE
    return processor


class _Answered(TorchFunctionMode):
    """A mode in which another function replaces `scaled_dot_product_attention`."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._function(*args, **(kwargs or {}))


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise ArgumentTypeError(f"attentions is {names!r}: pass a list, attentions=[{names!r}]")
    return tuple(names)


def _checked_grid(grid: Sequence[int]) -> Grid:
    if len(grid) != 3 or not all(n > 0 and n == int(n) for n in grid):
        raise ArgumentError(
            f"grid is {grid!r}: it must be frames, height and width in tokens, three whole numbers above 0"
        )
    return int(grid[0]), int(grid[1]), int(grid[2])


def _processors(model: Any) -> dict[str, Any]:
    """Return a model's processors by name. Raises ArgumentTypeError if it is not a model of Diffusers."""
    result = getattr(model, "attn_processors", None)
    if not isinstance(result, dict):
        raise ArgumentTypeError(
            f"{type(model).__name__} has no `attn_processors`: pass a Diffusers model; of a pipeline, pass its "
            f"transformer"
        )
    return result


def _attention(model: nn.Module, name: str) -> tuple[str, Any]:
    """Return the name of the attention that a processor belongs to, and the attention."""
    path = name.removesuffix(".processor")
    return path, model.get_submodule(path)


def _unwrapped(processor: Any) -> Any:
    return processor.own if isinstance(processor, DiffusersProcessor) else processor
