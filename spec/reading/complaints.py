"""Choose the diagnostic for the position at which the parser stopped, from the token and the expected tokens.

Each rule recognises one mistake and returns None for all others; the first rule that matches wins.
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
    BODY_WORDS,
    FILE_WORDS,
    FOREIGN_CHARACTERS,
    FOREIGN_OPENINGS,
    FOREIGN_OPERATORS,
    FOREIGN_WORDS,
    FORMS,
    PATTERN_WORDS,
    RESERVED,
    STATEMENT_WORDS,
    choices,
    found_phrase,
)

_SKIPPED_OR_BRACKET = re.compile(r'#[^\n]*|"""[\s\S]*?"""|"[^"\n]*"|[()\[\]]')
_WORD = re.compile(r"[A-Za-z_]\w*")
_STATEMENTS = frozenset({"BLOCK", "ROUND", "DECLARE", "STATE", "LET", "STEP", "TOKENS", "PAD", "RANGING", "CLAUSE"})
_HEADINGS = re.compile(r"^ *((?:pattern|recurrence|def|select|branch|round)\b[^\n#]*)", re.MULTILINE)
_LINE_HEAD = re.compile(r"\n *([A-Za-z_]\w*)")
_ITEMS = frozenset({"USE", "DEF", "PATTERN"})


def complain(stop: ParseStop) -> Fault:
    """Return the fault to report for the position at which the parser stopped."""
    for rule in _RULES:
        fault = rule(stop)
        if fault:
            return fault
    raise AssertionError("the last rule matches every stop")


# --- brackets and layout ---------------------------------------------------------------------------------------------


def _open_bracket(stop: ParseStop) -> Fault | None:
    """Recognise a bracket that is still open where the next statement starts."""
    open_brackets: list[int] = []
    for match in _SKIPPED_OR_BRACKET.finditer(stop.text, 0, stop.start):
        if match.group() in "([":
            open_brackets.append(match.start())
        elif match.group() in ")]" and open_brackets:
            open_brackets.pop()
    if not open_brackets:
        return None
    start = open_brackets[-1]
    if stop.at_line_end:
        return unclosed(start, stop.text[start])
    for head_start, word in _line_heads(stop.text, start, stop.end):
        if word in STATEMENT_WORDS:
            return unclosed(
                start, stop.text[start], (head_start, head_start + len(word), "the next statement starts here")
            )
    return None


def _line_heads(text: str, start: int, end: int) -> Iterator[tuple[int, str]]:
    for match in _LINE_HEAD.finditer(text, start, end):
        yield match.start(1), match.group(1)


def _body_missing(stop: ParseStop) -> Fault | None:
    if stop.expected != {"_INDENT"}:
        return None
    *_, heading = _HEADINGS.finditer(stop.text, 0, stop.last_end)
    words = heading.group(1).rstrip()
    name = re.split(r"[(\[]", words)[0].strip()
    start = heading.start(1)
    remedy = "indent its lines by four spaces"
    if words.startswith("def"):
        remedy += f"; for one expression write `{name}(…) = …`"
    return Fault("A115", f"`{name}` has no body", start, start + len(words), help=remedy)


def _indentation(stop: ParseStop) -> Fault | None:
    if stop.kind != "_INDENT":
        return None
    start = stop.text.rfind("\n", 0, stop.start) + 1
    return Fault(
        "A105",
        "this line is indented, but the line above it opens no body",
        start,
        max(stop.start, start + 1),
        help="start it in the same column as the line above; use brackets to continue a long expression",
    )


def _lambda(stop: ParseStop) -> Fault | None:
    match = re.search(r"\blambda\b", stop.before)
    if not match:
        return None
    start = stop.line_start + match.start()
    message = "the language has no `lambda`"
    return Fault("A107", message, start, start + len("lambda"), help="give the function a name: `let f(x) = …`")


def _colon(stop: ParseStop) -> Fault | None:
    if stop.token != ":":
        return None
    if _HEADINGS.match(stop.text, stop.line_start) and not stop.wants_operand:
        message, remedy = f"a `{stop.head}` line ends without a colon", "remove it: the indentation opens the body"
        if stop.head == "def" and stop.rest:
            remedy = "write `=` instead: `def f(x) = …`"
    elif re.search(r"\[[^\]]*$", stop.before):
        message, remedy = "slices are not supported", "write a range with `..`, as in `sum(x[j] for j in a .. b)`"
    elif stop.head == "let" and not stop.wants_operator:
        subject = "a parameter of a `let`" if "(" in stop.before else "a `let`"
        message, remedy = f"{subject} must not have a type", "remove the type: it follows from the expression"
    elif stop.expected >= {"COMMA", "RPAR"} and _WORD.fullmatch(stop.last):
        message, remedy = "`:` is not allowed here", f"write `=` after the name of an argument: `{stop.last} = …`"
    else:
        message = "`:` is not allowed here"
        remedy = "use `:` only between a name and its type or range" if stop.rest else "remove it"
    return stop.fault("A116", message, help=remedy)


# --- the first word of a line ----------------------------------------------------------------------------------------


def _misplaced(stop: ParseStop) -> Fault | None:
    """Recognise a known statement in the wrong place."""
    if stop.wants_item and not stop.wants_statement and stop.kind in _STATEMENTS:
        remedy = "indent it under a `pattern` or `recurrence` line"
        if stop.token == "from":
            remedy = "to import names from another file, write `use windows (shifted)`"
        return stop.fault("A108", f"`{stop.token}` stands outside a pattern", help=remedy)
    if stop.wants_statement and stop.kind in _ITEMS:
        remedy = "start it in the first column"
        if stop.token == "def":
            remedy += ", or write `let f(x) = …` here"
        return stop.fault("A108", f"`{stop.token}` cannot stand inside a body", help=remedy)
    if stop.kind == "TEXT" and (stop.wants_statement or stop.wants_item):
        return stop.fault("A120", "a docstring must come first in its body", help="use a comment: `# …`")
    return None


def _unknown_word(stop: ParseStop) -> Fault | None:
    if not (stop.wants_statement or stop.wants_item):
        return None
    words = BODY_WORDS if stop.wants_statement else FILE_WORDS
    place = "a line of a body" if stop.wants_statement else "a line at file level"
    if stop.kind == "NAME":
        message = f"unknown word `{stop.token}` at the start of a line"
        return stop.fault("A101", message, help=_meant_word(stop, words))
    message = f"{place} starts with a word, not with {found_phrase(stop.kind, stop.token)}"
    usual = "start it with a word such as " + ("`let`, `visible`" if stop.wants_statement else "`pattern`, `def`")
    return stop.fault("A101", message, help=FOREIGN_OPENINGS.get(stop.token, usual))


def _meant_word(stop: ParseStop, words: tuple[str, ...]) -> str:
    near = get_close_matches(stop.token, words, 1, 0.7)
    suggestion = near[0] if near else FOREIGN_WORDS.get(stop.token.lower(), "")
    if suggestion in words:
        return f"did you mean `{suggestion}`?"
    if stop.token in FOREIGN_OPENINGS:
        return FOREIGN_OPENINGS[stop.token]
    if re.match(r" *(\([^)\n]*\) *)?=(?!=)", stop.text[stop.end :]):
        return f"to name an expression, write `let {stop.token} = …`; to update a state, `step {stop.token} = …`"
    if stop.wants_statement and _heading(stop).startswith("def"):
        return "the body of a `def` holds `let` lines and ends with `return …`"
    if stop.wants_statement and re.search(r"[<>]|[=!]=", stop.rest):
        condition = stop.line if len(stop.line) <= 60 else f"{stop.token} …"
        return f"start a condition with a word: `visible {condition}`"
    allowed = PATTERN_WORDS if stop.wants_statement else FILE_WORDS
    return "start the line with one of " + ", ".join(f"`{word}`" for word in allowed)


def _heading(stop: ParseStop) -> str:
    """Return the nearest line above that opens a body."""
    *_, heading = _HEADINGS.finditer(stop.text, 0, stop.start)
    return heading.group(1)


# --- characters and operators ----------------------------------------------------------------------------------------


def _foreign_operator(stop: ParseStop) -> Fault | None:
    """Recognise an operator of another language, which may start before the position at which the parser stopped."""
    for start in (stop.start - 2, stop.start - 1, stop.start):
        for size in (3, 2, 1):
            operator = stop.text[start : start + size] if start >= 0 else ""
            stray = start + size > stop.start and operator in FOREIGN_OPERATORS
            if stray and (stop.kind == "" or len(operator) > 1):
                message = f"`{operator}` is not an operator of the language"
                return Fault("A107", message, start, start + size, help=FOREIGN_OPERATORS[operator])
    return None


def _stray_character(stop: ParseStop) -> Fault | None:
    if stop.kind:
        return None
    if stop.token == '"':
        return stop.fault("A114", "this string is never closed", help='end it with `"""`, or with `"` on the same line')
    remedy = FOREIGN_CHARACTERS.get(stop.token, "remove it")
    if stop.token == ";" and "COMMA" in stop.expected:
        remedy = "separate values and parameters by `,`"
    elif stop.token == "{" and _HEADINGS.match(stop.text, stop.line_start):
        remedy = "remove it: the indentation opens the body"
    shown = f"`{stop.token}`"
    if not stop.token.isascii():  # a look-alike of an ASCII character: show its code point
        code = f"U+{ord(stop.token):04X}"
        shown = code if stop.token.isspace() or not stop.token.isprintable() else f"{shown} ({code})"
    elif stop.token.isspace() or not stop.token.isprintable():
        shown = f"U+{ord(stop.token):04X}"
    return stop.fault("A113", f"{shown} is not a character of the language", help=remedy)


