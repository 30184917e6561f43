"""All that is wrong or doubtful in a text: what `attnc check` says."""

from __future__ import annotations

from attnc.compiler.pattern_warnings import warnings_of
from attnc.spec.diagnostics import Diagnostic, Severity
from attnc.spec.errors import SpecError
from attnc.spec.load import Loader, check_source, load_programs
from attnc.spec.meaning.bind import bind
from attnc.spec.source import SourceFile


def diagnosed(source: SourceFile, loader: Loader) -> tuple[Diagnostic, ...]:
    """What checking finds and, where that is no error, what compiling finds in the patterns with defaults for all."""
    found = list(check_source(source, loader))
    if any(diagnostic.severity is Severity.ERROR for diagnostic in found):
        return tuple(found)
    for program in load_programs(source, loader):
        if any(parameter.default is None for parameter in program.parameters):
            continue
        try:
            found.extend(warnings_of(bind(program)))
        except SpecError as error:
            found.extend(error.diagnostics)
    return tuple(found)
