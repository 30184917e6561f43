"""A pattern over the tokens of a video, and of a text before or after the video."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor

from attnc.runtime.api.attention import Attention
from attnc.runtime.api.compile_attention import compile_attention
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.texts.library import ModuleLoader, find
from attnc.runtime.values.merging import merge
from attnc.spec.load import load_program
from attnc.spec.meaning.parameter_values import constant_value
from attnc.spec.program import BoundProgram, ParameterRead, Program, SegmentAxis, Size
from attnc.spec.suggest import did_you_mean

Grid = tuple[int, int, int]
"""Frames, height and width of a video in tokens."""

Side = Literal["first", "last"]
"""The side of the video on which the text tokens are."""


# --- a pattern for each grid -----------------------------------------------------------------------------------------


def pattern_of_grids(spec: str | PathLike[str] | Attention, params: dict[str, object]) -> Callable[[Grid], Attention]:
    """Return a function from a grid to a pattern: an `Attention` unchanged, or a spec with `tokens` set to the grid.

    Raises UnsupportedError, ArgumentError, ArgumentTypeError, and the errors of `compile_attention`.
    """
    if isinstance(spec, Attention):
        if params:
            raise ArgumentTypeError(
                f"`{next(iter(params))}` cannot be set for `{spec.name}`, which is compiled: only a spec takes "
                f"parameters"
            )
        _refuse_unsupported(spec)
        return lambda grid: _check_size(spec, grid)
    source_file = find(spec)
    program = load_program(source_file.source, ModuleLoader(source_file.folder), source_file.name)
    _check_names(program, params)
    extents = _extents(program)
    compiling: Any = compile_attention

    @cache
    def compile_for_grid(grid: Grid) -> Attention:
        attend: Attention = compiling(spec, **{**_sizes(extents, grid), **params})
        _refuse_unsupported(attend)
        return _check_size(attend, grid)

    return compile_for_grid


def _extents(program: Program) -> list[str]:
    """Return the parameters that set the size of the video: (frames, height, width) or (frames, tokens per frame)."""
    segment = next((s for s in program.segments if not any(isinstance(a.extent, Size) for a in s.axes)), None)
    names = [a.extent.name for a in segment.axes if isinstance(a.extent, ParameterRead)] if segment else []
    return names if len(names) in (2, 3) and segment is not None and len(names) == len(segment.axes) else []


def _sizes(extents: list[str], grid: Grid) -> dict[str, int]:
    """Return the values of the parameters that set the size of the video."""
    frames, height, width = grid
    if set(extents) == {"height", "width"}:  # a picture
        return {"height": height, "width": width}
    return dict(zip(extents, grid if len(extents) == 3 else (frames, height * width), strict=False))


def _check_names(program: Program, params: dict[str, object]) -> None:
    """Raise ArgumentTypeError for a parameter that the pattern does not have, before a grid is known."""
    parameters = [p.name for p in program.parameters]
    options = {name for name, p in inspect.signature(compile_attention).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name in params:
        if name not in parameters and name not in options:
            hint = did_you_mean(name, parameters, f"it has {', '.join(parameters) or 'none'}")
            raise ArgumentTypeError(f"`{program.name}` has no parameter `{name}`: {hint}")


def _refuse_unsupported(attend: Attention) -> None:
    """Raise UnsupportedError for patterns that a processor cannot run."""
    if attend.is_recurrence or attend.pattern.stateful:
        raise UnsupportedError(
            f"`{attend.name}` has a state: Diffusers processors support only patterns without states"
        )
    inputs = [item for item in attend.bound.program.inputs if item.ranks_of is None]
    if inputs:
        raise UnsupportedError(
            f"`{attend.name}` needs the input `{inputs[0].name}`, which a Diffusers model does not pass: use a pattern "
            f"without inputs"
        )


def _check_size(attend: Attention, grid: Grid) -> Attention:
    """Return the pattern if its number of tokens is that of the grid. Raises ArgumentError."""
    tokens = video_tokens(attend.bound)
    if tokens is not None and tokens != prod(grid):
        times = "×".join(map(str, grid))
        raise ArgumentError(
            f"`{attend.name}` has {tokens} tokens, but the video has {times} = {prod(grid)} after patching: pass the "
            f"pattern's name with parameters other than its extents, which then follow the video"
        )
    return attend


def video_tokens(bound: BoundProgram) -> int | None:
    """Return the number of tokens in segments with known extents, None where the pattern has no such segment."""
    known_extents = [extents for extents in _segment_extents(bound) if None not in extents]
    return sum(prod(e for e in extents if e is not None) for extents in known_extents) if known_extents else None


def text_side(attend: Attention) -> Side | None:
    """Return the side of the pattern's own text, a segment of open length; None where the pattern has no such segment.

    Raises UnsupportedError where the text is between other segments.
    """
    is_open = [None in extents for extents in _segment_extents(attend.bound)]
    if len(is_open) < 2 or not any(is_open):
        return None
    if sum(is_open) > 1 or not (is_open[0] or is_open[-1]):
        raise UnsupportedError(f"`{attend.name}` has a text segment between the video's segments: put it first or last")
    return "first" if is_open[0] else "last"


def _segment_extents(bound: BoundProgram) -> list[list[int | None]]:
    return [[_extent(bound, axis) for axis in segment.axes] for segment in bound.program.segments]


def _extent(bound: BoundProgram, axis: SegmentAxis) -> int | None:
    value = None if isinstance(axis.extent, Size) else constant_value(bound, axis.extent)
    return value if isinstance(value, int) else None


# --- a call ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoLayout:
    """The numbers of video tokens and of text tokens before or after them.

    `real`: for each batch entry, how many text tokens are real, counted from the first; None: all.
    """

    video: int
    text: int
    side: Side
    real: tuple[int, ...] | None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split (B, H, N, d) into the part of the video and the part of the text."""
        if self.side == "first":
            return x[:, :, self.text :], x[:, :, : self.text]
        return x[:, :, : self.video], x[:, :, self.video :]

    def join(self, video: Tensor, text: Tensor) -> Tensor:
        """Join both parts in their order."""
        return torch.cat([text, video] if self.side == "first" else [video, text], 2)

    def shares(self, batch: int) -> Iterator[tuple[list[int], int]]:
        """Yield the batch entries that have the same number of real text tokens, and that number."""
        real = self.real or (self.text,) * batch
        for n in sorted(set(real)):
            yield [i for i, count in enumerate(real) if count == n], n


