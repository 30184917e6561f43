"""Reserved words, phrases for the parser's terminals, and remedies for the notations of other languages."""

from __future__ import annotations

from collections.abc import Iterable

RESERVED = frozenset({"and", "or", "not", "in", "if", "else", "for", "true", "false"})
"""Words that are reserved everywhere; all other words are reserved only at the start of a line."""

FILE_WORDS = ("use", "def", "let", "pattern", "recurrence")
BODY_WORDS = (
    *("tokens", "pad", "align", "documents", "require", "preset"),
    *("input", "learned", "state"),
    *("let", "step", "read", "scan", "reset"),
    *("visible", "score", "weights", "value", "over", "per"),
    *("select", "branch", "round", "covers", "from", "keep", "always"),
    *("combine", "approximate", "return"),
)
PATTERN_WORDS = (
    *("visible", "score", "weights", "value", "let", "require", "preset", "input", "learned", "align", "tokens", "pad"),
    *("documents", "over", "per", "branch", "combine", "round", "approximate"),
)
"""The words that start a supported line of a pattern's body, the most usual first."""

STATEMENT_WORDS = frozenset(FILE_WORDS + BODY_WORDS)

FOREIGN_WORDS = {
    "mask": "visible",
    "mask_mod": "visible",
    "where": "visible",
    "causal": "visible",
    "condition": "visible",
    "attend": "visible",
    "bias": "score",
    "output": "read",
    "update": "step",
    "topk": "keep",
    "candidates": "from",
    "assert": "require",
    "import": "use",
    "fn": "def",
    "func": "def",
    "fun": "def",
    "function": "def",
    "param": "input",
    "attention": "pattern",
    "kernel": "pattern",
    "class": "pattern",
    "const": "let",
    "var": "let",
    "axes": "tokens",
    "grid": "tokens",
    "merge": "combine",
}
"""First words that other systems use, with the word of the language."""


_PHRASES = {
    "NAME": "a name",
    "NUMBER": "a number",
    "TRUTH": "`true` or `false`",
    "TEXT": "a string",
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
_CONTINUATIONS = frozenset({"COMPARE", "PLUS", "TIMES", "POWER", "DOT", "LPAR", "LSQB", "AND", "OR", "NOT", "IN", "IF"})

FOREIGN_OPERATORS = {
    "&&": "write `and`",
    "&": "write `and`; for the bits of numbers, `bitand(a, b)`",
    "||": "write `or`",
    "|": "write `or`; for the bits of numbers, `bitor(a, b)`; `|x|` is `abs(x)`",
    "!": "write `not`",
    "~": "write `not`",
    "^": "write a power as `a ** b`; for the bits of numbers, `xor(a, b)`",
    "<<": "write `a * 2 ** n`",
    ">>": "write `a // 2 ** n`",
    "<>": "write `!=`",
    "=>": "write `>=`",
    "=<": "write `<=`",
    "===": "write `==`",
    "!==": "write `!=`",
    "->": "write a function as `def f(x) = …`, without an arrow",
    ":=": "write a line `let name = …` to name an expression",
    "+=": "write the new value in full, `S + …`: there are no in-place updates",
    "-=": "write the new value in full, `S - …`: there are no in-place updates",
    "*=": "write the new value in full, `… * S`: there are no in-place updates",
    "/=": "write `!=` to compare, or the new value in full",
    "?": "write `a if condition else b`",
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
"""Operators of other languages, with the remedy."""

FORMS = {
    "use": "list the names: `use windows (shifted, leading)`",
    "def": "write the parameters in brackets, `def f(x) = …`; use `let` to name an expression",
    "pattern": "write the parameters in brackets: `pattern near(window: int)`",
    "branch": "a branch has no parameters; write a family of branches as `branch near[c in 0 .. n]`",
    "round": "write `round` alone, and its units in the body: `per a = q // 64, b = k // 64`",
}
"""The remedy for a malformed line that opens a body or imports names."""

_CHOICE = "write a choice inside an expression: `visible a if condition else b`"
_REPEATED = "write a loop inside an expression: `visible any(k == j for j in 0 .. n)`"
_REMARK = "start a comment with `#`"

FOREIGN_OPENINGS = {
    **dict.fromkeys(("if", "else", "elif"), _CHOICE),
    **dict.fromkeys(("for", "while"), _REPEATED),
    **dict.fromkeys(("//", "/", "-", "%"), _REMARK),
}
"""First words and signs of lines in other languages, with the remedy."""

FOREIGN_CHARACTERS = {
    "'": 'write a docstring in double quotes: `"…"`',
    "“": 'use straight quotes: `"`',
    "”": 'use straight quotes: `"`',
    "‘": 'use straight double quotes: `"`',
    "’": 'use straight double quotes: `"`',
    "{": "write lists in `[ ]`; there are no sets or dictionaries",
    "}": "write lists in `[ ]`; there are no sets or dictionaries",
    ";": "write every statement on its own line",
    "\\": "remove it: a line continues inside brackets",
    "\u00a0": "this is a no-break space; type an ordinary space",
    "∞": "omit an infinite bound; to hide keys use `visible`",
    "√": "write `sqrt(x)`, or `isqrt(n)` where it must be exact",
    "…": "write a range as `low .. high`",
}


def found_phrase(kind: str, token: str) -> str:
    """Return a phrase for the token at which the parser stopped, quoting its text."""
    if kind in ("_NL", "$END", "_INDENT", "_DEDENT"):
        return _PHRASES[kind]
    if kind == "TEXT":
        return "a string"
    shown = token if len(token) <= 40 else f"{token[:40]}…"
    return f"`{shown}`"


def choices(expected: Iterable[str]) -> str:
    """Return the expected tokens as `a, b or c`; 'an expression' and 'an operator' stand for their tokens."""
    remaining = set(expected)
    phrases = []
    if remaining >= {"NAME", "NUMBER", "LPAR"}:
        phrases.append("an expression")
        remaining -= _EXPRESSION
    if remaining >= {"TIMES", "POWER"}:
        phrases.append("an operator")
        remaining -= _CONTINUATIONS
    phrases += sorted(_PHRASES.get(kind, f"`{kind.lower()}`") for kind in remaining)
    if len(phrases) < 2:
        return "".join(phrases)
    return f"{', '.join(phrases[:-1])} or {phrases[-1]}"
