"""Texts that would exhaust time or memory are refused at once with a position, or are accepted quickly."""

from __future__ import annotations

import time

import pytest

from attnc.spec.checks.measure import MAX_OPERATIONS
from attnc.spec.diagnostics import Diagnostic
from attnc.spec.errors import SpecError
from attnc.spec.load import check_source, load_program
from attnc.spec.reading.limits import MAX_BRANCHES, MAX_WORDS
from attnc.spec.reading.source_text import decode
from attnc.spec.render import render
from attnc.spec.source import SourceFile


class NoModules:
    """A loader without modules."""

    def __call__(self, name: str, asking: SourceFile) -> SourceFile | None:
        return None

    def names(self) -> tuple[str, ...]:
        return ()


def errors(text: str) -> list[Diagnostic]:
    diagnostics = check_source(decode(text, "hostile.attn"), NoModules())
    return [diagnostic for diagnostic in diagnostics if diagnostic.code.startswith("A")]


def pattern(visible: str, lines: str = "") -> str:
    return f"pattern p\n    align end\n{lines}    visible {visible}\n"


def chained(first: str, step: str, times: int, parameters: str = "") -> str:
    """Return definitions a0, a1, …, each made of its predecessor, which is `{0}` in `step`."""
    lines = [f"    let a0{parameters} = {first}\n"]
    lines += [f"    let a{i}{parameters} = {step.format(f'a{i - 1}')}\n" for i in range(1, times + 1)]
    return "".join(lines)


MANY_WORDS = {
    "entries of a list": pattern(f"[{', '.join(map(str, range(1_000_000 // 8)))}][q % 10] <= k"),
    "operands of or": pattern(" or ".join(f"q - k == {i}" for i in range(3_000))),
    "branches": "pattern p\n" + "".join(f"    branch b{i}\n        visible q - k == {i}\n" for i in range(3_000)),
    "patterns": "".join(f"pattern p{i}\n    align end\n    visible 0 <= q - k < {i + 1}\n" for i in range(5_000)),
    "definitions": "".join(f"def f{i}(x) = x + {i}\n" for i in range(5_000)) + pattern("f0(q) >= k"),
    "operands of and": pattern(" and ".join(["k <= q"] * 10_000)),
    "lets in a chain": pattern("a0 >= k", chained("q", "{0} + 1", 5_000)),
    "lets": pattern("k <= q", "".join(f"    let a{i} = q + {i}\n" for i in range(5_000))),
}


@pytest.mark.parametrize("name", MANY_WORDS)
def test_too_many_words_are_refused_at_the_first_word_beyond_the_limit(name: str) -> None:
    (diagnostic,) = errors(MANY_WORDS[name])
    assert diagnostic.code == "A501"
    assert diagnostic.message == f"the text has more than {MAX_WORDS:,} tokens"
    before = diagnostic.primary.span.source.text[: diagnostic.primary.span.start]
    assert 2 * MAX_WORDS < len(before) < 8 * MAX_WORDS, (
        "the diagnostic must point to a word, not to the start of the text"
    )


def test_the_maximum_number_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnc.spec.reading.limits.MAX_WORDS", 11)
    assert not errors(pattern("0 <= q - k"))  # and `pattern`, `p`, `align`, `end`, `visible`
    monkeypatch.setattr("attnc.spec.reading.limits.MAX_WORDS", 9)
    (diagnostic,) = errors(pattern("0 <= q - k"))
    assert (diagnostic.code, diagnostic.primary.span.text) == ("A501", "k")


def test_too_many_branches_are_refused_at_the_first_branch_beyond_the_limit() -> None:
    branches = "".join(f"    branch b{i}\n        visible q - k == {i}\n" for i in range(300))
    merged = f"    combine merge({', '.join(f'b{i}' for i in range(300))})\n"
    (diagnostic,) = errors(f"pattern p\n    align end\n{branches}{merged}")
    assert (diagnostic.code, diagnostic.primary.span.text) == ("A508", f"b{MAX_BRANCHES}")


