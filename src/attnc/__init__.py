"""attnc: attention patterns written once, as their mathematics.

`compile_attention` makes a callable from a library name, an `.attn` file or source text. Names are imported when first
used, so that `import attnc` stays fast. Operators are declared as soon as torch is imported, before or after attnc.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attnc.after_torch import declare_operators

if TYPE_CHECKING:
    from attnc.compiler.ir.aggregates import TooManyStepsError
    from attnc.compiler.simulation.machine import MachineError
    from attnc.runtime import bridges
    from attnc.runtime.api.attention import Attention
    from attnc.runtime.api.compile_attention import compile_attention
    from attnc.runtime.call.call_errors import (
        ArgumentError,
        ArgumentTypeError,
        MeasurementError,
        PatternNotFoundError,
        TorchMissingError,
        UnsupportedError,
    )
    from attnc.runtime.choices.tuned_tables import save_tuned
    from attnc.runtime.fallbacks import Fallback, fallbacks, reset_fallbacks
    from attnc.runtime.process.warned import LayoutWarning, NoGradientWarning, PatternWarning
    from attnc.runtime.toolchain.binaries import load_binaries
    from attnc.runtime.values.merging import merge
    from attnc.spec.errors import AttncError, EvaluationError, SpecError

__version__ = "0.1.0"

_HOMES = {
    "Attention": "attnc.runtime.api.attention",
    "compile_attention": "attnc.runtime.api.compile_attention",
    "load_binaries": "attnc.runtime.toolchain.binaries",
    "merge": "attnc.runtime.values.merging",
    "save_tuned": "attnc.runtime.choices.tuned_tables",
    "AttncError": "attnc.spec.errors",
    "SpecError": "attnc.spec.errors",
    "EvaluationError": "attnc.spec.errors",
    "ArgumentError": "attnc.runtime.call.call_errors",
    "ArgumentTypeError": "attnc.runtime.call.call_errors",
    "MeasurementError": "attnc.runtime.call.call_errors",
    "PatternNotFoundError": "attnc.runtime.call.call_errors",
    "TooManyStepsError": "attnc.compiler.ir.aggregates",
    "TorchMissingError": "attnc.runtime.call.call_errors",
    "UnsupportedError": "attnc.runtime.call.call_errors",
    "LayoutWarning": "attnc.runtime.process.warned",
    "NoGradientWarning": "attnc.runtime.process.warned",
    "PatternWarning": "attnc.runtime.process.warned",
    "MachineError": "attnc.compiler.simulation.machine",
    "Fallback": "attnc.runtime.fallbacks",
    "fallbacks": "attnc.runtime.fallbacks",
    "reset_fallbacks": "attnc.runtime.fallbacks",
}

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Attention",
    "AttncError",
    "EvaluationError",
    "Fallback",
    "LayoutWarning",
    "MachineError",
    "MeasurementError",
    "NoGradientWarning",
    "PatternNotFoundError",
    "PatternWarning",
    "SpecError",
    "TooManyStepsError",
    "TorchMissingError",
    "UnsupportedError",
    "bridges",
    "compile_attention",
    "fallbacks",
    "load_binaries",
    "merge",
    "reset_fallbacks",
    "save_tuned",
]

declare_operators()


def __getattr__(name: str) -> Any:
    if name != "bridges" and name not in _HOMES:
        raise AttributeError(f"module 'attnc' has no attribute {name!r}")
    try:
        if name == "bridges":
            return import_module("attnc.runtime.bridges")
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from attnc.runtime.call.call_errors import TorchMissingError

        raise TorchMissingError(f"`attnc.{name}`") from error