def _equal(stop: ParseStop) -> Fault | None:
    if stop.token != "=" or not stop.wants_operator:
        return None
    return stop.fault("A106", "`=` is not a comparison", help="write `==` to compare")


# --- numbers and ranges ----------------------------------------------------------------------------------------------


def _number(stop: ParseStop) -> Fault | None:
    """Recognise malformed numbers: `2x`, `1_000`, `0x10`, `.5`, `5.`."""
    if stop.kind == "DOT" and stop.wants_operand:
        return _point(stop)
    digits = re.search(r"[0-9][0-9.eE]*\.?$", stop.before)
    if not digits or re.search(r"\w$", stop.before[: digits.start()]):
        return None
    start = stop.line_start + digits.start()
    if digits.group().endswith(".") and not stop.wants_operand:
        if digits.group().count(".") > 1:
            return Fault("A117", "a number has more than one point", start, stop.start, help="keep one point")
        remedy = f"write `{digits.group()}0`" if digits.group()[:-1].isdigit() else "remove the point"
        return Fault("A117", "a number cannot end in a point", start, stop.start, help=remedy)
    if not _WORD.match(stop.token) or digits.end() != len(stop.before) or stop.token in RESERVED:
        return None
    return _number_and_letters(stop, start)


def _number_and_letters(stop: ParseStop, start: int) -> Fault:
    word = stop.text[start : stop.end]
    message = f"{found_phrase('', word)} is neither a number nor a name"
    if re.fullmatch(r"[0-9_]+", word):
        remedy = f"write `{word.replace('_', '')}`"
    elif re.fullmatch(r"0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+", word):
        remedy = f"write the number in decimal: `{int(word, 0)}`"
    else:
        remedy = f"write `*` for a product: `{stop.text[start : stop.start]} * {stop.token}`"
    return Fault("A117", message, start, stop.end, help=remedy)


