"""A pattern over the tokens of a video, and of a text before or after them."""

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

from attnc.runtime.attention import Attention, compile_attention
from attnc.runtime.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.library import ModuleLoader, find
from attnc.runtime.merging import merge
from attnc.spec.load import load_program
from attnc.spec.meaning.evaluate import constant_value
from attnc.spec.program import BoundProgram, ParameterRead, Program, SegmentAxis, Size
from attnc.spec.suggest import did_you_mean

Grid = tuple[int, int, int]
"""Frames, height and width of a video in tokens."""

Side = Literal["first", "last"]
"""Where the tokens of a text stand."""


# --- a pattern for each grid -----------------------------------------------------------------------------------------


def pattern_of_grids(spec: str | PathLike[str] | Attention, params: dict[str, object]) -> Callable[[Grid], Attention]:
    """The pattern on the grid of a call: an `Attention` as it is, a spec with its `tokens` set to the grid.

    Raises UnsupportedError, ArgumentError, ArgumentTypeError, and as `compile_attention`.
    """
    if isinstance(spec, Attention):
        if params:
            raise ArgumentTypeError(f"`{next(iter(params))}` is given for `{spec.name}`, which is compiled")
        _refuse(spec)
        return lambda grid: _checked(spec, grid)
    found = find(spec)
    program = load_program(found.source, ModuleLoader(found.folder), found.name)
    _check_names(program, params)
    extents = _extents(program)
    compiling: Any = compile_attention

    @cache
    def of_grid(grid: Grid) -> Attention:
        attend: Attention = compiling(spec, **{**_sizes(extents, grid), **params})
        _refuse(attend)
        return _checked(attend, grid)

    return of_grid


def _extents(program: Program) -> list[str]:
    """The parameters that say how large the video is: (frames, height, width) or (frames, tokens of a frame)."""
    segment = next((s for s in program.segments if not any(isinstance(a.extent, Size) for a in s.axes)), None)
    names = [a.extent.name for a in segment.axes if isinstance(a.extent, ParameterRead)] if segment else []
    return names if len(names) in (2, 3) and segment is not None and len(names) == len(segment.axes) else []


def _sizes(extents: list[str], grid: Grid) -> dict[str, int]:
    """The parameters that say how large the video is."""
    frames, height, width = grid
    if set(extents) == {"height", "width"}:  # a picture
        return {"height": height, "width": width}
    return dict(zip(extents, grid if len(extents) == 3 else (frames, height * width), strict=False))


