"""The findings of the checker: the form of an expression, its stages, and its value where it is constant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from attnc.spec.meaning.exact_arithmetic import Number
from attnc.spec.types import Dim, Type

FormKind = Literal["int", "real", "approximate", "float", "bool", "list", "unknown"]


@dataclass(frozen=True, slots=True)
class ExprForm:
    """The type of an expression: an exact number, a rounded number, a truth value, a list, or floating point.

    An `approximate` number is a binary64 value that only `floor` or `ceil` make exact again. A `float` is a
    floating-point number, or with `axes` a vector or tensor over these axes, perhaps complex. `length` is the length of
    a list, None where only the parameters determine it.
    """

    kind: FormKind
    item: ExprForm | None = None
    length: int | None = None
    axes: tuple[Dim, ...] = ()
    is_complex: bool = False

    @property
    def is_number(self) -> bool:
        """Whether arithmetic accepts the form."""
        return self.kind in ("int", "real", "approximate", "float", "unknown") and not self.axes

    def __str__(self) -> str:
        match self.kind:
            case "int":
                return "an integer"
            case "real":
                return "a rational number"
            case "approximate":
                return "a rounded number"
            case "float":
                axes = ", ".join(f"`{a}`" if isinstance(a, str | int) else "…" for a in self.axes)
                noun = "vector" if len(self.axes) < 2 else "matrix"
                if self.is_complex:
                    return f"a complex {noun} over {axes}" if axes else "a complex number"
                return f"a {noun} over {axes}" if axes else "a floating-point number"
            case "bool":
                return "a truth value"
            case "list":
                return "a list" if self.length is None else f"a list of {self.length}"
            case _:
                return "unknown"


INT = ExprForm("int")
REAL = ExprForm("real")
APPROXIMATE = ExprForm("approximate")
FLOAT = ExprForm("float")
BOOL = ExprForm("bool")
UNKNOWN = ExprForm("unknown")

_NUMBERS: dict[str, int] = {"int": 0, "real": 1, "approximate": 2, "float": 3}


def floating(axes: tuple[Dim, ...], *, is_complex: bool = False) -> ExprForm:
    """Return the form of a floating-point number, or of a tensor over `axes`."""
    return ExprForm("float", axes=axes, is_complex=is_complex)


@dataclass(frozen=True, slots=True)
class Finding:
    """The checker's result for an expression.

    `needs` holds the stages that the value depends on: `q`, `k` (positions), `key`, `row` (a query only as an index),
    `head`, `batch`, `size`, `length`, `data`. `natural`: the value is never negative.
    """

    form: ExprForm
    needs: frozenset[str] = frozenset()
    constant: Number | None = None
    natural: bool = False


NOTHING = Finding(UNKNOWN)


def constant_finding(value: Number) -> Finding:
    """Return the finding of a constant."""
    if isinstance(value, bool):
        return Finding(BOOL, constant=value)
    form = INT if isinstance(value, int) else REAL if isinstance(value, Fraction) else APPROXIMATE
    return Finding(form, constant=value, natural=value >= 0)


def parameter_form(type_: Type) -> ExprForm:
    """Return the form of a parameter read; one with a `head` dimension gives the entry of the current head."""
    form = {"int": INT, "real": REAL, "bool": BOOL}.get(type_.kind, UNKNOWN)
    for dim in reversed([d for d in type_.dims if d != "head"]):
        form = ExprForm("list", form, dim if isinstance(dim, int) else None)
    return form


def as_number(form: ExprForm, text: str) -> str:
    """Return the remedy that makes a value of a form a number; `text` is the source of the value."""
    if form == BOOL:
        return "write `(1 if … else 0)` for a number"
    if form.kind == "list":
        return f"take one entry: `{text if text.isidentifier() else 'x'}[0]`"
    if any(axis in ("query", "key", "token") for axis in form.axes):
        return "read one entry of the input: write its indices, as in `bias[q, k]`"
    return "take the product with another vector: `dot(a, b)`" if form.axes else ""


def join(a: ExprForm, b: ExprForm) -> ExprForm | None:
    """Return the form that holds the values of both forms, or None."""
    if "unknown" in (a.kind, b.kind):
        return UNKNOWN
    if a.axes != b.axes:
        return None
    if a.kind in _NUMBERS and b.kind in _NUMBERS:
        widest = max(a, b, key=lambda form: _NUMBERS[form.kind])
        return replace(widest, is_complex=a.is_complex or b.is_complex)
    if a.kind != b.kind:
        return None
    if a.item is None or b.item is None:
        return a
    item = join(a.item, b.item)
    same_length = a.length == b.length or None in (a.length, b.length)
    return ExprForm("list", item, a.length if a.length == b.length else None) if item and same_length else None
