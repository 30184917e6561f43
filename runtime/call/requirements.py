"""Checks of `require` conditions that only a call can decide."""

from __future__ import annotations

from dataclasses import replace

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import Pattern
from attnc.compiler.lowering.lower_attention import TOKENS
from attnc.compiler.planning.build_plan import CallShape, conditions
from attnc.spec.diagnostics import Diagnostic, Label
from attnc.spec.errors import SpecError


def check_requirements(pattern: Pattern, shape: CallShape) -> None:
    """Raise SpecError (A805) for the first requirement that this call's sizes and heads violate.

    Requirements apply to the call's tokens, even where a branch has other keys.
    """
    sizes = replace(shape, n_k=shape.sizes.get(TOKENS, shape.n_k), shift=None)
    for condition, span in pattern.requirements:
        for local in conditions(pattern, sizes, condition):
            if not exact_evaluation.mask(local, (0, 1), (0, 1), pattern.origins).all():
                raise SpecError(
                    (
                        Diagnostic(
                            "A805",
                            f"this call does not meet `require {span.text.removeprefix('require').strip()}`",
                            Label(span, "required here"),
                            help=f"the call has {sizes.n_q} queries, {sizes.n_k} keys, {sizes.heads} heads over "
                            f"{sizes.kv_heads} kv heads",
                        ),
                    )
                )
