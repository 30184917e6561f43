"""The catalogue of diagnostic codes: each with a title of one line. A code is never renumbered or reused."""

from __future__ import annotations

CODES: dict[str, str] = {
    # A0xx: the text as such
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
    # A3xx: types
    # A4xx: stages and exactness
    # A5xx: limits
    "A501": "the text is too large",
    "A502": "too deeply nested",
    "A503": "too many operators in one chain",
    "A504": "a number is too long",
    "A505": "a name is too long",
    # A6xx: modules
    # A7xx: not supported yet
    # A8xx: the values given for parameters
    # W0xx: warnings
}
