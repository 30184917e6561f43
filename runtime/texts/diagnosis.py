"""All errors and warnings of a text, as `attnc check` prints them."""

from __future__ import annotations

from attnc.compiler.warnings.pattern_warnings import warnings_of
from attnc.spec.diagnostics import Diagnostic, Severity
from attnc.spec.errors import SpecError
from attnc.spec.load import check_source, load_programs
from attnc.spec.meaning.bind import bind
from attnc.spec.names.module_scopes import Loader
from attnc.spec.source import SourceFile


def diagnosed(source: SourceFile, loader: Loader) -> tuple[Diagnostic, ...]:
    """Return diagnostics of checking and, without errors, of compiling patterns with defaults for all parameters."""
    diagnostics = list(check_source(source, loader))
    if any(diagnostic.severity is Severity.ERROR for diagnostic in diagnostics):
        return tuple(diagnostics)
    for program in load_programs(source, loader):
        if any(parameter.default is None for parameter in program.parameters):
            continue
        try:
            diagnostics.extend(warnings_of(bind(program)))
        except SpecError as error:
            diagnostics.extend(error.diagnostics)
    return tuple(diagnostics)
