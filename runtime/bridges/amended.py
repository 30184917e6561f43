"""A plain pattern with terms that a model asks of its scores: a cap, and logits of sinks."""

from __future__ import annotations

from attnc.runtime.attention import Attention
from attnc.runtime.call_errors import UnsupportedError
from attnc.runtime.identity import bound_program
from attnc.spec.reading.parse import parse
from attnc.spec.source import SourceFile
from attnc.spec.syntax import PatternDecl

SINKS = "sinks_of_the_model"
"""The input that sinks are given as."""


def amended(attend: Attention, *, cap: float | None, sinks: bool) -> Attention:
    """The pattern with scores kept within ±`cap`, and with `sinks` an input `SINKS`: a logit for each query head, whose
    share of the weight goes to no key.

    Raises UnsupportedError where the pattern has scores of its own.
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
        asked = " and ".join(([] if cap is None else [f"caps its scores at {cap:g}"]) + ["has sinks (s_aux)"] * sinks)
        raise UnsupportedError(
            f"the model {asked}, and `{attend.name}` has scores or weights of its own, so that it is not clear which "
            f"are meant: take a pattern that only says who sees whom, as the model's own terms are added to it"
        )
    return _with_clauses(attend, clauses)


def _with_clauses(attend: Attention, clauses: list[str]) -> Attention:
    """The pattern whose text has clauses more. Raises SpecError where it has them already."""
    source, name, values, options, modules = attend.__reduce__()[1]
    (written,) = (item for item in parse(source).items if isinstance(item, PatternDecl) and item.name.id == name)
    body, old = written.body, source.text
    if body.statements:
        at, first = body.statements[0].span.start, body.statements[0].span
        added = "".join(clause + "\n" + " " * (first.column - 1) for clause in clauses)
    else:
        assert body.doc is not None, f"the body of `{name}` is empty"
        at, first = body.doc.span.end, body.doc.span
        added = "".join("\n" + " " * (first.column - 1) + clause for clause in clauses)
    text = SourceFile(source.name, old[:at] + added + old[at:])
    return Attention(bound_program(text, name, values, modules), options, modules)