def _check_names(program: Program, params: dict[str, object]) -> None:
    """Raise ArgumentTypeError for a parameter that a pattern does not have, before a grid is known."""
    known = [p.name for p in program.parameters]
    options = {name for name, p in inspect.signature(compile_attention).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name in params:
        if name not in known and name not in options:
            help_ = did_you_mean(name, known, f"it has {', '.join(known) or 'none'}")
            raise ArgumentTypeError(f"`{program.name}` has no parameter `{name}`: {help_}")


def _refuse(attend: Attention) -> None:
    """Raise UnsupportedError for what no processor can run."""
    if attend.is_recurrence or attend.pattern.stateful:
        raise UnsupportedError(f"`{attend.name}` has a state: a diffusion model's layer has pairs of queries and keys")
    given = [item for item in attend.bound.program.inputs if item.ranks_of is None]
    if given:
        raise UnsupportedError(
            f"`{attend.name}` needs the input `{given[0].name}`, which a Diffusers model does not give: take a pattern "
            f"without inputs"
        )


def _checked(attend: Attention, grid: Grid) -> Attention:
    """The pattern, if it is of so many tokens. Raises ArgumentError."""
    tokens = video_tokens(attend.bound)
    if tokens is not None and tokens != prod(grid):
        times = "×".join(map(str, grid))
        raise ArgumentError(
            f"`{attend.name}` is of {tokens} tokens, and the video has {times} = {prod(grid)} after patching: give the "
            f"pattern's name and parameters other than its extents, which then follow the video"
        )
    return attend


def video_tokens(bound: BoundProgram) -> int | None:
    """The tokens of the segments whose extents are known, None where the pattern has none."""
    known = [extents for extents in _known(bound) if None not in extents]
    return sum(prod(e for e in extents if e is not None) for extents in known) if known else None


def text_side(attend: Attention) -> Side | None:
    """Where the pattern's own text stands, a segment whose length the call decides; None where it has none.

    Raises UnsupportedError where it stands between others.
    """
    is_open = [None in extents for extents in _known(attend.bound)]
    if len(is_open) < 2 or not any(is_open):
        return None
    if sum(is_open) > 1 or not (is_open[0] or is_open[-1]):
        raise UnsupportedError(f"`{attend.name}` has a text amid the video's tokens: put it first or last")
    return "first" if is_open[0] else "last"


def _known(bound: BoundProgram) -> list[list[int | None]]:
    return [[_extent(bound, axis) for axis in segment.axes] for segment in bound.program.segments]


def _extent(bound: BoundProgram, axis: SegmentAxis) -> int | None:
    value = None if isinstance(axis.extent, Size) else constant_value(bound, axis.extent)
    return value if isinstance(value, int) else None


# --- a call ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoLayout:
    """So many tokens of a video, and of a text before or after them, of which the first ones are real, by batch entry
    (None: all).
    """

    video: int
    text: int
    side: Side
    real: tuple[int, ...] | None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, N, d) as that of the video and that of the text."""
        if self.side == "first":
            return x[:, :, self.text :], x[:, :, : self.text]
        return x[:, :, : self.video], x[:, :, self.video :]

    def join(self, video: Tensor, text: Tensor) -> Tensor:
        """Both in their order."""
        return torch.cat([text, video] if self.side == "first" else [video, text], 2)

    def shares(self, batch: int) -> Iterator[tuple[list[int], int]]:
        """The batch entries with as many real tokens of text, and how many these are."""
        real = self.real or (self.text,) * batch
        for n in sorted(set(real)):
            yield [i for i, own in enumerate(real) if own == n], n


def layout_of(tokens: int, video: int, side: Side | None, mask: Tensor | None) -> VideoLayout:
    """How a sequence is laid out; `mask`: bool, (B, 1, 1, N) or (B, N), which keys there are.

    Raises ArgumentError, UnsupportedError.
    """
    text = tokens - video
    if text < 0:
        raise ArgumentError(
            f"attention is over {tokens} tokens, and the grid has {video}: give the grid after patching"
        )
    if text and side is None:
        raise ArgumentError(
            f"attention is over {tokens} tokens, {text} more than the grid's {video}: if they are a text, say where it "
            f"stands, text='first' or 'last'"
        )
    layout = VideoLayout(video, text, side or "last", None)
    if mask is None or bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all()):
        return layout
    if mask.dtype != torch.bool or mask.shape[-1] != tokens or prod(mask.shape[1:-1]) != 1:
        raise UnsupportedError(
            f"attention_mask of shape {tuple(mask.shape)} and {mask.dtype}: only a bool mask of keys, "
            f"(B, 1, 1, {tokens}), is taken over; who sees whom says the pattern"
        )
    on_video, on_text = layout.split(mask.reshape(mask.shape[0], 1, tokens, 1))
    real = on_text.flatten(1).sum(1)
    expected = torch.arange(text, device=mask.device) < real[:, None]
    if not bool(on_video.all()) or not torch.equal(on_text.flatten(1), expected):
        raise UnsupportedError("attention_mask hides tokens of the video, or of the text before others: not supported")
    return VideoLayout(video, text, layout.side, tuple(real.tolist()))


def attend_to_video(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, layout: VideoLayout, scale: float | None
) -> Tensor:
    """q, k, v (B, H, N, d): out (B, H, N, dv).

    A pattern with a text of its own says what the text sees; else all tokens see it, and it sees all. Of the text,
    keys that are not real are not seen. Raises UnsupportedError.
    """
    if not layout.text:
        return attend(q, k, v, scale=scale)
    side = text_side(attend)
    if side is None and not attend.has_lse:
        raise UnsupportedError(
            f"the model has {layout.text} tokens of text beside the video, and `{attend.name}` says nothing of them "
            f"and is not one softmax that a text could be merged into: write `tokens` for the text in the pattern"
        )
    batch = k.shape[0]
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    for entries, real in layout.shares(batch):
        own = [layout.split(x if len(entries) == batch else x[entries]) for x in (q, k, v)]
        found = _beside_text(attend, own, real, scale) if side is None else _with_text(attend, own, real, side, scale)
        out[entries] = layout.join(*found).to(out.dtype)
    return out


def _beside_text(
    attend: Attention, parts: list[tuple[Tensor, Tensor]], real: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The video by the pattern, merged with the text; the text over all keys."""
    (q, q_text), (k, k_text), (v, v_text) = parts
    k_text, v_text = k_text[:, :, :real], v_text[:, :, :real]
    everything = _full()
    near = attend(q, k, v, scale=scale, return_lse=True)
    far = everything(q, k_text, v_text, scale=scale, return_lse=True)
    on_text = everything(q_text, torch.cat([k, k_text], 2), torch.cat([v, v_text], 2), scale=scale)
    return merge(near, far)[0], on_text


def _with_text(
    attend: Attention, parts: list[tuple[Tensor, Tensor]], real: int, side: Side, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Video and text by the pattern, in its order; 0 for queries of text that are not real."""
    video, text = parts[0][0].shape[2], parts[0][1].shape[2]
    own = VideoLayout(video, real, side, None)
    out = attend(*(own.join(x, x_text[:, :, :real]) for x, x_text in parts), scale=scale)
    on_video, on_text = own.split(out)
    return on_video, torch.nn.functional.pad(on_text, (0, 0, 0, text - real))


@cache
def _full() -> Attention:
    return compile_attention("full")
