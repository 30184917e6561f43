"""The law by which numbers grow, read off the numbers themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

_POWERS = {2: "quadratic: as the square of the layers", 3: "cubic: as the cube of the layers"}
"""The growth of windows on two and on three axes, in words."""


@dataclass(frozen=True)
class Law:
    """`linear`: each number is `step` more than the one before. `polynomial`: the differences of differences, `degree`
    times, are `step`. `exponential`: each difference is `step` times the one before. It holds for the first `count`.
    """

    kind: Literal["linear", "polynomial", "exponential"]
    step: int
    degree: int
    count: int

    def __str__(self) -> str:
        match self.kind:
            case "linear":
                return f"linear: {self.step:,} more with every layer"
            case "polynomial":
                return _POWERS[self.degree]
            case _:
                doubles = "doubles" if self.step == 2 else f"is {self.step:,} times as much"
                return f"exponential: what a layer adds {doubles} with every layer"


def find_law(numbers: Sequence[int]) -> Law | None:
    """The law that the longest beginning of the numbers follows, None where nothing says one.

    Three numbers make a line, five a square, seven a cube, four an exponential; and they must grow.
    """
    found = [law for law in (*_polynomials(numbers), _exponential(numbers)) if law is not None]
    return max(found, key=lambda law: law.count, default=None)


def _polynomials(numbers: Sequence[int]) -> list[Law]:
    result = []
    differences = list(numbers)
    for degree in range(1, max(_POWERS) + 1):
        differences = _differences(differences)
        same = _alike(differences)
        if same >= degree + 1 and differences[0] > 0:
            kind: Literal["linear", "polynomial"] = "linear" if degree == 1 else "polynomial"
            result.append(Law(kind, differences[0], degree, same + degree))
    return result


def _exponential(numbers: Sequence[int]) -> Law | None:
    differences = _differences(numbers)
    if len(differences) < 3 or differences[0] <= 0 or differences[1] % differences[0]:
        return None
    step, count = differences[1] // differences[0], 1
    while count < len(differences) and differences[count] == step * differences[count - 1]:
        count += 1
    return Law("exponential", step, 0, count + 1) if step > 1 and count >= 3 else None


def _differences(numbers: Sequence[int]) -> list[int]:
    return [b - a for a, b in pairwise(numbers)]


def _alike(numbers: Sequence[int]) -> int:
    """How many numbers at the beginning are equal."""
    return next((i for i, number in enumerate(numbers) if number != numbers[0]), len(numbers))