DOUBLING = {
    "sums": pattern("0 <= q - k < a40", chained("q + k", "{0} + {0}", 40)),
    "products of constants": pattern("0 <= q - k < a40", chained("10 ** 30", "{0} * {0}", 40)),
    "conditions": pattern("a40", chained("q % 3 == k % 3", "{0} or (not {0})", 40)),
    "choices": pattern("0 <= q - k < a40", chained("q + k", "{0} if {0} % 3 == 0 else {0} + 1", 40)),
    "functions": pattern("a40(q, k) < k", chained("x + y", "{0}(y, x) + {0}(x, y + 1)", 40, "(x, y)")),
    "arguments": pattern(f"{'twice(' * 40}q{')' * 40} < k", "    let twice(x) = x + x\n"),
    "a score": "pattern p\n    align end\n    visible k <= q\n"
    + chained("q + k", "{0} + {0}", 40)
    + "    score scale * dot(q, k) + a40\n",
}


@pytest.mark.parametrize("name", DOUBLING)
def test_definitions_that_double_are_refused(name: str) -> None:
    diagnostics = errors(DOUBLING[name])
    assert diagnostics[0].code == "A507"
    assert f"operations with its definitions expanded; the limit is {MAX_OPERATIONS:,}" in diagnostics[0].message
    assert len(diagnostics) <= 2, "the error is repeated for later definitions"


def test_definitions_may_double_up_to_the_limit() -> None:
    assert not errors(pattern("0 <= q - k < a12", chained("q + k", "{0} + {0}", 12)))  # 8,191 operations
    assert errors(pattern("0 <= q - k < a13", chained("q + k", "{0} + {0}", 13)))  # 16,383


def test_arguments_count_once_for_each_read() -> None:
    once = "    let once(x, y) = x + 1\n"
    deep = f"{'once(' * 40}q{', q + k)' * 40} < k"
    assert not errors(pattern(deep, once))


REFUSED = {
    "brackets": (pattern("(" * 10_000 + "q" + ")" * 10_000 + " > k"), "A502"),
    "functions": (pattern("abs(" * 10_000 + "q" + ")" * 10_000 + " > k"), "A502"),
    "a million entries": (pattern(f"[{','.join(['1'] * 1_000_000)}][0] > q - k"), "A501"),
    "a name": (pattern(f"{'a' * 1_000_000} > k"), "A505"),
    "the name of a pattern": (f"pattern {'a' * 1_000_000}\n    visible k <= q\n", "A505"),
    "a chain of definitions": (pattern("a1900 >= k", chained("q", "{0} + 1", 1_900)), "A506"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_too_deep_or_too_long_texts_have_one_diagnostic(name: str) -> None:
    text, code = REFUSED[name]
    try:
        (diagnostic,) = errors(text)
    except SpecError as error:  # a text that is refused before it is parsed
        (diagnostic,) = error.diagnostics
    assert diagnostic.code == code
    assert len(render(diagnostic)) < 500


@pytest.mark.parametrize("line", ["q - k != {}", "k <= q + {}"])
def test_many_lines_of_a_relation_are_read_in_seconds(line: str) -> None:
    text = "pattern p\n" + "".join(f"    visible {line.format(i)}\n" for i in range(1_500))
    began = time.process_time()
    assert not errors(text)
    assert time.process_time() - began < 10, "the limit is ten times the expected CPU time"


def test_a_message_lists_no_more_than_some_patterns() -> None:
    many = "".join(f"pattern p{i}\n    visible k <= q\n" for i in range(1_000))
    with pytest.raises(SpecError) as error:
        load_program(decode(many, "many.attn"), NoModules())
    assert "`p18`, `p19` and 980 more" in str(error.value)


@pytest.mark.parametrize("power", ["2 ** 100000", "2 ** (2 ** (2 ** (2 ** 5)))", "9 ** 9 ** 9 ** 9", "2 ** (-100000)"])
def test_powers_past_64_bits_are_refused(power: str) -> None:
    assert [e.code for e in errors(pattern(f"0 <= q - k < {power}"))] == ["A403"]
