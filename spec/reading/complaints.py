"""Diagnostics for the place where the parser stops, from the token there and the tokens that were possible.

Each rule below knows one mistake and returns None for all others; the first that speaks is heard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches

from attnc.spec.reading.fault import Fault
from attnc.spec.reading.indentation import unclosed
from attnc.spec.reading.missing import else_missing, equal_missing, name_missing, operand_missing, type_missing
from attnc.spec.reading.parse_stop import ParseStop
from attnc.spec.reading.phrases import (
    FOREIGN_CHARACTERS,
    FOREIGN_OPENINGS,
    FOREIGN_OPERATORS,
    FORMS,
    choices,
    found_phrase,
)
from attnc.spec.reading.words import (
    BODY_WORDS,
    FILE_WORDS,
    FOREIGN_WORDS,
    PATTERN_WORDS,
    RESERVED,
    STATEMENT_WORDS,
)

_SKIPPED_OR_BRACKET = re.compile(r'#[^\n]*|"""[\s\S]*?"""|"[^"\n]*"|[()\[\]]')
_WORD = re.compile(r"[A-Za-z_]\w*")
_STATEMENTS = frozenset({"BLOCK", "ROUND", "DECLARE", "STATE", "LET", "STEP", "TOKENS", "PAD", "RANGING", "CLAUSE"})
_HEADINGS = re.compile(r"^ *((?:pattern|recurrence|def|select|branch|round)\b[^\n#]*)", re.MULTILINE)
_LINE_HEAD = re.compile(r"\n *([A-Za-z_]\w*)")
_ITEMS = frozenset({"USE", "DEF", "PATTERN"})


def complain(found: ParseStop) -> Fault:
    """The fault to show for a place where the parser stopped."""
    for rule in _RULES:
        fault = rule(found)
        if fault:
            return fault
    raise AssertionError("the last rule always speaks")


# --- brackets and layout ---------------------------------------------------------------------------------------------


def _open_bracket(found: ParseStop) -> Fault | None:
    """A bracket of an earlier line is still open, and a statement seems to have begun since."""
    opened: list[int] = []
    for match in _SKIPPED_OR_BRACKET.finditer(found.text, 0, found.start):
        if match.group() in "([":
            opened.append(match.start())
        elif match.group() in ")]" and opened:
            opened.pop()
    if not opened:
        return None
    start = opened[-1]
    if found.at_line_end:
        return unclosed(start, found.text[start])
    for at, word in _line_heads(found.text, start, found.end):
        if word in STATEMENT_WORDS:
            return unclosed(start, found.text[start], (at, at + len(word), "the next statement starts here"))
    return None


def _line_heads(text: str, start: int, end: int) -> Iterator[tuple[int, str]]:
    for match in _LINE_HEAD.finditer(text, start, end):
        yield match.start(1), match.group(1)


def _body_missing(found: ParseStop) -> Fault | None:
    if found.expected != {"_INDENT"}:
        return None
    *_, heading = _HEADINGS.finditer(found.text, 0, found.last_end)
    words = heading.group(1).rstrip()
    name = re.split(r"[(\[]", words)[0].strip()
    start = heading.start(1)
    remedy = "indent its lines by four spaces"
    if words.startswith("def"):
        remedy += f"; for one expression write `{name}(…) = …`"
    return Fault("A115", f"`{name}` has no body", start, start + len(words), help=remedy)


def _indentation(found: ParseStop) -> Fault | None:
    if found.kind != "_INDENT":
        return None
    start = found.text.rfind("\n", 0, found.start) + 1
    return Fault(
        "A105",
        "this line is indented, but the line above it opens no body",
        start,
        max(found.start, start + 1),
        help="start it in the same column as the line above; a long expression goes on inside brackets",
    )


def _lambda(found: ParseStop) -> Fault | None:
    match = re.search(r"\blambda\b", found.before)
    if not match:
        return None
    start = found.line_start + match.start()
    message = "the language has no `lambda`"
    return Fault("A107", message, start, start + len("lambda"), help="give the function a name: `let f(x) = …`")


def _colon(found: ParseStop) -> Fault | None:
    if found.token != ":":
        return None
    if _HEADINGS.match(found.text, found.line_start) and not found.wants_operand:
        message, remedy = f"a `{found.head}` line ends without a colon", "remove it; the indentation opens the body"
        if found.head == "def" and found.rest:
            remedy = "write `=` for it: `def f(x) = …`"
    elif re.search(r"\[[^\]]*$", found.before):
        message, remedy = "there are no slices", "write a range with `..`, as in `sum(x[j] for j in a .. b)`"
    elif found.head == "let" and not found.wants_operator:
        what = "a parameter of a `let`" if "(" in found.before else "a `let`"
        message, remedy = f"{what} has no type", "leave the type out: it is what the expression is"
    elif found.expected >= {"COMMA", "RPAR"} and _WORD.fullmatch(found.last):
        message, remedy = "no `:` can stand here", f"an argument is given by its name with `=`: `{found.last} = …`"
    else:
        message = "no `:` can stand here"
        remedy = "a `:` stands between a name and its type or range" if found.rest else "remove it"
    return found.fault("A116", message, help=remedy)


# --- the first word of a line ----------------------------------------------------------------------------------------


def _misplaced(found: ParseStop) -> Fault | None:
    """A known statement in the wrong place."""
    if found.wants_item and not found.wants_statement and found.kind in _STATEMENTS:
        remedy = "indent it under a `pattern` or `recurrence` line"
        if found.token == "from":
            remedy = "to bring names from another file, write `use windows (shifted)`"
        return found.fault("A108", f"`{found.token}` stands outside a pattern", help=remedy)
    if found.wants_statement and found.kind in _ITEMS:
        remedy = "start it in the first column"
        if found.token == "def":
            remedy += ", or write `let f(x) = …` here"
        return found.fault("A108", f"`{found.token}` cannot stand inside a body", help=remedy)
    if found.kind == "TEXT" and (found.wants_statement or found.wants_item):
        return found.fault("A120", "a docstring must come first in its body", help="use a comment: `# …`")
    return None


def _unknown_word(found: ParseStop) -> Fault | None:
    if not (found.wants_statement or found.wants_item):
        return None
    words = BODY_WORDS if found.wants_statement else FILE_WORDS
    place = "a line of a body" if found.wants_statement else "a line at file level"
    if found.kind == "NAME":
        message = f"unknown word `{found.token}` at the start of a line"
        return found.fault("A101", message, help=_meant_word(found, words))
    message = f"{place} starts with a word, not with {found_phrase(found.kind, found.token)}"
    usual = "start it with a word such as " + ("`let`, `visible`" if found.wants_statement else "`pattern`, `def`")
    return found.fault("A101", message, help=FOREIGN_OPENINGS.get(found.token, usual))


def _meant_word(found: ParseStop, words: tuple[str, ...]) -> str:
    close = get_close_matches(found.token, words, 1, 0.7)
    meant = close[0] if close else FOREIGN_WORDS.get(found.token.lower(), "")
    if meant in words:
        return f"did you mean `{meant}`?"
    if found.token in FOREIGN_OPENINGS:
        return FOREIGN_OPENINGS[found.token]
    if re.match(r" *(\([^)\n]*\) *)?=(?!=)", found.text[found.end :]):
        return f"to name an expression, write `let {found.token} = …`; to update a state, `step {found.token} = …`"
    if found.wants_statement and _heading(found).startswith("def"):
        return "the body of a `def` holds `let` lines and ends with `return …`"
    if found.wants_statement and re.search(r"[<>]|[=!]=", found.rest):
        condition = found.line if len(found.line) <= 60 else f"{found.token} …"
        return f"a condition stands after a word: `visible {condition}`"
    listed = PATTERN_WORDS if found.wants_statement else FILE_WORDS
    return "lines start with " + ", ".join(f"`{word}`" for word in listed)


def _heading(found: ParseStop) -> str:
    """The last line before that opens a body."""
    *_, heading = _HEADINGS.finditer(found.text, 0, found.start)
    return heading.group(1)


# --- characters and operators ----------------------------------------------------------------------------------------


def _foreign_operator(found: ParseStop) -> Fault | None:
    """An operator of another language, which may start before the place where the parser stopped."""
    for start in (found.start - 2, found.start - 1, found.start):
        for size in (3, 2, 1):
            written = found.text[start : start + size] if start >= 0 else ""
            stray = start + size > found.start and written in FOREIGN_OPERATORS
            if stray and (found.kind == "" or len(written) > 1):
                message = f"`{written}` is not an operator of the language"
                return Fault("A107", message, start, start + size, help=FOREIGN_OPERATORS[written])
    return None


def _stray_character(found: ParseStop) -> Fault | None:
    if found.kind:
        return None
    if found.token == '"':
        return found.fault("A114", "this text is never closed", help='end it with `"""`, or with `"` on the same line')
    remedy = FOREIGN_CHARACTERS.get(found.token, "remove it")
    if found.token == ";" and "COMMA" in found.expected:
        remedy = "values and parameters are separated by `,`"
    elif found.token == "{" and _HEADINGS.match(found.text, found.line_start):
        remedy = "remove it; the indentation opens the body"
    shown = f"`{found.token}`"
    if not found.token.isascii():  # what a terminal shows may be another character
        code = f"U+{ord(found.token):04X}"
        shown = code if found.token.isspace() or not found.token.isprintable() else f"{shown} ({code})"
    elif found.token.isspace() or not found.token.isprintable():
        shown = f"U+{ord(found.token):04X}"
    return found.fault("A113", f"{shown} is not a character of the language", help=remedy)


