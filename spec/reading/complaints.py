"""What to say when the parser stops: from the token found and the tokens possible there to a diagnostic.

Each rule below knows one mistake and returns None for all others; the first that speaks is heard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches

from attnc.spec.reading.fault import Fault
from attnc.spec.reading.found import Found
from attnc.spec.reading.layout import unclosed
from attnc.spec.reading.phrases import FOREIGN_CHARACTERS, FOREIGN_OPERATORS, choices, found_phrase
from attnc.spec.reading.words import BODY_WORDS, FILE_WORDS, FOREIGN_WORDS, RESERVED, STATEMENT_WORDS

_SKIPPED_OR_BRACKET = re.compile(r'#[^\n]*|"""[\s\S]*?"""|"[^"\n]*"|[()\[\]]')
_WORD = re.compile(r"[A-Za-z_]\w*")
_STATEMENTS = frozenset({"BLOCK", "ROUND", "DECLARE", "STATE", "LET", "STEP", "TOKENS", "PAD", "RANGING", "CLAUSE"})
_HEADINGS = re.compile(r"^ *((?:pattern|recurrence|def|select|branch|round)\b[^\n#]*)", re.MULTILINE)
_LINE_HEAD = re.compile(r"\n *([A-Za-z_]\w*)")
_ITEMS = frozenset({"USE", "DEF", "PATTERN"})


def complain(found: Found) -> Fault:
    """The fault to show for a place where the parser stopped."""
    for rule in _RULES:
        fault = rule(found)
        if fault:
            return fault
    raise AssertionError("the last rule always speaks")


# --- brackets and layout ---------------------------------------------------------------------------------------------


def _open_bracket(found: Found) -> Fault | None:
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


def _body_missing(found: Found) -> Fault | None:
    if found.expected != {"_INDENT"}:
        return None
    *_, heading = _HEADINGS.finditer(found.text, 0, found.last_end)
    words = heading.group(1).rstrip()
    name = re.split(r"[(\[]", words)[0].strip()
    start = heading.start(1)
    return Fault("A115", f"`{name}` has no body", start, start + len(words), help="indent its lines by four spaces")


def _indentation(found: Found) -> Fault | None:
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


def _lambda(found: Found) -> Fault | None:
    match = re.search(r"\blambda\b", found.before)
    if not match:
        return None
    start = found.line_start + match.start()
    message = "the language has no `lambda`"
    return Fault("A107", message, start, start + len("lambda"), help="give the function a name: `let f(x) = …`")


def _colon(found: Found) -> Fault | None:
    if found.token != ":":
        return None
    if _HEADINGS.match(found.text, found.line_start) and not found.wants_operand:
        message, remedy = f"a `{found.head}` line ends without a colon", "remove it; the indentation opens the body"
    elif re.search(r"\[[^\]]*$", found.before):
        message, remedy = "there are no slices", "write a range with `..`, as in `sum(x[j] for j in a .. b)`"
    else:
        message, remedy = "no `:` can stand here", "a `:` stands between a name and its type or range"
    return found.fault("A116", message, help=remedy)


# --- the first word of a line ----------------------------------------------------------------------------------------


def _misplaced(found: Found) -> Fault | None:
    """A known statement in the wrong place."""
    if found.wants_item and not found.wants_statement and found.kind in _STATEMENTS:
        return found.fault(
            "A108",
            f"`{found.token}` stands outside a pattern",
            help="indent it under a `pattern` or `recurrence` line",
        )
    if found.wants_statement and found.kind in _ITEMS:
        return found.fault("A108", f"`{found.token}` cannot stand inside a body", help="start it in the first column")
    if found.kind == "TEXT" and (found.wants_statement or found.wants_item):
        return found.fault("A120", "a docstring must come first in its body", help="use a comment: `# …`")
    return None


def _unknown_word(found: Found) -> Fault | None:
    if not (found.wants_statement or found.wants_item):
        return None
    words = BODY_WORDS if found.wants_statement else FILE_WORDS
    place = "a line of a body" if found.wants_statement else "a line at file level"
    if found.kind == "NAME":
        message = f"unknown word `{found.token}` at the start of a line"
        return found.fault("A101", message, help=_meant_word(found, words))
    message = f"{place} starts with a word, not with {found_phrase(found.kind, found.token)}"
    return found.fault(
        "A101",
        message,
        help="start it with a word such as " + ("`let`, `visible`" if found.wants_statement else "`pattern`, `def`"),
    )


def _meant_word(found: Found, words: tuple[str, ...]) -> str:
    close = get_close_matches(found.token, words, 1, 0.7)
    meant = close[0] if close else FOREIGN_WORDS.get(found.token.lower(), "")
    if meant in words:
        return f"did you mean `{meant}`?"
    if re.match(r" *(\([^)\n]*\) *)?=(?!=)", found.text[found.end :]):
        return f"to name an expression, write `let {found.token} = …`; to update a state, `step {found.token} = …`"
    return "lines start with " + ", ".join(f"`{word}`" for word in words)


# --- characters and operators ----------------------------------------------------------------------------------------


def _foreign_operator(found: Found) -> Fault | None:
    """An operator of another language, which may start before the place where the parser stopped."""
    for start in (found.start - 2, found.start - 1, found.start):
        for size in (3, 2, 1):
            written = found.text[start : start + size] if start >= 0 else ""
            stray = start + size > found.start and written in FOREIGN_OPERATORS
            if stray and (found.kind == "" or len(written) > 1):
                message = f"`{written}` is not an operator of the language"
                return Fault("A107", message, start, start + size, help=FOREIGN_OPERATORS[written])
    return None


def _stray_character(found: Found) -> Fault | None:
    if found.kind:
        return None
    if found.token == '"':
        return found.fault("A114", "this text is never closed", help='end it with `"""`, or with `"` on the same line')
    if found.token == ".":
        return _point(found)
    remedy = FOREIGN_CHARACTERS.get(found.token, "remove it")
    shown = (
        f"U+{ord(found.token):04X}" if found.token.isspace() or not found.token.isprintable() else f"`{found.token}`"
    )
    return found.fault("A113", f"{shown} is not a character of the language", help=remedy)


