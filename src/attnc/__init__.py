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
    from attnc.runtime.attention import Attention, compile_attention
    from attnc.runtime.call_errors import (
        ArgumentError,
        ArgumentTypeError,
        MeasurementError,
        PatternNotFoundError,
        TorchMissingError,
        UnsupportedError,
    )
    from attnc.runtime.fallbacks import Fallback, fallbacks, reset_fallbacks
    from attnc.runtime.gpu.binaries import load_binaries
    from attnc.runtime.merging import merge
    from attnc.runtime.tuning.tuned_tables import save_tuned
    from attnc.runtime.warned import LayoutWarning, NoGradientWarning, PatternWarning
    from attnc.spec.errors import AttncError, EvaluationError, SpecError

__version__ = "0.1.0"

_HOMES = {
    "Attention": "attnc.runtime.attention",
    "compile_attention": "attnc.runtime.attention",
    "load_binaries": "attnc.runtime.gpu.binaries",
    "merge": "attnc.runtime.merging",
    "save_tuned": "attnc.runtime.tuning.tuned_tables",
    "AttncError": "attnc.spec.errors",
    "SpecError": "attnc.spec.errors",
    "EvaluationError": "attnc.spec.errors",
    "ArgumentError": "attnc.runtime.call_errors",
    "ArgumentTypeError": "attnc.runtime.call_errors",
    "MeasurementError": "attnc.runtime.call_errors",
    "PatternNotFoundError": "attnc.runtime.call_errors",
    "TooManyStepsError": "attnc.compiler.ir.aggregates",
    "TorchMissingError": "attnc.runtime.call_errors",
    "UnsupportedError": "attnc.runtime.call_errors",
    "LayoutWarning": "attnc.runtime.warned",
    "NoGradientWarning": "attnc.runtime.warned",
    "PatternWarning": "attnc.runtime.warned",
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
        from attnc.runtime.call_errors import TorchMissingError

        raise TorchMissingError(f"`attnc.{name}`") from error
