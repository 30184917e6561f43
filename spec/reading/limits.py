"""Limits on what a text may hold, so that every later stage may recurse over expressions without fear."""

from __future__ import annotations

from lark import Token, Tree

from attnc.spec.reading.fault import Fault

MAX_TEXT_BYTES = 1 << 20
MAX_WORDS = 12_000
"""The largest number of tokens in a text: time and memory of every later stage grow with it."""
MAX_BRACKETS = 64
"""How deep brackets may stand inside one another."""
MAX_BLOCKS = 8
"""How deep bodies may stand inside one another."""
MAX_DEPTH = 100
"""How many levels the tree of one expression may have. A chain of n binary operators has n levels."""
MAX_BRANCHES = 64
"""Branches of one pattern, each of which is planned and computed by itself."""
MAX_DIGITS = 40
MAX_EXPONENT = 250
"""The largest exponent of a literal; with `MAX_DIGITS` it keeps every literal inside the range of a float."""
MAX_NAME = 100

_CHAINS = frozenset({"sum", "product"})
_LEVELS = frozenset(
    {"choice", "disjunction", "conjunction", "negated", "comparison", "sum", "product", "signed", "power"}
    | {"attribute", "index", "call", "aggregate", "list"}
)
_MAX_STACK = 8 * (MAX_DEPTH + MAX_BRACKETS + MAX_BLOCKS)
"""No level takes more symbols of the grammar than this allows."""
_USE_LET = "name the parts of it with `let`"


def check_token(token: Token) -> None:
    """Raise `Fault` for a number or a name that is too long."""
    if token.type == "NUMBER":
        _check_number(token)
    elif token.type == "NAME" and len(token) > MAX_NAME:
        raise Fault(
            "A505", f"a name of {len(token)} characters; the limit is {MAX_NAME}", *_place(token), help="shorten it"
        )


def _check_number(token: Token) -> None:
    mantissa, _, exponent = token.lower().partition("e")
    digits = len(mantissa.replace(".", ""))
    if digits > MAX_DIGITS:
        message = f"a number of {digits} digits; the limit is {MAX_DIGITS}"
        raise Fault("A504", message, *_place(token), help="write fewer digits, or an exponent as in `1e30`")
    size = exponent.lstrip("+-").lstrip("0")
    # Compare lengths first: `int` refuses text of thousands of digits.
    if len(size) > len(str(MAX_EXPONENT)) or int(size or "0") > MAX_EXPONENT:
        message = f"the exponent of this number is beyond ±{MAX_EXPONENT}"
        raise Fault("A504", message, *_place(token), help="write a smaller one; what is hidden is said by `visible`")


def check_count(token: Token, number: int) -> None:
    """Raise `Fault` at the first word beyond the number that a text may hold."""
    if number > MAX_WORDS:
        message = f"the text has more than {MAX_WORDS:,} words and signs"
        help_ = "large tables belong in an `input` tensor, not in the text; split a file of many patterns"
        raise Fault("A501", message, *_place(token), label="the first word too many", help=help_)


def check_brackets(opening: Token, depth: int) -> None:
    """Raise `Fault` when `opening` is the bracket that goes too deep."""
    if depth > MAX_BRACKETS:
        message = f"brackets nest deeper than {MAX_BRACKETS} levels"
        raise Fault("A502", message, *_place(opening), label="this one is too deep", help=_USE_LET)


def check_blocks(start: int, end: int, depth: int) -> None:
    """Raise `Fault` when the body that starts here goes too deep."""
    if depth > MAX_BLOCKS:
        raise Fault("A502", f"bodies nest deeper than {MAX_BLOCKS} levels", start, end, help="write flatter blocks")


def check_stack(token: Token, size: int) -> None:
    """Raise `Fault` early, by the size of the parser's stack, for what `check_tree` would refuse at the end anyway."""
    if size > _MAX_STACK:
        message = f"this expression nests deeper than {MAX_DEPTH} levels"
        raise Fault("A502", message, *_place(token), help=_USE_LET)


def check_tree(tree: Tree[Token]) -> None:
    """Raise `Fault` for an expression that is nested too deeply. Does not recurse."""
    pending: list[tuple[Tree[Token], int]] = [(tree, 0)]
    while pending:
        node, depth = pending.pop()
        added = _levels(node)
        if depth + added > MAX_DEPTH:
            raise _too_deep(node, added)
        pending.extend((child, depth + added) for child in reversed(node.children) if isinstance(child, Tree))


def _levels(node: Tree[Token]) -> int:
    """How many levels of `syntax.Expr` a node of the parse tree becomes."""
    if node.data in _CHAINS:
        return len(node.children) // 2
    return int(node.data in _LEVELS)


def _too_deep(node: Tree[Token], added: int) -> Fault:
    start, end = node.meta.start_pos, node.meta.end_pos
    if added > MAX_DEPTH:
        message = f"a chain of {added} operators; the limit is {MAX_DEPTH}"
        return Fault("A503", message, start, end, help=f"{_USE_LET}, or write a `sum(… for …)`")
    return Fault("A502", f"this expression nests deeper than {MAX_DEPTH} levels", start, end, help=_USE_LET)


def _place(token: Token) -> tuple[int, int]:
    start = token.start_pos or 0
    return start, start + len(token)
