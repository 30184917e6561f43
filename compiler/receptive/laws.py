"""The law by which a sequence of numbers grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

_POWERS = {2: "quadratic: as the square of the layers", 3: "cubic: as the cube of the layers"}
"""The growth of windows over two and three axes, in words, by degree."""


@dataclass(frozen=True)
class Law:
    """A law of growth that holds for the first `count` numbers.

    `linear`: each number exceeds the one before by `step`. `polynomial`: the differences of order `degree` are `step`.
    `exponential`: each difference is `step` times the one before.
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
    """Find the law that holds for the longest prefix of the numbers; None where no law holds.

    A linear law needs three numbers, a quadratic five, a cubic seven and an exponential four; the numbers must grow.
    """
    laws = [law for law in (*_polynomials(numbers), _exponential(numbers)) if law is not None]
    return max(laws, key=lambda law: law.count, default=None)


def _polynomials(numbers: Sequence[int]) -> list[Law]:
    result = []
    differences = list(numbers)
    for degree in range(1, max(_POWERS) + 1):
        differences = _differences(differences)
        equal_count = next((i for i, number in enumerate(differences) if number != differences[0]), len(differences))
        if equal_count >= degree + 1 and differences[0] > 0:
            kind: Literal["linear", "polynomial"] = "linear" if degree == 1 else "polynomial"
            result.append(Law(kind, differences[0], degree, equal_count + degree))
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