def _equal(found: Found) -> Fault | None:
    if found.token != "=" or not found.wants_operator:
        return None
    return found.fault("A106", "`=` gives a name to something; it does not compare", help="to compare, write `==`")


# --- numbers, ranges, names ------------------------------------------------------------------------------------------


def _number(found: Found) -> Fault | None:
    """`2x`, `1_000`, `0x10`, `.5`, `5.`"""
    if found.kind == "DOT" and found.wants_operand:
        return _point(found)
    written = re.search(r"[0-9][0-9.eE]*\.?$", found.before)
    if not written or re.search(r"\w$", found.before[: written.start()]):
        return None
    start = found.line_start + written.start()
    if written.group().endswith(".") and not found.wants_operand:
        whole = bool(re.fullmatch(r"[0-9]+\.", written.group()))
        remedy = f"write `{written.group()}0`" if whole else "a number has one point"
        return Fault("A117", "a number cannot end in a point", start, found.start, help=remedy)
    if not _WORD.match(found.token) or written.end() != len(found.before) or found.token in RESERVED:
        return None
    return _number_and_letters(found, start)


def _number_and_letters(found: Found, start: int) -> Fault:
    written = found.text[start : found.end]
    message = f"{found_phrase('', written)} is neither a number nor a name"
    if re.fullmatch(r"[0-9_]+", written):
        remedy = f"write `{written.replace('_', '')}`"
    elif re.fullmatch(r"0[xXoObB][0-9a-fA-F]+", written):
        remedy = "numbers are written in decimal"
    else:
        remedy = f"a product needs its sign: `{found.text[start : found.start]} * {found.token}`"
    return Fault("A117", message, start, found.end, help=remedy)


def _point(found: Found) -> Fault:
    digits = re.match(r"\.([0-9]+)", found.text[found.start : found.start + 50])
    if digits:
        end = found.start + digits.end()
        message, remedy = "a number cannot start with a point", f"write `0{digits.group()}`"
        return Fault("A117", message, found.start, end, help=remedy)
    code = "A102" if found.wants_operand else "A103"
    return found.fault(code, "nothing stands before this point", help="write whose coordinate it is, such as `q.y`")


def _range(found: Found) -> Fault | None:
    if found.kind != "DOTS":
        return None
    message = "a range stands only after the `in` of `for`, `over` or `per`, or after `:`"
    return found.fault("A118", message, help="to compare with a range, write `low <= x < high`")


