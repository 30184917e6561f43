"""attnc in the video transformers of Hugging Face Diffusers: processors whose attention is a pattern's.

A processor of Diffusers projects, normalises and rotates as its model needs, and then attends. That of attnc runs the
model's own with its call of `scaled_dot_product_attention` answered by the pattern. The registry of attention backends
(`attention_dispatch`) is no place for it: its names are a closed list, a backend is not told of the grid or the text,
and some models do not ask it.
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

from attnc.runtime.attention import Attention
from attnc.runtime.bridges.video import Grid, Side, attend_to_video, layout_of, pattern_of_grids
from attnc.runtime.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError

NOT_TRACED = "attnc in a processor of Diffusers runs between graphs: leave fullgraph=True out"


@dataclass(frozen=True)
class Model:
    """The facts about a Diffusers model: the prefixes of the names of its attentions to a video, where its text
    stands, the axes of its latents (the argument `hidden_states`; none: they are tokens already), and their patches.
    """

    attentions: tuple[str, ...]
    text: Side | None
    axes: str
    patches: Callable[[Any], Sequence[int]]

    def attends(self, name: str, attention: Any) -> bool:
        """Whether a pattern may be put there."""
        if getattr(attention, "is_cross_attention", False) or name.endswith("attn2"):
            return False
        return name.startswith(self.attentions)

    def grid(self, config: Any, given: Mapping[str, Any]) -> Grid | None:
        """The grid by the arguments of a call, None where they do not say it. Raises ArgumentError."""
        if not self.axes:
            sizes = [given.get(name) for name in ("num_frames", "height", "width")]
            known = [n for n in sizes if n is not None]
            return _checked_grid(known) if len(known) == 3 else None
        extents = dict(zip(self.axes, given["hidden_states"].shape, strict=True))
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
"""Models whose grid and text are known. Others are told of them."""


def install_diffusers(
    model: nn.Module,
    spec: str | PathLike[str] | Attention,
    *,
    grid: Sequence[int] | None = None,
    text: Side | None = None,
    attentions: Sequence[str] | None = None,
    **params: object,
) -> dict[str, Any]:
    """Put a pattern into the self-attentions of a video transformer of Diffusers. Returns the processors that were
    there, by name, which `model.set_attn_processor` takes back.

    `spec`: what `compile_attention` takes, with its options and `params`, or an `Attention`. The parameters that are
    the extents of its `tokens`, such as `frames, height, width` or `frames, per_frame`, follow the grid.

    `grid`: frames, height and width in tokens, after patching; left out, each call's own, for Wan, HunyuanVideo,
    CogVideoX and LTX. `text`: where tokens of a text stand beside the video's, "first" or "last"; known of them.
    With a pattern that has no text of its own, all tokens see the text, and the text sees all. `attentions`: the
    beginnings of the names, in `model.attn_processors`, where the pattern is put; all that are over the video, unless
    given. The others stay as they are.

    Raises UnsupportedError, ArgumentError, ArgumentTypeError, and as `compile_attention`.
    """
    there = _processors(model)
    known = MODELS.get(type(model).__name__)
    if text not in (None, "first", "last"):
        raise ArgumentError(f"text is {text!r}: it must be 'first' or 'last'")
    side = text if known is None or text is not None else known.text
    own_grid = None if grid is None else _checked_grid(grid)
    if known is None and own_grid is None:
        raise ArgumentError(
            f"{type(model).__name__} is not known here ({', '.join(MODELS)} are): give grid=(frames, height, width) in "
            f"tokens, after patching, and text='first' or 'last' if there is one beside the video"
        )
    wanted = known or Model(("",), None, "", _patch_sizes)
    if attentions is not None:
        wanted = replace(wanted, attentions=_checked_names(attentions))
    before = {name: own for name, own in there.items() if wanted.attends(*_attention(model, name))}
    if not before:
        named = "" if attentions is None else f" whose name begins with {' or '.join(map(repr, attentions))}"
        raise ArgumentError(f"{type(model).__name__} has no self-attention{named}: see model.attn_processors")
    patterns = pattern_of_grids(spec, params)
    if own_grid is not None:
        patterns(own_grid)  # what is wrong is said now
    shared = SharedGrid(own_grid, None) if own_grid is not None else _following(model, known)
    for name, own in before.items():
        _attention(model, name)[1].set_processor(processor_of(patterns, _unwrapped(own), shared, side))
    return {name: _unwrapped(own) for name, own in _processors(model).items()}


class SharedGrid:
    """The grid that all processors of a model see; called before the model, it takes it from the arguments."""

    def __init__(self, extents: Grid | None, model: Model | None) -> None:
        self.extents = extents
        self._known = model

    @property
    def follows(self) -> bool:
        """Whether it is that of each call."""
        return self._known is not None

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A hook of `register_forward_pre_hook`. Raises ArgumentError."""
        assert self._known is not None, "a grid that is given is asked of no call"
        given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        self.extents = self._known.grid(model.config, given)