def layout_of(tokens: int, video: int, side: Side | None, mask: Tensor | None) -> VideoLayout:
    """Return the layout of a sequence; `mask`: bool, (B, 1, 1, N) or (B, N), true for real keys.

    Raises ArgumentError, UnsupportedError.
    """
    text = tokens - video
    if text < 0:
        raise ArgumentError(
            f"attention is over {tokens} tokens, but the grid has {video}: pass the grid in tokens, after patching"
        )
    if text and side is None:
        raise ArgumentError(
            f"attention is over {tokens} tokens, {text} more than the grid's {video}: if these are a text, "
            f"pass its side, text='first' or 'last'"
        )
    layout = VideoLayout(video, text, side or "last", None)
    if mask is None or bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all()):
        return layout
    if mask.dtype != torch.bool or mask.shape[-1] != tokens or prod(mask.shape[1:-1]) != 1:
        raise UnsupportedError(
            f"attention_mask of shape {tuple(mask.shape)} and {mask.dtype}: only a bool mask of keys, "
            f"(B, 1, 1, {tokens}), is supported; the pattern decides the visibility of pairs"
        )
    on_video, on_text = layout.split(mask.reshape(mask.shape[0], 1, tokens, 1))
    real = on_text.flatten(1).sum(1)
    expected = torch.arange(text, device=mask.device) < real[:, None]
    if not bool(on_video.all()) or not torch.equal(on_text.flatten(1), expected):
        raise UnsupportedError("attention_mask is not supported: it must hide only tokens at the end of the text")
    return VideoLayout(video, text, layout.side, tuple(real.tolist()))


def attend_to_video(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, layout: VideoLayout, scale: float | None
) -> Tensor:
    """Attend with q, k, v (B, H, N, d) to out (B, H, N, dv).

    A pattern with a text segment defines the visibility of the text; else all tokens see the text, and the text sees
    all tokens. Text keys that are not real are never visible. Raises UnsupportedError.
    """
    if not layout.text:
        return attend(q, k, v, scale=scale)
    side = text_side(attend)
    if side is None and not attend.has_lse:
        raise UnsupportedError(
            f"the model has {layout.text} text tokens besides the video, but `{attend.name}` has no segment for "
            f"them, and its result cannot be merged with theirs, as it is not a single softmax: add the text to the "
            f"pattern's `tokens`"
        )
    batch = k.shape[0]
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    for entries, real in layout.shares(batch):
        parts = [layout.split(x if len(entries) == batch else x[entries]) for x in (q, k, v)]
        outputs = (
            _attend_merged_with_text(attend, parts, real, scale)
            if side is None
            else _attend_with_text(attend, parts, real, side, scale)
        )
        out[entries] = layout.join(*outputs).to(out.dtype)
    return out


def _attend_merged_with_text(
    attend: Attention, parts: list[tuple[Tensor, Tensor]], real: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attend the video by the pattern, merged with the text; attend the text over all keys."""
    (q, q_text), (k, k_text), (v, v_text) = parts
    k_text, v_text = k_text[:, :, :real], v_text[:, :, :real]
    full = _full_attention()
    on_video_keys = attend(q, k, v, scale=scale, return_lse=True)
    on_text_keys = full(q, k_text, v_text, scale=scale, return_lse=True)
    on_text = full(q_text, torch.cat([k, k_text], 2), torch.cat([v, v_text], 2), scale=scale)
    return merge(on_video_keys, on_text_keys)[0], on_text


def _attend_with_text(
    attend: Attention, parts: list[tuple[Tensor, Tensor]], real: int, side: Side, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attend video and text by the pattern, in its order; queries of text that are not real give 0."""
    video, text = parts[0][0].shape[2], parts[0][1].shape[2]
    layout = VideoLayout(video, real, side, None)
    out = attend(*(layout.join(x, x_text[:, :, :real]) for x, x_text in parts), scale=scale)
    on_video, on_text = layout.split(out)
    return on_video, torch.nn.functional.pad(on_text, (0, 0, 0, text - real))


@cache
def _full_attention() -> Attention:
    return compile_attention("full")