def _equal(found: ParseStop) -> Fault | None:
    if found.token != "=" or not found.wants_operator:
        return None
    return found.fault("A106", "`=` gives a name to something; it does not compare", help="to compare, write `==`")


# --- numbers and ranges ----------------------------------------------------------------------------------------------


def _number(found: ParseStop) -> Fault | None:
    """`2x`, `1_000`, `0x10`, `.5`, `5.`"""
    if found.kind == "DOT" and found.wants_operand:
        return _point(found)
    written = re.search(r"[0-9][0-9.eE]*\.?$", found.before)
    if not written or re.search(r"\w$", found.before[: written.start()]):
        return None
    start = found.line_start + written.start()
    if written.group().endswith(".") and not found.wants_operand:
        if written.group().count(".") > 1:
            return Fault("A117", "a number has one point", start, found.start, help="remove what is too much")
        remedy = f"write `{written.group()}0`" if written.group()[:-1].isdigit() else "remove the point"
        return Fault("A117", "a number cannot end in a point", start, found.start, help=remedy)
    if not _WORD.match(found.token) or written.end() != len(found.before) or found.token in RESERVED:
        return None
    return _number_and_letters(found, start)


def _number_and_letters(found: ParseStop, start: int) -> Fault:
    written = found.text[start : found.end]
    message = f"{found_phrase('', written)} is neither a number nor a name"
    if re.fullmatch(r"[0-9_]+", written):
        remedy = f"write `{written.replace('_', '')}`"
    elif re.fullmatch(r"0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+", written):
        remedy = f"numbers are written in decimal: `{int(written, 0)}`"
    else:
        remedy = f"a product needs its sign: `{found.text[start : found.start]} * {found.token}`"
    return Fault("A117", message, start, found.end, help=remedy)


