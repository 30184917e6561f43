"""`compile_attention`: from a spec to a callable."""

from __future__ import annotations

from os import PathLike

from attnc.compiler.warnings.call_warnings import call_warnings
from attnc.runtime.api.attention import Attention
from attnc.runtime.api.compiled import Backend, Options
from attnc.runtime.choices.choice_source import read_wanted
from attnc.runtime.patterns.pattern_description import read_spec
from attnc.runtime.process.warned import warn_of_pattern


def compile_attention(
    spec: str | PathLike[str],
    *,
    preset: str | None = None,
    backend: Backend = "auto",
    strict: bool = False,
    deterministic: bool = True,
    tune: str | float | PathLike[str] = "model",
    **params: object,
) -> Attention:
    """Compile the attention that a spec describes.

    `spec`: text with a newline is source; a path, or a string that ends in `.attn` or reads `file.attn:name`, is a
    file; anything else names a pattern of the library. `params` are its parameters, `preset` one of its named parameter
    sets. `backend`: "auto" (kernels on a GPU, the cpu executor on a CPU), "cpu", "triton" (kernels; on a CPU in
    Triton's interpreter), or "reference" (dense, differentiable as often as torch allows). `strict`: raise
    UnsupportedError instead of running where no tile plan exists. Results are bitwise reproducible for the same input,
    whatever `deterministic` says. `tune`: "model" lets the cost model decide. A time ("2s", or seconds) lets the first
    call of a shape measure the first few schedules for that long, and the cache keeps the fastest ("0s": use the cache,
    measure nothing). The path of a table that `attnc tune … -o table.json` wrote takes every choice from that table.

    Warns with PatternWarning where a score reads no vectors (W008) or an even window is not centred (W009).

    Raises SpecError (the text or its parameters), PatternNotFoundError, ArgumentError, ArgumentTypeError.
    """
    options = Options(backend, strict, deterministic, read_wanted(tune)).checked()
    bound, modules = read_spec(spec, params, preset)
    attention = Attention(bound, options, modules)
    warn_of_pattern(bound.program.name, call_warnings(bound))
    return attention