def _following(model: nn.Module, known: Model | None) -> SharedGrid:
    """The grid that follows a model's calls; there is one hook, however often a pattern is put in."""
    for own in _processors(model).values():
        if isinstance(own, DiffusersProcessor) and own.grid.follows:
            return own.grid
    shared = SharedGrid(None, known)
    model.register_forward_pre_hook(shared, with_kwargs=True)
    return shared


class DiffusersProcessor:
    """An attention processor of Diffusers: the model's own, with its attention computed by a pattern."""

    def __init__(self, patterns: Callable[[Grid], Attention], own: Any, grid: SharedGrid, text: Side | None) -> None:
        self.own = own
        self._patterns = patterns
        self.grid = grid
        self._text: Side | None = text

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's own processor. Raises ArgumentError, UnsupportedError."""
        with _Answered(self._attend) as answered:
            out = _by_torch(self.own)(attn, *args, **kwargs)
        if answered.calls != 1:
            raise UnsupportedError(
                f"{type(self.own).__name__} asked scaled_dot_product_attention {answered.calls} times, not once: call "
                f'the model within diffusers.attention_backend("native"), as the backend that any model sets is that '
                f"of the whole process, and without context parallelism"
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
        """As `scaled_dot_product_attention`: query, key and value (B, H, N, d)."""
        del enable_gqa  # grouped heads are told by the shapes
        if dropout_p or is_causal:
            raise UnsupportedError(f"dropout_p={dropout_p}, is_causal={is_causal}: who sees whom says the pattern")
        tokens = query.shape[2]
        if key.shape[2] != tokens:
            raise UnsupportedError(
                f"{tokens} queries over {key.shape[2]} keys: this is cross-attention, not of one grid"
            )
        grid = self.grid.extents
        if grid is None:
            raise ArgumentError(
                "the grid is not known, as the model's call does not say it, or a part of the model was called: give "
                "grid=(frames, height, width) in tokens, after patching"
            )
        layout = layout_of(tokens, prod(grid), self._text, attn_mask)
        return attend_to_video(self._patterns(grid), query, key, value, layout, scale)


def processor_of(
    patterns: Callable[[Grid], Attention], own: Any, grid: SharedGrid, text: Side | None
) -> DiffusersProcessor:
    """The processor with the signature of the model's own, by which Diffusers decides what to hand to it."""
    kind: Any = type(own)
    return _like(kind)(patterns, own, grid, text)


@cache
def _like(kind: Any) -> type[DiffusersProcessor]:
    @wraps(kind.__call__)
    def call(self: DiffusersProcessor, *args: Any, **kwargs: Any) -> Any:
        return DiffusersProcessor.__call__(self, *args, **kwargs)

    disable: Any = torch.compiler.disable
    return type(DiffusersProcessor.__name__, (DiffusersProcessor,), {"__call__": disable(call, reason=NOT_TRACED)})


def _by_torch(processor: Any) -> Any:
    """The processor with torch's attention in `dispatch_attention_fn`, whichever backend it or another model has set.

    A copy, as threads may share the processor, and as it is given back as it was.
    """
    if not hasattr(processor, "_attention_backend"):
        return processor
    from diffusers.models.attention_dispatch import AttentionBackendName

    processor = copy(processor)
    processor._attention_backend = AttentionBackendName.NATIVE
    return processor


class _Answered(TorchFunctionMode):
    """While it is in force, `scaled_dot_product_attention` is another function."""

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
        raise ArgumentTypeError(f"attentions is {names!r}: give a list, attentions=[{names!r}]")
    return tuple(names)


def _checked_grid(grid: Sequence[int]) -> Grid:
    if len(grid) != 3 or not all(n > 0 and n == int(n) for n in grid):
        raise ArgumentError(f"grid is {grid!r}: give frames, height and width in tokens, three whole numbers above 0")
    return int(grid[0]), int(grid[1]), int(grid[2])


def _processors(model: Any) -> dict[str, Any]:
    """Raises ArgumentTypeError for what is no model of Diffusers."""
    result = getattr(model, "attn_processors", None)
    if not isinstance(result, dict):
        raise ArgumentTypeError(
            f"{type(model).__name__} has no `attn_processors`: give a model of Diffusers, of a pipeline its transformer"
        )
    return result


def _attention(model: nn.Module, name: str) -> tuple[str, Any]:
    """The attention that a processor belongs to, and its name."""
    path = name.removesuffix(".processor")
    return path, model.get_submodule(path)


def _unwrapped(processor: Any) -> Any:
    return processor.own if isinstance(processor, DiffusersProcessor) else processor
