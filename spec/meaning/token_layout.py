"""Assign positions to segments in order, and compute coordinates in them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from attnc.spec import program
from attnc.spec.errors import EvaluationError


class TokenLayout:
    """The positions of each segment. One extent may be inferred from the number of tokens that remain."""

    def __init__(
        self, segments: tuple[program.TokenSegment, ...], length: int, extent: Callable[[program.Expr], int]
    ) -> None:
        self.run_time: dict[str, int] = {}
        self._extents: dict[program.TokenSegment, tuple[int, ...]] = {}
        self._stretches: dict[program.TokenSegment, range] = {}
        if segments:
            fixed = {s: [None if _is_inferred(a) else _checked(a, extent) for a in s.axes] for s in segments}
            self._infer(segments, fixed, length)
            self._lay(segments, length)

    def stretch(self, segment: program.TokenSegment) -> range:
        """Return the positions of a segment."""
        return self._stretches[segment]

    def extents(self, segment: program.TokenSegment) -> tuple[int, ...]:
        """Return the lengths of a segment's axes."""
        return self._extents[segment]

    def coordinate(self, position: int, node: program.Coordinate) -> int:
        """Return a coordinate of a position. Raises `EvaluationError` for a position outside the segment."""
        stretch = self._stretches[node.segment]
        if position not in stretch:
            name = f"segment `{node.segment.name}`" if node.segment.name else "grid"
            message = f"position {position} is outside the {name}, which has {len(stretch)} tokens"
            help_ = "call with as many tokens as the grid has"
            if node.segment.name:
                help_ = f"test it first: `{node.place} in {node.segment.name} and …`"
            raise EvaluationError("A903", message, node.span, help_)
        extents = self._extents[node.segment]
        stride = prod(extents[node.axis + 1 :])
        return (position - stretch.start) // stride % extents[node.axis]

    def _infer(
        self,
        segments: tuple[program.TokenSegment, ...],
        fixed: dict[program.TokenSegment, list[int | None]],
        length: int,
    ) -> None:
        remaining = length - sum(prod(e for e in fixed[s] if e is not None) for s in segments if None not in fixed[s])
        for segment in segments:
            row_tokens = prod(e for e in fixed[segment] if e is not None)
            for axis, extent in zip(segment.axes, fixed[segment], strict=True):
                if extent is None:
                    if remaining < 0 or row_tokens == 0 or remaining % row_tokens:
                        message = f"{max(remaining, 0)} tokens are left for `{axis.name}`, in rows of {row_tokens}"
                        message = f"{length} tokens do not fit the segments: {message}"
                        help_ = "call with whole rows of tokens, or declare the other tokens with another `tokens` line"
                        raise EvaluationError("A903", message, axis.span, help_)
                    self.run_time[axis.extent.name] = remaining // row_tokens  # type: ignore[union-attr]
            self._extents[segment] = tuple(remaining // row_tokens if e is None else e for e in fixed[segment])

    def _lay(self, segments: tuple[program.TokenSegment, ...], length: int) -> None:
        start = 0
        for segment in segments:
            size = prod(self._extents[segment])
            self._stretches[segment] = range(start, start + size)
            start += size
        if start != length:
            shapes = " + ".join(" × ".join(map(str, self._extents[s])) for s in segments)
            message = f"the segments hold {shapes} = {start} tokens, got {length}"
            raise EvaluationError(
                "A903", message, segments[0].span, "use the number of tokens that the pattern's parameters give"
            )


def _is_inferred(axis: program.SegmentAxis) -> bool:
    return isinstance(axis.extent, program.Size)


def _checked(axis: program.SegmentAxis, extent: Callable[[program.Expr], int]) -> int:
    value = extent(axis.extent)
    if value < 0:
        raise EvaluationError("A903", f"the extent of `{axis.name}` is {value}", axis.span, "give at least 0")
    return value
