"""Calls of isl, the integer set library, whose work is counted and ends at a limit.

Sets and piecewise expressions are those of Verdoolaege 2010, isl: an integer set library for the polyhedral model, by
the optional package islpy. What comes of a call that reaches the limit is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from time import monotonic
from typing import Any, TypeVar

SECONDS = 2.0
"""Approximate time limit of a question, in seconds."""

OPERATIONS = 20_000
"""isl's own steps for a part of it at first; twice as many each time it is tried again, while time is left."""

PIECES = 400
"""Pieces of an expression, or sets in a union, past which a question is given up."""

Sets = Any
"""A set of isl."""

Pieces = Any
"""A piecewise affine expression of isl."""

Triple = tuple[int, int, int]
"""The coordinates of a point."""

T = TypeVar("T")


class UndecidedError(Exception):
    """The question is not decided; says why."""


def is_available() -> bool:
    """Whether islpy is installed."""
    return find_spec("islpy") is not None


class CountedIsl:
    """isl, for one question, until a moment of `time.monotonic`."""

    def __init__(self, until: float) -> None:
        import islpy

        self.isl = islpy
        self._until = until
        self.context = islpy.Context()
        self.context.set_on_error(islpy.on_error.CONTINUE)

    def value(self, number: int) -> Any:
        """A number for isl."""
        return self.isl.Val(number, self.context)

    def number(self, value: Any) -> int:
        """A number of isl."""
        # Printing counts too, and says nothing of the limit when it comes there.
        self.context.reset_operations()
        return int(value.to_str())

    def made(self, make: Callable[[], Any]) -> Any:
        """Return a set that isl builds, in as few pieces as isl finds."""
        return self.step(lambda: self.small(make()))

    def step(self, make: Callable[[], T]) -> T:
        """Run one isl operation against the step budget. Raises UndecidedError where the budget is spent."""
        for operations in (OPERATIONS << doubled for doubled in range(32)):
            start = monotonic()
            if start > self._until:
                break
            self.context.reset_operations()
            self.context.set_max_operations(operations)
            try:
                return make()
            except self.isl.Error:
                now = monotonic()
                if now + 2 * (now - start) > self._until:
                    break
            finally:
                self.context.set_max_operations(0)
        raise UndecidedError("isl takes too long")

    def small(self, made: Any) -> Any:
        """Coalesce a set. Raises UndecidedError where it keeps many pieces."""
        try:
            made = made.coalesce()
        except self.isl.Error as error:
            # isl joins pieces that belong together, and at times meets a contradiction of its own in it.
            if "number of operations" in str(error):
                raise
        size = made.n_piece() if isinstance(made, self.isl.PwAff) else made.n_basic_set()
        if size > PIECES or monotonic() > self._until:
            raise UndecidedError("isl takes too long")
        return made

    # --- points ---

    def first(self, points: Sets) -> Triple | None:
        """The first of some points in the positive octant; where time is lacking, one; None if there is none."""
        result = self._sample(points)
        if result is None:
            return None
        try:
            for position in range(3):
                points, result = self._least(points, position, result)
        except UndecidedError:
            pass
        return result

    def _least(self, points: Sets, position: int, found: Triple) -> tuple[Sets, Triple]:
        """Return the points that minimise one coordinate, and one of these points as witness."""
        low = 0
        while low < found[position]:
            below = self._between(points, position, low, (low + found[position]) // 2)
            sample = self._sample(below)
            if sample is None:
                low = (low + found[position]) // 2 + 1
            else:
                points, found = below, sample
        return self._between(points, position, low, low), found

    def _between(self, points: Sets, position: int, low: int, high: int) -> Sets:
        at = self.isl.dim_type.set, position
        return self.step(lambda: points.lower_bound_val(*at, self.value(low)).upper_bound_val(*at, self.value(high)))

    def _sample(self, points: Sets) -> Triple | None:
        """Return a point of the set, or None where it is empty."""
        lacking: UndecidedError | None = None
        for part in points.get_basic_sets():
            try:
                point = self.step(part.sample_point)
            except UndecidedError as error:
                lacking = error
                continue
            if not point.is_void():
                n, q, k = (self.number(point.get_coordinate_val(self.isl.dim_type.set, i)) for i in range(3))
                return n, q, k
        if lacking is not None:
            raise lacking
        return None
