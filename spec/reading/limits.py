"""Limits on the size of texts and expressions, small enough for every later stage to recurse over expressions."""

from __future__ import annotations

from lark import Token, Tree

from attnc.spec.reading.fault import Fault

MAX_TEXT_BYTES = 1 << 20
MAX_WORDS = 12_000
"""Maximum number of tokens in a text; time and memory of every later stage grow with it."""
MAX_BRACKETS = 64
"""Maximum depth of nested brackets."""
MAX_BLOCKS = 8
"""Maximum depth of nested bodies."""
MAX_DEPTH = 100
"""Maximum height of the tree of an expression. A chain of n binary operators has n levels."""
MAX_BRANCHES = 64
"""Maximum number of branches of a pattern; each branch is planned and computed separately."""
MAX_DIGITS = 40
MAX_EXPONENT = 250
"""Maximum exponent of a literal; with `MAX_DIGITS` it keeps every literal in the range of a float."""
MAX_NAME = 100

_CHAINS = frozenset({"sum", "product"})
_LEVELS = frozenset(
    {"choice", "disjunction", "conjunction", "negated", "comparison", "sum", "product", "signed", "power"}
    | {"attribute", "index", "call", "aggregate", "list"}
)
_MAX_STACK = 8 * (MAX_DEPTH + MAX_BRACKETS + MAX_BLOCKS)
"""Maximum size of the parser's stack; an expression of `MAX_DEPTH` levels never needs more."""
_USE_LET = "give names to its parts with `let`"


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
        raise Fault("A504", message, *_place(token), help="write a smaller exponent; to hide keys use `visible`")


def check_count(token: Token, number: int) -> None:
    """Raise `Fault` at the first token beyond the limit."""
    if number > MAX_WORDS:
        message = f"the text has more than {MAX_WORDS:,} tokens"
        help_ = "move large tables into an `input` tensor, or split a file of many patterns"
        raise Fault("A501", message, *_place(token), label="the first token too many", help=help_)


def check_brackets(opening: Token, depth: int) -> None:
    """Raise `Fault` if the bracket `opening` is nested too deep."""
    if depth > MAX_BRACKETS:
        message = f"brackets nest deeper than {MAX_BRACKETS} levels"
        raise Fault("A502", message, *_place(opening), label="this bracket is too deep", help=_USE_LET)


def check_blocks(start: int, end: int, depth: int) -> None:
    """Raise `Fault` if the body that starts here is nested too deep."""
    if depth > MAX_BLOCKS:
        raise Fault("A502", f"bodies nest deeper than {MAX_BLOCKS} levels", start, end, help="nest fewer blocks")


def check_stack(token: Token, size: int) -> None:
    """Raise `Fault` early, by the size of the parser's stack, for an expression that `check_tree` would refuse."""
    if size > _MAX_STACK:
        message = f"this expression nests deeper than {MAX_DEPTH} levels"
        raise Fault("A502", message, *_place(token), help=_USE_LET)


def check_tree(tree: Tree[Token]) -> None:
    """Raise `Fault` for an expression that is nested too deeply. Does not recurse."""
    pending: list[tuple[Tree[Token], int]] = [(tree, 0)]
    while pending:
        node, depth = pending.pop()
        levels = _levels(node)
        if depth + levels > MAX_DEPTH:
            raise _too_deep(node, levels)
        pending.extend((child, depth + levels) for child in reversed(node.children) if isinstance(child, Tree))


def _levels(node: Tree[Token]) -> int:
    """Return the number of `syntax.Expr` levels that a node of the parse tree becomes."""
    if node.data in _CHAINS:
        return len(node.children) // 2
    return int(node.data in _LEVELS)


def _too_deep(node: Tree[Token], levels: int) -> Fault:
    start, end = node.meta.start_pos, node.meta.end_pos
    if levels > MAX_DEPTH:
        message = f"a chain of {levels} operators; the limit is {MAX_DEPTH}"
        return Fault("A503", message, start, end, help=f"{_USE_LET}, or write a `sum(… for …)`")
    return Fault("A502", f"this expression nests deeper than {MAX_DEPTH} levels", start, end, help=_USE_LET)


def _place(token: Token) -> tuple[int, int]:
    start = token.start_pos or 0
    return start, start + len(token)