def _name_missing(found: Found) -> Fault | None:
    if "NAME" not in found.expected or found.wants_operand:
        return None
    if found.token in RESERVED:
        message = f"`{found.token}` is a reserved word and cannot be a name"
        return found.fault("A109", message, help="choose another name")
    if found.expected != {"NAME"}:
        return None
    message = f"expected a name after `{found.last}`, found {found_phrase(found.kind, found.token)}"
    if found.head == "use":
        return found.fault("A121", message, help="the names are listed: `use windows (shifted, leading)`")
    return found.fault("A121", message, help="a name is made of letters, digits and `_`, and starts with no digit")


def _type_missing(found: Found) -> Fault | None:
    shown = found_phrase(found.kind, found.token)
    if found.head in ("input", "learned", "state") and found.expected in ({"COLON"}, {"NAME", "LSQB"}):
        name = found.last if found.expected == {"COLON"} else found.before.split()[1].rstrip(":")
        example = "[dk, dv]" if found.head == "state" else "real[batch, head, query]"
        message = f"`{found.head} {name}` has no type"
        return found.fault("A110", message, label="expected a type", help=f"write `{found.head} {name}: {example}`")
    if found.expected == {"NAME", "LSQB"}:
        return found.fault("A110", f"expected a type, found {shown}", help="a type is written `real` or `int[head, 3]`")
    if found.head in ("tokens", "pad") and "COLON" in found.expected:
        message = f"the axis `{found.last}` has no extent"
        return found.fault("A110", message, help=f"write `{found.head} {found.last}: extent`")
    if found.expected >= {"COLON", "EQUAL", "RPAR"} and found.kind == "NAME":
        message = f"expected `:` before the type {shown}"
        return found.fault("A110", message, help=f"write `{found.last}: {found.token}`")
    return None


def _equal_missing(found: Found) -> Fault | None:
    if "EQUAL" not in found.expected or found.wants_operator:
        return None
    shown = found_phrase(found.kind, found.token)
    if found.head in ("over", "per"):
        remedy = f"name what it runs over: `{found.head} b = …` or `{found.head} b in …`"
    else:
        remedy = f"write `{found.before.strip() or found.head} = …`"
    return found.fault("A111", f"expected `=`, found {shown}", help=remedy)


# --- inside expressions ----------------------------------------------------------------------------------------------


def _operand_missing(found: Found) -> Fault | None:
    if not found.wants_operand or found.wants_operator:
        return None
    after = f" after {found_phrase('', found.last)}" if found.last else ""
    shown = "the line ends" if found.at_line_end else f"found {found_phrase(found.kind, found.token)}"
    if found.token in RESERVED:
        shown = f"`{found.token}` cannot start one"
    return found.fault("A102", f"an expression is missing{after}: {shown}", label="expected an expression")


def _else_missing(found: Found) -> Fault | None:
    if "ELSE" not in found.expected:
        return None
    if found.kind in ("NAME", "NUMBER", "TEXT", "LPAR"):
        return None
    return found.fault(
        "A119",
        "this `if` has no `else`",
        label="expected `else`",
        help="a choice is written `a if condition else b`; a condition alone goes on with `and`",
    )


def _goes_on(found: Found) -> Fault | None:
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


def _meant_operator(found: Found) -> str:
    if found.kind == "NAME":
        foreign = {"is": "==", "xor": "!=", "mod": "%", "div": "//", "then": "if … else", "where": "if", "when": "if"}
        close = get_close_matches(found.token, ("and", "or", "not", "in", "else", "for"), 1, 0.6)
        meant = foreign.get(found.token) or (close[0] if close else "")
        if meant:
            return f"did you mean `{meant}`?"
    if found.token == "not":
        return "did you mean `and not`, or `not in`?"
    if found.kind in _STATEMENTS | _ITEMS:
        return "every statement starts on a line of its own"
    if found.kind not in ("NAME", "NUMBER"):
        return ""
    return "a product needs its `*`" + ("" if "_NL" in found.expected else ", and arguments a `,` between them")


def _anything(found: Found) -> Fault:
    remedy = ""
    if found.head == "use":
        remedy = "the names are listed: `use windows (shifted, leading)`"
    elif found.expected == {"IN"}:
        remedy = "`not in` is one operator; a negation is joined on by `and not`"
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
    _type_missing,
    _name_missing,
    _equal_missing,
    _operand_missing,
    _else_missing,
    _goes_on,
    _anything,
)
