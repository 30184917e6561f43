"""The digest of a pattern: equal for all texts of one meaning, different for every other meaning."""

from __future__ import annotations

import re

import pytest

from attnc.compiler.ir.canonical import canonical
from attnc.compiler.lowering.lower import lower
from attnc.runtime.call.call_errors import PatternNotFoundError
from attnc.runtime.texts.library import ModuleLoader, library_files
from attnc.spec.errors import SpecError
from attnc.spec.formatting import formatted
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.reading.source_text import decode

RADIAL = """
pattern radial(frames: int = 4, per_frame: int = 64, decay: real = 1, block: int = 128, sink: bool = true)
    tokens  t: frames, s: per_frame
    let gap   = abs(q.t - k.t)
    let reach = 2 ** (bitlen(per_frame) - bitlen(gap))
    let width = per_frame if gap <= 1 else max(reach * decay, block)
    let kept  = reach >= 128 or gap % (128 // reach) == 0
    visible abs(q.s - k.s) <= width and kept  or  sink and k.t == 0
    round
        per  a = q // block, b = k // block
        let  density = mean(visible for q in a)
        keep count(density > 1/3 for k in b) > 0.6 * count(density > 0 for k in b)
"""
MOBA = """
use ranks (top)

pattern moba(block: int = 512, topk: int = 3)
    align   end
    select chosen
        over   b = k // block
        score  dot(q, mean(b.k))
        from   b.end <= q
        keep   top(topk - 1)
        always q in b
    visible k in chosen and k <= q
"""
HYBRID = """
pattern hybrid(window: int = 64, stride: int = 16)
    input gate: real[head, 2]
    align   end
    visible k <= q
    branch near
        visible q - k < window
    branch far
        visible (q - k) % stride == 0
    combine sigmoid(gate[0]) * near + sigmoid(gate[1]) * far
"""
DELTA = """
recurrence delta
    input beta: unit[batch, token, head]
    state S: [dk, dv]
    step  S = S + beta * outer(k, v - k @ S)
    read  scale * q @ S
"""

RENAMED = {
    RADIAL: ("gap reach width kept density a b t s", "distance r w taken share blocks_of_q zone time space"),
    MOBA: ("chosen b", "picked unit"),
    HYBRID: ("near far", "zoo aardvark"),
    DELTA: ("S", "Memory"),
}
"""Texts with the names that each declares, and other names to replace them."""

CHANGED = {
    RADIAL: [
        ("1/3", "1/4"), ("decay: real = 1", "decay: real = 2"), ("<= width", "< width"), ("gap <= 1", "gap <= 2"),
        ("k.t == 0", "k.t == 1"), ("count(density > 0", "count(density > 1/9"), ("frames: int = 4", "frames: int = 5"),
        ("sink: bool = true", "sink: bool = false"), ("abs(q.t - k.t)", "abs(q.s - k.s)"),
        ("per  a = q // block", "per  a = q // 64"),
        ("pattern radial", "pattern other"),
    ],
    MOBA: [
        ("topk: int = 3", "topk: int = 4"), ("dot(q, mean(b.k))", "dot(q, sum(b.k))"), ("b.end <= q", "b.end < q"),
        ("always q in b", "always q in b or b == 0"), ("align   end", "align   start"), ("and k <= q", "and k < q"),
    ],
    HYBRID: [
        ("gate[0]) * near", "gate[1]) * near"), ("window: int = 64", "window: int = 65"),
        ("input gate", "learned gate"), ("q - k < window", "q - k <= window"), ("gate", "gates"),
        ("* near + sigmoid(gate[1]) * far", "* far + sigmoid(gate[1]) * near"),
    ],
    DELTA: [("scale * q @ S", "q @ S"), ("v - k @ S", "v + k @ S"), ("unit[batch", "positive[batch"),
        ("beta * outer", "2 * beta * outer")],
}  # fmt: skip


def digest(text: str) -> str:
    source = decode(text.encode(), "text.attn")
    return canonical(lower(bind(load_program(source, ModuleLoader(None)), {})))


