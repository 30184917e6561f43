"""The verifier of the IR: nodes are in normal form, numbers and truth values of the right kind, and names declared.

Results of passes that are decorated with `verified`, or passed to `checked`, are verified while `verify_passes` is on,
as in the test suite and under `ATTNC_VERIFY_IR=1`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from math import gcd
from typing import ParamSpec, TypeVar, cast

from attnc.compiler.ir.integer_operations import INTEGER_OPERATIONS
from attnc.compiler.ir.nodes import (
    VALUES,
    Arith,
    Bool,
    Compare,
    Const,
    Coord,
    DataRead,
    Element,
    ExactSelect,
    Index,
    Linear,
    Lookup,
    Not,
    Position,
    Reduce,
    Softmax,
    StateAt,
    TableRead,
    Tensor,
    Truth,
    UnitCondition,
    Value,
    ValueReduce,
    Var,
    intern,
    is_truth,
)
from attnc.compiler.ir.pattern import (
    Attend,
    Pattern,
    Recur,
    Selection,
)
from attnc.compiler.ir.print_ir import print_index
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.ir.value_nodes import (
    output,
    output_lse,
    output_of_state,
    values_of,
)

P = ParamSpec("P")
IR = TypeVar("IR", bound="Pattern | Attend | Index | Value")

_is_on = False


class IRInvalid(AssertionError):  # noqa: N818  a broken invariant of ours, not an error of the user
    """Raised where a pattern breaks an invariant. `violations` lists every violation."""

    def __init__(self, violations: tuple[str, ...]) -> None:
        self.violations = violations
        super().__init__("\n".join(violations))


def verify(pattern: Pattern) -> None:
    """Raise IRInvalid unless the pattern is well formed."""
    violations = tuple(find_violations(pattern))
    if violations:
        raise IRInvalid(violations)


def verify_passes(on: bool = True) -> None:
    """Switch the verification of the results of passes on or off, for this process."""
    global _is_on  # noqa: PLW0603  one switch for the process, as an environment variable is
    _is_on = on


def verified(run_pass: Callable[P, IR]) -> Callable[P, IR]:
    """Decorate a pass that returns a pattern, an attention or an expression: verify the result as `checked` does."""

    @wraps(run_pass)
    def run(*args: P.args, **kwargs: P.kwargs) -> IR:
        return checked(run_pass(*args, **kwargs), f"`{run_pass.__name__}`")

    return run


def checked(result: IR, where: str = "the result") -> IR:
    """Return the result of a pass unchanged; raise IRInvalid if it is not well formed while `verify_passes` is on.

    A pattern is verified as a whole. In attentions and expressions only the nodes are verified, because the tensors and
    variables that they may read are unknown; `where` names the pass that returned them.
    """
    if not _is_on:
        return result
    if isinstance(result, Pattern):
        verify(result)
        return result
    roots: tuple[object, ...] = (result.visible, *values_of(result)) if isinstance(result, Attend) else (result,)
    violations = tuple(violation for root in roots for violation in _nodes_of(cast("Index", root), where))
    if violations:
        raise IRInvalid(violations)
    return result


def find_violations(pattern: Pattern) -> Iterator[str]:
    """Yield every broken invariant, as a phrase."""
    names = [node.name for node in pattern.nodes]
    if len(set(names)) != len(names):
        yield "two nodes have the same name"
    if pattern.combine is None and (len(names) != (pattern.recur is None) or pattern.stateful):
        yield "several nodes, but no `combine`"
    for recur in pattern.stateful if pattern.recur is None else (pattern.recur,):
        yield from _recurrence(recur)
    if len({tensor.name for tensor in pattern.tensors}) != len(pattern.tensors):
        yield "two tensors have the same name"
    if pattern.documents is not None and pattern.documents not in pattern.tensors:
        yield f"documents `{pattern.documents.name}` is not declared"
    yield from _nodes(pattern)
    for condition, span in pattern.requirements:
        yield from _condition(condition, pattern.tensors, f"the requirement at {span}")
    for segment in pattern.segments:
        for expression in (segment.offset, segment.length, *(extent for _, extent in segment.axes)):
            yield from _number(expression, pattern.tensors, f"segment `{segment.name}`")


def _recurrence(recur: Recur) -> Iterator[str]:
    """Check that steps count the versions of their states, and read no version before it is computed."""
    versions = {state.name: 0 for state in recur.states}
    for step in recur.steps:
        if versions.get(step.state) != step.version:
            yield f"the step of `{step.state}` from version {step.version} is out of order"
        yield from _versions(step.value, versions, f"a step of `{step.state}`")
        versions[step.state] = step.version + 1
    yield from _versions(recur.read, None, "the read")


def _versions(value: Value, computed: dict[str, int] | None, where: str) -> Iterator[str]:
    for node in value.below:
        if isinstance(node, StateAt) and computed is not None and node.version > computed.get(node.name, -1):
            yield f"{where} reads version {node.version} of `{node.name}` before it is computed"


def _nodes(pattern: Pattern) -> Iterator[str]:
    tensors = pattern.tensors + tuple(map(output_of_state, pattern.stateful))
    computed = tuple(tensor for node in pattern.nodes for tensor in (output(node), output_lse(node)))
    selected = tuple(item.given for item in pattern.selections)
    for item in pattern.selections:
        if (
            item.given not in pattern.tensors
        ):  # otherwise the caller computes it, from inputs that are not declared here
            yield from _selection(item, tensors + computed + selected)
    tensors += selected
    for node in pattern.nodes:
        yield from _attend(node, tensors)
        tensors += (output(node), output_lse(node))
    for value, where in ((pattern.combine, "combine"), (pattern.lse, "the LSE")):
        if value is not None:
            yield from _value(value, tensors, where, frozenset())


def _selection(item: Selection, tensors: tuple[Tensor, ...]) -> Iterator[str]:
    """Check what a selection ranks, keeps and counts; it may read earlier selections."""
    where = f"the selection `{item.name}`"
    if item.given.kind != "bool":
        yield f"{where} gives `{item.given.name}`, which does not hold truth values"
    for number, word in (
        (item.rows, "rows"),
        (item.row_of, "row"),
        (item.items, "items"),
        (item.item_of, "item"),
    ):
        if number is not None:
            yield from _number(number, tensors, f"the {word} of {where}")
    for condition, word in ((item.candidates, "candidates"), (item.always, "always")):
        yield from _condition(condition, tensors, f"`{word}` of {where}")
    for value, word in ((item.score, "score"), (item.keep, "keep")):
        yield from _value(value, tensors, f"the {word} of {where}", frozenset())


def _attend(node: Attend, tensors: tuple[Tensor, ...]) -> Iterator[str]:
    bound = frozenset(loop[0] for loop in (node.family, node.stack) if loop is not None)
    yield from _condition(node.visible, tensors, f"visible of `{node.name}`", bound)
    weights = node.weights.extra if isinstance(node.weights, Softmax) else node.weights
    for value, word in ((node.score, "score"), (weights, "weights"), (node.value, "value")):
        if value is not None:
            yield from _value(value, tensors, f"{word} of `{node.name}`", bound)


def _condition(
    root: Index, tensors: tuple[Tensor, ...], where: str, bound: frozenset[Var] = frozenset()
) -> Iterator[str]:
    if not is_truth(root):
        yield f"{where}: `{print_index(root)}` is not a truth value"
    yield from _expression(root, tensors, where, bound)


def _value(root: Value, tensors: tuple[Tensor, ...], where: str, loop_variables: frozenset[Var]) -> Iterator[str]:
    """Check the tensors that a value reads, and its exact expressions, whose variables its totals must bind."""
    bound = loop_variables | {node.var for node in root.below if isinstance(node, ValueReduce)}
    for node in root.below:
        if isinstance(node, Element):
            if node.tensor not in tensors or not node.tensor.is_floating:
                yield f"{where}: the tensor `{node.tensor.name}` does not hold floating-point numbers"
            if len(node.indices) > len(node.tensor.dims):
                yield f"{where}: `{node.tensor.name}` is read with {len(node.indices)} indices"
        if not isinstance(node, VALUES):
            continue
        for child in node.children():
            if isinstance(child, VALUES):
                continue
            free = free_variables(child) - bound
            yield from (f"{where}: the variable `{print_index(name)}` is unbound" for name in free)
            for below in walk(child):
                if isinstance(below, VALUES):
                    continue
                yield from (f"{where}: `{print_index(below)}`: {violation}" for violation in violations_of(below))


def _number(root: Index, tensors: tuple[Tensor, ...], where: str) -> Iterator[str]:
    if is_truth(root):
        yield f"{where}: `{print_index(root)}` is not a number"
    yield from _expression(root, tensors, where)


def _expression(
    root: Index, tensors: tuple[Tensor, ...], where: str, bound: frozenset[Var] = frozenset()
) -> Iterator[str]:
    for name in free_variables(root) - bound:
        yield f"{where}: the variable `{print_index(name)}` is unbound"
    yield from _nodes_of(root, where)
    for node in walk(root):
        if isinstance(node, Lookup) and node.tensor not in tensors:
            yield f"{where}: the tensor `{node.tensor.name}` is not declared"


def _nodes_of(root: Index, where: str) -> Iterator[str]:
    """Check every exact node of an expression on its own."""
    for node in walk(root):
        if isinstance(node, VALUES):  # below a `RoundToInt`
            continue
        for violation in violations_of(node):
            yield f"{where}: `{print_index(node)}`: {violation}"


def free_variables(root: Index) -> frozenset[Var]:
    """Return the variables of an expression that no aggregate in it binds."""
    free: dict[Index, frozenset[Var]] = {}
    for node in walk(root):
        if isinstance(node, Var):
            free[node] = frozenset((node,))
            continue
        below = [free[child] for child in node.children()]
        if isinstance(node, Reduce):
            below = [free[node.low], free[node.high], (free[node.condition] | free[node.body]) - {node.var}]
        elif isinstance(node, UnitCondition):
            below = [*below[:-1], below[-1] - {*node.q_vars, *node.k_vars}]
        free[node] = frozenset().union(*below)
    return free[root]


def violations_of(node: Index) -> Iterator[str]:
    """Yield the violated invariants of a node, but not those of its operands."""
    if intern(node) is not node:
        yield "it is not interned"
    rule = _RULES.get(type(node))
    if rule is not None:
        yield from rule(node)


def _numbers(*operands: Index) -> Iterator[str]:
    for operand in operands:
        if is_truth(operand):
            yield f"`{print_index(operand)}` is not a number"


def _truths(*operands: Index) -> Iterator[str]:
    for operand in operands:
        if not is_truth(operand):
            yield f"`{print_index(operand)}` is not a truth value"


def _linear(node: Linear) -> Iterator[str]:
    terms = [term for term, _ in node.terms]
    yield from _numbers(*terms)
    if any(isinstance(term, Linear | Const) for term in terms):
        yield "a term is itself a sum or a constant"
    if any(factor == 0 for _, factor in node.terms):
        yield "a coefficient is 0"
    digests = [term.digest for term in terms]
    if digests != sorted(set(digests)):
        yield "its terms are not sorted, or not distinct"
    if not terms or (len(terms) == 1 and node.terms[0][1] == 1 and node.constant == 0):
        yield "it is not a sum"


def _arith(node: Arith) -> Iterator[str]:
    yield from _numbers(*node.operands)
    operation = INTEGER_OPERATIONS.get(node.op)
    if operation is None:
        yield f"`{node.op}` is not an operation"
    elif operation.variadic:
        if len(node.operands) < 2:
            yield f"`{node.op}` of fewer than two operands"
    elif len(node.operands) != len(operation.parameters):
        yield f"`{node.op}` takes {len(operation.parameters)} operands"
    if node.op in ("mul", "min", "max") and [n.digest for n in node.operands] != sorted(
        n.digest for n in node.operands
    ):
        yield "its operands are not sorted"
    if node.op == "mul" and any(isinstance(operand, Const) for operand in node.operands):
        yield "a product with a constant should be a sum"


def _coord(node: Coord) -> Iterator[str]:
    yield from _numbers(*node.children())


def _table(node: TableRead) -> Iterator[str]:
    yield from _numbers(node.index)
    if not node.values:
        yield "an empty table"


def _lookup(node: Lookup) -> Iterator[str]:
    yield from _numbers(*node.indices)
    if len(node.indices) != len(node.tensor.dims):
        yield f"{len(node.indices)} indices for {len(node.tensor.dims)} dimensions"


def _data(node: DataRead) -> Iterator[str]:
    yield from _numbers(*node.indices)
    if len(node.indices) != node.data.array.ndim:
        yield f"{len(node.indices)} indices for {node.data.array.ndim} dimensions"


def _reduce(node: Reduce) -> Iterator[str]:
    yield from _numbers(node.low, node.high)
    yield from _truths(node.condition)
    yield from _truths(node.body) if node.op in ("any", "all") else _numbers(node.body)


def _round(node: UnitCondition) -> Iterator[str]:
    yield from _numbers(*node.q_units, *node.k_units)
    yield from _truths(node.keep)
    if (len(node.q_vars), len(node.k_vars)) != (len(node.q_units), len(node.k_units)):
        yield "its units and their variables differ in number"
    for place, units in (("k", node.q_units), ("q", node.k_units), ("q", (node.keep,)), ("k", (node.keep,))):
        if any(isinstance(below, Position) and below.name == place for unit in units for below in walk(unit)):
            yield f"`{place}` is not allowed here"


def _compare(node: Compare) -> Iterator[str]:
    yield from _numbers(node.value)
    if isinstance(node.value, Const):
        yield "its value is a constant"
    if not isinstance(node.value, Linear):
        return
    factors = [factor for _, factor in node.value.terms]
    if gcd(*factors) != 1:
        yield "its coefficients have a common divisor"
    if node.op == "eq" and factors[0] < 0:
        yield "its first coefficient is negative"


def _bool(node: Bool) -> Iterator[str]:
    yield from _truths(*node.operands)
    if len(node.operands) < 2 or len(set(node.operands)) != len(node.operands):
        yield "fewer than two operands, or equal operands"
    for operand in node.operands:
        if isinstance(operand, Truth) or (isinstance(operand, Bool) and operand.op == node.op):
            yield f"`{print_index(operand)}` should have been folded into it"


def _not(node: Not) -> Iterator[str]:
    yield from _truths(node.operand)
    if isinstance(node.operand, Not | Truth) or (isinstance(node.operand, Compare) and node.operand.op == "ge"):
        yield "it has a form without `not`"


def _choice(node: ExactSelect) -> Iterator[str]:
    yield from _truths(node.condition)
    if is_truth(node.then) != is_truth(node.otherwise):
        yield "one side is a number, the other a truth value"
    if node.then is node.otherwise:
        yield "its sides are equal"
    if isinstance(node.condition, Not | Truth):
        yield "its condition should have been folded"


_RULES: dict[type, Callable[..., Iterator[str]]] = {
    Linear: _linear,
    Arith: _arith,
    Coord: _coord,
    TableRead: _table,
    Lookup: _lookup,
    DataRead: _data,
    Reduce: _reduce,
    Compare: _compare,
    Bool: _bool,
    Not: _not,
    ExactSelect: _choice,
    UnitCondition: _round,
}
"""The rules of each class; nodes of other classes are always well formed."""
