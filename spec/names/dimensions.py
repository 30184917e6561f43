"""Resolve the types of parameters, inputs and states, and the axes of segments."""

from __future__ import annotations

from collections import ChainMap
from typing import Literal, cast

from attnc.spec import program, syntax
from attnc.spec.diagnostics import Label
from attnc.spec.names.builtins import (
    FIXED_DIMENSIONS,
    FUNCTIONS,
    KINDS,
    REFINEMENTS,
    RESERVED_NAMES,
    TYPE_HINTS,
)
from attnc.spec.names.expression_resolver import Resolver
from attnc.spec.names.module_scopes import declare
from attnc.spec.names.scope import InputSymbol, SegmentSymbol, SizeSymbol, Symbol
from attnc.spec.source import Span
from attnc.spec.suggest import did_you_mean
from attnc.spec.types import Dim, Kind, Type

_Refinement = Literal["unit", "log_decay", "positive"]


class Dimensions:
    """Resolves types. A dimension's name is fixed, a parameter, a `let`, or else declares a new size."""

    def __init__(
        self,
        resolver: Resolver,
        names: ChainMap[str, Symbol],
        *,
        recurrent: bool,
    ) -> None:
        """`recurrent`: whether the types belong to a recurrence, where complex numbers are supported."""
        self._recurrent = recurrent
        self._report = resolver.report
        self._resolver = resolver
        self._names = names
        self._inferred_extent: Span | None = None
        self._axes: dict[str, Span] = {}

    def parameter_type(self, item: syntax.ParameterDecl) -> Type | None:
        """Return the type of a parameter, a scalar or a list; None after an error was reported."""
        if item.type is None:
            name = item.name.id
            help_ = f"write `{name}: int`, `{name}: real` or `{name}: bool`"
            self._report.error(
                "A302", f"the parameter `{name}` has no type", item.name.span, "a type is missing", help=help_
            )
            return None
        kind = self._kind(item.type)
        if kind is None:
            return None
        if kind[0] == "complex":
            help_ = "declare two `real` parameters, the real and the imaginary part"
            message = "complex parameters are not supported yet"
            self._report.error("A704", message, item.type.span, "not compiled yet", help=help_)
            return None
        for dim in item.type.dims:
            if isinstance(dim, syntax.NameExpr) and dim.id in FIXED_DIMENSIONS - {"head"}:
                help_ = "use `head`, a number or a new name"
                self._report.error("A303", f"a parameter cannot have a `{dim.id}` dimension", dim.span, help=help_)
                return None
        return Type(kind[0], self._dims(item.type), kind[1])

    def input_type(self, item: syntax.Declaration) -> Type | None:
        """Return the type of an input; None after an error was reported."""
        kind = self._kind(item.type)
        dims = self._dims(item.type)
        if kind is None:
            return None
        if kind[0] == "complex" and not self._recurrent:
            message = "`complex` inputs are not supported in patterns yet, only in recurrences"
            help_ = "use `int` and `bool` inputs in a relation, `real` inputs in a score"
            self._report.error("A704", message, item.type.span, "not compiled yet", help=help_)
            return None
        if item.word.id == "learned" and kind[0] not in ("real", "complex"):
            help_ = "declare it as an `input`"
            self._report.error(
                "A302", "a learned tensor must hold real numbers", item.type.span, "not real", help=help_
            )
            return None
        return Type(kind[0], dims, kind[1])

    def state_dims(self, type_: syntax.TypeExpr) -> tuple[Dim, ...]:
        """Return the dimensions of a state: `dk`, `dv`, numbers, parameters and sizes of inputs."""
        name = type_.name
        if name is not None and name.id == "complex" and not self._recurrent:
            help_ = "write a recurrence by itself; the state of a branch holds real numbers"
            message = "complex states of branches are not supported yet"
            self._report.error("A704", message, name.span, "not compiled yet", help=help_)
        elif name is not None and name.id not in ("real", "complex"):
            help_ = "a state holds real or complex numbers: `state S: [dk, dv]`, `state x: complex[n]`"
            self._report.error(
                "A302", f"a state cannot hold `{name.id}`", name.span, "neither real nor complex", help=help_
            )
        dims: list[Dim] = []
        for dim in type_.dims:
            is_name = isinstance(dim, syntax.NameExpr)
            if is_name and dim.id in FIXED_DIMENSIONS - {"dk", "dv"}:  # type: ignore[union-attr]
                help_ = "remove it: every batch entry and head has its own state, which the tokens update in turn"
                self._report.error("A303", f"a state cannot have a `{dim.span.text}` dimension", dim.span, help=help_)
            elif is_name and dim.id not in self._names and dim.id not in FIXED_DIMENSIONS:  # type: ignore[union-attr]
                help_ = "use `dk`, `dv`, a number, a parameter, or a dimension of an input"
                self._report.error("A303", f"the size `{dim.span.text}` is unknown", dim.span, help=help_)
            else:
                dims.append(self._dim(dim))
        return tuple(dims)

    def segment(self, line: syntax.BinderClause) -> program.TokenSegment:
        """Return the segment that a `tokens` line declares."""
        axes = []
        for binder in line.binders:
            assert isinstance(binder, syntax.AxisDecl)
            extent = binder.domain
            if isinstance(extent, syntax.RangeExpr):
                message = "`tokens` needs the extent of an axis, got a range"
                help_ = f"positions count from 0: write `{binder.name.id}: {extent.high.span.text}`"
                self._report.error("A304", message, extent.span, "a range", help=help_)
                extent = extent.high
            self._check_axis(binder.name)
            axes.append(program.SegmentAxis(binder.name.span, binder.name.id, self._extent(extent)))
        return program.TokenSegment(line.span, line.name.id if line.name else None, tuple(axes))

    def _check_axis(self, name: syntax.NameExpr) -> None:
        if name.id in self._axes:
            also = (Label(self._axes[name.id], "first here"),)
            message = f"two axes are named `{name.id}`"
            self._report.error("A212", message, name.span, "again here", also=also, help="rename one of them")
        self._axes.setdefault(name.id, name.span)

    def _extent(self, domain: syntax.Expr) -> program.Expr:
        if isinstance(domain, syntax.NameExpr) and isinstance(self._names.get(domain.id), SizeSymbol | None):
            if domain.id not in self._names:
                declare(self._report, self._names, domain, SizeSymbol(domain.span, domain.id))
            self._check_run_time(domain)
            return program.Size(domain.span, domain.id)
        return self._resolver.resolve(domain, self._names)

    def _check_run_time(self, name: syntax.NameExpr) -> None:
        if self._inferred_extent is not None:
            also = (Label(self._inferred_extent, "the first one"),)
            help_ = f"make one of them a parameter of the pattern, as in `{name.id}: int`"
            message = "only one extent can be inferred from the length"
            self._report.error("A408", message, name.span, f"`{name.id}` is not a parameter", also=also, help=help_)
        self._inferred_extent = self._inferred_extent or name.span

    def _kind(self, item: syntax.TypeExpr) -> tuple[Kind, _Refinement | None] | None:
        if item.name is None:
            self._report.error(
                "A302", "a type starts with its kind", item.span, help="write `int[…]`, `real[…]` or `bool[…]`"
            )
            return None
        name = item.name.id
        if name in KINDS:
            return cast(Kind, name), None
        if name in REFINEMENTS:
            return "real", cast(_Refinement, name)
        all_types = "the types are int, real, bool, complex, unit, log_decay, positive"
        help_ = TYPE_HINTS.get(name) or did_you_mean(name, KINDS | REFINEMENTS, all_types)
        self._report.error("A302", f"unknown type `{name}`", item.name.span, "not a type", help=help_)
        return None

    def _dims(self, item: syntax.TypeExpr) -> tuple[Dim, ...]:
        return tuple(self._dim(d) for d in item.dims)

    def _dim(self, dim: syntax.Expr) -> Dim:
        match dim:
            case syntax.NumberExpr(value=int() as value) if value > 0:
                return value
            case syntax.NumberExpr():
                help_ = "write the number of entries, or the name of a dimension"
                self._report.error(
                    "A303", "a dimension must be an integer above 0", dim.span, "not above 0", help=help_
                )
                return 1
            case syntax.NameExpr(id=name) if name in FIXED_DIMENSIONS:
                return name
            case syntax.NameExpr():
                return self._named_dim(dim)
            case _:
                return self._resolver.resolve(dim, self._names)

    def _named_dim(self, dim: syntax.NameExpr) -> Dim:
        match self._names.get(dim.id):
            case None if dim.id in RESERVED_NAMES | FUNCTIONS:
                help_ = "the fixed dimensions are batch, head, kv_head, query, key, token, dk, dv"
                self._report.error("A303", f"`{dim.id}` is not a dimension", dim.span, help=help_)
                return dim.id
            case None:
                declare(self._report, self._names, dim, SizeSymbol(dim.span, dim.id))
                return dim.id
            case SizeSymbol():
                return dim.id
            case InputSymbol() | SegmentSymbol():
                self._report.error(
                    "A303", f"`{dim.id}` is not a dimension", dim.span, help="use a new name or a parameter"
                )
                return dim.id
            case _:
                return self._resolver.resolve(dim, self._names)