def _point(found: ParseStop) -> Fault:
    digits = re.match(r"\.([0-9]+)", found.text[found.start : found.start + 50])
    if digits:
        end = found.start + digits.end()
        message, remedy = "a number cannot start with a point", f"write `0{digits.group()}`"
        return Fault("A117", message, found.start, end, help=remedy)
    return found.fault("A102", "nothing stands before this point", help="write whose coordinate it is, such as `q.y`")


def _range(found: ParseStop) -> Fault | None:
    if found.kind != "DOTS":
        return None
    message = "a range stands only after the `in` of `for`, `over` or `per`, or after `:`"
    return found.fault("A118", message, help="to compare with a range, write `low <= x < high`")


# --- inside expressions ----------------------------------------------------------------------------------------------


def _goes_on(found: ParseStop) -> Fault | None:
    """An expression is complete, and something follows that does not go with it."""
    if not found.wants_operator or found.at_line_end:
        return None
    shown = found_phrase(found.kind, found.token)
    remedy = _meant_operator(found)
    if "_NL" in found.expected:
        message = f"expected an operator or the end of the line, found {shown}"
        return found.fault("A112", message, help=remedy)
    wanted = choices(found.expected & {"RPAR", "RSQB", "COMMA", "ELSE", "FOR"})
    return found.fault("A100", f"expected an operator{', ' if wanted else ''}{wanted}, found {shown}", help=remedy)


def _meant_operator(found: ParseStop) -> str:
    if found.kind == "NAME":
        word = found.token.lower()
        foreign = {"is": "==", "xor": "!=", "mod": "%", "div": "//", "then": "if … else", "where": "if", "when": "if"}
        close = get_close_matches(word, ("and", "or", "not", "in", "else", "for"), 1, 0.6)
        meant = foreign.get(word) or (close[0] if close else "")
        if word == "is" and found.rest.startswith("not "):
            meant = "!="
        if meant:
            return f"did you mean `{meant}`?"
    if found.token == "not":
        return "did you mean `and not`, or `not in`?"
    if found.kind in _STATEMENTS | _ITEMS:
        return "every statement starts on a line of its own"
    if found.kind == "TEXT":
        return "for a remark write a comment, `# …`"
    if found.head == "preset":
        return f"values stand in brackets: `preset {found.last}(parameter = value)`"
    if found.kind not in ("NAME", "NUMBER"):
        return ""
    if "_NL" in found.expected:
        return "conditions are joined by `and` or `or`, a product needs its `*`"
    return "values are separated by `,`, and a product needs its `*`"


def _anything(found: ParseStop) -> Fault:
    remedy = ""
    if found.expected == {"IN"}:
        remedy = "`not in` is one operator; a negation is joined on by `and not`"
    elif found.token == "for":
        remedy = "a `for` stands in the brackets of a function: `any(… for j in 0 .. n)`"
    elif found.token == "-" and found.head in FORMS:
        remedy = "a name is made of letters, digits and `_`, and starts with no digit"
    elif found.head in FORMS:
        remedy = FORMS[found.head]
    elif found.token == ",":
        remedy = "write a line for each; conditions are joined by `and`"
    elif "COMMA" in found.expected:
        remedy = "what is listed is separated by `,`"
    message = f"expected {choices(found.expected)}, found {found_phrase(found.kind, found.token)}"
    return found.fault("A100", message, help=remedy)


_RULES = (
    _body_missing,
    _open_bracket,
    _indentation,
    _foreign_operator,
    _number,
    _stray_character,
    _lambda,
    _colon,
    _misplaced,
    _unknown_word,
    _equal,
    _range,
    type_missing,
    name_missing,
    equal_missing,
    operand_missing,
    else_missing,
    _goes_on,
    _anything,
)
