"""Formulas of the length: expressions of sympy over n and a few whole numbers that n makes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from attnc.compiler.growth.open_relation import integer_at
from attnc.compiler.ir import Index


@dataclass(frozen=True, slots=True)
class FormulaName:
    """A letter in a formula: a whole number that `value`, an integer of the IR over `keys`, is for so many tokens."""

    letter: str
    text: str
    value: Index = field(repr=False)


@dataclass(frozen=True, slots=True)
class FormulaCase:
    """An expression that holds where the letter of the case is below a number, and no case before does."""

    expression: Any
    below: int | None = None


@dataclass(frozen=True, slots=True)
class Formula:
    """A number for each length n ≥ `start` that is a multiple of `step`.

    `names` are the letters beside n in the expressions of `cases` and in each other's meanings; the last of them is
    what cases go by, if there are several.
    """

    cases: tuple[FormulaCase, ...]
    names: tuple[FormulaName, ...]
    start: int
    step: int = 1

    def holds(self, n: int) -> bool:
        """Whether the formula says anything about n tokens."""
        return n >= self.start and n % self.step == 0

    def at(self, n: int) -> int:
        """The number for n tokens, exactly."""
        import sympy

        assert self.holds(n)
        values = {name.letter: integer_at(name.value, n) for name in self.names}
        deciding = values[self.names[-1].letter] if len(self.cases) > 1 else 0
        case = next(c for c in self.cases if c.below is None or deciding < c.below)
        found = case.expression.subs({symbol(x): v for x, v in {**values, "n": n}.items()})
        assert isinstance(found, sympy.Integer)
        return int(found)

    @property
    def expression_text(self) -> str:
        """The formula itself."""
        if len(self.cases) == 1:
            return written(self.cases[0].expression)
        letter = self.names[-1].letter
        ends = ["otherwise" if case.below is None else f"if {letter} < {case.below:,}" for case in self.cases]
        return "; ".join(f"{written(case.expression)} {end}" for case, end in zip(self.cases, ends, strict=True))

    @property
    def meanings(self) -> str:
        """The meanings of the formula's letters, in words."""
        used = {str(s) for case in self.cases for s in case.expression.free_symbols}
        if len(self.cases) > 1:
            used.add(self.names[-1].letter)
        for name in reversed(self.names):
            if name.letter in used:
                used.update(re.findall(r"\b[A-Za-z]\b", name.text))
        said = [f"{name.letter} = {name.text}" for name in self.names if name.letter in used]
        return f", where {', '.join(said)}" if said else ""

    @property
    def lengths(self) -> str:
        """The lengths it holds for."""
        if self.step == 1:
            return "for every n" if self.start <= 1 else f"for n ≥ {self.start:,}"
        return f"for multiples of {self.step:,}" + (f" from {self.start:,} on" if self.start > self.step else "")

    def __str__(self) -> str:
        return f"{self.expression_text}{self.meanings}, {self.lengths}"


def symbol(letter: str) -> Any:
    """The letter of a whole number ≥ 0."""
    import sympy

    return sympy.Symbol(letter, integer=True, nonnegative=True)


def tidy(expression: Any) -> Any:
    """The shorter one of the sum and the product that an expression is."""
    import sympy

    sum_of, product_of = sympy.expand(expression), sympy.factor(expression)
    shorter = len(str(product_of)) < len(str(sum_of)) and not str(product_of).startswith("-(")
    return product_of if shorter else sum_of


def written(expression: Any) -> str:
    """An expression as people write it."""
    text = re.sub(r"\*\*2\b", "²", str(expression)).replace("**", "^")
    text = re.sub(r"\d{4,}", lambda found: f"{int(found.group()):,}", text)
    return text.replace("*", "·").replace("-", "−")
