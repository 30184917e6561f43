"""Types, stages and exactness of a resolved pattern: its declarations and clauses, one by one."""

from __future__ import annotations

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
    expressions,
    expressions_of_selection,
    first_use,
    inputs_read,
    lines_of,
    recurrences_of,
)
from attnc.spec.checks.mixtures import of_nothing
from attnc.spec.names.resolve import ResolvedPattern
from attnc.spec.report import DiagnosticList

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
    """The pattern with its stages filled in. What is wrong goes to `report`; the result is then of no use."""
    pattern, spare = resolved.pattern, resolved.spare
    checker = PatternChecker(pattern, report)
    checker.check_declarations()
    requirements = tuple(checker.requirement(r) for r in pattern.requirements)
    needs = checker.relation(pattern.visible) | checker.round(pattern.round) | checker.attends()
    if resolved.whole and not report.failed:
        checker.check_learned()
        for recurrence in recurrences_of(pattern):
            checker.recurrent.check_states(recurrence)
    for definition in spare:
        if not definition.parameters:
            checker.find(program.DefinitionUse(definition.span, definition, ()), {}, None)
    needs_align = bool(recurrences_of(pattern)) or pattern.documents is not None or {"q", "k"} <= needs
    return replace(pattern, requirements=requirements, needs_align=needs_align)


class PatternChecker(Checker):
    """Checks the declarations and the clauses of one pattern."""

    # --- declarations ------------------------------------------------------------------------------------------------

    def check_declarations(self) -> None:
        """Dimensions and extents: integers, known with the parameters."""
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
        found = self.find(node, {}, None)
        self._rules.integer(node, found, what)
        late = [words for need, words in (_PER_CALL | _PER_PAIR).items() if need in found.needs]
        if late:
            message = f"{what} is fixed when the pattern is compiled, and this depends on {late[0]}"
            self._complain("A406", message, node.span, "not a constant", help="use parameters and numbers")

    def requirement(self, item: program.Requirement) -> program.Requirement:
        """A `require` line with its stage."""
        found = self.find(item.condition, {}, None)
        self._rules.boolean(item.condition, found, "what `require` asks")
        late = [words for need, words in _PER_PAIR.items() if need in found.needs]
        if late:
            message = f"`require` is asked once, and this depends on {late[0]}"
            help_ = "use parameters and sizes; for a list by head: `all(… for head in heads)`"
            self._complain("A406", message, item.condition.span, "differs from pair to pair", help=help_)
        return replace(item, stage="call" if found.needs else "parameter")

    def attends(self) -> frozenset[str]:
        """Return the stages that the attentions and their combination need."""
        needs = frozenset[str]()
        for pad in self._pattern.pads:
            self._static(pad.low, "a range of `pad`")
            self._static(pad.high, "a range of `pad`")
        self._check_approximation()
        self._check_padded()
        facts = self._everywhere()
        for line in self._pattern.visible if self._pattern.round is None else ():
            facts = self._guards.after(line, True, facts)
        attention = AttentionChecker(self, self._pattern, self._complain)
        for recurrence in recurrences_of(self._pattern):
            attention.outputs[recurrence.name] = self.recurrent.check(recurrence)
        for attend in self._pattern.attends:
            needs |= attention.check(attend, facts, self._everywhere())
        for selection in self._pattern.selections:
            needs |= attention.check_selection(selection, self._everywhere())
        if self._pattern.combine is not None:
            attention.check_combine(self._pattern.combine, self._everywhere())
            self._check_mixtures(self._pattern.combine)
        return needs

    def _check_approximation(self) -> None:
        steps = self._pattern.approximate
        if steps is None:
            return
        self._static(steps, "the number of steps")
        if not any(isinstance(node, program.Operation) and node.op == "solve" for node in below(self._roots())):
            message = "nothing here is approximated: there is no `solve`"
            self._complain("A223", message, steps.span, "of what?", help="leave the line out")

    def _check_mixtures(self, combine: program.Expr) -> None:
        """Where something is divided by a sum over what was chosen, the case of nothing is said."""
        for span, name in of_nothing(combine):
            message = f"`{name}` may be empty, and what the mixture then is is not said"
            help_ = f"say it: `… if {name}.size > 0 else near`"
            self._complain("A225", message, span, "divided by nothing", help=help_)

    def _check_padded(self) -> None:
        """Where keys are padded, one of them may be no token, and has coordinates but no position."""
        if not self._pattern.pads:
            return
        asked = {id(node.item) for node in below(self._roots()) if isinstance(node, program.SelectedTest)}
        for node in below(self._roots()):
            if isinstance(node, program.PositionRead) and node.place == "k" and id(node) not in asked:
                axes = ", ".join(f"`k.{axis.name}`" for axis in self._pattern.pads[0].segment.axes)
                message = "`k` has no position here: beyond the tokens there are padded keys"
                self._complain("A206", message, node.span, "which position?", help=f"read its coordinates: {axes}")

    def _roots(self) -> list[program.Expr]:
        """Every expression of the relation and the attentions."""
        pattern = self._pattern
        combined = [] if pattern.combine is None else [pattern.combine]
        for recurrence in recurrences_of(pattern):
            combined += lines_of(recurrence)
        for selection in pattern.selections:
            combined += expressions_of_selection(selection)
        return [*pattern.visible, *combined, *(e for attend in pattern.attends for e in expressions(attend))]

    def check_learned(self) -> None:
        """A learned tensor that nothing reads would never learn."""
        read = inputs_read(self._roots())
        for tensor in self._pattern.inputs:
            if tensor.learned and tensor not in read:
                message = f"nothing reads the learned tensor `{tensor.name}`"
                help_ = "read it in `score`, or drop it"
                self._complain("A222", message, tensor.span, "it would never learn", help=help_)

    def relation(self, lines: tuple[program.Expr, ...]) -> frozenset[str]:
        """Return the stages that the conjunction of the `visible` lines needs."""
        facts = self._everywhere()
        needs: frozenset[str] = frozenset()
        for line in lines:
            found = self.find(line, {}, facts)
            self._rules.boolean(line, found, "`visible`")
            facts = self._guards.after(line, True, facts)
            needs |= found.needs
        return needs

    def round(self, item: program.RoundClause | None) -> frozenset[str]:
        """Return the stages that the units and the condition of a `round` need; none without a `round`."""
        if item is None:
            return frozenset()
        facts = self._everywhere()
        found = {unit: self._unit(unit, facts) for unit in (item.q, item.k)}
        env = {unit.binder: Finding(f.form, f.needs - {"q", "k"}, None, f.natural) for unit, f in found.items()}
        keep = self.find(item.keep, env, facts)
        self._rules.boolean(item.keep, keep, "what `keep` asks")
        for unit in (item.q, item.k):
            self._check_bound(item, unit)
        return keep.needs.union(*(f.needs for f in found.values()))

    def _check_bound(self, item: program.RoundClause, unit: program.Unit) -> None:
        """In a block there is no one query and no one key: each runs over its unit."""
        at = first_use(item.keep, unit.place, self._measures)
        if at is not None:
            name = unit.binder.name
            message = f"`keep` asks about whole blocks, and this depends on one `{unit.place}` of them"
            help_ = f"let it run: `any(… for {unit.place} in {name})`; the block itself is `{name}`"
            self._complain("A206", message, at, f"which `{unit.place}` of `{name}`?", help=help_)
