"""Reserved words and the first words of statements, for the formatter and for messages."""

from __future__ import annotations

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
