"""Bind the arguments of a call to parameters as in Python: by position, by name, by default."""

from __future__ import annotations

from collections.abc import Mapping

from attnc.spec import syntax
from attnc.spec.diagnostics import DiagnosticList, Label
from attnc.spec.source import Span
from attnc.spec.suggest import did_you_mean


def bind_arguments(
    report: DiagnosticList,
    call: syntax.CallExpr,
    function: str,
    parameters: tuple[str, ...],
    variadic: bool,
    defaults: Mapping[str, syntax.Expr],
    declared: Span | None = None,
) -> tuple[syntax.Expr, ...] | None:
    """Return an expression for each parameter, in order; None after an error about the call was reported."""
    also = (Label(declared, "declared here"),) if declared else ()
    shown_parameters = [f"{p} = {defaults[p].span.text}" if p in defaults else p for p in parameters]
    signature = f"`{function}({', '.join(shown_parameters)}{', …' if variadic else ''})`"

    def refuse(message: str, span: Span, help_: str = "") -> None:
        report.error("A305", message, span, also=also, help=help_ or f"call it as {signature}")

    bound: dict[str, syntax.Expr] = {}
    extra: list[syntax.Expr] = []
    for i, argument in enumerate(call.arguments):
        if argument.name is None:
            if i and call.arguments[i - 1].name is not None:
                refuse("an argument without a name follows an argument with a name", argument.span)
                return None
            if i < len(parameters):
                bound[parameters[i]] = argument.value
            else:
                extra.append(argument.value)
            continue
        name = argument.name.id
        if name not in parameters:
            help_ = did_you_mean(name, parameters, f"call it as {signature}")
            refuse(f"`{function}` has no parameter `{name}`", argument.name.span, help_)
            return None
        if name in bound:
            refuse(f"`{name}` is given twice", argument.span)
            return None
        bound[name] = argument.value
    if extra and not variadic:
        plural = "" if len(parameters) == 1 else "s"
        message = f"`{function}` takes {len(parameters)} argument{plural}, got {len(call.arguments)}"
        refuse(message, extra[0].span)
        return None
    missing = [p for p in parameters if p not in bound and p not in defaults]
    if missing:
        listed = ", ".join(f"`{m}`" for m in missing)
        refuse(f"this call of `{function}` is missing {listed}", call.span)
        return None
    return (*(bound[p] if p in bound else defaults[p] for p in parameters), *extra)
