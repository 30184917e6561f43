"""Check the declarations and clauses of a resolved pattern: types, stages and exactness.

In `combine`, expressions that are undefined where a selection is empty are reported too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from attnc.spec import program
from attnc.spec.checks.attention_clauses import AttentionChecker
from attnc.spec.checks.checker import Checker
from attnc.spec.checks.expression_forms import (
    Finding,
)
from attnc.spec.checks.measure import (
    below,
    children,
    expressions,
    expressions_of_selection,
    first_use,
    inputs_read,
    lines_of,
    recurrences_of,
)
from attnc.spec.diagnostics import DiagnosticList
from attnc.spec.names.resolve import ResolvedPattern
from attnc.spec.source import Span

_PER_CALL = {"size": "the sizes of a call", "length": "the length of a call"}
_PER_PAIR = {
    "q": "the query",
    "row": "the query",
    "k": "the key",
    "head": "the head",
    "batch": "the batch",
    "data": "an input",
}


def check_pattern(resolved: ResolvedPattern, report: DiagnosticList) -> program.Program:
    """Return the pattern with its stages filled in. Errors go to `report`; after an error the result is not valid."""
    pattern, unused = resolved.pattern, resolved.spare
    checker = PatternChecker(pattern, report)
    checker.check_declarations()
    requirements = tuple(checker.requirement(r) for r in pattern.requirements)
    needs = checker.relation(pattern.visible) | checker.round(pattern.round) | checker.attends()
    if resolved.whole and not report.failed:
        checker.check_learned()
        for recurrence in recurrences_of(pattern):
            checker.recurrent.check_states(recurrence)
    for definition in unused:
        if not definition.parameters:
            checker.find(program.DefinitionUse(definition.span, definition, ()), {}, None)
    needs_align = bool(recurrences_of(pattern)) or pattern.documents is not None or {"q", "k"} <= needs
    return replace(pattern, requirements=requirements, needs_align=needs_align)


class PatternChecker(Checker):
    """Checks the declarations and the clauses of one pattern."""

    # --- declarations ------------------------------------------------------------------------------------------------

    def check_declarations(self) -> None:
        """Check that dimensions and extents are integers that the parameters determine."""
        for parameter in self._pattern.parameters:
            for i, dim in enumerate(parameter.type.dims):
                if dim == "head" and i > 0:
                    help_ = f"write `head` first: `{parameter.type.kind}[head, …]`"
                    self._complain("A303", "`head` is not the first dimension", parameter.span, help=help_)
        types = [*(p.type for p in self._pattern.parameters), *(i.type for i in self._pattern.inputs)]
        for dim in (d for t in types for d in t.dims if not isinstance(d, str | int)):
            self._static(cast(program.Expr, dim), "a dimension")
        for segment in self._pattern.segments:
            for axis in segment.axes:
                if not isinstance(axis.extent, program.Size):
                    self._static(axis.extent, "an extent")

    def _static(self, node: program.Expr, what: str) -> None:
        finding = self.find(node, {}, None)
        self._rules.integer(node, finding, what)
        late = [phrase for need, phrase in (_PER_CALL | _PER_PAIR).items() if need in finding.needs]
        if late:
            message = f"{what} must be known when the pattern is compiled, but this depends on {late[0]}"
            self._complain("A406", message, node.span, "not a constant", help="use parameters and numbers")

    def requirement(self, item: program.Requirement) -> program.Requirement:
        """Return a `require` line with its stage filled in."""
        finding = self.find(item.condition, {}, None)
        self._rules.boolean(item.condition, finding, "the condition of `require`")
        late = [phrase for need, phrase in _PER_PAIR.items() if need in finding.needs]
        if late:
            message = f"`require` is checked once, and cannot depend on {late[0]}"
            help_ = "use parameters and sizes; for a list with an entry per head: `all(… for head in heads)`"
            self._complain("A406", message, item.condition.span, "differs from pair to pair", help=help_)
        return replace(item, stage="call" if finding.needs else "parameter")

    def attends(self) -> frozenset[str]:
        """Return the stages that the attentions and their combination need."""
        needs = frozenset[str]()
        for pad in self._pattern.pads:
            self._static(pad.low, "the end of a `pad` range")
            self._static(pad.high, "the end of a `pad` range")
        self._check_approximation()
        self._check_padded()
        facts = self.everywhere
        for line in self._pattern.visible if self._pattern.round is None else ():
            facts = self._guards.after(line, True, facts)
        attention = AttentionChecker(self, self._pattern, self._complain)
        for recurrence in recurrences_of(self._pattern):
            attention.outputs[recurrence.name] = self.recurrent.check(recurrence)
        for attend in self._pattern.attends:
            needs |= attention.check(attend, facts, self.everywhere)
        for selection in self._pattern.selections:
            needs |= attention.check_selection(selection, self.everywhere)
        if self._pattern.combine is not None:
            attention.check_combine(self._pattern.combine, self.everywhere)
            self._check_mixtures(self._pattern.combine)
        return needs

    def _check_approximation(self) -> None:
        steps = self._pattern.approximate
        if steps is None:
            return
        self._static(steps, "the number of steps")
        if not any(isinstance(node, program.Operation) and node.op == "solve" for node in below(self._roots())):
            message = "`approximate` has no effect: the pattern has no `solve`"
            self._complain("A223", message, steps.span, "nothing to approximate", help="remove the line")

    def _check_mixtures(self, combine: program.Expr) -> None:
        """Report expressions that are undefined where a selection is empty."""
        for span, name in unguarded_mixtures(combine):
            message = f"this is undefined where `{name}` is empty"
            help_ = f"give a value for that case: `… if {name}.size > 0 else near`"
            self._complain("A225", message, span, "no value for an empty selection", help=help_)

    def _check_padded(self) -> None:
        """Report reads of a key's position in a pattern with padding: a padded key has coordinates but no position."""
        if not self._pattern.pads:
            return
        tested = {id(node.item) for node in below(self._roots()) if isinstance(node, program.SelectedTest)}
        for node in below(self._roots()):
            if isinstance(node, program.PositionRead) and node.place == "k" and id(node) not in tested:
                axes = ", ".join(f"`k.{axis.name}`" for axis in self._pattern.pads[0].segment.axes)
                message = "`k` has no position here: a padded key is not a token"
                self._complain("A206", message, node.span, "which position?", help=f"read its coordinates: {axes}")

    def _roots(self) -> list[program.Expr]:
        """Return every expression of the relation, the selections, the recurrences and the attentions."""
        pattern = self._pattern
        roots = [] if pattern.combine is None else [pattern.combine]
        for recurrence in recurrences_of(pattern):
            roots += lines_of(recurrence)
        for selection in pattern.selections:
            roots += expressions_of_selection(selection)
        return [*pattern.visible, *roots, *(e for attend in pattern.attends for e in expressions(attend))]

    def check_learned(self) -> None:
        """Report learned tensors that nothing reads, and that training would never change."""
        read = inputs_read(self._roots())
        for tensor in self._pattern.inputs:
            if tensor.learned and tensor not in read:
                message = f"nothing reads the learned tensor `{tensor.name}`"
                help_ = "read it in `score`, or remove it"
                self._complain("A222", message, tensor.span, "never trained", help=help_)

    def relation(self, lines: tuple[program.Expr, ...]) -> frozenset[str]:
        """Return the stages that the conjunction of the `visible` lines needs."""
        facts = self.everywhere
        needs: frozenset[str] = frozenset()
        for line in lines:
            finding = self.find(line, {}, facts)
            self._rules.boolean(line, finding, "`visible`")
            facts = self._guards.after(line, True, facts)
            needs |= finding.needs
        return needs

    def round(self, item: program.RoundClause | None) -> frozenset[str]:
        """Return the stages that the units and the condition of a `round` need; none for a pattern without `round`."""
        if item is None:
            return frozenset()
        facts = self.everywhere
        unit_findings = {unit: self.unit(unit, facts) for unit in (item.q, item.k)}
        env = {
            unit.binder: Finding(finding.form, finding.needs - {"q", "k"}, None, finding.natural)
            for unit, finding in unit_findings.items()
        }
        keep = self.find(item.keep, env, facts)
        self._rules.boolean(item.keep, keep, "the condition of `keep`")
        for unit in (item.q, item.k):
            self._check_whole_blocks(item, unit)
        return keep.needs.union(*(finding.needs for finding in unit_findings.values()))

    def _check_whole_blocks(self, item: program.RoundClause, unit: program.Unit) -> None:
        """Report a read of a single query or key in `keep`, which decides about whole blocks."""
        span = first_use(item.keep, unit.place, self._measures)
        if span is not None:
            name = unit.binder.name
            message = f"`keep` decides about whole blocks, but this depends on a single `{unit.place}`"
            help_ = f"aggregate over the block: `any(… for {unit.place} in {name})`; the block itself is `{name}`"
            self._complain("A206", message, span, f"which `{unit.place}` of `{name}`?", help=help_)


