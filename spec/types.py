"""Types of parameters, inputs and states: numbers and truth values, with named dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["int", "real", "bool", "complex"]
Dim = str | int | object
"""A dimension: a name, a number, or a checked expression of parameters (`program.Expr`)."""


@dataclass(frozen=True, slots=True)
class Type:
    """A kind of scalar, perhaps refined (`unit`, `log_decay`, `positive`), with its dimensions; none for a scalar.

    In relations a `real` is an exact rational.
    """

    kind: Kind
    dims: tuple[Dim, ...] = ()
    refinement: Literal["unit", "log_decay", "positive"] | None = None

    @property
    def is_floating(self) -> bool:
        """Whether the entries are floating-point numbers, real or complex."""
        return self.kind in ("real", "complex")

    def __str__(self) -> str:
        name = self.refinement or self.kind
        return f"{name}[{', '.join(map(str, self.dims))}]" if self.dims else name
