"""Add a model's own score terms to a plain pattern: a soft cap, and the logits of attention sinks."""

from __future__ import annotations

from attnc.runtime.api.attention import Attention
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.texts.identity import bound_program
from attnc.spec.reading.parse import parse
from attnc.spec.source import SourceFile
from attnc.spec.syntax import PatternDecl

SINKS = "sinks_of_the_model"
"""The name of the pattern's input that holds the sinks."""


def amended(attend: Attention, *, cap: float | None, sinks: bool) -> Attention:
    """Return the pattern with scores softly capped to ±`cap` and, with `sinks`, an input `SINKS`.

    The input holds a logit for each query head, whose share of the weight goes to no key.

    Raises UnsupportedError where the pattern has scores or weights of its own.
    """
    clauses = []
    if cap is not None:
        bound = repr(float(cap))
        clauses.append(f"score   {bound} * tanh(scale * dot(q, k) / {bound})")
    if sinks:
        clauses.append(f"input   {SINKS}: real[head]")
        clauses.append(f"weights softmax(score, extra = {SINKS})")
    if not clauses:
        return attend
    if not attend.is_plain:
        terms = " and ".join(([] if cap is None else [f"caps its scores at {cap:g}"]) + ["has sinks (s_aux)"] * sinks)
        raise UnsupportedError(
            f"the model {terms}, and `{attend.name}` has scores or weights of its own, so that it is ambiguous "
            f"which apply: use a pattern that only defines visibility, and the model's terms are added to it"
        )
    return _with_clauses(attend, clauses)


def _with_clauses(attend: Attention, clauses: list[str]) -> Attention:
    """Return the pattern with clauses added to its text. Raises SpecError where the pattern has them already."""
    source, name, values, options, modules = attend.__reduce__()[1]
    (declaration,) = (item for item in parse(source).items if isinstance(item, PatternDecl) and item.name.id == name)
    body, old_text = declaration.body, source.text
    if body.statements:
        offset, span = body.statements[0].span.start, body.statements[0].span
        added = "".join(clause + "\n" + " " * (span.column - 1) for clause in clauses)
    else:
        assert body.doc is not None, f"the body of `{name}` is empty"
        offset, span = body.doc.span.end, body.doc.span
        added = "".join("\n" + " " * (span.column - 1) + clause for clause in clauses)
    text = SourceFile(source.name, old_text[:offset] + added + old_text[offset:])
    return Attention(bound_program(text, name, values, modules), options, modules)
