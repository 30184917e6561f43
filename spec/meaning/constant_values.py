"""The values of expressions that read only parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attnc.spec import program
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning.denotation import EvaluationFrame, Meanings, Result
from attnc.spec.program import BoundProgram
from attnc.spec.source import Span

__all__ = ["check_steps", "constant_value"]

MAX_CONSTANT_STEPS = 100_000
"""Maximum number of steps for an expression that reads only parameters."""


class ParametersAlone:
    """The context of a frame that knows parameters and some sizes, but no positions and no inputs."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._steps = 0

    def size(self, name: str, span: Span) -> int:
        return self._sizes[name]

    def coordinate(self, position: int, node: program.Coordinate) -> int:
        raise AssertionError("a coordinate is not a constant")

    def in_segment(self, position: int, segment: program.TokenSegment) -> bool:
        raise AssertionError("a position is not a constant")

    def element(self, node: program.InputRead, indices: list[int], head: int, batch: int) -> int | bool:
        raise AssertionError("an input is not a constant")

    def vector(self, node: program.Vector, position: int, head: int, batch: int) -> tuple[float, ...]:
        raise AssertionError("a vector is not a constant")

    def branch(self, node: program.BranchRead, member: int | None, position: int, frame: EvaluationFrame) -> Result:
        raise AssertionError("a branch is not a constant")

    def merged(self, node: program.MergeCall, members: Sequence[int | None], frame: EvaluationFrame) -> Result:
        raise AssertionError("a branch is not a constant")

    def scale(self, node: program.ScaleRead) -> float:
        raise AssertionError("the scale is not a constant")

    def in_unit(self, node: program.InUnit, position: int, frame: EvaluationFrame) -> bool:
        raise AssertionError("a unit is not a constant")

    def chosen(self, node: program.SelectedTest, member: int | None, item: int | None, frame: EvaluationFrame) -> bool:
        raise AssertionError("a selection is not a constant")

    def chosen_size(self, node: program.SelectedCount, member: int | None, frame: EvaluationFrame) -> int:
        raise AssertionError("a selection is not a constant")

    def members(self, unit: program.Unit, frame: EvaluationFrame) -> Sequence[int]:
        raise AssertionError("a unit is not a constant")

    def tokens(self, unit: program.Unit, frame: EvaluationFrame) -> Sequence[int]:
        raise AssertionError("a unit is not a constant")

    def tick(self, span: Span) -> None:
        self._steps += 1
        check_steps(self._steps, MAX_CONSTANT_STEPS, span)


def check_steps(steps: int, limit: int, span: Span) -> None:
    """Raise EvaluationError where more steps were taken than the limit allows."""
    if steps > limit:
        raise EvaluationError("A908", f"this takes more than {limit} steps", span, "make the ranges shorter")


def constant_value(bound: BoundProgram, node: program.Expr) -> Result:
    """Return the value of an expression that reads only parameters. Raises `EvaluationError` if it is undefined."""
    return Meanings(bound.program, bound.values).of(node)(EvaluationFrame(ParametersAlone(bound.lengths), {}, 0, 0))
