"""Segments laid one after another over the positions, and coordinates in them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from attnc.spec import program
from attnc.spec.errors import EvaluationError


class TokenLayout:
    """Where each segment lies. One extent may be a run-time length, which is what the other tokens leave."""

    def __init__(
        self, segments: tuple[program.TokenSegment, ...], length: int, extent: Callable[[program.Expr], int]
    ) -> None:
        self.run_time: dict[str, int] = {}
        self._extents: dict[program.TokenSegment, tuple[int, ...]] = {}
        self._stretches: dict[program.TokenSegment, range] = {}
        if segments:
            fixed = {s: [None if _runs(a) else _checked(a, extent) for a in s.axes] for s in segments}
            self._infer(segments, fixed, length)
            self._lay(segments, length)

    def stretch(self, segment: program.TokenSegment) -> range:
        """The positions of a segment."""
        return self._stretches[segment]

    def extents(self, segment: program.TokenSegment) -> tuple[int, ...]:
        """The lengths of its axes."""
        return self._extents[segment]

    def coordinate(self, position: int, node: program.Coordinate) -> int:
        """A coordinate of a position, which must lie in the segment."""
        stretch = self._stretches[node.segment]
        if position not in stretch:
            name = f"segment `{node.segment.name}`" if node.segment.name else "grid"
            message = f"position {position} lies outside the {name}, which has {len(stretch)} tokens"
            help_ = "call with as many tokens as the grid has"
            if node.segment.name:
                help_ = f"test it first: `{node.place} in {node.segment.name} and …`"
            raise EvaluationError("A903", message, node.span, help_)
        extents = self._extents[node.segment]
        inner = prod(extents[node.axis + 1 :])
        return (position - stretch.start) // inner % extents[node.axis]

    def _infer(
        self,
        segments: tuple[program.TokenSegment, ...],
        fixed: dict[program.TokenSegment, list[int | None]],
        length: int,
    ) -> None:
        rest = length - sum(prod(e for e in fixed[s] if e is not None) for s in segments if None not in fixed[s])
        for segment in segments:
            known = prod(e for e in fixed[segment] if e is not None)
            for axis, extent in zip(segment.axes, fixed[segment], strict=True):
                if extent is None:
                    if rest < 0 or known == 0 or rest % known:
                        message = f"{max(rest, 0)} tokens are left for `{axis.name}`, in rows of {known}"
                        message = f"{length} tokens do not fit the segments: {message}"
                        help_ = "call with whole rows of tokens, or name what else there is by a `tokens` line"
                        raise EvaluationError("A903", message, axis.span, help_)
                    self.run_time[axis.extent.name] = rest // known  # type: ignore[union-attr]
            self._extents[segment] = tuple(rest // known if e is None else e for e in fixed[segment])

    def _lay(self, segments: tuple[program.TokenSegment, ...], length: int) -> None:
        start = 0
        for segment in segments:
            size = prod(self._extents[segment])
            self._stretches[segment] = range(start, start + size)
            start += size
        if start != length:
            shapes = " + ".join(" × ".join(map(str, self._extents[s])) for s in segments)
            message = f"the segments hold {shapes} = {start} tokens, and there are {length}"
            raise EvaluationError(
                "A903", message, segments[0].span, "give the lengths that the pattern's parameters say"
            )


def _runs(axis: program.SegmentAxis) -> bool:
    return isinstance(axis.extent, program.Size)


def _checked(axis: program.SegmentAxis, extent: Callable[[program.Expr], int]) -> int:
    value = extent(axis.extent)
    if value < 0:
        raise EvaluationError("A903", f"the extent of `{axis.name}` is {value}", axis.span, "give at least 0")
    return value