Mixture = tuple[Span, str]
"""The span of an expression that is undefined if a selection is empty, and the selection's name."""

_TURNED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}
_OPPOSITE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
_NONE: frozenset[str] = frozenset()


def unguarded_mixtures(node: program.Expr, filled: frozenset[str] = _NONE) -> Iterator[Mixture]:
    """Yield the mixtures of an expression that no condition guards against an empty selection.

    `filled` names the selections that are surely not empty where the expression is evaluated.
    """
    match node:
        case program.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
            yield from unguarded_mixtures(then, filled | _filled(condition, True))
            yield from unguarded_mixtures(otherwise, filled | _filled(condition, False))
            return
        case program.Operation(op="div" | "share", operands=(_, divisor), span=span):
            yield from ((span, name) for name in sorted(_vanishing(divisor, filled)))
        case program.Operation(op="pow", operands=(base, exponent), span=span) if _is_negative(exponent):
            yield from ((span, name) for name in sorted(_vanishing(base, filled)))
        case program.Operation(op="log" | "log2", operands=(inner,), span=span):
            yield from ((span, name) for name in sorted(_vanishing(inner, filled)))
        case program.DefinitionUse(definition=definition):
            yield from unguarded_mixtures(definition.body, filled)
    for child in children(node):
        yield from unguarded_mixtures(child, filled)


