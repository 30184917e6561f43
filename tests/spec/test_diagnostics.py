"""Every mistake has a message: source and rendered diagnostic, side by side in `diagnostics/*.txt`.

`ATTNC_UPDATE_GOLDEN=1 pytest tests/spec/test_diagnostics.py` rewrites the expected halves; review the diff.
To add a case, write a file that holds only a source, and run this command.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.spec.codes import CODES
from attnc.spec.diagnostics import Diagnostic
from attnc.spec.errors import SpecError
from attnc.spec.load import check_source
from attnc.spec.reading.parse import parse
from attnc.spec.reading.source_text import decode
from attnc.spec.render import render
from attnc.spec.source import SourceFile
from tiers import examples

CASES = sorted((Path(__file__).parent / "diagnostics").glob("*.txt"))
DRAFTS = sorted((Path(__file__).parent / "drafts").glob("*.attn"))
DIVIDER = "\n=== diagnosis ===\n"
FILE = "example.attn"
PATTERN = "pattern p(w: int = 4)\n"


def diagnose(text: str) -> str:
    """Return the rendered diagnostics that `spec` reports for a text without parameters; empty where it reports none.

    Extend this function when a stage is added: each stage takes the result of the stage before it.
    """
    try:
        source = decode(text, FILE)
    except SpecError as error:
        return str(error)
    return "\n\n".join(render(diagnostic) for diagnostic in check_source(source, load))


MODULES = {
    "windows": "def shifted(x, y, window) = abs(x - y) < window\n\npattern banded(w: int)\n    visible q - k < w\n",
    "left": "use right (f)\n",
    "right": "use left (f)\n",
}


class Modules:
    """The modules that a case may use."""

    def __call__(self, name: str, asking: SourceFile) -> SourceFile | None:
        return SourceFile(f"{name}.attn", MODULES[name]) if name in MODULES else None

    def names(self) -> tuple[str, ...]:
        return tuple(MODULES)


load = Modules()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_message(path: Path) -> None:
    source, _, expected = path.read_bytes().decode("utf-8").partition(DIVIDER)
    rendered = diagnose(source) + "\n"
    if os.environ.get("ATTNC_UPDATE_GOLDEN") == "1":
        path.write_bytes(f"{source}{DIVIDER}{rendered}".encode())
    else:
        assert rendered == expected
    assert rendered != "\n", "the case contains no mistake"
    for said in re.split(r"\n\n(?=error|warning)", rendered):
        assert "\nhelp: " in said, "no remedy is given"


def fault(text: bytes | str) -> Diagnostic:
    """Return the only diagnostic of a wrong text, which must be reported without delay."""
    begun = time.perf_counter()
    with pytest.raises(SpecError) as caught:
        parse(decode(text, FILE))
    assert time.perf_counter() - begun < 5
    assert len(str(caught.value)) < 2_000, "the message is too long to read"
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code in CODES
    assert diagnostic.help or diagnostic.primary.text, "no remedy is given"
    return diagnostic


def place(diagnostic: Diagnostic) -> tuple[str, int, int]:
    """Return the code, line and column."""
    span = diagnostic.primary.span
    return diagnostic.code, span.line, span.column


MANY = 3_000

# Each case makes the tree of one expression `MANY` levels deep, in its own way.
DEEP = {
    "round brackets": "(" * MANY + "q" + ")" * MANY,
    "lists": "[" * MANY + "q" + "]" * MANY,
    "calls inside calls": "abs(" * MANY + "q" + ")" * MANY,
    "unclosed brackets": "(" * MANY,
    "not": "not " * MANY + "q",
    "minus": "-" * MANY + "q",
    "plus": "+" * MANY + "q",
    "choices": "1 if q else " * MANY + "2",
    "powers": "q ** " * MANY + "q",
    "attributes": "q" + ".a" * MANY,
    "calls of calls": "f" + "()" * MANY,
    "indices": "x" + "[0]" * MANY,
    "sums": "q" + " + 1" * MANY,
    "products": "q" + " * 1" * MANY,
    "aggregates": "sum(" * MANY + "q" + " for i in 0 .. 2)" * MANY,
    "a mixture": "not (-f(" * MANY + "q" + "))" * MANY,
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_expressions_are_refused_with_a_position(name: str) -> None:
    diagnostic = fault(f"{PATTERN}    visible {DEEP[name]}\n")
    assert diagnostic.code in ("A502", "A503")
    assert diagnostic.primary.span.line == 2


def test_deep_bodies_are_refused() -> None:
    body = "".join(f"{' ' * (4 * (i + 1))}branch b{i}\n" for i in range(100))
    assert place(fault(PATTERN + body))[:2] == ("A502", 10)


def test_broken_deep_expressions_are_refused_without_delay() -> None:
    assert fault(f"{PATTERN}    visible {'not ' * MANY}\n").code == "A502"
    assert fault(f"{PATTERN}    visible q{'.a' * MANY} q\n").code == "A112"


@pytest.mark.parametrize("operator", ["and", "or", "<="])
def test_flat_chains_may_be_long(operator: str) -> None:
    parse(decode(f"{PATTERN}    visible q{f' {operator} k' * 5_000}\n", FILE))


def test_sums_up_to_the_limit() -> None:
    parse(decode(f"{PATTERN}    visible q{' + 1' * 100}\n", FILE))
    assert place(fault(f"{PATTERN}    visible q{' + 1' * 101}\n")) == ("A503", 2, 13)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        ("9" * 40, ""),
        ("9" * 41, "A504"),
        ("9" * 100_000, "A504"),
        ("0." + "1" * 10_000, "A504"),
        ("1e250", ""),
        ("1e-250", ""),
        ("1e251", "A504"),
        ("1e999999", "A504"),
        ("1e-999999999999", "A504"),
        ("1e" + "9" * 10_000, "A504"),
        ("1e000000000000000000000001", ""),
    ],
)
def test_numbers_have_a_maximum_length(number: str, code: str) -> None:
    text = f"{PATTERN}    visible k < {number}\n"
    if code:
        assert place(fault(text)) == (code, 2, 17)
    else:
        parse(decode(text, FILE))


def test_names_have_a_maximum_length() -> None:
    assert "error" not in diagnose(f"{PATTERN}    let {'a' * 100} = 1\n")
    assert place(fault(f"{PATTERN}    let {'a' * 101} = 1\n")) == ("A505", 2, 9)
    assert place(fault(f"{PATTERN}    {'a' * 100_000} = 1\n")) == ("A505", 2, 5)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("", ("A001", 1, 1)),
        (b"", ("A001", 1, 1)),
        ("\n  \n# nothing but this\n   # and this\n", ("A001", 1, 1)),
        ("\ufeff", ("A001", 1, 1)),
        (b"pattern p\n    visible \xff\n", ("A002", 2, 13)),
        (b"\xef\xbb\xbfpattern p\r\n    # \xc3\xa9 \xc3\n", ("A002", 2, 9)),
        ("pattern p\n".encode("utf-16"), ("A002", 1, 1)),
        ("pattern \ud800\n", ("A002", 1, 9)),
        (b"\x7fELF\x02\x01\x01\x00", ("A003", 1, 1)),
        ("pattern p\n    visible \x00\n", ("A003", 2, 13)),
        ("pattern p\n    # \x1b[31m\n", ("A003", 2, 7)),
        ("pattern p\n    # \x85\n", ("A003", 2, 7)),
        ("pattern p\n\tvisible true\n", ("A004", 2, 1)),
        ("pattern p\r\n    let x = 1\r\n    visible\ttrue\r\n", ("A004", 3, 12)),
        ("pattern p\r    visible true\r", ("A005", 1, 10)),
        ("pattern p\n    # \u202e\n", ("A006", 2, 7)),
        ("pattern p\n    visible q\ufeff\n", ("A006", 2, 14)),
        ("x" * ((1 << 20) + 1), ("A501", 1, 1)),
        (b"\x00" * ((1 << 20) + 1), ("A501", 1, 1)),
        ("é" * ((1 << 19) + 1), ("A501", 1, 1)),
        ("x" * 100_000_000, ("A501", 1, 1)),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, (str, bytes)) else value[0],
)
def test_data_that_is_not_text(data: bytes | str, expected: tuple[str, int, int]) -> None:
    assert place(fault(data)) == expected


def test_byte_order_mark_and_crlf_are_accepted_without_shifting_columns() -> None:
    assert diagnose("\ufeffpattern p\r\n    visible true\r\n") == ""
    assert parse(decode(b"\xef\xbb\xbfpattern p\r\n    visible true", FILE)).items
    assert place(fault("\ufeffpattern p\r\n    visible =\r\n")) == ("A102", 2, 13)


def test_every_case_names_a_known_code() -> None:
    for path in CASES:
        code = path.read_text("utf-8").partition(DIVIDER)[2].partition("[")[2][:4]
        assert code in CODES, path.name


WORDS = """pattern recurrence def use let step input state tokens per select round visible score return lambda
q k x and or not in if else for true 0 1.5 .. . , : = == <= ( ) [ ] + - * ** // @ & ! ? ; ' " \\"\\"\\" # é"""
SPACES = ["\n", "\n    ", "\n        ", "\n  ", "pattern p\n    ", "\t"]
PIECES = st.sampled_from(WORDS.split() + SPACES)


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(PIECES, max_size=30).map(" ".join))
def test_random_words_parse_or_have_a_message(text: str) -> None:
    assert_parses_or_complains(text)


@settings(max_examples=examples(200), deadline=None)
@given(st.sampled_from(DRAFTS), st.data())
def test_a_draft_cut_anywhere_parses_or_has_a_message(path: Path, data: st.DataObject) -> None:
    text = path.read_text("utf-8")
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 8)))
    assert_parses_or_complains(
        text[:start] + data.draw(st.sampled_from(["", " ", "(", "]", "=", "not ", "\n"])) + text[end:]
    )


@settings(max_examples=examples(100), deadline=None)
@given(st.text(max_size=80) | st.binary(max_size=80))
def test_random_bytes_parse_or_have_a_message(data: str | bytes) -> None:
    assert_parses_or_complains(data)


def assert_parses_or_complains(data: str | bytes) -> None:
    try:
        parse(decode(data, FILE))
    except SpecError as error:
        (diagnostic,) = error.diagnostics
        span = diagnostic.primary.span
        assert diagnostic.code in CODES
        assert diagnostic.help or diagnostic.primary.text or diagnostic.code == "A100", str(error)
        assert 0 <= span.start <= span.end and span.line <= span.source.text.count("\n") + 1
