"""A pattern that is analysed before it is compiled, for commands that run without torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING

from attnc.compiler.lowering.lower import lower
from attnc.compiler.warnings.call_warnings import call_warnings
from attnc.runtime.call.call_errors import needing_torch
from attnc.runtime.patterns.pattern_analysis import PatternAnalysis
from attnc.runtime.patterns.pattern_description import read_spec
from attnc.runtime.process.warned import warn_of_pattern

if TYPE_CHECKING:
    from attnc.runtime.api.attention import Attention


class UncompiledAnalysis(PatternAnalysis):
    """A pattern with everything known without tensors, compiled when something needs a call of it."""

    @cached_property
    def _compiled(self) -> Attention:
        with needing_torch(f"a call of `{self.name}`"):  # imported here, so that torch may be missing
            from attnc.runtime.api.attention import Attention  # needs torch, which may be missing
            from attnc.runtime.api.compiled import Options  # needs torch, which may be missing
        return Attention(self._bound, Options(), self._modules)


def analyse(spec: str | PathLike[str], params: Mapping[str, object], preset: str | None) -> UncompiledAnalysis:
    """Return the pattern that a spec names, uncompiled; errors and warnings are those of `compile_attention`."""
    bound, modules = read_spec(spec, params, preset)
    analysis = UncompiledAnalysis(bound, modules, lower(bound))
    warn_of_pattern(bound.program.name, call_warnings(bound))
    return analysis
