"""Formulas of the length n: sympy expressions over n and a few integers computed from n."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from attnc.compiler.growth.open_relation import integer_at
from attnc.compiler.ir import Index


@dataclass(frozen=True, slots=True)
class FormulaName:
    """A letter in a formula: the integer that `value`, an expression of the IR over `keys`, has at n tokens."""

    letter: str
    text: str
    value: Index = field(repr=False)


@dataclass(frozen=True, slots=True)
class FormulaCase:
    """An expression that applies where the deciding letter is below `below`, and no earlier case applies."""

    expression: Any
    below: int | None = None


@dataclass(frozen=True, slots=True)
class Formula:
    """A number for each length n ≥ `start` that is a multiple of `step`.

    `names`: the letters besides n that occur in the expressions of `cases` and in the meanings of other letters. Where
    there are several cases, the last name decides between them.
    """

    cases: tuple[FormulaCase, ...]
    names: tuple[FormulaName, ...]
    start: int
    step: int = 1

    def holds(self, n: int) -> bool:
        """Whether the formula applies at n tokens."""
        return n >= self.start and n % self.step == 0

    def at(self, n: int) -> int:
        """Return the exact number for n tokens."""
        import sympy  # slow to import

        assert self.holds(n)
        values = {name.letter: integer_at(name.value, n) for name in self.names}
        deciding = values[self.names[-1].letter] if len(self.cases) > 1 else 0
        case = next(c for c in self.cases if c.below is None or deciding < c.below)
        value = case.expression.subs({symbol(x): v for x, v in {**values, "n": n}.items()})
        assert isinstance(value, sympy.Integer)
        return int(value)

    @property
    def expression_text(self) -> str:
        """The formula as text, with its cases."""
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
        texts = [f"{name.letter} = {name.text}" for name in self.names if name.letter in used]
        return f", where {', '.join(texts)}" if texts else ""

    @property
    def lengths(self) -> str:
        """The lengths for which the formula holds, in words."""
        if self.step == 1:
            return "for every n" if self.start <= 1 else f"for n ≥ {self.start:,}"
        return f"for multiples of {self.step:,}" + (f" from {self.start:,} on" if self.start > self.step else "")

    def __str__(self) -> str:
        return f"{self.expression_text}{self.meanings}, {self.lengths}"


def symbol(letter: str) -> Any:
    """Return the sympy symbol of an integer ≥ 0."""
    import sympy  # slow to import

    return sympy.Symbol(letter, integer=True, nonnegative=True)


def tidy(expression: Any) -> Any:
    """Return the shorter of an expression's expanded and factored forms."""
    import sympy  # slow to import

    expanded, factored = sympy.expand(expression), sympy.factor(expression)
    shorter = len(str(factored)) < len(str(expanded)) and not str(factored).startswith("-(")
    return factored if shorter else expanded


def written(expression: Any) -> str:
    """Return an expression as text, with ², ·, − and thousands separators."""
    text = re.sub(r"\*\*2\b", "²", str(expression)).replace("**", "^")
    text = re.sub(r"\d{4,}", lambda digits: f"{int(digits.group()):,}", text)
    return text.replace("*", "·").replace("-", "−")