def _vanishing(node: program.Expr, filled: frozenset[str]) -> frozenset[str]:
    """Return the selections that make a number 0 when they are empty."""
    match node:
        case program.Aggregate(op="sum" | "mean" | "count", condition=condition) if condition is not None:
            return frozenset(n.selection for n in _conditions(condition) if n.number is not None) - filled
        case program.SelectedCount(selection=selection):
            return frozenset({selection}) - filled
        case program.DefinitionUse(definition=definition):
            return _vanishing(definition.body, filled)
        case program.Operation(op="mul", operands=operands):
            return _NONE.union(*(_vanishing(operand, filled) for operand in operands))
        case program.Operation(op="add" | "sub" | "max" | "min", operands=(first, *rest)):
            return _vanishing(first, filled).intersection(*(_vanishing(operand, filled) for operand in rest))
        case program.Operation(op="neg" | "abs" | "sqrt", operands=(inner,)):
            return _vanishing(inner, filled)
        case program.Operation(op="div" | "share" | "pow", operands=(inner, _)):
            return _vanishing(inner, filled)
        case program.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
            sides = (then, _filled(condition, True)), (otherwise, _filled(condition, False))
            return _NONE.union(*(_vanishing(side, filled | guarded) for side, guarded in sides))
        case _:
            return _NONE


def _filled(condition: program.Expr, holds: bool) -> frozenset[str]:
    """Return the selections that are surely not empty where a condition has the truth value `holds`."""
    match condition:
        case program.DefinitionUse(definition=definition):
            return _filled(definition.body, holds)
        case program.Operation(op="not", operands=(inner,)):
            return _filled(inner, not holds)
        case program.Operation(op="and" | "or" as op, operands=operands):
            first, *rest = (_filled(operand, holds) for operand in operands)
            return first.union(*rest) if (op == "and") == holds else first.intersection(*rest)
        case program.Operation(op=op, operands=(a, b)) if op in _TURNED:
            if isinstance(b, program.SelectedCount):
                a, b, op = b, a, _TURNED[op]
            if not (isinstance(a, program.SelectedCount) and isinstance(b, program.Literal)):
                return _NONE
            return frozenset({a.selection}) if _excludes_0(op if holds else _OPPOSITE[op], b.value) else _NONE
        case _:
            return _NONE


def _excludes_0(op: str, bound: object) -> bool:
    """Whether the comparison `size op bound` is false for a size of 0."""
    if isinstance(bound, bool) or not isinstance(bound, int | float):
        return False
    below, same = bound > 0, bound == 0
    compared = {"lt": below, "le": below or same, "gt": bound < 0, "ge": bound <= 0, "eq": same, "ne": not same}
    return not compared[op]


def _is_negative(node: program.Expr) -> bool:
    match node:
        case program.Operation(op="neg"):
            return True
        case program.Literal(value=bool() | str()):
            return False
        case program.Literal(value=value):
            return value < 0
        case _:
            return False


def _conditions(node: program.Expr) -> Iterator[program.SelectedTest]:
    if isinstance(node, program.SelectedTest):
        yield node
    elif isinstance(node, program.Operation) and node.op == "and":
        for operand in node.operands:
            yield from _conditions(operand)
