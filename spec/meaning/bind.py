"""Bind values to the parameters of a checked program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attnc.spec import program
from attnc.spec.checks.measure import children
from attnc.spec.diagnostics import Diagnostic, DiagnosticList, Label
from attnc.spec.errors import EvaluationError, SpecError
from attnc.spec.meaning.parameter_values import Mismatch, constant_value, convert, shown
from attnc.spec.program import BoundProgram, Parameter, Program, Value
from attnc.spec.suggest import did_you_mean

_NONE: Mapping[str, object] = {}


def bind(pattern: Program, values: Mapping[str, object] = _NONE, preset: str | None = None) -> BoundProgram:
    """Return the program with a value for each parameter: from `values`, else the preset, else the default.

    Numbers may be Python's, `Fraction`, `Decimal` or numpy scalars; a float stands for its shortest decimal.
    Raises `SpecError` for values that do not fit and for a `require` that does not hold.
    """
    report = DiagnosticList()
    chosen = _chosen_values(pattern, values, preset, report)
    bound = BoundProgram(pattern, _Binding(pattern, chosen, report).values())
    if not report.failed:
        _check_requirements(bound, report)
    if report.failed:
        raise SpecError(tuple(report.diagnostics))
    return bound


def _chosen_values(
    pattern: Program, values: Mapping[str, object], preset: str | None, report: DiagnosticList
) -> dict[str, object]:
    names = [p.name for p in pattern.parameters]
    for name in values:
        if name not in names:
            listed = (
                f"the parameters are {', '.join(f'`{n}`' for n in names)}" if names else "the pattern has no parameters"
            )
            help_ = did_you_mean(str(name), names, listed)
            report.error("A801", f"`{pattern.name}` has no parameter `{name}`", pattern.span, help=help_)
    valid = {name: value for name, value in values.items() if name in names}
    return {**_preset(pattern, preset, report), **valid}


def _preset(pattern: Program, preset: str | None, report: DiagnosticList) -> Mapping[str, object]:
    if preset is None:
        return {}
    for candidate in pattern.presets:
        if candidate.name == preset:
            return candidate.values
    names = [p.name for p in pattern.presets]
    listed = f"the presets are {', '.join(f'`{n}`' for n in names)}" if names else "the pattern has no presets"
    help_ = did_you_mean(preset, names, listed)
    report.error("A804", f"`{pattern.name}` has no preset `{preset}`", pattern.span, help=help_)
    return {}


def _intended_integer(value: object) -> int | None:
    """Return the integer that a float or a string stands for, such as 512.0 or "512"; None for other values."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19 else None


class _Binding:
    """Converts the values of parameters; lists last, because their lengths may depend on the other parameters."""

    def __init__(self, pattern: Program, chosen: Mapping[str, object], report: DiagnosticList) -> None:
        self._pattern = pattern
        self._chosen = chosen
        self._report = report
        self._values: dict[str, Value] = {}
        self._lengths: dict[str, int] = {}

    def values(self) -> dict[str, Value]:
        """Return the valid values of parameters, in the order of declaration; report errors for the others."""
        for parameter in sorted(self._pattern.parameters, key=lambda p: bool(p.type.dims)):
            self._bind(parameter)
        return {p.name: self._values[p.name] for p in self._pattern.parameters if p.name in self._values}

    def _bind(self, parameter: Parameter) -> None:
        name = parameter.name
        value = self._chosen.get(name, parameter.default)
        if value is None:
            self._missing(parameter)
            return
        try:
            lengths = tuple(self._length(dim) for dim in parameter.type.dims)
            self._values[name] = bound = convert(value, parameter.type, lengths)
        except Mismatch as fault:
            message = f"`{name}` expects {fault}"
            integer = _intended_integer(value) if parameter.type.kind == "int" and not parameter.type.dims else None
            help_ = f"give `{name}`, {_article(parameter)}" if integer is None else f"write `{name}={integer}`"
            self._report.error("A803", message, parameter.span, f"declared as {parameter.type}", help=help_)
            return
        except EvaluationError as error:
            self._report.extend(error.diagnostics)
            return
        self._record_lengths(parameter, bound)

    def _missing(self, parameter: Parameter) -> None:
        name, help_ = parameter.name, f"give `{parameter.name}`, {_article(parameter)}"
        message, label = f"the parameter `{name}` is missing", "it has no default"
        if name in self._chosen:
            message = f"`{name}` is None, which is not a value"
            if parameter.default is not None:
                label = f"its default is {shown(parameter.default)}"
                help_ = f"omit `{name}` to use its default, or {help_}"
        self._report.error("A802", message, parameter.span, label, help=help_)

    def _length(self, dim: object) -> int | None:
        match dim:
            case int():
                return dim
            case str():
                return self._lengths.get(dim)
            case _:
                return self._computed_length(dim)

    def _computed_length(self, dim: object) -> int | None:
        try:
            length = constant_value(BoundProgram(self._pattern, self._values), dim)  # type: ignore[arg-type]
        except KeyError:
            # A parameter in the dimension has no value, which is reported at that parameter.
            return None
        assert isinstance(length, int)
        if length < 1:
            raise Mismatch(f"at least one entry, got a dimension of {length}")
        return length

    def _record_lengths(self, parameter: Parameter, value: Value) -> None:
        for dim in parameter.type.dims:
            if isinstance(dim, str) and isinstance(value, tuple):
                self._lengths.setdefault(dim, len(value))
            value = value[0] if isinstance(value, tuple) else value


def _article(parameter: Parameter) -> str:
    kind = str(parameter.type)
    return f"{'an' if kind.startswith('int') else 'a'} {kind}"


# --- require ----------------------------------------------------------------------------------------------------------


def _check_requirements(bound: BoundProgram, report: DiagnosticList) -> None:
    for requirement in bound.program.requirements:
        if requirement.stage != "parameter":
            continue
        try:
            holds = constant_value(bound, requirement.condition)
        except EvaluationError as error:
            report.extend(tuple(_with_values(bound, requirement, d) for d in error.diagnostics))
            continue
        if not holds:
            text = " ".join(requirement.condition.span.text.split())
            label = _listed(bound, requirement)
            help_ = f"give values for which `{text}` holds"
            report.error("A805", f"`{bound.program.name}` requires `{text}`", requirement.span, label, help=help_)


def _with_values(bound: BoundProgram, requirement: program.Requirement, diagnostic: Diagnostic) -> Diagnostic:
    listed = Label(requirement.span, _listed(bound, requirement))
    return Diagnostic(diagnostic.code, diagnostic.message, diagnostic.primary, (listed,), diagnostic.help)


def _listed(bound: BoundProgram, requirement: program.Requirement) -> str:
    names = dict.fromkeys(_parameters(requirement.condition))
    return ", ".join(f"{name} = {shown(bound.values[name])}" for name in names)


def _parameters(node: program.Expr) -> Iterator[str]:
    """Yield the parameters that an expression reads, also through definitions."""
    pending: list[program.Expr] = [node]
    seen: set[program.Definition] = set()
    while pending:
        current = pending.pop()
        if isinstance(current, program.ParameterRead):
            yield current.name
        if isinstance(current, program.DefinitionUse) and current.definition not in seen:
            seen.add(current.definition)
            pending.append(current.definition.body)
        pending.extend(reversed(children(current)))