def _point(stop: ParseStop) -> Fault:
    digits = re.match(r"\.([0-9]+)", stop.text[stop.start : stop.start + 50])
    if digits:
        end = stop.start + digits.end()
        message, remedy = "a number cannot start with a point", f"write `0{digits.group()}`"
        return Fault("A117", message, stop.start, end, help=remedy)
    return stop.fault(
        "A102", "nothing stands before this `.`", help="write the token whose coordinate is meant, such as `q.y`"
    )


def _range(stop: ParseStop) -> Fault | None:
    if stop.kind != "DOTS":
        return None
    message = "a range is allowed only after the `in` of `for`, `over` or `per`, or after `:`"
    return stop.fault("A118", message, help="write `low <= x < high` to compare with a range")


# --- inside expressions ----------------------------------------------------------------------------------------------


def _unexpected_continuation(stop: ParseStop) -> Fault | None:
    """Recognise a complete expression that is followed by something unexpected."""
    if not stop.wants_operator or stop.at_line_end:
        return None
    shown = found_phrase(stop.kind, stop.token)
    remedy = _meant_operator(stop)
    if "_NL" in stop.expected:
        message = f"expected an operator or the end of the line, found {shown}"
        return stop.fault("A112", message, help=remedy)
    closers = choices(stop.expected & {"RPAR", "RSQB", "COMMA", "ELSE", "FOR"})
    return stop.fault("A100", f"expected an operator{', ' if closers else ''}{closers}, found {shown}", help=remedy)


def _meant_operator(stop: ParseStop) -> str:
    if stop.kind == "NAME":
        word = stop.token.lower()
        foreign = {"is": "==", "xor": "!=", "mod": "%", "div": "//", "then": "if … else", "where": "if", "when": "if"}
        near = get_close_matches(word, ("and", "or", "not", "in", "else", "for"), 1, 0.6)
        suggestion = foreign.get(word) or (near[0] if near else "")
        if word == "is" and stop.rest.startswith("not "):
            suggestion = "!="
        if suggestion:
            return f"did you mean `{suggestion}`?"
    if stop.token == "not":
        return "did you mean `and not`, or `not in`?"
    if stop.kind in _STATEMENTS | _ITEMS:
        return "start every statement on its own line"
    if stop.kind == "TEXT":
        return "write a comment, `# …`, for a remark"
    if stop.head == "preset":
        return f"put the values in brackets: `preset {stop.last}(parameter = value)`"
    if stop.kind not in ("NAME", "NUMBER"):
        return ""
    if "_NL" in stop.expected:
        return "join conditions by `and` or `or`, write `*` for a product"
    return "separate values by `,`, write `*` for a product"


def _anything(stop: ParseStop) -> Fault:
    remedy = ""
    if stop.expected == {"IN"}:
        remedy = "write `not in` as one operator; join a negation by `and not`"
    elif stop.token == "for":
        remedy = "put a `for` inside the brackets of a function: `any(… for j in 0 .. n)`"
    elif stop.token == "-" and stop.head in FORMS:
        remedy = "use letters, digits and `_`; a name cannot start with a digit"
    elif stop.head in FORMS:
        remedy = FORMS[stop.head]
    elif stop.token == ",":
        remedy = "write one line for each, or join conditions by `and`"
    elif "COMMA" in stop.expected:
        remedy = "separate the entries of a list by `,`"
    message = f"expected {choices(stop.expected)}, found {found_phrase(stop.kind, stop.token)}"
    return stop.fault("A100", message, help=remedy)


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
    _unexpected_continuation,
    _anything,
)
