"""The language's own words for what the parser calls by terminal names, and remedies for what other languages write."""

from __future__ import annotations

from collections.abc import Iterable

_PHRASES = {
    "NAME": "a name",
    "NUMBER": "a number",
    "TRUTH": "`true` or `false`",
    "TEXT": "a text",
    "COMPARE": "a comparison",
    "PLUS": "`+` or `-`",
    "TIMES": "`*`, `/`, `//`, `%` or `@`",
    "POWER": "`**`",
    "DOTS": "`..`",
    "DOT": "`.`",
    "COMMA": "`,`",
    "COLON": "`:`",
    "EQUAL": "`=`",
    "LPAR": "`(`",
    "RPAR": "`)`",
    "LSQB": "`[`",
    "RSQB": "`]`",
    "_NL": "the end of the line",
    "$END": "the end of the text",
    "_INDENT": "an indented body",
    "_DEDENT": "the end of the body",
    "IF": "`if`",
    "ELSE": "`else`",
    "FOR": "`for`",
    "IN": "`in`",
    "AND": "`and`",
    "OR": "`or`",
    "NOT": "`not`",
    "PATTERN": "`pattern`",
    "DEF": "`def`",
    "USE": "`use`",
}
_EXPRESSION = frozenset({"NAME", "NUMBER", "TRUTH", "LPAR", "LSQB", "PLUS", "NOT"})
_GOING_ON = frozenset({"COMPARE", "PLUS", "TIMES", "POWER", "DOT", "LPAR", "LSQB", "AND", "OR", "NOT", "IN", "IF"})

FOREIGN_OPERATORS = {
    "&&": "write `and`",
    "&": "write `and`; the bits of two numbers meet in `bitand(a, b)`",
    "||": "write `or`",
    "|": "write `or`; for the bits of numbers, `bitor(a, b)`; `|x|` is `abs(x)`",
    "!": "write `not`",
    "~": "write `not`",
    "^": "a power is `a ** b`; for the bits of numbers, `xor(a, b)`",
    "<<": "write `a * 2 ** n`",
    ">>": "write `a // 2 ** n`",
    "<>": "write `!=`",
    "=>": "write `>=`",
    "=<": "write `<=`",
    "===": "write `==`",
    "!==": "write `!=`",
    "->": "a function is written `def f(x) = …`, without arrows",
    ":=": "to name an expression, write a line `let name = …`",
    "+=": "nothing is changed in place: write the formula in full, `S + …`",
    "-=": "nothing is changed in place: write the formula in full, `S - …`",
    "*=": "nothing is changed in place: write the formula in full, `… * S`",
    "/=": "write `!=` to compare, or the new value in full",
    "?": "a choice is written `a if condition else b`",
    "≤": "write `<=`",
    "≥": "write `>=`",
    "≠": "write `!=`",
    "∧": "write `and`",
    "∨": "write `or`",
    "¬": "write `not`",
    "∈": "write `in`",
    "∉": "write `not in`",
    "×": "write `*`",
    "·": "write `*`, or `dot(a, b)` for vectors",
    "÷": "write `/` or `//`",
    "−": "this is a typographic minus; write `-`",
    "–": "this is a dash; write `-`",
    "—": "this is a dash; write `-`",
}
"""Notations of other languages, with the remedy."""

FORMS = {
    "use": "the names are listed: `use windows (shifted, leading)`",
    "def": "a function has its parameters in brackets, `def f(x) = …`; an expression is named by `let`",
    "pattern": "parameters stand in brackets: `pattern near(window: int)`",
    "branch": "a branch has no parameters; a family of branches is written `branch near[c in 0 .. n]`",
    "round": "it stands alone; its units follow in the body: `per a = q // 64, b = k // 64`",
}
"""How lines are written that open a body or bring names."""

_CHOICE = "a choice is part of an expression: `visible a if condition else b`"
_REPEATED = "what is repeated is part of an expression: `visible any(k == j for j in 0 .. n)`"
_REMARK = "a comment starts with `#`"

FOREIGN_OPENINGS = {
    **dict.fromkeys(("if", "else", "elif"), _CHOICE),
    **dict.fromkeys(("for", "while"), _REPEATED),
    **dict.fromkeys(("//", "/", "-", "%"), _REMARK),
}
"""How other languages begin a line, and the remedy."""

FOREIGN_CHARACTERS = {
    "'": 'a docstring stands in double quotes: `"…"`',
    "“": 'use straight quotes: `"`',
    "”": 'use straight quotes: `"`',
    "‘": 'use straight double quotes: `"`',
    "’": 'use straight double quotes: `"`',
    "{": "lists stand in `[ ]`; there are no sets or dictionaries",
    "}": "lists stand in `[ ]`; there are no sets or dictionaries",
    ";": "every statement stands on a line of its own",
    "\\": "a line goes on inside brackets; no `\\` is needed",
    "\u00a0": "this is a no-break space; type an ordinary one",
    "∞": "leave an infinite bound out; what is hidden is said by `visible`",
    "√": "write `sqrt(x)`, or `isqrt(n)` where it must be exact",
    "…": "a range is written `low .. high`",
}


def found_phrase(kind: str, token: str) -> str:
    """Return a phrase for the token at which the parser stopped, as it was written."""
    if kind in ("_NL", "$END", "_INDENT", "_DEDENT"):
        return _PHRASES[kind]
    if kind == "TEXT":
        return "a text in quotes"
    shown = token if len(token) <= 40 else f"{token[:40]}…"
    return f"`{shown}`"


def choices(expected: Iterable[str]) -> str:
    """`a, b or c` of the tokens possible, with whole expressions and operators named as such."""
    rest = set(expected)
    phrases = []
    if rest >= {"NAME", "NUMBER", "LPAR"}:
        phrases.append("an expression")
        rest -= _EXPRESSION
    if rest >= {"TIMES", "POWER"}:
        phrases.append("an operator")
        rest -= _GOING_ON
    phrases += sorted(_PHRASES.get(kind, f"`{kind.lower()}`") for kind in rest)
    if len(phrases) < 2:
        return "".join(phrases)
    return f"{', '.join(phrases[:-1])} or {phrases[-1]}"