def renamed(text: str, old: str, new: str) -> str:
    names = dict(zip(old.split(), new.split(), strict=True))
    return re.sub(r"\b\w+\b", lambda word: names.get(word[0], word[0]), text)


@pytest.mark.parametrize("text", list(RENAMED), ids=["radial", "moba", "hybrid", "delta"])
def test_declared_names_do_not_change_the_digest(text: str) -> None:
    assert digest(renamed(text, *RENAMED[text])) == digest(text)


@pytest.mark.parametrize("text", list(RENAMED), ids=["radial", "moba", "hybrid", "delta"])
def test_each_name_renamed_alone(text: str) -> None:
    for old, new in zip(*(names.split() for names in RENAMED[text]), strict=True):
        assert digest(renamed(text, old, new)) == digest(text), old


@pytest.mark.parametrize(
    ("text", "old", "new"), [(text, *change) for text, changes in CHANGED.items() for change in changes]
)
def test_every_change_of_meaning_changes_the_digest(text: str, old: str, new: str) -> None:
    assert old in text
    assert digest(text.replace(old, new)) != digest(text)


def _commented(text: str) -> str:
    """Add a comment behind each line, and comment lines and empty lines between the lines."""
    return "".join(f"{line}  # {i}\n\n# between\n" if line.strip() else "\n" for i, line in enumerate(text.split("\n")))


_NAMES = "a z m x1 alpha omega near n b i j keep low high unit add sub mul real mean zz9"
NAMES = re.findall(r"\w+", _NAMES)
"""Names for declarations; some are also names of operations and kinds of the IR."""

ANY = """
pattern recalled(size: int = 4)
    input cached: int[batch, head, m]
    visible any(cached[i] == k for i in m) or q - k == size
"""
GRID = """
pattern grid(rows: int = 4)
    tokens  t: rows, s: 8
    visible q.t == k.s or q.s == k.t
"""
ENCODED = [(ANY, "i"), (GRID, "t"), (GRID, "s"), (HYBRID, "near"), (HYBRID, "far"), (MOBA, "chosen"), (DELTA, "S")]


@pytest.mark.parametrize(("text", "name"), ENCODED)
def test_no_name_changes_the_digest(text: str, name: str) -> None:
    """Twenty names, since the order and the signs of terms follow the names that the terms read."""
    digests = {}
    for other in NAMES:
        if not re.search(rf"\b{other}\b", text):
            try:
                digests[other] = digest(renamed(text, name, other))
            except SpecError:  # a name that the language has itself
                continue
    assert len(digests) > 10
    assert set(digests.values()) == {digest(text)}


def test_names_are_not_confused_with_operations() -> None:
    """In branches called `add` and `sub`, operations are not confused with names."""
    branches = {
        "add": "    branch add\n        visible q - k < 64\n",
        "sub": "    branch sub\n        visible (q - k) % 16 == 0\n",
    }
    head = "pattern p()\n    input g: real[2]\n    align end\n    visible k <= q\n"
    one = head + branches["add"] + branches["sub"] + "    combine g[0] * add + g[1] * sub\n"
    other = head + branches["sub"] + branches["add"] + "    combine g[0] * sub - g[1] * add\n"
    assert digest(one) != digest(other)


def test_layout_comments_and_docstrings_do_not_change_the_digest() -> None:
    for text in RENAMED:
        assert digest(_commented(text)) == digest(text)
        assert digest(formatted(decode(text.encode(), "text.attn"))) == digest(text)


def test_patterns_of_the_library_differ() -> None:
    names_by_digest: dict[str, str] = {}
    for name, path in sorted(library_files().items()):
        source = decode(path.read_bytes(), path.name)
        try:
            program = load_program(source, ModuleLoader(None), name)
            pattern = lower(bind(program, {}))
        except (SpecError, PatternNotFoundError):  # modules, and patterns that need parameters
            continue
        digest_text = canonical(pattern)
        assert digest_text not in names_by_digest, (name, names_by_digest[digest_text])
        names_by_digest[digest_text] = name
        assert canonical(lower(bind(program, {}))) == digest_text
    assert len(names_by_digest) > 60
