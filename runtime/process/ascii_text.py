"""Text in ASCII, for terminals and locales that show nothing else: each mark has a plain counterpart, never `?`."""

from __future__ import annotations

import codecs
import unicodedata

HANDLER = "attnc.plain"
"""The name of the error handler for `str.encode` and streams."""

SEPARATOR = " · "
"""The separator between parts of a line; without spaces the dot is a product."""

_MARKS = {
    **{
        "×": "x",
        "·": "*",
        "–": "-",
        "—": "-",
        "−": "-",
        "…": "...",
        "→": ">",
        "←": "<",
        "↓": "v",
        "Σ": "sum",
        "±": "+-",
    },
    **{
        "≤": "<=",
        "≥": ">=",
        "≠": "!=",
        "≈": "~",
        "≡": "==",
        "∧": "and",
        "∨": "or",
        "¬": "not ",
        "∈": "in",
        "∉": "not in",
    },
    **{"÷": "/", "“": '"', "”": '"', "‘": "'", "’": "'", "∞": "inf", "√": "sqrt", "⊙": "*", "∗": "*", "‖": "||"},
    **{"∂": "d", "′": "'", "β": "beta", "δ": "delta", "α": "alpha", "λ": "lambda", "γ": "gamma", "µ": "u", "μ": "u"},
    **{"⌊": "floor(", "⌋": ")", "⌈": "ceil(", "⌉": ")", "∘": "o", "⁻": "^-", "²": "^2", "³": "^3", "¹": "^1"},
    **{"⁴": "^4", "⁵": "^5", "█": "#", "▓": "#", "▒": "+", "░": ".", "▀": "#", "▄": "#"},
    **dict.fromkeys("▏▎▍▌▋▊▉", "#"),
}


def plain(text: str) -> str:
    """Return the text in ASCII: marks by their counterparts, letters without accents, else their escapes."""
    return "".join(map(_plain, text.replace(SEPARATOR, " - ")))


def _plain(character: str) -> str:
    if character.isascii():
        return character
    if character in _MARKS:
        return _MARKS[character]
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode("ascii")
    return letters or character.encode("ascii", "backslashreplace").decode("ascii")


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    start, end = error.start, error.end
    is_separator = error.object[start - 1 : end + 1] == SEPARATOR if start else False
    return ("-" if is_separator else plain(error.object[start:end])), end


codecs.register_error(HANDLER, _replace)
