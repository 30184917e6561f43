"""Calls of isl, the integer set library, with a limit on their work.

Sets and piecewise expressions are those of Verdoolaege 2010, "isl: an integer set library for the polyhedral model",
through the optional package islpy. The result of a call that reaches the limit is discarded.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from time import monotonic
from typing import Any, TypeVar

SECONDS = 2.0
"""Approximate time limit for a question, in seconds."""

OPERATIONS = 20_000
"""Limit of isl's internal steps for the first attempt at an operation; doubled for each further attempt."""

PIECES = 400
"""Maximum number of pieces of an expression, or of sets in a union, before a question is abandoned."""

Sets = Any
"""An isl set."""

Pieces = Any
"""A piecewise affine expression in isl."""

Triple = tuple[int, int, int]
"""The coordinates of a point."""

T = TypeVar("T")


class UndecidedError(Exception):
    """Raised where a question is not decided; the message says why."""


def is_available() -> bool:
    """Whether islpy is installed."""
    return find_spec("islpy") is not None


class CountedIsl:
    """An isl context for one question, until the time `until` of `time.monotonic`."""

    def __init__(self, until: float) -> None:
        import islpy  # optional

        self.isl = islpy
        self._until = until
        self.context = islpy.Context()
        self.context.set_on_error(islpy.on_error.CONTINUE)

    def value(self, number: int) -> Any:
        """Convert an integer to an isl value."""
        return self.isl.Val(number, self.context)

    def number(self, value: Any) -> int:
        """Convert an isl value to an integer."""
        # Printing counts as work too, and does not report an error when it reaches the limit.
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
            # Coalescing sometimes fails with an internal error of isl; the uncoalesced set is still valid.
            if "number of operations" in str(error):
                raise
        size = made.n_piece() if isinstance(made, self.isl.PwAff) else made.n_basic_set()
        if size > PIECES or monotonic() > self._until:
            raise UndecidedError("isl takes too long")
        return made

    # --- points ---

    def first(self, points: Sets) -> Triple | None:
        """Return the first point of a set in the positive octant, or any point if time runs out; None if empty."""
        result = self._sample(points)
        if result is None:
            return None
        try:
            for position in range(3):
                points, result = self._least(points, position, result)
        except UndecidedError:
            pass
        return result

    def _least(self, points: Sets, position: int, witness: Triple) -> tuple[Sets, Triple]:
        """Return the points that minimise one coordinate, with one such point as witness."""
        low = 0
        while low < witness[position]:
            below = self._between(points, position, low, (low + witness[position]) // 2)
            sample = self._sample(below)
            if sample is None:
                low = (low + witness[position]) // 2 + 1
            else:
                points, witness = below, sample
        return self._between(points, position, low, low), witness

    def _between(self, points: Sets, position: int, low: int, high: int) -> Sets:
        dimension = self.isl.dim_type.set, position
        return self.step(
            lambda: points.lower_bound_val(*dimension, self.value(low)).upper_bound_val(*dimension, self.value(high))
        )

    def _sample(self, points: Sets) -> Triple | None:
        """Return a point of the set, or None where it is empty."""
        undecided: UndecidedError | None = None
        for part in points.get_basic_sets():
            try:
                point = self.step(part.sample_point)
            except UndecidedError as error:
                undecided = error
                continue
            if not point.is_void():
                n, q, k = (self.number(point.get_coordinate_val(self.isl.dim_type.set, i)) for i in range(3))
                return n, q, k
        if undecided is not None:
            raise undecided
        return None
