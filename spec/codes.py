"""The diagnostic codes with their titles. A code is never renumbered or reused.

A page for each code in `explanations/` explains it.
"""

from __future__ import annotations

from importlib.resources import files

CODES: dict[str, str] = {
    # A0xx: text
    "A001": "the text is empty",
    "A002": "the text is not UTF-8",
    "A003": "the text holds a control character",
    "A004": "the text holds a tab",
    "A005": "a line ends with a lone carriage return",
    "A006": "the text holds an invisible character that changes how it is displayed",
    # A1xx: syntax
    "A100": "unexpected text",
    "A101": "a line starts with an unknown word",
    "A102": "an expression is missing",
    "A103": "a bracket is not closed",
    "A104": "a closing bracket has no opening one",
    "A105": "the indentation is wrong",
    "A106": "`=` stands where `==` is meant",
    "A107": "not an operator of the language",
    "A108": "a statement stands where it does not belong",
    "A109": "a reserved word is used as a name",
    "A110": "a type or a range is missing",
    "A111": "`=` is missing",
    "A112": "a statement is followed by something else",
    "A113": "not a character of the language",
    "A114": "a docstring is not closed",
    "A115": "a body is missing",
    "A116": "`:` stands where the language has none",
    "A117": "a number is malformed",
    "A118": "a range stands where none is allowed",
    "A119": "`if` has no `else`",
    "A120": "a docstring is out of place",
    "A121": "a name is missing",
    # A2xx: names
    "A201": "unknown name",
    "A202": "an attribute that does not exist",
    "A203": "unknown axis",
    "A204": "not a function, or not one of this kind",
    "A205": "a circular definition",
    "A206": "a name that is not available here",
    "A207": "a function stands where a value belongs",
    "A208": "a segment stands where a value belongs",
    "A209": "`in` without a segment or a selection",
    "A210": "a variable without a range",
    "A211": "a name hides another",
    "A212": "a name is declared twice",
    "A213": "a name that calls reserve",
    "A214": "a statement in the wrong body",
    "A215": "a statement is incomplete or misplaced in its body",
    "A216": "a statement appears twice",
    "A217": "several token segments without names",
    "A218": "`align` is neither `start` nor `end`",
    "A219": "`documents` without an int input by token",
    "A220": "a preset without names",
    "A221": "a unit that depends on both queries and keys, or on neither",
    "A222": "a learned tensor that nothing reads",
    "A223": "an unknown approximation, or nothing to approximate",
    "A224": "a selection that nothing reads",
    "A225": "an undefined result for an empty selection",
    # A3xx: types
    "A301": "a value of the wrong type",
    "A302": "a type is missing, unknown or not possible here",
    "A303": "not a dimension",
    "A304": "an extent where a range belongs, or a range where an extent belongs",
    "A305": "a call does not fit its function",
    "A306": "an input is read with the wrong indices",
    "A307": "a `def` with types",
    "A308": "not a condition",
    "A309": "not an integer",
    "A310": "not a number",
    "A311": "not a list",
    "A312": "an index out of range",
    "A313": "alternatives of different types",
    "A314": "not a vector, or vectors over different axes",
    # A4xx: stages and exactness
    "A401": "not exact",
    "A402": "not a constant",
    "A403": "a constant without a value",
    "A404": "a number that is too large or too fine",
    "A406": "a value that is needed before it is known",
    "A407": "a coordinate outside its segment",
    "A408": "two extents to infer",
    # A5xx: limits
    "A501": "the text is too large",
    "A502": "too deeply nested",
    "A503": "too many operators in one chain",
    "A504": "a number is too long",
    "A505": "a name is too long",
    "A506": "a chain of definitions is too long",
    "A507": "an expression is too large with its definitions expanded",
    "A508": "too many branches",
    # A6xx: modules
    "A601": "unknown module",
    "A602": "a module does not define this name",
    "A603": "a pattern cannot be used",
    "A604": "modules use each other in a cycle",
    "A605": "modules use modules too deep",
    "A606": "no pattern, or no clear choice of one",
    # A7xx: not supported yet
    "A701": "an expression that is not supported yet",
    "A703": "a statement that is not supported yet",
    "A704": "a type that is not supported yet",
    "A705": "defaults of inputs are not supported yet",
    # A8xx: values of parameters
    "A801": "unknown parameter",
    "A802": "a parameter is missing",
    "A803": "a value does not fit its parameter",
    "A804": "unknown preset",
    "A805": "a requirement does not hold",
    # A9xx: evaluation of a call, for its sizes and inputs
    "A901": "no exact value",
    "A902": "an index out of range in a call",
    "A903": "tokens that do not fit their segments",
    "A904": "sizes that do not fit",
    "A905": "unequal lengths without `align`",
    "A906": "a requirement on sizes does not hold",
    "A907": "documents that are not contiguous, or rows outside them",
    "A908": "too many steps",
    "A909": "an input that does not fit its declaration",
    # W0xx: warnings
    "W001": "a query that sees nothing",
    "W002": "every later key is visible",
    "W003": "a window one key wider than its name says",
    "W004": "a product that can pass 32 bits",
    "W005": "a name that nothing reads",
    "W006": "a condition that is always true, or always false",
    "W007": "a causal pattern whose selection reads later tokens",
    "W008": "the score reads no vectors",
    "W009": "a window that is not centred on its query",
}


def page(code: str) -> str | None:
    """Return the page of a code as Markdown; None for an unknown code."""
    if code not in CODES:
        return None
    return files("attnc.spec").joinpath("explanations").joinpath(f"{code}.md").read_text(encoding="utf-8")
